"""The format of a chunk file. Pure: bytes in, bytes out.

    0      header page: magic, id, version, cluster UUID, written bitmap, dirty bitmap, own CRC32,
           all in the first 512 bytes: a disk sector, which a power cut does not tear
    4096   CRC table: 1,024 big-endian CRC32, one a 64 KiB block, missing bytes counting as zeros
    8192   data

A block whose *written* bit is clear was never written: it reads as zeros and the file is not asked.
A *dirty* bit is set before a block is changed and cleared after a sync: after a stop in between,
the block may not match its CRC without being rotten. `docs/decisions/004` has the reasoning. Files
are named `XX/chunk_<id>_<version>.mfs`, XX being the id's lowest byte.
"""

import re
import struct

from raftfs.const import BLOCK_SIZE, BLOCKS_PER_CHUNK
from raftfs.errors import RaftfsError
from raftfs.wire.frame import crc32

HEADER_SIZE = 4096
_SECTOR = 512
TABLE_OFFSET = HEADER_SIZE
DATA_OFFSET = 8192
BITMAP_BYTES = BLOCKS_PER_CHUNK // 8
_MAGIC = b"RFSC 1.0"
_FIXED = struct.Struct(f">8sQI16s{BITMAP_BYTES}s{BITMAP_BYTES}s")
_TABLE = struct.Struct(f">{BLOCKS_PER_CHUNK}I")
_NAME = re.compile(r"^chunk_([0-9A-F]{16})_([0-9A-F]{8})\.mfs$")


class LayoutError(RaftfsError):
    """The file is no chunk file, or its header is damaged."""


class UnfinishedError(RaftfsError):
    """The file was made, but not even its header was written."""


class Header:
    """A chunk file's header; bitmaps are integers, bit i for block i."""

    def __init__(
        self, chunk: int, version: int, cluster: bytes, written: int = 0, dirty: int = 0
    ) -> None:
        self.chunk, self.version, self.cluster = chunk, version, cluster
        self.written, self.dirty = written, dirty

    def pack(self) -> bytes:
        """The header page."""
        fixed = _FIXED.pack(
            _MAGIC, self.chunk, self.version, self.cluster,
            self.written.to_bytes(BITMAP_BYTES, "little"),
            self.dirty.to_bytes(BITMAP_BYTES, "little"),
        )  # fmt: skip
        body = fixed.ljust(_SECTOR - 4, b"\0")
        return (body + crc32(body).to_bytes(4, "big")).ljust(HEADER_SIZE, b"\0")

    @classmethod
    def unpack(cls, page: bytes) -> "Header":
        """Inverse of `pack`. LayoutError for anything that `pack` did not make."""
        body, crc = page[: _SECTOR - 4], page[_SECTOR - 4 : _SECTOR]
        if len(page) != HEADER_SIZE or crc32(body) != int.from_bytes(crc, "big"):
            raise LayoutError("the chunk's header is damaged")
        magic, chunk, version, cluster, written, dirty = _FIXED.unpack_from(page)
        if magic != _MAGIC:
            raise LayoutError("not a chunk file of this format")
        return cls(
            chunk, version, cluster, int.from_bytes(written, "little"),
            int.from_bytes(dirty, "little"),
        )  # fmt: skip


def pack_table(crcs: list[int]) -> bytes:
    """The CRC table page."""
    return _TABLE.pack(*crcs)


def unpack_table(page: bytes) -> list[int]:
    """Inverse of `pack_table`."""
    return list(_TABLE.unpack(page))


def file_name(chunk: int, version: int) -> str:
    """Path of a chunk file below its disk's folder."""
    return f"{chunk & 0xFF:02X}/chunk_{chunk:016X}_{version:08X}.mfs"


def parse_name(name: str) -> tuple[int, int] | None:
    """Chunk and version of a file's (last) name; None for other files."""
    match = _NAME.match(name)
    return (int(match[1], 16), int(match[2], 16)) if match else None


def bits(offset: int, length: int) -> int:
    """Bitmap of the blocks that a range of the chunk touches."""
    first, last = offset // BLOCK_SIZE, (offset + length - 1) // BLOCK_SIZE
    return ((1 << (last - first + 1)) - 1) << first
