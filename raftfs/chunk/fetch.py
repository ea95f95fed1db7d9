"""Replication: fetch a copy from another chunkserver, verified, and have it as one's own.

The copy grows under a `.part` name and is written without marks, because nobody else knows it and a
stop makes it worthless. It gets its real name only when every byte was checked against the source's
CRC table, the source still had the same table at the end, and all is on the disk.
"""

import struct
from contextlib import suppress
from pathlib import Path

import structlog

from raftfs.chunk import layout
from raftfs.chunk.disk import Disk
from raftfs.chunk.store import ChunkStore
from raftfs.client.chunk import ChunkPool, ChunkReader
from raftfs.const import BLOCK_SIZE, BLOCKS_PER_CHUNK, DATA_PAYLOAD_MAX
from raftfs.errors import ReplyError, Status
from raftfs.wire.frame import Buffer
from raftfs.wire.messages import Replicate

log = structlog.get_logger("raftfs.replication")

_READ_TIMEOUT_S = 10.0
_BLOCKS_PER_READ = DATA_PAYLOAD_MAX // BLOCK_SIZE
_TABLE = struct.Struct(f">{BLOCKS_PER_CHUNK}I")


class Fetched:
    """A whole, durable copy under its `.part` name: to be adopted or discarded."""

    def __init__(self, disk: Disk, path: Path) -> None:
        self.disk, self.path = disk, path


def fetch(store: ChunkStore, pool: ChunkPool, order: Replicate) -> Fetched | None:
    """Get the copy at exactly the order's version; None if it is here already.

    ReplyError (the source's, ENOSPC, BAD_CRC), LinkError or OSError, and nothing is left behind.
    """
    known = store.version_of(order.chunk)
    if known is not None and known >= order.version:
        if known == order.version and not store.is_doubtful(order.chunk):
            return None
        raise ReplyError(Status.WRONG_VERSION)
    reader = ChunkReader(pool, (order.host, order.port), timeout_s=_READ_TIMEOUT_S,
                         ticket=order.ticket)  # fmt: skip
    table, written = reader.block_list(order.chunk, order.version)
    disk = store.place_for(order.chunk, order.version)
    path = disk.path / (layout.file_name(order.chunk, order.version) + layout.PART_SUFFIX)
    store.door.unlink(path)  # of an earlier attempt
    fd = store.door.create(path)
    try:
        try:
            _copy(store, fd, reader, order, _TABLE.unpack(table), written)
            if reader.block_list(order.chunk, order.version) != (table, written):
                raise ReplyError(Status.BUSY)  # somebody writes it: not a copy of any one moment
            header = layout.Header(
                order.chunk, order.version, store.cluster or bytes(16), written=written
            )
            store.door.pwrite(fd, [header.pack_page(), table], 0)
            store.door.sync(fd)
        finally:
            store.door.close(fd)
    except BaseException:
        discard(store, Fetched(disk, path))
        raise
    return Fetched(disk, path)


def discard(store: ChunkStore, fetched: Fetched) -> None:
    """The copy is not wanted after all."""
    with suppress(OSError):  # also removed at the next start
        store.door.unlink(fetched.path)


def _copy(
    store: ChunkStore, fd: int, reader: ChunkReader, order: Replicate, table: tuple[int, ...],
    written: int,
) -> None:  # fmt: skip
    room = memoryview(bytearray(DATA_PAYLOAD_MAX))
    end = written.bit_length() - 1
    for first, count in layout.runs_of(written, _BLOCKS_PER_READ):
        data, crcs = reader.read_pieces(
            order.chunk, order.version, first * BLOCK_SIZE, count * BLOCK_SIZE, room
        )
        if crcs != table[first : first + count]:
            raise ReplyError(Status.BUSY)
        last = first + count - 1 == end
        store.door.pwrite(
            fd, [_without_tail(data) if last else data], layout.DATA_OFFSET + first * BLOCK_SIZE
        )


def _without_tail(data: memoryview) -> Buffer:
    """Without the last block's trailing zeros, so that a small file stays small."""
    return data[: len(data) - BLOCK_SIZE + len(bytes(data[-BLOCK_SIZE:]).rstrip(b"\0"))]
