"""The links to the masters: reports to all of them, orders from the leader only.

Every master gets the same stream: hello, all copies, ready, then each change and a heartbeat. The
reply to an order leaves after the report of what it changed, on the same link, because reports are
queued in the loop before the order's future resolves.

Terms: an order of a lower term than the highest seen is refused. The highest term is not kept over
a restart: after one, no order of an older leader can be under way (its links died with the
process), and each leader announces its term on every new link before anything else.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import structlog

from raftfs import __version__
from raftfs.chunk.fetch import replicate
from raftfs.chunk.store import ChunkStore
from raftfs.const import HEARTBEAT_S
from raftfs.errors import LinkError, RaftfsError, ReplyError, Status, UserError
from raftfs.wire import messages as m
from raftfs.wire import rpc
from raftfs.wire.auth import ClusterKey
from raftfs.wire.rpc import Link, decode

log = structlog.get_logger("raftfs.masterlink")

ORDER_THREADS = 8
_REPORT_SLICE = 10_000
_CALL_TIMEOUT_S = 5.0
_AGAIN_S = 0.2


class MasterLinks:
    """Keeps a link to every master."""

    def __init__(
        self,
        store: ChunkStore,
        masters: list[tuple[str, int]],
        announce: tuple[str, int],
        key: ClusterKey,
    ) -> None:
        self._store = store
        self._masters = masters
        self._announce = announce
        self._key = key
        self._loop = asyncio.get_running_loop()
        self._pool = ThreadPoolExecutor(ORDER_THREADS, thread_name_prefix="order")
        self._links: set[Link] = set()  # those that have had the full report
        self._pending: dict[Link, list[m.Changed]] = {}  # changes since a full report began
        self._term = 0
        self._tasks: list[asyncio.Task[None]] = []
        self.failed: asyncio.Future[None] = self._loop.create_future()
        store.report = self._report

    def start(self) -> None:
        """Begin to connect."""
        self._tasks = [asyncio.ensure_future(self._keep(h, p)) for h, p in self._masters]

    async def stop(self) -> None:
        """Drop all links."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for link in list(self._links):
            link.close()
        self._pool.shutdown(wait=True, cancel_futures=True)

    # --- reports

    def _report(
        self, made: list[m.CopyId], gone: list[m.CopyId], damaged: list[m.CopyId]
    ) -> None:
        """Called by any thread right after the change."""
        self._loop.call_soon_threadsafe(self._tell, m.Changed(made, gone, damaged))

    def _tell(self, change: m.Changed) -> None:
        for pending in self._pending.values():
            pending.append(change)
        for link in self._links:
            link.notify(change)

    async def _keep(self, host: str, port: int) -> None:
        while True:
            try:
                link = await rpc.connect(
                    host, port, incoming=m.ChunkOrder, handler=self._order, key=self._key,
                    role="chunkserver", name=self._store.server.hex(),
                )  # fmt: skip
                try:
                    await self._introduce(link)
                    await self._heartbeat(link)
                finally:
                    self._links.discard(link)
                    self._pending.pop(link, None)
                    link.close()
            except LinkError as e:
                log.debug("master not reached", master=f"{host}:{port}", reason=str(e))
            except ReplyError as e:
                self._refused(f"{host}:{port}", e)
            await asyncio.sleep(_AGAIN_S)

    def _refused(self, master: str, error: ReplyError) -> None:
        reason = error.value and decode(Any, error.value)
        if isinstance(reason, str) and "belong to cluster" in reason:
            if not self.failed.done():
                self.failed.set_exception(UserError(f"master {master} refuses: {reason}"))
        elif isinstance(reason, str) and "no cluster yet" in reason:
            log.debug("master is being founded", master=master)
        else:
            log.warning("master refuses", master=master, reason=reason or str(error))

    async def _introduce(self, link: Link) -> None:
        """Hello, every copy, ready; what changes meanwhile follows at the end."""
        store = self._store
        hello = m.ServerHello(
            m.PROTOCOL, __version__, store.server, store.cluster, *self._announce
        )
        cluster = decode(bytes, await link.call(hello, _CALL_TIMEOUT_S))
        if store.cluster and store.cluster != cluster:
            raise LinkError("the master changed its cluster")
        if not store.cluster:
            await asyncio.to_thread(store.join, cluster)
        self._pending[link] = []
        copies = store.copies()
        for start in range(0, len(copies), _REPORT_SLICE):
            part = copies[start : start + _REPORT_SLICE]
            await link.call(m.Copies(part), _CALL_TIMEOUT_S)
        await link.call(await self._space(), _CALL_TIMEOUT_S)
        # no await from here until the link is among those that are told of changes
        for change in self._pending.pop(link):
            link.notify(change)
        self._links.add(link)
        await link.call(m.Ready(), _CALL_TIMEOUT_S)
        log.info("master connected", master=f"{link.peer[0]}:{link.peer[1]}", copies=len(copies))

    async def _space(self) -> m.Space:
        total, used = await asyncio.to_thread(self._store.space)
        return m.Space(total, used, len(self._store))

    async def _heartbeat(self, link: Link) -> None:
        while not link.closed.done():
            await link.call(await self._space(), _CALL_TIMEOUT_S)
            await asyncio.wait({link.closed}, timeout=HEARTBEAT_S)

    # --- orders

    def _order(self, link: Link, order: m.ChunkOrder) -> Any:
        if order.term < self._term:
            raise ReplyError(Status.OLD_TERM)
        self._term = order.term
        if isinstance(order, m.NewTerm):
            # An order of an older leader may still be at work: its report must come before this.
            return self._after_orders()
        return self._loop.run_in_executor(self._pool, self._obey, order)

    async def _after_orders(self) -> None:
        barrier: list[Callable[[], None]] = [lambda: None] * ORDER_THREADS
        await asyncio.gather(*(self._loop.run_in_executor(self._pool, b) for b in barrier))
        await asyncio.sleep(0)

    def _obey(self, order: Any) -> None:
        """In a thread. Whatever it changed has been queued for report when this returns."""
        if order.term < self._term:
            raise ReplyError(Status.OLD_TERM)
        try:
            if isinstance(order, m.RaiseVersion):
                self._store.raise_version(order.chunk, order.version, order.lock)
            elif isinstance(order, m.Destroy):
                self._store.destroy(order.chunk, order.version)
            else:
                replicate(self._store, order)
        except (OSError, EOFError) as e:
            log.error("order failed", order=repr(order), reason=str(e))
            raise RaftfsError(str(e)) from None
