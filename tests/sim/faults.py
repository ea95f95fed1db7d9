"""What goes wrong, one thing at a time, as the seed says. Each kind is counted when it happens."""

import asyncio
import errno
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from raftfs.errors import NotLeader, OutcomeUnknown, RaftfsError
from raftfs.meta.membership import Membership
from tests.sim.clock import Process
from tests.sim.node import Machine
from tests.sim.rot import flip_row

if TYPE_CHECKING:
    from tests.sim.world import World

KINDS = (
    "kill", "kill in a write", "power cut", "power cut in a write", "power cut of all",
    "orderly stop asked", "pause", "everybody suspended", "clock jump", "partition",
    "one-way partition", "leader deposed", "slow network", "connection broken", "slow disk",
    "disk full", "I/O error",
    "journal flip", "state flip", "snapshot flip", "disk lost", "disk lost unnoticed", "join",
    "administration asked", "leadership handed over", "chunkserver kill", "chunkserver power cut",
    "chunkserver pause", "chunkserver partition", "chunkserver full", "chunkserver replaced",
    "client partition", "client pause",
)  # fmt: skip
EFFECTS = (
    "disk stops a node", "damage refused", "rot noticed", "identity refused", "torn sector",
    "duplicated message",
    "member added", "member removed", "removed", "orderly stop", "write acknowledged", "fsync",
    "write committed", "write given up", "content read", "unsynced write lost", "copy replicated",
    "copy destroyed", "version raised", "old term refused",
)  # fmt: skip


_FREQUENT = (0.2, 1.0, 1.0, 4.0)


class Faults:
    """Chooses and does."""

    def __init__(self, world: "World") -> None:
        self.world, self.chance = world, world.chance
        self._kinds: list[tuple[int, Callable[[Machine], str]]] = [
            (22, self._start), (12, self._kill), (8, self._in_a_write), (6, self._kill_all),
            (14, self._partition), (32, self._heal), (5, self._slow_network), (8, self._break),
            (8, self._pause), (4, self._clock), (4, self._suspend), (5, self._slow_disk),
            (5, self._failing_disk), (5, self._flip_journal), (4, self._flip_state),
            (6, self._flip_snapshot),
            (5, self._lose_disk), (12, self._membership), (4, self._hand_over), (4, self._stop),
            (10, self._kill_server), (5, self._pause_server), (6, self._cut_server),
            (3, self._fill_server), (3, self._replace_server), (5, self._cut_client),
            (3, self._pause_client), (6, self._depose),
        ]  # fmt: skip
        # Every story has its own mixture: what happens seldom in one is frequent in another.
        mending = (self._start, self._heal)
        self._weights = [
            weight if kind in mending else weight * self.chance.choice(_FREQUENT)
            for weight, kind in self._kinds
        ]

    def one(self) -> None:
        """One thing goes wrong, or is mended."""
        machine = self.chance.choice(self.world.masters + self.world.masters + self.world.learners)
        kind = self.chance.choices([kind for _, kind in self._kinds], self._weights)[0]
        happened = kind(machine)
        if happened:
            self.world.seen[happened] += 1

    # --- processes

    def _start(self, machine: Machine) -> str:
        self.world.revive()
        return ""

    def _stop(self, machine: Machine) -> str:
        return "orderly stop asked" if machine.stop() else ""

    def _kill(self, machine: Machine) -> str:
        power = self.chance.random() < 0.5
        if not machine.running:
            return ""
        machine.die(power=power)
        return "power cut" if power else "kill"

    def _in_a_write(self, machine: Machine) -> str:
        if not machine.running:
            return ""
        power = self.chance.random() < 0.7
        kind = "power cut in a write" if power else "kill in a write"

        def strike() -> None:
            self.world.seen[kind] += 1
            machine.strike(power=power)

        machine.disk.strike_after(self.chance.randrange(1, 8), strike)
        return ""

    def _kill_all(self, machine: Machine) -> str:
        running = [m for m in self.world.machines if m.running]
        for one in running:
            one.die(power=True)
        for one in running:
            self.world.bring_back(one)
        return "power cut of all"

    def _pause(self, machine: Machine) -> str:
        return "pause" if self._paused(machine.process) else ""

    def _paused(self, process: Process | None) -> bool:
        if process is None or not process.alive or process.paused:
            return False
        process.paused = True
        self.world.loop.call_later(
            self.chance.uniform(0.2, 1.8), self.world.loop.resume, process,
            context=self.world.outside,
        )  # fmt: skip
        return True

    def _suspend(self, machine: Machine) -> str:
        self.world.loop.now += self.chance.uniform(0.3, 2.0)
        return "everybody suspended"

    def _clock(self, machine: Machine) -> str:
        machine.clock_offset_ns = self.chance.randrange(-(10**13), 10**13)
        return "clock jump"

    # --- network

    def _partition(self, machine: Machine) -> str:
        """From the other masters; from chunkservers and clients as well, or not."""
        everybody = [m.host for m in self.world.machines]
        if self.chance.random() < 0.5:
            everybody += [s.host for s in self.world.chunkservers]
            everybody += [c.name for c in self.world.clients]
        return f"{self._cut_off(machine.host, everybody)}partition"

    def _cut_off(self, me: str, others: list[str]) -> str:
        """Both ways, or (said so) only what goes out or only what comes in."""
        way = self.chance.choice(("both", "both", "out", "in"))
        for name in others:
            if name != me and way != "in":
                self.world.net.cut.add((me, name))
            if name != me and way != "out":
                self.world.net.cut.add((name, me))
        return "" if way == "both" else "one-way "

    def _depose(self, machine: Machine) -> str:
        """Whoever leads is cut off from the other masters, with a client; its orders are held up
        until another one may lead.
        """
        leader = next((m for m in self.world.masters if m.leads), None)
        if leader is None:
            return ""
        orders = {(leader.host, s.host) for s in self.world.chunkservers}
        client = self.chance.choice(self.world.clients).name
        for other in [m.host for m in self.world.masters if m is not leader]:
            self.world.net.cut |= {(leader.host, other), (other, leader.host)}
            self.world.net.cut |= {(client, other), (other, client)}
        self.world.net.cut |= orders
        self.world.loop.call_later(
            self.chance.uniform(0.7, 1.5), self.world.net.mend, orders, context=self.world.outside
        )
        return "leader deposed"

    def _heal(self, machine: Machine) -> str:
        self.world.net.heal()
        self.world.net.slowest_s = 0.01
        return ""

    def _slow_network(self, machine: Machine) -> str:
        self.world.net.slowest_s = self.chance.uniform(0.03, 0.25)
        return "slow network"

    def _break(self, machine: Machine) -> str:
        return "connection broken" if self.world.net.break_one(self.chance) else ""

    # --- chunkservers and clients

    def _kill_server(self, machine: Machine) -> str:
        server = self.chance.choice(self.world.chunkservers)
        power = self.chance.random() < 0.5
        if not server.running:
            server.start()
            return ""
        server.die(power=power)
        return "chunkserver power cut" if power else "chunkserver kill"

    def _pause_server(self, machine: Machine) -> str:
        server = self.chance.choice(self.world.chunkservers)
        return "chunkserver pause" if self._paused(server.process) else ""

    def _cut_server(self, machine: Machine) -> str:
        """From all, or only from one master, which may be the one that leads."""
        server = self.chance.choice(self.world.chunkservers)
        everybody = [m.host for m in self.world.machines]
        if self.chance.random() < 0.5:
            everybody = [machine.host]
        else:
            everybody += [c.name for c in self.world.clients]
        self._cut_off(server.host, everybody)
        return "chunkserver partition"

    def _fill_server(self, machine: Machine) -> str:
        disk = self.chance.choice(self.world.chunkservers).disk
        disk.full = not disk.full
        return "chunkserver full" if disk.full else ""

    def _replace_server(self, machine: Machine) -> str:
        """An administrator takes one away for good that nothing depends on."""
        server = self.chance.choice(self.world.chunkservers)
        if not self.world.may_replace(server):
            return ""
        server.die(power=True)
        server.new_disk()
        server.start()
        return "chunkserver replaced"

    def _cut_client(self, machine: Machine) -> str:
        everybody = [m.host for m in self.world.machines]
        if self.chance.random() < 0.5:
            everybody = [s.host for s in self.world.chunkservers]
        self._cut_off(self.chance.choice(self.world.clients).name, everybody)
        return "client partition"

    def _pause_client(self, machine: Machine) -> str:
        client = self.chance.choice(self.world.clients)
        return "client pause" if self._paused(client.process) else ""

    # --- disks

    def _slow_disk(self, machine: Machine) -> str:
        machine.slow_until = self.world.loop.now + self.chance.uniform(0.5, 2.0)
        return "slow disk"

    def _failing_disk(self, machine: Machine) -> str:
        code = self.chance.choice((errno.ENOSPC, errno.EIO))
        kind = "disk full" if code == errno.ENOSPC else "I/O error"

        def strike() -> None:
            self.world.seen[kind] += 1
            raise OSError(code, kind)

        machine.disk.strike_after(self.chance.randrange(1, 6), strike)
        return ""

    def _flip_journal(self, machine: Machine) -> str:
        """While it is down, so that its next start meets it."""
        if not self.world.may_lose(machine):
            return ""
        machine.die(power=False)
        if not machine.disk.flip():
            return ""
        machine.flipped = True
        machine.start()
        return "journal flip"

    def _flip_state(self, machine: Machine) -> str:
        """While it is down. What it says from then on counts for nothing; it has to notice."""
        if not self.world.may_lose(machine):
            return ""
        machine.die(power=False)
        if not flip_row(machine.folder / "state.mdb", self.chance):
            return ""
        machine.flipped = machine.rotten = True
        machine.start()
        return "state flip"

    def _flip_snapshot(self, machine: Machine) -> str:
        self.world.loop.create_task(self._flip_when_there(), context=self.world.outside.copy())
        return ""

    async def _flip_when_there(self) -> None:
        """In a file that is being sent or received; what carries it has checksums."""
        for _ in range(200):
            for machine in self.world.machines:
                sent = sorted(machine.folder.glob("snapshot-*.out"))
                for path in [*sent, machine.folder / "snapshot.in"]:
                    data = bytearray(path.read_bytes() if path.exists() else b"")
                    if data:
                        data[self.chance.randrange(len(data))] ^= 1 << self.chance.randrange(8)
                        path.write_bytes(data)
                        self.world.seen["snapshot flip"] += 1
                        return
            await asyncio.sleep(0.01)

    def _lose_disk(self, machine: Machine) -> str:
        """As an administrator would have it: one at a time, while the others are a majority."""
        if not self.world.may_lose(machine):
            return ""
        machine.die(power=False)
        unnoticed = self.chance.random() < 0.4  # started as if nothing had happened: refused
        machine.new_disk(join=not unnoticed)
        machine.peers = tuple(sorted(self.world.members()))
        machine.forgetful = unnoticed
        machine.start()
        return "disk lost unnoticed" if unnoticed else "disk lost"

    # --- membership

    def _membership(self, machine: Machine) -> str:
        members = self.world.members()
        waiting = [
            m.name for m in self.world.masters
            if m.name not in members and m.running and m.joined_uuid()
        ]  # fmt: skip
        spare = [m for m in self.world.masters if m.name not in members and not m.running]
        if waiting:
            self._ask_leader("member added", lambda m: m.add(waiting[0]))
        elif spare and len(members) < 5 and self.chance.random() < 0.7:
            if not self.world.members_settled():
                return ""
            spare[0].new_disk(join=True)
            spare[0].peers = (*sorted(members), spare[0].name)
            spare[0].start()
            return "join"
        elif len(members) > 3 and machine.name in members:
            self._ask_leader("member removed", lambda m: m.remove(machine.name))
        return ""

    def _hand_over(self, machine: Machine) -> str:
        to = machine.name if self.chance.random() < 0.5 else ""
        self._ask_leader("leadership handed over", lambda m: m.transfer(to))
        return ""

    def _ask_leader(self, done: str, ask: Callable[[Membership], Awaitable[str]]) -> None:
        """Whoever leads is asked, as `raftfs member` and `raftfs leader` do."""
        for leader in [m for m in self.world.masters if m.leads and m.master is not None]:
            assert leader.process is not None and leader.master is not None
            self.world.seen["administration asked"] += 1
            work = self._administer(done, ask(leader.master.service._membership))
            self.world.loop.create_task(work, context=leader.process.here.copy())

    async def _administer(self, done: str, work: Awaitable[str]) -> None:
        with suppress(NotLeader, OutcomeUnknown, RaftfsError):
            await work
            self.world.seen[done] += 1
