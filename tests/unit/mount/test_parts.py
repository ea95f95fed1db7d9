"""The small parts: budget, recent entries, block merging, directory pages, .masterinfo."""

import asyncio
import json
from typing import Any

import pytest

from raftfs.const import KIB, MIB
from raftfs.errors import ReplyError
from raftfs.mount.blocks import SYNC, BlockQueue
from raftfs.mount.cache import Budget, Recent
from raftfs.mount.handles import DIR_PAGE
from raftfs.mount.volume import MASTERINFO, MASTERINFO_INODE, DeniedError
from raftfs.wire import ops
from raftfs.wire.ops import NodeType
from tests.unit.mount.harness import bench, run


def test_budget_serves_first_come_first_served() -> None:
    async def test() -> None:
        budget = Budget(100)
        assert budget.try_take(60)
        big = asyncio.ensure_future(budget.take(90))
        await asyncio.sleep(0)
        assert not budget.try_take(10)  # though there is room: somebody waits already
        small = asyncio.ensure_future(budget.take(10))
        await asyncio.sleep(0)
        budget.give(60)
        await asyncio.gather(big, small)
        assert budget.used == 100
        big = asyncio.ensure_future(budget.take(50))
        await asyncio.sleep(0)
        big.cancel()
        budget.give(100)
        assert budget.used == 0
        assert budget.try_take(1_000)  # alone, more than the limit is let through

    run(test)


def test_recent_forgets_the_least_recently_used() -> None:
    recent: Recent[int, str] = Recent(2)
    recent.set(1, "a")
    recent.set(2, "b")
    assert recent.get(1) == "a"
    recent.set(3, "c")
    assert [recent.get(n) for n in (1, 2, 3)] == ["a", None, "c"]


def test_blocks_end_at_mebibyte_borders_and_merge_only_neighbours() -> None:
    queue = BlockQueue()
    queue.write(MIB - 10, memoryview(b"x" * 20))
    queue.write(MIB + 10, memoryview(b"y" * 5))
    queue.write(5, memoryview(b"z"))
    shape = [(b.offset, b.end, b.sealed) for b in queue.queue]
    assert shape == [(MIB - 10, MIB, True), (MIB, MIB + 15, True), (5, 6, False)]
    assert queue.queue[1].payload() == b"x" * 10 + b"y" * 5


def test_blocks_are_retired_in_order_and_sent_again_in_order() -> None:
    queue = BlockQueue()
    for n in range(3):
        queue.write(n * 100 * KIB, memoryview(bytes([n])))
    queue.append(SYNC, 0, 0)
    taken = []
    while (block := queue.take()) is not None:
        block.ident = len(taken) + 1
        queue.put_sent(block)
        taken.append(block)
    queue.acknowledged(1)
    queue.acknowledged(3)
    assert queue.retire() == taken[:1]  # the third waits for the second
    assert queue.again()  # something unretired had been acknowledged
    assert list(queue.queue) == taken[1:]
    assert queue.in_flight == 0


def test_directory_pages_follow_one_another_while_names_come_and_go() -> None:
    async def test() -> None:
        async with bench() as b:
            state = b.cluster.state
            names = [b"%06d" % n for n in range(2 * DIR_PAGE + 10)]
            for name in names:
                state.commit(ops.Create(1, name, NodeType.FIFO, 0o644, 0, 0, 0))
            directory = b.volume.opendir(1)
            seen: list[bytes] = []
            position = 0
            while True:
                page, place = await directory.page(position)
                for name, _ in page.entries[place : place + 300]:
                    seen.append(name)
                    position += 1
                    state.commit(ops.Unlink(1, name))
                if not page.more and place + 300 >= len(page.entries):
                    break
            assert seen == names
            again, place = await directory.page(DIR_PAGE - 1)  # a position sought again
            assert place == DIR_PAGE - 1
            assert (await directory.page(0))[0].entries == []  # rewound: a new look
            assert again is not None

    run(test)


def test_masterinfo_tells_tools_where_the_masters_are() -> None:
    async def test() -> None:
        async with bench() as b:
            attr = await b.volume.lookup(1, MASTERINFO)
            content = b.volume.masterinfo()
            assert (attr.inode, attr.length) == (MASTERINFO_INODE, len(content))
            info: dict[str, Any] = json.loads(content)
            assert info["masters"] == [f"{h}:{p}" for h, p in b.cluster.masters.addresses]
            assert bytes.fromhex(info["cluster"]) == b"C" * 16
            assert (info["session"], info["root"]) == (1, 1)
            page, _ = await b.volume.opendir(1).page(0)
            assert MASTERINFO not in [name for name, _ in page.entries]
            for refused in (
                b.volume.unlink(1, MASTERINFO),
                b.volume.rename(1, MASTERINFO, 1, b"x", 0),
                b.volume.link(MASTERINFO_INODE, 1, b"x"),
            ):
                with pytest.raises(DeniedError):
                    await refused

    run(test)


def test_creating_what_somebody_else_just_created_opens_it_unless_exclusive() -> None:
    async def test() -> None:
        async with bench() as b:
            theirs = ops.Create(1, b"f", NodeType.FILE, 0o600, 0, 7, 7)
            b.cluster.state.commit(theirs)
            handle = await b.volume.create(1, b"f", 0o644, 0, 0, 0, exclusive=False)
            assert handle.file.attr.uid == 7
            with pytest.raises(ReplyError):
                await b.volume.create(1, b"f", 0o644, 0, 0, 0, exclusive=True)

    run(test)
