"""Faults of stock pysyncobj on its connections, asked of both sides. Numbers as in
docs/known-faults.md.
"""

import asyncio
import os
import pickle
import socket
import struct
import threading
import zlib
from pathlib import Path
from typing import Any

import pytest
from pysyncobj.dns_resolver import DnsCachingResolver
from pysyncobj.poller import POLL_EVENT_TYPE
from pysyncobj.tcp_connection import TcpConnection
from pysyncobj.transport import TCPTransport

from raftfs.errors import LinkError
from raftfs.meta.raft.links import Links
from raftfs.meta.raft.messages import Append, Message, PeerName
from raftfs.wire import rpc
from raftfs.wire.auth import ClusterKey
from tests.unit.raft.stock import StockNode, both, verdict

KEY = ClusterKey(b"k" * 32)
_LARGE = os.urandom(4 << 20)  # does not fit into any socket's buffer, nor get smaller by packing


class Poller:
    """pysyncobj's: which events of a socket are waited for."""

    def __init__(self) -> None:
        self.events = 0
        self.callback: Any = None

    def subscribe(self, descr: int, callback: Any, events: int) -> None:
        """As pysyncobj calls it."""
        self.callback, self.events = callback, events

    def unsubscribe(self, descr: int) -> None:
        """As pysyncobj calls it."""
        self.events = 0


def stock_pair() -> tuple[TcpConnection, Poller, socket.socket]:
    """A connection, its poller, and the other end."""
    mine, other = socket.socketpair()
    mine.setblocking(False)
    other.setblocking(False)
    poller = Poller()
    connection = TcpConnection(poller, socket=mine)
    poller.callback(mine.fileno(), POLL_EVENT_TYPE.WRITE)  # connected, and nothing to send
    return connection, poller, other


def drain(sock: socket.socket) -> int:
    """Read what is there; gives how much."""
    count = 0
    while True:
        try:
            count += len(sock.recv(1 << 20))
        except BlockingIOError:
            return count


async def linked(handler: Any) -> tuple[rpc.Server, rpc.Link]:
    """A server for replicas' messages, and a link to it."""
    server = await rpc.serve("127.0.0.1", 0, incoming=Message, handler=handler, key=KEY)
    port = server._server.sockets[0].getsockname()[1]
    return server, await rpc.connect("127.0.0.1", port, key=KEY, role="replica", name="x")


@both
def test_h20_a_large_message_is_sent_to_its_end(side: str) -> None:
    if side == "stock":
        connection, poller, other = stock_pair()
        connection.send(_LARGE)
        got = 0
        for _ in range(100):  # the other end reads on, so there is always room
            got += drain(other)
            if poller.events & POLL_EVENT_TYPE.WRITE:
                poller.callback(connection.fileno(), POLL_EVENT_TYPE.WRITE)
        verdict(side, 0 < got < len(_LARGE))
        connection.disconnect()
        other.close()
        return

    async def story() -> None:
        arrived: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        server, link = await linked(lambda link, message: arrived.set_result(message))
        link.notify(Append(1, 1, 1, 1, 1, [(_LARGE, 2, 1)]))
        message = await asyncio.wait_for(arrived, 20)
        verdict(side, message.entries[0][0] != _LARGE)
        link.close()
        await server.close()

    asyncio.run(story())


@both
def test_h25_a_learner_that_connects_again_and_again_leaves_nothing_behind(side: str) -> None:
    if side == "stock":
        node = StockNode()
        transport = TCPTransport(node, None, [])
        for _ in range(20):
            connection, _, other = stock_pair()
            transport._onNewIncomingConnection(connection)
            transport._onIncomingMessageReceived(connection, "readonly")
            connection.disconnect()
            other.close()
        verdict(side, len(transport._connections) == 20)
        return

    class Gone:
        """A link that ends at once."""

        def __init__(self, number: int) -> None:
            self.name = PeerName("watcher", bytes([7]) * 16, False, False).pack()
            self.peer, self.context = ("127.0.0.1", number), None

        def close(self) -> None:
            """Nothing."""

        def notify(self, message: Any) -> None:
            """Nobody reads it."""

    links = Links(PeerName("a:1", b"1" * 16, True, False), [], KEY, lambda peer: None,
                  lambda *_: None, lambda *_: None)  # fmt: skip
    for number in range(20):
        link: Any = Gone(number)
        links._opened(link)
        assert links.connected() == ["watcher#" + "07" * 16]
        links._closed(link)
    verdict(side, bool(links._links or links._nodes))


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@both
@pytest.mark.parametrize("form", ["frame of pysyncobj", "bare", "long"])
def test_h26_bytes_from_the_network_run_no_code(side: str, form: str, tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    data = pickle.dumps(Trap(trap))
    packed = zlib.compress(data)
    framed = struct.pack("i", len(packed)) + packed
    sent = {"frame of pysyncobj": framed, "bare": data, "long": framed * 1000}[form]
    if side == "stock":
        connection, poller, other = stock_pair()
        other.send(framed)
        poller.callback(connection.fileno(), POLL_EVENT_TYPE.READ)
        connection.disconnect()
        other.close()
        verdict(side, trap.exists())
        return

    async def story() -> None:
        served: list[Any] = []
        server, link = await linked(lambda link, message: served.append(message))
        port = server._server.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        assert await asyncio.wait_for(reader.read(), 20) == b"", "hung up on"
        writer.close()
        assert served == []
        link.close()
        await server.close()

    asyncio.run(story())
    verdict(side, trap.exists())


def test_h26_a_frame_without_the_key_is_not_even_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message of the right form, by somebody who skips the handshake or has another key."""

    async def story() -> None:
        served: list[Any] = []
        server, link = await linked(lambda link, message: served.append(message))
        port = server._server.sockets[0].getsockname()[1]
        for key in (None, ClusterKey(b"x" * 32)):
            with pytest.raises(LinkError):
                stranger = await rpc.connect(
                    "127.0.0.1", port, key=key, role="replica", name="x", timeout_s=2.0
                )
                stranger.notify(Append(9, 1, 1, 1, 1, []))
                await asyncio.wait_for(asyncio.shield(stranger.closed), 10)
                raise LinkError
        assert served == []
        link.notify(Append(9, 1, 1, 1, 1, []))  # while the same of a member arrives
        while not served:
            await asyncio.sleep(0.01)
        link.close()
        await server.close()

    asyncio.run(story())


@both
def test_h27_names_are_resolved_outside_of_the_loop_in_both_families(
    side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[bool] = []
    original = socket.getaddrinfo

    def getaddrinfo(*args: Any, **more: Any) -> Any:
        threads.append(threading.current_thread() is threading.main_thread())
        return original(*args, **more)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    if side == "stock":
        resolver = DnsCachingResolver(600, 30)
        resolver.setPreferredAddrFamily("ipv6")
        resolver.resolve("localhost")
        family = resolver._DnsCachingResolver__preferredAddrFamily
        verdict(side, threads == [True] and family == socket.AF_INET)
        return

    async def story() -> None:
        with pytest.raises(LinkError, match="cannot connect"):
            await rpc.connect("localhost", 1, timeout_s=5.0)

    asyncio.run(story())
    assert threads
    verdict(side, any(threads))
