"""Fake masters and chunkservers together; as a program: prints the masters and serves."""

import asyncio
import sys

from tests.unit.mount.fake_chunks import FakeChunkServer
from tests.unit.mount.fake_masters import FakeMasters, State


class FakeCluster:
    """Everything that a mount talks to."""

    def __init__(self, servers: int = 2, goal: int = 1, password: str = "") -> None:
        self.servers = [FakeChunkServer(bytes([65 + n]) * 16) for n in range(servers)]
        self.state = State([s.location for s in self.servers], goal)
        self.masters = FakeMasters(self.state, password=password)

    async def start(self) -> "FakeCluster":
        """Listen."""
        await self.masters.start()
        return self

    async def stop(self) -> None:
        """Close everything."""
        await self.masters.stop()
        for server in self.servers:
            server.close()


async def _serve(goal: int, password: str) -> None:
    cluster = await FakeCluster(3, goal, password).start()
    cluster.state.keep_applied = False
    for server in cluster.servers:
        server.keep_requests = False
    print(",".join(f"{h}:{p}" for h, p in cluster.masters.addresses), flush=True)
    loop = asyncio.get_running_loop()
    await loop.run_in_executor(None, sys.stdin.read)  # until the parent closes the pipe
    await cluster.stop()


if __name__ == "__main__":
    import uvloop

    uvloop.run(_serve(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else ""))
