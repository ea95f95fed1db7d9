"""The client's side of the data port for single requests: blocking sockets, for threads that wait.

    pool = ChunkPool()
    reader = ChunkReader(pool, (host, port), ticket=ticket)
    data = reader.read(chunk, version, offset, length)          # verified; ReplyError, LinkError

A `ChunkPool` keeps connections for whoever is next: chunks and files come and go without a
connect. A `ChunkReader` is an address and a ticket, and needs no closing. Both may be shared by
threads.
"""

import socket
import struct
import threading
import time
from collections import OrderedDict, deque
from typing import Any

from raftfs.errors import LinkError, ReplyError, Status
from raftfs.wire import frame
from raftfs.wire import messages as m

Address = tuple[str, int]

CONNECT_TIMEOUT_S = 1.0
TIMEOUT_S = 5.0  # longer than any server of a chain waits for the next one
IDLE_PER_SERVER_MAX = 8
IDLE_TOTAL_MAX = 256
IDLE_S = 60.0  # shorter than the server's own patience


class Connection:
    """A connected socket and how long its calls may take."""

    def __init__(self, address: Address) -> None:
        """OSError if the server cannot be reached within CONNECT_TIMEOUT_S."""
        self.address = address
        self.idle_since = 0.0
        self.reused = False  # kept from an earlier use: the server may have closed it meanwhile
        self.sock = dial(address)
        self._timeout_s = 0.0
        self.limit(TIMEOUT_S)

    def limit(self, timeout_s: float) -> None:
        """How long one system call on the socket may take (in the kernel: without extra calls)."""
        if timeout_s != self._timeout_s:
            self._timeout_s = timeout_s
            set_timeouts(self.sock, timeout_s, timeout_s)

    def alive(self) -> bool:
        """Whether an idle connection can be used, as far as is known here: the server has not hung
        up, and has not said anything that nobody asked for.
        """
        try:
            self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def close(self) -> None:
        """Hang up."""
        self.sock.close()


def dial(address: Address) -> socket.socket:
    """A blocking connection, made within CONNECT_TIMEOUT_S. OSError."""
    sock = socket.create_connection(address, CONNECT_TIMEOUT_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.settimeout(None)
    return sock


def set_timeouts(sock: socket.socket, receive_s: float, send_s: float) -> None:
    """Limits in the kernel; BlockingIOError when passed. The socket stays a blocking one."""
    for option, value in ((socket.SO_RCVTIMEO, receive_s), (socket.SO_SNDTIMEO, send_s)):
        packed = struct.pack("@ll", int(value), int(value % 1 * 1_000_000))
        sock.setsockopt(socket.SOL_SOCKET, option, packed)


class ChunkPool:
    """Connections that nobody uses just now, by server. Thread-safe, bounded."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: OrderedDict[Address, deque[Connection]] = OrderedDict()
        self._count = 0
        self._closed = False

    def take(self, address: Address, *, fresh: bool = False) -> Connection:
        """A connection for the caller alone; `fresh`: not one that was used before. LinkError."""
        dead: list[Connection] = []
        try:
            with self._lock:
                idle = self._idle.get(address)
                limit = time.monotonic() - IDLE_S
                while idle:
                    connection = idle.pop()
                    self._count -= 1
                    if not fresh and connection.idle_since > limit and connection.alive():
                        connection.reused = True
                        return connection
                    dead.append(connection)
        finally:
            for connection in dead:
                connection.close()
        try:
            return Connection(address)
        except OSError as e:
            raise LinkError(f"{address[0]}:{address[1]}: {e.strerror or e}") from e

    def give_back(self, connection: Connection) -> None:
        """The caller is done; nothing is outstanding on it."""
        connection.idle_since = time.monotonic()
        with self._lock:
            idle = self._idle.setdefault(connection.address, deque())
            room = len(idle) < IDLE_PER_SERVER_MAX and self._count < IDLE_TOTAL_MAX
            if room and not self._closed:
                idle.append(connection)
                self._count += 1
                return
        connection.close()

    def close_idle(self, idle_s: float = IDLE_S) -> None:
        """Close what nobody used for so long."""
        limit = time.monotonic() - idle_s
        old: list[Connection] = []
        with self._lock:
            for address in list(self._idle):
                idle = self._idle[address]
                while idle and idle[0].idle_since <= limit:
                    old.append(idle.popleft())
                if not idle:
                    del self._idle[address]
            self._count -= len(old)
        for connection in old:
            connection.close()

    def close(self) -> None:
        """Close what is idle, and keep nothing from now on."""
        self._closed = True
        self.close_idle(0.0)

    def ask(
        self, address: Address, request: Any, timeout_s: float = TIMEOUT_S,
        into: memoryview | None = None,
    ) -> tuple[m.DataReply, memoryview]:
        """One request that may be repeated, and its reply. ReplyError, LinkError.

        `into` as in `frame.recv_data`.
        """
        connection = self.take(address)
        while True:
            try:
                connection.limit(timeout_s)
                frame.send_data(connection.sock, request)
                reply, payload = frame.recv_data(connection.sock, m.DataReply, into)
            except (OSError, EOFError, frame.FrameError) as e:
                connection.close()
                if connection.reused and not isinstance(e, BlockingIOError):
                    connection = self.take(address, fresh=True)  # it was closed by the server
                    continue
                raise LinkError(f"{address[0]}:{address[1]}: {reason(e)}") from e
            self.give_back(connection)
            if reply.status:
                raise ReplyError(reply.status)
            return reply, payload


class ChunkReader:
    """Reads copies on one chunkserver."""

    def __init__(
        self,
        pool: ChunkPool,
        address: Address,
        *,
        timeout_s: float = TIMEOUT_S,
        ticket: bytes = b"",
    ) -> None:
        self._pool, self._address, self._timeout_s = pool, address, timeout_s
        self._ticket = ticket

    def read(
        self, chunk: int, version: int, offset: int, length: int, into: memoryview | None = None
    ) -> memoryview:
        """Exactly `length` bytes (at most DATA_PAYLOAD_MAX), checked against their CRCs.

        ReplyError: WRONG_VERSION, NO_CHUNK, BAD_CRC (on its disk or on the way), DISK_ERROR.
        LinkError. `into` as in `frame.recv_data`.
        """
        return self.read_pieces(chunk, version, offset, length, into)[0]

    def read_pieces(
        self, chunk: int, version: int, offset: int, length: int, into: memoryview | None = None
    ) -> tuple[memoryview, tuple[int, ...]]:
        """As `read`, with the CRCs of the pieces."""
        ask = m.ReadData(0, chunk, version, offset, length, self._ticket)
        reply, data = self._pool.ask(self._address, ask, self._timeout_s, into)
        if len(data) != length or tuple(frame.piece_crcs(offset, data)) != reply.crcs:
            raise ReplyError(Status.BAD_CRC)
        return data, reply.crcs

    def block_list(self, chunk: int, version: int) -> tuple[memoryview, int]:
        """The CRC table (1,024 big-endian CRC32) and the bitmap of written blocks as an integer."""
        ask = m.ListBlocks(0, chunk, version, self._ticket)
        _, data = self._pool.ask(self._address, ask, self._timeout_s)
        if len(data) != 4096 + 128:
            raise ReplyError(Status.BAD_CRC)
        return data[:4096], int.from_bytes(data[4096:], "little")


def reason(error: BaseException) -> str:
    """Why a call on a connection failed, in words."""
    if isinstance(error, BlockingIOError):
        return "no answer in time"
    return str(error) or type(error).__name__
