"""What all writers of a mount share: the masters, the connections, the memory, the clock's tick."""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, Protocol

import structlog

from raftfs.errors import LinkError, RaftfsError, ReplyError
from raftfs.mount.cache import Budget
from raftfs.mount.datalink import DataLinks
from raftfs.wire import messages as m

log = structlog.get_logger("raftfs.writer")

TICK_S = 0.1
STREAM_IDLE_S = 10.0
SYNC_TIMEOUT_S = 30.0


class WriteError(RaftfsError):
    """Buffered bytes were lost; `errno` says why."""

    def __init__(self, errno: int) -> None:
        self.errno = errno
        super().__init__(f"earlier write failed with errno {errno}")


class Active(Protocol):
    """A file with anything buffered, dirty or granted; `writer.FileWriter` is the real one."""

    def tick(self, now: float) -> bool:
        """Called a few times a second. False: there is nothing to look after any more."""

    async def flush(self) -> None:
        """Have everything committed. WriteError if something was lost."""


class WriteContext:
    """What all writers of a mount share."""

    def __init__(self, meta: Any, links: DataLinks, budget: Budget, timeout_s: float) -> None:
        self.meta = meta
        self.links = links
        self.budget = budget
        self.timeout_s = timeout_s
        self.active: set[Active] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ticking: asyncio.Task[None] | None = None
        self._ident = 0

    def next_ident(self) -> int:
        """A number for a frame that needs an answer."""
        self._ident += 1
        return self._ident

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run in the background; a bug in there is logged."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            if isinstance(error, RaftfsError):
                log.warning("background write work failed", reason=str(error))
            else:
                log.error("background write work failed", exc_info=error)

    def activate(self, file: Active) -> None:
        """`file` has something to look after."""
        self.active.add(file)
        if self._ticking is None or self._ticking.done():
            self._ticking = self.spawn(self._tick())

    async def _tick(self) -> None:
        while self.active:
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            for file in list(self.active):
                if not file.tick(now):
                    self.active.discard(file)
            self.links.close_idle(STREAM_IDLE_S)

    async def close(self) -> None:
        """Everything buffered goes out and is committed; errors are logged."""
        files = list(self.active)
        for result in await asyncio.gather(*(f.flush() for f in files), return_exceptions=True):
            if isinstance(result, BaseException):
                log.error("data lost at unmount", reason=str(result))
        self.active.clear()
        for task in list(self._tasks):
            task.cancel()


async def sync_copies(context: WriteContext, inode: int, index: int) -> bool:
    """Have all present copies of a chunk on their disks. False if there is none or one failed."""
    found: m.ChunkMap = await context.meta.call(m.ReadChunk(inode, index))
    if not found.chunk:
        return True  # a hole by now: somebody truncated it

    async def one(copy: m.Location) -> bool:
        head = m.SyncData(context.next_ident(), found.chunk, copy.version, [], found.ticket)
        try:
            await context.links.ask((copy.host, copy.port), head, SYNC_TIMEOUT_S)
        except (LinkError, ReplyError):
            return False
        return True

    return bool(found.copies) and all(await asyncio.gather(*map(one, found.copies)))
