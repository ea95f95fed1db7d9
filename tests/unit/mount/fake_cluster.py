"""Fake masters and chunkservers together; as a program: prints the masters and serves."""

import asyncio
import sys
from collections import Counter

from raftfs.chunk.tickets import TicketGate
from raftfs.meta.tickets import Tickets
from tests.unit.mount.fake_chunks import FakeChunkServer
from tests.unit.mount.fake_masters import CLUSTER, KEY, FakeMasters, State


class FakeCluster:
    """Everything that a mount talks to."""

    def __init__(self, servers: int = 2, goal: int = 1, password: str = "") -> None:
        self.servers = [FakeChunkServer(bytes([65 + n]) * 16) for n in range(servers)]
        self.state = State([s.location for s in self.servers], goal)
        self.masters = FakeMasters(self.state, password=password)
        for server in self.servers:
            server.gate = TicketGate(KEY, lambda: CLUSTER)
        self.sign(self.state.tickets)

    def sign(self, tickets: Tickets) -> None:
        """From now on with these."""
        self.state.tickets = tickets
        for server in self.servers:
            assert server.gate is not None
            server.gate.heard(tickets.clock())

    def age(self, seconds: float) -> None:
        """All tickets that were ever made are so much older."""
        for server in self.servers:
            assert server.gate is not None
            clocks = server.gate._ahead_ms
            server.gate._ahead_ms = {c: at + round(1000 * seconds) for c, at in clocks.items()}

    def refused(self) -> Counter[str]:
        """Requests without a valid ticket, of all servers."""
        return sum((s.gate.refused for s in self.servers if s.gate), Counter())

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
