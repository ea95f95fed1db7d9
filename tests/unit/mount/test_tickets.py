"""Tickets are renewed before they expire, and a refused one is nobody's error."""

import asyncio
import os
from typing import Any

import pytest

from raftfs.const import MIB
from raftfs.meta.tickets import Tickets
from raftfs.mount import reader
from raftfs.wire import messages as m
from tests.unit.mount.fake_masters import CLUSTER, KEY
from tests.unit.mount.harness import Bench, bench, run


async def _file(b: Bench) -> tuple[Any, bytes]:
    """Written, committed, opened to read."""
    handle = await b.create()
    data = os.urandom(200_000)
    await b.contents.write(handle, 0, data)
    await b.contents.flush(handle)
    again = await b.open(handle)
    assert await b.read(again, 0, 1000) == data[:1000]
    return again, data


def test_a_reader_whose_ticket_expired_goes_on_with_a_new_one() -> None:
    async def test() -> None:
        async with bench() as b:
            handle, data = await _file(b)
            b.cluster.age(400.0)
            b.cluster.sign(Tickets(KEY, lambda: CLUSTER))  # by the next leader
            handle.file.reader.forget_data()
            asked = b.cluster.state.counts["ReadChunk"]
            assert await b.read(handle, 100_000, 1000) == data[100_000:101_000]
            assert b.cluster.refused() == {"expired": 1}, "one copy refused: the others would too"
            assert b.cluster.state.counts["ReadChunk"] == asked + 1

    run(test)


def test_a_writer_whose_ticket_expired_writes_everything_under_a_new_grant() -> None:
    async def test() -> None:
        async with bench() as b:
            asked = b.asked()
            handle = await b.create()
            data = os.urandom(4 * MIB)
            await b.contents.write(handle, 0, data[: 2 * MIB])
            while not handle.file.writer.chunks[0].acked_to:
                await asyncio.sleep(0.001)
            b.cluster.age(400.0)
            b.cluster.sign(Tickets(KEY, lambda: CLUSTER))
            await b.contents.write(handle, 2 * MIB, data[2 * MIB :])
            await b.contents.flush(handle)
            assert b.cluster.refused()["expired"] and not b.cluster.refused()["none"]
            assert [a.failed for a in asked] == [[]] * len(asked), "no server is to blame"
            assert len(asked) > 1
            assert b.stored(0, handle) == b.stored(1, handle) == data

    run(test)


def test_a_map_is_renewed_in_the_background_before_its_ticket_expires(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once, and nobody waits for it: also not while there is no leader."""

    async def test() -> None:
        async with bench() as b:
            b.cluster.sign(Tickets(KEY, lambda: CLUSTER, 100.0))
            handle, data = await _file(b)
            counts = b.cluster.state.counts
            files = handle.file.reader

            def let_pass(seconds: float) -> None:
                known = files._maps.get(0)
                files._maps.set(0, known._replace(asked_at=known.asked_at - seconds))

            async def read() -> None:
                files.forget_data()
                assert await b.read(handle, 50_000, 1000) == data[50_000:51_000]

            before = counts["ReadChunk"]
            let_pass(49.0)
            await read()
            assert counts["ReadChunk"] == before
            b.cluster.masters.elect(None)
            let_pass(10.0)
            old = files._maps.get(0)
            await read()
            await read()
            assert files._maps.get(0) is old, "there is no leader, and it is used on"
            b.cluster.masters.elect(1)
            while files._maps.get(0) is old:
                await asyncio.sleep(0.01)
            assert counts["ReadChunk"] == before + 1
            assert files._maps.get(0).map.ticket != old.map.ticket
            let_pass(101.0)
            await read()
            assert counts["ReadChunk"] == before + 2, "an old one is not tried"
            assert not b.cluster.refused()

    monkeypatch.setattr(reader, "SEGMENT_AGE_S", 60.0)
    run(test)


def test_a_map_that_was_forgotten_does_not_come_back_by_its_renewal() -> None:
    async def test() -> None:
        async with bench() as b:
            handle, _ = await _file(b)
            files = handle.file.reader
            known = files._maps.get(0)
            renewal = asyncio.ensure_future(files._renew(0, known))
            files._renewing[0] = renewal
            files.forget_all()
            await renewal
            assert files._maps.get(0) is None and not files._renewing

    run(test)


def test_a_grant_is_given_up_before_its_ticket_expires() -> None:
    async def test() -> None:
        async with bench() as b:
            b.cluster.sign(Tickets(KEY, lambda: CLUSTER, 1.0))
            asked = b.asked()
            handle = await b.create()
            data = b""
            while len(asked) < 4:
                data += (more := os.urandom(1000))
                await b.contents.write(handle, len(data) - len(more), more)
                await asyncio.sleep(0.01)
            await b.contents.fsync(handle)
            assert b.stored(0, handle) == b.stored(1, handle) == data
            assert not b.cluster.refused()

    run(test)


def test_fsync_after_the_grant_has_a_ticket() -> None:
    async def test() -> None:
        async with bench() as b:
            handle = await b.create()
            await b.contents.write(handle, 0, b"abc")
            await b.contents.flush(handle)
            await b.contents.fsync(handle)
            assert b.sent(m.SyncData) and not b.cluster.refused()

    run(test)
