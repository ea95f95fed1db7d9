"""Masters without Raft: the real state machine behind any number of RPC ports, one of which leads.

Made to be watched and disturbed by tests; nothing is durable. Copies are raised to a new version by
a function call, since the fake chunkservers take every higher version.
"""

import asyncio
import os
import time
from collections import Counter
from typing import Any

import msgspec

from raftfs.client.session import password_proof
from raftfs.errors import ReplyError, Status
from raftfs.meta.state import read
from raftfs.meta.state.apply import apply_batch
from raftfs.meta.state.dictrows import DictRows
from raftfs.meta.tickets import Tickets
from raftfs.wire import messages as m
from raftfs.wire import ops, rpc
from raftfs.wire.auth import ClusterKey
from raftfs.wire.frame import encode
from raftfs.wire.ops import Batch, Command

CLUSTER, KEY = b"C" * 16, ClusterKey(b"k" * 32)


class State:
    """The real state machine over a dictionary, and which servers have which chunk."""

    def __init__(self, servers: list[m.Location], goal: int = 1) -> None:
        self.servers = servers
        self.goal = goal
        self.rows = DictRows()
        self.copies: dict[int, list[m.Location]] = {}
        self.counts: Counter[str] = Counter()
        self.applied: list[Command] = []  # what took effect, in order
        self.dead: set[bytes] = set()  # servers that take part in no grant
        self.keep_applied = True
        self.tickets = Tickets(KEY, lambda: CLUSTER)
        self._index = 0
        self._now = time.time_ns()
        self.commit(ops.Found(CLUSTER, {"m0": b"0" * 16}))

    def now(self) -> int:
        """A clock that always advances."""
        self._now = max(self._now + 1, time.time_ns())
        return self._now

    def commit(self, op: Any, session: int = 0, seq: int = 0) -> bytes:
        """What the log would do with it. ReplyError as refused."""
        self._index += 1
        command = Command(session, seq, op)
        applied = apply_batch(self.rows, self._index, Batch(self.now(), [command]))[0]
        if applied.result.status:
            raise ReplyError(applied.result.status, applied.result.value)
        if applied.version:
            self.counts[type(op).__name__] += 1
            if self.keep_applied:
                self.applied.append(command)
        elif seq:
            self.counts["again"] += 1
        return applied.result.value

    def end_grants(self, session: int) -> None:
        """As for a client that vanished: its locks fall by force."""
        for chunk in read.session_locks(self.rows, session):
            self.commit(ops.Unlock(chunk.id, chunk.lock))

    def find(self, path: str) -> ops.Attr:
        """The node at a path."""
        attr = read.getattr(self.rows, 1)
        for name in filter(None, path.encode().split(b"/")):
            attr = read.lookup(self.rows, attr.inode, name)
        return attr

    def grant(self, session: int, ask: m.WriteChunk) -> m.ChunkMap:
        """What the grants of a real leader come to: raise when in doubt, drop failed copies."""
        self.counts["WriteChunk"] += 1
        alive = [s for s in self.servers if s.server not in self.dead]
        chunk, _ = read.file_chunk(self.rows, ask.inode, ask.index)
        if chunk is None:
            return self._fresh(session, ask, alive, replace=False)
        if chunk.lock and chunk.lock_session != session:
            raise ReplyError(Status.LOCKED)
        good = [s for s in self.copies[chunk.id] if s in alive and s.server not in ask.failed]
        if not good:
            if chunk.born or ask.acked:
                raise ReplyError(Status.NO_COPIES)
            return self._fresh(session, ask, alive, replace=True)
        doubt = bool(ask.failed or chunk.lock)
        op = ops.GrantWrite(ask.inode, ask.index, doubt)
        granted = rpc.decode(ops.Granted, self.commit(op, session))
        version = granted.version
        if doubt:
            version = granted.reserved
            self.copies[chunk.id] = good
            self.commit(ops.SetVersion(chunk.id, version, granted.lock), session)
        return self._map(granted, version)

    def _fresh(
        self, session: int, ask: m.WriteChunk, alive: list[m.Location], *, replace: bool
    ) -> m.ChunkMap:
        servers = [s for s in alive if s.server not in ask.failed][: self.goal]
        if not servers:
            raise ReplyError(Status.NO_SERVERS)
        op = ops.GrantWrite(ask.inode, ask.index, False, replace)
        granted = rpc.decode(ops.Granted, self.commit(op, session))
        self.copies[granted.chunk] = servers
        return self._map(granted, granted.version)

    def _map(self, granted: ops.Granted, version: int) -> m.ChunkMap:
        copies = self.locations(granted.chunk, version)
        return m.ChunkMap(
            granted.chunk, version, granted.length, copies, granted.lock, granted.fresh
        )

    def locations(self, chunk: int, version: int) -> list[m.Location]:
        """The copies of a chunk."""
        return [msgspec.structs.replace(s, version=version) for s in self.copies[chunk]]

    def locate(self, inode: int, index: int) -> m.ChunkMap:
        """For readers."""
        chunk, length = read.file_chunk(self.rows, inode, index)
        if chunk is None:
            return m.ChunkMap(0, 0, length, [])
        copies = self.locations(chunk.id, chunk.version)
        return m.ChunkMap(chunk.id, chunk.version, length, copies)


class FakeMaster:
    """One replica's client port."""

    def __init__(self, cluster: "FakeMasters", number: int) -> None:
        self.cluster = cluster
        self.number = number
        self.port = 0
        self.silent = False  # answers nothing, as a stopped process
        self.server: rpc.Server | None = None
        self._challenges: dict[rpc.Link, bytes] = {}

    async def start(self, port: int = 0) -> None:
        """Listen on `port` (0: any)."""
        self.server = await rpc.serve(
            "127.0.0.1", port, incoming=m.ClientRequest, handler=self.handle
        )
        self.port = self.server._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """As a killed process: links break, connections are refused."""
        assert self.server is not None
        await self.server.close()
        self.server = None

    def handle(self, link: rpc.Link, ask: Any) -> Any:
        """One request."""
        if self.silent:
            return asyncio.get_running_loop().create_future()
        cluster, state = self.cluster, self.cluster.state
        match ask:
            case m.WhoLeads():
                return cluster.leader()
            case m.Challenge():
                self._challenges[link] = bytes(range(32))
                return self._challenges[link]
            case m.Keepalive():
                return None
        if cluster.leading != self.number or not cluster.serves:
            raise ReplyError(Status.NOT_LEADER, encode(cluster.leader()))
        match ask:
            case m.Register():
                return self._register(link, ask)
        if link.context is None:
            raise ReplyError(Status.NO_SESSION)
        fault = cluster.next_fault(ask)
        if fault is not None:
            return fault
        return self._answer(link, ask, state)

    def _register(self, link: rpc.Link, ask: m.Register) -> m.Registered:
        cluster, state = self.cluster, self.cluster.state
        if cluster.password and ask.proof != password_proof(
            self._challenges.pop(link, b""), cluster.password
        ):
            raise ReplyError(Status.BAD_PASSWORD)
        root = state.find(os.fsdecode(ask.path)).inode
        number = ask.session
        if not ask.tool:
            row = read.session(state.rows, number)
            if number and (row is None or row.secret != ask.secret):
                raise ReplyError(Status.NO_SESSION)
            if not number:
                new = ops.NewSession(ask.secret, ask.info, root)
                number = msgspec.msgpack.decode(state.commit(new))
        link.context = number or -1
        state.counts["Register"] += 1
        return m.Registered(number, CLUSTER, root, False, True, False, 0, 0, 0, 0)

    def _answer(self, link: rpc.Link, ask: Any, state: State) -> Any:
        if not isinstance(ask, m.Mutate | m.WriteChunk):
            state.counts[type(ask).__name__] += 1
        match ask:
            case m.Mutate(seq, op):
                return msgspec.Raw(state.commit(op, link.context, seq))
            case m.Lookup(parent, name):
                return read.lookup(state.rows, parent, name)
            case m.GetAttr(inode):
                return read.getattr(state.rows, inode)
            case m.ReadLink(inode):
                return read.readlink(state.rows, inode)
            case m.ReadDir(inode, after, limit):
                return read.readdir(state.rows, inode, after, limit)
            case m.ReadChunk(inode, index):
                return state.tickets.for_reader(state.locate(inode, index), link.context)
            case m.WriteChunk():
                return state.tickets.for_writer(state.grant(link.context, ask), link.context)
            case m.StatFs():
                return m.FsStat(1 << 40, 1 << 39, read.totals(state.rows).nodes)
            case m.FileChunks(inode, first):
                return [
                    m.FileChunk(i, 0, 0, [])
                    if row is None
                    else m.FileChunk(i, row.id, row.version, state.locations(row.id, row.version))
                    for i, row in read.file_chunks(state.rows, inode, first, 1000)
                ]
            case m.EndMySession():
                state.commit(ops.EndSession(link.context))
                return None
            case m.GetGoal():
                return m.GoalTable({2: 1}, {})
        raise ReplyError(95)


class FakeMasters:
    """The cluster: who leads, in which term; faults to inject."""

    def __init__(self, state: State, count: int = 3, password: str = "") -> None:
        self.state = state
        self.password = password
        self.masters = [FakeMaster(self, n) for n in range(count)]
        self.leading: int | None = 0
        self.serves = True
        self.term = 1
        self.faults: list[Any] = []  # callables ask -> answer or None, tried in order

    async def start(self) -> None:
        """Listen with all."""
        for master in self.masters:
            await master.start()

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Where they listen."""
        return [("127.0.0.1", master.port) for master in self.masters]

    def leader(self) -> m.Leader:
        """As every replica knows it."""
        if self.leading is None:
            return m.Leader(self.term, "", "")
        return m.Leader(
            self.term, f"m{self.leading}", f"127.0.0.1:{self.masters[self.leading].port}"
        )

    def elect(self, number: int | None, *, ready: bool = True) -> None:
        """A new term with this leader; everybody alive announces it. Not `ready`: it refuses yet,
        and only the others know.
        """
        self.leading = number
        self.serves = ready
        self.term += 1
        for at, master in enumerate(self.masters):
            if ready or at != number:
                self._announce(master)

    def ready(self, number: int) -> None:
        """It serves from now on, and says so."""
        self.serves = True
        self._announce(self.masters[number])

    def _announce(self, master: FakeMaster) -> None:
        if master.server is not None and not master.silent:
            for link in master.server.links:
                link.notify(m.LeaderNotice(self.leader()))

    def next_fault(self, ask: Any) -> Any:
        """What an injected fault answers to this request, if one does."""
        for fault in list(self.faults):
            answer = fault(ask)
            if answer is not None:
                return answer
        return None

    async def stop(self) -> None:
        """Close all."""
        for master in self.masters:
            if master.server is not None:
                await master.stop()
