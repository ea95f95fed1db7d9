"""Masters in one process under virtual time, with a bad network, bad disks and a moving membership.

Everything that is left to chance follows from the seed. The nodes run the real core and the real
journal; the journal's syncs take time, as the thread's do. A kill keeps what was written, a power
cut what was synced. Checkpoints come often and keep little, so snapshots are needed all the time.
"""

import random
from collections import Counter
from typing import Any
from unittest.mock import patch

from pysyncobj import syncobj

from raftfs.errors import NotLeader
from raftfs.meta.raft import safety
from raftfs.meta.raft.safety import LEADER
from tests.sim.core import stories
from tests.sim.core.member import Member, read_change
from tests.sim.core.network import Network

NAMES = ("a", "b", "c", "d", "e")
_APPEND_BYTES = (20, 1 << 20, 1 << 20)  # the longest message: sometimes the log comes in pieces
STEP_S = 0.005
_BEHIND_MAX = 20  # entries


class World:
    """The clock, the faults, the clients, and what must hold."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.chance = random.Random(seed)
        self.now = 1000.0
        syncobj.monotonicTime = lambda: self.now
        syncobj.random = random.Random(seed + 1)
        self.net = Network(seed)
        self.sync_s = self.chance.choice((0.005, 0.05, 0.3))  # the longest usual sync of a disk
        self.seen: Counter[str] = Counter()  # what happened, by name
        self.leaders: dict[int, str] = {}
        self.votes: dict[tuple[int, str], str] = {}
        self.log: dict[int, tuple[int, bytes]] = {}
        names = NAMES if self.chance.random() < 0.2 else NAMES[:3]
        self.append_bytes = self.chance.choice(_APPEND_BYTES)
        self.voters = {n: n.encode() for n in names}  # as the first who applied a change has it
        self._asked: set[bytes] = set()  # identities that somebody proposed as voters
        self.acked: set[bytes] = set()
        self.proposed = 0
        self.reads = 0
        self.faults = 0
        self.members = {
            n: Member(self, n, dict(self.voters), random.Random(f"{seed}/{n}")) for n in NAMES
        }
        for name in names:
            self.members[name].start()

    def running(self) -> list[Member]:
        """Those whose process runs."""
        return [m for m in self.members.values() if m.core is not None]

    # --- links

    def connect(self, member: Member) -> None:
        """A process has come up, or has another name now."""
        for other in self.running():
            if other is not member:
                other.up(member.name, member.ident)
                member.up(other.name, other.ident)

    def disconnect(self, member: Member) -> None:
        """A process is gone."""
        for other in self.running():
            if other is not member:
                other.down(member.name)
        member.peers.clear()

    def send(self, source: Member, target: str, message: Any) -> None:
        """Into the network; it arrives only at what is called now as it was then."""
        self.net.send(self.now, source.name, target, (source.ident, message))

    # --- time

    def run(self, seconds: float) -> None:
        """Let time pass."""
        until = self.now + seconds
        while self.now < until:
            self.now += STEP_S
            for source, target, (ident, message) in self.net.due(self.now):
                member = self.members[target]
                if member.core is not None and member.peers.get(source) == ident:
                    member.receive(source, message)
            for member in self.running():
                if member.paused_until <= self.now:
                    member.turn(self.now)
                    self._check_leader(member)

    # --- faults

    def fault(self) -> None:
        """One thing goes wrong, or is mended."""
        self.faults += 1
        member = self.members[self.chance.choice(NAMES)]
        kinds = (
            (25, self._kill_or_start), (20, self._partition), (18, self._heal), (7, self._suspend),
            (8, self._cut_all), (6, self._pause), (6, self._slow_disk), (4, self._full_disk),
            (4, self._lose_disk), (14, self._change_membership),
        )  # fmt: skip
        weights = [weight for weight, _ in kinds]
        self.chance.choices([kind for _, kind in kinds], weights)[0](member)

    def _kill_or_start(self, member: Member) -> None:
        if member.core is None:
            if member.files.content:  # else nobody has begun to use the machine
                member.start()
            return
        power = self.chance.random() < 0.5
        self.seen["power cut" if power else "kill"] += 1
        member.stop(power=power)

    def _partition(self, member: Member) -> None:
        one_way = self.chance.random() < 0.5
        self.seen["one-way partition" if one_way else "partition"] += 1
        for other in NAMES:
            if other != member.name:
                self.net.cut.add((member.name, other))
                if not one_way:
                    self.net.cut.add((other, member.name))

    def _heal(self, member: Member) -> None:
        self.net.cut.clear()

    def _suspend(self, member: Member) -> None:
        self.seen["everybody suspended"] += 1
        self.now += self.chance.uniform(0.5, 2.0)

    def _cut_all(self, member: Member) -> None:
        self.seen["power cut of all"] += 1
        stopped = self.running()
        for other in stopped:
            other.stop(power=True)
        for other in stopped:
            other.start()

    def _pause(self, member: Member) -> None:
        self.seen["pause"] += 1
        member.paused_until = self.now + self.chance.uniform(0.3, 2.0)

    def _slow_disk(self, member: Member) -> None:
        self.seen["slow disk"] += 1
        member.slow_until = self.now + self.chance.uniform(0.5, 2.0)

    def _full_disk(self, member: Member) -> None:
        if member.core is not None:
            member.files._fail_at = member.files.calls + self.chance.randrange(1, 6)
            member.files._error = OSError

    def _lose_disk(self, member: Member) -> None:
        """As an administrator would do it: one at a time, and only when the others are a majority.
        """
        voter = member.name in self.voters
        if not voter or self._lost() or not self._majority_without(member):
            return
        self.seen["disk lost"] += 1
        if member.core is not None:
            member.stop(power=False)
        member.new_disk(voter=False)
        member.start()

    def _lost(self) -> bool:
        return any(self.voters.get(m.name, m.uuid) != m.uuid for m in self.members.values())

    def _majority_without(self, member: Member) -> bool:
        voters = set(self.voters)
        up = {m.name for m in self.running() if m.voter} & (voters - {member.name})
        return 2 * len(up) > len(voters)

    def _change_membership(self, member: Member) -> None:
        """Whoever leads is asked to add a machine that has joined, or to remove one."""
        voters = set(self.voters)
        waiting = [m for m in self.running() if not m.voter and m.name not in voters]
        stopped = [m for m in self.members.values() if m.core is None and m.name not in voters]
        if waiting:
            command = b"+%s %s" % (waiting[0].name.encode(), waiting[0].uuid.hex().encode())
        elif stopped and len(voters) < 5:
            if stopped[0].uuid not in self._asked:
                stopped[0].new_disk(voter=False)
            stopped[0].start()
            return
        elif len(voters) > 3 and member.name in voters:
            command = b"-" + member.name.encode()
        else:
            return
        for leader in self.running():
            core = leader.core
            if core is not None and core.leads and not core.configurations.changing:
                self.seen["membership asked"] += 1
                self._asked |= {w.uuid for w in waiting[:1]}
                core.change_members(command, lambda result, error: self._changed(error))

    def _changed(self, error: Exception | None) -> None:
        self.seen["membership changed"] += error is None

    def promote(self) -> None:
        """What the leader does by itself: replacements get their votes back, though they lack the
        last entries.
        """
        for leader in self.running():
            core = leader.core
            if core is None or not core.leads or core.configurations.changing:
                continue
            for node in list(core.learners):
                name, _, identity = node.id.partition("#")
                known = leader.members.get(name)
                caught_up = core.match_index.get(node, 0) > max(0, core.commit_index - _BEHIND_MAX)
                if known is not None and known.hex() != identity and caught_up:
                    command = b"=%s %s" % (name.encode(), identity.encode())
                    core.change_members(command, lambda result, error: None)
                    break

    def mend(self, *, bad: bool = False) -> None:
        """Everything works again; `bad`: as well as the network lets it."""
        self.net.cut.clear()
        self.net.late.clear()
        self.net.bad = bad
        for member in self.members.values():
            member.paused_until = member.slow_until = 0.0
            member.files._fail_at = 0
            if member.core is None and member.files.content:
                member.start()

    # --- clients

    def propose(self) -> None:
        """Whoever believes to lead gets a command."""
        for member in self.running():
            core = member.core
            if core is not None and core.leads and member.paused_until <= self.now:
                self.propose_to(member)

    def propose_to(self, member: Member) -> None:
        """This leader gets a command."""
        core = member.core
        assert core is not None
        self.proposed += 1
        command = b"c%d" % self.proposed

        def done(result: Any, error: Exception | None) -> None:
            if error is None:
                self.acked.add(command)

        core.propose(command, done)
        core.replicate()

    def read(self) -> None:
        """A guarded read at whoever believes to lead must see everything acknowledged before."""
        for member in self.running():
            core = member.core
            if core is None:
                continue
            before = set(self.acked)

            def done(
                error: Exception | None, member: Member = member, before: set[bytes] = before
            ) -> None:
                if error is None:
                    self.reads += 1
                    missing = before - set(member.commands)
                    assert not missing, f"stale read on {member.name}: {missing}"
                else:
                    assert isinstance(error, NotLeader)

            core.read_index(done)

    # --- what must hold

    def _check_leader(self, member: Member) -> None:
        core = member.core
        if core is not None and core.state == LEADER:
            known = self.leaders.setdefault(core.term, member.name)
            assert known == member.name, f"two leaders in {core.term}: {known} and {member.name}"

    def check_vote(self, term: int, voter: str, candidate: str) -> None:
        """One vote a term, whatever the voter has gone through."""
        known = self.votes.setdefault((term, voter), candidate)
        assert known == candidate, f"{voter} voted for {known} and {candidate} in term {term}"

    def check_applied(self, index: int, term: int, data: bytes) -> None:
        """State-machine safety: one entry an index, whoever applies it, whenever."""
        if index not in self.log and data[:1] in (b"+", b"-", b"="):
            self.voters = read_change(data, self.voters)
        known = self.log.setdefault(index, (term, data))
        assert known == (term, data), f"entry {index}: {known} and {(term, data)}"

    def check_end(self) -> None:
        """After mending: all agree, nothing acknowledged is missing, nothing happened twice."""
        voters = sorted(self.voters)
        states = [self.members[n].commands for n in voters]
        assert all(s == states[0] for s in states), f"{voters} do not agree"
        assert len(set(states[0])) == len(states[0]), "a command was applied twice"
        missing = self.acked - set(states[0])
        assert not missing, f"acknowledged and lost: {sorted(missing)[:5]}"
        for name in voters:
            core = self.members[name].core
            assert core is not None and sorted(self.members[name].members) == voters
            assert not core.configurations.changing, f"{name} still waits for a change"


def story(seed: int, faults: int = 25) -> World:
    """One run: faults and load, then mending and the final checks."""
    world = World(seed)
    with patch.object(safety, "APPEND_BYTES", world.append_bytes):
        _tell(world, faults)
    return world


def _tell(world: World, faults: int) -> None:
    world.run(1.5)
    if stories.Stories(world).tell():
        faults -= stories.FAULTS
    for _ in range(faults):
        for _ in range(world.chance.randrange(1, 12)):
            for _ in range(world.chance.choice((1, 1, 4))):
                world.propose()
            world.read()
            world.promote()
            world.run(world.chance.uniform(0.01, 0.15))
        world.fault()
    world.mend()
    for _ in range(8):
        world.run(1.0)
        world.promote()
        world.mend()
    world.propose()
    world.run(1.0)
    world.check_end()
