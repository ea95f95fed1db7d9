"""What people ask the leader: whose a chunk is, how it is, why, and what is wrong in all.

Tools send these as they do the `ClientRequest`s of `messages.py`, to which they belong: their tags
are of one series with those, from 32 to 47. The answers never decide anything.
"""

from raftfs.wire.ops import Record, Tagged


class WhereNodes(Tagged, tag=32):
    """-> list[NodePlace] of those of the nodes that exist; at most 1,000 are asked for."""

    inodes: list[int]


class NodePlace(Record):
    """`parent`: of a directory its only one; of others where a name was made last, perhaps gone."""

    inode: int
    type: int
    nlink: int
    parent: int


class FindNames(Tagged, tag=33):
    """Which names lead to these nodes: one page of a directory's entries (`parent` 0: of all
    directories') is looked through, from `after` on. -> NamesPage. At most 20,000 nodes.
    """

    inodes: list[int]
    parent: int
    after: bytes = b""


class NamesPage(Record):
    """`names`: (inode, directory, name). `after`: where the next page begins, b"": this was all."""

    names: list[tuple[int, int, bytes]]
    after: bytes


class ExplainChunk(Tagged, tag=34):
    """Everything the leader knows of a chunk: -> ChunkStory. ENOENT: neither the state nor any
    chunkserver has it.
    """

    chunk: int


class CopyStory(Record):
    """A copy, where it is or was. Times in ns since the epoch.

    `state`: good; doubtful (a power cut may have robbed it); damaged; stale; ahead (of what the
    state knows of); orphan; away (with its server, since `since`); left (since `since`, `why`:
    damaged, gone, absent (with others, or when its server came back), destroyed). `kept_s`: orphans
    stay so long; -1 unknown. `scrubbed`: when (s since the epoch) it was last read through, 0: not
    known.
    """

    server: bytes
    address: str
    version: int
    state: str
    connected: bool
    fenced: bool
    since: int = 0
    why: str = ""
    kept_s: float = -1.0
    scrubbed: int = 0


class Incident(Record):
    """What happened to a chunk at `at` (ns since the epoch): raised, replicated, destroyed, gone,
    damaged, order failed, repair failed. `address` "": no one server.
    """

    at: int
    what: str
    address: str
    version: int
    detail: str


class Plan(Record):
    """What the healer will do. `step` and `delay` as in `meta/plan/outlook.py`.

    `wait_s`: until that; -1: not a matter of time. `error`: why the last repair failed, at
    `error_at` (ns).
    """

    step: str
    wanted: int = 0
    surplus: int = 0
    delay: str = ""
    delay_s: float = 0.0
    wait_s: float = -1.0
    error: str = ""
    error_at: int = 0


class ChunkStory(Record):
    """A chunk, explained. `known`: the state has it; otherwise all of the state's fields are 0.

    `watching`, `leading`: since when (ns) this master has heard of copies, and given orders; what
    was before it does not know.
    """

    chunk: int
    known: bool
    version: int
    reserved: int
    goal: int
    refs: int
    born: bool
    owner: int
    index: int
    restored: int
    lock: int
    lock_session: int
    lock_time: int
    locked_by: str
    copies: list[CopyStory]
    incidents: list[Incident]
    plan: Plan
    watching: int
    leading: int


class ChunkProblem(Record):
    """A chunk that is not as its goal asks. `what`: missing, undergoal, unsettled or stale."""

    chunk: int
    owner: int
    index: int
    version: int
    goal: int
    good: int
    what: str
    copies: list[CopyStory]


class ListMissing(Tagged, tag=35):
    """Chunks of numbers above `after` without a good copy: -> MissingPage."""

    after: int


class MissingPage(Record):
    """At most 200 chunks; none: that was all. `total`: how many there are; of more than 10,000
    only as many are listed. `ready`: the leader has looked at every chunk since its election.
    """

    chunks: list[ChunkProblem]
    total: int
    ready: bool
    watching: int = 0


class CheckChunks(Tagged, tag=36):
    """Compare the next chunks of the state, of numbers above `after`, with the copies there are:
    -> CheckedPage.
    """

    after: int


class CheckedPage(Record):
    """`after` 0: that was all. `doomed`: chunks whose copies are being destroyed; `writing`: those
    that a session is writing, whose copies are its business.
    """

    checked: int
    after: int
    doomed: int
    writing: int
    problems: list[ChunkProblem]


class CheckRows(Tagged, tag=37):
    """Check the next rows of a table of the state (a letter of `model.py`, after the key `after`)
    against the rows they refer to: -> RowsPage. EINVAL: there is no such table.
    """

    table: str
    after: bytes = b""


class RowsPage(Record):
    """`findings`: a sentence for each row that is wrong. `after` b"": that was all."""

    checked: int
    after: bytes
    findings: list[str]


class ListOrphans(Tagged, tag=38):
    """Copies that no metadata knows, sorted by chunk and server, behind the one named: ->
    OrphansPage.
    """

    chunk: int = 0
    server: bytes = b""


class OrphansPage(Record):
    """At most 1,000 copies by chunk; none: that was all. `total` and `ready` as in MissingPage."""

    copies: list[tuple[int, CopyStory]]
    total: int
    ready: bool


Inquiry = (
    WhereNodes | FindNames | ExplainChunk | ListMissing | CheckChunks | CheckRows | ListOrphans
)  # fmt: skip
