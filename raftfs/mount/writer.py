"""Write-behind of one file: merging, bounded memory, and errors that are not forgotten.

`write` returns once the bytes are buffered; `ChunkWriter`s carry them to the copies; commits
(`commits.py`) make them part of the file:

    on close (flush)          after everything is acknowledged; ends the grants
    on fsync                  likewise, after everything is on disk; keeps the grants
    when a chunk is full      for that chunk, while the next one streams
    after an idle second      ends the grants, so that other clients may write
    before attributes change  (`flush`), so that a later commit cannot undo them
"""

import asyncio
import time
from collections.abc import Callable
from errno import EFBIG, EIO

import structlog

from raftfs.const import CHUNK_SIZE, FILE_LENGTH_MAX, MIB
from raftfs.mount.chunkwriter import ChunkWriter
from raftfs.mount.commits import Commits
from raftfs.mount.writecontext import WriteContext, WriteError, sync_copies
from raftfs.wire import ops
from raftfs.wire.messages import ChunkMap

log = structlog.get_logger("raftfs.writer")

FILE_BUFFER_MAX = 32 * MIB  # 16 MiB on the way and as much waiting behind it
FILE_BLOCKS_MAX = 1024  # tiny scattered writes are bounded by their number
GRANTS_PER_FILE_MAX = 32  # chunks of one file open for writing; more are flushed first
SEAL_IDLE_S = 0.1  # a partly filled block is sent when nothing was added for so long
UNLOCK_IDLE_S = 1.0
HOLD_S = 10.0  # a grant is given up now and then, so that other clients get their turn
SYNC_PAUSE_S = 0.1


class FileWriter:
    """Writes one file. `on_attr` hears of the attributes that commits return.

    `length`: of the file as its local users see it. `failures` counts losses: a handle that saw
    fewer when it was opened must report an error. `unsynced`: indices of chunks with acknowledged
    bytes that may not be on disk.
    """

    def __init__(
        self, inode: int, context: WriteContext, length: int, on_attr: Callable[[ops.Attr], None]
    ) -> None:
        self.inode = inode
        self.context = context
        self.length = length
        self.failures = 0
        self.error = 0
        self.chunks: dict[int, ChunkWriter] = {}
        self.unsynced: set[int] = set()
        self.commits = Commits(self, length, on_attr)
        self._buffered = 0
        self._space: list[asyncio.Future[None]] = []
        self._written_at = 0.0

    # --- for the mount

    async def write(self, offset: int, data: bytes) -> None:
        """Buffer `data`; waits only for memory. WriteError EFBIG beyond the largest file."""
        end = offset + len(data)
        if end > FILE_LENGTH_MAX:
            raise WriteError(EFBIG)
        while self._full(len(data)):
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._space.append(future)
            await future
        if not self.context.budget.try_take(len(data)):
            await self.context.budget.take(len(data))
        # no await until the end: a write is buffered whole or not at all
        self._buffered += len(data)
        self.length = max(self.length, end)
        self.commits.mtime = time.time_ns()
        self._written_at = time.monotonic()
        view = memoryview(data)
        while view:
            index, within = divmod(offset, CHUNK_SIZE)
            piece, view = view[: CHUNK_SIZE - within], view[CHUNK_SIZE - within :]
            self._chunk(index).write(within, piece)
            offset += len(piece)
        self.context.activate(self)

    @property
    def mtime(self) -> int:
        """Time of the last write, ns since the epoch."""
        return self.commits.mtime

    @property
    def pending(self) -> bool:
        """Whether the master does not know all of it yet."""
        return self.commits.outstanding() or any(
            not c.blocks.idle for c in self.chunks.values()
        )

    @property
    def quiet(self) -> bool:
        """Nothing buffered, dirty or granted, and nothing under way."""
        return not self.chunks and not self.commits.busy and not self.commits.outstanding()

    def failed_since(self, failures: int) -> WriteError | None:
        """The error that somebody who saw `failures` before must hear of."""
        return WriteError(self.error) if self.failures > failures else None

    async def drain(self) -> None:
        """All that was written before is acknowledged by every copy (or has failed)."""
        waiting = []
        for chunk in list(self.chunks.values()):
            chunk.seal()
            if (done := chunk.blocks.drained()) is not None:
                waiting.append(done)
        for done in waiting:
            await done

    async def flush(self) -> None:
        """Drain, commit, end the grants. WriteError if something was lost meanwhile."""
        before = self.failures
        while not self.quiet:
            await self.drain()
            if await self.commits.commit(unlock=True) or self.failures > before:
                break
        if (error := self.failed_since(before)) is not None:
            raise error

    async def fsync(self) -> None:
        """Drain, have it on the disks of all copies, commit. WriteError as for `flush`."""
        before = self.failures
        released = []
        for index in sorted(self.unsynced | set(self.chunks)):
            chunk = self.chunks.get(index)
            if chunk is None or (chunk.grant is None and chunk.blocks.idle):
                released.append(index)
            elif index in self.unsynced or not chunk.blocks.idle:
                chunk.sync()
        results = await asyncio.gather(
            self.drain(), *map(self._sync_released, released), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result
        while self.failures == before and not await self.commits.commit(unlock=False):
            await self.drain()
        if (error := self.failed_since(before)) is not None:
            raise error

    async def zero_tail(self, length: int, new_length: int) -> None:
        """Before the file grows from `length`: its last chunk reads as zeros up to `new_length`."""
        index, within = divmod(length, CHUNK_SIZE)
        if not within:
            return
        self.commits.mtime = time.time_ns()
        self._chunk(index).fill(min(CHUNK_SIZE, new_length - index * CHUNK_SIZE))
        self.context.activate(self)
        await self.flush()

    def set_length(self, length: int) -> None:
        """A master told the file's length. Ignored while something of ours is pending."""
        if not self.pending:
            self.length = length
            self.commits.reset(length)

    def tick(self, now: float) -> bool:
        """Called a few times a second while active. False: there is nothing to look after."""
        chunks = list(self.chunks.values())
        for chunk in chunks:
            chunk.check(now)
            if chunk.grant is not None and now - chunk.granted_at > _hold_s(chunk.grant):
                self._yield(chunk)
            if chunk.yielding and not chunk.blocks.sent and not chunk.paused:
                self.context.spawn(self.commits.commit(unlock=True, only=chunk))
        idle_s = now - self._written_at
        if idle_s > SEAL_IDLE_S:
            for chunk in chunks:
                chunk.seal()
        resting = all(c.blocks.idle for c in chunks) and not self.commits.busy
        if idle_s > UNLOCK_IDLE_S and resting and not self.quiet:
            self.context.spawn(self.commits.commit(unlock=True))
        return not self.quiet

    def _yield(self, chunk: ChunkWriter) -> None:
        """Let others have the chunk as soon as what was sent is acknowledged. Something is sent
        before: the commit that ends a grant tells the masters that there are copies.
        """
        if not chunk.paused and not chunk.yielding:
            chunk.seal()
            chunk.yielding = True

    # --- for the chunk writers

    def retired(self, end: int, size: int) -> None:
        """Bytes up to `end` of the file are acknowledged; `size` bytes of memory are free."""
        self.commits.acked_end = max(self.commits.acked_end, end)
        self._give(size)

    def progressed(self, chunk: ChunkWriter) -> None:
        """Blocks of `chunk` were retired. A chunk that is full is committed at once."""
        full = chunk.blocks.idle and chunk.dirty and chunk.acked_to == CHUNK_SIZE
        if full and not chunk.paused and len(self.chunks) > 1:
            self.context.spawn(self.commits.commit(unlock=True, only=chunk))

    def granted(self, chunk: ChunkWriter, length: int) -> None:
        """`chunk` may be written; the file's committed length was `length` then.

        Bytes between the old end and this chunk become part of the file with the next commit:
        chunks in which they lie must read as zeros there.
        """
        self.commits.committed = length
        for other in list(self.chunks.values()):
            if other.index < chunk.index:
                other.fill()
        index, within = divmod(length, CHUNK_SIZE)
        if within and index < chunk.index and index not in self.chunks:
            self._chunk(index).fill()

    def released(self, chunk: ChunkWriter) -> None:
        """The chunk writer may have nothing to do any more."""
        if self.chunks.get(chunk.index) is chunk and chunk.at_rest:
            del self.chunks[chunk.index]

    def failed(self, chunk: ChunkWriter, errno: int, size: int) -> None:
        """Buffered bytes of `chunk` were given up, `size` of them still in memory."""
        log.error("written data lost", inode=self.inode, chunk_index=chunk.index, errno=errno,
                  len_bytes=size)  # fmt: skip
        if chunk.grant is None:
            chunk.dirty = 0
        self.released(chunk)
        self._give(size)
        self.lost(errno)

    def lost(self, errno: int) -> None:
        """Something written will not become part of the file."""
        self.failures += 1
        self.error = errno or EIO
        ends = [c.base + b.end for c in self.chunks.values() for b in c.blocks.unretired()]
        self.length = max(self.commits.committed, self.commits.acked_end, *ends, 0)

    # --- inside

    def _chunk(self, index: int) -> ChunkWriter:
        chunk = self.chunks.get(index)
        if chunk is None:
            others = list(self.chunks.values())
            chunk = self.chunks[index] = ChunkWriter(self, index)
            for other in others:
                self.progressed(other)
            if len(others) >= GRANTS_PER_FILE_MAX:
                self._make_room(others)
        return chunk

    def _make_room(self, chunks: list[ChunkWriter]) -> None:
        """Too many chunks are open: send what they hold and end the first grant that can end."""
        for chunk in chunks:
            chunk.seal()
        for chunk in chunks:
            if chunk.blocks.idle and not chunk.paused:
                self.context.spawn(self.commits.commit(unlock=True, only=chunk))
                return

    def _full(self, size: int) -> bool:
        if not self._buffered:
            return False
        waiting = sum(len(c.blocks.queue) for c in self.chunks.values())
        return self._buffered + size > FILE_BUFFER_MAX or waiting >= FILE_BLOCKS_MAX

    def _give(self, size: int) -> None:
        self._buffered -= size
        self.context.budget.give(size)
        self._space, waiting = [], self._space
        for future in waiting:
            if not future.done():
                future.set_result(None)

    async def _sync_released(self, index: int) -> None:
        """fdatasync every copy of a chunk that we wrote and let go. WriteError past the timeout."""
        deadline = time.monotonic() + self.context.timeout_s
        while not await sync_copies(self.context, self.inode, index):
            if time.monotonic() > deadline:
                log.error("cannot sync", inode=self.inode, chunk_index=index)
                raise WriteError(EIO)
            await asyncio.sleep(SYNC_PAUSE_S)
        self.unsynced.discard(index)


def _hold_s(grant: ChunkMap) -> float:
    """How long to keep a grant: not until its ticket is old."""
    return min(HOLD_S, grant.ticket_s / 2 or HOLD_S)
