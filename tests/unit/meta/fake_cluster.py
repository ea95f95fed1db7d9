"""Chunkservers, clients and successive leaders as plain objects, to torture grants and healing.

The replicated state is real (the pure state machine); Raft is a function call; chunkservers keep
sets of write numbers instead of bytes. Every order can be lost before or after it took effect.
"""

import asyncio
import random
from typing import Any

from raftfs.const import CHUNK_SIZE
from raftfs.errors import LinkError, NotLeader, ReplyError, Status
from raftfs.meta.chunkhub import ChunkHub
from raftfs.meta.grants import Grants
from raftfs.meta.state import read
from raftfs.meta.state.apply import apply_batch
from raftfs.meta.state.dictrows import DictRows
from raftfs.meta.tickets import Tickets
from raftfs.wire import messages as m
from raftfs.wire import ops
from raftfs.wire.auth import ClusterKey
from raftfs.wire.ops import Batch, Command, Result
from raftfs.wire.rpc import decode


class Copy:
    """A chunk copy: its version, the highest token seen, and the writes that it contains."""

    def __init__(self, version: int, token: int, writes: set[int]) -> None:
        self.version, self.token, self.writes = version, token, writes
        self.unsynced: set[int] = set()
        self.doubtful = False


class FakeServer:
    """A chunkserver's rules, without bytes."""

    def __init__(self, number: int) -> None:
        self.uuid = bytes([number]) * 16
        self.number = number
        self.up = True
        self.term = 0
        self.copies: dict[int, Copy] = {}

    def write(self, chunk: int, version: int, token: int, create: bool, write: int) -> bool:
        """Whether the write is on this copy now."""
        if not self.up:
            return False
        copy = self.copies.get(chunk)
        if copy is None and create:
            copy = self.copies[chunk] = Copy(version, token, set())
        if copy is None or copy.version != version or token < copy.token or copy.doubtful:
            return False
        copy.token = token
        copy.writes.add(write)
        copy.unsynced.add(write)
        return True

    def lose_power(self, chance: random.Random) -> None:
        """Writes that were not synced may be gone, and copies with them."""
        for chunk, copy in list(self.copies.items()):
            if copy.unsynced:
                copy.doubtful = True
                copy.writes -= {w for w in copy.unsynced if chance.random() < 0.5}
                copy.unsynced.clear()
                if not copy.writes:
                    del self.copies[chunk]

    def obey(self, order: Any, world: "World") -> None:
        """Carry out an order or raise as a chunkserver would answer."""
        if order.term < self.term:
            raise ReplyError(Status.OLD_TERM)
        self.term = order.term
        if isinstance(order, m.RaiseVersion):
            copy = self.copies.get(order.chunk)
            if copy is None:
                raise ReplyError(Status.NO_CHUNK)
            if copy.version > order.version:
                raise ReplyError(Status.WRONG_VERSION)
            copy.version, copy.token = order.version, max(copy.token, order.lock)
            copy.unsynced, copy.doubtful = set(), False
        elif isinstance(order, m.Destroy):
            copy = self.copies.get(order.chunk)
            if copy is not None and order.version in (0, copy.version):
                del self.copies[order.chunk]
        elif isinstance(order, m.Replicate):
            source = world.servers[order.port]
            there = source.copies.get(order.chunk)
            there_is_one = there is not None and not there.doubtful
            if not source.up or not there_is_one or there.version != order.version:
                raise ReplyError(Status.WRONG_VERSION)
            self.copies[order.chunk] = Copy(order.version, there.token, set(there.writes))


class FakeLink:
    """A link from one leader to one server, over which orders may get lost."""

    def __init__(self, world: "World", server: FakeServer) -> None:
        self.world, self.server = world, server
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.context: Any = None
        self.last_heard = float("inf")

    async def call(self, order: Any, timeout_s: float) -> bytes:
        """Deliver an order: lost before, done, or done and the answer lost."""
        chance = self.world.chance
        await asyncio.sleep(0)
        if not self.server.up or chance.random() < self.world.loss:
            raise LinkError("lost on the way there")
        self.server.obey(order, self.world)
        await asyncio.sleep(0)
        if chance.random() < self.world.loss:
            raise LinkError("lost on the way back")
        return b"\xc0"

    def close(self) -> None:
        """End the link."""
        if not self.closed.done():
            self.closed.set_result(None)


class FakeProposer:
    """Commits by applying, as long as its leader leads."""

    def __init__(self, world: "World", term: int) -> None:
        self.world, self.term = world, term

    async def propose(self, session: int, seq: int, op: ops.Op) -> Result:
        """Apply one operation as one entry."""
        await asyncio.sleep(0)
        if self.term != self.world.term:
            raise NotLeader
        result = self.world.apply(session, seq, op)
        await asyncio.sleep(0)
        return result

    async def commit(self, op: ops.Op, session: int = 0, seq: int = 0) -> bytes:
        """As the real one."""
        result = await self.propose(session, seq, op)
        if result.status:
            raise ReplyError(result.status, result.value)
        return result.value


class World:
    """Servers, the replicated state, and the leader of the moment."""

    def __init__(self, seed: int, servers: int = 4, goal: int = 3, loss: float = 0.0) -> None:
        self.chance = random.Random(seed)
        self.loss = loss
        self.rows = DictRows()
        self.index = 0
        self.term = 0
        self.servers = [FakeServer(n) for n in range(servers)]
        self.apply(0, 0, ops.Found(b"c" * 16, {}))
        self.session = self.new_session()
        attr = decode(ops.Attr, self.apply(
            self.session, 1, ops.Create(1, b"f", 1, 0o644, 0, 0, 0)).value)  # fmt: skip
        self.inode = attr.inode
        self.apply(0, 0, ops.SetGoal(self.inode, 0, goal))
        self.acked: dict[int, set[int]] = {}
        self.synced: dict[int, set[int]] = {}
        self.writes = self.acknowledged = 0

    def new_session(self) -> int:
        """A client's session."""
        value = self.apply(0, 0, ops.NewSession(b"s" * 16, "test")).value
        return decode(int, value)

    def apply(self, session: int, seq: int, op: ops.Op) -> Result:
        """One command as one entry of the log."""
        self.index += 1
        batch = Batch(10**18 + self.index, [Command(session, seq, op)])
        return apply_batch(self.rows, self.index, batch)[0].result

    async def elect(self) -> Grants:
        """A new leader, which knows what the servers report and nothing else."""
        self.term += 1
        term = self.term
        proposer = FakeProposer(self, term)
        tickets = Tickets(ClusterKey(b"k" * 32), lambda: b"c" * 16)
        hub = ChunkHub(lambda: b"c" * 16, lambda: term, lambda chunks: None, tickets=tickets)
        # type: ignore[arg-type]
        self.grants = Grants(self.rows, hub, proposer, lambda: term, self.chance.random)
        self.hub = hub
        hub.lead()
        for server in self.servers:
            if server.up:
                self.connect(server)
        await asyncio.sleep(0)
        for _ in range(50):
            await asyncio.sleep(0)
        return self.grants

    def connect(self, server: FakeServer) -> None:
        """The server reports to the leader of the moment."""
        link: Any = FakeLink(self, server)
        hello = m.ServerHello(m.PROTOCOL, "t", server.uuid, b"", "host", server.number)
        self.hub.handle(link, hello)
        self.hub.handle(link, m.Space(1000 * CHUNK_SIZE, 0, 0))
        copies = [m.CopyId(c, o.version, o.doubtful) for c, o in server.copies.items()]
        self.hub.handle(link, m.Copies(copies))
        self.hub.handle(link, m.Ready())

    def report(self) -> None:
        """What the connected servers hold now, as their events would tell."""
        for server in self.servers:
            known = self.hub.servers.get(server.uuid)
            if not server.up or known is None or not known.connected:
                continue
            now = {c: copy.version for c, copy in server.copies.items()}
            gone = [m.CopyId(c, v) for c, v in known.copies.items() if now.get(c) != v]
            made = [m.CopyId(c, v) for c, v in now.items() if known.copies.get(c) != v]
            self.hub.handle(known.link, m.Changed(made, gone, []))

    def crash(self, server: FakeServer) -> None:
        """The server goes down; its copies stay on its disks."""
        server.up = False
        known = self.hub.servers.get(server.uuid)
        if known is not None:
            known.link.close()
            self.hub.closed(known.link)

    def restart(self, server: FakeServer) -> None:
        """The server comes back with what is on its disks."""
        server.up = True
        self.connect(server)

    def good_copies(self, chunk: int) -> list[Copy]:
        """Those that the committed state counts, on living and dead servers."""
        row = read.chunk(self.rows, chunk)
        copies = [s.copies[chunk] for s in self.servers if chunk in s.copies]
        return [c for c in copies if row and row.version <= c.version <= row.reserved]

    def power_cut(self, *servers: FakeServer) -> None:
        """The servers go down and lose what was not synced; what no sure copy has is lost by right.
        """
        for server in servers:
            self.crash(server)
            server.lose_power(self.chance)
        for chunk, acked in self.acked.items():
            if all(copy.doubtful for copy in self.good_copies(chunk)):
                acked &= self.synced.get(chunk, set())

    def sync(self, grant: m.ChunkMap) -> bool:
        """A client's fsync through the chain; whether it succeeded."""
        copies = [self.servers[at.port].copies.get(grant.chunk) for at in grant.copies]
        up = all(self.servers[at.port].up for at in grant.copies)
        if not up or any(c is None or c.doubtful or c.version != grant.version for c in copies):
            return False
        for copy in copies:
            copy.unsynced.clear()
        self.synced[grant.chunk] = set(self.acked.get(grant.chunk, ()))
        return True

    def write(self, grant: m.ChunkMap, break_at: float = 0.0) -> list[bytes]:
        """A client's write through the chain; gives the servers that failed."""
        self.writes += 1
        failed = []
        create = grant.fresh and not self.acked.get(grant.chunk)
        for at in grant.copies:
            server = self.servers[at.port]
            if self.chance.random() < break_at or not server.write(
                grant.chunk, grant.version, grant.lock, create, self.writes
            ):
                failed.append(server.uuid)
        if not failed:
            self.acknowledged += 1
            self.acked.setdefault(grant.chunk, set()).add(self.writes)
        return failed

    def finish(self, grant: m.ChunkMap) -> int:
        """The client commits and unlocks; gives the status."""
        done = [ops.Written(grant.chunk, grant.lock, True)]
        status = self.apply(
            self.session, 0, ops.CommitWrite(self.inode, 1000, -1, done)
        ).status
        self.grants.settled(grant.chunk)
        return status

    def check(self) -> None:
        """Every good copy, on a living or a dead server, has every acknowledged write; of a
        doubtful one that holds for the synced ones.
        """
        for chunk, acked in self.acked.items():
            for copy in self.good_copies(chunk):
                must = self.synced.get(chunk, set()) if copy.doubtful else acked
                lost = must - copy.writes
                assert not lost, f"a copy at {copy.version} lacks {lost}"
