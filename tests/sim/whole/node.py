"""A simulated machine: its disks, and while it runs, the real replica and proposer on it."""

import asyncio
import random
import shutil
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from raftfs.errors import UserError
from raftfs.meta.proposer import Proposer
from raftfs.meta.raft.checkpoints import CheckpointLimits
from raftfs.meta.raft.journal import DurableJournal, JournalError
from raftfs.meta.raft.links import Links
from raftfs.meta.raft.replica import Replica, ReplicaConfig
from raftfs.meta.raft.surroundings import Surroundings
from tests.sim.whole.clock import THREAD_S, Killed, Process
from tests.sim.whole.disk import Disk
from tests.sim.whole.store import SimStore, Vault

if TYPE_CHECKING:
    from tests.sim.whole.world import World

SEGMENT = 6_000


class SimSyncer:
    """As `Syncer`, without a thread: a sync ends at a later moment that the seed decides."""

    def __init__(
        self, longest: Callable[[], float], chance: random.Random, journal: DurableJournal,
        done: Callable[[BaseException | None], None],
    ) -> None:  # fmt: skip
        self._longest, self._chance, self._journal, self._done = longest, chance, journal, done
        self._busy = False

    def kick(self) -> None:
        """Sync what is pending, unless a sync is under way."""
        if not self._busy and self._journal.take():
            self._busy = True
            delay = self._chance.uniform(0.0005, self._longest())
            asyncio.get_running_loop().call_later(delay, self._write)

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
        self.proposer: Proposer | None = None
        self.clock_offset_ns = 0
        self.slow_until = 0.0
        self.flipped = False
        self.refused = False  # must not start again
        self.uuid: bytes | None = None
        self._identities = 0
        self.peers = world.voters
        self.new_disk(join=False)

    def new_disk(self, *, join: bool) -> None:
        """Everything is lost, also who this was."""
        self._identities += 1
        self.join = join
        self.disk, self.vault = Disk(self.chance), Vault()
        self.flipped = self.refused = False
        self.uuid = None
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    @property
    def ident(self) -> str:
        """Name and which disk."""
        return f"{self.name}/{self._identities}"

    @property
    def running(self) -> bool:
        """Its process lives, paused or not."""
        return self.process is not None and self.process.alive

    # --- life

    def start(self) -> None:
        """Start the process."""
        self.process = Process(self.ident, self.chance, self._look)
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
        store = SimStore(self.vault, self.world.law, self.ident)
        members = store.members()
        peers = tuple(sorted({*members, *self._itself()})) if members else self.peers
        config = ReplicaConfig(
            self.name, peers, self.folder, self.learner, self.join,
            CheckpointLimits(rows=25, every_s=1.0, quiet_s=0.4, tail_entries=10, tail_bytes=2_000,
                             kept_bytes=4 * SEGMENT),
        )  # fmt: skip
        replica = Replica(config, store, None, self._surroundings())  # type: ignore[arg-type]
        self.replica, self.proposer = replica, Proposer(replica, self._wall_ns)
        await replica.start()
        await replica.failed

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
        return 0.6 if self.slow_until > self.world.loop.now else THREAD_S

    def _refused(self, reason: str) -> None:
        """It must not run: the disk lied, or the cluster wants it no more."""
        removed = "was removed from the cluster" in reason
        if not removed and not (self.flipped and ("damaged" in reason or "replace" in reason)):
            self.world.fail(UserError(f"{self.ident} refuses without a cause: {reason}"))
        self.world.seen["removed" if removed else "damage refused"] += 1
        self.refused = True
        self.die(power=False)

    def die(self, *, power: bool) -> None:
        """kill -9, or a power cut."""
        if self.process is None or not self.process.alive:
            return
        self.process.alive = False
        self.replica = self.proposer = None
        self.world.net.gone(self.process, power=power)
        if power:
            self.world.seen["torn sector"] += self.disk.power_cut()
        else:
            self.disk.killed()

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
