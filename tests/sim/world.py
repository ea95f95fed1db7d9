"""Three Raft nodes in one process under virtual time, with a bad network and bad disks.

Everything that is left to chance follows from the seed: delays, losses and duplicates from a stream
per pair of nodes (so that the order of a loop over a set does not matter), faults from one of their
own. Messages may overtake each other. A kill keeps what was written, a power cut what was synced.
"""

import heapq
import random
from pathlib import Path
from typing import Any

from pysyncobj import syncobj
from pysyncobj.node import Node
from pysyncobj.transport import Transport

from raftfs.errors import NotLeader
from raftfs.meta.raft.journal import DurableJournal
from raftfs.meta.raft.safety import LEADER, SafeSyncObj
from tests.unit.raft.disks import FakeFiles

NAMES = ("a", "b", "c")
FOLDER = Path("journal")
STEP_S = 0.005


class Wire(Transport):  # type: ignore[misc]
    """One node's side of the network."""

    def __init__(self, world: "World", name: str) -> None:
        super().__init__(None, None, [])
        self.world, self.name = world, name
        self.core: SafeSyncObj | None = None

    @property
    def ready(self) -> bool:
        """pysyncobj asks."""
        return True

    def send(self, node: Node, message: Any) -> bool:
        """Hand over to the network."""
        self.world.send(self.name, node.id, message)
        return True


class Member:
    """One node: its disk, and while it runs its core and what it has applied."""

    def __init__(self, world: "World", name: str) -> None:
        self.world, self.name = world, name
        self.files = FakeFiles()
        self.core: SafeSyncObj | None = None
        self.applied: list[bytes] = []

    def start(self) -> None:
        """Start, or start again; the log is replayed from its beginning."""
        journal = DurableJournal(FOLDER, self.files, 20_000)
        if not len(journal):
            journal.add(b"\x01", 1, 0)
        self.applied = []
        wire = Wire(self.world, self.name)
        others = [n for n in NAMES if n != self.name]
        self.core = SafeSyncObj(self.name, others, journal, wire, self.apply, lambda node: None)
        wire.core = self.core
        for other in others:
            wire._onNodeConnected(Node(other))

    def stop(self, *, power: bool) -> None:
        """kill -9, or a power cut."""
        self.core = None
        self.files = self.files.after_power_cut() if power else self.files.after_kill()

    def apply(self, index: int, term: int, data: bytes) -> int:
        """The state machine: a list. Every node must apply the same at the same index."""
        self.world.check_applied(index, term, data)
        if data:
            self.applied.append(data)
        return index


class World:
    """The network, the clock, the faults, the clients, and what must hold."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.chance = random.Random(seed)
        self.now = 1000.0
        syncobj.monotonicTime = lambda: self.now
        syncobj.random = random.Random(seed + 1)
        self.bad_network = True
        self._streams = {
            (x, y): random.Random(f"{seed}/{x}/{y}") for x in NAMES for y in NAMES if x != y
        }
        self._sent = dict.fromkeys(self._streams, 0)
        self._queue: list[Any] = []
        self.cut: set[tuple[str, str]] = set()
        self.members = {n: Member(self, n) for n in NAMES}
        self.leaders: dict[int, str] = {}
        self.log: dict[int, tuple[int, bytes]] = {}
        self.acked: set[bytes] = set()
        self.proposed = 0
        self.reads = 0
        self.faults = 0
        for member in self.members.values():
            member.start()

    # --- network

    def send(self, source: str, target: str, message: Any) -> None:
        """Delay, perhaps lose, perhaps duplicate."""
        stream = self._streams[source, target]
        copies = 1
        if self.bad_network:
            luck = stream.random()
            copies = 0 if luck < 0.05 else 2 if luck > 0.95 else 1
        for _ in range(copies):
            self._sent[source, target] += 1
            delay = stream.uniform(0.001, 0.03 if self.bad_network else 0.002)
            entry = (self.now + delay, source, target, self._sent[source, target], message)
            heapq.heappush(self._queue, entry)

    def _deliver(self) -> None:
        while self._queue and self._queue[0][0] <= self.now:
            _, source, target, _, message = heapq.heappop(self._queue)
            core = self.members[target].core
            if core is not None and (source, target) not in self.cut:
                core.receive(Node(source), message)

    # --- time

    def run(self, seconds: float) -> None:
        """Let time pass."""
        until = self.now + seconds
        while self.now < until:
            self.now += STEP_S
            self._deliver()
            for name in NAMES:
                core = self.members[name].core
                if core is not None:
                    core.tick()
                    self._check_leader(name, core)

    # --- faults

    def fault(self) -> None:
        """One thing goes wrong, or is mended."""
        self.faults += 1
        name = self.chance.choice(NAMES)
        member = self.members[name]
        kind = self.chance.random()
        if kind < 0.35:
            if member.core is None:
                member.start()
            else:
                member.stop(power=self.chance.random() < 0.5)
        elif kind < 0.6:
            one_way = self.chance.random() < 0.5
            for other in NAMES:
                if other != name:
                    self.cut.add((name, other))
                    if not one_way:
                        self.cut.add((other, name))
        elif kind < 0.8:
            self.cut.clear()
        elif kind < 0.9:
            self.now += self.chance.uniform(0.5, 2.0)  # everybody was suspended
        else:
            for other in self.members.values():
                if other.core is not None:
                    other.stop(power=True)
            for other in self.members.values():
                other.start()

    def mend(self) -> None:
        """Everything works again."""
        self.cut.clear()
        self.bad_network = False
        for member in self.members.values():
            if member.core is None:
                member.start()

    # --- clients

    def propose(self) -> None:
        """Whoever believes to lead gets a command."""
        for member in self.members.values():
            core = member.core
            if core is None or not core.leads:
                continue
            self.proposed += 1
            command = b"c%d" % self.proposed

            def done(result: Any, error: Exception | None, command: bytes = command) -> None:
                if error is None:
                    self.acked.add(command)

            core.propose(command, done)
            core.replicate()

    def read(self) -> None:
        """A guarded read at whoever believes to lead must see everything acknowledged before."""
        for member in self.members.values():
            core = member.core
            if core is None:
                continue
            before = set(self.acked)

            def done(
                error: Exception | None, member: Member = member, before: set[bytes] = before
            ) -> None:
                if error is None:
                    self.reads += 1
                    missing = before - set(member.applied)
                    assert not missing, f"stale read on {member.name}: {missing}"
                else:
                    assert isinstance(error, NotLeader)

            core.read_index(done)

    # --- what must hold

    def _check_leader(self, name: str, core: SafeSyncObj) -> None:
        if core.state == LEADER:
            known = self.leaders.setdefault(core.term, name)
            assert known == name, f"two leaders in term {core.term}: {known} and {name}"

    def check_applied(self, index: int, term: int, data: bytes) -> None:
        """State-machine safety: one entry an index, whoever applies it, whenever."""
        known = self.log.setdefault(index, (term, data))
        assert known == (term, data), f"entry {index}: {known} and {(term, data)}"

    def check_end(self) -> None:
        """After mending: all agree, nothing acknowledged is missing, nothing happened twice."""
        states = [m.applied for m in self.members.values()]
        assert states[0] == states[1] == states[2], "the nodes do not agree"
        assert len(set(states[0])) == len(states[0]), "a command was applied twice"
        missing = self.acked - set(states[0])
        assert not missing, f"acknowledged and lost: {sorted(missing)[:5]}"


def story(seed: int, faults: int = 25) -> World:
    """One run: faults and load, then mending and the final checks."""
    world = World(seed)
    world.run(1.5)
    for _ in range(faults):
        for _ in range(world.chance.randrange(1, 12)):
            world.propose()
            world.read()
            world.run(world.chance.uniform(0.01, 0.15))
        world.fault()
    world.mend()
    world.run(4.0)
    world.propose()
    world.run(1.0)
    world.check_end()
    return world
