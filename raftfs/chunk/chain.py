"""The write chain: what one connection passes on to the next server, and what comes back.

Each upstream connection has one downstream connection per next server, made when first needed. A
request is registered here, passed on, and then done locally; whichever of the two sides answers
second has the reply sent: success only if both succeeded, else the failure, which names the server
at fault.

How long a server waits for the next one grows with the number of servers behind it, so that of a
chain with a stopped server its direct predecessor gives up first, and names it, before those
further up lose patience with the predecessor. The time includes sending, because a stopped server
does not read; a single thread (`ChainClock`) watches all of it and breaks what is overdue.
"""

import contextlib
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import structlog
from msgspec.structs import replace

from raftfs.client.chunk import set_timeouts
from raftfs.errors import Status
from raftfs.wire import frame
from raftfs.wire.messages import DataReply, Hop, SyncData, WriteData, ZeroData

log = structlog.get_logger("raftfs.chain")

ChainRequest = WriteData | ZeroData | SyncData
Reply = Callable[[DataReply], None]

ACK_LIMIT_S = 2.0  # a stopped server delays a writer by less than this, however long the chain
SYNC_EXTRA_S = 10.0  # a healthy disk may have much to write
PENDING_MAX = 4_096  # requests passed on and not acknowledged; far more than any client's window
_TICK_S = 0.05
_JOIN_S = 5.0


def ack_timeout_s(hops: int) -> float:
    """How long to wait for the next server when it and those behind it are `hops` (at least 1).

    1.0 s, 1.5 s, 1.67 s ...: always less than for one hop more, and less than ACK_LIMIT_S.
    """
    return ACK_LIMIT_S - 1.0 / hops


class ChainClock:
    """One thread that breaks downstream connections with an overdue request. Sleeps when idle."""

    def __init__(self) -> None:
        self._links: set[Downstream] = set()
        self._lock = threading.Lock()
        self._busy = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="chain-clock", daemon=True)
        self._thread.start()

    def add(self, link: "Downstream") -> None:
        """Watch it until `remove`."""
        with self._lock:
            self._links.add(link)

    def remove(self, link: "Downstream") -> None:
        """It is closed."""
        with self._lock:
            self._links.discard(link)

    def wake(self) -> None:
        """Something is pending now."""
        if not self._busy.is_set():
            self._busy.set()

    def close(self) -> None:
        """End the thread."""
        self._closing = True
        self._busy.set()
        self._thread.join(1.0)

    def _run(self) -> None:
        while not self._closing:
            self._busy.wait()
            time.sleep(_TICK_S)
            self._busy.clear()  # before looking: what comes from here on sets it again
            with self._lock:
                links = list(self._links)
            now = time.monotonic()
            for link in links:
                deadline = link.oldest_deadline()
                if deadline is not None:
                    self._busy.set()
                    if deadline < now:
                        link.give_up("no acknowledgement in time")


class _Pending:
    """A request of which neither side, or one, has answered."""

    __slots__ = ("answer", "deadline")

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.answer: DataReply | None = None


class Downstream:
    """The connection to the next server of a chain, and what it has not acknowledged yet.

    `forward` and `local_done` are called by the upstream connection's thread, in this order for
    each request; everything else by any thread.
    """

    def __init__(self, hop: Hop, reply: Reply, clock: ChainClock) -> None:
        """Never raises: a server that cannot be reached is a broken link."""
        self._hop = hop
        self._reply = reply
        self._clock = clock
        self._lock = threading.Lock()
        self._pending: OrderedDict[int, _Pending] = OrderedDict()
        self._hops = 0
        self._sock: socket.socket | None = None
        self._collector: threading.Thread | None = None
        self.broken_at: float | None = None

    def _connect(self, hops: int) -> socket.socket:
        sock = socket.create_connection((self._hop.host, self._hop.port), ack_timeout_s(hops))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(None)
        with self._lock:
            self._sock = sock
        self._clock.add(self)
        self._collector = threading.Thread(
            target=self._collect, args=(sock,), name="chain", daemon=True
        )
        self._collector.start()
        return sock

    def forward(self, head: ChainRequest, payload: frame.Buffer) -> None:
        """Pass a request on, without the hop that it goes to."""
        hops = len(head.chain)
        limit_s = ack_timeout_s(hops) + (SYNC_EXTRA_S * hops if isinstance(head, SyncData) else 0.0)
        with self._lock:
            if head.id in self._pending or len(self._pending) >= PENDING_MAX:
                raise frame.FrameError("request ids are used twice, or too many are in flight")
            # Acknowledgements come in order: what is behind a sync waits for the sync.
            last = next(reversed(self._pending.values())).deadline if self._pending else 0.0
            pending = _Pending(max(last, time.monotonic() + limit_s))
            self._pending[head.id] = pending
            if self.broken_at is not None:
                pending.answer = self._failure(head.id)
                return
        self._clock.wake()
        try:
            sock = self._sock or self._connect(hops)
            if hops != self._hops:
                self._hops = hops
                set_timeouts(sock, 0.0, ack_timeout_s(hops))
            frame.send_data(sock, replace(head, chain=head.chain[1:]), payload)
        except OSError as e:
            slow = isinstance(e, BlockingIOError | TimeoutError)
            self.give_up("it does not read" if slow else e.strerror or str(e))

    def local_done(self, ident: int, status: int, failed: bytes) -> None:
        """This server's own part is done."""
        self._answered(DataReply(ident, status, failed))

    def _failure(self, ident: int) -> DataReply:
        return DataReply(ident, Status.CHAIN_BROKEN, self._hop.server)

    def _answered(self, answer: DataReply) -> None:
        """Of the two sides the second to answer sends the reply: the first failure, if any."""
        with self._lock:
            pending = self._pending.get(answer.id)
            if pending is None:
                return
            first = pending.answer
            if first is None:
                pending.answer = answer
                return
            del self._pending[answer.id]
        self._reply(first if first.status else answer)

    def _collect(self, sock: socket.socket) -> None:
        try:
            while True:
                answer, _ = frame.recv_data(sock, DataReply)
                self._answered(answer)
        except (OSError, EOFError, frame.FrameError) as e:
            self.give_up(str(e) or type(e).__name__)

    def oldest_deadline(self) -> float | None:
        """When the first pending request is overdue; None if the next server owes nothing."""
        with self._lock:
            if self.broken_at is not None or not self._pending:
                return None
            return next(iter(self._pending.values())).deadline

    def give_up(self, reason: str) -> None:
        """Everything that waits for this server has failed because of it."""
        with self._lock:
            if self.broken_at is not None:
                return
            self.broken_at = time.monotonic()
            locally_done = []
            for ident, pending in list(self._pending.items()):
                if pending.answer is None:
                    pending.answer = self._failure(ident)
                else:
                    del self._pending[ident]
                    locally_done.append((ident, pending.answer))
            owed = len(self._pending) + len(locally_done)
        if owed:
            log.warning("chain broken", server=self._hop.server.hex(), reason=reason, requests=owed,
                        address=f"{self._hop.host}:{self._hop.port}")  # fmt: skip
        for ident, answer in locally_done:
            self._reply(answer if answer.status else self._failure(ident))
        self.hang_up()

    def hang_up(self) -> None:
        """End the conversation; whoever is in a call on the socket returns."""
        with self._lock:
            if self._sock is not None:
                with contextlib.suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)

    def dispose(self) -> None:
        """Give the descriptor back; by the upstream thread. Only when nobody is in a call on it:
        its number may be another file's at once.
        """
        self.hang_up()
        self._clock.remove(self)
        if self._collector is not None:
            self._collector.join(_JOIN_S)
        with self._lock:
            sock, self._sock = self._sock, None
            if self.broken_at is None:
                self.broken_at = time.monotonic()
        if sock is not None and not (self._collector and self._collector.is_alive()):
            sock.close()


def forwardable(head: Any) -> bool:
    """Whether the request goes on to another server."""
    return isinstance(head, WriteData | ZeroData | SyncData) and bool(head.chain)
