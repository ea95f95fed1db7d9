"""A whole cluster in one process under virtual time: three to five masters with the real replica,
proposer and operations, a learner, clients; and what goes wrong.
"""

import asyncio
import logging
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import structlog
from pysyncobj import syncobj

from raftfs.chunk import masterlink
from raftfs.meta import master, service
from raftfs.meta.raft import replica
from raftfs.meta.raft.journal import DurableJournal
from raftfs.meta.state import read
from raftfs.meta.tickets import Tickets
from tests.sim import chunkserver, stories_data
from tests.sim.broken import must
from tests.sim.chunkserver import ChunkMachine
from tests.sim.clients import Client
from tests.sim.clock import BEGINNING, PROCESS, VirtualLoop
from tests.sim.copies import good
from tests.sim.faults import Faults
from tests.sim.invariants import Invariants
from tests.sim.net import Network
from tests.sim.node import Machine
from tests.sim.promises import Promises
from tests.sim.stories_raft import FAULTS, RaftStories

NAMES = ("a:1", "b:1", "c:1", "d:1", "e:1")
CLIENTS = 3
SERVERS = 4
_FAULTS = (8, 12, 16)  # in a story
_TICK_S = 0.025  # a quarter of a replica's idle turns would do nothing but take our time
_GRACE_S = 3.0  # until a vanished client's locks fall
_SETTLE_S = 120.0


class World:
    """Everything that one seed makes."""

    def __init__(self, seed: int, folder: Path, loop: VirtualLoop) -> None:
        self.seed, self.folder, self.loop = seed, folder, loop
        self.chance = random.Random(seed)
        self.outside = copy_context()
        self.law = Invariants()
        self.seen: Counter[str] = Counter()
        self.net = Network(loop, seed, lambda p, term, to: self.law.voted(p.name, term, to))
        self.net.seen = self.seen
        self.ended = False
        self.hurried = False  # clients do nothing but make and remove names
        self.writes = 0  # numbers what clients write
        self.sync_s = self.chance.choice((0.005, 0.02, 0.1))  # the longest usual sync of a disk
        self.voters = NAMES if self.chance.random() < 0.2 else NAMES[:3]
        self.masters = [Machine(self, name) for name in NAMES]
        self.learners = [Machine(self, "watcher", learner=True)]
        self.machines = [*self.masters, *self.learners]
        self.chunkservers = [ChunkMachine(self, n) for n in range(SERVERS)]
        self.promises = Promises(self.law.truth, lambda: [s.disk for s in self.chunkservers])
        self.promises.seen = self.seen
        self.law.on_commit.append(self.promises.applied)
        self.clients = [Client(self, n) for n in range(CLIENTS)]

    def fail(self, error: BaseException) -> None:
        """The story ends here."""
        if self.loop.error is None:
            self.loop.error = error

    def note(self, kind: str, happened: bool) -> None:
        """Count it if it happened."""
        self.seen[kind] += happened

    # --- what an administrator knows

    def members(self) -> dict[str, bytes]:
        """The masters that vote."""
        return read.members(self.law.truth)

    def hosts(self) -> list[str]:
        """Where the masters were in the beginning; who is set up thus learns of others."""
        return [name.partition(":")[0] for name in self.voters]

    def members_settled(self) -> bool:
        """Whether a majority has it in a checkpoint who votes: until then those that are up may
        need one that was removed, to learn that it was.
        """
        members, since = self.members(), self.law.members_since
        there = [
            m for m in self.masters
            if m.name in members and m.uuid == members[m.name]
            and m.store and m.store.checkpointed[0] >= since
        ]  # fmt: skip
        return 2 * len(there) > len(members)

    def may_lose(self, machine: Machine) -> bool:
        """Whether a voter's disk may go: all other voters are themselves, and run."""
        members = self.members()
        ours = machine.name in members and machine.uuid == members[machine.name]
        if not ours or not self.members_settled():
            return False
        others = [m for m in self.masters if m.name in members and m is not machine]
        return all(m.running and m.uuid == members[m.name] and not m.flipped for m in others)

    def may_replace(self, server: ChunkMachine, *, unless: int = 0) -> bool:
        """Whether a chunkserver may go for good: every copy that it has (`unless` of that chunk) is
        elsewhere, too, and will stay there. (With goal 1 the leader may just be giving up the other
        one for this one.)
        """
        others = [s.disk for s in self.chunkservers if s is not server and s.running]
        for chunk in server.disk.copies:
            row = read.chunk(self.law.truth, chunk)
            if row is not None and row.refs and chunk != unless:
                copies = [(d.server, d.copies[chunk]) for d in others if chunk in d.copies]
                if row.goal < 2 or not good(copies, row.version, row.reserved):
                    return False
        return True

    def bring_back(self, machine: Machine) -> None:
        """Start what is down; what must not start again is replaced if it is still a master."""
        if machine.running or machine.uuid is None:
            return
        if not machine.refused:
            machine.start()
        elif machine.name in self.members():
            machine.new_disk(join=True)
            machine.peers = tuple(sorted(self.members()))
            machine.start()

    # --- the story

    async def tell(self) -> None:
        """Found the cluster, break things under load, mend, compare."""
        for machine in self.masters:
            if machine.name in self.voters:
                machine.start()
        for one in [*self.learners, *self.chunkservers]:
            one.start()
        while not self.members():
            await asyncio.sleep(0.1)
        work = [client.start() for client in self.clients]
        chooser = Faults(self)
        faults = self.chance.choice(_FAULTS)
        if await stories_data.play(self):
            faults //= 4  # so that a seed with a story takes about as long as any other
        else:
            faults -= FAULTS * await RaftStories(self).tell()
        for _ in range(faults):
            await asyncio.sleep(self.chance.uniform(0.03, 0.7))
            chooser.one()
        self.mend()
        await asyncio.sleep(0.5)
        self.ended = True
        await self._until(lambda: all(w.done() for w in work), "a client waits in vain")
        await self._until(self._agreed, "no agreement")
        must(not any(m.store.rotten for m in self._voting()), "a rotten row was not noticed")
        await self._until(lambda: not self._lacking(), "goals are not met")
        self.promises.check_all()

    def mend(self) -> None:
        """Nothing is wrong any more."""
        self.net.heal()
        self.net.slowest_s = 0.01
        for machine in self.machines:
            machine.disk.repair()
            machine.slow_until = 0.0
        for server in self.chunkservers:
            server.disk.full = False
        self.revive()

    def revive(self) -> None:
        """Start everything that is down."""
        for machine in self.machines:
            self.bring_back(machine)
        for server in self.chunkservers:
            if not server.running:
                server.start()

    async def _until(self, true: Callable[[], bool], otherwise: str) -> None:
        """With everything mended, all becomes good in time."""
        until = self.loop.now + _SETTLE_S
        while not true():
            must(self.loop.now < until, f"{otherwise}: {self._where()}; {self._lacking()}")
            self.revive()
            await asyncio.sleep(0.3)

    def _lacking(self) -> list[str]:
        """Chunks that do not have exactly the copies that their goals ask for."""
        found = []
        for row in read.chunks(self.law.truth, 0, 10_000):
            copies = [(s.host, s.disk.copies[row.id]) for s in self.chunkservers
                      if row.id in s.disk.copies]  # fmt: skip
            right = [host for host, copy in copies if copy.version == row.version]
            wanted = min(row.goal, SERVERS) if row.refs else 0
            if not copies and row.refs and not self.promises.synced.get(row.id):
                continue  # a power cut took what nobody had synced
            if len(right) != wanted or len(copies) != wanted:
                has = ", ".join(f"{h}@{c.version}" for h, c in copies)
                found.append(f"chunk {row.id}@{row.version} goal {wanted}: {has}")
        return found

    def _voting(self) -> list[Machine]:
        members = self.members()
        return [m for m in self.masters if m.name in members]

    def _agreed(self) -> bool:
        """All replicas have come to the same state, which has everything acknowledged."""
        members = self.members()
        voting = self._voting()
        if not all(m.running and m.store and m.uuid == members[m.name] for m in voting):
            return False
        stores = [m.store for m in [*voting, *self.learners] if m.store is not None]
        return (
            len(stores) == len(voting) + 1
            and len({s.applied for s in stores}) == 1
            and stores[0].applied[0] >= self.law.acknowledged
            and len({s.digest() for s in stores}) == 1
            and any(m.leads for m in voting)
        )

    def _where(self) -> str:
        return ", ".join(
            f"{m.ident} {m.store.applied if m.store else 'down'}" for m in self.machines
        )

    @property
    def acked(self) -> int:
        """Operations that clients were told of."""
        return sum(c.acked for c in self.clients)

    @property
    def reads(self) -> int:
        """Guarded reads that were answered."""
        return sum(c.reads for c in self.clients)

    @property
    def virtual_s(self) -> float:
        """How long it was for those inside."""
        return self.loop.now - BEGINNING

    @property
    def fingerprint(self) -> str:
        """Equal for equal stories: every message at its time."""
        return f"{self.net.trace:08x}/{self.loop.events}/{self.loop.now:.6f}"


@contextmanager
def _observed(world: World) -> Iterator[None]:
    """Virtual clock and seeded chance for everything; what a journal takes is compared."""
    add = DurableJournal.add

    def compared(self: DurableJournal, command: bytes, idx: int, term: int) -> None:
        if idx - 1 >= self.first_index > 0:
            world.law.added(idx, term, self.term_at(idx - 1), command)
        add(self, command, idx, term)

    def signing(key: None, cluster: Callable[[], bytes], lifetime_s: float) -> Tickets:
        return Tickets(chunkserver.TICKETS_KEY, cluster, lifetime_s)

    chance, drawn = random.Random(world.seed + 1), random.getstate()
    random.seed(world.seed)
    try:
        with (
            patch.object(syncobj, "monotonicTime", world.loop.monotonic),
            patch.object(syncobj, "random", chance),
            patch.object(time, "monotonic", world.loop.monotonic),
            patch.object(os, "urandom", chance.randbytes),
            patch.object(masterlink, "fetch", chunkserver.fetch),
            patch.object(masterlink, "discard", lambda store, fetched: None),
            patch.object(replica, "_TICK_S", _TICK_S),
            patch.object(master, "Tickets", signing),
            patch.object(service, "WRITE_LOCK_GRACE_S", _GRACE_S),
            patch.object(DurableJournal, "add", compared),
        ):
            yield
    finally:
        random.setstate(drawn)


def story(seed: int, *, log: bool = False) -> World:
    """One run. Raises whatever was found."""
    loop = VirtualLoop()
    _log(loop if log else None)
    folder = Path(tempfile.mkdtemp(prefix="raftfs-sim-", dir=_memory()))
    try:
        world = World(seed, folder, loop)
        with _observed(world):
            _run(loop, world)
        return world
    finally:
        loop.bury()
        logging.disable(logging.NOTSET)
        structlog.reset_defaults()
        shutil.rmtree(folder, ignore_errors=True)


def _run(loop: VirtualLoop, world: World) -> None:
    try:
        loop.run_until_complete(world.tell())
    except RuntimeError:
        if loop.error is None:
            raise
    if loop.error is not None:
        raise loop.error


def _log(loop: VirtualLoop | None) -> None:
    """What nodes log goes nowhere, or is printed with the virtual time and whose it is."""

    def stamp(logger: Any, method: str, event: dict[str, Any]) -> dict[str, Any]:
        process = PROCESS.get()
        assert loop is not None
        return {"at": f"{loop.now:.4f}", "who": process and process.name, **event}

    level = logging.CRITICAL if loop is None else logging.INFO
    logging.disable(logging.CRITICAL)
    structlog.configure(
        processors=[stamp, structlog.processors.KeyValueRenderer(["at", "who", "event"])],
        wrapper_class=structlog.make_filtering_bound_logger(level),
    )


def _memory() -> str | None:
    """Small files that nobody needs: not worth a disk."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None
