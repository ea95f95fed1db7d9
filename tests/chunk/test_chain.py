"""Writes through chains of real servers, and who is named when one of them fails."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from raftfs.chunk.chain import ACK_LIMIT_S, ack_timeout_s
from raftfs.chunk.server import DataServer
from raftfs.client.chunk import ChunkPool, ChunkReader
from raftfs.const import BLOCK_SIZE, MIB
from raftfs.errors import LinkError, ReplyError, Status, UserError
from raftfs.wire import frame
from raftfs.wire import messages as m
from tests.chunk.chainwriter import ChainError, ChainWriter
from tests.chunk.parts import gate, grant, make_store, noise, read, servers, ticket, write

_SERVER = """
import sys, pathlib
from tests.chunk.chainwriter import ChainError, ChainWriter
from tests.chunk.parts import Server
server = Server(pathlib.Path(sys.argv[1]))
print(server.hop.server.hex(), server.hop.port, flush=True)
sys.stdin.read()
server.close()
"""


@pytest.fixture
def pool() -> Iterator[ChunkPool]:
    made = ChunkPool()
    yield made
    made.close()


@pytest.fixture
def process(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], m.Hop]]:
    """A chunkserver in a process of its own."""
    child = subprocess.Popen(
        [sys.executable, "-c", _SERVER, str(tmp_path / "process")], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout is not None and child.stdin is not None
    server, port = child.stdout.readline().split()
    yield child, m.Hop(bytes.fromhex(server), "127.0.0.1", int(port))
    child.kill()
    child.wait(10)
    child.stdin.close()
    child.stdout.close()


def test_every_server_of_a_chain_has_what_was_acknowledged(tmp_path: Path, pool: ChunkPool) -> None:
    data = noise(1, 3 * MIB)
    with servers(tmp_path, 3) as made:
        acked: list[int] = []
        with ChainWriter(pool, [s.hop for s in made], on_ack=acked.append, window=2) as writer:
            pieces = range(0, 3 * MIB, MIB)
            sent = [writer.write(grant(7), at, data[at : at + MIB]) for at in pieces]
            sent.append(writer.zero(grant(7), 100, 2 * BLOCK_SIZE))
            sent.append(writer.sync(grant(7)))
            writer.drain()
            assert acked == sent and writer.unacked == []
        expect = data[:100] + bytes(2 * BLOCK_SIZE) + data[100 + 2 * BLOCK_SIZE :]
        for server in made:
            reader = ChunkReader(pool, ("127.0.0.1", server.data.port), ticket=ticket(7))
            got = b"".join(reader.read(7, 1, at, MIB) for at in range(0, 3 * MIB, MIB))
            assert got == expect
            assert reader.read(7, 1, 3 * MIB - 5, 10) == expect[-5:] + bytes(5)
        assert len({s.store.block_list(7, 1) for s in made}) == 1


def test_connections_are_reused(tmp_path: Path, pool: ChunkPool) -> None:
    with servers(tmp_path, 2) as made:
        for chunk in range(1, 30):
            with ChainWriter(pool, [s.hop for s in made]) as writer:
                writer.write(grant(chunk), 0, b"small")
                writer.drain()
        assert [len(s.data._connections) for s in made] == [1, 1]
        assert all(len(s.store) == 29 for s in made)


def test_a_kept_connection_that_died_is_replaced(tmp_path: Path, pool: ChunkPool) -> None:
    with servers(tmp_path, 1) as (server,):
        port = server.data.port
        write(server.store, 1, 0, b"x")
        reader = ChunkReader(pool, ("127.0.0.1", port), ticket=ticket(1))
        assert reader.read(1, 1, 0, 1) == b"x"
        server.data.close()
        with pytest.raises(LinkError):
            reader.read(1, 1, 0, 1)
        server.data = DataServer(server.store, "127.0.0.1", port, server.tickets)
        assert reader.read(1, 1, 0, 1) == b"x"


@pytest.mark.parametrize("dead", [1, 2])
def test_a_dead_server_is_named_and_the_others_have_the_data(
    tmp_path: Path, pool: ChunkPool, dead: int
) -> None:
    with servers(tmp_path, 3) as made:
        writer = ChainWriter(pool, [s.hop for s in made])
        writer.write(grant(1), 0, b"before")
        writer.drain()
        made[dead].data.close()
        with pytest.raises(ChainError) as e:
            ident = writer.write(grant(1), 0, b"behind")
            writer.drain()
        assert e.value.failed == made[dead].store.server
        assert e.value.status == Status.CHAIN_BROKEN and e.value.unacked == [ident]
        for server in made[:dead]:
            assert read(server.store, 1, 0, 6) == b"behind"
        assert read(made[dead].store, 1, 0, 6) == b"before"


def test_who_refuses_is_named(tmp_path: Path, pool: ChunkPool) -> None:
    with servers(tmp_path, 3) as made:
        for server in made:
            write(server.store, 1, 0, b"x")
        made[1].store.raise_version(1, 2, 9)
        with (
            pytest.raises(ChainError) as e,
            ChainWriter(pool, [s.hop for s in made]) as writer,
        ):
            writer.write(grant(1), 0, b"y")
            writer.drain()
        assert (e.value.status, e.value.failed) == (Status.WRONG_VERSION, made[1].store.server)
        made[0].store.destroy(1, 0)
        with pytest.raises(ReplyError) as r:
            address = ("127.0.0.1", made[0].data.port)
            ChunkReader(pool, address, ticket=ticket(1)).read(1, 1, 0, 1)
        assert r.value.status == Status.NO_CHUNK


def test_patience_shrinks_along_the_chain() -> None:
    limits = [ack_timeout_s(hops) for hops in range(1, 9)]
    assert limits == sorted(limits) and len(set(limits)) == 8
    assert limits[-1] < ACK_LIMIT_S


def test_a_stopped_server_delays_by_less_than_the_limit_and_is_named(
    tmp_path: Path, pool: ChunkPool, process: tuple[subprocess.Popen[str], m.Hop]
) -> None:
    child, hop = process
    with servers(tmp_path, 2) as made:
        chain = [made[0].hop, made[1].hop, hop]
        with ChainWriter(pool, chain) as writer:
            writer.write(grant(1), 0, b"before")
            writer.drain()
            time.sleep(0.6)  # idle time does not count
            writer.write(grant(1), 0, b"before")
            writer.drain()
        os.kill(child.pid, signal.SIGSTOP)
        try:
            began = time.monotonic()
            writer = ChainWriter(pool, chain, window=32, window_bytes=64 * MIB)
            with pytest.raises(ChainError) as e:
                for at in range(16):  # more than the sockets hold: sending stalls, too
                    writer.write(grant(1), at * MIB, noise(at, MIB))
                writer.drain()
            assert time.monotonic() - began < ACK_LIMIT_S + 0.5
            assert e.value.failed == hop.server
        finally:
            os.kill(child.pid, signal.SIGCONT)
        for server in made:  # the local writes were not held up
            assert read(server.store, 1, 0, MIB) == noise(0, MIB)


def test_a_killed_server_in_the_middle_is_named(
    tmp_path: Path, pool: ChunkPool, process: tuple[subprocess.Popen[str], m.Hop]
) -> None:
    child, hop = process
    with servers(tmp_path, 2) as made:
        writer = ChainWriter(pool, [made[0].hop, hop, made[1].hop])
        threading.Timer(0.2, child.kill).start()
        with pytest.raises(ChainError) as e:
            for at in range(100_000):
                writer.write(grant(1), at % 64 * MIB, noise(1, BLOCK_SIZE))
        assert e.value.failed == hop.server
        assert e.value.unacked


def test_excess_connections_are_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    server = DataServer(store, "127.0.0.1", 0, gate(store), connections_max=2)
    try:
        kept = [socket.create_connection(("127.0.0.1", server.port), 5) for _ in range(2)]
        for sock in kept:  # answered: so they are counted
            frame.send_data(sock, m.ListBlocks(1, 1, 1, ticket(1)))
            assert frame.recv_data(sock, m.DataReply)[0].status == Status.NO_CHUNK
        with socket.create_connection(("127.0.0.1", server.port), 5) as third:
            assert third.recv(1) == b""
        kept[0].sendall(b"this is no frame of raftfs......")
        assert kept[0].recv(1) == b""  # and its place is free again
        for sock in kept:
            sock.close()
    finally:
        server.close()
        store.close()


def test_a_busy_port_is_one_sentence(tmp_path: Path) -> None:
    with servers(tmp_path, 1) as (server,), pytest.raises(UserError, match="cannot listen"):
        DataServer(server.store, "127.0.0.1", server.data.port, server.tickets)
