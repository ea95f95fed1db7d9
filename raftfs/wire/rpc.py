"""Control links: requests with deadlines, replies, notices; both ends may ask.

asyncio protocols; everything that is sent within one turn of the loop leaves in one write. A link
that breaks fails all that waits on it with LinkError (the outcome of those requests is unknown).
"""

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any, cast

import msgspec
import structlog

from raftfs.const import SEND_QUEUE_MAX
from raftfs.errors import LinkError, RaftfsError, ReplyError, Status
from raftfs.log import SERVED
from raftfs.wire import frame
from raftfs.wire.auth import AuthError, ClusterKey, Handshake, Sealer
from raftfs.wire.frame import HANDSHAKE, NOTICE, REPLY, REQUEST, FrameError, decode

__all__ = ["Handler", "Link", "Server", "connect", "decode", "serve"]

log = structlog.get_logger("raftfs.rpc")

# A handler gets the link and the decoded message; what it returns (or its awaitable gives) is the
# reply's value. msgspec.Raw passes through unencoded. ReplyError becomes the reply's status.
Handler = Callable[["Link", Any], Any]

REQUESTS_IN_FLIGHT_MAX = 8192  # per link and direction; more are answered BUSY
_SWEEP_S = 0.05
_HANDSHAKE_TIMEOUT_S = 3.0
_NIL = b"\xc0"


class Link(asyncio.Protocol):
    """One end of a control connection."""

    def __init__(
        self,
        incoming: Any,
        handler: Handler | None,
        handshake: Handshake | None,
        on_open: Callable[["Link"], None] | None = None,
        on_close: Callable[["Link"], None] | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._incoming = incoming
        self._handler = handler
        self._handshake = handshake
        self._sealer: Sealer | None = None
        self._on_open, self._on_close = on_open, on_close
        self._splitter = frame.Splitter()
        self._transport: asyncio.Transport | None = None
        self._out: list[bytes] = []
        self._next_id = 0
        self._waiting: dict[int, tuple[asyncio.Future[bytes], float]] = {}
        self._sweeping = False
        self._serving = 0
        self.peer: tuple[str, int] = ("", 0)
        self.name = ""
        self.role = ""
        self.context: Any = None
        self.opened: asyncio.Future[None] = self._loop.create_future()
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self.last_heard = time.monotonic()

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio's: the socket is connected; the handshake, if any, begins."""
        self._transport = cast(asyncio.Transport, transport)
        sock = self._transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.peer = tuple(self._transport.get_extra_info("peername")[:2])
        if self._handshake is None:
            self._open()
            return
        self._loop.call_later(_HANDSHAKE_TIMEOUT_S, self._handshake_timeout)
        if self._handshake.connecting:
            self._put(HANDSHAKE, 0, self._handshake.first())

    def data_received(self, data: bytes) -> None:
        """asyncio's: cut, open, dispatch. Anything that is not ours ends the link."""
        self.last_heard = time.monotonic()
        try:
            for content in self._splitter.feed(data):
                if self._sealer is not None:
                    content = self._sealer.open(content)
                self._dispatch(*frame.unpack_inner(content))
        except (FrameError, AuthError) as e:
            log.warning("link refused", peer=self.peer, reason=str(e))
            self._abort(str(e))

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio's: fail everything that waits."""
        self._abort(str(exc) if exc else "connection closed")

    # --- for the owner

    def call(self, message: Any, timeout_s: float) -> "asyncio.Future[bytes]":
        """Ask; the future gives the raw MessagePack of the value, ReplyError or LinkError."""
        future: asyncio.Future[bytes] = self._loop.create_future()
        if self.closed.done():
            future.set_exception(LinkError(f"no connection to {self.peer[0]}:{self.peer[1]}"))
            return future
        self._next_id += 1
        self._waiting[self._next_id] = (future, time.monotonic() + timeout_s)
        if not self._sweeping:
            self._sweeping = True
            self._loop.call_later(_SWEEP_S, self._sweep)
        self._put(REQUEST, self._next_id, frame.encode(message))
        return future

    def notify(self, message: Any) -> None:
        """Tell, without an answer. Silently dropped when the link is gone: the owner sees
        `closed`.
        """
        if not self.closed.done():
            self._put(NOTICE, 0, frame.encode(message))

    def flush(self) -> None:
        """Send what is queued now, not at the end of the loop's turn (which may block before)."""
        self._flush()

    def close(self) -> None:
        """Send what is queued, then close. Everything that waits fails with LinkError."""
        if self._transport is not None:
            self._flush()
            self._transport.close()
        self._abort("closed", abort=False)

    def queued_bytes(self) -> int:
        """Bytes accepted but not yet taken by the kernel."""
        transport, queued = self._transport, sum(map(len, self._out))
        if transport is None or transport.is_closing():
            return queued
        return queued + transport.get_write_buffer_size()

    # --- inside

    def _open(self) -> None:
        if not self.opened.done():
            self.opened.set_result(None)
            if self._on_open is not None:
                self._on_open(self)

    def _handshake_timeout(self) -> None:
        if not self.opened.done():
            self._abort("no handshake in time")

    def _put(self, kind: int, ident: int, body: bytes) -> None:
        content = frame.pack_inner(kind, ident, body)
        if self._sealer is not None:
            content = self._sealer.seal(content)
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(frame.pack_control(content))

    def _flush(self) -> None:
        if not self._out or self._transport is None:
            return
        out, self._out = self._out, []
        if self._transport.is_closing():
            return
        self._transport.write(b"".join(out) if len(out) > 1 else out[0])
        if self._transport.is_closing():  # the write has just found out that nobody is there
            return
        if self._transport.get_write_buffer_size() > SEND_QUEUE_MAX:
            self._abort("the other side does not read")

    def _dispatch(self, kind: int, ident: int, body: memoryview) -> None:
        if self._handshake is not None and self._sealer is None:
            if kind != HANDSHAKE:
                raise AuthError("a message before the handshake: is the cluster key missing there?")
            self._shake(bytes(body))
        elif kind == REPLY:
            self._answered(ident, body)
        elif kind in (REQUEST, NOTICE):
            self._serve(kind, ident, body)
        else:
            raise FrameError("unexpected frame (a handshake on a link without key?)")

    def _shake(self, message: bytes) -> None:
        assert self._handshake is not None
        answer = self._handshake.step(message)
        if answer is not None:
            self._put(HANDSHAKE, 0, answer)
        if self._handshake.peer is not None:
            self.name, self.role = self._handshake.peer.name, self._handshake.peer.role
            self._sealer = self._handshake.sealer
            self._open()

    def _answered(self, ident: int, body: memoryview) -> None:
        waiting = self._waiting.pop(ident, None)
        if waiting is None or waiting[0].done():
            return  # its deadline passed, or nobody waits any more
        status = int.from_bytes(body[:4], "big")
        if status == 0:
            waiting[0].set_result(bytes(body[4:]))
        else:
            waiting[0].set_exception(ReplyError(status, bytes(body[4:])))

    def _serve(self, kind: int, ident: int, body: memoryview) -> None:
        message = (
            msgspec.msgpack.decode(body) if self._incoming is None else decode(self._incoming, body)
        )
        if self._handler is None or self._serving >= REQUESTS_IN_FLIGHT_MAX:
            self._reply(kind, ident, Status.BUSY, _NIL)
            return
        served = SERVED.set((self.peer, ident))  # a task made here keeps it
        try:
            value = self._handler(self, message)
            if asyncio.isfuture(value) or asyncio.iscoroutine(value):
                self._serving += 1
                task = asyncio.ensure_future(value)
                task.add_done_callback(lambda t: self._served(kind, ident, t))
                return
        except Exception as e:
            self._reply_error(kind, ident, e)
            return
        finally:
            SERVED.reset(served)
        self._reply(kind, ident, 0, frame.encode(value))

    def _served(self, kind: int, ident: int, task: "asyncio.Future[Any]") -> None:
        self._serving -= 1
        if task.cancelled():
            self._reply(kind, ident, Status.UNKNOWN, _NIL)
        elif (error := task.exception()) is not None:
            self._reply_error(kind, ident, error)
        else:
            self._reply(kind, ident, 0, frame.encode(task.result()))

    def _reply_error(self, kind: int, ident: int, error: BaseException) -> None:
        if isinstance(error, ReplyError):
            self._reply(kind, ident, error.status, error.value or _NIL)
        elif isinstance(error, RaftfsError):
            self._reply(kind, ident, error.errno, frame.encode(str(error)))
        else:
            log.error("handler failed", peer=self.peer, exc_info=error)
            self._reply(kind, ident, RaftfsError.errno, frame.encode(repr(error)))

    def _reply(self, kind: int, ident: int, status: int, value: bytes) -> None:
        if kind == REQUEST and not self.closed.done():
            self._put(REPLY, ident, status.to_bytes(4, "big") + value)

    def _sweep(self) -> None:
        """Fail what has passed its deadline; deadlines are therefore met to within _SWEEP_S."""
        now = time.monotonic()
        late = [i for i, (_, deadline) in self._waiting.items() if deadline <= now]
        for ident in late:
            future, _ = self._waiting.pop(ident)
            if not future.done():
                where = f"{self.peer[0]}:{self.peer[1]}"
                future.set_exception(LinkError(f"no answer from {where} in time"))
        self._sweeping = bool(self._waiting)
        if self._sweeping:
            self._loop.call_later(_SWEEP_S, self._sweep)

    def _abort(self, reason: str, *, abort: bool = True) -> None:
        if self.closed.done():
            return
        self.closed.set_result(None)
        if self._transport is not None and abort:
            self._transport.abort()
        was_open = self.opened.done()
        if not was_open:
            self.opened.set_exception(LinkError(reason))
            self.opened.exception()  # nobody may be waiting for it: not a lost exception
        waiting, self._waiting = self._waiting, {}
        for future, _ in waiting.values():
            if not future.done():
                future.set_exception(LinkError(reason))
        if self._on_close is not None and was_open:
            self._on_close(self)


async def connect(
    host: str,
    port: int,
    *,
    incoming: Any = None,
    handler: Handler | None = None,
    key: ClusterKey | None = None,
    role: str = "",
    name: str = "",
    timeout_s: float = 1.0,
    on_close: Callable[[Link], None] | None = None,
) -> Link:
    """Connect and, with a key, authenticate. LinkError if that does not succeed in time."""

    def make() -> Link:
        shake = Handshake(key, role, name, connecting=True) if key is not None else None
        return Link(incoming, handler, shake, on_close=on_close)

    loop = asyncio.get_running_loop()
    link: Link | None = None
    try:
        async with asyncio.timeout(timeout_s):
            _, link = await loop.create_connection(make, host, port)
            await asyncio.shield(link.opened)
    except (OSError, TimeoutError) as e:
        if link is not None:
            link.close()
        reason = e.strerror if isinstance(e, OSError) and e.strerror else "no answer in time"
        raise LinkError(f"cannot connect to {host}:{port}: {reason}") from e
    return link


class Server:
    """A listening port and its links."""

    def __init__(self, server: asyncio.Server, links: dict[Link, None]) -> None:
        self._server = server
        self.links = links

    async def close(self) -> None:
        """Stop listening and drop every link."""
        self._server.close()
        for link in list(self.links):
            link.close()
        await asyncio.sleep(0)


async def serve(
    host: str,
    port: int,
    *,
    incoming: Any,
    handler: Handler,
    key: ClusterKey | None = None,
    role: str = "",
    name: str = "",
    on_open: Callable[[Link], None] | None = None,
    on_close: Callable[[Link], None] | None = None,
) -> Server:
    """Listen. OSError if the port cannot be had."""
    links: dict[Link, None] = {}  # in the order of their coming: a run can be repeated

    def opened(link: Link) -> None:
        links[link] = None
        if on_open is not None:
            on_open(link)

    def closed(link: Link) -> None:
        links.pop(link, None)
        if on_close is not None:
            on_close(link)

    def make() -> Link:
        shake = Handshake(key, role, name, connecting=False) if key is not None else None
        return Link(incoming, handler, shake, opened, closed)

    loop = asyncio.get_running_loop()
    return Server(await loop.create_server(make, host, port, backlog=1024), links)
