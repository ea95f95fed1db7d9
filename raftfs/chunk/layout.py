"""The format of a chunk file. Pure: bytes in, bytes out.

    0      header page
             0    magic "RFSC 1.1"
             8    chunk id, 8 bytes
             16   version, 4 bytes
             20   UUID of the cluster, 16 bytes
             36   highest grant (fencing token) that wrote or raised the copy, 8 bytes
             44   written bitmap, 128 bytes: bit i, least significant first, for block i
             172  dirty bitmap, 128 bytes
             300  version before a raise whose name has not followed yet, 0: none, 4 bytes
             508  CRC32 of the 508 bytes before
             512  zeros
    4096   CRC table: 1,024 CRC32, each of a 64 KiB block, missing bytes counting as zeros
    8192   data, as far as it was written

Integers are big-endian. All of the header that ever changes lies in one sector of 512 bytes, which
a disk writes whole or not at all: a power cut in the middle of a header's update leaves the old one
or the new one, never a mixture with a wrong CRC.

A block whose *written* bit is clear reads as zeros and is never read from the disk. A *dirty* bit
says that the block was changed since the copy was last at rest: after a stop it may fail its CRC
without being rotten. `docs/decisions/004-chunk-files.md` has the reasoning.

Files are named `XX/chunk_<id>_<version>.mfs`, XX being the id's lowest byte.
"""

import re
import struct

from raftfs.const import BLOCK_SIZE, BLOCKS_PER_CHUNK
from raftfs.errors import RaftfsError
from raftfs.wire.frame import ZERO_BLOCK_CRC, crc32

HEADER_SIZE = 4096
SECTOR = 512
TABLE_OFFSET = HEADER_SIZE
TABLE_SIZE = 4 * BLOCKS_PER_CHUNK
DATA_OFFSET = TABLE_OFFSET + TABLE_SIZE
BITMAP_BYTES = BLOCKS_PER_CHUNK // 8
VERSION_MAX = 2**32 - 1
CHUNK_ID_MAX = 2**64 - 1
PART_SUFFIX = ".part"  # a replication that is not complete

_MAGIC = b"RFSC 1.1"
_FIXED = struct.Struct(f">8sQI16sQ{BITMAP_BYTES}s{BITMAP_BYTES}sI")
_CRC_AT = SECTOR - 4
_PADDING = bytes(_CRC_AT - _FIXED.size)
_REST = bytes(HEADER_SIZE - SECTOR)
_NAME = re.compile(r"chunk_([0-9A-F]{16})_([0-9A-F]{8})\.mfs")
_CRC_STRUCTS = [struct.Struct(f">{n}I") for n in range(33)]


class LayoutError(RaftfsError):
    """The file is no chunk file of ours, or its header is damaged."""


class Header:
    """What the header page says; bitmaps are integers, bit i for block i."""

    __slots__ = ("chunk", "cluster", "dirty", "lock", "raised_from", "version", "written")

    def __init__(
        self, chunk: int, version: int, cluster: bytes, lock: int = 0, written: int = 0,
        dirty: int = 0, raised_from: int = 0,
    ) -> None:  # fmt: skip
        self.chunk, self.version, self.cluster, self.lock = chunk, version, cluster, lock
        self.written, self.dirty, self.raised_from = written, dirty, raised_from

    def pack(self) -> bytes:
        """The header's sector; what follows up to HEADER_SIZE is zeros."""
        body = _FIXED.pack(
            _MAGIC, self.chunk, self.version, self.cluster, self.lock,
            self.written.to_bytes(BITMAP_BYTES, "little"),
            self.dirty.to_bytes(BITMAP_BYTES, "little"), self.raised_from,
        ) + _PADDING  # fmt: skip
        return body + crc32(body).to_bytes(4, "big")

    def pack_page(self) -> bytes:
        """The whole header page."""
        return self.pack() + _REST

    @classmethod
    def unpack(cls, page: bytes | memoryview) -> "Header":
        """Inverse of `pack_page`. LayoutError for anything that it did not make."""
        if len(page) != HEADER_SIZE:
            raise LayoutError("the file is too short for a chunk's header")
        crc = int.from_bytes(page[_CRC_AT:SECTOR], "big")
        if crc32(page[:_CRC_AT]) != crc or page[SECTOR:] != _REST:
            raise LayoutError("the chunk's header is damaged")
        magic, chunk, version, cluster, lock, written, dirty, before = _FIXED.unpack_from(page)
        if magic != _MAGIC:
            raise LayoutError("not a chunk file of this format")
        return cls(
            chunk, version, cluster, lock,
            int.from_bytes(written, "little"), int.from_bytes(dirty, "little"), before,
        )  # fmt: skip


class CrcTable:
    """The CRC table page in memory, as it lies in the file (4 KiB for each open copy)."""

    __slots__ = ("_page",)

    def __init__(self, page: bytes | memoryview = bytes(TABLE_SIZE)) -> None:
        if len(page) != TABLE_SIZE:
            raise LayoutError("the file is too short for a chunk's CRC table")
        self._page = bytearray(page)

    def get(self, first: int, count: int) -> tuple[int, ...]:
        """CRCs of `count` blocks from `first` on (at most 32)."""
        return _CRC_STRUCTS[count].unpack_from(self._page, 4 * first)

    def put(self, first: int, crcs: list[int]) -> tuple[bytes, int]:
        """Set CRCs from block `first` on; gives the bytes to write and their offset in the file."""
        _CRC_STRUCTS[len(crcs)].pack_into(self._page, 4 * first, *crcs)
        raw = bytes(self._page[4 * first : 4 * (first + len(crcs))])
        return raw, TABLE_OFFSET + 4 * first

    def fits(self, first: int, blocks: memoryview) -> bool:
        """Whether whole blocks from `first` on have these checksums."""
        crcs = self.get(first, len(blocks) // BLOCK_SIZE)
        return all(
            crc32(blocks[at * BLOCK_SIZE : (at + 1) * BLOCK_SIZE]) == crc
            for at, crc in enumerate(crcs)
        )

    def page(self) -> bytes:
        """The whole table."""
        return bytes(self._page)

    def full_page(self, written: int) -> bytes:
        """The table with the true CRC of blocks that were never written, too."""
        zero = ZERO_BLOCK_CRC.to_bytes(4, "big")
        page = bytearray(zero * BLOCKS_PER_CHUNK)
        for block in blocks_of(written):
            page[4 * block : 4 * block + 4] = self._page[4 * block : 4 * block + 4]
        return bytes(page)


def file_name(chunk: int, version: int) -> str:
    """Path of a chunk file below its disk's folder."""
    return f"{folder_of(chunk)}/chunk_{chunk:016X}_{version:08X}.mfs"


def folder_of(chunk: int) -> str:
    """The folder of a chunk's files below its disk's."""
    return f"{chunk & 0xFF:02X}"


def parse_name(name: str) -> tuple[int, int] | None:
    """Chunk and version of a file's (last) name; None for other files."""
    match = _NAME.fullmatch(name)
    return (int(match[1], 16), int(match[2], 16)) if match else None


def bits(first: int, last: int) -> int:
    """Bitmap of the blocks from `first` to `last`, both included."""
    return ((1 << (last - first + 1)) - 1) << first


def blocks_of(bitmap: int) -> list[int]:
    """The blocks of a bitmap, ascending."""
    blocks = []
    while bitmap:
        lowest = bitmap & -bitmap
        blocks.append(lowest.bit_length() - 1)
        bitmap ^= lowest
    return blocks


def runs_of(bitmap: int, longest: int = BLOCKS_PER_CHUNK) -> list[tuple[int, int]]:
    """The bitmap as runs (first block, number of blocks), none longer than `longest`."""
    runs: list[tuple[int, int]] = []
    for block in blocks_of(bitmap):
        if runs and sum(runs[-1]) == block and runs[-1][1] < longest:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((block, 1))
    return runs


def place_of(first: int, count: int) -> tuple[int, int]:
    """Offset in the file, and length, of blocks."""
    return DATA_OFFSET + first * BLOCK_SIZE, count * BLOCK_SIZE


def block_span(offset: int, length: int) -> tuple[int, int]:
    """First and last block that a range (not empty) touches."""
    return offset // BLOCK_SIZE, (offset + length - 1) // BLOCK_SIZE
