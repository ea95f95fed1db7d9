"""What an operation works on: the rows, the entry's time, the asking session, the counters.

An operation first checks everything and refuses with `ReplyError`, which costs nothing; only then
it changes rows, and from there on nothing may fail.
"""

import errno

from msgspec.structs import replace

from raftfs.const import NAME_MAX
from raftfs.errors import ReplyError, invariant
from raftfs.meta.state import model
from raftfs.meta.state.model import MARK, ChunkRow, Counters, Edge, Node, Rows
from raftfs.wire.ops import Attr, NodeType


class Tally:
    """The counters while a batch is applied; fields as in `model.Counters`."""

    __slots__ = (
        "chunks", "cluster", "next_chunk", "next_inode", "next_lock", "next_session", "nodes",
        "sessions", "version",
    )  # fmt: skip

    def __init__(self, row: Counters) -> None:
        self.cluster = row.cluster
        self.next_inode, self.next_chunk = row.next_inode, row.next_chunk
        self.next_session, self.next_lock = row.next_session, row.next_lock
        self.version = row.version
        self.nodes, self.chunks, self.sessions = row.nodes, row.chunks, row.sessions

    def row(self) -> Counters:
        """As a row."""
        return Counters(
            self.cluster, self.next_inode, self.next_chunk, self.next_session, self.next_lock,
            self.version, self.nodes, self.chunks, self.sessions,
        )  # fmt: skip


class Change:
    """The context of one operation."""

    __slots__ = ("no_line", "now", "rows", "session", "tally")

    def __init__(self, rows: Rows, tally: Tally, now: int, session: int) -> None:
        self.rows, self.tally, self.now, self.session = rows, tally, now, session
        self.no_line = False  # the command changed nothing: its line would tell nothing

    # --- lookups, each refusing what is not there

    def node(self, inode: int) -> Node:
        """The node; ENOENT if it is gone."""
        row = self.rows.get(model.node_key(inode))
        if row is None:
            raise ReplyError(errno.ENOENT)
        assert isinstance(row, Node)
        return row

    def directory(self, inode: int) -> Node:
        """The node, which must be a directory that still exists."""
        node = self.node(inode)
        if node.type != NodeType.DIR:
            raise ReplyError(errno.ENOTDIR)
        return node

    def file(self, inode: int) -> Node:
        """The node, which must be a regular file."""
        node = self.node(inode)
        if node.type != NodeType.FILE:
            raise ReplyError(errno.EISDIR if node.type == NodeType.DIR else errno.EINVAL)
        return node

    def edge(self, parent: int, name: bytes) -> int:
        """The inode under a name; ENOENT if there is none."""
        row = self.rows.get(model.edge_key(parent, name))
        if row is None:
            raise ReplyError(errno.ENOENT)
        assert isinstance(row, Edge)
        return row.inode

    def chunk(self, chunk: int) -> ChunkRow:
        """The chunk; ENOENT if it is gone."""
        row = self.rows.get(model.chunk_key(chunk))
        if row is None:
            raise ReplyError(errno.ENOENT)
        assert isinstance(row, ChunkRow)
        return row

    def free_name(self, parent: int, name: bytes) -> None:
        """EEXIST if the name is taken, EINVAL or ENAMETOOLONG if it can be none."""
        check_name(name)
        if self.rows.get(model.edge_key(parent, name)) is not None:
            raise ReplyError(errno.EEXIST)

    # --- changes

    def put_node(self, inode: int, node: Node) -> None:
        """Set a node."""
        self.rows.put(model.node_key(inode), node)

    def touch_parent(self, inode: int, node: Node, *, links: int = 0, entries: int = 0) -> None:
        """A directory's content changed: its times, its link and entry counts."""
        self.put_node(
            inode,
            replace(
                node, mtime=self.now, ctime=self.now, nlink=node.nlink + links,
                entries=node.entries + entries,
            ),
        )  # fmt: skip

    def add_edge(self, parent: int, name: bytes, inode: int) -> None:
        """Set a directory's entry."""
        self.rows.put(model.edge_key(parent, name), Edge(inode))

    def drop_link(self, inode: int, node: Node) -> bool:
        """One link fewer; gives whether it was the last (the node goes, or is sustained)."""
        left = node.nlink - 1
        if left > 0 or self.is_held(inode):
            self.put_node(inode, replace(node, nlink=left, ctime=self.now))
            return left == 0
        self.destroy(inode, node)
        return True

    def is_held(self, inode: int) -> bool:
        """Whether some session holds the file open."""
        return any(True for _ in self.rows.scan(model.hold_prefix(inode)))

    def destroy(self, inode: int, node: Node) -> None:
        """Remove a node that nobody refers to, and let go of its chunks."""
        invariant(node.nlink <= 1 or node.type == NodeType.DIR, "destroying a linked node")
        if node.type == NodeType.FILE:
            self.cut_map(inode, 0)
        elif node.type == NodeType.SYMLINK:
            self.rows.delete(model.target_key(inode))
        self.rows.delete(model.node_key(inode))
        self.tally.nodes -= 1

    def cut_map(self, inode: int, first: int) -> None:
        """Let go of the file's chunks from index `first` on."""
        prefix = model.map_prefix(inode)
        after = (first - 1).to_bytes(8, "big") if first else b""
        for key, entry in list(self.rows.scan(prefix, after)):
            assert isinstance(entry, model.MapEntry)
            self.rows.delete(key)
            self.unref(self.chunk(entry.chunk))

    def unref(self, chunk: ChunkRow) -> None:
        """A map entry that named the chunk is gone; without any left it is doomed."""
        if chunk.refs > 1:
            self.rows.put(model.chunk_key(chunk.id), replace(chunk, refs=chunk.refs - 1))
            return
        chunk = self.unlock(chunk)
        self.rows.put(model.chunk_key(chunk.id), replace(chunk, refs=0))
        self.rows.put(model.doomed_key(chunk.id), MARK)

    def unlock(self, chunk: ChunkRow) -> ChunkRow:
        """End the chunk's grant, if any."""
        if not chunk.lock:
            return chunk
        self.rows.delete(model.lock_key(chunk.lock_session, chunk.id))
        chunk = replace(chunk, lock=0, lock_session=0, lock_time=0)
        self.rows.put(model.chunk_key(chunk.id), chunk)
        return chunk


def attr(inode: int, node: Node) -> Attr:
    """A node as clients see it."""
    return Attr(
        inode, node.type, node.mode, node.uid, node.gid, node.atime, node.mtime, node.ctime,
        node.nlink, node.length, node.rdev, node.goal,
    )  # fmt: skip


def check_name(name: bytes) -> None:
    """ENAMETOOLONG beyond 255 bytes; EINVAL for what cannot name an entry."""
    if len(name) > NAME_MAX:
        raise ReplyError(errno.ENAMETOOLONG)
    if not name or name in (b".", b"..") or b"/" in name or b"\0" in name:
        raise ReplyError(errno.EINVAL)


def without_setid(mode: int) -> int:
    """The mode after a write or a change of owner: setuid goes, setgid where group may execute."""
    if mode & 0o2010 == 0o2010:
        mode &= ~0o2000
    return mode & ~0o4000
