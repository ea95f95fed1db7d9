"""Requests survive whatever happens to the leader, and take effect once."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from raftfs.client.meta import MetaClient
from raftfs.client.session import Session
from raftfs.const import SESSION_WINDOW
from raftfs.errors import LinkError, ReplyError, Status, UserError
from raftfs.wire import messages as m
from raftfs.wire import ops
from raftfs.wire.ops import NodeType
from tests.unit.mount.fake_cluster import FakeCluster

LIMIT_S = 20.0


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run a test's coroutine, with a limit."""

    async def limited() -> None:
        await asyncio.wait_for(test(), LIMIT_S)

    asyncio.run(limited())


@asynccontextmanager
async def client(
    cluster: FakeCluster | None = None, timeout_s: float = 10.0, **session: Any
) -> AsyncIterator[tuple[FakeCluster, MetaClient]]:
    """A started client of a fake cluster."""
    cluster = cluster or FakeCluster(1)
    await cluster.start()
    meta = MetaClient(cluster.masters.addresses, Session(**session), timeout_s=timeout_s)
    try:
        await meta.start(5.0)
        yield cluster, meta
    finally:
        await meta.close()
        await cluster.stop()


def make(name: bytes) -> ops.Create:
    """A file in the root."""
    return ops.Create(1, name, NodeType.FILE, 0o644, 0, 0, 0)


def unanswered(cluster: FakeCluster, kind: type) -> list[Any]:
    """From now on mutations of that kind take effect and are never answered; those seen."""
    seen: list[Any] = []

    def fault(ask: Any) -> Any:
        if isinstance(ask, m.Mutate) and isinstance(ask.op, kind):
            seen.append(ask)
            cluster.state.commit(ask.op, 1, ask.seq)
            return asyncio.get_running_loop().create_future()
        return None

    cluster.masters.faults.append(fault)
    return seen


def test_calls_and_mutations_are_answered_decoded() -> None:
    async def test() -> None:
        async with client() as (cluster, meta):
            made = await meta.mutate(make(b"a"))
            assert isinstance(made, ops.Attr)
            assert await meta.call(m.Lookup(1, b"a")) == made
            with pytest.raises(ReplyError) as missing:
                await meta.call(m.Lookup(1, b"b"))
            assert missing.value.status == 2
            assert cluster.state.counts["NewSession"] == 1

    run(test)


def test_a_mutation_whose_answer_was_lost_takes_effect_once() -> None:
    async def test() -> None:
        async with client() as (cluster, meta):
            seen = unanswered(cluster, ops.Create)
            task = asyncio.ensure_future(meta.mutate(make(b"a")))
            while not seen:
                await asyncio.sleep(0.005)
            cluster.masters.faults.clear()
            await cluster.masters.masters[0].stop()
            cluster.masters.elect(1)
            made = await task
            assert cluster.state.find("/a") == made
            assert cluster.state.counts["Create"] == 1
            assert cluster.state.counts["again"] == 1  # the retry had the same number

    run(test)


def test_outstanding_requests_move_at_once_from_a_silent_leader() -> None:
    async def test() -> None:
        async with client() as (cluster, meta):
            cluster.masters.masters[0].silent = True
            tasks = [asyncio.ensure_future(meta.mutate(make(b"%d" % n))) for n in range(50)]
            tasks.append(asyncio.ensure_future(meta.call(m.GetAttr(1))))
            await asyncio.sleep(0.05)
            assert not any(task.done() for task in tasks)
            begin = time.monotonic()
            cluster.masters.elect(2)
            await asyncio.gather(*tasks)
            assert time.monotonic() - begin < 0.5
            order = [c.seq for c in cluster.state.applied if isinstance(c.op, ops.Create)]
            assert order == sorted(order)
            assert len(order) == 50

    run(test)


def test_leadership_may_wander_while_mutations_run() -> None:
    async def test() -> None:
        async with client() as (cluster, meta):
            tasks = [asyncio.ensure_future(meta.mutate(make(b"%d" % n))) for n in range(300)]
            for leader in (1, None, 2, 0, None, 1):
                await asyncio.sleep(0.02)
                cluster.masters.elect(leader)
            await asyncio.gather(*tasks)
            assert cluster.state.counts["Create"] == 300

    run(test)


@pytest.mark.parametrize("status", [Status.UNKNOWN, Status.BUSY, Status.NOT_LEADER])
def test_answers_that_settle_nothing_are_asked_again_with_the_same_number(status: int) -> None:
    async def test() -> None:
        async with client() as (cluster, meta):
            seqs: list[int] = []

            def fault(ask: Any) -> Any:
                if isinstance(ask, m.Mutate):
                    seqs.append(ask.seq)
                    if len(seqs) < 3:
                        raise ReplyError(status)

            cluster.masters.faults.append(fault)
            await meta.mutate(make(b"a"))
            assert len(seqs) == 3
            assert len(set(seqs)) == 1

    run(test)


def test_numbers_never_run_ahead_of_the_oldest_unanswered_one() -> None:
    async def test() -> None:
        async with client() as (cluster, meta):
            held: list[asyncio.Future[Any]] = []
            seqs: list[int] = []

            def fault(ask: Any) -> Any:
                if isinstance(ask, m.Mutate):
                    seqs.append(ask.seq)
                    if ask.seq == 1:
                        held.append(asyncio.get_running_loop().create_future())
                        return held[0]
                return None

            cluster.masters.faults.append(fault)
            many = SESSION_WINDOW + 200
            tasks = [asyncio.ensure_future(meta.mutate(make(b"%d" % n))) for n in range(many)]
            await asyncio.sleep(1.0)
            assert max(seqs) < 1 + SESSION_WINDOW
            assert max(seqs) > SESSION_WINDOW // 2
            held[0].set_result(cluster.state.find("/1"))
            await asyncio.gather(*tasks)
            assert max(seqs) == many

    run(test)


def test_only_the_deadline_ends_a_request() -> None:
    async def test() -> None:
        async with client(timeout_s=0.6) as (cluster, meta):
            cluster.masters.elect(None)
            begin = time.monotonic()
            with pytest.raises(LinkError) as late:
                await meta.call(m.GetAttr(1))
            assert 0.5 < time.monotonic() - begin < 1.5
            assert late.value.errno == 5
            assert f":{cluster.masters.addresses[0][1]}" in str(late.value)
            cluster.masters.elect(0)
            assert (await meta.call(m.GetAttr(1), 5.0)).inode == 1

    run(test)


def test_a_leader_that_is_not_configured_is_found_through_the_others() -> None:
    async def test() -> None:
        cluster = await FakeCluster(1).start()
        meta = MetaClient(cluster.masters.addresses[1:2], Session())
        await meta.start(5.0)
        assert (await meta.call(m.GetAttr(1))).inode == 1
        assert cluster.masters.addresses[0] in meta.masters.addresses
        await meta.close()
        await cluster.stop()

    run(test)


def test_a_restarted_master_is_connected_again() -> None:
    async def test() -> None:
        async with client() as (cluster, meta):
            first = cluster.masters.masters[0]
            port = first.port
            await first.stop()
            task = asyncio.ensure_future(meta.call(m.GetAttr(1)))
            await asyncio.sleep(0.3)
            assert not task.done()
            await first.start(port)
            assert (await task).inode == 1
            assert meta.session.number == 1  # resumed, not new

    run(test)


def test_a_forgotten_session_begins_anew_and_says_so() -> None:
    async def test() -> None:
        async with client() as (cluster, meta):
            told: list[int] = []
            meta.on_new_session.append(lambda: told.append(1))
            cluster.state.commit(ops.EndSession(1))
            cluster.masters.masters[0].silent = True
            lost = asyncio.ensure_future(meta.mutate(make(b"a")))
            await asyncio.sleep(0.05)
            cluster.masters.elect(1)
            with pytest.raises(LinkError):
                await lost
            assert told == [1]
            await meta.mutate(make(b"b"))
            assert meta.session.number == 2

    run(test)


def test_the_password_decides() -> None:
    async def test() -> None:
        async with client(FakeCluster(1, password="right"), password="right") as (_, meta):
            assert meta.session.number == 1
        with pytest.raises(UserError, match="password"):
            async with client(FakeCluster(1, password="right"), password="wrong"):
                pass

    run(test)


def test_no_master_is_one_sentence() -> None:
    async def test() -> None:
        meta = MetaClient([("127.0.0.1", 1)], Session())
        with pytest.raises(UserError, match=r"127\.0\.0\.1:1 "):
            await meta.start(0.3)
        await meta.close()

    run(test)


def test_a_leader_that_was_asked_too_early_is_asked_again_when_it_leads() -> None:
    """A follower names the new leader before that can serve; meanwhile the old one hangs."""

    async def test() -> None:
        async with client() as (cluster, meta):
            masters = cluster.masters
            masters.masters[0].silent = True
            task = asyncio.ensure_future(meta.mutate(make(b"x")))
            await asyncio.sleep(0.02)
            masters.elect(1, ready=False)
            await asyncio.sleep(0.3)  # it was asked, and so was the silent one
            assert not task.done()
            masters.ready(1)
            await asyncio.wait_for(task, 1.0)

    run(test)
