"""Streams in the place of TCP, below the real `raftfs.wire.rpc`: control links and data links.

Bytes arrive in order and once. A cut holds them back until it heals; a machine that loses its power
says nothing, so its peers learn of it late. The kernel of a paused process accepts and takes bytes.
"""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tests.sim.clock import PROCESS, Process

if TYPE_CHECKING:
    from tests.sim.net import Network

_SYN_S = 60.0  # nobody answers; whoever connects gives up much earlier


class _Socket:
    def setsockopt(self, *_: Any) -> None:
        """There is none."""


class Stream(asyncio.Transport):
    """One end."""

    def __init__(self, net: "Network", process: Process, peer: tuple[str, int]) -> None:
        super().__init__({"socket": _Socket(), "peername": peer})
        self.net, self.process = net, process
        self.other: Stream | None = None
        self.protocol: asyncio.Protocol | None = None
        self.held: list[bytes] = []
        self._last = 0.0
        self._closing = False
        self._lost = False

    @property
    def edge(self) -> tuple[str, str]:
        """From here to there."""
        assert self.other is not None
        return self.process.host, self.other.process.host

    def open(self, protocol: asyncio.Protocol) -> None:
        """The connection is made."""
        self.protocol = protocol
        self.net.streams.append(self)
        protocol.connection_made(self)

    # --- asyncio.Transport

    def write(self, data: Any) -> None:
        """Send."""
        if self._closing or self.other is None:
            return
        if self.edge in self.net.cut:
            self.held.append(bytes(data))
            return
        self._after(self.net.delay(self.edge), self.other.arrive, bytes(data))

    def _after(self, delay_s: float, callback: Callable[..., None], *args: Any) -> None:
        assert self.other is not None
        self._last = max(self._last + 1e-6, self.net.loop.now + delay_s)
        here = self.other.process.here
        self.net.loop.call_at(self._last, callback, *args, context=here)

    def is_closing(self) -> bool:
        """As asyncio's."""
        return self._closing

    def get_write_buffer_size(self) -> int:
        """What a cut holds back."""
        return sum(map(len, self.held))

    def close(self) -> None:
        """The peer reads what was sent, then the end."""
        if not self._closing:
            self._closing = True
            self.net.loop.call_soon(self.lose, context=self.process.here)
            if self.other is not None:
                unheard = bool(self.held) or self.edge in self.net.cut
                self._after(self.net.silence_s(self.edge) if unheard else 0.0005, self.other.lose)

    def abort(self) -> None:
        """At once."""
        self.close()

    # --- the network's

    def arrive(self, data: bytes) -> None:
        """In the receiving process."""
        if not self._lost and self.protocol is not None:
            self.net.note(self.process.host, data)
            self.protocol.data_received(data)

    def lose(self) -> None:
        """It is over."""
        self._closing = True
        if not self._lost:
            self._lost = True
            if self in self.net.streams:
                self.net.streams.remove(self)
            if self.protocol is not None:
                self.protocol.connection_lost(None)

    def healed(self) -> None:
        """What was held back goes on."""
        held, self.held = self.held, []
        for data in held:
            self.write(data)


class TcpListener:
    """What `create_server` gives."""

    def __init__(self, tcp: "Tcp", key: tuple[str, int], process: Process, factory: Any) -> None:
        self.process, self.factory = process, factory
        self._tcp, self._key = tcp, key

    def close(self) -> None:
        """Nobody gets in any more."""
        if self._tcp.listeners.get(self._key) is self:
            del self._tcp.listeners[self._key]


class Tcp:
    """Who listens where."""

    def __init__(self, net: "Network") -> None:
        self._net = net
        self.listeners: dict[tuple[str, int], TcpListener] = {}

    def listen(self, factory: Any, port: int) -> TcpListener:
        """On the machine of the process that asks."""
        process = PROCESS.get()
        assert process is not None
        key = (process.host, port)
        self.listeners[key] = TcpListener(self, key, process, factory)
        return self.listeners[key]

    async def connect(
        self, factory: Callable[[], asyncio.Protocol], host: str, port: int
    ) -> tuple[Stream, asyncio.Protocol]:
        """OSError if nobody listens."""
        net, process = self._net, PROCESS.get()
        assert process is not None
        there, back = (process.host, host), (host, process.host)
        await asyncio.sleep(net.delay(there) + net.delay(back))
        if there in net.cut or back in net.cut:
            await asyncio.sleep(_SYN_S)
        listener = self.listeners.get((host, port))
        if listener is None or not listener.process.alive:
            raise ConnectionRefusedError(111, "Connection refused")
        mine = Stream(net, process, (host, port))
        theirs = Stream(net, listener.process, (process.host, 40_000))
        mine.other, theirs.other = theirs, mine
        net.loop.call_soon(self._accept, listener, theirs, context=listener.process.here)
        protocol = factory()
        mine.open(protocol)
        return mine, protocol

    def _accept(self, listener: TcpListener, stream: Stream) -> None:
        stream.open(listener.factory())
