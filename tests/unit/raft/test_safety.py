"""Each fault of stock pysyncobj that is cured, at the level of single messages and virtual time.

Named as in the audit: what stock pysyncobj 0.3.17 does wrong stands in each test's docstring.
"""

from pathlib import Path
from typing import Any

import pytest
from pysyncobj import syncobj
from pysyncobj.node import Node
from pysyncobj.transport import Transport

from raftfs.errors import InvariantError, NotLeader, OutcomeUnknown, UserError
from raftfs.meta.raft import audited
from raftfs.meta.raft.journal import DurableJournal
from raftfs.meta.raft.messages import (
    Ack,
    Append,
    CampaignNow,
    Contact,
    PreVote,
    PreVoteAnswer,
    Vote,
    VoteGiven,
)
from raftfs.meta.raft.safety import LEADER, SafeSyncObj
from tests.unit.raft.disks import FakeFiles

FOLDER = Path("journal")
B, C = Node("b"), Node("c")


class Wire(Transport):  # type: ignore[misc]
    """Remembers what was sent."""

    def __init__(self) -> None:
        super().__init__(None, None, [])
        self.sent: list[tuple[str, Any]] = []
        self.core: SafeSyncObj | None = None

    @property
    def ready(self) -> bool:
        return True

    def send(self, node: Node, message: Any) -> bool:
        assert not isinstance(message, dict), "pysyncobj's own messages are not ours"
        self.sent.append((node.id, message))
        return True

    def take(self, kind: type) -> list[Any]:
        """Messages of a kind sent since the last call."""
        found = [m for _, m in self.sent if isinstance(m, kind)]
        self.sent = [(n, m) for n, m in self.sent if not isinstance(m, kind)]
        return found


class Bench:
    """One node, its disk, its wire, and the clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, others: tuple[str, ...] = ("b", "c")):
        self.now = 1000.0
        monkeypatch.setattr(syncobj, "monotonicTime", lambda: self.now)
        self.others = others
        self.files = FakeFiles()
        self.applied: list[tuple[int, bytes]] = []
        self.start()

    def start(self) -> None:
        self.journal = DurableJournal(FOLDER, self.files)
        if not len(self.journal):
            self.journal.add(b"\x01", 1, 0)
        self.wire = Wire()
        self.core = SafeSyncObj(
            "a", list(self.others), self.journal, self.wire, self.apply, lambda node: None
        )
        self.wire.core = self.core
        for other in self.others:
            self.wire._onNodeConnected(Node(other))

    def restart(self) -> None:
        """kill -9, then start again."""
        self.files = self.files.after_power_cut()
        self.start()

    def apply(self, index: int, term: int, data: bytes) -> str:
        if data == b"boom":
            raise ZeroDivisionError
        self.applied.append((index, data))
        return f"result {index}"

    def wait(self, seconds: float) -> None:
        """Time passes; the node ticks."""
        until = self.now + seconds
        while self.now < until:
            self.now += 0.01
            self.core.tick()

    def lead(self) -> None:
        """Win an election with b's votes."""
        self.wait(0.7)
        (*_, ask) = self.wire.take(PreVote)
        self.core.receive(B, PreVoteAnswer(ask.term, True, 0))
        self.core.tick()
        (*_, vote) = self.wire.take(Vote)
        self.core.receive(B, VoteGiven(vote.term))
        assert self.core.state == LEADER

    def acknowledge(self, node: Node = B) -> None:
        """The node has everything and answers the last round."""
        self.core.replicate()
        last = self.wire.take(Append)[-1]
        next_index = self.journal.last_index + 1
        self.core.receive(node, Ack(self.core.term, last.seq, next_index, True, False))
        self.core.tick()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


def entries(*numbers: int, term: int = 1) -> list[tuple[bytes, int, int]]:
    return [(b"\x00e%d" % n, n, term) for n in numbers]


def append(
    numbers: list[tuple[bytes, int, int]], prev: int, prev_term: int, *, term: int = 1,
    commit: int = 1, seq: int = 1,
) -> Append:
    return Append(term, seq, commit, prev, prev_term, numbers)


def log(bench: Bench) -> list[int]:
    return [i for _, i, _ in bench.journal[:]]


def test_nothing_is_acknowledged_before_it_is_durable(bench: Bench) -> None:
    """Stock acknowledges what is only in memory."""
    bench.core.receive(B, append(entries(2, 3), 1, 0))
    assert bench.wire.take(Ack) == []
    assert bench.files.after_power_cut().content.keys() and log(bench) == [1, 2, 3]
    bench.core.tick()
    (ack,) = bench.wire.take(Ack)
    assert ack.matched and ack.next_index == 4
    again = DurableJournal(FOLDER, bench.files.after_power_cut())
    assert [i for _, i, _ in again[:]] == [1, 2, 3]


def test_a_late_duplicate_does_not_cut_the_log(bench: Bench) -> None:
    """Stock truncates behind any append whose predecessor matches, conflict or not."""
    bench.core.receive(B, append(entries(2), 1, 0))
    bench.core.receive(B, append(entries(3, 4), 2, 1, seq=2))
    bench.core.receive(B, append(entries(2), 1, 0))
    bench.core.receive(B, append([], 1, 0, seq=3))
    assert log(bench) == [1, 2, 3, 4]


def test_a_conflict_cuts_exactly_the_conflicting_tail(bench: Bench) -> None:
    bench.core.receive(B, append(entries(2, 3, 4), 1, 0, commit=2))
    bench.core.tick()
    bench.core.receive(C, append(entries(4, term=2), 3, 1, term=2, commit=2))
    assert bench.journal[:][-1] == (b"\x00e4", 4, 2) and log(bench) == [1, 2, 3, 4]


def test_a_committed_entry_is_never_cut(bench: Bench) -> None:
    """Stock only logs that it truncates applied entries."""
    bench.core.receive(B, append(entries(2, 3), 1, 0, commit=3))
    bench.core.tick()
    with pytest.raises(InvariantError, match="committed"):
        bench.core.receive(C, append(entries(3, term=2), 2, 1, term=2, commit=2))


def test_only_what_was_compared_is_committed(bench: Bench) -> None:
    """Stock takes the leader's commit index for its own, unchecked tail."""
    bench.core.receive(B, append(entries(2, 3, 4), 1, 0))
    bench.core.receive(C, append([], 2, 1, term=2, commit=4))
    bench.core.tick()
    assert bench.core.commit_index == 2 and [i for i, _ in bench.applied] == [2]


def test_a_stale_acknowledgement_commits_nothing(bench: Bench) -> None:
    """Stock's acknowledgements carry no term."""
    bench.lead()
    done: list[Any] = []
    bench.core.propose(b"x", lambda result, error: done.append((result, error)))
    last = bench.journal.last_index
    bench.core.receive(B, Ack(bench.core.term - 1, 99, last + 1, True, False))
    bench.wait(0.05)
    assert done == [] and bench.applied == []
    bench.acknowledge()
    assert done == [(f"result {last}", None)]


def test_an_old_reset_does_not_send_the_log_again(bench: Bench) -> None:
    bench.lead()
    bench.acknowledge()
    high = bench.core.next_index[B]
    bench.core.receive(B, Ack(bench.core.term, 1, 2, False, True))
    assert bench.core.next_index[B] >= high, "what has matched once is not doubted"


def test_a_node_that_waits_for_a_snapshot_is_not_hurried(bench: Bench) -> None:
    """Leader and node once answered each other without pause until the snapshot was there."""
    bench.lead()
    bench.acknowledge()
    bench.core.next_index[C] = bench.journal.oldest_index
    bench.core.replicate()
    (contact,) = bench.wire.take(Contact)
    due = bench.core.heartbeat_due
    bench.core.receive(C, Ack(bench.core.term, contact.seq, 0, False, False))
    assert bench.core.heartbeat_due == due > bench.now


def test_one_node_has_one_vote(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock counts answers, not voters."""
    bench = Bench(monkeypatch, ("b", "c", "d", "e"))
    bench.wait(0.7)
    (*_, ask) = bench.wire.take(PreVote)
    for node in (B, C):
        bench.core.receive(node, PreVoteAnswer(ask.term, True, 0))
    bench.core.tick()
    (*_, vote) = bench.wire.take(Vote)
    for _ in range(3):
        bench.core.receive(B, VoteGiven(vote.term))
    assert bench.core.state != LEADER
    bench.core.receive(C, VoteGiven(vote.term))
    assert bench.core.state == LEADER


def test_one_vote_a_term_also_after_a_restart(bench: Bench) -> None:
    bench.core.receive(B, Vote(5, 1, 0))
    assert [v.term for v in bench.wire.take(VoteGiven)] == [5]
    bench.restart()
    bench.core.receive(C, Vote(5, 9, 4))
    assert bench.wire.take(VoteGiven) == []
    bench.core.receive(B, Vote(5, 1, 0))
    assert [v.term for v in bench.wire.take(VoteGiven)] == [5], "the same vote may be repeated"


def test_who_reaches_only_a_voter_that_takes_itself_for_a_learner_asks_it(bench: Bench) -> None:
    """It does not know yet that it votes, and the leader that could tell it is gone for good."""
    for node in (B, C):
        bench.wire._onNodeDisconnected(node)
    learner = Node(f"b#{b'new'.hex()}")
    bench.wire._onReadonlyNodeConnected(learner)
    bench.wait(1.5)
    assert not bench.wire.take(PreVote), "it reaches no voter"
    bench.core.set_members({"a": b"", "b": b"new", "c": b""})
    bench.wait(0.7)
    assert (learner.id, PreVote) in [(to, type(message)) for to, message in bench.wire.sent]


def test_no_vote_for_a_shorter_log(bench: Bench) -> None:
    bench.core.receive(B, append(entries(2, 3), 1, 0))
    bench.core.tick()
    bench.now += 5
    bench.core.receive(C, Vote(7, 2, 1))
    assert bench.wire.take(VoteGiven) == []


def test_who_hears_the_leader_does_not_help_to_depose_it(bench: Bench) -> None:
    bench.core.receive(B, append(entries(2), 1, 0))
    bench.core.receive(C, Vote(9, 5, 5))
    assert bench.core.term == 1 and bench.wire.take(VoteGiven) == []
    bench.core.receive(C, PreVote(9, 5, 5))
    assert [a.granted for a in bench.wire.take(PreVoteAnswer)] == [False]
    bench.core.receive(C, Vote(9, 5, 5, transfer=True))
    assert [v.term for v in bench.wire.take(VoteGiven)] == [9], "unless the leader asked for it"


def test_a_node_that_is_cut_off_does_not_raise_its_term(bench: Bench) -> None:
    """Stock raises it with every attempt and deposes the leader when it comes back."""
    bench.wait(10.0)
    assert bench.core.term == 0 and len(bench.wire.take(PreVote)) > 10
    assert bench.wire.take(Vote) == []


def test_a_leader_without_a_majority_steps_down_and_says_so(bench: Bench) -> None:
    """Stock leads on for 30 seconds, and forgets the callbacks of what waits."""
    bench.lead()
    bench.acknowledge()
    done: list[Any] = []
    bench.core.propose(b"x", lambda result, error: done.append((result, type(error))))
    reads: list[Any] = []
    bench.core.read_index(lambda error: reads.append(type(error)))
    bench.wait(1.0)
    assert bench.core.state != LEADER
    assert done == [(None, OutcomeUnknown)] and reads == [NotLeader]


def test_reads_wait_for_a_majority_of_a_later_round(bench: Bench) -> None:
    """Stock has no guarded reads: a deposed leader answers."""
    bench.lead()
    reads: list[Any] = []
    bench.core.read_index(lambda error: reads.append(type(error)))
    assert reads == [NotLeader], "its own no-op is not committed: it may lack older commits"
    bench.acknowledge()
    reads.clear()
    old_round = bench.core._round
    bench.core.read_index(lambda error: reads.append(error))
    next_index = bench.journal.last_index + 1
    bench.core.receive(B, Ack(bench.core.term, old_round, next_index, True, False))
    bench.core.tick()
    assert reads == [], "an answer to an earlier round proves nothing about now"
    bench.acknowledge()
    assert reads == [None]


def test_an_exception_while_applying_is_raised_once_and_not_tried_again(bench: Bench) -> None:
    """Stock applies it again with every tick, forever."""
    bench.core.receive(B, append([(b"\x00ok", 2, 1), (b"\x00boom", 3, 1)], 1, 0, commit=3))
    with pytest.raises(ZeroDivisionError):
        bench.core.tick()
    assert bench.applied == [(2, b"ok")]


def test_entries_are_applied_once_even_if_a_callback_raises(bench: Bench) -> None:
    """Stock counts an entry as applied only after its callback."""
    bench.lead()
    bench.acknowledge()
    before = len(bench.applied)

    def callback(result: Any, error: Exception | None) -> None:
        raise ZeroDivisionError

    bench.core.propose(b"x", callback)
    with pytest.raises(ZeroDivisionError):
        bench.acknowledge()
    bench.core.tick()
    assert [d for _, d in bench.applied[before:]] == [b"x"]


def test_leadership_is_handed_over_to_the_most_advanced(bench: Bench) -> None:
    bench.lead()
    bench.acknowledge(C)
    heir = bench.core.heir()
    assert heir == C and bench.core.caught_up(C) and not bench.core.caught_up(B)
    bench.core.hand_over(heir)
    assert [(n, type(m)) for n, m in bench.wire.sent if isinstance(m, CampaignNow)] == [
        ("c", CampaignNow)
    ]


def test_another_pysyncobj_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    audited.check_pysyncobj()
    monkeypatch.setitem(audited._AUDITED, "syncobj.py", "0" * 64)
    with pytest.raises(UserError, match=r"pysyncobj==0\.3\.17"):
        audited.check_pysyncobj()


def test_a_learner_gets_old_entries_where_a_voter_gets_a_snapshot(
    monkeypatch: pytest.MonkeyPatch, bench: Bench
) -> None:
    """Both are as far behind as the log that is kept for learners begins."""
    bench.lead()
    core, journal = bench.core, bench.journal
    journal._segment_bytes = 600
    for number in range(100):
        core.propose(b"command %d" % number, lambda result, error: None)
        journal.sync()
    bench.acknowledge()
    assert len(bench.applied) > 100
    journal.unlink_before(journal.compact(journal.last_index, 2, 1_000, 100 * 600))
    assert journal.oldest_index == 1 and journal.oldest_behind_kept > 3
    learner, snapshots = Node("metalogger#00"), list[Node]()
    monkeypatch.setattr(core, "_send_snapshot", snapshots.append)
    monkeypatch.setattr(core, "_wants_history", lambda node: node == learner)
    bench.wire._onReadonlyNodeConnected(learner)
    for node in (B, learner):
        core.match_index[node], core.next_index[node] = 1, 3

    def sent_to_learner() -> list[Append]:
        bench.wire.sent.clear()
        core.replicate()
        return [m for n, m in bench.wire.sent if n == learner.id and isinstance(m, Append)]

    (empty,) = sent_to_learner()
    assert snapshots == [B]
    assert empty.entries == [] and not journal.kept.at_hand(3), "the loop must not read the disk"
    core.heartbeat_due = 2e9
    core.receive(learner, Ack(core.term, core._round, 3, True, False))
    assert core.heartbeat_due == 2e9, "there is nothing to send before the segment is there"
    loaded = journal.load_kept(journal.kept.wanted)
    assert loaded is not None
    journal.kept.adopt(loaded)
    sent = [e for m in sent_to_learner() for e in m.entries]
    assert sent and [e[1] for e in sent] == list(range(3, 3 + len(sent)))
    assert sent[-1][0].startswith(b"\x00command ")
