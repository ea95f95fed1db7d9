"""Faults of stock pysyncobj in what it does with messages, votes, time and callbacks, asked of both
sides. Numbers as in docs/known-faults.md.
"""

import pickle
from pathlib import Path
from typing import Any

import pytest
from pysyncobj import syncobj
from pysyncobj.node import Node

from raftfs.errors import InvariantError, NotLeader
from raftfs.meta.raft.configurations import Members
from raftfs.meta.raft.messages import Ack, Append, Contact, PreVote, PreVoteAnswer, Vote, VoteGiven
from raftfs.meta.raft.safety import LEADER
from tests.unit.raft.stock import B, C, Clock, StockNode, both, verdict
from tests.unit.raft.test_safety import Bench, append, entries, log


def ours_with_log(bench: Bench, last: int, *, commit: int = 1) -> None:
    """Entries 2 to `last` of term 1, durable."""
    bench.core.receive(B, append(entries(*range(2, last + 1)), 1, 0, commit=commit))
    bench.core.tick()


@both
def test_h4_a_snapshot_does_not_commit_what_was_not_compared(
    side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if side == "stock":
        node = StockNode()
        node.append([2, 3, 4], 1, 0)  # of a leader that is deposed; nobody else has them
        node.receive(C, "append_entries", term=2, commit_index=4, serialized=None)
        node.doTick(0)
        verdict(side, node.values == ["e2", "e3", "e4"])
    else:
        bench = Bench(monkeypatch)
        ours_with_log(bench, 4)
        bench.core.receive(C, Contact(2, 1))  # goes with every piece of a snapshot
        bench.core.tick()
        verdict(side, bench.core.commit_index > 1 or bench.applied != [])


@both
def test_h5_a_late_duplicate_does_not_cut_the_log(
    side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if side == "stock":
        node = StockNode()
        node.append([2, 3, 4], 1, 0)
        node.append([], 2, 1)
        verdict(side, node.indexes() == [1, 2])
    else:
        bench = Bench(monkeypatch)
        ours_with_log(bench, 4)
        bench.core.receive(B, append([], 2, 1))
        verdict(side, log(bench) != [1, 2, 3, 4])


@both
def test_h5_every_older_append_again_leaves_the_log_as_it_is(
    side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole history of a term arrives once more, in any order that a reconnect may give it."""
    history = [([n], n - 1, min(1, n - 2)) for n in range(2, 12)]
    lost = False
    if side == "stock":
        node = StockNode()
        for numbers, prev, prev_term in history:
            node.append(numbers, prev, prev_term)
        for numbers, prev, prev_term in history[::-1]:
            node.append(numbers, prev, prev_term)
            lost = lost or node.indexes()[-1] < 11
    else:
        bench = Bench(monkeypatch)
        for numbers, prev, prev_term in history + history[::-1] + history:
            bench.core.receive(B, append(entries(*numbers), prev, prev_term))
            bench.core.tick()
            last = log(bench)[-1]
            lost = lost or last < numbers[-1] or log(bench) != list(range(1, last + 1))
        lost = lost or last != 11
    verdict(side, lost)


@both
def test_h6_a_late_acknowledgement_commits_nothing(
    side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if side == "stock":
        node = StockNode()
        node.lead(term=3)
        node.acknowledge(node.indexes()[-1] + 1)  # sent in term 1, of other entries
        node.doTick(0)
        verdict(side, node.private("raftCommitIndex") == node.indexes()[-1])
    else:
        bench = Bench(monkeypatch)
        bench.lead()
        last = bench.journal.last_index
        bench.core.receive(B, Ack(bench.core.term - 1, 99, last + 1, True, False))
        bench.core.tick()
        verdict(side, bench.core.commit_index == last)


@both
def test_h7_a_callback_that_raises_does_not_have_the_entry_applied_again(
    side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def callback(*_: Any) -> None:
        raise ZeroDivisionError

    if side == "stock":
        node = StockNode()
        index = node.serve()
        node._applyCommand(node.command("x"), callback)
        node.doTick(0)
        node.acknowledge(index + 1)
        with pytest.raises(ZeroDivisionError):
            node.doTick(0)
        node.doTick(0)  # the callback is forgotten, the entry is not
        verdict(side, node.values == ["x", "x"])
    else:
        bench = Bench(monkeypatch)
        bench.lead()
        bench.acknowledge()
        bench.core.propose(b"x", callback)
        with pytest.raises(ZeroDivisionError):
            bench.acknowledge()
        bench.core.tick()
        bench.core.tick()
        verdict(side, [d for _, d in bench.applied].count(b"x") != 1)


@both
def test_h13_one_change_of_the_members_at_a_time(
    side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An isolated leader takes in nobody while a change is on its way."""
    if side == "stock":
        node = StockNode(dynamicMembershipChange=True)
        node.serve()
        for name in "xyz":
            node._applyCommand(pickle.dumps(["add", name, Node(name)]), None, 2)
        node.doTick(0)
        verdict(side, {n.id for n in node.private("otherNodes")} == {*"bcxyz"})
    else:
        bench = Bench(monkeypatch)
        bench.lead()
        bench.acknowledge()

        def add(command: bytes, members: Members) -> Members:
            return {**members, command.decode(): b"1"}

        bench.core._read_change = add
        bench.core.change_members(b"x", lambda *_: None)
        with pytest.raises(InvariantError, match="two changes"):
            bench.core.change_members(b"y", lambda *_: None)
        verdict(side, "y" in bench.core.configurations.latest)


@both
def test_h14_a_leader_that_hears_nobody_does_not_answer_reads(
    side: str, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    if side == "stock":
        node = StockNode()
        node.serve()
        clock.run(lambda: node.doTick(0), 10.0)
        verdict(side, node._isLeader())  # and whoever asks it reads what may be long out of date
    else:
        bench = Bench(monkeypatch)
        bench.lead()
        bench.acknowledge()
        answers: list[Any] = []
        bench.core.read_index(answers.append)
        bench.wait(1.0)
        bench.core.read_index(answers.append)
        verdict(side, bench.core.leads or [type(a) for a in answers] != [NotLeader, NotLeader])


@both
def test_h15_a_new_leader_is_not_ready_before_it_knows_what_is_committed(
    side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if side == "stock":
        node = StockNode()
        node.append(range(2, 11), 1, 0)  # acknowledged to clients by the leader that died
        node.lead(term=2)
        node.doTick(0)
        verdict(side, node._isLeader() and node.isReady() and node.values == [])
    else:
        bench = Bench(monkeypatch)
        ours_with_log(bench, 10)
        bench.lead()
        bench.core.tick()
        verdict(side, bench.core.leads)
        bench.acknowledge()
        assert bench.core.leads and [i for i, _ in bench.applied][:9] == list(range(2, 11))


@both
def test_h16_of_two_resets_of_one_round_the_first_counts(
    side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A follower with one divergent entry refuses all appends that are under way, each with another
    place to go on from; a leader that follows the last of them never gets back to the divergence.
    """
    if side == "stock":
        node = StockNode()
        node.append(range(2, 61), 1, 0)
        node.lead(term=2)
        for place in (34, 60):
            node.receive(B, "next_node_idx", next_node_idx=place, reset=True, success=False)
        verdict(side, node.private("raftNextIndex")[B] == 60)
    else:
        bench = Bench(monkeypatch)
        ours_with_log(bench, 60)
        bench.lead()
        seq = bench.core._round
        for place in (34, 60):
            bench.core.receive(B, Ack(bench.core.term, seq, place, False, True))
        verdict(side, bench.core.next_index[B] != 34)


@both
def test_h17_a_divergent_tail_is_left_behind_in_one_step(
    side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if side == "stock":
        node = StockNode()
        node.append(range(2, 301), 1, 0)
        node.append([301], 300, 2, term=2, node=C)
        back = node.wire.take("next_node_idx")[-1]["next_node_idx"]
    else:
        bench = Bench(monkeypatch)
        ours_with_log(bench, 300)
        bench.wire.take(Ack)
        bench.core.receive(C, append(entries(301, term=2), 300, 2, term=2))
        bench.core.tick()
        back = bench.wire.take(Ack)[-1].next_index
    verdict(side, back > 10)


@both
def test_h18_a_node_that_gets_no_answer_does_not_raise_its_term(
    side: str, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    if side == "stock":
        node = StockNode()
        clock.run(lambda: node.doTick(0), 20.0)
        verdict(side, node._getTerm() > 10)
    else:
        bench = Bench(monkeypatch)
        bench.wait(20.0)
        assert bench.wire.take(PreVote), "it has asked"
        verdict(side, bench.core.term > 0)


@both
def test_h18_who_hears_its_leader_is_not_made_a_voter_against_it(
    side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if side == "stock":
        node = StockNode()
        node.append([2], 1, 0)
        node.receive(C, "request_vote", term=23, last_log_index=9, last_log_term=9)
        verdict(side, node._getTerm() == 23)
    else:
        bench = Bench(monkeypatch)
        ours_with_log(bench, 2)
        bench.core.receive(C, Vote(23, 9, 9))
        verdict(side, bench.core.term == 23 or bench.wire.take(VoteGiven) != [])


@both
def test_h19_a_node_that_waits_for_a_snapshot_is_not_flooded(
    side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if side == "stock":
        time = [1000.0]

        def now() -> float:
            time[0] += 0.0001  # a message takes a tenth of a millisecond
            return time[0]

        monkeypatch.setattr(syncobj, "monotonicTime", now)
        node = StockNode()
        node.serve()
        monkeypatch.setattr(node.private("serializer"), "getTransmissionData", lambda node: None)
        node.private("raftNextIndex")[C] = 1
        node.wire.sent = []
        node._SyncObj__sendAppendEntries()
        sent = sum(n == "c" for n, _ in node.wire.sent)
    else:
        bench = Bench(monkeypatch)
        bench.lead()
        bench.acknowledge()
        bench.core.next_index[C] = bench.journal.oldest_index
        bench.wire.sent.clear()
        for _ in range(10):  # whatever it answers, and however often the node looks around
            bench.core.tick()
            for name, message in list(bench.wire.sent):
                if name == "c" and isinstance(message, Contact):
                    bench.core.receive(C, Ack(bench.core.term, message.seq, 0, False, False))
        sent = sum(n == "c" for n, _ in bench.wire.sent)
    verdict(side, sent > 2)


@both
def test_h21_whoever_proposes_is_always_told_what_came_of_it(
    side: str, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    told: list[Any] = []
    if side == "stock":
        node = StockNode()
        node.append([2], 1, 0, commit=2)
        node.wire.up = False  # the command for the leader is lost on its way

        def beat() -> None:
            node.append([], 2, 1, commit=2)
            node.doTick(0)

        node._applyCommand(node.command("x"), lambda *result: told.append(result))
        clock.run(beat, 60.0)
    else:
        bench = Bench(monkeypatch)
        ours_with_log(bench, 2)
        with pytest.raises(NotLeader):
            bench.core.propose(b"x", lambda *result: told.append(result))
        told.append("not the leader")
    verdict(side, told == [])


@both
def test_h25_a_learner_cannot_write(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = Node("0" if side == "stock" else "watcher#00")
    if side == "stock":
        node = StockNode()
        node.serve()
        node.wire._onReadonlyNodeConnected(learner)
        before = node.indexes()
        node.receive(learner, "apply_command", command=node.command("x"))
        node.doTick(0)
        verdict(side, node.indexes() != before)
    else:
        bench = Bench(monkeypatch)
        bench.lead()
        bench.acknowledge()
        bench.wire._onReadonlyNodeConnected(learner)
        before = log(bench)
        with pytest.raises(InvariantError, match="unknown message"):
            bench.core.receive(learner, {"type": "apply_command", "command": b"\x00x"})
        bench.core.tick()
        verdict(side, log(bench) != before)


@both
def test_one_voter_is_counted_once(
    side: str, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    others = ("b", "c", "d", "e")
    if side == "stock":
        node = StockNode(others)
        clock.now += 2
        node.doTick(0)
        for _ in range(2):
            node.receive(B, "response_vote", term=node._getTerm())
        verdict(side, node._isLeader())
    else:
        bench = Bench(monkeypatch, others)
        bench.wait(0.7)
        (*_, ask) = bench.wire.take(PreVote)
        for one in (B, C):
            bench.core.receive(one, PreVoteAnswer(ask.term, True, 0))
        bench.core.tick()
        (*_, vote) = bench.wire.take(Vote)
        for _ in range(2):
            bench.core.receive(B, VoteGiven(vote.term))
        verdict(side, bench.core.state == LEADER)


@both
def test_an_applied_entry_is_never_cut(
    side: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if side == "stock":
        node = StockNode()
        node.append([2, 3], 1, 0, commit=3)
        node.doTick(0)
        node.append([3], 2, 1, term=2, commit=2, node=C)
        assert "truncating already-applied" in caplog.text, "a line in the log is all that happens"
        verdict(side, node.private("raftLog")[2][2] == 2)
    else:
        bench = Bench(monkeypatch)
        ours_with_log(bench, 3, commit=3)
        with pytest.raises(InvariantError, match="committed"):
            bench.core.receive(C, append(entries(3, term=2), 2, 1, term=2, commit=2))
        verdict(side, bench.journal.term_at(3) != 1)


@both
def test_a_commit_index_beyond_the_log_is_not_believed_at_a_start(
    side: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """After a power cut: what was noted of the commit survived, the entries did not."""
    if side == "stock":
        conf = {"journalFile": str(tmp_path / "j")}
        node = StockNode(**conf)
        node.append([2, 3], 1, 0)
        journal = node.private("raftLog")
        journal.setRaftCommitIndex(50)
        journal.onOneSecondTimer()
        again = StockNode(**conf)
        again.doTick(0)
        verdict(side, again.private("raftCommitIndex") > again.indexes()[-1])
    else:
        bench = Bench(monkeypatch)
        ours_with_log(bench, 3)
        bench.journal.setRaftCommitIndex(50)
        bench.restart()
        verdict(side, bench.core.commit_index > bench.journal.last_index)


def test_learners_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A learner that is down delays nothing; one that is up replaces no voter."""
    bench = Bench(monkeypatch)
    bench.lead()
    bench.acknowledge()
    learner = Node("watcher#00")
    bench.wire._onReadonlyNodeConnected(learner)
    done: list[Any] = []
    bench.core.propose(b"x", lambda result, error: done.append(result))
    last = bench.journal.last_index
    bench.core.replicate()
    seq = bench.core._round
    bench.core.receive(learner, Ack(bench.core.term, seq, last + 1, True, False))
    bench.core.tick()
    assert done == [] and bench.core.commit_index < last
    bench.wire.take(Append)
    bench.acknowledge()
    assert done == [f"result {last}"]
