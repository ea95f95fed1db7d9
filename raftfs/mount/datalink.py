"""Connections to chunkservers: blocking sockets in threads, answers back in the event loop.

A `Stream` carries the writes of one chunk at a time, pipelined: the loop hands jobs to its sender
thread, its receiver thread hands replies back. Threads, because checksums and socket calls of bulk
data release the GIL, so that the loop goes on answering metadata requests (fuse notes, section 0).
`DataLinks.fetch` reads with plain request and reply (`client/chunk.py`), in the threads of an
executor.
"""

import asyncio
import queue
import socket
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import structlog

from raftfs.client import chunk
from raftfs.client.chunk import Address
from raftfs.errors import RaftfsError
from raftfs.wire import messages as m
from raftfs.wire.frame import recv_data, send_data

log = structlog.get_logger("raftfs.data")

_SEND_TIMEOUT_S = 10.0  # a server that takes nothing for so long has failed
_JOIN_S = 10.0
_READERS = 16
_IDLE_STREAMS_PER_SERVER = 16
_SUSPECT_S = 5.0


class Job(Protocol):
    """Something to send: `frame` is called in the sender thread (checksums are computed there)."""

    def frame(self) -> tuple[Any, bytes | bytearray | memoryview]:
        """Head and payload."""


class StreamUser(Protocol):
    """Who uses a stream. Called in the event loop."""

    def replied(self, stream: "Stream", reply: m.DataReply) -> None:
        """A reply arrived."""

    def broke(self, stream: "Stream", error: BaseException) -> None:
        """The stream is unusable; called once, nothing follows."""


class Stream:
    """A connection to one chunkserver with a sender and a receiver thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, address: Address) -> None:
        self.address = address
        self.user: StreamUser | None = None
        self.broken = False
        self.reused = False  # kept from an earlier use, and nothing came back since
        self.idle_since = 0.0
        self._loop = loop
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._inbox: deque[m.DataReply | BaseException] = deque()
        self._scheduled = False
        self._sock: socket.socket | None = None
        threading.Thread(target=self._sender, daemon=True, name="raftfs-send").start()

    def send(self, job: Job) -> None:
        """Queue a frame. Failure is reported to the user, never raised."""
        self._jobs.put(job)

    def close(self) -> None:
        """End both threads; the user hears nothing any more. Unsent jobs are dropped."""
        self.broken = True
        self.user = None
        self._jobs.put(None)
        self._shut()

    # --- threads

    def _sender(self) -> None:
        try:
            sock = chunk.dial(self.address)
        except OSError as e:
            self._post(e)
            return
        chunk.set_timeouts(sock, 0.0, _SEND_TIMEOUT_S)
        self._sock = sock
        receiver = threading.Thread(
            target=self._receiver, args=(sock,), daemon=True, name="raftfs-recv"
        )
        receiver.start()
        try:
            while not self.broken and (job := self._jobs.get()) is not None:
                head, payload = job.frame()
                send_data(sock, head, payload)
        except (OSError, RaftfsError) as e:
            self._post(e)
        self._shut()
        # Closed only when no thread is left in a call on it: its number may be given to another
        # socket at once.
        receiver.join(_JOIN_S)
        if not receiver.is_alive():
            sock.close()

    def _receiver(self, sock: socket.socket) -> None:
        try:
            while True:
                reply, _ = recv_data(sock, m.DataReply)
                self._post(reply)
        except (OSError, EOFError, RaftfsError) as e:
            self._post(e)
        finally:
            self._jobs.put(None)

    def _shut(self) -> None:
        sock = self._sock
        if sock is not None:
            try:
                sock.shutdown(socket.SHUT_RDWR)  # wakes both threads
            except OSError:
                return  # it is disconnected already

    def _post(self, item: m.DataReply | BaseException) -> None:
        # Appended before the flag is read; `_deliver` clears the flag before it empties the inbox:
        # nothing is left lying, whichever thread runs when.
        self._inbox.append(item)
        if not self._scheduled:
            self._scheduled = True
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:
                return  # the loop is closed: the mount has ended

    # --- event loop

    def _deliver(self) -> None:
        self._scheduled = False
        while self._inbox:
            item = self._inbox.popleft()
            user = self.user
            if isinstance(item, BaseException):
                if not self.broken:
                    self.broken = True
                    self.user = None
                    if user is not None:
                        user.broke(self, item)
            elif user is not None:
                self.reused = False
                user.replied(self, item)


class DataLinks:
    """All connections to chunkservers: streams to write on, sockets to read with."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._idle: dict[Address, list[Stream]] = {}
        self._pool = chunk.ChunkPool()
        self._suspects: dict[Address, float] = {}
        self._executor = ThreadPoolExecutor(_READERS, thread_name_prefix="raftfs-read")
        self._closed = False

    # --- streams (event loop)

    def stream(self, address: Address, user: StreamUser) -> Stream:
        """A stream to the server for `user` alone, until it is given back or breaks."""
        idle = self._idle.get(address, [])
        while idle:
            stream = idle.pop()
            if not stream.broken:
                stream.user = user
                stream.reused = True
                return stream
        stream = Stream(self._loop, address)
        stream.user = user
        return stream

    def give_back(self, stream: Stream) -> None:
        """The user is done; nothing is outstanding on the stream."""
        stream.user = None
        idle = self._idle.setdefault(stream.address, [])
        if stream.broken or self._closed or len(idle) >= _IDLE_STREAMS_PER_SERVER:
            stream.close()
        else:
            stream.idle_since = time.monotonic()
            idle.append(stream)

    def close_idle(self, older_than_s: float) -> None:
        """Close connections that nobody used for so long."""
        self._pool.close_idle(older_than_s)
        limit = time.monotonic() - older_than_s
        for address, idle in list(self._idle.items()):
            for stream in [s for s in idle if s.broken or s.idle_since < limit]:
                idle.remove(stream)
                stream.close()
            if not idle:
                del self._idle[address]

    # --- request and reply

    async def ask(self, address: Address, head: Any, timeout_s: float) -> m.DataReply:
        """One request that may be repeated, and its reply. ReplyError; LinkError if none came."""
        reply, _ = await self._loop.run_in_executor(
            self._executor, self._pool.ask, address, head, timeout_s
        )
        return reply

    async def fetch(
        self, address: Address, copy: m.CopyId, offset: int, length: int, timeout_s: float,
        ticket: bytes = b"",
    ) -> memoryview:
        """The bytes asked for, checked. ReplyError with the server's status; LinkError."""
        reader = chunk.ChunkReader(self._pool, address, timeout_s=timeout_s, ticket=ticket)
        return await self._loop.run_in_executor(
            self._executor, reader.read, copy.chunk, copy.version, offset, length
        )

    def suspect(self, address: Address) -> None:
        """The server did not answer: read from others first for a while."""
        self._suspects[address] = time.monotonic() + _SUSPECT_S

    def preference(self, copies: list[m.Location]) -> list[m.Location]:
        """The copies in the given order, suspects last."""
        if not self._suspects:
            return copies
        now = time.monotonic()
        self._suspects = {a: until for a, until in self._suspects.items() if until > now}
        return sorted(copies, key=lambda c: (c.host, c.port) in self._suspects)

    def close(self) -> None:
        """Drop every connection that nobody uses and let the threads end."""
        self._closed = True
        self.close_idle(0.0)
        self._pool.close()
        self._executor.shutdown(wait=False, cancel_futures=True)
