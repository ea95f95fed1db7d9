"""Writes one chunk of one file: grant, pipelined blocks, acknowledgements, recovery.

After any failure everything that is not retired (see `blocks.py`) is sent again under a new grant,
whose copies the master has raised to a new version.

What lies beyond the file's committed length may be garbage (of a crashed writer, or from before a
truncation). `filled_to` says up to where the chunk's bytes are known to be good; a write beyond it
is preceded by a ZeroData of the gap, and a FILL block makes the rest of the chunk zeros.
All methods run in the event loop.
"""

import asyncio
import time
from errno import EIO, ENOSPC
from typing import Any, Protocol

import structlog

from raftfs.const import CHUNK_SIZE, MIB
from raftfs.errors import LinkError, ReplyError, Status
from raftfs.mount.blocks import FILL, SYNC, WRITE, Block, BlockQueue
from raftfs.mount.datalink import Stream
from raftfs.mount.writecontext import WriteContext
from raftfs.wire import messages as m
from raftfs.wire.frame import piece_crcs

log = structlog.get_logger("raftfs.writer")

WINDOW_BYTES = 16 * MIB  # sent and not acknowledged, per chunk
WINDOW_FRAMES = 64
ACK_TIMEOUT_S = 3.0  # longer than a server waits for the next one of its chain
SYNC_TIMEOUT_S = 30.0  # a disk may have much to write
YIELD_S = 0.06  # a grant that was given up for others is left alone longer than they wait
_LOCKED_PAUSE_S = 0.04  # between two questions while another client writes
_PAUSES_S = (0.01, 0.02, 0.03, 0.05)  # between two questions to a master that cannot grant now
_PAUSE_MAX_S = 0.2
_HOLE = m.ChunkMap(0, 0, 0, [])
_STALE = (Status.WRONG_VERSION, Status.NO_CHUNK, Status.NO_TICKET, Status.TICKET_EXPIRED)


class _Send:
    """One frame for the sender thread."""

    __slots__ = ("block", "chain", "create", "grant", "ident")

    def __init__(
        self, block: Block, grant: m.ChunkMap, chain: list[m.Hop], *, create: bool
    ) -> None:
        self.block = block
        self.grant = grant
        self.chain = chain
        self.create = create
        self.ident = block.ident

    def frame(self) -> tuple[Any, Any]:
        """The head (with checksums) and the payload."""
        block, grant = self.block, self.grant
        if block.kind == WRITE:
            data = block.payload()
            head: Any = m.WriteData(
                self.ident, grant.chunk, grant.version, grant.lock, self.create, block.offset,
                piece_crcs(block.offset, data), self.chain, grant.ticket,
            )  # fmt: skip
            return head, data
        if block.kind == FILL:
            head = m.ZeroData(
                self.ident, grant.chunk, grant.version, grant.lock, self.create, block.offset,
                block.end - block.offset, self.chain, grant.ticket,
            )  # fmt: skip
            return head, b""
        head = m.SyncData(self.ident, grant.chunk, grant.version, self.chain, grant.ticket)
        return head, b""


class Owner(Protocol):
    """The file that a chunk is of, as its writer sees it; `writer.FileWriter` is the real one.

    `unsynced`: indices of chunks with acknowledged bytes that may not be on disk.
    """

    inode: int
    context: WriteContext
    unsynced: set[int]

    def granted(self, chunk: "ChunkWriter", length: int) -> None:
        """`chunk` may be written; the file's committed length was `length` then."""

    def retired(self, end: int, size: int) -> None:
        """Bytes up to `end` of the file are acknowledged; `size` bytes of memory are free."""

    def progressed(self, chunk: "ChunkWriter") -> None:
        """Blocks of `chunk` were retired."""

    def released(self, chunk: "ChunkWriter") -> None:
        """`chunk` may have nothing to do any more."""

    def failed(self, chunk: "ChunkWriter", errno: int, size: int) -> None:
        """Buffered bytes of `chunk` were given up, `size` of them still in memory."""


class ChunkWriter:
    """See the module. `dirty` counts retired writes that no commit has covered yet; `acked_to` is
    where the farthest one under this grant ended.

    `paused`: a commit that ends the grant is under way, so nothing is sent. `yielding`: the grant
    was held for long; what is out is awaited, then the grant ends so that others have their turn.
    """

    def __init__(self, file: Owner, index: int) -> None:
        self.file = file
        self.index = index
        self.base = index * CHUNK_SIZE
        self.blocks = BlockQueue()
        self.grant: m.ChunkMap | None = None
        self.filled_to = 0
        self.acked_to = 0
        self.dirty = 0
        self.paused = False
        self.yielding = False
        self.granted_at = 0.0
        self._acked = False  # something under this chunk id was acknowledged
        self._chunk_id = 0
        self._stream: Stream | None = None
        self._chain: list[m.Hop] = []
        self._heard_at = 0.0
        self._obtaining: asyncio.Task[Any] | None = None
        self._not_before = 0.0
        self._faults = 0  # in a row, without an acknowledgement between
        self._deadline = 0.0

    # --- taking in

    def write(self, offset: int, data: memoryview) -> None:
        """Accept bytes at `offset` of the chunk."""
        self.blocks.write(offset, data)
        self.pump()

    def fill(self, end: int = CHUNK_SIZE) -> None:
        """See that the chunk reads as zeros from where it is good up to `end`, if it exists."""
        if self.filled_to < end:
            self.blocks.append(FILL, -1, end)
            self.pump()

    def sync(self) -> None:
        """Have all that was accepted so far on the disks of all copies."""
        self.blocks.append(SYNC, 0, 0)

    def seal(self) -> None:
        """Merge no more into what waits: it goes out now."""
        self.blocks.seal()
        self.pump()

    def map(self) -> m.ChunkMap | None:
        """Where the chunk can be read while the grant is held."""
        if self.grant is not None and self.untouched:
            return _HOLE  # nothing of ours is there yet, and nobody else ever wrote
        return self.grant

    @property
    def untouched(self) -> bool:
        """Nothing was ever acknowledged on it, by anybody, as far as is known."""
        return not self._acked and (self.grant is None or self.grant.fresh)

    @property
    def at_rest(self) -> bool:
        """Idle, holds no grant and asks for none."""
        return self.blocks.idle and self.grant is None and self._obtaining is None

    # --- sending

    def pump(self) -> None:
        """Send what may be sent; ask for a grant if one is needed."""
        blocks = self.blocks
        if self.grant is None:
            if blocks.queue and self._obtaining is None:
                self._obtaining = self.file.context.spawn(self._ask([]))
            return
        if self.paused or self.yielding:
            return
        while blocks.in_flight < WINDOW_BYTES and len(blocks.sent) < WINDOW_FRAMES:
            block = blocks.take()
            if block is None:
                return
            self._transmit(block)

    def _transmit(self, block: Block) -> None:
        assert self.grant is not None
        good = self.filled_to
        if block.kind == FILL:
            if block.offset < 0:
                block.offset = good
            if not self.grant.fresh:
                # What is committed by now is never zeroed, whatever was true when it was queued.
                block.offset = max(block.offset, _within(self.grant.length - self.base))
            if block.offset >= block.end:
                block.acked = True  # nothing to do, but in its turn
                self.blocks.put_sent(block)
                self._retire()
                return
        elif block.kind == WRITE and block.offset > good:
            self._put(Block(FILL, block.serial - 1, good, block.offset))
        self.filled_to = max(self.filled_to, block.end)
        self._put(block)

    def _put(self, block: Block) -> None:
        assert self.grant is not None
        if self._stream is None:
            first = self.grant.copies[0]
            self._chain = [m.Hop(c.server, c.host, c.port) for c in self.grant.copies[1:]]
            self._stream = self.file.context.links.stream((first.host, first.port), self)
        if not self.blocks.sent:
            self._heard_at = time.monotonic()
        block.ident = self.file.context.next_ident()
        block.acked = False
        self.blocks.put_sent(block)
        # Once something was acknowledged there is a copy everywhere; where there is none any more
        # (the power went before it was synced) an empty one must not take its place.
        create = self.grant.fresh and not self._acked
        self._stream.send(_Send(block, self.grant, self._chain, create=create))

    # --- being answered (StreamUser)

    def replied(self, stream: Stream, reply: m.DataReply) -> None:
        """A reply from the first server of the chain."""
        if stream is not self._stream:
            return
        self._heard_at = time.monotonic()
        if reply.status:
            log.warning("write refused", chunk=self._name(), status=reply.status,
                        server=reply.failed.hex())  # fmt: skip
            # A refused version or ticket is nobody's fault: a new grant sets it right or drops
            # the copy.
            stale = reply.status in _STALE
            self._fault([] if stale or not reply.failed else [reply.failed])
            return
        self.blocks.acknowledged(reply.id)
        self._faults = 0
        self._deadline = 0.0
        self._retire()
        self.pump()
        self.file.progressed(self)

    def broke(self, stream: Stream, error: BaseException) -> None:
        """The connection is gone."""
        if stream is not self._stream:
            return
        if not self.blocks.sent:
            self._stream = None  # all is acknowledged: the grant is as good as before
            self.pump()
            return
        log.warning("write connection lost", chunk=self._name(), server=stream.address,
                    reason=str(error) or type(error).__name__)  # fmt: skip
        assert self.grant is not None
        # A kept connection may just have been too old for the server: that proves nothing.
        self._fault([] if stream.reused else [self.grant.copies[0].server])

    def check(self, now: float) -> None:
        """Called a few times a second: has the chain fallen silent?"""
        sent = self.blocks.sent
        if not sent or self._stream is None:
            return
        limit = SYNC_TIMEOUT_S if any(b.kind == SYNC for b in sent) else ACK_TIMEOUT_S
        if now - self._heard_at > limit:
            log.warning("write chain is silent", chunk=self._name(), server=self._stream.address)
            # Which server hangs is not known. Raising the version drops those that do not answer
            # the master; only if that did not help is the first one to blame.
            assert self.grant is not None
            self._fault([self.grant.copies[0].server] if self._faults else [])

    def _retire(self) -> None:
        for block in self.blocks.retire():
            if block.kind == SYNC:
                self.file.unsynced.discard(self.index)
            elif block.ident:
                self._acked = True
                self.file.unsynced.add(self.index)
                if block.kind == WRITE:
                    self.dirty += 1
                    self.acked_to = max(self.acked_to, block.end)
                    self.file.retired(self.base + block.end, block.size)
        self.blocks.wake()

    # --- grants

    def _fault(self, failed: list[bytes]) -> None:
        """Something went wrong with the copies: everything unretired again, under a new grant."""
        self._drop_stream()
        self._acked = self.blocks.again() or self._acked
        self._faults += 1
        if not self._deadline:
            self._deadline = time.monotonic() + self.file.context.timeout_s
        self.grant = None
        self._obtaining = self.file.context.spawn(self._ask(failed))

    def _drop_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    async def _ask(self, failed: list[bytes]) -> None:
        deadline = self._deadline or time.monotonic() + self.file.context.timeout_s
        error = await self._ask_until(failed, deadline)
        self._obtaining = None
        if error:
            self.fail(error)
        else:
            self.pump()
            self.file.released(self)

    async def _ask_until(self, failed: list[bytes], deadline: float) -> int:
        """Get a grant. 0, or the errno with which to give up."""
        turn = self._faults if self._faults > 1 else 0
        wait_s = max(self._not_before - time.monotonic(), _pause(turn) if turn else 0.0)
        while True:
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                log.error("write given up", chunk=self._name(), failures=self._faults)
                return EIO
            try:
                if await self._nothing_to_fill(left_s):
                    return 0
                ask = m.WriteChunk(self.file.inode, self.index, failed, self._acked)
                return self._granted(await self.file.context.meta.call(ask, left_s))
            except LinkError:
                return LinkError.errno
            except ReplyError as e:
                if e.status not in (Status.LOCKED, Status.NO_COPIES, Status.NO_SERVERS):
                    log.error("write refused by master", chunk=self._name(), status=str(e))
                    return e.errno
                if time.monotonic() + _PAUSE_MAX_S > deadline:
                    log.error("write given up", chunk=self._name(), status=str(e))
                    return ENOSPC if e.status == Status.NO_SERVERS else e.errno
                # The servers named as failed may be all there are, and back by now.
                failed = failed if e.status == Status.LOCKED else []
                turn += 1
                wait_s = _LOCKED_PAUSE_S if e.status == Status.LOCKED else _pause(turn)

    async def _nothing_to_fill(self, left_s: float) -> bool:
        """Only FILLs wait: if there is no such chunk, there is nothing to fill."""
        if self._chunk_id or any(b.kind != FILL for b in self.blocks.queue):
            return False
        ask = m.ReadChunk(self.file.inode, self.index)
        found: m.ChunkMap = await self.file.context.meta.call(ask, left_s)
        if found.chunk or any(b.kind != FILL for b in self.blocks.queue):
            return False
        self.blocks.give_up()  # FILLs hold no memory
        return True

    def _granted(self, grant: m.ChunkMap) -> int:
        if self._chunk_id and grant.chunk != self._chunk_id:
            if self._acked:
                log.error("chunk replaced while written", chunk=self._name(), by=grant.chunk)
                return EIO
            self.filled_to = 0
        self._chunk_id = grant.chunk
        self.grant = grant
        self.granted_at = time.monotonic()
        self.yielding = False
        good = CHUNK_SIZE if grant.fresh else _within(grant.length - self.base)
        self.filled_to = max(self.filled_to, good)  # a fresh chunk is zeros where it is not ours
        self.file.granted(self, grant.length)
        return 0

    async def relock(self, stale: dict[int, int]) -> bool:
        """The lock was lost before the commit: get it again. True if the data is still there.

        `stale`: chunk -> the lock that was refused.
        """
        if self._obtaining is not None:
            await asyncio.wait([self._obtaining])
        if self.grant is not None and stale.get(self.grant.chunk) != self.grant.lock:
            return True  # it has a new grant already
        self._drop_stream()
        self.grant = None
        if not self.dirty:
            self.pump()
            return True
        self._obtaining = asyncio.current_task()
        error = await self._ask_until([], time.monotonic() + self.file.context.timeout_s)
        self._obtaining = None
        if error:
            self.fail(error)
        return not error

    def unlocked(self) -> None:
        """The commit ended the grant."""
        if self._stream is not None:
            self.file.context.links.give_back(self._stream)
            self._stream = None
        if self.yielding:
            self._not_before = time.monotonic() + YIELD_S
        self.grant = None
        self.paused = self.yielding = False
        self._acked = False
        self._chunk_id = 0
        self.filled_to = self.acked_to = 0
        self.pump()

    def fail(self, error: int) -> None:
        """Give up what is not acknowledged. The file remembers `error`, an errno."""
        self._drop_stream()
        self._faults, self._deadline = 0, 0.0
        self.file.failed(self, error, self.blocks.give_up())

    def _name(self) -> str:
        if self._chunk_id:
            return f"{self._chunk_id:016X}"
        return f"inode {self.file.inode}:{self.index}"


def _within(offset: int) -> int:
    return max(0, min(CHUNK_SIZE, offset))


def _pause(turn: int) -> float:
    return _PAUSES_S[turn] if turn < len(_PAUSES_S) else _PAUSE_MAX_S
