"""Healing: copies are added up to the goal, and none is destroyed that no entry condemned."""

import asyncio
import errno
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from raftfs.errors import ReplyError, Status
from raftfs.meta.healer import Healer, HealingConfig
from raftfs.meta.state import read
from raftfs.wire import messages as m
from raftfs.wire import ops
from tests.unit.meta.fake_cluster import FakeProposer, FakeServer, World

QUICK = HealingConfig(0.0, 0.0, 0.0, orphan_delay_s=0.4, sweep_every_s=0.1)


class Recorded(World):
    """A world that writes down, in order, what is committed and what is ordered."""

    def __init__(self, **more: Any) -> None:
        self.story: list[Any] = []
        super().__init__(1, **more)
        record = self.story.append
        original = FakeServer.obey
        for server in self.servers:
            def obey(order: Any, world: World, server: FakeServer = server) -> None:
                record((server.number, order))
                original(server, order, world)
                world.report()

            server.obey = obey  # type: ignore[method-assign]

    def apply(self, session: int, seq: int, op: ops.Op) -> Any:
        self.story.append(op)
        return super().apply(session, seq, op)

    def of(self, kind: type) -> list[int]:
        """Positions in the story of an operation or an order."""
        return [
            at for at, x in enumerate(self.story)
            if isinstance(x, kind) or (isinstance(x, tuple) and isinstance(x[1], kind))
        ]  # fmt: skip


async def healed(
    world: Recorded, work: Callable[[Healer], Awaitable[None]], config: HealingConfig = QUICK
) -> None:
    """Run `work` while a healer of the present leader is at work."""
    proposer: Any = FakeProposer(world, world.term)
    healer = Healer(world.rows, world.hub, world.grants, proposer, config)
    healer.lead()
    try:
        await work(healer)
    finally:
        await healer.follow()


async def until(ready: Callable[[], bool], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not ready():
            await asyncio.sleep(0.02)


async def written(world: Recorded) -> int:
    """A chunk of the world's file, with as many copies as its goal; gives its number."""
    grants = await world.elect()
    grant = await grants.grant(world.session, m.WriteChunk(world.inode, 0, []))
    assert world.write(grant) == [] and world.finish(grant) == 0
    world.report()
    return grant.chunk


def holders(world: World, chunk: int) -> list[int]:
    return [s.number for s in world.servers if s.up and chunk in s.copies]


def test_a_dead_servers_copies_are_made_anew_elsewhere() -> None:
    async def story() -> None:
        world = Recorded(servers=4, goal=3)
        chunk = await written(world)
        world.crash(world.servers[holders(world, chunk)[0]])
        await healed(world, lambda h: until(lambda: len(holders(world, chunk)) == 3))
        world.check()

    asyncio.run(story())


def test_a_chunk_that_waits_for_minutes_is_repaired_at_once_when_one_copy_is_left() -> None:
    """The second server dies while the first one is still given time to come back."""

    async def story(healer: Healer) -> None:
        first, second, _ = holders(world, chunk)
        world.crash(world.servers[first])
        healer.examine([chunk], delay_s=0.0)
        await until(lambda: chunk in healer._first_short and chunk in healer._due)
        world.crash(world.servers[second])
        healer.examine([chunk], delay_s=0.0)
        await until(lambda: len(holders(world, chunk)) == 3)

    async def prepared() -> None:
        nonlocal world, chunk
        world = Recorded(servers=5, goal=3)
        chunk = await written(world)
        await healed(world, story, QUICK._replace(disconnect_delay_s=300.0, sweep_every_s=300.0))

    world, chunk = Recorded(), 0
    asyncio.run(prepared())


def test_a_surplus_copy_goes_only_after_its_entry_and_only_one() -> None:
    async def story() -> None:
        world = Recorded(servers=4, goal=3)
        chunk = await written(world)
        world.apply(0, 0, ops.SetGoal(world.inode, 0, 2))
        await healed(world, lambda h: until(lambda: len(holders(world, chunk)) == 2))
        assert len(holders(world, chunk)) == 2
        (dropped,), (destroyed,) = world.of(ops.DropCopy), world.of(m.Destroy)
        assert dropped < destroyed, "committed before it is ordered"
        server, order = world.story[destroyed]
        assert world.story[dropped].server == world.servers[server].uuid
        assert order.version == world.story[dropped].version

    asyncio.run(story())


def test_no_copy_is_given_up_while_the_others_do_not_answer() -> None:
    """A server that has just died still looks connected, and its copy counts."""

    async def story() -> None:
        world = Recorded(servers=4, goal=2)
        chunk = await written(world)
        world.apply(0, 0, ops.SetGoal(world.inode, 0, 1))
        there = holders(world, chunk)
        for number in there:
            world.servers[number].up = False  # and nobody has noticed
        await healed(world, lambda h: asyncio.sleep(0.8))
        assert world.of(ops.DropCopy) == []
        for number in there:
            world.servers[number].up = True
        await healed(world, lambda h: until(lambda: len(holders(world, chunk)) == 1))
        (dropped,) = world.of(ops.DropCopy)
        asked = {world.story[at][0] for at in world.of(m.Confirm) if at < dropped}
        assert holders(world, chunk)[0] in asked, "the one that stays was asked before"

    asyncio.run(story())


def test_nothing_is_destroyed_while_a_writer_holds_the_chunk() -> None:
    async def story() -> None:
        world = Recorded(servers=4, goal=3)
        grants = await world.elect()
        grant = await grants.grant(world.session, m.WriteChunk(world.inode, 0, []))
        world.write(grant)
        world.report()
        world.apply(0, 0, ops.SetGoal(world.inode, 0, 1))
        await healed(world, lambda h: asyncio.sleep(1.0))
        assert world.of(m.Destroy) == []

    asyncio.run(story())


def test_a_stale_copy_goes_once_the_goal_is_met_without_it() -> None:
    async def story() -> None:
        world = Recorded(servers=3, goal=3)
        chunk = await written(world)
        gone = world.servers[0]
        world.crash(gone)
        grant = await world.grants.grant(world.session, m.WriteChunk(world.inode, 0, []))
        world.write(grant)
        world.finish(grant)
        world.restart(gone)
        world.report()
        row = read.chunk(world.rows, chunk)
        assert row is not None and gone.copies[chunk].version < row.version

        def renewed() -> bool:
            copy = gone.copies.get(chunk)
            return copy is not None and copy.version == row.version

        await healed(world, lambda h: until(renewed))
        world.check()

    asyncio.run(story())


def test_copies_of_a_deleted_file_go_and_then_its_chunk() -> None:
    async def story() -> None:
        world = Recorded(servers=3, goal=2)
        chunk = await written(world)
        world.apply(world.session, 0, ops.Unlink(1, b"f"))
        world.apply(0, 0, ops.EndSession(world.session))
        assert read.doomed(world.rows, 0, 9) == [chunk]
        await healed(world, lambda h: until(lambda: read.chunk(world.rows, chunk) is None))
        assert holders(world, chunk) == []
        assert max(world.of(m.Destroy)) < world.of(ops.ForgetChunk)[0]

    asyncio.run(story())


def test_a_copy_that_nobody_knows_is_kept_for_its_delay() -> None:
    async def story() -> None:
        from tests.unit.meta.fake_cluster import Copy

        world = Recorded(servers=3, goal=2)
        await written(world)
        world.servers[0].copies[77] = Copy(3, 0, set())
        world.report()

        async def wait(healer: Healer) -> None:
            await asyncio.sleep(0.2)
            assert 77 in world.servers[0].copies
            await until(lambda: 77 not in world.servers[0].copies)

        await healed(world, wait)
        assert world.of(ops.DropCopy)[-1] < world.of(m.Destroy)[-1]

    asyncio.run(story())


def rot(world: Recorded, number: int, chunk: int) -> None:
    """The server finds its copy damaged, and tells; it obeys SetAside by letting it go."""
    server = world.servers[number]
    known = world.hub.servers[server.uuid]
    copy = server.copies.pop(chunk)
    ident = m.CopyId(chunk, copy.version)
    story = m.Damage(chunk, copy.version, "/d", "data", 3, "a", "b", "scrub", 1, "rotten")
    obey = server.obey

    def aside(order: Any, there: World) -> None:
        obey(order, there)
        if isinstance(order, m.SetAside):
            world.hub.handle(known.link, m.Changed([], [ident], []))

    server.obey = aside  # type: ignore[method-assign]
    world.hub.handle(known.link, m.Changed([], [], [ident], (story,)))


def test_a_damaged_copy_is_set_aside_by_a_committed_entry_and_made_anew() -> None:
    async def story() -> None:
        world = Recorded(servers=3, goal=3)
        chunk = await written(world)
        rot(world, 1, chunk)
        assert world.hub.damaged == {chunk: {world.servers[1].uuid}}
        assert world.grants.locations(read.chunk(world.rows, chunk), "")  # the good ones
        await healed(world, lambda h: until(lambda: len(holders(world, chunk)) == 3))
        (drop,), (aside,) = world.of(ops.DropCopy), world.of(m.SetAside)
        confirmed = [at for at in world.of(m.Confirm) if at < drop]
        assert len(confirmed) == 2 and drop < aside < min(world.of(m.Replicate))
        assert world.hub.damaged == {} and not world.of(m.Destroy)
        world.check()

    asyncio.run(story())


def test_the_last_copy_stays_where_it_is_and_readers_are_sent_to_it() -> None:
    async def story() -> None:
        world = Recorded(servers=2, goal=2)
        chunk = await written(world)
        world.crash(world.servers[0])
        rot(world, 1, chunk)

        async def idle(healer: Healer) -> None:
            await until(lambda: healer.missing == {chunk})
            await asyncio.sleep(0.3)

        await healed(world, idle)
        assert not world.of(m.SetAside) and not world.of(ops.DropCopy)
        found = world.grants.locate(world.inode, 0, "")
        assert [c.server for c in found.copies] == [world.servers[1].uuid]
        world.restart(world.servers[0])  # a good one comes back
        await asyncio.sleep(0.05)
        found = world.grants.locate(world.inode, 0, "")
        assert [c.server for c in found.copies] == [world.servers[0].uuid]
        await healed(world, lambda h: until(lambda: world.hub.damaged == {}))
        assert world.of(m.SetAside)

    asyncio.run(story())


def test_nothing_is_set_aside_nor_dropped_for_a_copy_that_is_not_what_it_was_taken_for() -> None:
    async def story() -> None:
        world = Recorded(servers=3, goal=2)
        chunk = await written(world)
        first, second = holders(world, chunk)
        (third,) = {0, 1, 2} - {first, second}
        wrong = world.servers[third]
        wrong.copies[chunk] = world.servers[first].copies[chunk]  # by its name only
        world.report()
        obey = wrong.obey

        def refuses(order: Any, there: World) -> None:
            if isinstance(order, m.Confirm):
                raise ReplyError(Status.BAD_CRC)
            obey(order, there)

        wrong.obey = refuses  # type: ignore[method-assign]

        async def idle(healer: Healer) -> None:
            world.hub.servers[wrong.uuid].total += 1  # one of the others is the fullest
            await until(lambda: bool(world.of(m.Confirm)))
            await asyncio.sleep(0.3)

        await healed(world, idle)
        assert not world.of(m.Destroy) and not world.of(ops.DropCopy)

    asyncio.run(story())


def test_a_damaged_copy_of_a_deleted_file_goes_as_the_others_do() -> None:
    async def story() -> None:
        world = Recorded(servers=2, goal=2)
        chunk = await written(world)
        server = world.servers[1]
        rot(world, 1, chunk)
        known = world.hub.servers[server.uuid]
        obey = server.obey

        def destroys(order: Any, there: World) -> None:
            obey(order, there)
            if isinstance(order, m.Destroy):
                world.hub.handle(known.link, m.Changed([], [m.CopyId(chunk, 1)], []))

        server.obey = destroys  # type: ignore[method-assign]
        world.apply(world.session, 2, ops.Unlink(1, b"f"))
        await healed(world, lambda h: until(lambda: read.chunk(world.rows, chunk) is None))
        assert len(world.of(m.Destroy)) == 2 and world.hub.damaged == {}

    asyncio.run(story())


def test_copies_on_a_disk_to_be_pulled_are_made_elsewhere_before_they_go() -> None:
    async def story() -> None:
        world = Recorded(servers=3, goal=2)
        chunk = await written(world)
        here, there = holders(world, chunk)
        known = world.hub.servers[world.servers[here].uuid]
        world.hub.handle(known.link, m.Changed([], [], [], (), (chunk,)))
        (free,) = {0, 1, 2} - {here, there}
        await healed(world, lambda h: until(lambda: holders(world, chunk) == sorted({there, free})))
        (replicated,), (drop,), (gone,) = map(world.of, (m.Replicate, ops.DropCopy, m.Destroy))
        assert replicated < drop < gone and known.leaving == set()
        world.check()

    asyncio.run(story())


def test_a_writer_hears_at_once_that_all_disks_are_full_but_waits_for_a_server() -> None:
    async def story() -> None:
        world = Recorded(servers=2, goal=2)
        grants = await world.elect()

        async def refused() -> int:
            for server in world.hub.servers.values():
                world.hub.handle(server.link, m.Space(1000, 1000, 0, (), 0))
            with pytest.raises(ReplyError) as e:
                await grants.grant(world.session, m.WriteChunk(world.inode, 0, []))
            return e.value.status

        assert await refused() == errno.ENOSPC
        world.crash(world.servers[1])
        assert await refused() == Status.NO_SERVERS

    asyncio.run(story())
