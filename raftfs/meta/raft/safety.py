"""pysyncobj with its faults cured: what each override is for stands at the override.

pysyncobj 0.3.17 gives the roles, terms, elections, the commit rule and the tick. As shipped it
acknowledges before anything is durable, truncates without a conflict, counts stale
acknowledgements, applies twice when a callback raises, serves stale reads and loads damaged
snapshots as empty ones. Its private methods are overridden under their mangled names, so exactly
this version is required; `check_pysyncobj` holds the hashes of the sources that were audited.

No method here awaits or blocks except for the journal's fdatasync. Time is
`pysyncobj.syncobj.monotonicTime`, chance `pysyncobj.syncobj.random` (the simulator replaces both).
"""

from collections import deque
from collections.abc import Callable
from operator import attrgetter
from typing import Any, ClassVar, NamedTuple

import structlog
from pysyncobj import FAIL_REASON, SyncObj, SyncObjConf, syncobj
from pysyncobj.node import Node

from raftfs.errors import NotLeader, OutcomeUnknown, invariant
from raftfs.meta.raft.audited import check_pysyncobj
from raftfs.meta.raft.configurations import Configurations, Members
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

log = structlog.get_logger("raftfs.raft")

FOLLOWER, CANDIDATE, LEADER = 0, 1, 2
REGULAR, NO_OP, MEMBERSHIP = b"\x00", b"\x01", b"\x02"  # the first byte of an entry
APPEND_BYTES = 1 << 20  # per message; a batch entry is at most about this
WINDOW_ENTRIES = 2_000  # sent but not acknowledged, per follower


class _Private(property):
    """A private field of SyncObj under a plain name; None until SyncObj has set it."""

    def __init__(self, name: str) -> None:
        self._field = field = f"_SyncObj__{name}"
        # attrgetter, because a command takes more than a hundred of these.
        super().__init__(attrgetter(field), lambda obj, value: setattr(obj, field, value))

    def __set_name__(self, owner: type, name: str) -> None:
        setattr(owner, self._field, None)


def _private(name: str) -> Any:
    return _Private(name)


class Timings:
    """Seconds. An election begins when nothing was heard for a time between `low` and `high`."""

    low_s = 0.3
    high_s = 0.6
    heartbeat_s = 0.05
    fallback_s = 0.6  # a leader that hears no majority for so long steps down


class _WaitingAck(NamedTuple):
    """An acknowledgement that may go when the journal is durable up to `mark`."""

    mark: int
    since: float
    node: Node
    ack: Ack


class SafeSyncObj(SyncObj):  # type: ignore[misc]
    """One Raft node. The owner feeds messages, ticks it, and gets entries to apply."""

    term = _private("raftCurrentTerm")
    state = _private("raftState")
    leader_node = _private("raftLeader")
    commit_index = _private("raftCommitIndex")
    last_applied = _private("raftLastApplied")
    journal = _private("raftLog")
    match_index = _private("raftMatchIndex")
    next_index = _private("raftNextIndex")
    voters = _private("otherNodes")
    learners = _private("readonlyNodes")
    connected = _private("connectedNodes")
    voted_for = _private("votedForNodeId")
    noop_index = _private("noopIDx")
    election_deadline = _private("raftElectionDeadline")
    last_response = _private("lastResponseTime")
    heartbeat_due = _private("newAppendEntriesTime")
    waiting_commit = _private("commandsWaitingCommit")

    def __init__(
        self,
        me: str | None,
        others: list[str],
        journal: DurableJournal,
        transport: Any,
        apply: Callable[[int, int, bytes], Any],
        send_snapshot: Callable[[Node], None],
        applied: int = 1,
        members: Members | None = None,
        read_change: Callable[[bytes, Members], Members] | None = None,
        wants_history: Callable[[Node], bool] = lambda node: False,
        crowded: Callable[[], bool] = lambda: False,
    ) -> None:
        """`me` None: a learner.

        `apply(index, term, command)` raises only to stop the node.
        `send_snapshot(node)` is called each heartbeat for a node that needs one. `applied`: the
        index up to which the state machine is already, `members` the voters that it names there.
        `read_change(command, members)`: the voters after a command of kind MEMBERSHIP.
        `wants_history(node)`: it needs the entries themselves, however long they take; others get a
        snapshot sooner. `crowded()`: the state machine cannot take more for a while; the leader
        sends a window of entries, and stops when they are not acknowledged.
        """
        check_pysyncobj()
        self._apply = apply
        self._send_snapshot = send_snapshot
        self._wants_history = wants_history
        self._crowded = crowded
        self._read_change = read_change or (lambda command, members: members)
        self._acks: deque[_WaitingAck] = deque()
        self._reassured_at = 0.0
        self._round = 0  # numbers the leader's appends; acknowledgements name the round
        self._acked_round: dict[Node, int] = {}
        self._reset_round: dict[Node, int] = {}
        self._votes: set[str] = set()
        self._pre_term = 0
        self._pre_votes: set[str] = set()
        self._campaign = False  # pre-vote won, or the leader asked for an election
        self._transferring = False
        self._leader_heard = float("-inf")
        self._reads: list[tuple[int, int, Callable[[Exception | None], None]]] = []
        conf = SyncObjConf(
            autoTick=False, journalFile=journal, fullDumpFile=None, useFork=False,
            dynamicMembershipChange=False, commandsWaitLeader=False, appendEntriesUseBatch=True,
            raftMinTimeout=Timings.low_s, raftMaxTimeout=Timings.high_s,
            appendEntriesPeriod=Timings.heartbeat_s, leaderFallbackTimeout=Timings.fallback_s,
            connectionTimeout=max(1.5, Timings.high_s), logCompactionMinEntries=2**62,
            logCompactionMinTime=2**31, commandsQueueSize=100_000,
        )  # fmt: skip
        super().__init__(Node(me) if me else None, [Node(o) for o in others], conf,
                         transport=transport)  # fmt: skip
        self._transport_ = transport
        self.last_applied = self.commit_index = applied
        self.configurations = Configurations(
            members or dict.fromkeys([*others, *([me] if me else [])], b"")
        )
        for command, index, _ in journal[:]:
            if index > applied:
                self._note_change(command, index)
        self._talk_to_voters()

    # --- time passes

    def tick(self) -> None:
        """One round of work, for owners that let the journal block: sync, then `step`."""
        self.journal.sync()
        self.step()

    def step(self) -> None:
        """One round of work, with what is durable by now."""
        self._onTick(0.0)

    def _onTick(self, timeToWait: float = 0.0) -> None:  # noqa: N802, N803
        self._settle()
        now = syncobj.monotonicTime()
        if self.state == LEADER:
            self._advance_commit()
            self._check_quorum(now)
        elif self.selfNode is not None and self.election_deadline < now:
            self._stand(now)
        self._SyncObj__applyLogEntries()
        if self.state == LEADER and now > self.heartbeat_due:
            self._SyncObj__sendAppendEntries()
        self._transferring = self._transferring and self._campaign
        self._answer_reads()

    # --- durability: nothing is acknowledged before it is on the disk

    def _settle(self) -> None:
        """Let those acknowledgements go that have become true."""
        self.journal.settle()
        while self._acks and self._acks[0].mark <= self.journal.durable and not self._crowded():
            waiting = self._acks.popleft()
            self._transport_.send(waiting.node, waiting.ack)
        self._reassure()

    def _reassure(self) -> None:
        """With a slow disk, or when crowded: answer that this node follows, though nothing of its
        log. Else the leader would take it for dead.
        """
        now = syncobj.monotonicTime()
        if not self._acks:
            return
        silent_s = now - max(self._acks[0].since, self._reassured_at)
        if silent_s < Timings.heartbeat_s:
            return
        self._reassured_at = now
        last = self._acks[-1]
        if last.ack.term == self.term:
            self._transport_.send(last.node, Ack(self.term, last.ack.seq, 0, False, False))

    def _SyncObj__onBecomeLeader(self) -> None:  # noqa: N802
        self._acked_round.clear()
        self._reset_round.clear()
        super()._SyncObj__onBecomeLeader()

    def _advance_commit(self) -> None:
        """What a majority has on its disks is committed, if it is of this term (Raft 5.4.2).

        This node counts itself with what is on its own disk; that may be behind the others'.
        """
        if self.commit_index >= self.journal.last_index:
            return
        reached = self.configurations.reached(self._durable_at())
        index = min(reached, self.journal.last_index)
        if index > self.commit_index and self.journal.term_at(index) == self.term:
            self.commit_index = index

    def _check_quorum(self, now: float) -> None:
        """A leader that hears no majority steps down: somebody else may lead by now."""
        limit = now - Timings.fallback_s
        heard = {n.id for n, at in self.last_response.items() if at > limit}
        if not self.configurations.agree({*heard, self.selfNode.id}):
            self._step_down(self.term)

    # --- membership

    def _add(self, command: bytes, index: int, term: int) -> None:
        self.journal.add(command, index, term)
        self._note_change(command, index)

    def _note_change(self, command: bytes, index: int) -> None:
        if command[:1] == MEMBERSHIP:
            before = self.configurations.latest
            self.configurations.propose(index, self._read_change(command[1:], before))
            self._talk_to_voters()

    def set_members(self, members: Members) -> None:
        """The applied state names these voters (name -> identity) from now on."""
        self.configurations.apply(self.last_applied, members)
        self._talk_to_voters()

    def _talk_to_voters(self) -> None:
        """Replicate to the voters of every configuration, whichever of them are applied here: one
        that has come to vote must be kept up to date by a leader that does not know it yet.
        """
        me = self.selfNode
        names = self.configurations.names()
        voters = {Node(name) for name in names if me is None or name != me.id}
        for gone in self.voters - voters:
            for known in (self.match_index, self.next_index, self.last_response):
                known.pop(gone, None)
        for new in voters - self.voters:
            self.next_index[new], self.match_index[new] = self.journal.last_index + 1, 0
            self.last_response[new] = syncobj.monotonicTime()
        self.voters = voters

    def change_members(self, command: bytes, done: Callable[[Any, Exception | None], None]) -> None:
        """As `propose`, for a command that changes who votes. One at a time. NotLeader."""
        invariant(not self.configurations.changing, "two changes of the membership at a time")
        self._propose(MEMBERSHIP + command, done)

    # --- proposals and reads

    def propose(self, command: bytes, done: Callable[[Any, Exception | None], None]) -> None:
        """Append to the log. `done(result, error)` is called once: applied, or OutcomeUnknown."""
        self._propose(REGULAR + command, done)

    def _propose(self, entry: bytes, done: Callable[[Any, Exception | None], None]) -> None:
        if self.state != LEADER:
            raise NotLeader

        def callback(result: Any, reason: int) -> None:
            unknown = None if reason == FAIL_REASON.SUCCESS else OutcomeUnknown()
            done(result, unknown)

        index = self.journal.last_index + 1
        self._add(entry, index, self.term)
        self.waiting_commit[index].append((self.term, callback))

    def replicate(self) -> None:
        """Send what is new now, before it is durable here: followers write it meanwhile."""
        self._SyncObj__sendAppendEntries()

    def read_index(self, done: Callable[[Exception | None], None]) -> None:
        """Call `done(None)` once the state has everything committed before now, by a leader's word.

        The leader is still the leader if a majority answers a round sent after now; its own no-op
        must be applied, or it may not yet know what older leaders committed.
        """
        if not self.leads:
            done(NotLeader())
            return
        self._reads.append((self._round + 1, self.commit_index, done))
        self.heartbeat_due = 0.0

    @property
    def leads(self) -> bool:
        """Leader, and everything that older leaders committed is applied."""
        return bool(self.state == LEADER and self.last_applied >= self.noop_index)

    def _answer_reads(self) -> None:
        if not self._reads:
            return
        rounds = {n.id: r for n, r in self._acked_round.items()}
        rounds[self.selfNode.id] = self._round + 1
        confirmed = self.configurations.reached(rounds)
        rest = []
        for read in self._reads:
            if read[0] <= confirmed and read[1] <= self.last_applied:
                read[2](None)
            else:
                rest.append(read)
        self._reads = rest

    # --- receiving

    def receive(self, node: Node, message: Any) -> None:
        """A message of a connected node."""
        self._SyncObj__onMessageReceived(node, message)

    def _SyncObj__onMessageReceived(self, node: Node, message: Any) -> None:  # noqa: N802
        handler = self._HANDLERS.get(type(message))
        invariant(handler is not None, f"unknown message {type(message)}")
        assert handler is not None
        handler(self, node, message)

    def _on_append(self, node: Node, m: Append) -> None:
        if m.term < self.term:
            self._transport_.send(node, Ack(self.term, 0, 0, False, False))
            return
        self._follow(node, m.term)
        prev, prev_term, entries = m.prev_index, m.prev_term, m.entries
        first, last = self.journal.first_index, self.journal.last_index
        if prev < first:
            # What lies before our first entry is compacted, so committed, so the same everywhere.
            covered = prev + len(entries)
            if covered <= first:
                self._ack(node, m.seq, covered + 1, matched=True)
                return
            entries, prev, prev_term = entries[first - prev :], first, self.journal.term_at(first)
        if prev > last or self.journal.term_at(prev) != prev_term:
            self._ack(node, m.seq, self._retreat(prev), reset=True)
            return
        self._take_entries(prev, entries)
        verified = prev + len(entries)
        # Only what was compared with the leader's log may be called committed.
        self.commit_index = max(self.commit_index, min(m.commit, verified))
        self._SyncObj__leaderCommitIndex = self.commit_index
        self._ack(node, m.seq, verified + 1, matched=True)

    def _take_entries(self, prev: int, entries: list[Any]) -> None:
        """Append what is new; cut our log only where it truly differs."""
        last = self.journal.last_index
        for at, (_, index, term) in enumerate(entries):
            if index > last or self.journal.term_at(index) != term:
                if index <= last:
                    invariant(index > self.commit_index, "a committed entry would be cut")
                    self.journal.deleteEntriesFrom(index - self.journal.first_index)
                    self.configurations.cut(index)
                    self._talk_to_voters()
                for entry in entries[at:]:
                    self._add(*entry)
                return

    def _retreat(self, prev: int) -> int:
        """Where the leader should try next: the start of our term at `prev`, or our log's end."""
        last = self.journal.last_index
        if prev > last:
            return int(last + 1)
        term, index = self.journal.term_at(prev), prev
        lowest = max(self.journal.first_index + 1, self.commit_index + 1)
        while index > lowest and self.journal.term_at(index - 1) == term:
            index -= 1
        return index

    def _ack(
        self, node: Node, seq: int, next_index: int, *, matched: bool = False, reset: bool = False
    ) -> None:
        ack = Ack(self.term, seq, next_index, matched, reset)
        self._acks.append(_WaitingAck(self.journal.mark, syncobj.monotonicTime(), node, ack))

    def _follow(self, node: Node, term: int) -> None:
        """A leader of this or a higher term has spoken."""
        invariant(not (term == self.term and self.state == LEADER), "two leaders in one term")
        now = syncobj.monotonicTime()
        if term > self.term:
            self._SyncObj__setCurrentTerm(term, None)
            self._transferring = False
        self._leader_heard = now
        if not self._transferring:
            self.election_deadline = now + self._SyncObj__generateRaftTimeout()
        self.leader_node = node
        self._SyncObj__setState(FOLLOWER)

    def _on_contact(self, node: Node, m: Contact) -> None:
        if m.term >= self.term:
            self._follow(node, m.term)
        self._ack(node, m.seq, 0)

    def _on_ack(self, node: Node, m: Ack) -> None:
        if m.term > self.term:
            self._step_down(m.term)
            return
        if m.term < self.term or self.state != LEADER or node not in self.match_index:
            return  # of an older leadership, or of nobody: it proves nothing now
        self._acked_round[node] = max(self._acked_round.get(node, 0), m.seq)
        self.last_response[node] = syncobj.monotonicTime()
        if m.matched:
            self.match_index[node] = max(self.match_index[node], m.next_index - 1)
            self.next_index[node] = max(self.next_index[node], m.next_index)
        elif m.reset and m.seq > self._reset_round.get(node, 0):
            # Appends that were under way will be refused too: only the first of them counts.
            self._reset_round[node] = self._round
            self.next_index[node] = max(m.next_index, self.match_index[node] + 1)
            if m.next_index <= 2 and self._replaces_a_voter(node):
                self.next_index[node] = 0  # it has nothing: a snapshot is shorter than the log
            self.heartbeat_due = 0.0
        at = self.next_index[node]
        if at > self._may_have(node):
            return
        # A node that waits for a snapshot, or for old entries to be read, gets nothing of the log:
        # hurrying would only have it answer again, and again, for as long as that takes.
        if not self._needs_snapshot(node) and self.journal.kept.at_hand(at):
            self.heartbeat_due = 0.0

    def _replaces_a_voter(self, node: Node) -> bool:
        """Whether a learner has come to take a voter's place (its id is `name#identity`)."""
        name = node.id.partition("#")[0]
        return node in self.learners and any(v.id == name for v in self.voters)

    def _step_down(self, term: int) -> None:
        if term > self.term:
            self._SyncObj__setCurrentTerm(term, None)
        self.leader_node = None
        self._SyncObj__setState(FOLLOWER)

    def resign(self) -> None:
        """Lead no more; what waits is told that its outcome is unknown."""
        if self.state == LEADER:
            self._step_down(self.term)

    # --- elections

    def _electorate(self) -> list[Node]:
        return [Node(n) for n in sorted(self.configurations.electorate()) if n != self.selfNode.id]

    def _up_to_date(self, m: Vote | PreVote) -> bool:
        mine = (self.journal[-1][2], self.journal[-1][1])
        return (m.last_term, m.last_index) >= mine

    def has_leader(self) -> bool:
        """A leader was heard within the shortest election timeout, or is this node, confirmed."""
        now = syncobj.monotonicTime()
        if self.state == LEADER:
            limit = now - Timings.low_s
            heard = {n.id for n, at in self.last_response.items() if at > limit}
            return self.configurations.agree({*heard, self.selfNode.id})
        return bool(self.leader_node is not None and now - self._leader_heard < Timings.low_s)

    def _on_vote(self, node: Node, m: Vote) -> None:
        """As Raft has it, but a node that hears its leader is not to be disturbed (stickiness).

        A learner votes, too, if it is asked: whoever asks knows of a change that makes it a voter,
        which it need not know yet. Nobody else counts it.
        """
        if not m.transfer and self.has_leader():
            return
        if m.term > self.term:
            self._step_down(m.term)
        if m.term < self.term or self.state == LEADER or not self._up_to_date(m):
            return
        if self.voted_for not in (None, node.id):
            return
        self._SyncObj__setCurrentTerm(self.term, node.id)  # durable before it is told
        self.election_deadline = syncobj.monotonicTime() + self._SyncObj__generateRaftTimeout()
        self._transport_.send(node, VoteGiven(m.term))

    def _on_vote_given(self, node: Node, m: VoteGiven) -> None:
        if self.state != CANDIDATE or m.term != self.term:
            return
        self._votes.add(node.id)
        self._count_votes()

    def _count_votes(self) -> None:
        if self.configurations.agree(self._votes):
            self._SyncObj__onBecomeLeader()

    def _on_pre_vote(self, node: Node, m: PreVote) -> None:
        granted = (
            m.term > self.term
            and not self.has_leader()
            and self._up_to_date(m)
        )
        self._transport_.send(node, PreVoteAnswer(m.term, granted, self.term))

    def _on_pre_vote_answer(self, node: Node, m: PreVoteAnswer) -> None:
        if m.current > self.term and self.state != LEADER:
            self._step_down(m.current)
        elif m.granted and m.term == self._pre_term == self.term + 1 and self.state != LEADER:
            self._pre_votes.add(node.id)
            if self.configurations.agree(self._pre_votes):
                self._campaign = True
                self.election_deadline = 0.0

    def _on_campaign_now(self, node: Node, m: CampaignNow) -> None:
        if self.selfNode is not None and m.term == self.term and node == self.leader_node:
            self._campaign = self._transferring = True
            self.election_deadline = 0.0

    def _stand(self, now: float) -> None:
        """The election timeout has passed: first ask, and campaign only if a majority would agree.

        A node that cannot win (cut off, or behind) so never raises the term of a working cluster.
        """
        self.election_deadline = now + self._SyncObj__generateRaftTimeout()
        mine = self.selfNode.id
        if self._campaign or self.configurations.agree({mine}):
            self._elect(mine)
        elif self.connected.intersection(self._electorate()):
            self.election_deadline = now + self._SyncObj__generateRaftTimeout() / 2
            self._pre_term, self._pre_votes = self.term + 1, {mine}
            question = PreVote(self._pre_term, self.journal[-1][1], self.journal[-1][2])
            for node in self._electorate():
                self._transport_.send(node, question)

    def _elect(self, mine: str) -> None:
        self._campaign = False
        self.leader_node = None
        self._SyncObj__setState(CANDIDATE)
        self._SyncObj__setCurrentTerm(self.term + 1, mine)
        self._votes = {mine}
        last = self.journal[-1]
        request = Vote(self.term, last[1], last[2], self._transferring)
        for node in self._electorate():
            self._transport_.send(node, request)
        self._count_votes()

    def heir(self, to: str = "") -> Node | None:
        """Leader: the connected voter that could lead instead, the most advanced one or `to`."""
        able = [n for n in self.voters if n in self.connected and to in ("", n.id)]
        if self.state != LEADER or not able:
            return None
        return max(able, key=lambda n: (self.match_index.get(n, 0), n.id))

    def caught_up(self, node: Node) -> bool:
        """Leader: it has the whole log, so that nobody would refuse it a vote."""
        return bool(self.match_index.get(node, 0) >= self.journal.last_index)

    def hand_over(self, node: Node) -> None:
        """Leader: ask it to hold an election at once."""
        self._transport_.send(node, CampaignNow(self.term))

    # --- leading

    def _SyncObj__sendAppendEntries(self) -> None:  # noqa: N802
        """One round: to each node what it lacks, within a window; an empty one is a heartbeat."""
        self.heartbeat_due = syncobj.monotonicTime() + Timings.heartbeat_s
        self._round += 1
        for node in self.voters | self.learners:
            if node not in self.connected or node not in self.next_index:
                continue
            if self._needs_snapshot(node):
                self._transport_.send(node, Contact(self.term, self._round))
                self._send_snapshot(node)
            else:
                self._send_entries(node)

    def _needs_snapshot(self, node: Node) -> bool:
        """Whether what it lacks is not there any more, or would take longer than a snapshot."""
        if self._wants_history(node):
            return bool(self.next_index[node] <= self.journal.oldest_index)
        return bool(self.next_index[node] <= self.journal.oldest_behind_kept)

    def _send_entries(self, node: Node) -> None:
        last = self._may_have(node)
        sent = False
        while True:
            at = self.next_index[node]
            in_window = at - self.match_index[node] < WINDOW_ENTRIES
            entries = self.journal.entries_from(at, APPEND_BYTES) if in_window else []
            del entries[max(0, last + 1 - at) :]
            if sent and not entries:
                return
            prev = at - 1
            self._transport_.send(
                node,
                Append(
                    self.term, self._round, self.commit_index, prev, self.journal.term_at(prev),
                    entries,
                ),
            )  # fmt: skip
            sent = True
            self.next_index[node] = at + len(entries)
            # Until the node has matched once, one message is a question, more would be noise.
            if self.next_index[node] > last or not self.match_index[node]:
                return

    def _may_have(self, node: Node) -> int:
        """The last entry that a node may get: of learners only what is committed. One that a change
        on its way makes a voter counts for the commit, so it gets more; but what it has, a
        majority of those before it must have: it cannot lead yet, and were it ahead of all who
        can, it could vote for none of them.
        """
        if node not in self.learners:
            return int(self.journal.last_index)
        if not self.configurations.is_coming(node.id):
            return int(self.commit_index)
        before = self.configurations.reached_before(self._durable_at())
        return max(int(self.commit_index), before)

    def _durable_at(self) -> dict[str, int]:
        """How far each node's disk has the log, as the leader knows."""
        have = {n.id: i for n, i in self.match_index.items()}
        have[self.selfNode.id] = self.journal.durable_index
        return have

    def snapshot_installed(self, index: int, term: int) -> None:
        """Follower: the state is now that at (index, term); the log begins there."""
        invariant(index > self.last_applied, "an older snapshot over newer state")
        last = self.journal.last_index
        fits = self.journal.first_index <= index <= last and self.journal.term_at(index) == term
        if not fits:
            self.journal.reset_to(index, term)
        self.last_applied = index
        self.commit_index = max(self.commit_index, index)

    def sent_snapshot(self, node: Node, index: int) -> None:
        """Leader: the node has installed the state at `index`."""
        if self.state == LEADER and node in self.next_index:
            self.match_index[node] = max(self.match_index[node], index)
            self.next_index[node] = max(self.next_index[node], index + 1)
            self.heartbeat_due = 0.0

    def node_replaced(self, node: Node) -> None:
        """A voter connected anew: believe nothing of what it had before."""
        if self.state == LEADER and node in self.match_index:
            self.match_index[node] = 0
            self.next_index[node] = self.journal.last_index + 1

    def _SyncObj__setState(self, new: int) -> None:  # noqa: N802
        """Leaving leadership settles nothing: every waiting command's outcome is unknown."""
        was = self.state
        super()._SyncObj__setState(new)
        if was == LEADER and new != LEADER:
            self.election_deadline = (
                syncobj.monotonicTime() + self._SyncObj__generateRaftTimeout()
            )
            waiting = [cb for cbs in self.waiting_commit.values() for _, cb in cbs]
            self.waiting_commit.clear()
            reads, self._reads = self._reads, []
            for callback in waiting:
                callback(None, FAIL_REASON.UNKNOWN_OUTCOME)
            for _, _, done in reads:
                done(NotLeader())

    # --- applying

    def _SyncObj__applyLogEntries(self) -> bool:  # noqa: N802
        """Each committed entry once, in order; callbacks after the batch, so none can repeat one.

        An exception of the state machine is a bug: it ends this node and is never tried again.
        """
        done = []
        for command, index, term in self._to_apply():
            invariant(index == self.last_applied + 1, "gap while applying")
            data = b"" if command[:1] == NO_OP else command[1:]
            result = self._apply(index, term, data)
            self.last_applied = index
            for asked_term, callback in self.waiting_commit.pop(index, ()):
                same = asked_term == term
                reason = FAIL_REASON.SUCCESS if same else FAIL_REASON.DISCARDED
                done.append((callback, result if same else None, reason))
        for callback, result, reason in done:
            callback(result, reason)
        return False

    def _to_apply(self) -> list[Any]:
        if self.commit_index <= self.last_applied:
            return []
        first = self.last_applied + 1 - self.journal.first_index
        found: list[Any] = self.journal[first : first + self.commit_index - self.last_applied]
        return found

    def _SyncObj__tryLogCompaction(self) -> None:  # noqa: N802
        """The owner compacts after its checkpoints."""

    _HANDLERS: ClassVar[dict[Any, Any]] = {
        Append: _on_append, Contact: _on_contact, Ack: _on_ack, Vote: _on_vote,
        VoteGiven: _on_vote_given, PreVote: _on_pre_vote, PreVoteAnswer: _on_pre_vote_answer,
        CampaignNow: _on_campaign_now,
    }  # fmt: skip
