"""A blocking client of write chains, as the tests of the chunkserver need it.

    with ChainWriter(pool, copies) as writer:                   # copies: the chain, head first
        writer.write(grant, offset, piece)                      # returns before the acknowledgement
        writer.sync(grant)
        writer.drain()                                          # all acknowledged, or ChainError

Acknowledgements are collected by `write`, `zero`, `sync`, `poll` and `drain` themselves.
"""

import select
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Protocol

from raftfs.client.chunk import TIMEOUT_S, ChunkPool, Connection, reason
from raftfs.const import MIB
from raftfs.errors import LinkError, RaftfsError, ReplyError, Status
from raftfs.wire import frame
from raftfs.wire import messages as m

SYNC_TIMEOUT_S = 30.0
WINDOW_FRAMES = 16
WINDOW_BYTES = 16 * MIB


class Grant(Protocol):
    """What a writer needs to know of a grant: `messages.ChunkMap` has it."""

    @property
    def chunk(self) -> int:
        """The chunk's id."""

    @property
    def version(self) -> int:
        """The version of the copies."""

    @property
    def lock(self) -> int:
        """The grant's token."""

    @property
    def fresh(self) -> bool:
        """Whether copies are made by the first write."""

    @property
    def ticket(self) -> bytes:
        """What the servers want to see."""


class ChainError(RaftfsError):
    """A write failed: `status`, the server at fault (UUID, `failed`), the ids not acknowledged."""

    def __init__(self, status: int, failed: bytes, unacked: list[int], reason: str) -> None:
        self.status, self.failed, self.unacked = status, failed, unacked
        super().__init__(reason)


class _Sent:
    """A request that was not acknowledged yet."""

    __slots__ = ("deadline", "id", "size")

    def __init__(self, ident: int, size: int, deadline: float) -> None:
        self.id, self.size, self.deadline = ident, size, deadline


class ChainWriter:
    """Pipelined writes through a chain; see the module."""

    def __init__(
        self,
        pool: ChunkPool,
        copies: Sequence[m.Hop | m.Location],
        *,
        on_ack: Callable[[int], None] | None = None,
        window: int = WINDOW_FRAMES,
        window_bytes: int = WINDOW_BYTES,
        timeout_s: float = TIMEOUT_S,
        sync_timeout_s: float = SYNC_TIMEOUT_S,
    ) -> None:
        """ChainError if the head cannot be reached."""
        self._pool = pool
        self._head = copies[0].server
        self._chain = [m.Hop(c.server, c.host, c.port) for c in copies[1:]]
        self._on_ack = on_ack
        self._window, self._window_bytes = window, window_bytes
        self._timeout_s, self._sync_timeout_s = timeout_s, sync_timeout_s
        self._next_id = 0
        self._sent: OrderedDict[int, _Sent] = OrderedDict()
        self._sent_bytes = 0
        self._connection: Connection | None = None
        try:
            self._connection = pool.take((copies[0].host, copies[0].port))
        except LinkError as e:
            raise ChainError(Status.CHAIN_BROKEN, self._head, [], str(e)) from e
        self._poll = select.poll()
        self._poll.register(self._connection.sock, select.POLLIN)

    def __enter__(self) -> "ChainWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()

    # --- requests; each gives its id, which is unique in this writer

    def write(self, grant: Grant, offset: int, data: frame.Buffer) -> int:
        """Send `data`, at most DATA_PAYLOAD_MAX, for `offset` of the chunk. ChainError."""
        self._next_id += 1
        head = m.WriteData(
            self._next_id, grant.chunk, grant.version, grant.lock, grant.fresh, offset,
            frame.piece_crcs(offset, data), self._chain, grant.ticket,
        )  # fmt: skip
        return self._submit(head, data, self._timeout_s)

    def zero(self, grant: Grant, offset: int, length: int) -> int:
        """Have a range read as zeros. ChainError."""
        self._next_id += 1
        head = m.ZeroData(
            self._next_id, grant.chunk, grant.version, grant.lock, grant.fresh, offset, length,
            self._chain, grant.ticket,
        )  # fmt: skip
        return self._submit(head, b"", self._timeout_s)

    def sync(self, grant: Grant) -> int:
        """Have everything before it on the disks of all copies. ChainError."""
        self._next_id += 1
        head = m.SyncData(self._next_id, grant.chunk, grant.version, self._chain, grant.ticket)
        return self._submit(head, b"", self._sync_timeout_s)

    def _submit(self, head: Any, payload: frame.Buffer, timeout_s: float) -> int:
        self.poll()
        size = len(payload)
        while self._sent and (
            len(self._sent) >= self._window or self._sent_bytes + size > self._window_bytes
        ):
            self._collect()
        connection = self._usable()
        # What is behind a sync waits for the sync.
        before = max((s.deadline for s in self._sent.values()), default=0.0)
        sent = _Sent(head.id, size, max(before, time.monotonic() + timeout_s))
        self._sent[head.id] = sent
        self._sent_bytes += size
        connection.limit(self._timeout_s)
        try:
            frame.send_data(connection.sock, head, payload)
        except OSError as e:
            # The server may have said why before it hung up.
            self._drain_after_failure()
            raise self._broken(b"" if connection.reused else self._head, reason(e)) from e
        return sent.id

    # --- acknowledgements

    @property
    def unacked(self) -> list[int]:
        """Ids that were sent and not acknowledged, oldest first."""
        return list(self._sent)

    def poll(self, timeout_s: float = 0.0) -> None:
        """Collect what has been acknowledged, waiting at most so long for the first. ChainError."""
        while self._sent and self._readable(timeout_s):
            self._collect()
            timeout_s = 0.0

    def drain(self) -> None:
        """Return when everything is acknowledged. ChainError."""
        while self._sent:
            self._collect()

    def _usable(self) -> Connection:
        if self._connection is None:
            raise ChainError(Status.CHAIN_BROKEN, b"", self.unacked, "the writer is closed")
        return self._connection

    def _readable(self, timeout_s: float) -> bool:
        self._usable()
        return bool(self._poll.poll(timeout_s * 1000))

    def _collect(self) -> None:
        """Wait for one acknowledgement."""
        connection = self._usable()
        oldest = next(iter(self._sent.values()))
        left_s = oldest.deadline - time.monotonic()
        if not self._readable(max(0.0, left_s)):
            raise self._broken(self._head, "no acknowledgement in time")
        try:
            reply, _ = frame.recv_data(connection.sock, m.DataReply)
        except (OSError, EOFError, frame.FrameError) as e:
            # A kept connection may just have been too old for the server: that proves nothing.
            raise self._broken(b"" if connection.reused else self._head, reason(e)) from e
        connection.reused = False
        self._acknowledged(reply)

    def _acknowledged(self, reply: m.DataReply) -> None:
        if reply.status:
            failed = reply.failed or self._head
            reason = str(ReplyError(reply.status))
            self._hang_up()
            raise ChainError(reply.status, failed, self.unacked, reason)
        sent = self._sent.pop(reply.id, None)
        if sent is not None:
            self._sent_bytes -= sent.size
            if self._on_ack is not None:
                self._on_ack(reply.id)

    def _drain_after_failure(self) -> None:
        connection = self._connection
        try:
            while self._sent and connection is not None and self._poll.poll(0):
                self._acknowledged(frame.recv_data(connection.sock, m.DataReply)[0])
        except (OSError, EOFError, frame.FrameError):
            return  # it said nothing

    def _broken(self, failed: bytes, reason: str) -> ChainError:
        self._hang_up()
        return ChainError(Status.CHAIN_BROKEN, failed, self.unacked, reason)

    def _hang_up(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def close(self) -> None:
        """Give the connection back, or hang up if something is unacknowledged. Safe to repeat."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if self._sent:
            connection.close()
        else:
            self._pool.give_back(connection)
