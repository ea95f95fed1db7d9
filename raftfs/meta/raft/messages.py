"""What replicas say to each other. MessagePack over authenticated, sealed links; never pickled."""

from raftfs.wire.ops import Record, Tagged

Entry = tuple[bytes, int, int]  # command, index, term


class Append(Tagged, tag=1):
    """Leader: entries after `prev_index`; none is a heartbeat. `seq` numbers the leader's rounds.
    """

    term: int
    seq: int
    commit: int
    prev_index: int
    prev_term: int
    entries: list[Entry]


class Ack(Tagged, tag=2):
    """Follower: durable up to before `next_index` (`matched`), or ask to go back to it (`reset`).

    `seq` is the round that is answered, `term` the follower's term.
    """

    term: int
    seq: int
    next_index: int
    matched: bool
    reset: bool


class Vote(Tagged, tag=3):
    """Candidate: vote for me. `transfer`: the leader itself asked for this election."""

    term: int
    last_index: int
    last_term: int
    transfer: bool = False


class VoteGiven(Tagged, tag=4):
    """The vote of one node in `term`."""

    term: int


class PreVote(Tagged, tag=5):
    """Would you vote for me in `term`? Asked before any term is raised."""

    term: int
    last_index: int
    last_term: int


class PreVoteAnswer(Tagged, tag=6):
    """`current`: the answerer's own term."""

    term: int
    granted: bool
    current: int


class Contact(Tagged, tag=7):
    """Leader to a node that gets a snapshot: I am here. Answered by an Ack that says nothing."""

    term: int
    seq: int


class CampaignNow(Tagged, tag=8):
    """Leader, before it stops: hold an election at once."""

    term: int


class SnapshotPiece(Tagged, tag=9):
    """A piece of a compressed state file. `ident` tells transfers apart; `crc` is of `data`."""

    term: int
    ident: int
    index: int
    index_term: int
    offset: int
    total: int
    crc: int
    data: bytes


class SnapshotNext(Tagged, tag=10):
    """Follower: send from `offset` on. -1: installed, or not wanted."""

    term: int
    ident: int
    offset: int


class Refused(Tagged, tag=11):
    """The other side must not take part; `reason` is a sentence for its operator. `removed`: it was
    a master, and is none any more. `stranger`: its identity is not the one known here.
    """

    reason: str
    removed: bool = False
    stranger: bool = False


class CheckpointMade(Tagged, tag=12):
    """Voter to the leader: my checkpoint after entry `index` has this digest."""

    index: int
    digest: bytes


class Masters(Tagged, tag=13):
    """These vote, as far as I know. Who was away may have missed who came, and nobody may dial it:
    not a learner, and not a master with the greater name.
    """

    names: list[str]


Message = (
    Append | Ack | Vote | VoteGiven | PreVote | PreVoteAnswer | Contact | CampaignNow
    | SnapshotPiece | SnapshotNext | Refused | CheckpointMade | Masters
)  # fmt: skip


class PeerName(Record):
    """What a replica is called on its links. `origin`: which image it was bootstrapped from."""

    name: str
    uuid: bytes
    voter: bool
    joining: bool
    origin: bytes = b""

    def pack(self) -> str:
        """As the one string that the handshake authenticates."""
        kind = "voter" if self.voter else "joining" if self.joining else "learner"
        origin = f"|{self.origin.hex()}" if self.origin else ""
        return f"{self.name}|{self.uuid.hex()}|{kind}{origin}"

    @classmethod
    def parse(cls, text: str) -> "PeerName":
        """Inverse of `pack`. ValueError for anything else."""
        name, uuid, kind, *more = text.split("|")
        (origin,) = more or ("",)
        if kind not in ("voter", "joining", "learner"):
            raise ValueError(kind)
        origin_bytes = bytes.fromhex(origin)
        return cls(name, bytes.fromhex(uuid), kind == "voter", kind == "joining", origin_bytes)
