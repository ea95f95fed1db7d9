"""The operations that change metadata: what a client asks for, what the Raft log carries, what
apply returns.

One definition for all three, so that nothing is translated between the mount and the state machine.
A `Command` wraps an operation with `(session, seq)`; a `Batch` is one entry of the Raft log.
All structs are MessagePack arrays (`array_like`), unions are told apart by `tag`. Tags and field
order are the wire and journal format: append fields with defaults, never reorder, never reuse a
tag.

Times are integer nanoseconds since the epoch. Names are bytes. `type` is one of `NodeType`.
"""

import msgspec


class NodeType:
    """Values of `type`; the numbers are those of the classic changelog."""

    FILE, DIR, SYMLINK, FIFO, BLOCKDEV, CHARDEV, SOCKET = 1, 2, 3, 4, 5, 6, 7


class Record(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An immutable MessagePack array."""


class Tagged(Record, tag_field="tag"):
    """A record that begins with its tag, so that unions can tell it apart."""


# --- results ------------------------------------------------------------------------------------


class Attr(Record):
    """Attributes of a node as they travel to clients. `length` counts only for files."""

    inode: int
    type: int
    mode: int  # permission bits 07777, no type bits
    uid: int
    gid: int
    atime: int
    mtime: int
    ctime: int
    nlink: int
    length: int
    rdev: int
    goal: int


class Removed(Record):
    """Result of unlink, rmdir and of a rename that replaced something.

    `inode` is the node that moved or went away; `freed` tells that its last link is gone.
    """

    inode: int
    freed: bool


class Granted(Record):
    """Result of `GrantWrite`.

    `version` is the committed version. `reserved` is the version to which the copies must be raised
    before the grant may be used (0: none). `lock` is the grant's fencing token. `fresh` tells that
    nobody has yet committed a write to this chunk. `length` is the file's committed length.
    """

    chunk: int
    version: int
    reserved: int
    lock: int
    fresh: bool
    length: int


class GoalCounts(Record):
    """Result of a goal change: inodes changed, not changed, and refused for lack of permission."""

    changed: int
    unchanged: int
    denied: int


# --- namespace ------------------------------------------------------------------------------------


class Create(Tagged, tag=1):
    """create, mkdir, mknod: -> Attr. `opened`: also acquire the file for the session."""

    parent: int
    name: bytes
    type: int
    mode: int
    umask: int
    uid: int
    gid: int
    rdev: int = 0
    opened: bool = False


class Symlink(Tagged, tag=2):
    """-> Attr."""

    parent: int
    name: bytes
    target: bytes
    uid: int
    gid: int


class Link(Tagged, tag=3):
    """-> Attr of the linked node."""

    inode: int
    parent: int
    name: bytes


class Unlink(Tagged, tag=4):
    """-> Removed. EISDIR for directories."""

    parent: int
    name: bytes


class Rmdir(Tagged, tag=5):
    """-> Removed."""

    parent: int
    name: bytes


class Rename(Tagged, tag=6):
    """-> Removed (inode moved; freed: a replaced node lost its last link). flags: renameat2's."""

    src_parent: int
    src_name: bytes
    dst_parent: int
    dst_name: bytes
    flags: int = 0


class SetAttr(Tagged, tag=7):
    """mode, owner and times: -> Attr. A field of None stays; a time of -1 means the entry's time.
    """

    inode: int
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    atime: int | None = None
    mtime: int | None = None


class Length(Tagged, tag=8):
    """truncate, down or up, to exactly `length`: -> Attr.

    Chunks wholly beyond the new length are let go. Bytes between the old and the new length must
    read as zeros: whoever raises the length has zeroed the rest of the last chunk before (see
    `docs/decisions/` on truncation).
    """

    inode: int
    length: int


class Acquire(Tagged, tag=9):
    """open: the session holds the file, so that it outlives its last link. Idempotent. -> Attr."""

    inode: int


class Release(Tagged, tag=10):
    """The session holds the file no longer; an unlinked file that nobody holds goes. -> bool
    freed.
    """

    inode: int


# --- data ---------------------------------------------------------------------------------------


class GrantWrite(Tagged, tag=11):
    """Leader's: lock chunk `index` of the file for the session, allocating it if needed. ->
    Granted.

    `raise_version`: reserve the next version, because copies may differ. `replace`: give the index
    a new chunk, because nothing was ever acknowledged on the old one and none of its servers is
    left. `source`: the version of the copies that are to be raised, 0 if none are; only chunks of
    a restored state remember it. ELOCKED (Status.LOCKED) when another session holds the lock.
    """

    inode: int
    index: int
    raise_version: bool
    replace: bool = False
    source: int = 0


class SetVersion(Tagged, tag=12):
    """Leader's: the copies of `chunk` that count are at `version` now. -> None.

    Refused (ESTALE) unless `version` is reserved for it and `lock` is its current lock.
    `unlock` drops the lock as well (used when no client waits: settling after an unfinished grant).
    """

    chunk: int
    version: int
    lock: int
    unlock: bool = False


class Written(Record):
    """One chunk in a `CommitWrite`: its current lock; `unlock` ends the grant."""

    chunk: int
    lock: int
    unlock: bool


class CommitWrite(Tagged, tag=13):
    """Data has reached every copy that counts: raise the length (never lower it), set mtime. ->
    Attr.

    Every lock must still be held (else ESTALE and nothing changes). Marks the chunks as born.
    `length` of -1 leaves the length, `mtime` as in SetAttr.
    """

    inode: int
    length: int
    mtime: int
    chunks: list[Written]


class Unlock(Tagged, tag=14):
    """Leader's: end a vanished session's grant by force. A chunk never born is let go. -> None."""

    chunk: int
    lock: int


class DropCopy(Tagged, tag=15):
    """Leader's: commits that `server` may destroy its copy (at `version`) of a live chunk. -> None.

    Refused (EBUSY) while the chunk is locked, ESTALE when its version is another one by now.
    """

    chunk: int
    version: int
    server: bytes  # UUID, 16 bytes


class ForgetChunk(Tagged, tag=16):
    """Leader's: no file owns the chunk and every connected copy is destroyed: drop its row. ->
    None.
    """

    chunk: int


# --- administration
# --------------------------------------------------------------------------------


class SetGoal(Tagged, tag=17):
    """-> GoalCounts, for this one node. mode: 0 set, 1 only raise, 2 only lower. uid 0 may always.
    """

    inode: int
    uid: int
    goal: int
    mode: int = 0


class NewSession(Tagged, tag=18):
    """-> int, the session's number. `secret` proves later that a reconnecting client owns it."""

    secret: bytes
    info: str  # what the client calls itself: host:mountpoint
    root: int = 1  # inode of the subfolder that it mounted
    readonly: bool = False


class EndSession(Tagged, tag=19):
    """Everything that the session held is let go: files, chunk locks, kept results. -> None."""

    session: int


class Found(Tagged, tag=20):
    """The first entry of a new cluster: its UUID, its masters (name -> identity), its root
    directory. In a cluster that was bootstrapped from an image: only its masters.

    Ignored ever after. -> None.
    """

    cluster: bytes
    members: dict[str, bytes]


class ReplaceMember(Tagged, tag=22):
    """Master `name` lost its disk; the caught-up learner of identity `uuid` votes in its place. ->
    None.
    """

    name: str
    uuid: bytes


class AddMember(Tagged, tag=23):
    """The caught-up learner of identity `uuid` votes as a new master `name`. -> None."""

    name: str
    uuid: bytes


class RemoveMember(Tagged, tag=24):
    """Master `name` votes no more. -> None."""

    name: str


class Checkpoint(Tagged, tag=25):
    """Every replica makes a checkpoint of the state after exactly this entry. -> None."""


class Digest(Tagged, tag=21):
    """The leader's digest of the checkpoint after entry `index`; whoever differs stops. -> None."""

    index: int
    value: bytes


Op = (
    Create | Symlink | Link | Unlink | Rmdir | Rename | SetAttr | Length | Acquire | Release
    | GrantWrite | SetVersion | CommitWrite | Unlock | DropCopy | ForgetChunk | SetGoal
    | NewSession | EndSession | Found | Digest | ReplaceMember | AddMember | RemoveMember
    | Checkpoint
)  # fmt: skip

# What changes who votes: the log treats entries with these differently.
MembershipOp = ReplaceMember | AddMember | RemoveMember

# What a client may send; the rest is the leader's own.
CLIENT_OPS = (
    Create, Symlink, Link, Unlink, Rmdir, Rename, SetAttr, Length, Acquire, Release, CommitWrite,
    SetGoal,
)  # fmt: skip


class Command(Record):
    """One operation by one session. `seq` 0: not remembered (the operation is idempotent)."""

    session: int
    seq: int
    op: Op


class Batch(Record):
    """One entry of the Raft log: what reached the leader in one tick, under one timestamp (ns)."""

    time: int
    commands: list[Command]


class Result(Record):
    """What apply answered: status 0 and the MessagePack of the documented result, or an errno."""

    status: int
    value: bytes = b"\xc0"


_encoder = msgspec.msgpack.Encoder()
_batch_decoder = msgspec.msgpack.Decoder(Batch)


def encode_batch(batch: Batch) -> bytes:
    """The bytes that the journal keeps."""
    return _encoder.encode(batch)


def decode_batch(data: bytes) -> Batch:
    """Inverse of `encode_batch`. Raises msgspec.DecodeError on anything else."""
    return _batch_decoder.decode(data)
