"""Clients: real sessions that follow the leader, and what they ask of masters and chunkservers.

Each does one thing after another: namespace operations, readings of the root, and writes and
readings of file contents. Every answer is held against what was committed.
"""

import asyncio
import random
from typing import TYPE_CHECKING, Any

from raftfs.client import meta
from raftfs.client.meta import MetaClient
from raftfs.client.session import Session
from raftfs.errors import LinkError, ReplyError
from raftfs.wire import frame, ops
from raftfs.wire import messages as m
from raftfs.wire.ops import NodeType, Op
from raftfs.wire.rpc import Link
from tests.sim.broken import must
from tests.sim.clock import Process
from tests.sim.files import FileUser

if TYPE_CHECKING:
    from tests.sim.world import World

_FOR_EVER_S = 1e6
_FORMER_S = 0.5
_NAMES = [b"a", b"b", b"c", b"d", b"e"]
_ROOT = 1


class Client:
    """One machine with one mount, which does not die."""

    def __init__(self, world: "World", number: int) -> None:
        self.world, self.name = world, f"client{number}"
        self.chance = random.Random(f"{world.seed}/{self.name}")
        self.process = Process(self.name, self.name, self.chance, lambda: None)
        self.acked = self.reads = 0
        self.inodes = [_ROOT]
        self.meta: MetaClient
        self._led: dict[Link, None] = {}
        self.files = FileUser(self)
        self.leaving = False

    def start(self) -> "asyncio.Task[None]":
        """Work until the story ends."""
        return self.world.loop.create_task(self._work(), context=self.process.here.copy())

    async def _work(self) -> None:
        try:
            await self._connect()
            while not self.world.ended:
                await self._one()
                await asyncio.sleep(self.chance.uniform(0.0, 0.08))
            await self._leave()
        except Exception as e:
            self.world.fail(e)

    async def _connect(self) -> None:
        addresses = [(host, 4) for host in self.world.hosts()]
        self.meta = MetaClient(addresses, Session(info=self.name), timeout_s=_FOR_EVER_S)
        self.meta.on_new_session.append(self._forgotten)
        await self.meta.start(_FOR_EVER_S)

    async def _leave(self) -> None:
        self.leaving = True
        await self.meta.call(m.EndMySession())  # and with it what it has locked

    def _forgotten(self) -> None:
        # One that is leaving asks again if the answer to its leave was lost; then it is gone.
        must(self.leaving, f"{self.name}'s session is gone")

    async def _one(self) -> None:
        kind = self.chance.random()
        if self.world.hurried:
            await self._hurry()
        elif kind < 0.25:
            await self._list()
        elif kind < 0.6:
            await self.files.one()
        else:
            await self.mutate(self._choose())

    async def _hurry(self) -> None:
        """Whatever was there before, the root is another afterwards."""
        name = self.chance.choice(_NAMES)
        create = ops.Create(_ROOT, name, NodeType.FILE, 0o644, 0, 0, 0)
        status, _ = await self.mutate(create)
        if status:
            await self.mutate(ops.Unlink(_ROOT, name))

    def _choose(self) -> Op:
        name, other = self.chance.sample(_NAMES, 2)
        inode = self.chance.choice(self.inodes)
        kind = NodeType.DIR if self.chance.random() < 0.2 else NodeType.FILE
        create = ops.Create(_ROOT, name, kind, 0o644, 0, 0, 0)
        return self.chance.choice([
            create, create, ops.Unlink(_ROOT, name), ops.Rmdir(_ROOT, name),
            ops.Rename(_ROOT, name, _ROOT, other), ops.Link(inode, _ROOT, name),
            ops.SetAttr(inode, mode=0o600), ops.Symlink(_ROOT, name, other, 0, 0),
            ops.SetGoal(inode, 0, self.chance.randint(1, 3)),
        ])  # fmt: skip

    async def mutate(self, op: Op) -> tuple[int, Any]:
        """Exactly once: status and value, as the masters say."""
        law, since = self.world.law, self.world.law.acknowledged
        session, seq = self.meta.session.number, self.meta._next_seq
        try:
            value = await self.meta.mutate(op)
        except ReplyError as e:
            law.refused(session, seq)
            return e.status, None
        law.told(session, seq, value, meta._ANSWERS.get(type(op)), since)
        self.acked += 1
        if isinstance(op, ops.Create):
            self.inodes = [*self.inodes[-4:], value.inode]
        return 0, value

    async def _list(self) -> None:
        """Ask the leader; or whoever else has led, which must not answer what is out of date."""
        since = self.world.law.acknowledged
        ask, leader = m.ReadDir(_ROOT, b"", 100), self.meta.masters.leader
        if leader is not None:
            self._led[leader] = None
        former = [link for link in self._led if not link.closed.done() and link is not leader]
        if former and self.chance.random() < 0.7:
            try:
                raw = await self.chance.choice(former).call(ask, _FORMER_S)
            except (LinkError, ReplyError):
                return
            page = frame.decode(m.DirPage, raw)
            self.world.seen["a former leader read"] += 1
        else:
            page = await self.meta.call(ask)
        self.world.law.listed(page, since)
        self.reads += 1
