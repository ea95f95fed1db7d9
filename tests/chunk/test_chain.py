"""Real data servers on one machine: the write chain, what it names when it fails, replication."""

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raftfs.chunk.disk import Disk
from raftfs.chunk.fetch import replicate
from raftfs.chunk.server import CHAIN_TIMEOUT_S, DataServer
from raftfs.chunk.store import ChunkStore
from raftfs.const import BLOCK_SIZE, DATA_PAYLOAD_MAX
from raftfs.errors import ReplyError, Status
from raftfs.wire import frame
from raftfs.wire import messages as m

CHUNK = 0xABC


class Node:
    """A chunkserver without masters."""

    def __init__(self, path: Path) -> None:
        self.store = ChunkStore([Disk(path)])
        self.data = DataServer(self.store, "127.0.0.1", 0)
        self.hop = m.Hop(self.store.server, "127.0.0.1", self.data.port)

    def close(self) -> None:
        """Stop serving; the store stays."""
        self.data.close()


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[Node]]:
    """Three servers."""
    made = [Node(tmp_path / str(i)) for i in range(3)]
    yield made
    for node in made:
        node.close()
    time.sleep(0.05)
    for node in made:
        node.store.close()


@contextlib.contextmanager
def _client(node: Node) -> Iterator[socket.socket]:
    with socket.create_connection((node.hop.host, node.hop.port), 5) as sock:
        sock.settimeout(8)
        yield sock


def _send(
    sock: socket.socket, ident: int, offset: int, data: bytes, chain: list[m.Hop], version: int = 1
) -> None:
    crcs = frame.piece_crcs(offset, data)
    frame.send_data(sock, m.WriteData(ident, CHUNK, version, 1, True, offset, crcs, chain), data)


def _answer(sock: socket.socket) -> m.DataReply:
    return frame.recv_data(sock, m.DataReply)[0]


def _write(sock: socket.socket, ident: int, data: bytes, chain: list[m.Hop]) -> m.DataReply:
    _send(sock, ident, 0, data, chain)
    return _answer(sock)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_pipelined_writes_are_the_same_everywhere(nodes: list[Node], length: int) -> None:
    rng, used = random.Random(length), nodes[:length]
    model = bytearray(8 * DATA_PAYLOAD_MAX)
    chain = [n.hop for n in used[1:]]
    with _client(nodes[0]) as sock:
        for ident in range(60):
            size = rng.choice([1, 5000, BLOCK_SIZE, DATA_PAYLOAD_MAX])
            offset = rng.randrange(len(model) - size)
            data = rng.randbytes(size)
            model[offset : offset + size] = data
            _send(sock, ident, offset, data, chain)
        frame.send_data(sock, m.ZeroData(60, CHUNK, 1, 1, True, 100, 200_000, chain))
        model[100:200_100] = bytes(200_000)
        frame.send_data(sock, m.SyncData(61, CHUNK, 1, chain))
        answers = [_answer(sock) for _ in range(62)]
    assert sorted(a.id for a in answers) == list(range(62))
    assert [a for a in answers if a.status] == []
    for node in used:
        for at in range(0, len(model), DATA_PAYLOAD_MAX):
            got = node.store.read(CHUNK, 1, at, DATA_PAYLOAD_MAX)[0]
            assert bytes(got) == model[at : at + DATA_PAYLOAD_MAX]
    assert [len(n.store) for n in nodes] == [1] * length + [0] * (3 - length)


def test_a_chain_keeps_its_connections(nodes: list[Node]) -> None:
    chain = [n.hop for n in nodes[1:]]
    with _client(nodes[0]) as sock:
        for ident in range(20):
            assert _write(sock, ident, b"x" * ident + b"y", chain).status == 0
        assert [len(n.data._connections) for n in nodes] == [1, 1, 1]


@pytest.mark.parametrize("gone", [1, 2])
def test_a_server_that_went_is_named_and_the_others_have_the_data(
    nodes: list[Node], gone: int
) -> None:
    chain = [n.hop for n in nodes[1:]]
    with _client(nodes[0]) as sock:
        assert _write(sock, 1, b"first", chain).status == 0
        nodes[gone].close()
        answer = _write(sock, 2, b"again", chain)
        assert (answer.status, answer.failed) == (Status.CHAIN_BROKEN, nodes[gone].store.server)
        for node in nodes[:gone]:
            assert bytes(node.store.read(CHUNK, 1, 0, 5)[0]) == b"again"
        rest = [n.hop for n in nodes[1:gone]]
        assert _write(sock, 3, b"third", rest).status == 0


@contextlib.contextmanager
def _slow_hop(serve: Callable[[socket.socket], None] | None) -> Iterator[m.Hop]:
    """A server that listens and, without `serve`, never answers."""
    held: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with contextlib.suppress(OSError, EOFError):
                while True:
                    held.append(listener.accept()[0])
                    if serve is not None:
                        serve(held[-1])

        threading.Thread(target=accept, daemon=True).start()
        yield m.Hop(b"stopped-stopped!", "127.0.0.1", listener.getsockname()[1])
        listener.shutdown(socket.SHUT_RDWR)
        for sock in held:
            sock.close()


@pytest.mark.parametrize("before", [1, 2])
def test_a_stopped_server_is_named_in_time(nodes: list[Node], before: int) -> None:
    with _slow_hop(None) as hop, _client(nodes[0]) as sock:
        chain = [*(n.hop for n in nodes[1:before]), hop]
        start = time.monotonic()
        for ident in range(8):
            _send(sock, ident, 0, b"z" * DATA_PAYLOAD_MAX, chain)
        answers = [_answer(sock) for _ in range(8)]
        assert time.monotonic() - start < 2.5
    assert {a.status for a in answers} == {Status.CHAIN_BROKEN}
    assert {a.failed for a in answers} == {hop.server}, "somebody else is blamed"
    for node in nodes[:before]:
        assert bytes(node.store.read(CHUNK, 1, 0, 3)[0]) == b"zzz"


def test_an_answer_has_its_time_from_its_request_on(nodes: list[Node]) -> None:
    def answer_late(sock: socket.socket) -> None:
        for delay in (0.0, 0.6):
            head: Any = frame.recv_data(sock, m.WriteData)[0]
            time.sleep(delay)
            frame.send_data(sock, m.DataReply(head.id, 0))

    with _slow_hop(answer_late) as hop, _client(nodes[0]) as sock:
        assert _write(sock, 1, b"x", [hop]).status == 0
        time.sleep(CHAIN_TIMEOUT_S - 0.3)  # idle; nobody owed anything
        assert _write(sock, 2, b"x", [hop]).status == 0


def test_a_wrong_version_in_the_middle_is_named(nodes: list[Node]) -> None:
    chain = [n.hop for n in nodes[1:]]
    with _client(nodes[0]) as sock:
        assert _write(sock, 1, b"x", chain).status == 0
        nodes[1].store.raise_version(CHUNK, 2, 1)
        answer = _write(sock, 2, b"y", chain)
        assert (answer.status, answer.failed) == (Status.WRONG_VERSION, nodes[1].store.server)
        frame.send_data(sock, m.SyncData(3, CHUNK, 1, chain))
        answer = _answer(sock)
        assert (answer.status, answer.failed) == (Status.WRONG_VERSION, nodes[1].store.server)


def test_requests_that_make_no_sense_are_answered(nodes: list[Node]) -> None:
    with _client(nodes[0]) as sock:
        assert _write(sock, 1, b"x", []).status == 0
        for bad in (m.ReadData(2, CHUNK, 1, -5, 5), m.ReadData(2, CHUNK, 1, 0, 2**30),
                    m.ReadData(2, CHUNK, 1, 0, -1), m.ZeroData(2, CHUNK, 1, 1, False, -9, 9, []),
                    m.ZeroData(2, CHUNK, 1, 1, False, 0, 2**40, []),
                    m.WriteData(2, CHUNK, 1, 1, False, -65536, [0], [])):  # fmt: skip
            frame.send_data(sock, bad, b"q" if isinstance(bad, m.WriteData) else b"")
            assert _answer(sock).status != 0, bad
        assert _write(sock, 3, b"y", []).status == 0


def test_garbage_ends_only_its_own_connection(nodes: list[Node]) -> None:
    rng = random.Random(0)
    with _client(nodes[0]) as good:
        assert _write(good, 1, b"x", []).status == 0
        for garbage in (b"GET / HTTP/1.1\r\n\r\n", bytes(100), rng.randbytes(4000),
                        b"RF" + b"\xff" * 20, b"RF\0\0\0\x03\0\0\0\0\xc1\xc1\xc1"):  # fmt: skip
            with _client(nodes[0]) as bad:
                bad.sendall(garbage)
                with contextlib.suppress(ConnectionError):
                    assert bad.recv(100) == b""
        assert _write(good, 2, b"y", []).status == 0


def _order(node: Node, version: int) -> m.Replicate:
    return m.Replicate(1, CHUNK, version, node.hop.host, node.hop.port)


@pytest.mark.parametrize("kind", ["sparse", "full", "tiny", "empty"])
def test_replication_makes_equal_copies(nodes: list[Node], kind: str) -> None:
    source, target, rng = nodes[0].store, nodes[1].store, random.Random(5)
    runs = {"sparse": [(3, 10), (5 * BLOCK_SIZE, BLOCK_SIZE), (900 * BLOCK_SIZE, 77)],
            "full": [(at, DATA_PAYLOAD_MAX) for at in range(0, 64 << 20, DATA_PAYLOAD_MAX)],
            "tiny": [(0, 1)], "empty": []}[kind]  # fmt: skip
    source.zero(CHUNK, 4, 1, True, 0, 1)
    for offset, size in runs:
        data = rng.randbytes(size)
        source.write(CHUNK, 4, 1, True, offset, data, frame.piece_crcs(offset, data))
    replicate(target, _order(nodes[0], 4))
    assert target.blocks(CHUNK, 4) == source.blocks(CHUNK, 4)
    for offset, size in runs:
        assert bytes(target.read(CHUNK, 4, offset, size)[0]) == bytes(
            source.read(CHUNK, 4, offset, size)[0]
        )
    if kind == "tiny":
        assert target._copies[CHUNK].path.stat().st_size < 3 * 4096


def test_replication_refuses_what_is_not_the_copy(nodes: list[Node]) -> None:
    source, target = nodes[0].store, nodes[1].store
    source.write(CHUNK, 2, 1, True, 0, b"abc", frame.piece_crcs(0, b"abc"))
    for version in (1, 3):
        with pytest.raises(ReplyError) as e:
            replicate(target, _order(nodes[0], version))
        assert e.value.status == Status.WRONG_VERSION
    source._copies[CHUNK].retire()
    with open(source._copies[CHUNK].path, "r+b") as file:
        file.seek(8192)
        file.write(b"X")
    with pytest.raises(ReplyError) as e:
        replicate(target, _order(nodes[0], 2))
    assert e.value.status == Status.BAD_CRC
    assert len(target) == 0 and not list(target._disks[0].path.glob("??/*"))
