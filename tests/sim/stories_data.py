"""Composed stories about data: what goes wrong here takes several steps that chance seldom takes in
a row. Every third seed plays one of them, among the usual clients, before its own faults begin.

A story only arranges; what must hold is said by `promises`, as ever. Each says which mistake it
lies in wait for. One that does not come about (the leader changed meanwhile) ends early.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from raftfs.errors import ReplyError
from raftfs.wire import ops
from raftfs.wire.ops import NodeType
from tests.sim.chunkserver import ChunkMachine
from tests.sim.clients import Client
from tests.sim.files import Writer
from tests.sim.node import Machine

if TYPE_CHECKING:
    from tests.sim.world import World

_ROOT = 1
_NAME = b"story"
_LIMIT_S = 3.0
_LOOK_S = 0.02
_STORY_S = 20.0
_EVERY, _FIRST = 3, 1  # which seeds have one


class _Missed(Exception):
    """The story did not come about."""


class Teller(Client):
    """A client that is never disturbed itself, and has the world in its hands."""

    def __init__(self, world: "World", story: "Callable[[Teller], Awaitable[None]]") -> None:
        super().__init__(world, len(world.clients))
        self._story = story
        self.inode = 0

    async def _work(self) -> None:
        await self._connect()
        name = self._story.__name__
        try:
            async with asyncio.timeout(_STORY_S):
                await self._story(self)
            self.world.seen[name] += 1
        except (_Missed, ReplyError, TimeoutError):
            self.world.seen[f"{name}: missed"] += 1
        finally:
            self.world.mend()
        await self._leave()
        await self.meta.close()

    # --- what stories are made of

    async def until(self, true: Callable[[], bool], limit_s: float = _LIMIT_S) -> None:
        """_Missed if it does not become so."""
        end = self.world.loop.now + limit_s
        while not true():
            if self.world.loop.now > end:
                raise _Missed
            await asyncio.sleep(_LOOK_S)

    async def file(self, goal: int) -> tuple[int, list[ChunkMachine]]:
        """A new file whose first chunk is on the disks of so many servers: its chunk, and where."""
        servers = self.world.chunkservers
        await self.all_counted()
        create = ops.Create(_ROOT, _NAME, NodeType.FILE, 0o644, 0, 0, 0)
        _, made = await self.mutate(create)
        self.inode = made.inode
        await self.mutate(ops.SetGoal(self.inode, 0, goal))
        chunk = await self.write()
        there = [s for s in servers if chunk in s.disk.copies]
        if len(there) != goal:
            raise _Missed
        return chunk, there

    def _counted(self) -> int:
        """How many servers the leader may count on."""
        leading = [m.master for m in self.world.masters if m.leads and m.master is not None]
        return len(leading[0].hub.fenced_servers()) if leading else 0

    async def all_counted(self) -> None:
        """The leader may count on every server."""
        await self.until(lambda: self._counted() == len(self.world.chunkservers))

    async def write(self, *, failed: tuple[bytes, ...] = ()) -> int:
        """Write, fsync and commit; gives the chunk."""
        writer = Writer(self, self.inode, failed=failed)
        try:
            if not (await writer.write() and await writer.sync()):
                raise _Missed
            await writer.commit()
        finally:
            writer.close()
        assert writer.grant is not None
        return writer.grant.chunk

    def leader(self) -> Machine:
        """Whoever leads, and can give orders."""
        for machine in self.world.masters:
            if machine.leads:
                return machine
        raise _Missed

    async def successor(self, former: Machine) -> Machine:
        """Cut whoever leads off from the other masters, and wait for another one."""
        others = [m.host for m in self.world.machines if m is not former]
        self.cut(others, [former.host])
        self.cut([former.host], others)
        found: list[Machine] = []

        def other_leads() -> bool:
            found[:] = [m for m in self.world.masters if m.leads and m is not former]
            return bool(found)

        await self.until(other_leads)
        return found[0]

    async def fill(self, *servers: ChunkMachine) -> None:
        """No room is left there, and the masters know it."""
        for server in servers:
            server.disk.full = True
        await asyncio.sleep(1.2)

    async def knows(self, server: ChunkMachine, leader: Machine) -> None:
        """The server has acknowledged the leader's term."""
        term, uuid = leader.replica.term if leader.replica else 0, server.disk.server
        await self.until(lambda: self.world.promises.fenced_at(uuid) >= term)

    def cut(self, sources: list[str], targets: list[str]) -> None:
        """One way."""
        self.world.net.cut |= {(source, target) for source in sources for target in targets}

    def mend(self, sources: list[str], targets: list[str]) -> None:
        """What was held up arrives now."""
        self.world.net.mend({(source, target) for source in sources for target in targets})


def _hosts(servers: list[ChunkMachine]) -> list[str]:
    return [s.host for s in servers]


# --- the stories


async def an_old_order_comes_late(t: Teller) -> None:
    """A leader has a copy destroyed; before the order arrives, the server has a new leader's term.

    For: servers that obey deposed leaders.
    """
    chunk, (server, *_) = await t.file(t.chance.randint(1, 3))
    former = t.leader()
    t.cut([former.host], [server.host])
    await t.mutate(ops.Unlink(_ROOT, _NAME))
    await asyncio.sleep(0.4)  # the order is on its way
    new = await t.successor(former)
    await t.knows(server, new)
    if chunk not in server.disk.copies:
        raise _Missed
    t.mend([former.host], [server.host])
    await asyncio.sleep(0.2)


async def a_suspended_leader_meets_a_restarted_server(t: Teller) -> None:
    """The machine of a leader is suspended, clock and all; another one leads, a server takes its
    term, and restarts. It finds the old leader first, which has not noticed anything yet.

    For: servers that do not keep the term on their disks.
    """
    chunk, (server, other) = await t.file(2)
    former = t.leader()
    t.cut([former.host], _hosts([server, other]))
    await t.mutate(ops.Unlink(_ROOT, _NAME))
    await asyncio.sleep(0.4)  # until then it would not ask for what is too late afterwards
    process, since = former.process, t.world.loop.now
    assert process is not None
    process.paused = True
    try:
        new = await t.successor(former)
        await t.knows(server, new)
        await t.knows(other, new)
        masters = [m.host for m in t.world.masters if m is not former]
        server.die(power=t.chance.random() < 0.5)
        t.cut(masters, [server.host])
        t.cut([server.host], masters)
        t.mend([former.host], _hosts([server, other]))
        server.start()
        await asyncio.sleep(0.1)
        t.world.note("restarted with the copy", chunk in server.disk.copies)
    finally:
        process.behind_s += t.world.loop.now - since
        t.world.loop.resume(process)
    await asyncio.sleep(0.8)


async def two_leaders_give_up_different_copies(t: Teller) -> None:
    """A goal falls from 2 to 1. A leader gives up one copy, and is deposed while its order is on
    the way to a server that the next leader hears, but cannot reach; that one finds the other copy
    to be the surplus one.

    For: servers that are counted before they know the term.
    """
    chunk, (first, second) = await t.file(2)
    former, promises = t.leader(), t.world.promises
    await t.fill(first)  # whoever has less room is relieved
    t.cut([former.host], [first.host])
    await t.mutate(ops.SetGoal(t.inode, 0, 1))
    await t.until(lambda: first.disk.server in promises.condemned(chunk))
    first.disk.full = False
    await t.fill(second)
    t.cut([m.host for m in t.world.masters], [first.host])
    await t.successor(former)
    with suppress(_Missed):  # that one is not given up is as it should be
        await t.until(lambda: second.disk.server in promises.condemned(chunk), 2.2)
    second.disk.full = False
    t.mend([former.host], [first.host])
    await asyncio.sleep(0.2)


async def an_answer_is_lost(t: Teller) -> None:
    """A server raises a copy's version, but its answer is lost; no server has room for another
    copy. The writer goes on without it.

    For: versions that are committed although an answer is missing.
    """
    _, (failed, silent, _) = await t.file(3)
    await t.fill(*t.world.chunkservers)
    t.cut([silent.host], [m.host for m in t.world.masters])
    await t.write(failed=(failed.disk.server,))


async def a_goal_rises_under_a_writer(t: Teller) -> None:
    """For: copies that are made while somebody writes."""
    chunk, there = await t.file(t.chance.randint(1, 2))
    writer = Writer(t, t.inode)
    try:
        await writer.write()
        await t.mutate(ops.SetGoal(t.inode, 0, 3))
        for _ in range(8):
            await asyncio.sleep(0.3)
            if not await writer.write():
                raise _Missed
            copies = sum(chunk in s.disk.copies for s in t.world.chunkservers)
            if copies > len(there):  # a copy was made: it lacks what comes now
                break
        await writer.write()
        await writer.commit()
    finally:
        writer.close()


async def all_copies_are_away(t: Teller) -> None:
    """Somebody wants to write meanwhile, and servers with room are there.

    For: chunks that are replaced although something on them was acknowledged.
    """
    _, there = await t.file(t.chance.randint(1, 2))
    for server in there:
        server.die(power=t.chance.random() < 0.5)
    await asyncio.sleep(0.1 if t.chance.random() < 0.5 else 2.0)  # perhaps nobody knows it yet
    for _ in range(2):
        try:
            await t.write()
        except (_Missed, ReplyError):
            t.world.seen["refused without copies"] += 1
    for server in there:
        server.start()
    await t.all_counted()
    await t.files.read(t.inode, 0)
    await t.write()


async def one_copy_goes_on_alone(t: Teller) -> None:
    """All servers but one are away while a file is written; they come back with old copies, which
    are the more.

    For: versions that are not raised, and stale copies that count.
    """
    _, there = await t.file(3)
    alone = t.chance.choice(there)
    for server in t.world.chunkservers:
        if server is not alone:
            server.die(power=False)  # the leader knows it at once, and no write fails
    await asyncio.sleep(0.1)
    await t.write()
    for server in t.world.chunkservers:
        if not server.running:
            server.start()
    for _ in range(6):
        await asyncio.sleep(0.2)
        await t.files.read(t.inode, 0)


async def the_other_copy_has_just_gone(t: Teller) -> None:
    """A goal falls from 2 to 1 while the server that is to keep its copy still looks connected, and
    is lost for good.

    For: surplus copies that go although nobody knows whether the others are there.
    """
    chunk, (first, second) = await t.file(2)
    masters = [m.host for m in t.world.masters]
    await t.fill(first)  # whoever has less room is relieved
    t.cut([second.host], masters)
    t.cut(masters, [second.host])
    await t.mutate(ops.SetGoal(t.inode, 0, 1))
    with suppress(_Missed):  # that it is not given up is as it should be
        await t.until(lambda: chunk not in first.disk.copies, 2.6)
    first.disk.full = False
    if not t.world.may_replace(second, unless=chunk):
        raise _Missed
    second.die(power=True)
    second.new_disk()


STORIES: tuple[Callable[[Teller], Awaitable[None]], ...] = (
    an_old_order_comes_late, a_suspended_leader_meets_a_restarted_server,
    two_leaders_give_up_different_copies, an_answer_is_lost, a_goal_rises_under_a_writer,
    all_copies_are_away, one_copy_goes_on_alone, the_other_copy_has_just_gone,
)  # fmt: skip


def seeds(first: int, end: int) -> range:
    """Those that have a story."""
    return range(first + (_FIRST - first) % _EVERY, end, _EVERY)


async def play(world: "World") -> bool:
    """Tell the seed's story. False if it has none."""
    number, rest = divmod(world.seed, _EVERY)
    if rest != _FIRST:
        return False
    await Teller(world, STORIES[number % len(STORIES)]).start()
    return True
