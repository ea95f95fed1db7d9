"""Grants: the chunk protocol keeps every acknowledged write on every copy that counts."""

import asyncio
import os
import random

import pytest

from raftfs.errors import LinkError, NotLeader, ReplyError, Status
from raftfs.meta.grants import Grants
from raftfs.meta.state import read
from raftfs.meta.state.model import ChunkRow
from raftfs.wire import messages as m
from raftfs.wire import ops
from tests.unit.meta.fake_cluster import FakeServer, World

SEEDS = int(os.environ.get("RAFTFS_SEEDS", "60"))


def ask(world: World, failed: list[bytes] | None = None, acked: bool = False) -> m.WriteChunk:
    return m.WriteChunk(world.inode, 0, failed or [], acked)


def run(story) -> None:
    asyncio.run(asyncio.wait_for(story, 30))


def test_a_fresh_chunk_gets_as_many_servers_as_its_goal() -> None:
    async def story() -> None:
        world = World(1, servers=4, goal=3)
        grants = await world.elect()
        grant = await grants.grant(world.session, ask(world))
        assert grant.fresh and len({c.server for c in grant.copies}) == 3
        assert world.write(grant) == []
        assert world.finish(grant) == 0

    run(story())


def test_reopening_under_the_same_leader_raises_nothing_under_a_new_one_it_does() -> None:
    async def story() -> None:
        world = World(2, servers=3, goal=3)
        grants = await world.elect()
        first = await grants.grant(world.session, ask(world))
        world.write(first)
        world.finish(first)
        world.report()
        again = await grants.grant(world.session, ask(world))
        assert (again.chunk, again.version) == (first.chunk, first.version)
        assert again.lock > first.lock
        world.finish(again)
        grants = await world.elect()
        third = await grants.grant(world.session, ask(world))
        assert third.chunk == first.chunk and third.version > first.version

    run(story())


def test_another_session_is_told_to_wait() -> None:
    async def story() -> None:
        world = World(3)
        grants = await world.elect()
        await grants.grant(world.session, ask(world))
        with pytest.raises(ReplyError) as error:
            await grants.grant(world.new_session(), ask(world))
        assert error.value.status == Status.LOCKED

    run(story())


def test_a_failed_server_is_voted_out_and_replaced_before_the_writer_goes_on() -> None:
    async def story() -> None:
        world = World(4, servers=4, goal=3)
        grants = await world.elect()
        first = await grants.grant(world.session, ask(world))
        world.write(first)
        dead = world.servers[first.copies[1].port]
        world.crash(dead)
        assert world.write(first) == [dead.uuid]
        world.report()
        second = await grants.grant(world.session, ask(world, [dead.uuid], acked=True))
        assert dead.uuid not in {c.server for c in second.copies}
        assert len(second.copies) == 3, "the fourth server got a copy first"
        assert world.write(second) == []
        world.check()
        world.restart(dead)
        row = read.chunk(world.rows, first.chunk)
        assert row is not None
        assert dead.uuid not in grants.verdict(row).chosen, "its copy is stale"

    run(story())


def test_an_old_leader_is_not_obeyed() -> None:
    async def story() -> None:
        world = World(5, servers=3, goal=2)
        grants = await world.elect()
        first = await grants.grant(world.session, ask(world))
        world.write(first)
        old_hub = world.hub
        await world.elect()
        server = first.copies[0].server
        with pytest.raises(ReplyError) as error:
            await old_hub.order(server, m.Destroy(1, first.chunk, 0))
        assert error.value.status == Status.OLD_TERM
        assert first.chunk in world.servers[first.copies[0].port].copies

    run(story())


def test_a_chunk_with_acknowledged_bytes_is_never_replaced() -> None:
    async def story() -> None:
        world = World(6, servers=3, goal=2)
        grants = await world.elect()
        first = await grants.grant(world.session, ask(world))
        world.write(first)
        for copy in first.copies:
            world.crash(world.servers[copy.port])
        failed = [c.server for c in first.copies]
        with pytest.raises(ReplyError) as error:
            await grants.grant(world.session, ask(world, failed, acked=True))
        assert error.value.status == Status.NO_COPIES
        # nothing acknowledged: the index gets a new chunk
        fresh = await grants.grant(world.session, ask(world, failed, acked=False))
        assert fresh.chunk != first.chunk and fresh.fresh

    run(story())


async def back(world: World, server: FakeServer) -> None:
    """The server returns and obeys the leader."""
    world.restart(server)
    while not world.hub.is_fenced(world.hub.servers[server.uuid]):
        await asyncio.sleep(0)


def test_a_copy_that_a_power_cut_robbed_is_outdated_by_the_sure_one() -> None:
    async def story() -> None:
        world = World(9, servers=3, goal=2)
        grants = await world.elect()
        first = await grants.grant(world.session, ask(world))
        world.write(first)
        world.sync(first)
        world.write(first)
        world.finish(first)
        world.report()
        robbed = world.servers[first.copies[0].port]
        world.power_cut(robbed)
        await back(world, robbed)
        row = read.chunk(world.rows, first.chunk)
        assert row is not None
        sure = first.copies[1].server
        assert [c.server for c in grants.locations(row, "host")] == [sure]
        verdict = grants.verdict(row)
        assert verdict.chosen == (sure,) and verdict.settle
        again = await grants.grant(world.session, ask(world))
        assert robbed.uuid not in {c.server for c in again.copies} or again.version > first.version
        assert len(again.copies) == 2
        world.check()

    run(story())


def test_the_only_copy_is_raised_before_it_is_written_after_a_power_cut() -> None:
    async def story() -> None:
        world = World(11, servers=1, goal=1)
        grants = await world.elect()
        first = await grants.grant(world.session, ask(world))
        world.write(first)
        world.sync(first)
        world.write(first)
        world.finish(first)
        world.report()
        world.power_cut(world.servers[0])
        await back(world, world.servers[0])
        again = await grants.grant(world.session, ask(world))  # this leader gave the first, too
        assert again.version > first.version
        assert world.write(again) == []
        world.check()

    run(story())


def test_doubtful_copies_alone_wait_for_a_sure_one_and_one_of_all_is_chosen() -> None:
    async def story() -> None:
        world = World(10, servers=3, goal=2)
        grants = await world.elect()
        first = await grants.grant(world.session, ask(world))
        world.write(first)
        world.sync(first)
        world.write(first)
        world.finish(first)
        world.report()
        both = [world.servers[c.port] for c in first.copies]
        world.crash(both[1])
        world.power_cut(both[0])
        await back(world, both[0])
        row = read.chunk(world.rows, first.chunk)
        assert row is not None and grants.awaits_copies(row), "the other one may be sure"
        assert grants.locations(row, "host") == []
        with pytest.raises(ReplyError) as error:
            await grants.grant(world.session, ask(world))
        assert error.value.status == Status.NO_COPIES
        world.power_cut(both[1])
        await back(world, both[1])
        row = read.chunk(world.rows, first.chunk)
        assert row is not None and not grants.awaits_copies(row)
        assert grants.locations(row, "host") == [], "they may differ"
        await grants.settle(row)
        row = read.chunk(world.rows, first.chunk)
        assert row is not None and row.version > first.version
        (chosen,) = grants.locations(row, "host")
        held = world.servers[chosen.port].copies[first.chunk]
        assert world.synced[first.chunk] <= held.writes and not held.doubtful
def test_a_grant_that_finds_no_copy_leaves_no_lock_behind() -> None:
    """Its writer learns nothing of the grant, so it could never end it."""

    async def story() -> None:
        world = World(6, servers=3, goal=2)
        first = await (await world.elect()).grant(world.session, ask(world))
        world.write(first)
        assert world.finish(first) == 0
        grants = await world.elect()
        world.loss = 1.0  # the servers look connected, and no order arrives
        with pytest.raises(ReplyError) as error:
            await grants.grant(world.session, ask(world))
        assert error.value.status == Status.NO_COPIES
        world.loss = 0.0
        other = await grants.grant(world.new_session(), ask(world))
        assert other.chunk == first.chunk and other.version > first.version
        assert world.write(other) == []
        world.check()

    run(story())


def test_a_grant_that_finds_no_copy_keeps_what_was_not_committed_yet() -> None:
    """To unlock a chunk that is not born would remove it, with what its writer was promised."""

    async def story() -> None:
        world = World(6, servers=3, goal=2)
        grants = await world.elect()
        first = await grants.grant(world.session, ask(world))
        world.write(first)
        world.report()
        world.loss = 1.0
        with pytest.raises(ReplyError) as error:
            await grants.grant(world.session, ask(world, acked=True))
        assert error.value.status == Status.NO_COPIES
        world.loss = 0.0
        again = await grants.grant(world.session, ask(world, acked=True))
        assert again.chunk == first.chunk and world.acked[first.chunk]
        world.check()

    run(story())


def test_no_server_at_all() -> None:
    async def story() -> None:
        world = World(7, servers=0)
        grants = await world.elect()
        with pytest.raises(ReplyError) as error:
            await grants.grant(world.session, ask(world))
        assert error.value.status == Status.NO_SERVERS

    run(story())


async def torture(seed: int, steps: int = 120) -> int:
    """Random grants, writes, crashes, lost orders and leader changes; gives acknowledged writes."""
    chance = random.Random(seed)
    world = World(seed, servers=chance.choice([3, 4, 5]), goal=chance.choice([1, 2, 3]), loss=0.1)
    grants = await world.elect()
    grant: m.ChunkMap | None = None
    for _ in range(steps):
        grants, grant = await torture_step(world, grants, grant, chance)
    return world.acknowledged


async def torture_step(
    world: World, grants: Grants, grant: m.ChunkMap | None, chance: random.Random,
    *, power: bool = True,
) -> tuple[Grants, m.ChunkMap | None]:  # fmt: skip
    """One of the things that can happen; gives leader and grant after it."""
    step = chance.random()
    if step < 0.45:
        failed = world.write(grant, 0.1) if grant is not None else []
        acked = bool(grant and world.acked.get(grant.chunk))
        if failed or grant is None:
            work = asyncio.ensure_future(grants.grant(world.session, ask(world, failed, acked)))
            if chance.random() < 0.2:  # the leader dies at some await of this grant
                for _ in range(chance.randrange(12)):
                    await asyncio.sleep(0)
                grants = await world.elect()
            try:
                grant = await work
            except (ReplyError, LinkError, NotLeader):
                grant = None
    elif step < 0.5 and grant is not None:
        world.sync(grant)
    elif step < 0.6 and grant is not None:
        world.finish(grant)
        grant = None
    elif step < 0.75:
        up = [s for s in world.servers if s.up]
        if len(up) > 1:
            stop(world, chance.choice(up), chance.random() if power else 0.0)
    elif step < 0.92:
        down = [s for s in world.servers if not s.up]
        if down:
            world.restart(chance.choice(down))
    else:
        grants = await world.elect()
    world.report()
    world.check()
    row, _ = read.file_chunk(world.rows, world.inode, 0)
    if row is not None and not row.lock:
        await settle(world, grants, row)
        world.check()
    return grants, grant


def stop(world: World, server: FakeServer, sort: float) -> None:
    """A server dies; in some stories the power goes, of one machine or of all at once."""
    in_doubt = any(c.doubtful for s in world.servers for c in s.copies.values())
    if sort < 0.7 or in_doubt:  # a second power cut while one is not settled may lose by right
        world.crash(server)
    elif sort < 0.9:
        world.power_cut(server)
    else:
        world.power_cut(*(s for s in world.servers if s.up))


async def settle(world: World, grants: Grants, row: ChunkRow) -> None:
    """What the healer does with an unlocked chunk whose good copies differ."""
    if grants.verdict(row).settle and not grants.awaits_copies(row):
        try:
            await grants.settle(row)
        except (ReplyError, LinkError, NotLeader):
            return
        world.report()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_acknowledged_writes_survive_everything(seed: int) -> None:
    print(f"reproduce: pytest 'tests/unit/meta/test_grants.py' -k 'everything and {seed}'")
    asyncio.run(asyncio.wait_for(torture(seed), 60))


def test_the_torture_does_write() -> None:
    """The random stories acknowledge writes at all; else they would prove nothing."""
    total = sum(asyncio.run(torture(seed)) for seed in range(10))
    assert total > 100


def test_commit_with_a_lost_lock_is_refused() -> None:
    async def story() -> None:
        world = World(8, servers=3, goal=2)
        grants = await world.elect()
        first = await grants.grant(world.session, ask(world))
        world.write(first)
        world.apply(0, 0, ops.Unlock(first.chunk, first.lock))
        assert world.finish(first) != 0

    run(story())
