"""Collects the commands of one loop turn into one entry of the Raft log.

Used on the leader only. Group commit lives here: whatever arrives while the loop works through one
turn shares one entry, one fdatasync and one round trip.
"""

import asyncio
import time
from collections.abc import Callable

import structlog

from raftfs.const import BATCH_BYTES_MAX, BATCH_COMMANDS_MAX
from raftfs.errors import NotLeader, OutcomeUnknown, ReplyError, Status
from raftfs.meta.raft.replica import Replica
from raftfs.meta.state.apply import Applied
from raftfs.wire.ops import Batch, Command, Op, Result, encode_batch

log = structlog.get_logger("raftfs.proposer")

PROPOSALS_MAX = 10_000  # commands waiting for their commit; more are answered BUSY



class Proposer:
    """Turns operations into committed results."""

    def __init__(self, replica: Replica, now_ns: Callable[[], int] = time.time_ns) -> None:
        self._replica = replica
        self._now_ns = now_ns
        self._last_ns = 0
        self._queue: list[tuple[Command, asyncio.Future[Result]]] = []
        self._in_flight = 0

    def propose(self, session: int, seq: int, op: Op) -> "asyncio.Future[Result]":
        """Commit `op`. The future gives apply's Result, whatever its status.

        ReplyError NOT_LEADER: it was not proposed. UNKNOWN: it was, and leadership was lost.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        if self._in_flight + len(self._queue) >= PROPOSALS_MAX:
            future.set_exception(ReplyError(Status.BUSY))
            return future
        if not self._queue:
            loop.call_soon(self._flush)
        self._queue.append((Command(session, seq, op), future))
        return future

    async def commit(self, op: Op, session: int = 0, seq: int = 0) -> bytes:
        """As `propose`, but a status other than 0 is raised as ReplyError; gives the value."""
        result = await self.propose(session, seq, op)
        if result.status:
            raise ReplyError(result.status, result.value)
        return result.value

    def _flush(self) -> None:
        queue, self._queue = self._queue, []
        for start in range(0, len(queue), BATCH_COMMANDS_MAX):
            self._submit(queue[start : start + BATCH_COMMANDS_MAX])

    def _submit(self, part: list[tuple[Command, "asyncio.Future[Result]"]]) -> None:
        # The clock may step back; the log's timestamps do not, as far as this leader can help it.
        self._last_ns = max(self._last_ns + 1, self._now_ns())
        data = encode_batch(Batch(self._last_ns, [command for command, _ in part]))
        if len(data) > BATCH_BYTES_MAX and len(part) > 1:
            middle = len(part) // 2
            self._submit(part[:middle])
            self._submit(part[middle:])
            return
        try:
            self._replica.propose(data, lambda applied, error: self._finished(part, applied, error))
        except NotLeader:
            _fail([f for _, f in part], ReplyError(Status.NOT_LEADER))
            return
        except ReplyError as e:  # BUSY: for a short while
            _fail([f for _, f in part], e)
            return
        self._in_flight += len(part)

    def _finished(
        self, part: list[tuple[Command, "asyncio.Future[Result]"]], applied: list[Applied],
        error: Exception | None,
    ) -> None:  # fmt: skip
        self._in_flight -= len(part)
        waiters = [f for _, f in part]
        if error is None:
            for waiter, one in zip(waiters, applied, strict=True):
                if not waiter.done():
                    waiter.set_result(one.result)
        elif isinstance(error, NotLeader):
            _fail(waiters, ReplyError(Status.NOT_LEADER))
        else:
            if not isinstance(error, OutcomeUnknown):
                log.error("submit failed", exc_info=error)
            _fail(waiters, ReplyError(Status.UNKNOWN))


def _fail(waiters: "list[asyncio.Future[Result]]", error: ReplyError) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_exception(error)
