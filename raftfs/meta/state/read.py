"""Questions to the state. Nothing here changes a row; what is not there is a ReplyError."""

import errno
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from raftfs.const import CHUNK_SIZE, NAME_MAX
from raftfs.errors import ReplyError
from raftfs.meta.state import change, model
from raftfs.meta.state.model import ChunkRow, Counters, Edge, MapEntry, Node, Rows, SessionRow
from raftfs.wire.inquiries import FindNames, NamesPage, NodePlace
from raftfs.wire.messages import DirPage
from raftfs.wire.ops import Attr, NodeType


class Totals(NamedTuple):
    """Counts of the whole state."""

    cluster: bytes
    nodes: int
    chunks: int
    sessions: int
    next_chunk: int
    version: int


def _node(rows: Rows, inode: int) -> Node:
    row = rows.get(model.node_key(inode))
    if not isinstance(row, Node):
        raise ReplyError(errno.ENOENT)
    return row


def getattr(rows: Rows, inode: int) -> Attr:
    """A node's attributes."""
    return change.attr(inode, _node(rows, inode))


def lookup(rows: Rows, parent: int, name: bytes) -> Attr:
    """The attributes of the node under a name; `..` is the directory's parent."""
    above = _node(rows, parent)
    if above.type != NodeType.DIR:
        raise ReplyError(errno.ENOTDIR)
    if name == b"..":
        return getattr(rows, above.parent)
    if name == b".":
        return change.attr(parent, above)
    if len(name) > NAME_MAX:
        raise ReplyError(errno.ENAMETOOLONG)
    edge = rows.get(model.edge_key(parent, name))
    if not isinstance(edge, Edge):
        raise ReplyError(errno.ENOENT)
    return getattr(rows, edge.inode)


def readlink(rows: Rows, inode: int) -> bytes:
    """Where a symbolic link points; EINVAL for anything else."""
    if _node(rows, inode).type != NodeType.SYMLINK:
        raise ReplyError(errno.EINVAL)
    row = rows.get(model.target_key(inode))
    assert isinstance(row, model.Target)
    return row.path


def readdir(rows: Rows, inode: int, after: bytes, limit: int) -> DirPage:
    """Up to `limit` entries in the order of their names' bytes, after the name `after`."""
    directory = _node(rows, inode)
    if directory.type != NodeType.DIR:
        raise ReplyError(errno.ENOTDIR)
    entries: list[tuple[bytes, Attr]] = []
    for key, edge in rows.scan(model.edge_prefix(inode), after):
        if len(entries) >= limit:
            return DirPage(directory.parent, entries, True)
        assert isinstance(edge, Edge)
        entries.append((key[model.GROUP_LEN :], getattr(rows, edge.inode)))
    return DirPage(directory.parent, entries, False)


def chunk(rows: Rows, number: int) -> ChunkRow | None:
    """A chunk, doomed or not; None if there is none of this number."""
    row = rows.get(model.chunk_key(number))
    assert row is None or isinstance(row, ChunkRow)
    return row


def file_chunk(rows: Rows, inode: int, index: int) -> tuple[ChunkRow | None, int]:
    """The chunk at an index of a file (None: a hole), and the file's length."""
    node = _node(rows, inode)
    if node.type != NodeType.FILE:
        raise ReplyError(errno.EISDIR if node.type == NodeType.DIR else errno.EINVAL)
    entry = rows.get(model.map_key(inode, index))
    return (chunk(rows, entry.chunk) if isinstance(entry, MapEntry) else None), node.length


def file_chunks(
    rows: Rows, inode: int, first: int, limit: int
) -> list[tuple[int, ChunkRow | None]]:
    """Indices from `first` on that the file's length covers, holes as None. EPERM for no file."""
    node = _node(rows, inode)
    if node.type != NodeType.FILE:
        raise ReplyError(errno.EPERM)
    end = min(-(-node.length // CHUNK_SIZE), first + limit)
    found: dict[int, ChunkRow | None] = dict.fromkeys(range(first, end))
    after = (first - 1).to_bytes(8, "big") if first else b""
    for key, entry in rows.scan(model.map_prefix(inode), after):
        index = model.number_at(key, 9)
        if index >= end:
            break
        assert isinstance(entry, MapEntry)
        found[index] = chunk(rows, entry.chunk)
    return list(found.items())


def walk(rows: Rows, inode: int) -> Iterator[Attr]:
    """A node and everything below it. The state must not change meanwhile."""
    top = getattr(rows, inode)
    yield top
    todo = [inode] if top.type == NodeType.DIR else []
    while todo:
        for _, edge in rows.scan(model.edge_prefix(todo.pop())):
            assert isinstance(edge, Edge)
            below = getattr(rows, edge.inode)
            yield below
            if below.type == NodeType.DIR:
                todo.append(below.inode)


def session(rows: Rows, number: int) -> SessionRow | None:
    """A session, or None."""
    row = rows.get(model.session_key(number))
    assert row is None or isinstance(row, SessionRow)
    return row


def sessions(rows: Rows) -> Iterator[SessionRow]:
    """All sessions by number."""
    for _, row in rows.scan(b"S"):
        assert isinstance(row, SessionRow)
        yield row


def session_locks(rows: Rows, number: int) -> list[ChunkRow]:
    """The chunks that a session is writing."""
    keys = [key for key, _ in rows.scan(model.lock_prefix(number))]
    found = [chunk(rows, model.number_at(key, 9)) for key in keys]
    return [row for row in found if row is not None]


def chunks(rows: Rows, after: int, limit: int) -> list[ChunkRow]:
    """Up to `limit` chunks of numbers above `after`, doomed ones included."""
    found: list[ChunkRow] = []
    for _, row in rows.scan(b"C", after.to_bytes(8, "big")):
        if len(found) >= limit:
            break
        assert isinstance(row, ChunkRow)
        found.append(row)
    return found


def doomed(rows: Rows, after: int, limit: int) -> list[int]:
    """Up to `limit` numbers above `after` of chunks without references."""
    found: list[int] = []
    for key, _ in rows.scan(b"D", after.to_bytes(8, "big")):
        if len(found) >= limit:
            break
        found.append(model.number_at(key))
    return found


def members(rows: Rows) -> dict[str, bytes]:
    """The masters that vote: name -> identity. Empty before the cluster was founded."""
    prefix = model.member_key("")
    found = {}
    for key, row in rows.scan(prefix):
        assert isinstance(row, model.MemberRow)
        found[key[len(prefix) :].decode()] = row.uuid
    return found


def totals(rows: Rows) -> Totals:
    """Counts of the whole state."""
    row = rows.get(model.COUNTERS_KEY)
    c = row if isinstance(row, Counters) else model.NO_COUNTERS
    return Totals(c.cluster, c.nodes, c.chunks, c.sessions, c.next_chunk, c.version)


def places(rows: Rows, inodes: Iterable[int]) -> list[NodePlace]:
    """Of those of the nodes that exist: what they are and below which directory."""
    found = []
    for inode in inodes:
        row = rows.get(model.node_key(inode))
        if isinstance(row, Node):
            found.append(NodePlace(inode, row.type, row.nlink, row.parent))
    return found


def find_names(rows: Rows, ask: FindNames, limit: int) -> NamesPage:
    """Of the next `limit` entries, of one directory or of all, those that lead to the nodes."""
    wanted, looked, last = set(ask.inodes), 0, b""
    prefix = model.edge_prefix(ask.parent) if ask.parent else b"E"
    found: list[tuple[int, int, bytes]] = []
    for key, edge in rows.scan(prefix, ask.after):
        if looked >= limit:
            return NamesPage(found, last)
        looked, last = looked + 1, key[len(prefix) :]
        assert isinstance(edge, Edge)
        if edge.inode in wanted:
            found.append((edge.inode, model.number_at(key), key[model.GROUP_LEN :]))
    return NamesPage(found, b"")
