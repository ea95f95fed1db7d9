"""One copy's file against a plain array of bytes; damage is told, never handed out."""

import os
import random

import pytest

from raftfs.chunk.copyfile import CopyFile
from raftfs.chunk.disk import Disk, FileDoor
from raftfs.chunk.layout import DATA_OFFSET, LayoutError
from raftfs.const import BLOCK_SIZE, CHUNK_SIZE
from raftfs.errors import ReplyError, Status
from raftfs.wire.frame import ZERO_BLOCK_CRC, piece_crcs
from tests.chunk.faults import CrashDoor

CHUNK = 0x1234
SPAN = 6 * BLOCK_SIZE  # the models look at so much


@pytest.fixture(scope="module")
def claimed(tmp_path_factory: pytest.TempPathFactory) -> Disk:
    """One disk for all tests here: making its 256 folders takes longer than a test."""
    made = Disk(tmp_path_factory.mktemp("disk"))
    made.claim(b"s" * 16, b"c" * 16)
    return made


@pytest.fixture
def disk(claimed: Disk) -> Disk:
    """An empty disk."""
    for old in claimed.path.glob("??/*"):
        old.unlink()
    return claimed


def _new(disk: Disk, door: FileDoor | None = None) -> CopyFile:
    copy = CopyFile(disk, door or FileDoor(), CHUNK, 1)
    copy.create(b"c" * 16)
    return copy


def _put(copy: CopyFile, offset: int, data: bytes) -> None:
    copy.write(offset, data, piece_crcs(offset, data))


def _reopen(disk: Disk) -> CopyFile:
    copy = CopyFile(disk, FileDoor(), CHUNK, 1)
    copy.open()
    return copy


def _near_border(rng: random.Random) -> int:
    spot = rng.randrange(SPAN // BLOCK_SIZE) * BLOCK_SIZE + rng.choice([0, 0, 0, 1, -1, 512, 9999])
    return max(0, spot)


@pytest.mark.parametrize("seed", range(8))
def test_random_work_against_a_model(disk: Disk, seed: int) -> None:
    print("seed", seed)
    rng, model = random.Random(seed), bytearray(SPAN)
    copy = _new(disk)
    for _ in range(120):
        offset = _near_border(rng)
        length = min(rng.choice([1, 100, 4096, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1,
                                 2 * BLOCK_SIZE]), SPAN - offset)  # fmt: skip
        what = rng.random()
        if what < 0.4:
            data = rng.randbytes(length)
            _put(copy, offset, data)
            model[offset : offset + length] = data
        elif what < 0.55:
            copy.zero(offset, length)
            model[offset : offset + length] = bytes(length)
        elif what < 0.62:
            copy.sync()
        elif what < 0.7:
            copy.retire()
            copy = _reopen(disk)
        elif what < 0.75:
            copy.discard()  # as after kill -9
            copy = _reopen(disk)
        else:
            got, crcs = copy.read(offset, length)
            assert bytes(got) == model[offset : offset + length]
            assert list(crcs) == piece_crcs(offset, got)
    assert bytes(copy.read(0, SPAN)[0]) == model


def test_a_small_file_is_small(disk: Disk) -> None:
    copy = _new(disk)
    _put(copy, 0, b"x" * 10 * 1024)
    copy.retire()
    assert copy.path.stat().st_size == (8 + 10) * 1024
    assert copy.path.stat().st_blocks * 512 <= (8 + 12) * 1024


def test_blocks_never_written_are_zeros_whatever_lies_there(disk: Disk) -> None:
    copy = _new(disk)
    _put(copy, 3 * BLOCK_SIZE, b"end")
    copy.retire()
    with open(copy.path, "r+b") as file:
        file.seek(DATA_OFFSET)
        file.write(b"garbage" * 20_000)
    copy = _reopen(disk)
    got, crcs = copy.read(0, BLOCK_SIZE)
    assert bytes(got) == bytes(BLOCK_SIZE) and crcs == [ZERO_BLOCK_CRC]
    _put(copy, 5, b"new")  # the garbage must not come back around it
    assert bytes(copy.read(0, BLOCK_SIZE)[0]) == b"\0" * 5 + b"new" + bytes(BLOCK_SIZE - 8)
    copy.discard()
    assert bytes(_reopen(disk).read(0, 10)[0]) == b"\0" * 5 + b"new\0\0"


def test_a_flipped_bit_gives_right_bytes_or_an_error(disk: Disk) -> None:
    copy = _new(disk)
    model = random.Random(0).randbytes(2 * BLOCK_SIZE + 777) + bytes(SPAN - 2 * BLOCK_SIZE - 777)
    _put(copy, 0, model[: 2 * BLOCK_SIZE + 777])
    copy.retire()
    rng = random.Random(1)
    size = copy.path.stat().st_size
    places = [*range(320), *range(500, 520), *range(4090, 4120), size - 1]
    places += [rng.randrange(4096) for _ in range(60)]
    places += [rng.randrange(4096, 8192) for _ in range(60)]
    places += [rng.randrange(8192, size) for _ in range(150)]
    whole, told = copy.path.read_bytes(), 0
    for place in places:
        broken = bytearray(whole)
        broken[place] ^= 1 << rng.randrange(8)
        copy.path.write_bytes(broken)
        other = CopyFile(disk, FileDoor(), CHUNK, 1)
        for start in range(0, SPAN, BLOCK_SIZE):
            try:
                other.open()
                got = other.read(start, BLOCK_SIZE)[0]
            except (LayoutError, ReplyError) as e:
                told += 1
                assert isinstance(e, LayoutError) or e.status == Status.BAD_CRC
            else:
                assert got == model[start : start + BLOCK_SIZE], f"byte {place}, block at {start}"
        other.discard()
    assert told > 150


def test_a_truncated_file_is_told(disk: Disk) -> None:
    copy = _new(disk)
    _put(copy, 0, b"x" * BLOCK_SIZE)
    copy.retire()
    for size in (DATA_OFFSET + 100, DATA_OFFSET, 4100, 4096, 100):
        os.truncate(copy.path, size)
        with pytest.raises((LayoutError, ReplyError)):
            _reopen(disk).read(0, 10)


def test_partial_writes_do_not_bless_damage(disk: Disk) -> None:
    copy = _new(disk)
    _put(copy, 0, b"x" * BLOCK_SIZE)
    copy.retire()
    with open(copy.path, "r+b") as file:
        file.seek(DATA_OFFSET + 5000)
        file.write(b"y")
    copy = _reopen(disk)
    for work in (lambda: _put(copy, 0, b"abc"), lambda: copy.zero(0, 5)):
        with pytest.raises(ReplyError) as e:
            work()
        assert e.value.status == Status.BAD_CRC
    _put(copy, 0, b"z" * BLOCK_SIZE)  # a whole block heals it
    assert bytes(copy.read(0, BLOCK_SIZE)[0]) == b"z" * BLOCK_SIZE


@pytest.mark.parametrize("offset", [0, 100, BLOCK_SIZE - 5])
def test_a_bad_incoming_crc_changes_nothing(disk: Disk, offset: int) -> None:
    copy = _new(disk)
    _put(copy, 0, b"old" * 1000)
    before = copy.path.read_bytes()
    data = os.urandom(BLOCK_SIZE)
    good = piece_crcs(offset, data)
    for bad in ([good[0] ^ 1, *good[1:]], good[1:], [*good, 0], []):
        with pytest.raises(ReplyError) as e:
            copy.write(offset, data, bad)
        assert e.value.status == Status.BAD_CRC
        assert copy.path.read_bytes() == before


@pytest.mark.parametrize(("offset", "length"), [
    (CHUNK_SIZE, 1), (CHUNK_SIZE - 1, 2), (-1, 1), (-BLOCK_SIZE, BLOCK_SIZE), (0, 0),
])  # fmt: skip
def test_ranges_outside_the_chunk_are_refused(disk: Disk, offset: int, length: int) -> None:
    copy = _new(disk)
    before = copy.path.read_bytes()
    with pytest.raises(ReplyError):
        copy.write(offset, b"x" * length, [0])
    with pytest.raises(ReplyError):
        copy.zero(offset, length)
    assert copy.path.read_bytes() == before


def test_the_last_byte_of_the_chunk(disk: Disk) -> None:
    copy = _new(disk)
    _put(copy, CHUNK_SIZE - 1, b"!")
    copy.retire()
    assert bytes(_reopen(disk).read(CHUNK_SIZE - 3, 3)[0]) == b"\0\0!"


def test_an_extra_sync_only_where_synced_bytes_are_in_danger(disk: Disk) -> None:
    door = CrashDoor(random.Random(0))
    copy = _new(disk, door)
    for block in range(4):
        _put(copy, block * BLOCK_SIZE, b"a" * BLOCK_SIZE)
        _put(copy, block * BLOCK_SIZE, b"b" * 10)
    assert door.syncs == 0
    copy.sync()
    _put(copy, 0, b"c")  # its mark became durable with the sync, before any retirement
    copy.sync()
    assert door.syncs == 2
    copy.retire()
    copy.open()
    _put(copy, 0, b"d")
    _put(copy, 10, b"d")
    assert door.syncs == 3
