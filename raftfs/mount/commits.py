"""Makes what the copies have part of the file: `CommitWrite`, with the length that may be told.

The length that is committed never covers bytes that are still under way and would lie beyond the
committed length: after a crash of this client they would read as garbage (see `_committable`).
"""

import asyncio
from collections.abc import Callable
from errno import EIO, ESTALE
from typing import Protocol

import structlog

from raftfs.errors import LinkError, ReplyError
from raftfs.mount.blocks import SYNC
from raftfs.mount.chunkwriter import ChunkWriter
from raftfs.mount.writecontext import WriteContext
from raftfs.wire import ops

log = structlog.get_logger("raftfs.writer")

RELOCKS_MAX = 3


class Committed(Protocol):
    """The file whose writes are committed; `writer.FileWriter` is the real one."""

    inode: int
    context: WriteContext
    chunks: dict[int, ChunkWriter]

    def released(self, chunk: ChunkWriter) -> None:
        """`chunk` may have nothing to do any more."""

    def lost(self, errno: int) -> None:
        """Something written will not become part of the file."""


class Commits:
    """The commits of one file. `committed`: its length as last learnt from a master.

    `acked_end`: where the farthest acknowledged write ends that no commit has covered, else 0.
    `mtime`: the time of the last write, which commits set.
    """

    def __init__(self, file: Committed, length: int, on_attr: Callable[[ops.Attr], None]) -> None:
        self.committed = length
        self.acked_end = 0
        self.mtime = 0
        self._file = file
        self._on_attr = on_attr
        self._lock = asyncio.Lock()

    @property
    def busy(self) -> bool:
        """A commit is under way."""
        return self._lock.locked()

    def outstanding(self) -> bool:
        """Whether something is acknowledged that no commit has covered."""
        return self.acked_end > self.committed or any(c.dirty for c in self._file.chunks.values())

    def reset(self, length: int) -> None:
        """The file's length was set otherwise; nothing of ours is pending."""
        self.committed = length
        self.acked_end = 0

    async def commit(self, *, unlock: bool, only: ChunkWriter | None = None) -> bool:
        """Commit what is acknowledged. True if that covers all that was, when this was called.

        Failures are counted in the file, not raised.
        """
        end = self.acked_end
        async with self._lock:
            for _ in range(RELOCKS_MAX):
                chosen, covered, length = self._choose(unlock, only)
                if not chosen and length < 0:
                    break
                op = ops.CommitWrite(self._file.inode, length, self.mtime, chosen)
                status = await self._send(op, covered)
                if status == 0:
                    break
                if status != ESTALE:
                    self._failed(covered, status)
                    return False
                # The grants had been ended by force; the bytes are still there if the chunks are.
                log.warning("write locks were lost", inode=self._file.inode)
                locks = {w.chunk: w.lock for w in chosen}
                if not all([await chunk.relock(locks) for chunk in covered]):
                    return False
            else:
                self._failed(covered, ESTALE)
                return False
        dirty = any(c.dirty for c in self._file.chunks.values())
        return self.committed >= end and not dirty

    def _choose(
        self, unlock: bool, only: ChunkWriter | None
    ) -> tuple[list[ops.Written], dict[ChunkWriter, int], int]:
        """What to commit: the chunks as messages and with the dirt that is covered, the length."""
        chosen: list[ops.Written] = []
        covered: dict[ChunkWriter, int] = {}
        for chunk in [only] if only is not None else list(self._file.chunks.values()):
            if chunk.grant is None:
                self._file.released(chunk)
                continue
            ends = unlock and not chunk.blocks.sent
            ends = ends and (not chunk.blocks.queue or chunk.yielding)
            if not chunk.dirty and not ends:
                continue
            chunk.paused = ends
            covered[chunk] = chunk.dirty
            chosen.append(ops.Written(chunk.grant.chunk, chunk.grant.lock, ends))
        length = self._committable()
        return chosen, covered, length if length > self.committed else -1

    def _committable(self) -> int:
        """The length up to which everything is acknowledged, or was committed before."""
        limit = self.acked_end
        for chunk in self._file.chunks.values():
            for block in chunk.blocks.unretired():
                if block.kind != SYNC and chunk.base + block.end > self.committed:
                    start = chunk.filled_to if block.offset < 0 else block.offset
                    if chunk.untouched:
                        start = 0  # no server has it yet: nobody could read it
                    limit = min(limit, max(chunk.base + start, self.committed))
        return limit

    async def _send(self, op: ops.CommitWrite, covered: dict[ChunkWriter, int]) -> int:
        context = self._file.context
        ended = {w.chunk for w in op.chunks if w.unlock}
        try:
            attr: ops.Attr = await context.meta.mutate(op, context.timeout_s)
        except (ReplyError, LinkError) as e:
            log.error("commit failed", inode=self._file.inode, reason=str(e))
            for chunk in covered:
                chunk.paused = False
                chunk.pump()
            return e.errno or EIO
        for chunk, dirty in covered.items():
            chunk.dirty -= dirty
            if chunk.grant is not None and chunk.grant.chunk in ended:
                chunk.unlocked()
                self._file.released(chunk)
        self.committed = attr.length
        if self.committed >= self.acked_end:
            self.acked_end = 0
        self._on_attr(attr)
        return 0

    def _failed(self, covered: dict[ChunkWriter, int], status: int) -> None:
        for chunk in covered:
            chunk.grant = None
            chunk.fail(status)
        self.acked_end = 0  # given up: what is acknowledged and not committed stays outside
        self._file.lost(status)
