"""The data port: a thread per connection with blocking sockets, and the write chain.

A write is forwarded to the next server before it is done here, so the servers of a chain work at
the same time. It is acknowledged when this copy and everything downstream have it; who failed is
named. Each connection has at most one downstream connection per next server, with a thread that
collects its acknowledgements.

Threads: `accept`, one per connection, one per downstream connection. All end with their socket.
"""

import contextlib
import errno
import select
import socket
import threading
import time
from typing import Any

import structlog
from msgspec.structs import replace

from raftfs.chunk.store import ChunkStore
from raftfs.const import DATA_PAYLOAD_MAX
from raftfs.errors import ReplyError, Status, UserError
from raftfs.wire import frame
from raftfs.wire.messages import (
    DataReply,
    DataRequest,
    Hop,
    ListBlocks,
    ReadData,
    SyncData,
    WriteData,
    ZeroData,
)

log = structlog.get_logger("raftfs.data")

CONNECTIONS_MAX = 1_024
CHAIN_TIMEOUT_S = 1.8  # the last server of a chain has so long to answer
_HOP_MORE_S = 0.12  # each server before it waits longer: who stopped is named, not the messenger
_REST_S = 1.0  # a server that failed a request is not tried again for so long
_CONNECT_TIMEOUT_S = 1.0
_IDLE_S = 600.0
_REQUESTS: Any = DataRequest  # a union, which the checker does not take for a type
_ChainRequest = WriteData | ZeroData | SyncData


class DataServer:
    """Listens and serves until closed."""

    def __init__(self, store: ChunkStore, host: str, port: int) -> None:
        """UserError if the port cannot be had."""
        self._store = store
        try:
            self._listener = socket.create_server((host, port), backlog=256)
        except OSError as e:
            raise UserError(
                f"cannot listen on {host}:{port}: {e.strerror}; is another chunkserver running?"
            ) from None
        self.port: int = self._listener.getsockname()[1]
        self._connections: set[Connection] = set()
        self._lock = threading.Lock()
        self._closing = False
        threading.Thread(target=self._accept, name="accept", daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                sock, peer = self._listener.accept()
            except OSError:
                return  # closed
            with self._lock:
                full = len(self._connections) >= CONNECTIONS_MAX
            if full or self._closing:
                log.warning("connection refused", peer=peer[0], limit=CONNECTIONS_MAX)
                sock.close()
                continue
            connection = Connection(self._store, sock)
            with self._lock:
                self._connections.add(connection)
            threading.Thread(
                target=self._serve, args=(connection,), name=f"data-{peer[1]}", daemon=True
            ).start()

    def _serve(self, connection: "Connection") -> None:
        try:
            connection.run()
        finally:
            with self._lock:
                self._connections.discard(connection)

    def close(self) -> None:
        """Stop listening, end every connection."""
        self._closing = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.close()


class Connection:
    """One client (or upstream server)."""

    def __init__(self, store: ChunkStore, sock: socket.socket) -> None:
        self._store = store
        self._sock = sock
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(_IDLE_S)
        self._send_lock = threading.Lock()
        self._down: dict[tuple[str, int], Downstream] = {}

    def run(self) -> None:
        """Serve until the other side closes or misbehaves."""
        buffer = memoryview(bytearray(DATA_PAYLOAD_MAX))
        try:
            while True:
                head: Any
                head, payload = frame.recv_data(self._sock, _REQUESTS, buffer)
                self._serve(head, payload)
        except (EOFError, OSError):
            pass  # the other side is gone, which is how connections end
        except frame.FrameError as e:
            log.warning("connection ended", reason=str(e))
        finally:
            self.close()

    def close(self) -> None:
        """End this connection and its downstream ones."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        for down in list(self._down.values()):
            down.close()

    def reply(self, head: DataReply, payload: Any = b"") -> None:
        """Send an answer; from the connection's thread and the downstream ones."""
        with self._send_lock, contextlib.suppress(OSError):
            frame.send_data(self._sock, head, payload)

    def _serve(self, head: Any, payload: memoryview) -> None:
        if isinstance(head, ReadData | ListBlocks):
            self._read(head)
            return
        down = self._forward(head, payload) if head.chain else None
        status = self._do(head, payload)
        failed = self._store.server if status else b""
        if down is None:
            self.reply(DataReply(head.id, status, failed))
        else:
            down.local_done(head.id, status, failed)

    def _read(self, head: ReadData | ListBlocks) -> None:
        try:
            if isinstance(head, ListBlocks):
                self.reply(DataReply(head.id, 0), self._store.blocks(head.chunk, head.version))
                return
            if not 0 <= head.length <= DATA_PAYLOAD_MAX or head.offset < 0:
                raise ReplyError(errno.EINVAL)
            data, crcs = self._store.read(head.chunk, head.version, head.offset, head.length)
            self.reply(DataReply(head.id, 0, b"", tuple(crcs)), data)
        except (ReplyError, OSError) as e:
            self.reply(DataReply(head.id, self._status(head, e), self._store.server))

    def _do(self, head: _ChainRequest, payload: memoryview) -> int:
        store = self._store
        try:
            if isinstance(head, WriteData):
                store.write(head.chunk, head.version, head.lock, head.create, head.offset,
                            payload, head.crcs)  # fmt: skip
            elif isinstance(head, ZeroData):
                store.zero(head.chunk, head.version, head.lock, head.create, head.offset,
                           head.length)  # fmt: skip
            else:
                store.sync(head.chunk, head.version)
        except (ReplyError, OSError) as e:
            return self._status(head, e)
        return 0

    def _status(self, head: Any, error: ReplyError | OSError) -> int:
        if isinstance(error, ReplyError):
            return error.status
        log.error("disk error", chunk=f"{head.chunk:016X}", reason=str(error))
        return errno.ENOSPC if error.errno == errno.ENOSPC else Status.DISK_ERROR

    def _forward(self, head: _ChainRequest, payload: memoryview) -> "Downstream":
        hop = head.chain[0]
        down = self._down.get((hop.host, hop.port))
        if down is None or (down.broken and time.monotonic() >= down.rest_until):
            down = self._down[hop.host, hop.port] = Downstream(self, hop)
        down.forward(head, payload)
        return down


class Downstream:
    """The connection to the next server of a chain, and what it has not acknowledged yet."""

    def __init__(self, up: Connection, hop: Hop) -> None:
        self._up = up
        self._hop = hop
        self._lock = threading.Lock()
        # id -> the answer of one side, once it is known: None while neither is.
        self._waiting: dict[int, DataReply | None] = {}
        # id -> when the next server must have answered, the oldest request first.
        self._due: dict[int, float] = {}
        self.broken = False
        self.rest_until = 0.0
        self._sock: socket.socket | None = None
        try:
            self._sock = socket.create_connection((hop.host, hop.port), _CONNECT_TIMEOUT_S)
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sock.settimeout(CHAIN_TIMEOUT_S)
            self._poll = select.poll()
            self._poll.register(self._sock, select.POLLIN)
            threading.Thread(target=self._collect, name="chain", daemon=True).start()
        except OSError as e:
            self._break(str(e))

    def forward(self, head: _ChainRequest, payload: memoryview) -> None:
        """Pass a request on, without the hop that it goes to."""
        with self._lock:
            self._waiting[head.id] = None
            if self.broken:
                self._waiting[head.id] = self._failure(head.id)
                return
            limit = CHAIN_TIMEOUT_S + _HOP_MORE_S * (len(head.chain) - 1)
            self._due[head.id] = time.monotonic() + limit
        passed = _without_first_hop(head)
        try:
            assert self._sock is not None
            frame.send_data(self._sock, passed, payload)
        except OSError as e:
            self._break(str(e))

    def _failure(self, ident: int) -> DataReply:
        return DataReply(ident, Status.CHAIN_BROKEN, self._hop.server)

    def local_done(self, ident: int, status: int, failed: bytes) -> None:
        """This server's own part is done."""
        self._one_side(ident, DataReply(ident, status, failed))

    def _one_side(self, ident: int, answer: DataReply) -> None:
        """Of the two sides the second to answer sends the reply: the first failure, if any."""
        with self._lock:
            if ident not in self._waiting:
                return
            other = self._waiting[ident]
            if other is None:
                self._waiting[ident] = answer
                return
            del self._waiting[ident]
        self._up.reply(other if other.status else answer)

    def _collect(self) -> None:
        assert self._sock is not None
        try:
            while True:
                if not self._poll.poll(1000 * self._patience()):
                    if self._sock.fileno() < 0:
                        raise EOFError
                    continue  # nothing is due: an idle connection is no broken one
                answer, _ = frame.recv_data(self._sock, DataReply)
                with self._lock:
                    self._due.pop(answer.id, None)
                self._one_side(answer.id, answer)
        except (OSError, EOFError, frame.FrameError) as e:
            self._break(str(e) or "closed")

    def _patience(self) -> float:
        """Seconds until an answer may be overdue. TimeoutError if one is."""
        with self._lock:
            if not self._due:
                return CHAIN_TIMEOUT_S  # no request that comes meanwhile is due earlier
            left = next(iter(self._due.values())) - time.monotonic()
        if left <= 0:
            raise TimeoutError("no answer in time")
        return left

    def _break(self, reason: str) -> None:
        """Everything that waits for this server has failed because of it."""
        with self._lock:
            if self.broken:
                return
            self.broken = True
            if self._due or self._sock is None:
                self.rest_until = time.monotonic() + _REST_S
            half = [i for i, a in self._waiting.items() if a is None]
            ready = [(i, a) for i, a in self._waiting.items() if a is not None]
            for ident in half:
                self._waiting[ident] = self._failure(ident)
            for ident, _ in ready:
                del self._waiting[ident]
        if half or ready:
            log.warning("chain broken", server=self._hop.server.hex(), reason=reason,
                        address=f"{self._hop.host}:{self._hop.port}")  # fmt: skip
        for ident, answer in ready:
            self._up.reply(answer if answer.status else self._failure(ident))
        self.close()

    def close(self) -> None:
        """Give the socket back."""
        if self._sock is not None:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
            self._sock.close()


def _without_first_hop(head: _ChainRequest) -> _ChainRequest:
    return replace(head, chain=head.chain[1:])
