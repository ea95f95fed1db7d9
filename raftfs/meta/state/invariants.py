"""What must hold of every state between two entries. Each check raises InvariantError.

They read the whole state: for tests, the simulator and offline checking.
"""

from collections import Counter

from raftfs.const import ROOT_INODE
from raftfs.errors import invariant
from raftfs.meta.state import model, read
from raftfs.meta.state.model import ChunkRow, Edge, MapEntry, Node, Rows
from raftfs.wire.ops import NodeType


def _nodes(rows: Rows) -> dict[int, Node]:
    return {model.number_at(k): r for k, r in rows.scan(b"N") if isinstance(r, Node)}


def check_links(rows: Rows) -> None:
    """nlink and entry counts agree with the edges; every edge leads to a node."""
    nodes, links, subdirs, entries = _nodes(rows), Counter[int](), Counter[int](), Counter[int]()
    for key, edge in rows.scan(b"E"):
        assert isinstance(edge, Edge)
        parent = model.number_at(key)
        invariant(edge.inode in nodes, f"edge to missing node {edge.inode}")
        invariant(nodes[parent].type == NodeType.DIR, f"edge below {parent}, no directory")
        links[edge.inode] += 1
        entries[parent] += 1
        if nodes[edge.inode].type == NodeType.DIR:
            subdirs[parent] += 1
            invariant(nodes[edge.inode].parent == parent, f"parent of {edge.inode}")
    for inode, node in nodes.items():
        if node.type == NodeType.DIR:
            invariant(node.nlink == 2 + subdirs[inode], f"nlink of directory {inode}")
            invariant(node.entries == entries[inode], f"entries of directory {inode}")
            invariant(links[inode] == (inode != ROOT_INODE), f"edges to directory {inode}")
        else:
            invariant(node.nlink == links[inode], f"nlink of {inode}")


def check_reachable(rows: Rows) -> None:
    """Everything hangs below the root, or is sustained."""
    nodes = _nodes(rows)
    if not nodes:
        return
    seen = {attr.inode for attr in read.walk(rows, ROOT_INODE)}
    for inode, node in nodes.items():
        invariant(inode in seen or node.nlink == 0, f"node {inode} hangs in the air")


def check_holds(rows: Rows) -> None:
    """Both indices of holds agree; sustained nodes are held; holders are sessions."""
    by_inode = {(model.number_at(k), model.number_at(k, 9)) for k, _ in rows.scan(b"H")}
    by_session = {(model.number_at(k, 9), model.number_at(k)) for k, _ in rows.scan(b"O")}
    invariant(by_inode == by_session, "the two indices of holds differ")
    held = {inode for inode, _ in by_inode}
    for inode, node in _nodes(rows).items():
        sustained = node.nlink == 0 and node.type != NodeType.DIR
        invariant(not sustained or inode in held, f"node {inode} is sustained by nobody")
    for inode, session in by_inode:
        invariant(rows.get(model.node_key(inode)), f"hold of missing node {inode}")
        invariant(rows.get(model.session_key(session)), f"hold by missing session {session}")


def check_chunks(rows: Rows) -> None:
    """References, owners, goals, versions and dooms of chunks agree with the files' maps."""
    refs: Counter[int] = Counter()
    for key, entry in rows.scan(b"M"):
        assert isinstance(entry, MapEntry)
        inode, index = model.number_at(key), model.number_at(key, 9)
        row = read.chunk(rows, entry.chunk)
        node = rows.get(model.node_key(inode))
        invariant(row is not None, f"map entry to missing chunk {entry.chunk}")
        invariant(isinstance(node, Node), f"map entry of missing node {inode}")
        assert row is not None and isinstance(node, Node)
        refs[entry.chunk] += 1
        invariant((row.owner, row.index) == (inode, index), f"owner of chunk {row.id}")
        invariant(row.goal == node.goal, f"goal of chunk {row.id}")
    doomed = {model.number_at(k) for k, _ in rows.scan(b"D")}
    for _, chunk in rows.scan(b"C"):
        assert isinstance(chunk, ChunkRow)
        invariant(chunk.refs == refs[chunk.id], f"references of chunk {chunk.id}")
        invariant((chunk.id in doomed) == (chunk.refs == 0), f"doom of chunk {chunk.id}")
        invariant(1 <= chunk.version <= chunk.reserved, f"versions of chunk {chunk.id}")


def check_locks(rows: Rows) -> None:
    """The index of locks by session agrees with the chunks."""
    indexed = {(model.number_at(k), model.number_at(k, 9)) for k, _ in rows.scan(b"L")}
    rows_locked = set()
    for _, row in rows.scan(b"C"):
        assert isinstance(row, ChunkRow)
        if row.lock:
            rows_locked.add((row.lock_session, row.id))
    invariant(indexed == rows_locked, "the index of locks differs from the chunks")


def check_counters(rows: Rows) -> None:
    """Totals are true; no number is given out twice."""
    totals = read.totals(rows)
    nodes = _nodes(rows)
    chunk_ids = [model.number_at(k) for k, _ in rows.scan(b"C")]
    invariant(totals.nodes == len(nodes), "number of nodes")
    invariant(totals.chunks == len(chunk_ids), "number of chunks")
    invariant(totals.sessions == sum(1 for _ in rows.scan(b"S")), "number of sessions")
    invariant(totals.next_chunk > max(chunk_ids, default=0), "a chunk number beyond the counter")


CHECKS = (
    check_links, check_reachable, check_holds, check_chunks, check_locks, check_counters,
)  # fmt: skip


def check_all(rows: Rows) -> None:
    """Every check above."""
    for check in CHECKS:
        check(rows)
