"""The data port: a thread per connection with blocking sockets (see `chain.py` for write chains).

A request is passed on to the next server before it is done here, so the servers of a chain work at
the same time. Requests of one connection are done in order; ids are the client's and mean something
on its connection only.

Threads: `accept`, one per connection, one per downstream connection, `chain-clock`. They end with
their sockets.
"""

import contextlib
import os
import socket
import threading
import time
from typing import Any

import structlog

from raftfs.chunk.chain import ChainClock, ChainRequest, Downstream, forwardable
from raftfs.chunk.store import READ_BUFFER, ChunkStore
from raftfs.chunk.tickets import TicketGate
from raftfs.client.chunk import set_timeouts
from raftfs.const import DATA_PAYLOAD_MAX, GOAL_MAX
from raftfs.errors import ReplyError, UserError
from raftfs.wire import frame
from raftfs.wire.messages import (
    DataReply,
    DataRequest,
    Hop,
    ListBlocks,
    ReadData,
    WriteData,
    ZeroData,
)

log = structlog.get_logger("raftfs.data")

CONNECTIONS_MAX = 1_024  # threads; more clients than one server could serve at once anyway
_IDLE_S = 600.0  # a client that said nothing for so long is gone
_SEND_S = 30.0  # a client that does not read for so long is gone
_HOP_RETRY_S = 1.0  # a server that just broke the chain fails it at once for so long
_HOPS_MAX = 4 * GOAL_MAX  # downstream connections of one upstream one
_JOIN_S = 5.0


class DataServer:
    """Listens and serves until closed."""

    def __init__(
        self,
        store: ChunkStore,
        host: str,
        port: int,
        tickets: TicketGate,
        *,
        connections_max: int = CONNECTIONS_MAX,
    ) -> None:
        """UserError if the port cannot be had."""
        self._store = store
        self._tickets = tickets
        self._connections_max = connections_max
        try:
            self._listener = socket.create_server((host, port), backlog=256)
        except (OSError, OverflowError) as e:
            number = e.errno if isinstance(e, OSError) else None
            reason = os.strerror(number) if number and number > 0 else str(e)
            raise UserError(
                f"cannot listen on {host}:{port}: {reason}; is another chunkserver running? "
                "Stop that one, or choose another --listen or --port"
            ) from None
        self.port: int = self._listener.getsockname()[1]
        self.clock = ChainClock()
        self._connections: dict[Connection, threading.Thread] = {}
        self._lock = threading.Lock()
        self._closing = False
        self._refused_at = 0.0
        threading.Thread(target=self._accept, name="accept", daemon=True).start()

    def _accept(self) -> None:
        while not self._closing:
            try:
                sock, peer = self._listener.accept()
            except OSError as e:
                if not self._closing:  # out of descriptors or memory: that passes
                    log.error("accept failed", reason=str(e))
                    time.sleep(0.2)
                continue
            with self._lock:
                full = len(self._connections) >= self._connections_max
            if full or self._closing:
                self._refuse(peer[0])
                sock.close()
                continue
            connection = Connection(self._store, sock, self.clock, self._tickets, peer[0])
            thread = threading.Thread(
                target=self._serve, args=(connection,), name=f"data-{peer[1]}", daemon=True
            )
            with self._lock:
                self._connections[connection] = thread
            thread.start()

    def _refuse(self, peer: str) -> None:
        now = time.monotonic()
        if now - self._refused_at > 1.0:  # one line a second tells enough
            self._refused_at = now
            log.warning("connection refused", peer=peer, limit=self._connections_max)

    def _serve(self, connection: "Connection") -> None:
        try:
            connection.run()
        except Exception as e:
            log.error("connection thread failed", exc_info=e)
            raise
        finally:
            with self._lock:
                self._connections.pop(connection, None)

    def close(self) -> None:
        """Stop listening, end every connection and wait for what it is doing."""
        self._closing = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            connections = dict(self._connections)
        for connection in connections:
            connection.hang_up()
        deadline = time.monotonic() + _JOIN_S
        for thread in connections.values():
            thread.join(max(0.0, deadline - time.monotonic()))
        self.clock.close()


class Connection:
    """One client (or upstream server)."""

    def __init__(
        self, store: ChunkStore, sock: socket.socket, clock: ChainClock, tickets: TicketGate,
        peer: str,
    ) -> None:  # fmt: skip
        self._store = store
        self._tickets, self._peer = tickets, peer
        self._sock = sock
        self._clock = clock
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(None)
        set_timeouts(sock, _IDLE_S, _SEND_S)
        self._send_lock = threading.Lock()
        self._down: dict[tuple[bytes, str, int], Downstream] = {}
        self._read_buffer: memoryview | None = None

    def run(self) -> None:
        """Serve until the other side closes, falls silent or misbehaves."""
        buffer = memoryview(bytearray(DATA_PAYLOAD_MAX))
        kind: Any = DataRequest
        try:
            while True:
                head, payload = frame.recv_data(self._sock, kind, buffer)
                self._serve(head, payload)
        except (EOFError, OSError):
            pass  # the other side is gone, which is how connections end
        except frame.FrameError as e:
            log.warning("connection ended", reason=str(e))
        finally:
            self.hang_up()
            for down in self._down.values():
                down.dispose()
            with self._send_lock:  # nobody is in a call on it any more
                self._sock.close()

    def hang_up(self) -> None:
        """End this connection and its downstream ones; `run` returns soon."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        for down in list(self._down.values()):
            down.hang_up()

    def reply(self, head: DataReply, payload: frame.Buffer = b"") -> None:
        """Send an answer; from the connection's thread and the downstream ones."""
        with self._send_lock:
            try:
                frame.send_data(self._sock, head, payload)
            except OSError:
                # Half a frame may be out: nothing more can be said. `run` finds the socket shut.
                with contextlib.suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)

    def _serve(self, head: Any, payload: memoryview) -> None:
        try:
            self._tickets.check(head, self._peer)
        except ReplyError as e:
            self.reply(DataReply(head.id, e.status, self._store.server))
            return
        if isinstance(head, ReadData | ListBlocks):
            self._read(head)
            return
        down = None
        if forwardable(head):
            if len(head.chain) >= GOAL_MAX:
                raise frame.FrameError(f"a chain of {len(head.chain)} more servers")
            down = self._downstream(head.chain[0])
            down.forward(head, payload)
        status = self._do(head, payload)
        failed = self._store.server if status else b""
        if down is None:
            self.reply(DataReply(head.id, status, failed))
        else:
            down.local_done(head.id, status, failed)

    def _downstream(self, hop: Hop) -> Downstream:
        address = (hop.server, hop.host, hop.port)
        down = self._down.get(address)
        if down is not None and down.broken_at is not None:
            if time.monotonic() - down.broken_at < _HOP_RETRY_S:
                return down  # answers CHAIN_BROKEN; whoever writes on has not heard it yet
            down.dispose()
            down = None
        if down is None:
            self._make_room()
            down = self._down[address] = Downstream(hop, self.reply, self._clock)
        return down

    def _make_room(self) -> None:
        """Hang up on servers that owe nothing, when there are many."""
        if len(self._down) < _HOPS_MAX:
            return
        for address, down in list(self._down.items()):
            if down.oldest_deadline() is None:
                del self._down[address]
                down.dispose()

    def _read(self, head: ReadData | ListBlocks) -> None:
        store = self._store
        try:
            if isinstance(head, ListBlocks):
                self.reply(DataReply(head.id, 0), store.block_list(head.chunk, head.version))
                return
            if self._read_buffer is None:
                self._read_buffer = memoryview(bytearray(READ_BUFFER))
            data, crcs = store.read(
                head.chunk, head.version, head.offset, head.length, self._read_buffer
            )
        except ReplyError as e:
            self.reply(DataReply(head.id, e.status, store.server))
            return
        self.reply(DataReply(head.id, 0, b"", tuple(crcs)), data)

    def _do(self, head: ChainRequest, payload: memoryview) -> int:
        """This server's own part; 0 or a status."""
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
        except ReplyError as e:
            return e.status
        return 0
