"""Who has no ticket gets nothing from chunkservers; who mounts notices nothing of tickets."""

import asyncio
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from raftfs.client.chunk import ChunkPool, ChunkReader
from raftfs.client.meta import MetaClient
from raftfs.client.session import Session
from raftfs.const import MIB
from raftfs.errors import ReplyError, Status
from raftfs.wire import frame
from raftfs.wire import messages as m
from tests.scenario.cluster import KILLED, ScenarioCluster

LIFETIME_S = 2.0
REFUSED = "request without a valid ticket"


def shorten(cluster: ScenarioCluster) -> None:
    """Start the cluster anew with masters whose tickets last for a moment."""
    cluster.raftfs("cluster", "down")
    path = cluster.dir / "cluster.json"
    kept = json.loads(path.read_text())
    for node in kept["nodes"]:
        if node["role"] == "master":
            node["argv"] += ["--ticket-lifetime", str(LIFETIME_S)]
    path.write_text(json.dumps(kept))
    cluster.raftfs("cluster", "up", "--mount", str(cluster.mnt))


def ports(cluster: ScenarioCluster, role: str, use: str) -> list[int]:
    """Of the processes of a role."""
    return [p["ports"][use] for p in cluster.status()["processes"] if p["role"] == role]


def ask(port: int, head: Any, payload: bytes = b"") -> tuple[int, bytes]:
    """As somebody on the network: status and bytes."""
    with socket.create_connection(("127.0.0.1", port), 5) as sock:
        sock.settimeout(5)
        frame.send_data(sock, head, payload)
        reply, data = frame.recv_data(sock, m.DataReply)
        return reply.status, bytes(data)


def located(cluster: ScenarioCluster, inode: int) -> m.ChunkMap:
    """What a session gets."""

    async def story() -> m.ChunkMap:
        addresses = [("127.0.0.1", p) for p in ports(cluster, "master", "clients")]
        client = MetaClient(addresses, Session(), timeout_s=10.0)
        await client.start(10.0)
        try:
            found: m.ChunkMap = await client.call(m.ReadChunk(inode, 0))
            await client.call(m.EndMySession())
            return found
        finally:
            await client.close()

    return asyncio.run(story())


def read_cold(fd: int, offset: int, size: int) -> bytes:
    """Not from the kernel's cache."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return os.pread(fd, size, offset)


def refusals(cluster: ScenarioCluster) -> dict[str, int]:
    """What chunkservers logged, the newest line of each."""
    counts: dict[str, int] = {}
    for path in sorted(cluster.dir.glob("log/cs*.log")):
        lines = [json.loads(x) for x in path.read_text().splitlines() if REFUSED in x]
        for reason, number in (lines[-1]["refused"] if lines else {}).items():
            counts[reason] = counts.get(reason, 0) + number
    return counts


def test_who_has_no_ticket_gets_nothing(cluster: ScenarioCluster) -> None:
    cluster.expect(REFUSED)
    data, path = os.urandom(300_000), cluster.mnt / "secret"
    path.write_bytes(data)
    inode = path.stat().st_ino
    where = located(cluster, inode)
    size = 64 * 1024
    chunk, version = where.chunk, where.version
    for forged in (b"", os.urandom(60), where.ticket[:-1] + bytes([where.ticket[-1] ^ 1])):
        for port in ports(cluster, "chunkserver", "data"):
            for head, payload in (
                (m.ReadData(1, chunk, version, 0, size, forged), b""),
                (m.ListBlocks(2, chunk, version, forged), b""),
                (m.SyncData(3, chunk, version, [], forged), b""),
                (m.ZeroData(4, chunk, version, 2**62, True, 0, size, [], forged), b""),
                (m.WriteData(5, chunk, version, 2**62, True, 0, frame.piece_crcs(0, bytes(size)),
                             [], forged), bytes(size)),
            ):  # fmt: skip
                assert ask(port, head, payload) == (Status.NO_TICKET, b""), head
    port = where.copies[0].port
    # A reader's own ticket reads this chunk; it does not write, and reads no other one.
    assert ask(port, m.ReadData(1, chunk, version, 0, size, where.ticket)) == (0, data[:size])
    write = m.WriteData(5, chunk, version, 2**62, False, 0, frame.piece_crcs(0, bytes(size)), [],
                        where.ticket)  # fmt: skip
    assert ask(port, write, bytes(size))[0] == Status.NO_TICKET
    other = m.ReadData(1, chunk + 1, version, 0, size, where.ticket)
    assert ask(port, other)[0] == Status.NO_TICKET
    time.sleep(1.1)  # the log has a line a second
    for port in ports(cluster, "chunkserver", "data"):
        ask(port, m.ReadData(1, chunk, version, 0, size))
    counted = refusals(cluster)
    assert counted["none"] == 3 * 5 + 3 and counted["forged"] == 2 * 3 * 5
    assert (counted["right"], counted["chunk"]) == (1, 1)
    cluster.remount()
    assert path.read_bytes() == data
    assert cluster.raftfs("fileinfo", "-c", str(path)).count("checksum digest: ") == 2


def test_a_mount_reads_and_writes_over_expiries_and_a_change_of_leaders(
    cluster: ScenarioCluster,
) -> None:
    cluster.expect(*KILLED)
    shorten(cluster)
    data, path = os.urandom(8 * MIB), cluster.mnt / "read"
    path.write_bytes(data)
    early = located(cluster, path.stat().st_ino)
    began = time.monotonic()
    wrote = b""
    with open(path, "rb") as reader, open(cluster.mnt / "written", "wb", buffering=0) as writer:
        killed = False
        while time.monotonic() - began < 5 * LIFETIME_S:
            at = len(wrote) % (8 * MIB - 1000)
            assert read_cold(reader.fileno(), at, 1000) == data[at : at + 1000]
            more = os.urandom(5_000)
            writer.write(more)
            wrote += more
            if not killed and time.monotonic() - began > 2 * LIFETIME_S:
                cluster.raftfs("cluster", "kill", "leader")
                killed = True
            time.sleep(0.02)
        os.fsync(writer.fileno())
    assert killed and len(wrote) > 100_000
    # They did expire: one from the beginning is worth nothing now.
    pool, copy = ChunkPool(), early.copies[0]
    try:
        ChunkReader(pool, (copy.host, copy.port), ticket=early.ticket).read(
            early.chunk, copy.version, 0, 10
        )
        raise AssertionError("an expired ticket was taken")
    except ReplyError as e:
        assert e.status == Status.TICKET_EXPIRED
    finally:
        pool.close()
    cluster.remount()
    assert (cluster.mnt / "written").read_bytes() == wrote
    assert Path(path).read_bytes() == data
