"""A volume on a fake cluster, for tests without FUSE."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from raftfs.client.meta import MetaClient
from raftfs.client.session import Session
from raftfs.mount.handles import Handle
from raftfs.mount.volume import Volume, VolumeSettings
from raftfs.wire import messages as m
from tests.unit.mount.fake_cluster import FakeCluster

LIMIT_S = 30.0


class Bench:
    """A fake cluster with one volume on it, and words for what tests do with it."""

    def __init__(self, cluster: FakeCluster, volume: Volume) -> None:
        self.cluster = cluster
        self.volume = volume
        self.contents = volume.contents

    async def create(self, name: bytes = b"file") -> Handle:
        """A new empty file in the root, open."""
        return await self.volume.create(1, name, 0o644, 0o022, 0, 0, exclusive=True)

    async def open(self, handle: Handle, *, writes: bool = False) -> Handle:
        """The same file, opened again."""
        again, _ = await self.contents.open(handle.file.inode, writes=writes, truncate=False)
        return again

    async def read(self, handle: Handle, offset: int, size: int) -> bytes:
        """Bytes as read by this mount."""
        return bytes(await self.contents.read(handle, offset, size))

    def sent(self, kind: type, server: int = 0) -> list[Any]:
        """The frames of a kind that a chunkserver got."""
        return [r for r in self.cluster.servers[server].requests if isinstance(r, kind)]

    def stored(self, server: int, handle: Handle, index: int = 0) -> bytes:
        """What a chunkserver has of a chunk."""
        chunk = self.cluster.state.locate(handle.file.inode, index).chunk
        return bytes(self.cluster.servers[server].copies[chunk].data)

    def length(self, handle: Handle) -> int:
        """The committed length."""
        return self.cluster.state.locate(handle.file.inode, 0).length

    def asked(self) -> list[m.WriteChunk]:
        """From now on: every WriteChunk that the masters get."""
        seen: list[m.WriteChunk] = []

        def watch(ask: Any) -> None:
            if isinstance(ask, m.WriteChunk):
                seen.append(ask)

        self.cluster.masters.faults.append(watch)
        return seen


@asynccontextmanager
async def bench(
    servers: int = 2, goal: int = 2, timeout_s: float = 10.0, **settings: Any
) -> AsyncIterator[Bench]:
    """A volume on a fresh fake cluster."""
    cluster = await FakeCluster(servers, goal).start()
    meta = MetaClient(cluster.masters.addresses, Session(), timeout_s=timeout_s)
    registered = await meta.start(5.0)
    chosen = VolumeSettings(cluster.masters.addresses, "/mnt", timeout_s=timeout_s, **settings)
    volume = Volume(meta, registered, chosen)
    try:
        yield Bench(cluster, volume)
    finally:
        await volume.close()
        await cluster.stop()


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run a test's coroutine, with a limit."""

    async def limited() -> None:
        await asyncio.wait_for(test(), LIMIT_S)

    asyncio.run(limited())
