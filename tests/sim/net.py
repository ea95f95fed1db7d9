"""The network: connections in the place of `raftfs.wire.rpc`, below the real `Links`.

A connection keeps the order of its messages, as TCP does; each is encoded and decoded by the real
codec. A cut holds messages back until it heals (TCP sends them again) or until the connection
breaks, which its two ends learn at different times: so one side may already use a new connection
while the other still hears the old one. What was under way then may also come a second time,
through the new connection.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from raftfs.errors import LinkError
from raftfs.meta.raft.messages import Message, VoteGiven
from raftfs.wire import frame
from raftfs.wire.frame import crc32
from tests.sim.clock import PROCESS, Process, VirtualLoop
from tests.sim.tcp import Stream, Tcp

Edge = tuple[str, str]
_UNHEARD_S = (0.5, 3.0)  # until a machine without power is known to be gone


def machine_of(name: str) -> str:
    """`a` of `a:1|...`; the name itself for a learner."""
    return name.partition("|")[0].partition(":")[0]


class End:
    """One end of a connection; has what `Links` uses of `rpc.Link`."""

    def __init__(self, net: "Network", me: str, name: str, calls: dict[str, Any]) -> None:
        process = PROCESS.get()
        assert process is not None
        self.net, self.machine, self.process = net, me, process
        self.name = name
        self.peer = (machine_of(name), 1)
        self.context: Any = None
        self.closed: asyncio.Future[None] = net.loop.create_future()
        self.other: End | None = None
        self._calls = calls
        self._last = 0.0
        self.held: list[bytes] = []
        self.recent: list[bytes] = []

    def notify(self, message: Any) -> None:
        """Send."""
        if self.closed.done() or self.other is None:
            return
        if isinstance(message, VoteGiven):
            self.net.voted(self.process, message.term, self.name)
        self._carry(frame.encode(message))

    def _carry(self, raw: bytes) -> None:
        """On its way to the other end."""
        assert self.other is not None
        edge = (self.machine, self.other.machine)
        if edge in self.net.cut:
            self.held.append(raw)
            return
        self.recent = [*self.recent[-5:], raw]
        self._last = max(self._last + 1e-6, self.net.loop.now + self.net.delay(edge))
        self.net.loop.call_at(self._last, self.other.arrive, raw, context=self.other.process.here)

    def healed(self) -> None:
        """What was held back goes on."""
        held, self.held = self.held, []
        for raw in held:
            self._carry(raw)

    def arrive(self, raw: bytes) -> None:
        """In the receiving process."""
        if not self.closed.done():
            self.net.note(self.machine, raw)
            self._calls["handler"](self, frame.decode(Message, raw))

    def flush(self) -> None:
        """Nothing is queued."""

    def close(self) -> None:
        """This side closes; the other learns of it behind what was sent before."""
        if not self.closed.done():
            other = self.other
            self.shut()
            if other is not None:  # while cut off, only its silence tells
                cut = (self.machine, other.machine) in self.net.cut
                self._last = max(self._last + 1e-6, self.net.loop.now + (1.0 if cut else 0.001))
                self.net.loop.call_at(self._last, other.shut, context=other.process.here)

    def shut(self) -> None:
        """It is over."""
        if not self.closed.done():
            self.closed.set_result(None)
            self.net.ends.pop(id(self), None)
            self._calls["on_close"](self)


class Listener:
    """What `serve` gives."""

    def __init__(self, net: "Network", address: str, calls: dict[str, Any], me: str) -> None:
        self.net, self.address, self.calls, self.me = net, address, calls, me
        process = PROCESS.get()
        assert process is not None
        self.process = process

    async def close(self) -> None:
        """Nobody gets in any more."""
        if self.net.listeners.get(self.address) is self:
            del self.net.listeners[self.address]
        for end in [e for e in self.net.ends.values() if e.process is self.process]:
            end.close()
        await asyncio.sleep(0)


class Network:
    """All connections. Chance is a stream for each pair of machines."""

    def __init__(
        self, loop: VirtualLoop, seed: int, voted: Callable[[Process, int, str], None]
    ) -> None:
        self.loop, self._seed, self.voted = loop, seed, voted
        self.cut: set[Edge] = set()
        self.slowest_s = 0.01
        self.listeners: dict[str, Listener] = {}
        self.ends: dict[int, End] = {}
        self.seen: Counter[str] = Counter()
        self.trace = 0
        self.streams: list[Stream] = []
        self._chances: dict[Edge, random.Random] = {}
        loop.tcp = Tcp(self)

    def chance(self, edge: Edge) -> random.Random:
        """Of one direction between two machines."""
        if edge not in self._chances:
            self._chances[edge] = random.Random(f"{self._seed}/{edge[0]}/{edge[1]}")
        return self._chances[edge]

    def delay(self, edge: Edge) -> float:
        """Of one message, in seconds."""
        return self.chance(edge).uniform(0.0005, self.slowest_s)

    def silence_s(self, edge: Edge) -> float:
        """Until an end learns that the other is gone, when nobody tells it."""
        return self.chance(edge).uniform(*_UNHEARD_S)

    async def serve(self, host: str, port: int, *, name: str, **calls: Any) -> Listener:
        """As `rpc.serve`."""
        address = f"{host}:{port}"
        self.listeners[address] = Listener(self, address, calls, name)
        return self.listeners[address]

    async def connect(
        self, host: str, port: int, *, name: str, timeout_s: float, **calls: Any
    ) -> End:
        """As `rpc.connect`."""
        me = machine_of(name)
        await asyncio.sleep(self.delay((me, host)) + self.delay((host, me)))
        listener = self.listeners.get(f"{host}:{port}")
        if listener is None or not listener.process.alive:
            raise LinkError(f"nobody listens at {host}:{port}")
        if (me, host) in self.cut or (host, me) in self.cut or listener.process.paused:
            await asyncio.sleep(timeout_s)
            raise LinkError(f"no answer from {host}:{port} in time")
        mine = End(self, me, listener.me, calls)
        here = listener.process.here
        theirs = here.run(End, self, host, name, listener.calls)
        mine.other, theirs.other = theirs, mine
        old = [e for e in self.ends.values() if self._again(e, mine)]
        self.ends[id(mine)], self.ends[id(theirs)] = mine, theirs
        self.loop.call_soon(self._open, listener, theirs, old, context=here)
        return mine

    def _again(self, old: End, new: End) -> bool:
        other, now = old.other, new.other
        if other is None or now is None:
            return False
        return {old.process, other.process} == {new.process, now.process}

    def _open(self, listener: Listener, end: End, old: list[End]) -> None:
        if end.closed.done():
            return
        listener.calls["on_open"](end)
        for former in old:
            twice = former.held or former.recent[-2:]
            for raw in twice:
                self.seen["duplicated message"] += 1
                target = end if former.machine != end.machine else end.other
                assert target is not None
                self.loop.call_later(0.002, target.arrive, raw, context=target.process.here)

    def note(self, machine: str, raw: bytes) -> None:
        """A message arrived: part of what makes two runs the same."""
        self.trace = crc32(f"{self.loop.now!r} {machine} ".encode() + raw, self.trace)

    def heal(self) -> None:
        """No cuts any more."""
        self.mend(set(self.cut))

    def mend(self, edges: set[Edge]) -> None:
        """What these held back goes on."""
        self.cut -= edges
        for end in [*self.ends.values(), *self.streams]:
            end.healed()

    def break_one(self, chance: random.Random) -> bool:
        """A connection breaks; one end learns it now, the other later."""
        live = [e for e in self.ends.values() if e.other is not None and not e.closed.done()]
        if not live:
            return False
        end = chance.choice(live)
        self.broken(end, chance.uniform(0.0, 0.5))
        return True

    def broken(self, end: End, later_s: float) -> None:
        """This end learns it now."""
        self.loop.call_soon(end.shut, context=end.process.here)
        if end.other is not None:
            self.loop.call_later(later_s, end.other.shut, context=end.other.process.here)

    def gone(self, process: Process, *, power: bool) -> None:
        """A process has died: its kernel tells the peers; after a power cut nobody does for long.
        """
        for end in [e for e in self.ends.values() if e.process is process]:
            del self.ends[id(end)]
            other = end.other
            if other is not None and other.process.alive:
                delay = 1.0 if power else 0.001
                self.loop.call_later(delay, other.shut, context=other.process.here)
        for stream in [s for s in self.streams if s.process is process]:
            self.streams.remove(stream)
            peer = stream.other
            if peer is not None and peer.process.alive:
                delay = self.silence_s(stream.edge) if power else 0.001
                self.loop.call_later(delay, peer.lose, context=peer.process.here)
