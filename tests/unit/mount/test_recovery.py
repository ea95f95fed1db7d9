"""Copies fail, masters change, locks fall: what was written stays, once, in order."""

import asyncio
import os
from typing import Any

import pytest

from raftfs.const import MIB
from raftfs.errors import ReplyError
from raftfs.mount import chunkwriter, reader
from raftfs.mount.reader import ReadError
from raftfs.mount.writecontext import WriteError
from raftfs.wire import messages as m
from raftfs.wire import ops
from tests.unit.mount.harness import Bench, bench, run


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence is noticed sooner than in production."""
    monkeypatch.setattr(chunkwriter, "ACK_TIMEOUT_S", 0.4)
    monkeypatch.setattr(reader, "FAST_TIMEOUT_S", 0.3)


async def _stream(b: Bench, mib: int, trouble: Any, at: int) -> tuple[Any, bytes]:
    """Write a file of `mib` MiB; `trouble()` happens after `at` of them, the first of which are
    acknowledged by then.
    """
    handle = await b.create()
    data = os.urandom(mib * MIB)
    for n in range(mib):
        if n == at:
            while not handle.file.writer.chunks[0].acked_to:
                await asyncio.sleep(0.001)
            trouble()
        await b.contents.write(handle, n * MIB, data[n * MIB : (n + 1) * MIB])
        await asyncio.sleep(0.01)
    await b.contents.flush(handle)
    assert b.length(handle) == len(data)
    return handle, data


def test_a_copy_that_fails_is_named_and_the_rest_is_written_again_without_it() -> None:
    async def test() -> None:
        async with bench(servers=3, goal=3) as b:
            asked = b.asked()
            second = b.cluster.servers[1]
            handle, data = await _stream(b, 6, lambda: setattr(second, "refuse_writes", 1), 3)
            assert [a.failed for a in asked] == [[], [second.uuid]]
            assert asked[1].acked
            assert b.stored(0, handle) == b.stored(2, handle) == data

    run(test)


def test_a_killed_first_server_costs_nothing_that_was_written() -> None:
    async def test() -> None:
        async with bench() as b:
            first = b.cluster.servers[0]

            def kill() -> None:
                first.close()
                b.cluster.state.dead = {first.uuid}

            handle, data = await _stream(b, 8, kill, 4)
            assert b.stored(1, handle) == data
            again = await b.open(handle)
            assert await b.read(again, 0, len(data)) == data

    run(test)


def test_nothing_acknowledged_yet_means_a_new_chunk_elsewhere() -> None:
    async def test() -> None:
        async with bench(servers=2, goal=1) as b:
            b.cluster.servers[0].close()
            asked = b.asked()
            handle = await b.create()
            await b.contents.write(handle, 0, b"abc")
            await b.contents.flush(handle)
            assert [a.acked for a in asked] == [False, False]
            assert b.stored(1, handle) == b"abc"

    run(test)


def test_a_silent_chain_is_left_first_without_blame() -> None:
    async def test() -> None:
        async with bench() as b:
            first = b.cluster.servers[0]
            asked = b.asked()

            def stop() -> None:
                first.mute = True

            handle, data = await _stream(b, 4, stop, 2)
            assert [a.failed for a in asked] == [[], [], [first.uuid]]
            assert b.stored(1, handle) == data

    run(test)


def test_the_only_copy_is_waited_for_until_it_is_back() -> None:
    async def test() -> None:
        async with bench(servers=1, goal=1) as b:
            (server,) = b.cluster.servers
            handle = await b.create()
            await b.contents.write(handle, 0, b"a" * 1000)
            await b.contents.fsync(handle)
            b.cluster.state.dead = {server.uuid}
            server.drop_connections()
            await b.contents.write(handle, 1000, b"b" * 1000)
            server.refuse_writes = 1
            task = asyncio.ensure_future(b.contents.flush(handle))
            await asyncio.sleep(0.4)
            assert not task.done()
            b.cluster.state.dead = set()
            await task
            assert b.stored(0, handle) == b"a" * 1000 + b"b" * 1000

    run(test)


def test_masters_may_change_while_a_file_is_written() -> None:
    async def test() -> None:
        async with bench() as b:
            leaders = iter([1, None, 2])

            def elect() -> None:
                b.cluster.masters.elect(next(leaders))

            handle = await b.create()
            data = os.urandom(5 * MIB)
            for at in range(0, len(data), 100_000):
                if at in (1_000_000, 2_000_000, 3_000_000):
                    elect()
                await b.contents.write(handle, at, data[at : at + 100_000])
                await asyncio.sleep(0.01)
            await b.contents.flush(handle)
            assert b.length(handle) == len(data)
            assert b.stored(0, handle) == data
            assert b.cluster.state.counts["Create"] == 1

    run(test)


def test_a_lock_lost_before_the_commit_is_taken_again_if_the_chunk_is_still_there() -> None:
    async def test() -> None:
        async with bench() as b:
            handle = await b.create()
            await b.contents.write(handle, 0, b"old" * 100)
            await b.contents.fsync(handle)  # the chunk is part of the file from now on
            await b.contents.write(handle, 300, b"new")
            await handle.file.writable().drain()
            b.cluster.state.end_grants(1)
            await b.contents.flush(handle)
            assert b.length(handle) == 303
            assert b.stored(0, handle) == b"old" * 100 + b"new"

    run(test)


def test_acknowledged_bytes_whose_chunk_was_let_go_are_a_loss_that_is_told() -> None:
    async def test() -> None:
        async with bench() as b:
            handle = await b.create()
            await b.contents.write(handle, 0, b"abc")
            await handle.file.writable().drain()
            b.cluster.state.end_grants(1)  # nothing was ever committed on it: it is let go
            with pytest.raises(WriteError) as lost:
                await b.contents.flush(handle)
            assert lost.value.errno == 5
            assert b.length(handle) == 0

    run(test)


def test_a_kept_connection_that_the_server_closed_blames_nobody() -> None:
    async def test() -> None:
        async with bench() as b:
            for name in (b"one", b"two"):
                asked = b.asked()
                handle = await b.create(name)
                await b.contents.write(handle, 0, name)
                await b.contents.flush(handle)
                b.cluster.servers[0].drop_after = 0  # the next request meets a closing server
            assert all(not a.failed for a in asked)
            assert b.stored(1, handle) == b"two"

    run(test)


# --- reading


async def _written(b: Bench, size: int = 100_000) -> tuple[Any, bytes]:
    handle = await b.create()
    data = os.urandom(size)
    await b.contents.write(handle, 0, data)
    await b.contents.flush(handle)
    return handle, data


def test_damaged_bytes_are_read_from_another_copy() -> None:
    async def test() -> None:
        async with bench() as b:
            handle, data = await _written(b)
            b.cluster.servers[0].corrupt = True
            assert await b.read(handle, 0, len(data)) == data

    run(test)


def test_bytes_that_are_damaged_everywhere_are_an_error_at_once() -> None:
    async def test() -> None:
        async with bench() as b:
            handle, data = await _written(b)
            for server in b.cluster.servers:
                server.corrupt = True
            with pytest.raises(ReadError) as lost:
                await asyncio.wait_for(b.read(handle, 0, len(data)), 1.0)
            assert lost.value.errno == 5

    run(test)


def test_a_silent_server_is_left_for_another_copy_and_asked_last_from_then_on() -> None:
    async def test() -> None:
        async with bench() as b:
            handle, data = await _written(b, 3 * MIB)
            b.cluster.servers[0].mute = True
            before = len(b.sent(m.ReadData))
            for at in range(0, len(data), MIB):
                assert await b.read(handle, at, MIB) == data[at : at + MIB]
            assert len(b.sent(m.ReadData)) - before <= 3  # not once for every read

    run(test)


def test_reading_waits_for_a_copy_until_the_timeout_and_then_fails() -> None:
    async def test() -> None:
        async with bench(servers=1, goal=1, timeout_s=0.6) as b:
            handle, data = await _written(b)
            b.cluster.servers[0].close()
            with pytest.raises(ReadError):
                await asyncio.wait_for(b.read(handle, 0, len(data)), 5.0)

    run(test)


def test_a_moved_chunk_is_found_again() -> None:
    async def test() -> None:
        async with bench(servers=2, goal=1) as b:
            handle, data = await _written(b)
            assert await b.read(handle, 0, 10) == data[:10]
            handle.file.reader.forget_data()
            first, second = b.cluster.servers
            (chunk,) = first.copies
            second.copies[chunk] = first.copies.pop(chunk)
            b.cluster.state.copies[chunk] = [second.location]
            assert await b.read(handle, 0, len(data)) == data

    run(test)


# --- holding files


def test_a_file_is_acquired_once_and_released_once() -> None:
    async def test() -> None:
        async with bench() as b:
            handle, _ = await _written(b)
            await b.contents.release(handle)
            for _ in range(5):
                again = await b.open(handle)
                await b.contents.release(again)
            assert b.cluster.state.counts["Acquire"] == 0  # Create had acquired it
            await b.volume.unlink(1, b"file")  # freed, and nobody has it open
            for _ in range(100):
                await asyncio.sleep(0.01)
                if b.cluster.state.counts["Release"]:
                    break
            assert b.cluster.state.counts["Release"] == 1
            with pytest.raises(ReplyError):
                await b.volume.getattr(handle.file.inode)

    run(test)


def test_an_unlinked_file_lives_while_it_is_open() -> None:
    async def test() -> None:
        async with bench() as b:
            handle, data = await _written(b)
            await b.volume.unlink(1, b"file")
            assert await b.read(handle, 0, len(data)) == data
            await b.contents.write(handle, 0, b"X")
            await b.contents.flush(handle)
            assert await b.read(handle, 0, 2) == b"X" + data[1:2]
            await b.contents.release(handle)

    run(test)


def test_opening_again_after_the_release_acquires_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    from raftfs.mount import handles

    monkeypatch.setattr(handles, "LINGER_S", 0.0)
    monkeypatch.setattr(handles, "_REAP_S", 0.02)

    async def test() -> None:
        async with bench() as b:
            handle, data = await _written(b)
            await b.contents.release(handle)
            while not b.cluster.state.counts["Release"]:
                await asyncio.sleep(0.01)
            again = await b.open(handle)
            assert b.cluster.state.counts["Acquire"] == 1
            assert await b.read(again, 0, 10) == data[:10]

    run(test)


def test_the_kernel_may_keep_its_pages_only_if_nothing_changed() -> None:
    async def test() -> None:
        async with bench() as b:
            handle, _ = await _written(b)
            inode = handle.file.inode
            keeps = []
            for change in (None, None, ops.SetAttr(inode, mtime=5), None):
                if change is not None:
                    b.cluster.state.commit(change)  # another client's
                    await b.volume.lookup(1, b"file")  # as the kernel does before each open
                again, keep = await b.contents.open(inode, writes=False, truncate=False)
                await b.contents.release(again)
                keeps.append(keep)
            assert keeps == [False, True, False, True]

    run(test)


def test_what_others_wrote_is_seen_at_the_next_open() -> None:
    async def test() -> None:
        async with bench() as b:
            handle, data = await _written(b)
            assert await b.read(handle, 0, 10) == data[:10]
            inode = handle.file.inode
            (chunk,) = b.cluster.servers[0].copies
            for server in b.cluster.servers:
                server.copies[chunk].write(0, b"theirs")
            grant = b.cluster.state.grant(0, m.WriteChunk(inode, 0, []))
            written = [ops.Written(chunk, grant.lock, True)]
            b.cluster.state.commit(ops.CommitWrite(inode, 0, 99, written))
            await b.volume.lookup(1, b"file")
            again = await b.open(handle)
            assert await b.read(again, 0, 6) == b"theirs"

    run(test)
