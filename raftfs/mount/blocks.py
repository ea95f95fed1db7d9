"""What one chunk's writer has accepted: blocks that wait, blocks that are on the way.

    queue ──take──> sent ──acknowledged──> retired
      ^              │
      └── again ─────┘  (after a failure, in order)

Blocks are retired only from the left of `sent`, so that what is sent again after a failure is
everything from the first unacknowledged block on: a block never overwrites a later one.
"""

import asyncio
from collections import deque
from typing import Any

from raftfs.const import MIB

BLOCK = MIB  # blocks end at multiples of it
WRITE, FILL, SYNC = range(3)


class Block:
    """Something that must reach every copy, in the order of the queue.

    WRITE: `pieces` at `offset`. FILL: zeros from `offset` (-1: from wherever the chunk is good) to
    `end`. SYNC: everything before is on disk. `ident` is 0 until it was sent.
    """

    __slots__ = ("acked", "end", "ident", "kind", "offset", "pieces", "sealed", "serial")

    def __init__(self, kind: int, serial: int, offset: int = -1, end: int = 0) -> None:
        self.kind = kind
        self.serial = serial
        self.offset = offset
        self.end = end
        self.pieces: list[Any] = []
        self.sealed = kind != WRITE
        self.acked = False
        self.ident = 0

    @property
    def size(self) -> int:
        """Bytes of memory that it holds."""
        return self.end - self.offset if self.kind == WRITE else 0

    def payload(self) -> Any:
        """The bytes in one piece. May run in any thread."""
        if len(self.pieces) > 1:
            self.pieces = [b"".join(self.pieces)]
        return self.pieces[0]


class BlockQueue:
    """The blocks of one chunk. Serials count what was accepted; `retired` is the last one done."""

    def __init__(self) -> None:
        self.queue: deque[Block] = deque()
        self.sent: deque[Block] = deque()
        self.in_flight = 0  # bytes in `sent`
        self._accepted = 0
        self._retired = 0
        self._waiters: list[tuple[int, asyncio.Future[None]]] = []

    # --- taking in

    def write(self, offset: int, data: memoryview) -> None:
        """Accept bytes at `offset` of the chunk; adjacent ones are merged up to a BLOCK border."""
        while data:
            size = min(len(data), BLOCK - offset % BLOCK)
            piece, data = data[:size], data[size:]
            last = self.queue[-1] if self.queue else None
            if last is None or last.sealed or last.end != offset:
                last = self.append(WRITE, offset, offset)
            last.pieces.append(piece)
            last.end = offset = offset + size
            last.sealed = offset % BLOCK == 0

    def append(self, kind: int, offset: int, end: int) -> Block:
        """Accept a block; nothing is merged into the one before any more."""
        self.seal()
        self._accepted += 1
        block = Block(kind, self._accepted, offset, end)
        self.queue.append(block)
        return block

    def seal(self) -> None:
        """Merge no more into what waits: it may go out now."""
        if self.queue:
            self.queue[-1].sealed = True

    # --- on the way

    def take(self) -> Block | None:
        """The next block that may be sent, out of the queue."""
        if self.queue and self.queue[0].sealed:
            return self.queue.popleft()
        return None

    def put_sent(self, block: Block) -> None:
        """`block` is on its way."""
        self.sent.append(block)
        self.in_flight += block.size

    def acknowledged(self, ident: int) -> None:
        """Every copy has the block that was sent under `ident`."""
        for block in self.sent:
            if block.ident == ident:
                block.acked = True
                return

    def retire(self) -> list[Block]:
        """The blocks that are done: acknowledged, and so is everything before them."""
        done = []
        while self.sent and self.sent[0].acked:
            block = self.sent.popleft()
            self.in_flight -= block.size
            self._retired = max(self._retired, block.serial)
            done.append(block)
        return done

    def again(self) -> bool:
        """Everything unretired waits again. True if some of it had been acknowledged."""
        acked = any(b.acked and b.ident for b in self.sent)
        self.queue.extendleft(reversed(self.sent))
        self.sent.clear()
        self.in_flight = 0
        return acked

    def give_up(self) -> int:
        """Drop everything; the bytes of memory that it held. Waiters are woken."""
        held = sum(b.size for b in self.unretired())
        self.queue.clear()
        self.sent.clear()
        self.in_flight = 0
        self._retired = self._accepted
        self.wake()
        return held

    # --- looking

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing is outstanding."""
        return not self.queue and not self.sent

    def unretired(self) -> list[Block]:
        """Everything accepted and not retired, oldest first."""
        return [*self.sent, *self.queue]

    def overlaps(self, offset: int, end: int) -> bool:
        """Whether something that touches these bytes of the chunk is still under way."""
        return any(
            b.kind == FILL or (b.kind == WRITE and b.offset < end and offset < b.end)
            for b in self.unretired()
        )

    def drained(self) -> "asyncio.Future[None] | None":
        """Resolves when all that was accepted so far is retired or given up; None: it is."""
        if self._retired >= self._accepted:
            return None
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append((self._accepted, future))
        return future

    def wake(self) -> None:
        """Resolve what `drained` gave, as far as things have come."""
        if not self._waiters:
            return
        self._waiters, waiting = [], self._waiters
        for serial, future in waiting:
            if future.done():
                continue
            if serial <= self._retired:
                future.set_result(None)
            else:
                self._waiters.append((serial, future))
