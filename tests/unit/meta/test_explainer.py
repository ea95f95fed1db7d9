"""What is told of chunks is what is so: outlooks come true, memory is bounded, nothing is invented.
"""

import asyncio
from typing import Any

import pytest

from raftfs.errors import ReplyError
from raftfs.meta import chunkhub, explainer, stories
from raftfs.meta.explainer import Explainer
from raftfs.meta.healer import Healer, HealingConfig
from raftfs.wire import inquiries as q
from raftfs.wire import messages as m
from raftfs.wire import ops
from tests.unit.meta.fake_cluster import FakeProposer
from tests.unit.meta.test_healer import Recorded, holders, until, written

SLOW = HealingConfig(0.0, 40.0, 300.0, orphan_delay_s=500.0, sweep_every_s=0.1)


class Asked:
    """A healer at work and an explainer beside it."""

    def __init__(self, world: Recorded, config: HealingConfig = SLOW) -> None:
        proposer: Any = FakeProposer(world, world.term)
        self.healer = Healer(world.rows, world.hub, world.grants, proposer, config)
        self.explainer = Explainer(world.rows, world.hub, world.grants, self.healer)
        self.plan = lambda chunk: self.explainer.explain(chunk).plan

    async def __aenter__(self) -> "Asked":
        self.healer.lead()
        await until(lambda: self.healer.swept)
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.healer.follow()


@pytest.mark.parametrize(
    ("lost", "delay", "delay_s"), [(1, "disconnected", 300.0), (2, "endangered", 40.0)]
)
def test_why_a_copy_waits_and_how_long(lost: int, delay: str, delay_s: float) -> None:
    async def story() -> None:
        world = Recorded(servers=6, goal=3)
        chunk = await written(world)
        down = holders(world, chunk)[:lost]
        async with Asked(world) as asked:
            assert asked.plan(chunk).step == "none"
            for number in down:
                world.crash(world.servers[number])
            asked.healer.examine([chunk], delay_s=0.0)
            await until(lambda: 0 < asked.plan(chunk).wait_s < delay_s)
            plan = asked.plan(chunk)
            assert (plan.step, plan.wanted, plan.delay, plan.delay_s) == (
                "add", lost, delay, delay_s
            )  # fmt: skip
            copies = asked.explainer.explain(chunk).copies
            away = {c.server[0] for c in copies if c.state == "away" and c.since > 0}
            assert away == set(down), "with its server, and no other one"
            assert sum(c.state == "good" for c in copies) == 3 - lost
            assert not world.of(m.Replicate), "it waits indeed"

    asyncio.run(story())


def test_an_outlook_without_delay_comes_true_and_is_remembered() -> None:
    async def story() -> None:
        world = Recorded(servers=4, goal=2)
        chunk = await written(world)
        async with Asked(world) as asked:
            world.apply(0, 0, ops.SetGoal(world.inode, 0, 3))
            assert asked.plan(chunk).step == "add" and asked.plan(chunk).wait_s == 0
            await until(lambda: len(holders(world, chunk)) == 3)
            await until(lambda: asked.plan(chunk).step == "none")
            world.apply(0, 0, ops.SetGoal(world.inode, 0, 2))
            assert (asked.plan(chunk).step, asked.plan(chunk).surplus) == ("surplus", 1)
            await until(lambda: len(holders(world, chunk)) == 2)
            await until(lambda: asked.plan(chunk).step == "none")
            story = asked.explainer.explain(chunk)
            happened = [(i.what, i.detail) for i in story.incidents]
            assert ("replicated", "") in happened and ("destroyed", "surplus") in happened
            (left,) = [c for c in story.copies if c.state == "left"]
            assert left.why == "destroyed" and left.server[0] not in holders(world, chunk)

    asyncio.run(story())


def test_a_repair_that_fails_says_why() -> None:
    async def story() -> None:
        world = Recorded(servers=3, goal=2)
        chunk = await written(world)
        async with Asked(world) as asked:
            world.loss = 1.0
            world.apply(0, 0, ops.SetGoal(world.inode, 0, 3))
            asked.healer.examine([chunk], delay_s=0.0)
            await until(lambda: asked.plan(chunk).error != "")
            plan = asked.plan(chunk)
            assert "Replicate: lost on the way there" in plan.error and plan.error_at > 0

    asyncio.run(story())


def test_a_missing_chunk_names_who_had_it_and_what_came_back_without_it() -> None:
    async def story() -> None:
        world = Recorded(servers=3, goal=2)
        chunk = await written(world)
        first, second = holders(world, chunk)
        async with Asked(world) as asked:
            assert asked.explainer.missing(0).chunks == []
            for number in (first, second):
                world.crash(world.servers[number])
            del world.servers[second].copies[chunk]  # its disk fails while it is down
            world.restart(world.servers[second])
            asked.healer.examine([chunk], delay_s=0.0)
            await until(lambda: asked.explainer.missing(0).total == 1)
            (problem,) = asked.explainer.missing(0).chunks
            assert (problem.chunk, problem.owner, problem.what) == (chunk, world.inode, "missing")
            told = {c.server[0]: (c.state, c.why) for c in problem.copies}
            assert told == {first: ("away", ""), second: ("left", "absent")}
            assert asked.explainer.missing(chunk).chunks == [], "the next page"
            assert asked.plan(chunk).step == "missing"
            (found,) = asked.explainer.check_chunks(0).problems
            assert (found.what, found.good) == ("missing", 0)

    asyncio.run(story())


def test_an_unknown_copy_is_listed_with_its_time_and_an_unknown_chunk_is_an_error() -> None:
    async def story() -> None:
        world = Recorded(servers=3, goal=2)
        await written(world)
        stranger = 77
        link = world.hub.servers[world.servers[0].uuid].link
        world.hub.handle(link, m.Changed([m.CopyId(stranger, 5)], [], []))
        async with Asked(world) as asked:
            await until(lambda: asked.explainer.orphans((0, b"")).total == 1)
            page = asked.explainer.orphans((0, b""))
            ((number, copy),) = page.copies
            assert (number, copy.version, copy.state) == (stranger, 5, "orphan")
            assert 400 < copy.kept_s <= 500
            assert asked.explainer.orphans((number, copy.server)).copies == []
            explained = asked.explainer.explain(stranger)
            assert not explained.known and explained.plan.step == "orphan"
            with pytest.raises(ReplyError):
                asked.explainer.explain(78)

    asyncio.run(story())


def test_memory_has_its_bounds_and_keeps_what_happened_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stories, "CHUNKS_MAX", 3)
    times = iter(range(1_000))
    kept = stories.Stories(lambda chunk: chunk != 99, lambda: next(times))
    for chunk in (1, 2, 3):
        kept.note(chunk, "raised")
    kept.note(1, "gone", b"a", 4)
    kept.note(99, "raised")  # nobody will ask
    kept.note(4, "raised")
    assert kept.incidents(2) == [] and kept.incidents(99) == []
    assert [i.what for i in kept.incidents(1)] == ["raised", "gone"]
    assert kept.left(1)[b"a"].version == 4
    for number in range(100):
        kept.note(1, "order failed", bytes([number]), number, "x" * 1_000)
    last = kept.incidents(1)
    assert len(last) == stories.INCIDENTS_MAX and last[-1].version == 99
    assert len(last[-1].detail) == stories.DETAIL_MAX
    assert kept.left(1)[b"a"].why == "gone", "who had it outlives what happened since"
    kept.came(1, b"a")
    assert kept.left(1) == {}


def test_tools_ask_in_bounded_questions() -> None:
    async def story() -> None:
        world = Recorded(servers=3, goal=2)
        await written(world)
        questions = Asked(world).explainer.questions()
        for ask in (q.WhereNodes(list(range(1_001))), q.FindNames(list(range(20_001)), 0),
                    q.CheckRows("X")):  # fmt: skip
            with pytest.raises(ReplyError):
                questions[type(ask)](ask)

    asyncio.run(story())


def test_copies_that_go_in_masses_are_remembered_within_bounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chunkhub, "NOTED_MAX", 2)
    monkeypatch.setattr(chunkhub, "ABSENT_MAX", 5)

    async def story() -> None:
        world = Recorded(servers=3, goal=2)
        await world.elect()
        server = world.hub.servers[world.servers[0].uuid]
        copies = [m.CopyId(number, 1) for number in range(1, 21)]
        world.hub.handle(server.link, m.Changed(copies, [], []))
        world.hub.handle(server.link, m.Changed([], copies, []))
        told = [bool(world.hub.stories.left(c.chunk)) for c in copies]
        assert told == [True] * 2 + [False] * 18
        assert list(server.absent) == [16, 17, 18, 19, 20] and server.absent_since > 0
        world.hub.handle(server.link, m.Changed([m.CopyId(18, 2)], [], []))
        assert 18 not in server.absent, "it has it again"

    asyncio.run(story())


def test_a_writer_is_named_and_its_chunk_is_its_business() -> None:
    async def story() -> None:
        world = Recorded(servers=3, goal=2)
        grants = await world.elect()
        grant = await grants.grant(world.session, m.WriteChunk(world.inode, 0, []))
        world.write(grant)
        async with Asked(world) as asked:
            assert asked.plan(grant.chunk).step == "writer"
            story = asked.explainer.explain(grant.chunk)
            assert (story.lock_session, story.locked_by) == (world.session, "test")
            assert story.lock == grant.lock and story.lock_time > 0 and not story.born
            page = asked.explainer.check_chunks(0)
            assert (page.checked, page.writing, page.problems) == (1, 1, [])
            world.finish(grant)
            world.report()
            assert asked.plan(grant.chunk).step == "none"
            assert asked.explainer.explain(grant.chunk).locked_by == ""

    asyncio.run(story())


def test_every_chunk_is_on_one_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explainer, "CHUNKS_PAGE", 2)

    async def story() -> None:
        world = Recorded(servers=3, goal=2)
        grants = await world.elect()
        for index in range(5):
            grant = await grants.grant(world.session, m.WriteChunk(world.inode, index, []))
            assert world.write(grant) == [] and world.finish(grant) == 0
        world.report()
        for server in world.servers:
            world.crash(server)
        async with Asked(world) as asked:
            checked, after, pages, found = 0, 0, 0, list[int]()
            while pages == 0 or after:
                page = asked.explainer.check_chunks(after)
                checked, after, pages = checked + page.checked, page.after, pages + 1
                found += [p.chunk for p in page.problems]
            assert checked == 5 and found == [1, 2, 3, 4, 5] and pages == 3
            listed, last = list[int](), 0
            while chunks := asked.explainer.missing(last).chunks:
                listed += [p.chunk for p in chunks]
                last = listed[-1]
            assert listed == found

    asyncio.run(story())
