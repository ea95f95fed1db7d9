"""The schema of the replicated state: every row, what it means, and who may change it. Canonical.

Rows are immutable records under byte keys: one table byte, an 8-byte big-endian group (the inode,
chunk or session that the row belongs to), then whatever tells rows of a group apart. Keys sort as
their numbers do, so a scan of a table goes by number, a scan of a group by the rest.

| table | group | rest | row | meaning |
|---|---|---|---|---|
| N | inode | | Node | attributes of a file, directory, ... |
| E | parent | name | Edge | an entry of a directory |
| T | inode | | Target | where a symbolic link points |
| M | inode | index (8) | MapEntry | which chunk holds that 64 MiB of a file; none: a hole |
| C | chunk | | ChunkRow | a chunk: version, lock, owner |
| D | chunk | | Mark | the chunk has no reference left: its copies are to be destroyed |
| L | session | chunk (8) | Mark | the session holds the lock of the chunk |
| H | inode | session (8) | Mark | the session holds the file open |
| O | session | inode (8) | Mark | the same, by session |
| S | session | | SessionRow | a client |
| R | session | slot (2) | ResultRow | the answer to a sequence number, kept for its retry |
| P | 0 | name | MemberRow | a master and its identity |
| Z | 0 | | Counters | the next numbers, totals, the cluster's UUID |
"""

import struct
from collections.abc import Iterator
from typing import Protocol

from raftfs.wire.ops import Record

_Q = struct.Struct(">cQ")
_QQ = struct.Struct(">cQQ")
_QH = struct.Struct(">cQH")
# Ids from the wire may be negative, and a command that raises would stop every replica. They are
# masked: the counters never come near 2**63, so such an id finds nothing.
_ID = 2**64 - 1


class Node(Record):
    """Attributes. `parent`: of a directory its only parent, of others where it was made last.

    Invariants: a directory's nlink is 2 + its subdirectories; another node's nlink is the number of
    edges to it; nlink 0 means sustained: some session holds it, or it would be gone.
    `entries`: of a directory, its number of entries.
    """

    type: int
    mode: int  # 07777
    uid: int
    gid: int
    atime: int  # ns
    mtime: int
    ctime: int
    nlink: int
    length: int
    rdev: int
    goal: int
    parent: int
    entries: int = 0


class Edge(Record):
    """A directory's entry."""

    inode: int


class Target(Record):
    """A symbolic link's content."""

    path: bytes


class MapEntry(Record):
    """The chunk that holds one index of a file."""

    chunk: int


class Mark(Record):
    """A row whose key says everything."""


class ChunkRow(Record):
    """A chunk.

    `version`: committed; older copies are stale. `reserved` >= version: the highest version that
    any copy may ever have been told to take; never given out twice. `refs`: map entries that name
    it; 0: doomed. `goal`: the highest of its files'. `lock`: 0, or the token of the running grant,
    held by `lock_session`. `born`: some write was committed. `owner`, `index`: the file and index
    that refer to it.

    `restored`: 0, or the chunk came out of a restore: copies from before it may have versions up
    to this one, of which the restored metadata know nothing; the newest counts. Until a grant
    raises the chunk beyond. `settled`: the version of the copies that were raised first then; an
    older one of up to `restored` that turns up later with a higher version has bytes that these
    lack.
    """

    id: int
    version: int
    reserved: int
    refs: int
    goal: int
    lock: int
    lock_session: int
    lock_time: int  # ns, when the lock was granted
    born: bool
    owner: int
    index: int
    restored: int = 0
    settled: int = 0


class SessionRow(Record):
    """A client. `secret` proves that a reconnecting one is the same."""

    id: int
    secret: bytes
    info: str
    root: int
    readonly: bool
    since: int  # ns


class ResultRow(Record):
    """The answer that sequence number `seq` got."""

    seq: int
    value: bytes


class MemberRow(Record):
    """The identity of a master that votes."""

    uuid: bytes


class Counters(Record):
    """Numbers not yet given out, totals, the cluster's UUID. `version` numbers changelog lines."""

    cluster: bytes
    next_inode: int
    next_chunk: int
    next_session: int
    next_lock: int
    version: int
    nodes: int
    chunks: int
    sessions: int


Row = (
    Node | Edge | Target | MapEntry | Mark | ChunkRow | SessionRow | ResultRow | MemberRow
    | Counters
)  # fmt: skip

# What a table's rows decode to.
TABLES: dict[int, type] = {
    b"N"[0]: Node, b"E"[0]: Edge, b"T"[0]: Target, b"M"[0]: MapEntry, b"C"[0]: ChunkRow,
    b"D"[0]: Mark, b"L"[0]: Mark, b"H"[0]: Mark, b"O"[0]: Mark, b"S"[0]: SessionRow,
    b"R"[0]: ResultRow, b"P"[0]: MemberRow, b"Z"[0]: Counters,
}  # fmt: skip
GROUP_LEN = 9

COUNTERS_KEY = _Q.pack(b"Z", 0)
NO_COUNTERS = Counters(b"", 1, 1, 1, 1, 0, 0, 0, 0)
MARK = Mark()


class Rows(Protocol):
    """Where rows live. The state machine does nothing but call these."""

    def get(self, key: bytes) -> Row | None:
        """The row, or None."""

    def put(self, key: bytes, row: Row) -> None:
        """Set the row."""

    def delete(self, key: bytes) -> None:
        """Remove the row; it may be absent."""

    def scan(self, prefix: bytes, after: bytes = b"") -> Iterator[tuple[bytes, Row]]:
        """Rows whose key begins with `prefix` and is greater than prefix + after, ascending.

        With `after` empty the row at exactly `prefix` is included. Rows must not be changed while a
        scan is under way, except those already given.
        """

    def compare_digest(self, index: int, digest: bytes) -> None:
        """InvariantError if the checkpoint after entry `index` has another digest here; one that is
        still being made is compared later, one that was never made never.
        """


def node_key(inode: int) -> bytes:
    """Key of a Node."""
    return _Q.pack(b"N", inode & _ID)


def edge_prefix(parent: int) -> bytes:
    """Prefix of a directory's Edges; the name follows."""
    return _Q.pack(b"E", parent & _ID)


def edge_key(parent: int, name: bytes) -> bytes:
    """Key of an Edge."""
    return _Q.pack(b"E", parent & _ID) + name


def target_key(inode: int) -> bytes:
    """Key of a Target."""
    return _Q.pack(b"T", inode & _ID)


def map_prefix(inode: int) -> bytes:
    """Prefix of a file's MapEntries."""
    return _Q.pack(b"M", inode & _ID)


def map_key(inode: int, index: int) -> bytes:
    """Key of a MapEntry."""
    return _QQ.pack(b"M", inode & _ID, index & _ID)


def chunk_key(chunk: int) -> bytes:
    """Key of a ChunkRow."""
    return _Q.pack(b"C", chunk & _ID)


def doomed_key(chunk: int) -> bytes:
    """Key of the mark of a chunk without references."""
    return _Q.pack(b"D", chunk & _ID)


def lock_prefix(session: int) -> bytes:
    """Prefix of the marks of a session's chunk locks."""
    return _Q.pack(b"L", session & _ID)


def lock_key(session: int, chunk: int) -> bytes:
    """Key of the mark of a session's chunk lock."""
    return _QQ.pack(b"L", session & _ID, chunk & _ID)


def hold_prefix(inode: int) -> bytes:
    """Prefix of the marks of who holds a file open."""
    return _Q.pack(b"H", inode & _ID)


def hold_key(inode: int, session: int) -> bytes:
    """Key of the mark that a session holds a file open."""
    return _QQ.pack(b"H", inode & _ID, session & _ID)


def held_prefix(session: int) -> bytes:
    """Prefix of the marks of what a session holds open."""
    return _Q.pack(b"O", session & _ID)


def held_key(session: int, inode: int) -> bytes:
    """Key of the same mark, by session."""
    return _QQ.pack(b"O", session & _ID, inode & _ID)


def session_key(session: int) -> bytes:
    """Key of a SessionRow."""
    return _Q.pack(b"S", session & _ID)


def result_prefix(session: int) -> bytes:
    """Prefix of a session's ResultRows."""
    return _Q.pack(b"R", session & _ID)


def result_key(session: int, slot: int) -> bytes:
    """Key of a ResultRow."""
    return _QH.pack(b"R", session & _ID, slot)


def member_key(name: str) -> bytes:
    """Key of a MemberRow."""
    return _Q.pack(b"P", 0) + name.encode()


def number_at(key: bytes, at: int = 1) -> int:
    """The 8-byte number in a key at offset `at`: 1 the group, 9 the second."""
    return int.from_bytes(key[at : at + 8], "big")
