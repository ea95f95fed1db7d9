"""Every message between processes, except the namespace operations (`ops.py`) and Raft's own.

Questions about chunks and names, for people, are in `inquiries.py`.

Control links (clients and chunkservers to masters) carry `ClientRequest`, `ChunkEvent` or
`ChunkOrder` in `frame.py` frames; data links (anyone to a chunkserver) carry a `DataRequest` or
`DataReply` head plus raw payload. Same rules as `ops.py`: append-only fields, tags never reused.
"""

from raftfs.wire.inquiries import Inquiry
from raftfs.wire.ops import Attr, Op, Record, Tagged

PROTOCOL = 1  # raised when an old peer could misunderstand a new one

# ================================================================ client -> master (port 9421)


class WhoLeads(Tagged, tag=1):
    """Any replica answers: -> Leader."""


class Challenge(Tagged, tag=2):
    """-> bytes, 32 random ones that the next `Register` on this connection answers."""


class Register(Tagged, tag=3):
    """Begin (`session` 0) or resume a session on this connection. -> Registered.

    `proof` is md5(challenge[:16] + md5(password) + challenge[16:]) when a password is given, else
    b"". `tool`: no session is made; only reads and SetGoal are allowed, as `session` of a living
    mount.
    """

    protocol: int
    version: str
    session: int
    secret: bytes
    path: bytes
    info: str
    proof: bytes = b""
    tool: bool = False


class Registered(Record):
    """The session and what the chosen export line allows."""

    session: int
    cluster: bytes
    root: int
    readonly: bool
    restricted_ip: bool
    map_all: bool
    root_uid: int
    root_gid: int
    all_uid: int
    all_gid: int


class Mutate(Tagged, tag=4):
    """A namespace operation, exactly once: -> as documented at the operation in `ops.py`.

    A retry, on any replica, carries the same `seq` and gets the first answer.
    """

    seq: int
    op: Op


class Lookup(Tagged, tag=5):
    """-> Attr."""

    parent: int
    name: bytes


class GetAttr(Tagged, tag=6):
    """-> Attr."""

    inode: int


class ReadLink(Tagged, tag=7):
    """-> bytes."""

    inode: int


class ReadDir(Tagged, tag=8):
    """Entries whose name sorts after `after` (b"" from the start), at most `limit`: -> DirPage."""

    inode: int
    after: bytes
    limit: int


class DirPage(Record):
    """A page of a directory, without `.` and `..`. `parent` is the directory's own parent."""

    parent: int
    entries: list[tuple[bytes, Attr]]
    more: bool


class ReadChunk(Tagged, tag=9):
    """Where to read chunk `index` of a file: -> ChunkMap. `chunk` 0 means: a hole, all zeros."""

    inode: int
    index: int


class WriteChunk(Tagged, tag=10):
    """Lock a chunk for writing: -> ChunkMap with `lock`.

    `failed` names servers (UUIDs) whose copies just failed in the chain; they are voted out.
    `acked`: some write under an earlier grant was acknowledged, so the chunk must not be replaced.
    Sent again after any doubt: a grant to the session that already holds it renews it.
    """

    inode: int
    index: int
    failed: list[bytes]
    acked: bool = False


class Location(Record):
    """One copy: the server's UUID, data address, and the version it holds."""

    server: bytes
    host: str
    port: int
    version: int


class ChunkMap(Record):
    """A chunk and its copies, in the order of the write chain or of preference for reads.

    `length` is the file's committed length. `lock` and `fresh` as in `ops.Granted`; 0 for reads.
    `ticket` goes with every request to the chunkservers; it is good for `ticket_s` seconds.
    """

    chunk: int
    version: int
    length: int
    copies: list[Location]
    lock: int = 0
    fresh: bool = False
    ticket: bytes = b""
    ticket_s: float = 0.0


class StatFs(Tagged, tag=11):
    """-> FsStat."""


class FsStat(Record):
    """Sizes in bytes over all connected chunkservers, and the number of nodes."""

    total: int
    available: int
    inodes: int


class GetGoal(Tagged, tag=12):
    """-> GoalTable of one node, or of everything below it (itself included)."""

    inode: int
    recursive: bool


class GoalTable(Record):
    """How many files and directories have which goal."""

    files: dict[int, int]
    dirs: dict[int, int]


class SetGoalTree(Tagged, tag=13):
    """SetGoal on a node and everything below it: -> ops.GoalCounts. mode as in `ops.SetGoal`."""

    inode: int
    uid: int
    goal: int
    mode: int
    recursive: bool = True


class FileChunks(Tagged, tag=14):
    """-> list[FileChunk] for chunk indices from `first` on, at most 1,000. EPERM for non-files."""

    inode: int
    first: int


class FileChunk(Record):
    """One index of a file. `chunk` 0: a hole. `ticket`: to see the checksums of its copies."""

    index: int
    chunk: int
    version: int
    copies: list[Location]
    ticket: bytes = b""


class AskStatus(Tagged, tag=15):
    """What this replica knows of itself and the cluster: -> ReplicaStatus. Any replica answers."""


class Leader(Record):
    """Who leads in which term; name "" when nobody is known to. Addresses as `host:port`."""

    term: int
    name: str
    clients: str


class ServerStatus(Record):
    """A chunkserver as a master sees it."""

    server: bytes
    host: str
    port: int
    total: int
    used: int
    chunks: int
    connected: bool
    disks: tuple["DiskStatus", ...] = ()


class ReplicaStatus(Record):
    """One master's view. `digest` is of its last checkpoint, at `digest_index`."""

    name: str
    cluster: bytes
    role: str  # leader | follower | candidate
    leader: Leader
    applied: int
    committed: int
    last_index: int
    checkpoint: int
    digest: bytes
    digest_index: int
    peers: list[tuple[str, bool]]  # name, connected
    servers: list[ServerStatus]
    sessions: int
    nodes: int
    chunks: int
    undergoal: int
    missing: int


class ListMembers(Tagged, tag=18):
    """-> list[MemberStatus], as the leader knows them."""


class MemberStatus(Record):
    """A master, or one that waits to become one (`role` joining)."""

    name: str
    uuid: bytes
    role: str  # leader | voter | joining
    connected: bool
    behind: int  # entries of the log that it is not known to have


class AddMember(Tagged, tag=1):
    """`name`, which has joined and caught up, votes from now on."""

    name: str


class RemoveMember(Tagged, tag=2):
    """`name` votes no more."""

    name: str


class TuneDisks(Tagged, tag=16):
    """Of one chunkserver (host:port, "": all): as `Tune` has it."""

    name: str
    action: str
    value: str


class TransferLeader(Tagged, tag=3):
    """`name` leads from now on; "": the most advanced follower."""

    name: str


AdminAction = AddMember | RemoveMember | TransferLeader | TuneDisks


class Admin(Tagged, tag=19):
    """An action that only who knows the cluster key may ask for. -> str, what was done.

    `proof` is the key's derive("admin", challenge, MessagePack of `action`), `challenge` being what
    `Challenge` answered last on this link.
    """

    proof: bytes
    action: AdminAction


class EndMySession(Tagged, tag=16):
    """Orderly unmount: -> None."""


class Keepalive(Tagged, tag=17):
    """Sent each second on an idle link: -> None."""


ClientRequest = (
    WhoLeads | Challenge | Register | Mutate | Lookup | GetAttr | ReadLink | ReadDir
    | ReadChunk | WriteChunk | StatFs | GetGoal | SetGoalTree | FileChunks | AskStatus
    | EndMySession | Keepalive | ListMembers | Admin | Inquiry
)  # fmt: skip


class LeaderNotice(Tagged, tag=64):
    """Pushed by every replica to every client whenever it learns of a new leader or term."""

    leader: Leader


ClientNotice = LeaderNotice

# ================================================================ chunkserver <-> master (port
# 9420)


class CopyId(Record):
    """A copy on a chunkserver. `doubtful`: a power cut may have taken acknowledged writes from it.
    """

    chunk: int
    version: int
    doubtful: bool = False


class Damage(Record):
    """The story of a copy that is not what was written: it no longer counts.

    `part`: data, table, header, name, file (gone), io (an I/O error), disk (the whole of it does
    not count). `block` -1: no one block.
    `found_by`: read, write, order, scrub, start, rest (coming to it) or disk. `at`: seconds since
    the epoch.
    """

    chunk: int
    version: int
    disk: str
    part: str
    block: int
    expected: str
    found: str
    found_by: str
    at: int
    text: str


class ServerHello(Tagged, tag=1):
    """First event on the link; the full list of copies follows in `Copies`, closed by `Ready`.

    `cluster` is b"" for disks that never met a master. -> bytes, the cluster's UUID (16), or an
    error: a foreign cluster is refused.
    """

    protocol: int
    version: str
    server: bytes
    cluster: bytes
    host: str
    port: int
    clocks: bool = False  # it wants to know the masters' clocks


class Copies(Tagged, tag=2):
    """A part of the full report, at most 10,000 copies. -> None.

    `damaged`: copies that do not count; those that are still readable in part are kept until a
    `SetAside`. `leaving`: chunks as in `Changed`.
    """

    copies: list[CopyId]
    damaged: tuple[Damage, ...] = ()
    leaving: tuple[int, ...] = ()


class Ready(Tagged, tag=3):
    """The full report is complete; from now on only changes are told. -> None."""


class Changed(Tagged, tag=4):
    """Copies made, raised in version (the old id is in `gone`), destroyed or found damaged. ->
    None.

    `stories`: of the damaged ones, in their order. `leaving`: chunks whose copies are good, but on
    a disk that is to be pulled: others must be made elsewhere. `staying`: no longer so.
    """

    made: list[CopyId]
    gone: list[CopyId]
    damaged: list[CopyId]
    stories: tuple[Damage, ...] = ()
    leaving: tuple[int, ...] = ()
    staying: tuple[int, ...] = ()


class ScrubStatus(Record):
    """How far a disk's scrub is. Times in seconds since the epoch, 0: never.

    `began`: the cycle under way, of which `progress` (0 to 1) is done; `last_*`: the last whole
    one. `damaged`: copies that it found damaged since the server's start.
    """

    mib_s: float
    began: int
    progress: float
    last_began: int
    last_ended: int
    damaged: int


class DiskStatus(Record):
    """A disk as its chunkserver sees it. `state`: good, full, damaged, removing (marked for it) or
    removable (nothing on it is needed any more).

    `damaged`: copies that do not count, still in their places; `quarantined`: files set aside, and
    their bytes. `evidence`: why the disk is damaged.
    """

    path: str
    uuid: bytes
    total: int
    used: int
    copies: int
    state: str
    damaged: int
    quarantined: int
    quarantined_bytes: int
    scrub: ScrubStatus
    evidence: str = ""


class Space(Tagged, tag=5):
    """Heartbeat, each `HEARTBEAT_S`: bytes over all usable disks, copies held. -> list[str], where
    all masters listen for chunkservers.
    """

    total: int
    used: int
    chunks: int
    disks: tuple[DiskStatus, ...] = ()
    room: int = -1  # bytes that new copies may take; -1: not told


ChunkEvent = ServerHello | Copies | Ready | Changed | Space


class NewTerm(Tagged, tag=32):
    """A leader's first order: obey nobody of a lower term from now on. -> None.

    Answered only after every change that an older term's order made has been sent on this link.
    """

    term: int


class RaiseVersion(Tagged, tag=33):
    """Make the copy's version `version`, durably (fdatasync), from whatever lower one it has. ->
    None.

    Also refuses writes under any token below `lock` from then on. Status.NO_CHUNK if there is none.
    """

    term: int
    chunk: int
    version: int
    lock: int


class Destroy(Tagged, tag=34):
    """Destroy the copy, at exactly this version (version 0: at any). -> None; absent counts as
    done.
    """

    term: int
    chunk: int
    version: int


class Replicate(Tagged, tag=35):
    """Fetch the copy at exactly `version` from another server, verified, durable. -> None.

    `ticket` is for the other server.
    """

    term: int
    chunk: int
    version: int
    host: str
    port: int
    ticket: bytes = b""


class SetAside(Tagged, tag=48):
    """Move a damaged copy to its disk's quarantine: a good one exists elsewhere. -> None; a copy
    that is good or absent stays as it is.
    """

    term: int
    chunk: int
    version: int


class Confirm(Tagged, tag=49):
    """Look whether there is a good copy at exactly this version, its header included. -> None.
    Asked of those that remain before another one is destroyed.
    """

    term: int
    chunk: int
    version: int


class Tune(Tagged, tag=50):
    """`scrub-rate`: MiB a second and disk; `retest`: the disk with this path, and count it again if
    it works. -> None; an error says why not.
    """

    term: int
    action: str
    value: str


class MasterClock(Tagged, tag=51):
    """What the clock named `clock` shows, in which a master counts the time of its tickets.

    A notice, not an order: every master sends it in answer to a hello and to each heartbeat.
    """

    clock: bytes
    now_ms: int


ChunkOrder = (
    NewTerm | RaiseVersion | Destroy | Replicate | SetAside | Confirm | Tune | MasterClock
)  # fmt: skip

# ================================================================ data port (chunkserver, 9422)
# Every request carries the `ticket` of the map, grant or order that it follows from; without a
# valid one the answer is NO_TICKET or TICKET_EXPIRED, whatever else is true.


class Hop(Record):
    """The next server of a write chain."""

    server: bytes
    host: str
    port: int


class WriteData(Tagged, tag=1):
    """Write the payload at `offset` within the chunk, here and on every hop after. -> DataReply.

    Lies within one chunk, at most DATA_PAYLOAD_MAX. `crcs`: CRC32 of each piece of the payload, cut
    at the chunk's 64 KiB block borders. `create`: make the copy if there is none (a fresh grant).
    Refused with WRONG_VERSION if the copy's version differs or a higher token was seen.
    Frames on one connection are applied in order; acknowledged when every hop has the data.
    """

    id: int
    chunk: int
    version: int
    lock: int
    create: bool
    offset: int
    crcs: list[int]
    chain: list[Hop]
    ticket: bytes = b""


class ZeroData(Tagged, tag=2):
    """As WriteData, but make `length` bytes read as zeros; blocks never written stay so."""

    id: int
    chunk: int
    version: int
    lock: int
    create: bool
    offset: int
    length: int
    chain: list[Hop]
    ticket: bytes = b""


class SyncData(Tagged, tag=3):
    """fdatasync the copy (and what makes it findable) here and on every hop. -> DataReply."""

    id: int
    chunk: int
    version: int
    chain: list[Hop]
    ticket: bytes = b""


class ReadData(Tagged, tag=4):
    """-> DataReply with `length` bytes of payload and the `crcs` of its pieces (cut as in
    WriteData).

    Every block touched was checked against its CRC. Blocks never written read as zeros; so does all
    beyond the last written byte. At most DATA_PAYLOAD_MAX.
    """

    id: int
    chunk: int
    version: int
    offset: int
    length: int
    ticket: bytes = b""


class ListBlocks(Tagged, tag=5):
    """For replication and `mfsfileinfo -c`: -> DataReply, payload = 1,024 big-endian CRC32 of the
    blocks,
    each computed over 64 KiB (missing bytes count as zeros), then 128 bytes of bitmap: bit i (LSB
    first) set = block i was written."""

    id: int
    chunk: int
    version: int
    ticket: bytes = b""


DataRequest = WriteData | ZeroData | SyncData | ReadData | ListBlocks


class DataReply(Record):
    """`status` 0, errno or `Status`. `failed` is the UUID of the server at fault, b"" for success.
    """

    id: int
    status: int
    failed: bytes = b""
    crcs: tuple[int, ...] = ()
