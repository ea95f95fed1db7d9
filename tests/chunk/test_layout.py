"""The chunk file's format: round trips, and nothing damaged is taken for whole."""

import random

import pytest

from raftfs.chunk import layout
from raftfs.chunk.layout import Header, LayoutError
from raftfs.const import BLOCK_SIZE, BLOCKS_PER_CHUNK, CHUNK_SIZE

CLUSTER = bytes(range(16))


def _header(seed: int) -> Header:
    rng = random.Random(seed)
    return Header(rng.getrandbits(64), rng.getrandbits(32), CLUSTER,
                  rng.getrandbits(BLOCKS_PER_CHUNK), rng.getrandbits(BLOCKS_PER_CHUNK))  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_header_round_trip(seed: int) -> None:
    header = _header(seed)
    page = header.pack()
    assert len(page) == layout.HEADER_SIZE
    assert vars(Header.unpack(page)) == vars(header)


def test_a_flipped_bit_in_a_header_is_noticed_or_means_nothing() -> None:
    header = _header(7)
    page = header.pack()
    for bit in [*range(0, 512 * 8), *range(512 * 8, len(page) * 8, 37)]:
        broken = bytearray(page)
        broken[bit // 8] ^= 1 << bit % 8
        try:
            found = Header.unpack(bytes(broken))
        except LayoutError:
            continue
        assert vars(found) == vars(header), f"bit {bit}"


@pytest.mark.parametrize("page", [b"", b"x", bytes(4096), b"RFSC 1.0".ljust(4096, b"\0")])
def test_what_is_no_header_is_refused(page: bytes) -> None:
    with pytest.raises(LayoutError):
        Header.unpack(page)


def test_table_round_trip() -> None:
    rng = random.Random(1)
    crcs = [rng.getrandbits(32) for _ in range(BLOCKS_PER_CHUNK)]
    page = layout.pack_table(crcs)
    assert len(page) == layout.DATA_OFFSET - layout.TABLE_OFFSET
    assert layout.unpack_table(page) == crcs


def test_names() -> None:
    name = layout.file_name(0x12AB, 7)
    assert name == "AB/chunk_00000000000012AB_00000007.mfs"
    assert layout.parse_name(name.split("/")[1]) == (0x12AB, 7)
    for other in ("chunk_1_1.mfs", "x" + name[3:], name[3:] + "x", name[3:].lower(), ".lock"):
        assert layout.parse_name(other) is None, other


def test_bits() -> None:
    assert layout.bits(0, 1) == 1
    assert layout.bits(BLOCK_SIZE - 1, 2) == 3
    assert layout.bits(BLOCK_SIZE, BLOCK_SIZE) == 2
    assert layout.bits(0, CHUNK_SIZE) == (1 << BLOCKS_PER_CHUNK) - 1
