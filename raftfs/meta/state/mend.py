"""Makes a state sound whose structure is not: what the invariants would refuse is put right.

For restores with `-i`, when something is better than nothing. Nothing that can still be reached is
dropped: nodes that hang in the air are linked to the root directory, as `orphan-INODE`. Every edit
is told. Needs memory for all nodes, like the checks.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator

from msgspec.structs import replace

from raftfs.const import GOAL_DEFAULT, ROOT_INODE
from raftfs.meta.state import model, read
from raftfs.meta.state.model import (
    COUNTERS_KEY,
    MARK,
    NO_COUNTERS,
    ChunkRow,
    Counters,
    Edge,
    MapEntry,
    Node,
    Rows,
)
from raftfs.wire.ops import NodeType


def mend(rows: Rows) -> list[str]:
    """Edit the rows until `invariants.check_all` has nothing to say; gives one text an edit."""
    return [*_mend_root(rows), *_mend_edges(rows), *_mend_holds(rows), *_link_orphans(rows),
            *_mend_counts(rows), *_mend_maps(rows), *_mend_chunks(rows), *_mend_locks(rows),
            *_mend_totals(rows)]  # fmt: skip


def _node(rows: Rows, inode: int) -> Node | None:
    row = rows.get(model.node_key(inode))
    return row if isinstance(row, Node) else None


def _is_dir(rows: Rows, inode: int) -> bool:
    node = _node(rows, inode)
    return node is not None and node.type == NodeType.DIR


def _mend_root(rows: Rows) -> Iterator[str]:
    if _is_dir(rows, ROOT_INODE):
        return
    if not any(True for _ in rows.scan(b"N")) and not any(True for _ in rows.scan(b"E")):
        return
    root = Node(NodeType.DIR, 0o777, 0, 0, 0, 0, 0, 2, 0, 0, GOAL_DEFAULT, ROOT_INODE)
    rows.put(model.node_key(ROOT_INODE), root)
    yield "root directory made anew"


def _mend_edges(rows: Rows) -> Iterator[str]:
    """Edges to nothing or below no directory go; a directory keeps one edge, the root none."""
    above: dict[int, int] = {}
    for key, edge in list(rows.scan(b"E")):
        assert isinstance(edge, Edge)
        parent, name = model.number_at(key), key[model.GROUP_LEN :]
        node = _node(rows, edge.inode)
        second = node is not None and node.type == NodeType.DIR and (
            edge.inode in above or edge.inode == ROOT_INODE
        )  # fmt: skip
        if node is None or second or not _is_dir(rows, parent):
            rows.delete(key)
            yield f"entry {name!r} of directory {parent} removed: it led to node {edge.inode}"
            continue
        if node.type == NodeType.DIR:
            above[edge.inode] = parent
            if node.parent != parent:
                rows.put(model.node_key(edge.inode), replace(node, parent=parent))
                yield f"parent of directory {edge.inode} is {parent}"


def _mend_holds(rows: Rows) -> Iterator[str]:
    """A hold counts if both its marks, its node and its session are there."""
    by_inode = {(model.number_at(k), model.number_at(k, 9)) for k, _ in rows.scan(b"H")}
    by_session = {(model.number_at(k, 9), model.number_at(k)) for k, _ in rows.scan(b"O")}
    for inode, session in sorted(by_inode | by_session):
        both = (inode, session) in by_inode and (inode, session) in by_session
        there = _node(rows, inode) and rows.get(model.session_key(session))
        if not both or not there:
            rows.delete(model.hold_key(inode, session))
            rows.delete(model.held_key(session, inode))
            yield f"hold of node {inode} by session {session} removed"


def _link_orphans(rows: Rows) -> Iterator[str]:
    """Whatever cannot be reached from the root gets a name there."""
    below: dict[int, list[tuple[bytes, int]]] = defaultdict(list)
    linked: Counter[int] = Counter()
    for key, edge in rows.scan(b"E"):
        assert isinstance(edge, Edge)
        below[model.number_at(key)].append((key, edge.inode))
        linked[edge.inode] += 1
    held = {model.number_at(k) for k, _ in rows.scan(b"H")}
    nodes = [model.number_at(key) for key, _ in rows.scan(b"N")]
    seen = _reached(below, [ROOT_INODE])
    # First those that nothing leads to, so that what hangs below them comes with them; what is
    # left then are circles, and each is cut where its first node is.
    for circles in (False, True):
        for inode in nodes:
            if inode in seen or (linked[inode] and not circles):
                continue
            if inode in held and not linked[inode] and not _is_dir(rows, inode):
                continue  # sustained: open, and rightly without a name
            for parent, entries in below.items():
                for key, _ in [e for e in entries if circles and e[1] == inode]:
                    rows.delete(key)
                    name = key[model.GROUP_LEN :]
                    yield f"entry {name!r} of directory {parent} removed: a circle"
            yield from _link_to_root(rows, inode)
            seen |= _reached(below, [inode])


def _reached(below: dict[int, list[tuple[bytes, int]]], todo: list[int]) -> set[int]:
    seen = set(todo)
    while todo:
        for _, inode in below.get(todo.pop(), ()):
            if inode not in seen:
                seen.add(inode)
                todo.append(inode)
    return seen


def _link_to_root(rows: Rows, inode: int) -> Iterator[str]:
    name, number = f"orphan-{inode}", 0
    while rows.get(model.edge_key(ROOT_INODE, name.encode())) is not None:
        number += 1
        name = f"orphan-{inode}-{number}"
    rows.put(model.edge_key(ROOT_INODE, name.encode()), Edge(inode))
    node = _node(rows, inode)
    assert node is not None
    rows.put(model.node_key(inode), replace(node, parent=ROOT_INODE))
    yield f"node {inode} hung in the air: linked to the root directory as {name}"


def _mend_counts(rows: Rows) -> Iterator[str]:
    """nlink and entries as the edges say."""
    links, subdirs, entries = Counter[int](), Counter[int](), Counter[int]()
    for key, edge in rows.scan(b"E"):
        assert isinstance(edge, Edge)
        links[edge.inode] += 1
        entries[model.number_at(key)] += 1
        if _is_dir(rows, edge.inode):
            subdirs[model.number_at(key)] += 1
    for key, node in list(rows.scan(b"N")):
        assert isinstance(node, Node)
        inode = model.number_at(key)
        right = replace(node, nlink=links[inode])
        if node.type == NodeType.DIR:
            right = replace(node, nlink=2 + subdirs[inode], entries=entries[inode])
        if right != node:
            rows.put(key, right)
            yield f"node {inode}: {right.nlink} links, {right.entries} entries"


def _mend_maps(rows: Rows) -> Iterator[str]:
    """Entries of files' maps lead to chunks, each chunk is in one."""
    used: set[int] = set()
    for key, entry in list(rows.scan(b"M")):
        assert isinstance(entry, MapEntry)
        inode, index = model.number_at(key), model.number_at(key, 9)
        if entry.chunk in used or read.chunk(rows, entry.chunk) is None or not _node(rows, inode):
            rows.delete(key)
            yield f"chunk {entry.chunk:016X} taken out of file {inode} at index {index}"
        used.add(entry.chunk)


def _mend_chunks(rows: Rows) -> Iterator[str]:
    """References, owners, goals and versions as the maps say."""
    owners: dict[int, tuple[int, int]] = {}
    for key, entry in rows.scan(b"M"):
        assert isinstance(entry, MapEntry)
        owners[entry.chunk] = (model.number_at(key), model.number_at(key, 9))
    for key, chunk in list(rows.scan(b"C")):
        assert isinstance(chunk, ChunkRow)
        version = max(1, chunk.version)
        right = replace(chunk, refs=0, version=version, reserved=max(version, chunk.reserved))
        if chunk.id in owners:
            inode, index = owners[chunk.id]
            node = _node(rows, inode)
            assert node is not None
            right = replace(right, refs=1, owner=inode, index=index, goal=node.goal)
        if right != chunk:
            rows.put(key, right)
            yield f"chunk {chunk.id:016X}: {right.refs} references"
        doomed = rows.get(model.doomed_key(chunk.id)) is not None
        if doomed and right.refs:
            rows.delete(model.doomed_key(chunk.id))
            yield f"chunk {chunk.id:016X} is doomed no longer"
        elif not doomed and not right.refs:
            rows.put(model.doomed_key(chunk.id), MARK)
            yield f"chunk {chunk.id:016X} is doomed: no file has it"
    for key, _ in list(rows.scan(b"D")):
        if read.chunk(rows, model.number_at(key)) is None:
            rows.delete(key)
            yield f"doom of missing chunk {model.number_at(key):016X} removed"


def _mend_locks(rows: Rows) -> Iterator[str]:
    """The index of locks as the chunks say."""
    right = set()
    for _, chunk in rows.scan(b"C"):
        assert isinstance(chunk, ChunkRow)
        if chunk.lock:
            right.add(model.lock_key(chunk.lock_session, chunk.id))
    there = {key for key, _ in rows.scan(b"L")}
    for key in sorted(right - there):
        rows.put(key, MARK)
    for key in sorted(there - right):
        rows.delete(key)
    if right != there:
        yield f"index of locks: {len(right - there)} added, {len(there - right)} removed"


def _mend_totals(rows: Rows) -> Iterator[str]:
    """Totals are true; no number is given out twice."""
    row = rows.get(COUNTERS_KEY)
    old = row if isinstance(row, Counters) else NO_COUNTERS
    nodes, chunks, sessions = (
        [model.number_at(key) for key, _ in rows.scan(table)] for table in (b"N", b"C", b"S")
    )
    new = replace(
        old, nodes=len(nodes), chunks=len(chunks), sessions=len(sessions),
        next_inode=max([old.next_inode - 1, *nodes]) + 1,
        next_chunk=max([old.next_chunk - 1, *chunks]) + 1,
        next_session=max([old.next_session - 1, *sessions]) + 1,
    )  # fmt: skip
    if new != old:
        rows.put(COUNTERS_KEY, new)
        yield f"totals: {new.nodes} nodes, {new.chunks} chunks, {new.sessions} sessions"
