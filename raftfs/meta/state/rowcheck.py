"""Each row of the state against the rows that it refers to: what must hold of it, one by one.

Unlike `invariants.py` this can be done while the state is in use, some rows at a time. What needs
the whole state at one moment (counts of links, totals, reachability) is not looked at.
"""

from collections.abc import Callable

from raftfs.meta.state import model, read
from raftfs.meta.state.model import ChunkRow, Edge, MapEntry, Node, Row, Rows
from raftfs.wire.inquiries import RowsPage
from raftfs.wire.ops import NodeType


def check_some(rows: Rows, table: str, after: bytes, limit: int) -> RowsPage:
    """Up to `limit` rows of a table of `CHECKED`, behind the key `after` (without its letter)."""
    check = CHECKED[table]
    checked, last, findings = 0, b"", list[str]()
    for key, row in rows.scan(table.encode(), after):
        if checked >= limit:
            return RowsPage(checked, last, findings)
        checked, last = checked + 1, key[1:]
        findings += check(rows, key, row)
    return RowsPage(checked, b"", findings)


def _node(rows: Rows, inode: int) -> Node | None:
    row = rows.get(model.node_key(inode))
    return row if isinstance(row, Node) else None


def _check_node(rows: Rows, key: bytes, row: Row) -> list[str]:
    inode = model.number_at(key)
    if not isinstance(row, Node):
        return [f"node {inode} is no node"]
    if row.type == NodeType.DIR:
        above = _node(rows, row.parent)
        if above is None or above.type != NodeType.DIR:
            return [f"directory {inode} has no directory above it"]
    elif row.nlink == 0 and next(iter(rows.scan(model.hold_prefix(inode))), None) is None:
        return [f"node {inode} has no name, and nobody holds it open"]
    return []


def _check_edge(rows: Rows, key: bytes, row: Row) -> list[str]:
    parent, name = model.number_at(key), key[model.GROUP_LEN :]
    what = f"entry {name.decode(errors='backslashreplace')!r} of directory {parent}"
    above = _node(rows, parent)
    if above is None or above.type != NodeType.DIR:
        return [f"{what}: there is no such directory"]
    node = _node(rows, row.inode) if isinstance(row, Edge) else None
    if node is None:
        return [f"{what} leads to no node"]
    if node.type == NodeType.DIR and node.parent != parent:
        return [f"{what}: the directory thinks that it is below {node.parent}"]
    return []


def _check_map(rows: Rows, key: bytes, row: Row) -> list[str]:
    inode, index = model.number_at(key), model.number_at(key, 9)
    what = f"index {index} of file {inode}"
    chunk = read.chunk(rows, row.chunk) if isinstance(row, MapEntry) else None
    node = _node(rows, inode)
    if node is None or node.type != NodeType.FILE:
        return [f"{what}: there is no such file"]
    if chunk is None:
        return [f"{what} names a chunk that does not exist"]
    found = []
    if (chunk.owner, chunk.index) != (inode, index):
        found.append(f"{what}: chunk {chunk.id:016X} belongs to another file")
    if chunk.goal < node.goal:
        found.append(f"{what}: chunk {chunk.id:016X} has goal {chunk.goal}, not {node.goal}")
    return found


def _check_chunk(rows: Rows, key: bytes, row: Row) -> list[str]:
    number = model.number_at(key)
    what = f"chunk {number:016X}"
    if not isinstance(row, ChunkRow) or row.id != number:
        return [f"{what} is another chunk"]
    found = []
    if not 1 <= row.version <= row.reserved:
        found.append(f"{what} has version {row.version}, but {row.reserved} is the highest given")
    entry = rows.get(model.map_key(row.owner, row.index))
    if row.refs and (not isinstance(entry, MapEntry) or entry.chunk != number):
        found.append(f"{what} is not where it should be, in index {row.index} of file {row.owner}")
    if (rows.get(model.doomed_key(number)) is not None) != (row.refs == 0):
        found.append(f"{what} has {row.refs} references, which its doom does not agree with")
    if row.lock and rows.get(model.lock_key(row.lock_session, number)) is None:
        found.append(f"{what} is locked by session {row.lock_session}, which does not know it")
    return found


def _check_lock(rows: Rows, key: bytes, row: Row) -> list[str]:
    session, number = model.number_at(key), model.number_at(key, 9)
    chunk = read.chunk(rows, number)
    if chunk is None or not chunk.lock or chunk.lock_session != session:
        return [f"session {session} thinks that it has locked chunk {number:016X}"]
    return []


def _check_doomed(rows: Rows, key: bytes, row: Row) -> list[str]:
    number = model.number_at(key)
    chunk = read.chunk(rows, number)
    return [] if chunk is not None else [f"chunk {number:016X} is doomed, but does not exist"]


def _check_hold(rows: Rows, key: bytes, row: Row) -> list[str]:
    inode, session = model.number_at(key), model.number_at(key, 9)
    what = f"node {inode} is held open by session {session}"
    if _node(rows, inode) is None:
        return [f"{what}, but there is no such node"]
    if read.session(rows, session) is None:
        return [f"{what}, which does not exist"]
    if rows.get(model.held_key(session, inode)) is None:
        return [f"{what}, which does not know it"]
    return []


def _check_held(rows: Rows, key: bytes, row: Row) -> list[str]:
    session, inode = model.number_at(key), model.number_at(key, 9)
    if rows.get(model.hold_key(inode, session)) is None:
        return [f"session {session} thinks that it holds node {inode} open"]
    return []


CHECKED: dict[str, Callable[[Rows, bytes, Row], list[str]]] = {
    "N": _check_node, "E": _check_edge, "M": _check_map, "C": _check_chunk, "D": _check_doomed,
    "L": _check_lock, "H": _check_hold, "O": _check_held,
}  # fmt: skip
