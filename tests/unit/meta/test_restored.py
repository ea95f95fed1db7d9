"""After a restore: metadata of an earlier moment, and copies of chunks that know more."""

import asyncio
import errno
import random
from typing import Any

import pytest
import structlog

from raftfs.errors import ReplyError, Status
from raftfs.meta.grants import Grants
from raftfs.meta.healer import Healer, HealingConfig
from raftfs.meta.state import invariants, read
from raftfs.meta.state.dictrows import DictRows
from raftfs.meta.state.model import ChunkRow, Row, chunk_key
from raftfs.meta.state.reseed import JUMP, VERSION_JUMP, reseeded
from raftfs.wire import messages as m
from raftfs.wire import ops
from tests.unit.meta.fake_cluster import World
from tests.unit.meta.test_grants import SEEDS, ask, torture_step
from tests.unit.meta.test_healer import QUICK, Recorded, healed, holders, until, written

KEPT = "copy newer than the restored metadata is kept"


class Restorable(Recorded):
    """A world whose masters can be lost."""

    def remember(self) -> dict[bytes, Row]:
        """An image of the state now."""
        return dict(self.rows.rows)

    async def restore(self, image: dict[bytes, Row]) -> Grants:
        """All masters are lost; new ones begin with the image. Who is up reports to them."""
        self.rows = DictRows()
        for key, row in image.items():
            new = reseeded(key, row)
            if new is not None:
                self.rows.put(key, new)
        invariants.check_all(self.rows)
        self.term += JUMP
        return await self.elect()

    def chunk(self, number: int) -> ChunkRow:
        """A chunk's row, which must be there."""
        row = read.chunk(self.rows, number)
        assert row is not None
        return row

    async def write_without(self, number: int) -> m.ChunkMap:
        """While this server is down, the others get a write that it lacks."""
        self.crash(self.servers[number])
        grant = await self.grants.grant(self.session, ask(self, acked=True))
        assert self.write(grant) == [] and self.finish(grant) == 0
        self.restart(self.servers[number])
        self.report()
        return grant


def run(story: Any) -> None:
    asyncio.run(asyncio.wait_for(story, 30))


async def lagging() -> tuple[Restorable, dict[bytes, Row], int]:
    """Three copies; after the image, all but those of servers 0 and 1 have become stale: two
    servers hold what the metadata say, one holds more.
    """
    world = Restorable(servers=3, goal=3)
    chunk = await written(world)
    image = world.remember()
    for number in (0, 1):
        world.crash(world.servers[number])
    grant = await world.grants.grant(world.session, ask(world, acked=True))
    assert world.write(grant) == [] and world.finish(grant) == 0
    assert grant.version > world.servers[0].copies[chunk].version
    return world, image, chunk


def test_readers_and_writers_get_the_newest_copies_although_they_are_fewer() -> None:
    async def story() -> None:
        world, image, chunk = await lagging()
        for number in (0, 1):
            world.servers[number].up = True
        grants = await world.restore(image)
        row = world.chunk(chunk)
        assert [c.port for c in grants.locations(row, "")] == [2]
        grant = await grants.grant(world.session, ask(world, acked=True))
        assert grant.version > row.restored
        assert world.write(grant) == [] and world.finish(grant) == 0
        for copy in grant.copies:
            assert world.servers[copy.port].copies[chunk].writes == {1, 2, 3}
        world.report()
        world.check()

    run(story())


def test_the_healer_brings_the_newest_copy_to_the_others() -> None:
    async def story() -> None:
        world, image, chunk = await lagging()
        for number in (0, 1):
            world.servers[number].up = True
        await world.restore(image)

        def equal() -> bool:
            copies = [s.copies[chunk] for s in world.servers if chunk in s.copies]
            return len(copies) == 3 and all(c.writes == {1, 2} for c in copies)

        await healed(world, lambda h: until(equal))
        assert world.chunk(chunk).settled == 2

    run(story())


def test_a_newer_copy_that_comes_too_late_is_kept_and_told_of() -> None:
    """Its bytes cannot count any more, because others were written; nobody destroys them soon."""

    async def story() -> None:
        world, image, chunk = await lagging()
        for number in (0, 1):
            world.servers[number].up = True
        late = world.servers[2]
        late.up = False
        grants = await world.restore(image)
        grant = await grants.grant(world.session, ask(world, acked=True))
        assert world.write(grant) == [] and world.finish(grant) == 0
        grants = await world.elect()
        again = await grants.grant(world.session, ask(world, acked=True))
        assert again.version > grant.version and world.finish(again) == 0
        world.restart(late)
        world.report()
        row = world.chunk(chunk)
        assert 2 not in [c.port for c in grants.locations(row, "")], "not readable"
        assert row.settled == 1 < late.copies[chunk].version <= row.restored < row.version
        config = HealingConfig(0.0, 0.0, 0.0, orphan_delay_s=0.6, sweep_every_s=0.1)

        async def wait(healer: Healer) -> None:
            await until(lambda: any(e["event"] == KEPT for e in said))
            await asyncio.sleep(0.2)
            assert late.copies[chunk].writes == {1, 2}
            await until(lambda: late.copies[chunk].version > row.restored)  # made anew

        with structlog.testing.capture_logs() as said:
            await healed(world, wait, config)
        (told,) = [e for e in said if e["event"] == KEPT]
        assert (told["version"], told["server"]) == (2, late.uuid.hex())

    run(story())


def test_a_copy_that_was_stale_before_the_image_goes_as_always() -> None:
    async def story() -> None:
        world = Restorable(servers=4, goal=3)
        chunk = await written(world)
        number = holders(world, chunk)[0]
        await world.write_without(number)
        assert len(holders(world, chunk)) == 4, "three good ones and a stale one"
        await world.restore(world.remember())
        await healed(world, lambda h: until(lambda: len(holders(world, chunk)) == 3))
        assert number not in holders(world, chunk)
        assert world.of(ops.SetVersion) == world.of(ops.SetVersion)[:1], "nothing was raised for it"

    run(story())


def test_what_was_doomed_or_unborn_in_the_image_may_have_been_written_since() -> None:
    """The image is of the moment after a grant. When the file goes, the copies with bytes that were
    acknowledged later are kept for the delay.
    """

    async def story() -> None:
        world = Restorable(servers=3, goal=2)
        grants = await world.elect()
        grant = await grants.grant(world.session, ask(world))
        image = world.remember()
        assert world.write(grant) == [] and world.finish(grant) == 0
        await world.restore(image)
        assert world.chunk(grant.chunk).lock == 0 and not world.chunk(grant.chunk).born
        world.apply(0, 0, ops.Unlink(1, b"f"))
        world.apply(0, 0, ops.EndSession(world.session))
        assert read.doomed(world.rows, 0, 9) == [grant.chunk]
        config = HealingConfig(0.0, 0.0, 0.0, orphan_delay_s=0.6, sweep_every_s=0.1)

        async def wait(healer: Healer) -> None:
            await until(lambda: sum(e["event"] == KEPT for e in said) == 2)
            assert world.of(m.Destroy) == []
            await until(lambda: read.chunk(world.rows, grant.chunk) is None)

        with structlog.testing.capture_logs() as said:
            await healed(world, wait, config)

    run(story())


def test_just_after_a_bootstrap_writers_and_readers_wait_for_all_copies() -> None:
    async def story() -> None:
        world, image, chunk = await lagging()
        await world.restore(image)
        grants = Grants(
            world.rows, world.hub, world.grants._proposer, lambda: world.term, patience_s=60.0
        )
        row = world.chunk(chunk)
        assert grants.awaits_copies(row) and grants.locations(row, "") == []
        with pytest.raises(ReplyError) as refused:
            await grants.grant(world.session, ask(world, acked=True))
        assert refused.value.status == Status.NO_COPIES
        healer = Healer(world.rows, world.hub, grants, world.grants._proposer, QUICK)
        healer.lead()
        await asyncio.sleep(0.5)
        await healer.follow()
        assert world.of(m.RaiseVersion)[-1] < world.of(ops.CommitWrite)[-1], "nothing since"
        for number in (0, 1):
            world.restart(world.servers[number])
        for _ in range(20):
            await asyncio.sleep(0)
        assert [c.port for c in grants.locations(row, "")] == [2]
        await grants.grant(world.session, ask(world, acked=True))

    run(story())


def test_numbers_of_the_lost_masters_are_never_used_again() -> None:
    async def story() -> None:
        world = Restorable(servers=3, goal=2)
        image = world.remember()
        chunk = await written(world)
        lost_term, lost = world.term, world.new_session()
        lost_lock = world.apply(world.session, 0, ops.GrantWrite(world.inode, 0, False))
        assert lost_lock.status == 0
        grants = await world.restore(image)
        assert world.term > lost_term + JUMP // 2
        grant = await grants.grant(world.session, ask(world))
        assert grant.chunk > chunk + JUMP // 2 and grant.lock > JUMP
        assert world.new_session() > lost + JUMP // 2
        made = ops.Create(1, b"new", 1, 0o644, 0, 0, 0)
        result = world.apply(world.session, 9, made)
        assert read.lookup(world.rows, 1, b"new").inode > JUMP and result.status == 0

    run(story())


def test_versions_go_beyond_what_any_copy_can_have() -> None:
    row = ChunkRow(7, 3, 5, 1, 2, 0, 0, 0, True, 1, 0)
    key = chunk_key(7)
    once = reseeded(key, row)
    assert isinstance(once, ChunkRow)
    assert (once.version, once.reserved, once.restored) == (3, 5 + VERSION_JUMP, 5 + VERSION_JUMP)
    twice = reseeded(key, once)
    assert isinstance(twice, ChunkRow)
    assert twice.version == 3 and twice.restored == 5 + 2 * VERSION_JUMP


def test_locks_of_the_lost_time_do_not_stay() -> None:
    """The mount gave its lock back after the image; nobody would ever give it back again."""

    async def story() -> None:
        world = Restorable(servers=3, goal=2)
        grants = await world.elect()
        grant = await grants.grant(world.session, ask(world))
        image = world.remember()
        assert world.write(grant) == [] and world.finish(grant) == 0
        grants = await world.restore(image)
        other = await grants.grant(world.new_session(), ask(world))
        assert other.chunk == grant.chunk and other.version > grant.version
        assert world.finish(grant) == errno.ESTALE, "the old grant is no grant"

    run(story())


async def torture(seed: int) -> int:
    """As in test_grants, but at some moment the masters fall back; gives what was acknowledged
    in the time that they forgot.
    """
    chance = random.Random(seed)
    world = Restorable.__new__(Restorable)
    world.story = []
    World.__init__(world, seed, servers=chance.choice([3, 4]), goal=2, loss=0.1)
    grants, grant = await world.elect(), None
    first = await grants.grant(world.session, ask(world))
    world.write(first)
    world.finish(first)
    image: dict[bytes, Row] = {}
    for step in range(90):
        if step == 20:
            image, before = world.remember(), world.writes
        grants, grant = await torture_step(world, grants, grant, chance, power=False)
    forgotten = [w for acked in world.acked.values() for w in acked if w > before]
    for server in world.servers:
        server.up = True
    world.loss = 0.0
    grants = await world.restore(image)
    row, _ = read.file_chunk(world.rows, world.inode, 0)
    assert row is not None
    for copy in grants.locations(row, ""):
        lost = world.acked.get(row.id, set()) - world.servers[copy.port].copies[row.id].writes
        assert not lost, f"server {copy.port} at {copy.version} lacks {lost}"
    again = await grants.grant(world.session, ask(world, acked=True))
    assert world.write(again) == [] and world.finish(again) == 0
    world.report()
    world.check()
    return len(forgotten)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_acknowledged_writes_survive_a_restore(seed: int) -> None:
    print(f"reproduce: pytest 'tests/unit/meta/test_restored.py' -k 'a_restore and {seed}'")
    asyncio.run(asyncio.wait_for(torture(seed), 60))


def test_the_torture_does_forget() -> None:
    assert sum(asyncio.run(torture(seed)) for seed in range(10)) > 50


