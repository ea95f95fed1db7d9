"""What close and fsync promise, what it costs, and that zeros are zeros."""

import asyncio
import os
import random
import time

import pytest

from raftfs.const import CHUNK_SIZE, KIB, MIB
from raftfs.errors import RaftfsError, ReplyError
from raftfs.mount import writer
from raftfs.mount.writecontext import WriteError
from raftfs.wire import messages as m
from raftfs.wire import ops
from tests.unit.mount.harness import Bench, bench, run


def test_a_small_file_costs_one_of_each() -> None:
    async def test() -> None:
        async with bench(goal=1) as b:
            before = b.cluster.state.counts.copy()
            handle = await b.create()
            await b.contents.write(handle, 0, b"x" * 10_000)
            await b.contents.flush(handle)
            counts = b.cluster.state.counts - before
            counts.pop("GrantWrite")  # the leader's own
            assert counts == {"Create": 1, "WriteChunk": 1, "CommitWrite": 1}
            assert len(b.sent(m.WriteData)) == 1
            assert len(b.cluster.servers[0].requests) == 1
            assert b.length(handle) == 10_000
            assert b.stored(0, handle) == b"x" * 10_000

    run(test)


def test_adjacent_writes_are_merged_into_blocks() -> None:
    async def test() -> None:
        async with bench() as b:
            handle = await b.create()
            data = os.urandom(2 * MIB + 12_345)
            for at in range(0, len(data), 5_000):
                await b.contents.write(handle, at, data[at : at + 5_000])
            await b.contents.flush(handle)
            frames = b.sent(m.WriteData)
            assert [f.offset for f in frames] == [0, MIB, 2 * MIB]
            assert b.stored(0, handle) == b.stored(1, handle) == data
            assert b.length(handle) == len(data)

    run(test)


def test_buffered_bytes_go_out_by_themselves_and_the_grant_ends() -> None:
    async def test() -> None:
        async with bench() as b:
            handle = await b.create()
            await b.contents.write(handle, 0, b"abc")
            begin = time.monotonic()
            while b.length(handle) != 3:
                await asyncio.sleep(0.02)
            assert time.monotonic() - begin < 3.0
            row = b.cluster.state.grant(0, m.WriteChunk(handle.file.inode, 0, []))
            assert row.lock  # anybody else may write now

    run(test)


def test_writing_waits_when_memory_is_full() -> None:
    async def test() -> None:
        async with bench(write_cache_bytes=16 * MIB) as b:
            handle = await b.create()
            budget = b.volume._writes.budget
            highest = 0
            for at in range(48):
                await b.contents.write(handle, at * MIB, bytes(MIB))
                highest = max(highest, budget.used)
            await b.contents.flush(handle)
            assert MIB <= highest <= 16 * MIB
            assert budget.used == 0
            assert b.length(handle) == 48 * MIB

    run(test)


def test_fsync_reaches_the_disks_of_all_copies_before_the_length_is_committed() -> None:
    async def test() -> None:
        async with bench() as b:
            handle = await b.create()
            await b.contents.write(handle, 0, b"d" * 100_000)
            await b.contents.fsync(handle)
            for server in b.cluster.servers:
                (copy,) = server.copies.values()
                assert copy.synced == 100_000
            assert b.length(handle) == 100_000
            frames = [type(r) for r in b.cluster.servers[0].requests]
            assert frames == [m.WriteData, m.SyncData]
            await b.contents.fsync(handle)
            assert len(b.sent(m.SyncData)) == 1  # nothing new: nothing to do

    run(test)


def test_fsync_covers_what_was_written_and_closed_before() -> None:
    async def test() -> None:
        async with bench() as b:
            handle = await b.create()
            await b.contents.write(handle, 0, b"d" * 1000)
            await b.contents.flush(handle)
            await b.contents.release(handle)
            assert not b.sent(m.SyncData)
            again = await b.open(handle)
            await b.contents.fsync(again)
            assert len(b.sent(m.SyncData, 0)) == len(b.sent(m.SyncData, 1)) == 1

    run(test)


def test_a_replaced_name_gets_a_synced_file() -> None:
    async def test() -> None:
        async with bench() as b:
            for name in (b"old", b"new"):
                handle = await b.create(name)
                await b.contents.write(handle, 0, name)
                await b.contents.flush(handle)
                await b.contents.release(handle)
            await b.volume.rename(1, b"new", 1, b"third", 0)
            assert not b.sent(m.SyncData)
            await b.volume.rename(1, b"third", 1, b"old", 0)
            assert len(b.sent(m.SyncData)) == 1

    run(test)


def test_times_set_while_bytes_are_buffered_stay() -> None:
    async def test() -> None:
        async with bench() as b:
            handle = await b.create()
            await b.contents.write(handle, 0, b"abc")
            await b.volume.setattr(ops.SetAttr(handle.file.inode, mtime=77))
            await b.contents.flush(handle)
            assert b.cluster.state.find("/file").mtime == 77

    run(test)


def test_local_users_see_what_is_not_committed() -> None:
    async def test() -> None:
        async with bench() as b:
            handle = await b.create()
            await b.contents.write(handle, 5_000, b"abc")
            seen = await b.volume.getattr(handle.file.inode)
            assert seen.length == 5_003
            assert (await b.volume.lookup(1, b"file")).length == 5_003
            assert b.length(handle) == 0
            assert await b.read(handle, 4_999, 100) == b"\0abc"

    run(test)


# --- zeros


async def _with_garbage(b: Bench, length: int) -> tuple[object, int]:
    """A file whose chunk holds garbage beyond its length, as after a crashed writer."""
    handle = await b.create()
    await b.contents.write(handle, 0, b"d" * length)
    await b.contents.flush(handle)
    chunk = b.cluster.state.locate(handle.file.inode, 0).chunk
    for server in b.cluster.servers:
        server.copies[chunk].write(length, b"G" * 500_000)
    return handle, chunk


def test_a_gap_within_a_chunk_is_zeroed() -> None:
    async def test() -> None:
        async with bench() as b:
            handle, _ = await _with_garbage(b, 10)
            await b.contents.write(handle, 1_000, b"end")  # type: ignore[arg-type]
            await b.contents.flush(handle)  # type: ignore[arg-type]
            for server in (0, 1):
                stored = b.stored(server, handle)  # type: ignore[arg-type]
                assert stored[:1_003] == b"d" * 10 + bytes(990) + b"end"

    run(test)


def test_truncating_up_zeroes_the_tail() -> None:
    async def test() -> None:
        async with bench() as b:
            handle, _ = await _with_garbage(b, 10)
            await b.contents.truncate(handle.file.inode, 300_000)
            got = await b.read(handle, 0, 400_000)  # type: ignore[arg-type]
            assert got == b"d" * 10 + bytes(299_990)
            assert b.stored(1, handle)[10:300_000] == bytes(299_990)  # type: ignore[arg-type]
            grant = b.cluster.state.grant(0, m.WriteChunk(handle.file.inode, 0, []))
            assert grant.lock  # nothing of ours is left locked

    run(test)


def test_writing_into_a_later_chunk_zeroes_the_rest_of_the_one_with_the_old_end() -> None:
    async def test() -> None:
        async with bench() as b:
            handle, chunk = await _with_garbage(b, 10)
            await b.contents.write(handle, CHUNK_SIZE + 5, b"far")  # type: ignore[arg-type]
            await b.contents.flush(handle)  # type: ignore[arg-type]
            zeroed = [f for f in b.sent(m.ZeroData) if f.chunk == chunk]
            assert [(f.offset, f.length) for f in zeroed] == [(10, CHUNK_SIZE - 10)]
            assert b.stored(0, handle, 0)[10:600_000].strip(b"\0") == b""  # type: ignore[arg-type]
            assert b.length(handle) == CHUNK_SIZE + 8  # type: ignore[arg-type]

    run(test)


def test_a_hole_before_a_later_chunk_is_not_made_a_chunk() -> None:
    async def test() -> None:
        async with bench() as b:
            handle = await b.create()
            await b.contents.truncate(handle.file.inode, 10)
            await b.contents.write(handle, CHUNK_SIZE + 5, b"far")
            await b.contents.flush(handle)
            assert b.cluster.state.locate(handle.file.inode, 0).chunk == 0
            assert await b.read(handle, 0, 100) == bytes(100)

    run(test)


def test_others_bytes_below_a_length_that_we_did_not_know_are_not_zeroed() -> None:
    async def test() -> None:
        async with bench() as b:
            handle, chunk = await _with_garbage(b, 10)
            # another client has extended the file to 200 bytes of "o" meanwhile
            for server in b.cluster.servers:
                server.copies[chunk].write(10, b"o" * 190)
            grant = b.cluster.state.grant(0, m.WriteChunk(handle.file.inode, 0, []))
            written = [ops.Written(chunk, grant.lock, True)]
            b.cluster.state.commit(ops.CommitWrite(handle.file.inode, 200, 1, written))
            await b.contents.write(handle, 1_000, b"end")  # type: ignore[arg-type]
            await b.contents.flush(handle)  # type: ignore[arg-type]
            expected = b"d" * 10 + b"o" * 190 + bytes(800) + b"end"
            assert b.stored(0, handle)[:1_003] == expected  # type: ignore[arg-type]

    run(test)


def test_the_committed_length_never_covers_bytes_that_are_still_under_way() -> None:
    async def test() -> None:
        async with bench(servers=2, goal=1) as b:
            first, second = list(b.cluster.state.servers)

            def choose(ask: object) -> None:  # chunk 0 on the first server, chunk 1 on the second
                if isinstance(ask, m.WriteChunk):
                    b.cluster.state.servers = [second if ask.index else first]

            b.cluster.masters.faults.append(choose)
            b.cluster.servers[0].mute = True
            handle = await b.create()
            await b.contents.write(handle, CHUNK_SIZE - 100, b"n" * 200)
            writer = handle.file.writable()
            for chunk in writer.chunks.values():
                chunk.seal()
            while not writer.chunks[1].dirty:
                await asyncio.sleep(0.01)
            assert not writer.chunks[0].dirty
            await writer.commits.commit(unlock=False)
            assert b.length(handle) == 0
            b.cluster.servers[0].mute = False
            b.cluster.servers[0].drop_connections()
            await b.contents.flush(handle)
            assert b.length(handle) == CHUNK_SIZE + 100

    run(test)


# --- the whole, at random


def _trouble(b: Bench, rng: random.Random) -> None:
    """Something that a mount must not notice."""
    server = rng.choice(b.cluster.servers)
    what = rng.randrange(4)
    if what == 0:
        server.drop_connections()
    elif what == 1:
        server.refuse_writes = 1
    elif what == 2:
        server.drop_after = rng.randrange(3)
    else:
        b.cluster.masters.elect(rng.randrange(3))


@pytest.mark.parametrize("troubled", [False, True])
def test_random_writes_reads_and_truncations_match_a_model(troubled: bool) -> None:
    seed = int(os.environ.get("SEED", random.randrange(1 << 30)))
    print(f"SEED={seed} python -m pytest tests/unit/mount/test_writing.py -k random")
    rng = random.Random(seed)
    # two windows that matter: the beginning, and the border of two chunks
    windows = [(0, 300 * KIB), (CHUNK_SIZE - 150 * KIB, CHUNK_SIZE + 150 * KIB)]

    async def test() -> None:
        async with bench() as b:
            handle = await b.create()
            model = bytearray()
            for _ in range(150):
                if troubled and rng.random() < 0.1:
                    _trouble(b, rng)
                start, end = rng.choice(windows)
                offset = rng.randrange(start, end)
                what = rng.random()
                if what < 0.5:
                    data = rng.randbytes(rng.choice([1, 100, 5_000, 70_000]))
                    if len(model) < offset + len(data):
                        model.extend(bytes(offset + len(data) - len(model)))
                    model[offset : offset + len(data)] = data
                    await b.contents.write(handle, offset, data)
                elif what < 0.8:
                    size = rng.choice([1, 4096, 200_000])
                    assert await b.read(handle, offset, size) == model[offset : offset + size]
                elif what < 0.86:
                    await b.contents.truncate(handle.file.inode, offset)
                    del model[offset:]
                    model.extend(bytes(offset - len(model)))
                elif what < 0.93:
                    await b.contents.flush(handle)
                    assert b.length(handle) == len(model)
                else:
                    await b.contents.fsync(handle)
            await b.contents.flush(handle)
            await b.contents.release(handle)
            again = await b.open(handle)
            for start, end in windows:
                assert await b.read(again, start, end - start) == model[start:end]

    run(test)


# --- losses are told


def test_no_servers_is_no_space_and_is_told_to_every_close() -> None:
    async def test() -> None:
        async with bench(timeout_s=0.5) as b:
            b.cluster.state.dead = {s.uuid for s in b.cluster.servers}
            handle = await b.create()
            await b.contents.write(handle, 0, b"abc")
            for _ in range(2):
                with pytest.raises(WriteError) as lost:
                    await b.contents.flush(handle)
                assert lost.value.errno == 28
            with pytest.raises(WriteError):
                await b.contents.write(handle, 3, b"more")
            assert b.volume._writes.budget.used == 0
            b.cluster.state.dead = set()
            again = await b.open(handle, writes=True)
            await b.contents.write(again, 0, b"fine")
            await b.contents.flush(again)
            assert b.length(handle) == 4
            with pytest.raises(WriteError):
                await b.contents.flush(handle)

    run(test)


def test_a_refusal_of_the_master_is_told_with_its_errno() -> None:
    async def test() -> None:
        async with bench() as b:

            def fault(ask: object) -> None:
                if isinstance(ask, m.WriteChunk):
                    raise ReplyError(30)

            b.cluster.masters.faults.append(fault)
            handle = await b.create()
            await b.contents.write(handle, 0, b"abc")
            with pytest.raises(RaftfsError) as lost:
                await b.contents.flush(handle)
            assert lost.value.errno == 30
            assert (await b.volume.getattr(handle.file.inode)).length == 0

    run(test)


def test_a_chunk_locked_by_another_client_is_waited_for() -> None:
    async def test() -> None:
        async with bench() as b:
            handle = await b.create()
            other = rpc_session(b)
            grant = b.cluster.state.grant(other, m.WriteChunk(handle.file.inode, 0, []))
            await b.contents.write(handle, 0, b"abc")
            task = asyncio.ensure_future(b.contents.flush(handle))
            await asyncio.sleep(0.3)
            assert not task.done()
            b.cluster.state.commit(ops.Unlock(grant.chunk, grant.lock))
            await task
            assert b.length(handle) == 3

    run(test)


def rpc_session(b: Bench) -> int:
    """Another client's session."""
    import msgspec

    value = b.cluster.state.commit(ops.NewSession(b"other", "other"))
    return int(msgspec.msgpack.decode(value))


def test_truncation_waits_for_another_clients_grant() -> None:
    async def test() -> None:
        async with bench() as b:
            handle = await b.create()
            await b.contents.write(handle, 0, b"abc")
            await b.contents.flush(handle)
            other = rpc_session(b)
            grant = b.cluster.state.grant(other, m.WriteChunk(handle.file.inode, 0, []))
            task = asyncio.ensure_future(b.contents.truncate(handle.file.inode, 0))
            await asyncio.sleep(0.2)
            assert not task.done()
            b.cluster.state.commit(ops.Unlock(grant.chunk, grant.lock))
            assert (await task).length == 0

    run(test)


def test_a_grant_that_is_held_for_long_does_not_end_before_something_was_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A log of short lines: none of them fills a block, and there is never a pause between them."""
    monkeypatch.setattr(writer, "HOLD_S", 0.3)
    monkeypatch.setattr(writer, "SEAL_IDLE_S", 60.0)

    async def test() -> None:
        async with bench() as b:
            asked = b.asked()
            handle = await b.create()
            data = b""
            while len(asked) < 3:
                data += (line := os.urandom(50))
                await b.contents.write(handle, len(data) - len(line), line)
                await asyncio.sleep(0.01)
            await b.contents.flush(handle)
            assert b.stored(0, handle) == b.stored(1, handle) == data

    run(test)
