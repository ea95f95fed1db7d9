"""The links to the masters: reports to all of them, orders from the leader only.

Every master gets the same stream: hello, all copies, ready, then each change and a heartbeat each
second. Links are made again for ever.

Reports are queued in the loop by `call_soon_threadsafe` at the change itself, which is before the
order that made it is answered by the same means: so on each link the report of an order's change
leaves before the answer, and the answer to NewTerm after all that older terms' orders changed.

Tasks: one for each master. Threads: at most ORDER_THREADS for orders that are quick and
FETCH_THREADS for replications.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import structlog

from raftfs import __version__
from raftfs.chunk.fetch import discard, fetch
from raftfs.chunk.store import REPORT_SLICE, ChunkStore
from raftfs.chunk.terms import TermGate
from raftfs.chunk.tickets import TicketGate
from raftfs.client.chunk import ChunkPool
from raftfs.const import HEARTBEAT_S
from raftfs.errors import LinkError, RaftfsError, ReplyError, Status, UserError
from raftfs.wire import messages as m
from raftfs.wire import rpc
from raftfs.wire.auth import ClusterKey
from raftfs.wire.frame import FrameError
from raftfs.wire.rpc import Link, decode

log = structlog.get_logger("raftfs.masterlink")

ORDER_THREADS = 8
FETCH_THREADS = 4
FETCHES_MAX = 64  # more are answered BUSY: the leader asks again, or another server
_CALL_TIMEOUT_S = 5.0
_AGAIN_S = (0.2, 0.4, 0.7, 1.0)  # delays before connecting again
_SPACE_AGE_S = 0.5
MASTERS_MAX = 15  # given ones and those that a master named


class MasterLinks:
    """Keeps a link to every master. Made and used in the event loop."""

    def __init__(
        self,
        store: ChunkStore,
        masters: list[tuple[str, int]],
        announce: tuple[str, int],
        key: ClusterKey,
        tickets: TicketGate,
        disks: Callable[[], list[m.DiskStatus]] = list,
        tune: Callable[[str, str], None] = lambda action, value: None,
    ) -> None:
        """`tune(action, value)`: as in `wire.Tune`; called in a thread."""
        self._disks = disks
        self._tune = tune
        self._store = store
        self._masters = list(masters)
        self._announce = announce
        self._key = key
        self._tickets = tickets
        self._loop = asyncio.get_running_loop()
        self._orders = ThreadPoolExecutor(ORDER_THREADS, thread_name_prefix="order")
        self._fetches = ThreadPoolExecutor(FETCH_THREADS, thread_name_prefix="fetch")
        self._fetching: set[int] = set()
        self._sources = ChunkPool()
        self._gate = TermGate(store.term)
        self._links: dict[Link, None] = {}  # those that have had the full report
        self._pending: dict[Link, list[m.Changed]] = {}  # changes since a full report began
        self._space_at = 0.0
        self._space: m.Space | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._accepted = False  # some master has taken us: we are in the right cluster
        self.failed: asyncio.Future[None] = self._loop.create_future()
        store.report = self._report
        store.report_leaving = self._report_leaving

    def start(self) -> None:
        """Begin to connect."""
        for address in self._masters:
            self._spawn(address)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        """A link's task never ends but by `stop`: anything else is a bug, and must be loud."""
        if not task.cancelled() and (error := task.exception()) and not self.failed.done():
            self.failed.set_exception(error)

    async def stop(self) -> None:
        """Drop all links; quick orders that are under way are carried out, fetches given up."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for link in list(self._links):
            link.close()
        self._sources.close()
        self._gate.shut()  # a fetch that is under way will not count
        self._fetches.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._orders.shutdown, wait=True, cancel_futures=True)

    # --- reports

    def _report(
        self, made: list[m.CopyId], gone: list[m.CopyId], damaged: list[m.Damage]
    ) -> None:
        """Called by any thread, at the change, under the copy's lock."""
        copies = [m.CopyId(d.chunk, d.version) for d in damaged]
        stories = tuple(damaged)
        with suppress(RuntimeError):  # the loop has ended: nobody is told any more
            self._loop.call_soon_threadsafe(self._tell, m.Changed(made, gone, copies, stories))

    def _report_leaving(self, chunks: list[int], leaving: bool) -> None:
        """As `_report`."""
        told, none = tuple(chunks), ()
        change = m.Changed([], [], [], (), *((told, none) if leaving else (none, told)))
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._tell, change)

    def _tell(self, change: m.Changed) -> None:
        for pending in self._pending.values():
            pending.append(change)
        for link in self._links:
            link.notify(change)

    # --- links

    async def _keep(self, host: str, port: int) -> None:
        failures = 0
        while True:
            try:
                link = await rpc.connect(
                    host, port, incoming=m.ChunkOrder, handler=self._order, key=self._key,
                    role="chunkserver", name=self._store.server.hex(),
                )  # fmt: skip
                try:
                    await self._introduce(link)
                    failures = 0
                    await self._heartbeat(link)
                finally:
                    self._links.pop(link, None)
                    self._pending.pop(link, None)
                    link.close()
                log.info("master lost", master=f"{host}:{port}")
            except (LinkError, FrameError) as e:
                log.debug("master not reached", master=f"{host}:{port}", reason=str(e))
            except ReplyError as e:
                self._refused(f"{host}:{port}", e)
            except UserError as e:
                self._foreign(f"{host}:{port}", str(e))
            await asyncio.sleep(_AGAIN_S[min(failures, len(_AGAIN_S) - 1)])
            failures += 1

    def _refused(self, master: str, error: ReplyError) -> None:
        try:
            reason = decode(str, error.value)
        except FrameError:
            reason = str(error)
        if "belong to cluster" in reason:
            self._foreign(master, reason)
        elif "no cluster yet" in reason:
            log.debug("master is being founded", master=master)
        else:
            log.warning("master refuses", master=master, reason=reason)

    def _foreign(self, master: str, reason: str) -> None:
        """A master of another cluster. Fatal unless a master of ours has taken us: one that is set
        up wrongly must not stop a server that works.
        """
        log.error("master of another cluster", master=master, reason=reason)
        if not self._accepted and not self.failed.done():
            self.failed.set_exception(UserError(f"master {master} is of another cluster: {reason}"))

    async def _introduce(self, link: Link) -> None:
        """Hello, every copy, ready; what changes meanwhile follows at the end."""
        store = self._store
        hello = m.ServerHello(
            m.PROTOCOL, __version__, store.server, store.cluster, *self._announce, clocks=True
        )
        cluster = decode(bytes, await link.call(hello, _CALL_TIMEOUT_S))
        await asyncio.to_thread(store.join, cluster)
        self._accepted = True
        # From here on every change is either in `copies` or follows after it (or both, which is
        # fine: the master takes a report of what it knows for none).
        self._pending[link] = []
        copies = await asyncio.to_thread(store.copies)
        for start in range(0, len(copies), REPORT_SLICE):
            part = copies[start : start + REPORT_SLICE]
            await link.call(m.Copies(part), _CALL_TIMEOUT_S)
        damages = await asyncio.to_thread(store.damages)
        for start in range(0, len(damages), REPORT_SLICE):
            stories = tuple(damages[start : start + REPORT_SLICE])
            await link.call(m.Copies([], stories), _CALL_TIMEOUT_S)
        leaving = await asyncio.to_thread(store.leaving)
        for start in range(0, len(leaving), REPORT_SLICE):
            chunks = tuple(leaving[start : start + REPORT_SLICE])
            await link.call(m.Copies([], (), chunks), _CALL_TIMEOUT_S)
        await link.call(await self._measure(), _CALL_TIMEOUT_S)
        # no await from here until the link is among those that are told of changes
        for change in self._pending.pop(link):
            link.notify(change)
        self._links[link] = None
        await link.call(m.Ready(), _CALL_TIMEOUT_S)
        log.info("master connected", master=f"{link.peer[0]}:{link.peer[1]}", copies=len(copies))

    async def _measure(self) -> m.Space:
        if self._space is not None and time.monotonic() - self._space_at < _SPACE_AGE_S:
            return self._space
        self._space_at = time.monotonic()  # several links: one of them measures
        total, used = await asyncio.to_thread(self._store.space)
        disks = await asyncio.to_thread(self._disks)
        self._space = m.Space(total, used, len(self._store), tuple(disks),
                              await asyncio.to_thread(self._store.room))
        return self._space

    async def _heartbeat(self, link: Link) -> None:
        while not link.closed.done():
            raw = await link.call(await self._measure(), _CALL_TIMEOUT_S)
            self._learn(decode(list[str] | None, raw) or [])  # type: ignore[arg-type]
            await asyncio.wait({link.closed}, timeout=HEARTBEAT_S)

    def _learn(self, masters: list[str]) -> None:
        """Masters may have been added since the start: report to them, too."""
        for name in masters:
            host, _, port = name.rpartition(":")
            address = (host, int(port))
            if address not in self._masters and len(self._masters) < MASTERS_MAX:
                log.info("another master", master=name)
                self._masters.append(address)
                self._spawn(address)

    def _spawn(self, address: tuple[str, int]) -> None:
        task = asyncio.ensure_future(self._keep(*address))
        task.add_done_callback(self._ended)
        self._tasks.append(task)

    # --- orders

    async def _order(self, link: Link, order: m.ChunkOrder) -> None:
        if isinstance(order, m.MasterClock):
            self._tickets.heard(order)
            return
        self._gate.check(order.term)
        if isinstance(order, m.NewTerm):
            await self._new_term(order.term)
        elif isinstance(order, m.Replicate):
            await self._replicate(order)
        elif isinstance(order, m.Tune):
            await self._loop.run_in_executor(self._orders, self._tune, order.action, order.value)
        else:
            await self._loop.run_in_executor(self._orders, self._obey, order)

    async def _new_term(self, term: int) -> None:
        done = asyncio.Event()

        def then() -> None:
            self._loop.call_soon_threadsafe(done.set)

        self._gate.announce(term, then)
        try:
            await self._loop.run_in_executor(self._orders, self._store.remember_term, term)
        except OSError as e:
            raise RaftfsError(f"the term cannot be written: {e}") from None
        await done.wait()  # ends: effects are system calls on copies, nothing remote
        log.info("term announced", term=term)

    def _obey(self, order: m.RaiseVersion | m.Destroy | m.SetAside | m.Confirm) -> None:
        """In a thread. Whatever it changed has been queued for report when this returns."""
        with self._gate.effect(order.term):
            if isinstance(order, m.RaiseVersion):
                self._store.raise_version(order.chunk, order.version, order.lock)
            elif isinstance(order, m.SetAside):
                self._store.set_aside(order.chunk, order.version)
            elif isinstance(order, m.Confirm):
                self._store.confirm(order.chunk, order.version)
            else:
                self._store.destroy(order.chunk, order.version)

    async def _replicate(self, order: m.Replicate) -> None:
        if order.chunk in self._fetching or len(self._fetching) >= FETCHES_MAX:
            raise ReplyError(Status.BUSY)
        self._fetching.add(order.chunk)
        try:
            await self._loop.run_in_executor(self._fetches, self._fetch, order)
        finally:
            self._fetching.discard(order.chunk)

    def _fetch(self, order: m.Replicate) -> None:
        """In a thread."""
        began = time.monotonic()
        try:
            self._gate.check(order.term)
            fetched = fetch(self._store, self._sources, order)
            if fetched is None:
                return
            try:
                with self._gate.effect(order.term):
                    self._store.adopt(order.chunk, order.version, fetched.disk, fetched.path)
            except BaseException:
                discard(self._store, fetched)
                raise
        except OSError as e:
            log.error("replication failed", chunk=f"{order.chunk:016X}", reason=str(e))
            raise ReplyError(Status.DISK_ERROR) from None
        except RaftfsError as e:
            log.warning("replication failed", chunk=f"{order.chunk:016X}", version=order.version,
                        source=f"{order.host}:{order.port}", reason=str(e))  # fmt: skip
            raise
        log.info("copy fetched", chunk=f"{order.chunk:016X}", version=order.version,
                 source=f"{order.host}:{order.port}",
                 took_ms=round(1000 * (time.monotonic() - began)))  # fmt: skip
