"""A simulated chunkserver: the real links to the masters over modelled copies, and a data port."""

import asyncio
import random
from typing import TYPE_CHECKING, Any, NamedTuple

from raftfs.chunk.masterlink import MasterLinks
from raftfs.chunk.tickets import TicketGate
from raftfs.errors import LinkError, ReplyError, Status
from raftfs.wire import messages as m
from raftfs.wire import rpc
from raftfs.wire.auth import ClusterKey
from tests.sim.clock import Process
from tests.sim.copies import Copy, CopyDisk, CopyStore

if TYPE_CHECKING:
    from tests.sim.world import World

DATA_PORT = 9
TICKETS_KEY = ClusterKey(b"t" * 32)  # links are not sealed, but tickets are signed


class ObservedLinks(MasterLinks):
    """Tells the promises of which term an order is that takes effect."""

    def __init__(self, world: "World", store: CopyStore, *args: Any) -> None:
        super().__init__(store, *args)  # type: ignore[arg-type]
        self._world, self._copies = world, store

    async def _order(self, link: Any, order: m.ChunkOrder) -> None:
        try:
            await super()._order(link, order)
        except ReplyError as e:
            self._world.seen["old term refused"] += e.status == Status.OLD_TERM
            raise

    async def _new_term(self, term: int) -> None:
        await super()._new_term(term)
        self._world.promises.fenced(self._copies.server, term)

    def _obey(self, order: m.RaiseVersion | m.Destroy) -> None:
        self._copies.acting = order.term
        super()._obey(order)

    async def _replicate(self, order: m.Replicate) -> None:
        self._copies.begun[order.chunk] = _source(self._world, self._copies.host, order)
        await super()._replicate(order)

    def _fetch(self, order: m.Replicate) -> None:
        self._copies.acting = order.term
        super()._fetch(order)


class Fetched(NamedTuple):
    """As the real one: `disk` is the copy itself."""

    disk: Copy
    path: str = ""


class HostedStore(CopyStore):
    """Knows where it is, and which copies are being fetched from where."""

    def __init__(self, host: str, disk: CopyDisk, world: "World") -> None:
        super().__init__(disk, world.promises)
        self.host = host
        self.begun: dict[int, ChunkMachine | None] = {}


def fetch(store: HostedStore, _sources: Any, order: m.Replicate) -> Fetched | None:
    """In the place of the real one: whole and verified, or not at all."""
    known = store.version_of(order.chunk)
    if known is not None and known >= order.version:
        if known == order.version:
            return None
        raise ReplyError(Status.WRONG_VERSION)
    source = store.begun.get(order.chunk)
    if source is None or source.store is None or not source.reachable_from(store.host):
        raise LinkError(f"no answer from {order.host}")
    return Fetched(source.store.twin(order.chunk, order.version))


def _source(world: "World", host: str, order: m.Replicate) -> "ChunkMachine | None":
    there = next(s for s in world.chunkservers if s.host == order.host)
    return there if there.reachable_from(host) else None


class ChunkMachine:
    """One machine; its disk outlives its processes."""

    def __init__(self, world: "World", number: int) -> None:
        self.world, self.host = world, f"s{number}"
        self.name = self.host
        self.chance = random.Random(f"{world.seed}/{self.host}")
        self.new_disk()
        self.process: Process | None = None
        self.store: HostedStore | None = None

    def new_disk(self) -> None:
        """Another server, with nothing on it."""
        self.disk = CopyDisk(self.chance.randbytes(16), self.chance)

    @property
    def running(self) -> bool:
        """Its process lives, paused or not."""
        return self.process is not None and self.process.alive

    def reachable_from(self, host: str) -> bool:
        """Both ways, and it answers."""
        cut = self.world.net.cut
        up = self.process is not None and self.process.alive and not self.process.paused
        return up and (host, self.host) not in cut and (self.host, host) not in cut

    def start(self) -> None:
        """Start the process."""
        self.process = Process(self.host, self.host, self.chance, lambda: None)
        loop = self.world.loop
        loop.call_soon(lambda: loop.create_task(self._live()), context=self.process.here)

    async def _live(self) -> None:
        try:
            store = self.store = HostedStore(self.host, self.disk, self.world)
            masters = [(host, 3) for host in self.world.hosts()]
            gate = TicketGate(TICKETS_KEY, lambda: store.cluster)
            links = ObservedLinks(self.world, store, masters, (self.host, DATA_PORT), None, gate)

            async def handle(link: rpc.Link, ask: m.DataRequest) -> Any:
                gate.check(ask, link.peer[0])
                return await self._data(ask)

            await rpc.serve(self.host, DATA_PORT, incoming=m.DataRequest, handler=handle)
            links.start()
            await links.failed
        except Exception as e:
            self.world.fail(e)

    async def _data(self, ask: m.DataRequest) -> Any:
        """A write, a sync or a read of one copy; `offset` is the write's number."""
        loop, store = asyncio.get_running_loop(), self.store
        assert store is not None
        if isinstance(ask, m.WriteData):
            done = loop.run_in_executor(
                None, store.write, ask.chunk, ask.version, ask.lock, ask.create, ask.offset
            )
        elif isinstance(ask, m.SyncData):
            done = loop.run_in_executor(None, store.sync, ask.chunk, ask.version)
        else:
            assert isinstance(ask, m.ReadData)
            done = loop.run_in_executor(None, store.read, ask.chunk, ask.version)
        return await done

    def die(self, *, power: bool) -> None:
        """kill -9, or a power cut."""
        if self.process is None or not self.process.alive:
            return
        self.process.alive = False
        self.store = None
        self.world.net.gone(self.process, power=power)
        if power:
            self.world.seen["unsynced write lost"] += self.disk.power_cut()
