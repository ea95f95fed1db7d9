"""A simulated machine: its disks, and while it runs, the real master (or learner) on it."""

import asyncio
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raftfs.conf import exports
from raftfs.errors import UserError
from raftfs.meta.healer import HealingConfig
from raftfs.meta.master import Master, MasterConfig
from raftfs.meta.raft.checkpoints import CheckpointLimits
from raftfs.meta.raft.journal import DurableJournal, JournalError
from raftfs.meta.raft.links import Links
from raftfs.meta.raft.replica import Replica, ReplicaConfig
from raftfs.meta.raft.surroundings import Surroundings
from raftfs.meta.state.apply import Applied
from raftfs.meta.store import MetaStore
from tests.sim.broken import must
from tests.sim.clock import Killed, Process
from tests.sim.disk import Disk
from tests.sim.net import machine_of

if TYPE_CHECKING:
    from tests.sim.invariants import Invariants
    from tests.sim.world import World

SEGMENT = 6_000
_CHECKPOINTS = CheckpointLimits(
    rows=25, every_s=1.0, quiet_s=0.4, tail_entries=10, tail_bytes=2_000, kept_bytes=4 * SEGMENT
)
_HEALING = HealingConfig(
    start_delay_s=0.5, endangered_delay_s=0.4, disconnect_delay_s=1.0, orphan_delay_s=3.0,
    sweep_every_s=2.0,
)  # fmt: skip


class ObservedStore(MetaStore):
    """Shows the invariants what is applied, and every checkpoint."""

    def __init__(self, path: Path, law: "Invariants", who: str) -> None:
        self._law, self._who = law, who
        self.rotten = False  # a bit of a row was flipped: it may differ until that is noticed
        super().__init__(path, cache_rows=40)

    def apply_entry(self, index: int, term: int, data: bytes) -> list[Applied]:
        """As `MetaStore.apply_entry`."""
        applied = super().apply_entry(index, term, data)
        if not self.rotten:
            self._law.applied(self._who, index, term, data, applied)
        return applied

    def thaw(self) -> None:
        """As `MetaStore.thaw`."""
        super().thaw()
        if not self.rotten:
            self._law.checkpoint(self._who, *self.digests[-1])

    def install(self, path: Path) -> None:
        """As `MetaStore.install`."""
        super().install(path)
        self.rotten = False
        self._law.installed(self._who, *self.digests[-1])


class SimSyncer:
    """As `Syncer`, without a thread: a sync ends at a later moment that the seed decides."""

    def __init__(
        self, longest: Callable[[], float], chance: random.Random, journal: DurableJournal,
        done: Callable[[BaseException | None], None],
    ) -> None:  # fmt: skip
        self._longest, self._chance, self._journal, self._done = longest, chance, journal, done
        self._busy = False

    def kick(self) -> bool:
        """Sync what is pending, unless a sync is under way."""
        if self._busy or not self._journal.take():
            return False
        self._busy = True
        delay = self._chance.uniform(0.0005, self._longest())
        asyncio.get_running_loop().call_later(delay, self._write)
        return True

    def _write(self) -> None:
        error: BaseException | None = None
        try:
            self._journal.write_taken()
        except Exception as e:
            error = e
        self._busy = False
        self._done(error)

    def stop(self) -> None:
        """Nothing runs."""


class Machine:
    """By one name; it may lose its disks and come back as another identity."""

    def __init__(self, world: "World", name: str, *, learner: bool = False) -> None:
        self.world, self.name, self.learner = world, name, learner
        self.chance = random.Random(f"{world.seed}/{name}")
        self.folder = world.folder / name.replace(":", "_")
        self.process: Process | None = None
        self.replica: Replica | None = None
        self.master: Master | None = None
        self._state: ObservedStore | None = None
        self._stop = asyncio.Event()
        self.clock_offset_ns = 0
        self.slow_until = 0.0
        self.flipped = self.refused = False  # damaged by us; must not start again
        self.rotten = False  # of that, a row of the state
        self.forgetful = False  # started without its disk, as if it had lost nothing
        self.uuid: bytes | None = None
        self._identities = 0
        self.peers = world.voters
        self.new_disk(join=False)

    def new_disk(self, *, join: bool) -> None:
        """Everything is lost, also who this was."""
        self._identities += 1
        self.ident = f"{self.name}/{self._identities}"  # name and which disk
        self.join = join
        self.disk = Disk(self.chance)
        self.flipped = self.refused = self.forgetful = self.rotten = False
        self.uuid = None
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    @property
    def host(self) -> str:
        """Its name in the network."""
        return machine_of(self.name)

    @property
    def running(self) -> bool:
        """Its process lives, paused or not."""
        return self.process is not None and self.process.alive

    # --- life

    def start(self) -> None:
        """Start the process."""
        self.process = Process(self.ident, self.host, self.chance, self._look)
        self.disk.repair()
        loop = self.world.loop
        loop.call_soon(lambda: loop.create_task(self._live()), context=self.process.here)

    async def _live(self) -> None:
        try:
            await self._run()
        except JournalError:
            self.world.seen["disk stops a node"] += 1
            self.die(power=False)
        except UserError as e:
            self._refused(str(e))
        except Exception as e:
            self.world.fail(e)

    async def _run(self) -> None:
        store = self._state = ObservedStore(
            self.folder / "state.mdb", self.world.law, self.ident
        )
        store.rotten = self.rotten
        members = store.members()
        peers = tuple(sorted({*members, *self._itself()})) if members else self.peers
        self._stop = asyncio.Event()
        if self.learner:
            await self._learn(store, peers)
        else:
            await self._serve(store, peers)

    async def _learn(self, store: ObservedStore, peers: tuple[str, ...]) -> None:
        config = ReplicaConfig(
            self.name, peers, self.folder, learner=True, checkpoints=_CHECKPOINTS
        )
        self.replica = Replica(config, store, None, self._surroundings())  # type: ignore[arg-type]
        await self.replica.start()
        await self.replica.failed

    async def _serve(self, store: ObservedStore, peers: tuple[str, ...]) -> None:
        config = MasterConfig(
            self.name, peers, self.folder, join=self.join, healing=_HEALING,
            export_lines=tuple(exports.default_lines()), checkpoints=_CHECKPOINTS,
        )  # fmt: skip
        self.master = Master(config, None, store, self._surroundings())  # type: ignore[arg-type]
        self.replica = self.master.replica
        await self.master.run(self._stop)
        self.world.seen["orderly stop"] += 1
        self.die(power=False)

    def _surroundings(self) -> Surroundings:
        return Surroundings(
            links=partial(Links, wire=self.world.net),
            syncer=partial(SimSyncer, self._longest_sync, self.chance),
            files=self.disk, segment_bytes=SEGMENT, wall_ns=self._wall_ns,
            new_uuid=self._new_uuid,
        )  # fmt: skip

    def _itself(self) -> set[str]:
        return set() if self.learner else {self.name}

    def _new_uuid(self) -> bytes:
        """The first is this replica's own."""
        uuid = self.chance.randbytes(16)
        if self.uuid is None:
            self.uuid = uuid
        return uuid

    def _wall_ns(self) -> int:
        return int(self.world.loop.now * 1e9) + self.clock_offset_ns

    def _longest_sync(self) -> float:
        return 0.6 if self.slow_until > self.world.loop.now else self.world.sync_s

    def _refused(self, reason: str) -> None:
        """It must not run: the disk lied, or the cluster wants it no more."""
        if "was removed from the cluster" in reason:
            kind = "removed"
            right = self.world.members().get(self.name) != self.uuid
            must(right, f"{self.ident} is told that it was removed, and it is a master")
        elif self.forgetful and "lost its data" in reason:
            kind = "identity refused"
        elif self.rotten and ("damaged" in reason or "differs" in reason):
            kind = "rot noticed"
        elif self.flipped and ("damaged" in reason or "replace" in reason):
            kind = "damage refused"
        else:
            self.world.fail(UserError(f"{self.ident} refuses without a cause: {reason}"))
            return
        self.world.seen[kind] += 1
        self.refused = True
        self.die(power=False)

    def die(self, *, power: bool) -> None:
        """kill -9, or a power cut."""
        if self.process is None or not self.process.alive:
            return
        self.process.alive = False
        self.replica = self.master = None
        if self._state is not None:
            self._state.close()  # what is in the file is all there; LMDB opens a file only once
            self._state = None
        self.world.net.gone(self.process, power=power)
        if power:
            self.world.seen["torn sector"] += self.disk.power_cut()
        else:
            self.disk.killed()

    def stop(self) -> bool:
        """As SIGTERM does. False if it does not run."""
        if self.process is None or not self.process.alive or self.learner:
            return False
        self.world.loop.call_soon(self._stop.set, context=self.process.here)
        return True

    def strike(self, *, power: bool) -> None:
        """Die now, in the middle of what is being done."""
        self.die(power=power)
        raise Killed

    def _look(self) -> None:
        replica = self.replica
        if replica is not None and replica._core is not None:
            self.world.law.look(self.ident, replica._core)

    # --- what clients and the story may do

    @property
    def leads(self) -> bool:
        """Thinks so."""
        return self.running and self.replica is not None and self.replica.is_leader

    @property
    def store(self) -> Any:
        """The state, while it runs."""
        return None if self.replica is None else self.replica.machine

    def joined_uuid(self) -> bytes | None:
        """Of a running replica that wants to vote."""
        identity = getattr(self.replica, "_identity", None)
        return None if identity is None or identity.voter else identity.uuid
