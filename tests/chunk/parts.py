"""Stores and servers for the tests of this folder."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raftfs.chunk.disk import Disk
from raftfs.chunk.server import DataServer
from raftfs.chunk.store import ChunkStore
from raftfs.chunk.tickets import TicketGate
from raftfs.meta.tickets import Tickets
from raftfs.wire.auth import ClusterKey
from raftfs.wire.frame import piece_crcs
from raftfs.wire.messages import ChunkMap, CopyId, Damage, Hop

CLUSTER = b"c" * 16
KEY = ClusterKey(b"k" * 32)
MASTER = Tickets(KEY, lambda: CLUSTER)  # signs what `grant` and `ticket` give
MASTER._clock = b"a master"  # the same in all processes, which have the same monotonic clock


def make_store(*roots: Path, **options: Any) -> ChunkStore:
    store = ChunkStore([Disk(root, leave_free=0) for root in roots], **options)
    store.join(CLUSTER)
    return store


def write(store: ChunkStore, chunk: int, offset: int, data: bytes, *, version: int = 1,
          token: int = 1) -> None:  # fmt: skip
    store.write(chunk, version, token, True, offset, memoryview(data), piece_crcs(offset, data))


def read(store: ChunkStore, chunk: int, offset: int, length: int, version: int = 1) -> bytes:
    data, crcs = store.read(chunk, version, offset, length)
    assert crcs == piece_crcs(offset, data)
    return bytes(data)


def chunk_file(root: Path, chunk: int) -> Path:
    (path,) = root.glob(f"{chunk & 0xFF:02X}/chunk_{chunk:016X}_*.mfs")
    return path


def ids(stories: Iterable[Damage]) -> list[CopyId]:
    return [CopyId(story.chunk, story.version) for story in stories]


def aside(root: Path) -> list[Path]:
    """The files in a disk's quarantine."""
    return sorted(root.glob("quarantine/*.mfs"))


def grant(chunk: int, *, version: int = 1, lock: int = 1, fresh: bool = True) -> ChunkMap:
    return MASTER.for_writer(ChunkMap(chunk, version, 0, [], lock, fresh), 1)


def ticket(chunk: int) -> bytes:
    """To read it."""
    return MASTER.for_reader(ChunkMap(chunk, 1, 0, []), 1).ticket


def gate(store: ChunkStore) -> TicketGate:
    """Has heard of `MASTER`."""
    made = TicketGate(KEY, lambda: store.cluster)
    made.heard(MASTER.clock())
    return made


class Server:
    """A store and its data port, in this process."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = make_store(root)
        self.tickets = gate(self.store)
        self.data = DataServer(self.store, "127.0.0.1", 0, self.tickets)

    @property
    def hop(self) -> Hop:
        return Hop(self.store.server, "127.0.0.1", self.data.port)

    def close(self) -> None:
        self.data.close()
        self.store.close()


@contextmanager
def servers(folder: Path, number: int) -> Iterator[list[Server]]:
    made = [Server(folder / f"s{n}") for n in range(number)]
    try:
        yield made
    finally:
        for server in made:
            server.close()


def noise(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)
