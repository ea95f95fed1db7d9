"""What the store promises of content: right bytes or an error, under versions and tokens."""

import errno
import os
import random
from pathlib import Path

import pytest

from raftfs.chunk.door import FileDoor
from raftfs.const import BLOCK_SIZE, CHUNK_SIZE
from raftfs.errors import ReplyError, Status
from raftfs.wire.frame import ZERO_BLOCK_CRC, piece_crcs
from raftfs.wire.messages import CopyId, Damage
from tests.chunk.parts import aside, chunk_file, ids, make_store, noise, read, write


def test_a_small_file_takes_no_more_than_it_has(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    write(store, 1, 0, noise(1, 10 * 1024))
    assert chunk_file(tmp_path, 1).stat().st_size == 8192 + 10 * 1024
    assert read(store, 1, 0, 12 * 1024) == noise(1, 10 * 1024) + bytes(2048)
    store.close()


@pytest.mark.parametrize("seed", [int(os.environ.get("RAFTFS_SEED", n)) for n in range(3)])
def test_random_ranges_against_a_model(tmp_path: Path, seed: int) -> None:
    """To repeat: RAFTFS_SEED=<seed> python -m pytest tests/chunk/test_store.py -k random"""
    print(f"seed {seed}")
    draw = random.Random(seed)
    store = make_store(tmp_path, open_files_max=1)
    model = bytearray(6 * BLOCK_SIZE)
    write(store, 2, 0, b"x")  # its use closes the other's file
    for _ in range(300):
        offset = min(len(model) - 1, max(0, draw.randrange(6) * BLOCK_SIZE + draw.randrange(-9, 9)))
        length = min(len(model) - offset, draw.choice((1, 8, 100, BLOCK_SIZE, 150_000)))
        data = draw.randbytes(length)
        kind = draw.randrange(8)
        if kind < 4:
            write(store, 1, offset, data)
            model[offset : offset + length] = data
        elif kind == 4:
            store.zero(1, 1, 1, True, offset, length)
            model[offset : offset + length] = bytes(length)
        elif kind == 5:
            write(store, 1, 0, data[:9])
            model[: len(data[:9])] = data[:9]
            store.sync(1, 1)
        elif kind == 6:
            store.rest_idle(-1.0)
        else:
            read(store, 2, 0, 1)
        if draw.random() < 0.5 and store.version_of(1):
            assert read(store, 1, offset, length) == model[offset : offset + length]
    store.close()
    store = make_store(tmp_path)
    assert read(store, 1, 0, len(model)) == model
    blocks = store.block_list(1, 1)
    for block in range(6):
        content = bytes(model[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE])
        crc = int.from_bytes(blocks[4 * block : 4 * block + 4], "big")
        assert [crc] == piece_crcs(0, content)
    assert int.from_bytes(blocks[24:28], "big") == ZERO_BLOCK_CRC
    store.close()


def test_zeroed_blocks_become_holes_and_their_bytes_go(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    write(store, 1, 0, noise(2, 4 * BLOCK_SIZE))
    store.sync(1, 1)
    store.zero(1, 1, 1, False, BLOCK_SIZE + 10, CHUNK_SIZE - BLOCK_SIZE - 10)
    assert store.block_list(1, 1)[4096] == 0b11
    assert chunk_file(tmp_path, 1).stat().st_size == 8192 + 2 * BLOCK_SIZE
    assert read(store, 1, 0, 4 * BLOCK_SIZE) == (
        noise(2, 4 * BLOCK_SIZE)[: BLOCK_SIZE + 10] + bytes(3 * BLOCK_SIZE - 10)
    )
    store.close()


def test_damage_of_any_byte_is_found_and_never_returned(tmp_path: Path) -> None:
    content = noise(3, 2 * BLOCK_SIZE + 1000)
    store = make_store(tmp_path)
    write(store, 1, BLOCK_SIZE, content)
    store.close()
    path = chunk_file(tmp_path, 1)
    good = path.read_bytes()
    draw = random.Random(4)
    header = [*range(0, 512, 7), 511, 512, *draw.sample(range(512, 4096), 10)]
    table = list(range(4096 + 4, 4096 + 16))
    data = 8192 + BLOCK_SIZE
    rest = [data, data + BLOCK_SIZE, len(good) - 1, *draw.sample(range(data, len(good)), 30)]
    for at in header + table + rest:
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << draw.randrange(8)]) + good[at + 1 :])
        store = make_store(tmp_path)
        told: list[Damage] = []
        store.report = lambda made, gone, damaged, told=told: told.extend(damaged)  # type: ignore
        with pytest.raises(ReplyError) as e:
            store.read(1, 1, BLOCK_SIZE, len(content))
        assert e.value.status == Status.BAD_CRC, at
        assert ids(told) == [CopyId(1, 1)] and store.copies() == []
        assert path.exists()  # it may be the last one
        store.set_aside(1, 1)
        store.close()
        assert aside(tmp_path) and not path.exists()  # kept for the administrator
    for cut in (1, 100, 8191, len(good) - 1):
        path.write_bytes(good[:cut])
        store = make_store(tmp_path)
        with pytest.raises(ReplyError):
            store.read(1, 1, BLOCK_SIZE, len(content))
        store.set_aside(1, 1)
        store.close()
    path.write_bytes(good)
    store = make_store(tmp_path)
    assert read(store, 1, BLOCK_SIZE, len(content)) == content
    store.close()


def test_a_file_that_a_stop_left_empty_is_no_copy_and_no_damage(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    write(store, 1, 0, b"x")
    store.close()
    path = chunk_file(tmp_path, 1)
    path.write_bytes(b"")
    store = make_store(tmp_path)
    told: list[tuple[list[CopyId], list[CopyId]]] = []
    store.report = lambda made, gone, damaged: told.append((gone, damaged))
    with pytest.raises(ReplyError) as e:
        store.raise_version(1, 2, 2)
    assert e.value.status == Status.NO_CHUNK
    assert told == [([CopyId(1, 1)], [])] and not list(tmp_path.glob("01/*"))
    write(store, 1, 0, b"again")
    assert read(store, 1, 0, 5) == b"again"
    store.close()


def test_damage_under_a_partial_write_is_reported_not_covered(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    content = noise(5, 2 * BLOCK_SIZE)
    write(store, 1, 0, content)
    store.rest_idle(-1.0)
    path = chunk_file(tmp_path, 1)
    with open(path, "r+b") as file:
        file.seek(8192 + 500)
        file.write(bytes([content[500] ^ 1]))
    with pytest.raises(ReplyError) as e:
        write(store, 1, 0, b"hides it?")
    assert e.value.status == Status.BAD_CRC
    assert path.read_bytes()[8192:8201] == content[:9]
    assert store.copies() == [] and [d.found_by for d in store.damages()] == ["write"]
    store.close()


def test_data_that_arrives_damaged_touches_nothing(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    write(store, 1, 0, b"good")
    with pytest.raises(ReplyError) as e:
        store.write(1, 1, 1, False, 0, memoryview(b"evil"), piece_crcs(0, b"fine"))
    assert e.value.status == Status.BAD_CRC
    assert read(store, 1, 0, 4) == b"good" and store.copies() == [CopyId(1, 1)]
    store.close()


def test_versions_and_tokens_fence(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    told: list[tuple[list[CopyId], list[CopyId]]] = []
    store.report = lambda made, gone, damaged: told.append((made, gone))
    write(store, 1, 0, b"one", token=5)

    def refused(status: int, version: int, token: int) -> None:
        with pytest.raises(ReplyError) as e:
            write(store, 1, 0, b"old", version=version, token=token)
        assert e.value.status == status

    refused(Status.WRONG_VERSION, 1, 4)
    write(store, 1, 0, b"two", token=6)
    refused(Status.WRONG_VERSION, 1, 5)
    store.raise_version(1, 4, 9)
    refused(Status.WRONG_VERSION, 1, 20)
    refused(Status.WRONG_VERSION, 4, 8)
    store.raise_version(1, 4, 9)  # repeated
    with pytest.raises(ReplyError):
        store.raise_version(1, 3, 30)
    store.raise_version(1, 4, 11)  # another grant
    refused(Status.WRONG_VERSION, 4, 10)
    store.rest_idle(-1.0)
    refused(Status.WRONG_VERSION, 4, 10)  # also when it was closed in between
    store.close()
    store = make_store(tmp_path)
    refused(Status.WRONG_VERSION, 4, 10)  # and after a restart
    assert read(store, 1, 0, 3, version=4) == b"two"
    assert told == [([CopyId(1, 1)], []), ([CopyId(1, 4)], [CopyId(1, 1)])]
    store.destroy(1, 3)
    assert store.copies() == [CopyId(1, 4)]  # at exactly that version, or not at all
    store.destroy(1, 4)
    store.destroy(1, 4)
    assert store.copies() == [] and not list(tmp_path.glob("01/*"))
    with pytest.raises(ReplyError) as e:
        store.read(1, 4, 0, 1)
    assert e.value.status == Status.NO_CHUNK
    store.close()


def test_nonsense_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    for offset, length in ((-1, 2), (CHUNK_SIZE - 1, 2), (0, 0), (0, 2 * CHUNK_SIZE)):
        with pytest.raises(ReplyError) as e:
            store.zero(1, 1, 1, True, offset, length)
        assert e.value.status == errno.EINVAL
    for chunk, version in ((0, 1), (1, 0), (2**64, 1), (1, 2**32)):
        with pytest.raises(ReplyError) as e:
            write(store, chunk, 0, b"x", version=version)
        assert e.value.status == errno.EINVAL
    assert len(store) == 0
    store.close()


class FaultyDoor(FileDoor):
    """Fails a chosen kind of call, after doing half of it."""

    def __init__(self) -> None:
        self.fail: dict[str, int] = {}

    def _maybe(self, what: str) -> None:
        if what in self.fail:
            raise OSError(self.fail[what], os.strerror(self.fail[what]))

    def pwrite(self, fd: int, parts, offset: int) -> None:  # type: ignore[no-untyped-def]
        if "pwrite" in self.fail and offset >= 8192:
            data = b"".join(parts)
            super().pwrite(fd, [data[: len(data) // 2]], offset)
            self._maybe("pwrite")
        super().pwrite(fd, parts, offset)

    def pread(self, fd: int, into: memoryview, offset: int) -> int:
        self._maybe("pread")
        return super().pread(fd, into, offset)

    def sync(self, fd: int) -> None:
        self._maybe("sync")
        super().sync(fd)


def test_a_full_disk_tears_nothing(tmp_path: Path) -> None:
    door = FaultyDoor()
    store = make_store(tmp_path, door=door)
    old = noise(6, 2 * BLOCK_SIZE)
    write(store, 1, 0, old)
    store.sync(1, 1)
    new = noise(7, 3 * BLOCK_SIZE)
    door.fail = {"pwrite": errno.ENOSPC}
    with pytest.raises(ReplyError) as e:
        write(store, 1, 100, new)
    assert e.value.status == errno.ENOSPC
    door.fail = {}
    half = len(new) // 2
    expect = old[:100] + new[:half] + old[100 + half :]
    assert read(store, 1, 0, 2 * BLOCK_SIZE) == expect[: 2 * BLOCK_SIZE]
    assert read(store, 1, 2 * BLOCK_SIZE, BLOCK_SIZE) == bytes(BLOCK_SIZE)
    write(store, 1, 100, new)
    assert read(store, 1, 100, len(new)) == new
    assert store.copies() == [CopyId(1, 1)]
    store.close()


def test_disk_errors_are_told_and_a_lost_sync_is_never_forgotten(tmp_path: Path) -> None:
    door = FaultyDoor()
    store = make_store(tmp_path, door=door)
    write(store, 1, 0, b"data")
    told: list[Damage] = []
    store.report = lambda made, gone, damaged: told.extend(damaged)
    door.fail = {"sync": errno.EIO}
    for _ in range(2):
        with pytest.raises(ReplyError) as e:
            store.sync(1, 1)
        assert e.value.status == Status.DISK_ERROR
        door.fail = {}  # the kernel tells of a failed write-back once only
    store.rest_idle(-1.0)
    with pytest.raises(ReplyError):
        store.raise_version(1, 2, 2)
    assert ids(told) == [CopyId(1, 1)] and store.copies() == []
    assert (told[0].part, told[0].found, told[0].found_by) == ("io", "EIO", "write")
    door.fail = {"pread": errno.EIO}
    with pytest.raises(ReplyError) as e:
        read(store, 1, 0, 4)
    assert e.value.status == Status.DISK_ERROR
    store.close()


def test_descriptors_are_bounded(tmp_path: Path) -> None:
    store = make_store(tmp_path, open_files_max=4)
    before = len(os.listdir("/proc/self/fd"))
    for chunk in range(1, 40):
        write(store, chunk, 0, bytes([chunk]) * 100)
    assert len(os.listdir("/proc/self/fd")) <= before + 4
    assert all(read(store, c, 0, 100) == bytes([c]) * 100 for c in range(1, 40))
    assert store.rest_idle(-1.0) == 39
    assert len(os.listdir("/proc/self/fd")) <= before
    store.close()


def test_several_disks(tmp_path: Path) -> None:
    roots = [tmp_path / "a", tmp_path / "b"]
    draws = iter([0.0, 0.999, 0.25, 0.75] * 5)
    store = make_store(*roots, draw=lambda: next(draws))
    for disk, at in zip(store._disks, (0, 1), strict=True):
        disk.room = lambda at=at: [100 << 30, 300 << 30][at]  # type: ignore
    for chunk in range(1, 5):
        write(store, chunk, 0, b"x")
    assert len(list(roots[0].glob("??/*.mfs"))) == 2  # 0.0 and 0.25 of a quarter
    store._disks[0].room = lambda: 0  # type: ignore[method-assign]
    for chunk in range(5, 9):
        write(store, chunk, 0, b"x")
    assert len(list(roots[0].glob("??/*.mfs"))) == 2
    store._disks[1].room = lambda: 0  # type: ignore[method-assign]
    with pytest.raises(ReplyError) as e:
        write(store, 9, 0, b"x")
    assert e.value.status == errno.ENOSPC
    write(store, 8, 0, b"more")  # what exists can still be written
    store.close()
    store = make_store(*roots)
    assert len(store) == 8 and store.space()[0] == store._disks[0].space()[0]
    store.close()


def test_of_two_files_of_one_chunk_the_newer_is_the_copy(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    write(store, 1, 0, b"old")
    store.close()
    old = chunk_file(tmp_path, 1)
    kept = old.read_bytes()
    store = make_store(tmp_path)
    store.raise_version(1, 2, 2)
    store.close()
    old.write_bytes(kept)
    store = make_store(tmp_path)
    assert store.copies() == [CopyId(1, 2)]
    assert len(aside(tmp_path)) == 1 and not old.exists()
    store.close()
