"""The contents of files: open, read, write, flush, fsync, truncate; without FUSE."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from errno import EFBIG, EINVAL
from typing import Any

import structlog

from raftfs.client.meta import MetaClient
from raftfs.const import CHUNK_SIZE, FILE_LENGTH_MAX
from raftfs.errors import RaftfsError, ReplyError, Status
from raftfs.mount.handles import Files, Handle, OpenFile
from raftfs.mount.writecontext import WriteContext, WriteError, sync_copies
from raftfs.mount.writer import FileWriter
from raftfs.wire import messages as m
from raftfs.wire import ops
from raftfs.wire.ops import Attr, NodeType

log = structlog.get_logger("raftfs.mount")

FRESH_S = 0.05  # attributes of a lookup made by the same open(2)
SYNC_PARALLEL = 8
_LOCKED_PAUSE_S = 0.04
_CHUNKS_PAGE = 1_000  # of FileChunks


class Contents:
    """Operations on what is in files. `close_sync`: close(2) syncs as well."""

    def __init__(
        self, meta: MetaClient, files: Files, writes: WriteContext, *, close_sync: bool
    ) -> None:
        self._meta = meta
        self._files = files
        self._writes = writes
        self._close_sync = close_sync

    async def open(self, inode: int, *, writes: bool, truncate: bool) -> tuple[Handle, bool]:
        """Open a file: the handle, and whether the kernel may keep its pages of it."""
        file = await self._files.open(inode, FRESH_S)
        handle = Handle(file, writes)
        try:
            if truncate:
                await self.truncate(inode, 0)
        except BaseException:
            self._files.close(file)
            raise
        if file.writer is not None and not file.writer.quiet:
            return handle, False
        key = file.cache_key()
        keep = self._files.cache_keys.get(inode) == key
        self._files.cache_keys.set(inode, key)
        return handle, keep

    async def read(self, handle: Handle, offset: int, size: int) -> bytes | bytearray | memoryview:
        """Bytes of the file as its local users see it."""
        file = handle.file
        if file.writer is None or not file.writer.pending:
            return await file.reader.read(offset, size, file.length)
        await self._drain_range(file.writer, offset, offset + size)
        handle.check()
        return await file.reader.read(offset, size, file.length, settled=False)

    async def write(self, handle: Handle, offset: int, data: bytes) -> int:
        """Buffer `data`. An earlier loss is reported instead."""
        handle.check()
        file = handle.file
        self._files.cache_keys.drop(file.inode)
        file.reader.forget_data()
        await file.writable().write(offset, data)
        return len(data)

    async def flush(self, handle: Handle) -> None:
        """close(2): what was written is on every copy, and committed. WriteError if not."""
        writer = handle.file.writer
        if not handle.writes or writer is None:
            return
        try:
            if self._close_sync:
                await self.fsync(handle)
            await writer.flush()
        except WriteError:
            handle.check()
            raise
        handle.check()

    async def fsync(self, handle: Handle) -> None:
        """What was written is on the disks of every copy, and committed. WriteError if not."""
        file = handle.file
        if file.writer is not None:
            await file.writer.fsync()
        if not file.synced:
            await self._sync_all(file)
        handle.check()

    async def release(self, handle: Handle) -> None:
        """The last user of the descriptor is gone."""
        file = handle.file
        if handle.writes and file.writer is not None and file.writer.pending:
            try:
                await file.writer.flush()  # pages written through a mapping after the close
            except RaftfsError as e:
                log.error("written data lost", inode=file.inode, reason=str(e))
        self._files.close(file)

    async def truncate(self, inode: int, length: int) -> Attr:
        """Set the file's length; it reads as zeros where it grows."""
        if not 0 <= length <= FILE_LENGTH_MAX:
            raise WriteError(EINVAL if length < 0 else EFBIG)
        await self.settle(inode)
        if length:
            before: Attr = await self._meta.call(m.GetAttr(inode))
            if before.type == NodeType.FILE and before.length < length:
                await self._grow(inode, before.length, length)
        attr = await self._unless_locked(lambda: self._meta.mutate(ops.Length(inode, length)))
        self._files.cache_keys.drop(inode)
        file = self._files.get(inode)
        if file is not None:
            file.reader.forget_all()
        return self._files.saw(attr)

    async def settle(self, inode: int) -> None:
        """Commit what is buffered and end the grants, so that nothing undoes what comes next."""
        file = self._files.get(inode)
        if file is not None and file.writer is not None and not file.writer.quiet:
            await file.writer.flush()

    async def _grow(self, inode: int, old: int, new: int) -> None:
        file = self._files.get(inode)
        if file is not None:
            await file.writable().zero_tail(old, new)
        else:
            await FileWriter(inode, self._writes, old, lambda attr: None).zero_tail(old, new)

    async def _unless_locked(self, ask: Callable[[], Awaitable[Any]]) -> Any:
        """Ask again while another session writes there."""
        deadline = time.monotonic() + self._writes.timeout_s
        while True:
            try:
                return await ask()
            except ReplyError as e:
                if e.status != Status.LOCKED or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(_LOCKED_PAUSE_S)

    async def _drain_range(self, writer: FileWriter, start: int, end: int) -> None:
        """What the copies hold in this range is what was written, and zeros elsewhere."""
        if end > writer.commits.committed:
            # Beyond the committed length there may be garbage, which is zeroed when the grants of
            # the chunks behind it arrive: the first drain awaits those, the second the zeros.
            await writer.drain()
            await writer.drain()
            return
        for index in range(start // CHUNK_SIZE, (end - 1) // CHUNK_SIZE + 1):
            chunk = writer.chunks.get(index)
            if chunk is not None and chunk.blocks.overlaps(start - chunk.base, end - chunk.base):
                chunk.seal()
                done = chunk.blocks.drained()
                if done is not None:
                    await done

    async def _sync_all(self, file: OpenFile) -> None:
        """Chunks written by others, or by us long ago, may be in the servers' memory only."""
        first = 0
        while True:
            page: list[m.FileChunk] = await self._meta.call(m.FileChunks(file.inode, first))
            present = [c.index for c in page if c.chunk]
            for at in range(0, len(present), SYNC_PARALLEL):
                part = present[at : at + SYNC_PARALLEL]
                done = await asyncio.gather(
                    *(sync_copies(self._writes, file.inode, index) for index in part)
                )
                for index, ok in zip(part, done, strict=True):
                    if not ok:
                        log.warning("not synced", inode=file.inode, chunk_index=index)
            if len(page) < _CHUNKS_PAGE:
                break
            first = page[-1].index + 1
        file.synced = True
