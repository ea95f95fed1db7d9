"""The format of chunk files, as numbers and names."""

import pytest

from raftfs.chunk.layout import (
    HEADER_SIZE,
    SECTOR,
    CrcTable,
    Header,
    LayoutError,
    bits,
    blocks_of,
    file_name,
    parse_name,
    runs_of,
)
from raftfs.wire.frame import ZERO_BLOCK_CRC


def test_header_round_trip() -> None:
    header = Header(0x1122, 7, b"u" * 16, 99, written=1 | 1 << 1023, dirty=1 << 512)
    page = header.pack_page()
    assert len(page) == HEADER_SIZE
    again = Header.unpack(page)
    for field in Header.__slots__:
        assert getattr(again, field) == getattr(header, field)


def test_header_on_disk_is_as_documented() -> None:
    page = Header(0x1122, 7, b"u" * 16, 99, written=2, dirty=4).pack_page()
    assert page[:8] == b"RFSC 1.1"
    assert page[8:16] == (0x1122).to_bytes(8, "big")
    assert page[16:20] == (7).to_bytes(4, "big")
    assert page[20:36] == b"u" * 16
    assert page[36:44] == (99).to_bytes(8, "big")
    assert page[44] == 2 and page[172] == 4
    assert not any(page[SECTOR:])  # all that changes lies in one sector


def test_any_flipped_byte_of_the_header_is_found() -> None:
    page = Header(1, 1, b"u" * 16, 5, written=3).pack_page()
    for at in range(HEADER_SIZE):
        damaged = bytearray(page)
        damaged[at] ^= 0x40
        with pytest.raises(LayoutError):
            Header.unpack(bytes(damaged))
    with pytest.raises(LayoutError):
        Header.unpack(page[:-1])


def test_names() -> None:
    assert file_name(0xABCD, 0x12) == "CD/chunk_000000000000ABCD_00000012.mfs"
    assert parse_name("chunk_000000000000ABCD_00000012.mfs") == (0xABCD, 0x12)
    for other in ("chunk_000000000000ABCD_00000012.mfs.part", "chunk_ABCD_1.mfs",
                  "chunk_000000000000abcd_00000012.mfs", "chunk_000000000000ABCD_00000012.mfs\n"):
        assert parse_name(other) is None  # fmt: skip


def test_bitmaps() -> None:
    assert bits(2, 4) == 0b11100
    assert blocks_of(1 << 1023 | 0b101) == [0, 2, 1023]
    assert runs_of(0b1110011) == [(0, 2), (4, 3)]
    assert runs_of(0b11111, longest=2) == [(0, 2), (2, 2), (4, 1)]


def test_crc_table() -> None:
    table = CrcTable()
    raw, place = table.put(3, [0xAABBCCDD, 5])
    assert (raw, place) == (bytes.fromhex("aabbccdd00000005"), 4096 + 12)
    assert table.get(2, 3) == (0, 0xAABBCCDD, 5)
    full = table.full_page(1 << 3)
    assert full[12:16].hex() == "aabbccdd"
    assert full[16:20] == ZERO_BLOCK_CRC.to_bytes(4, "big")  # block 4 is not written
