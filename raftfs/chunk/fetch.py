"""Replication: fetch a copy from another chunkserver, verified, and adopt it."""

import socket
from collections.abc import Iterator
from typing import Any

from raftfs.chunk.store import ChunkStore
from raftfs.const import BLOCK_SIZE, BLOCKS_PER_CHUNK, DATA_PAYLOAD_MAX
from raftfs.errors import ReplyError, Status
from raftfs.wire import frame
from raftfs.wire.messages import DataReply, ListBlocks, ReadData, Replicate

_TIMEOUT_S = 10.0
_BLOCKS_PER_READ = DATA_PAYLOAD_MAX // BLOCK_SIZE


def replicate(store: ChunkStore, order: Replicate) -> None:
    """Make this server's copy of the chunk. ReplyError or OSError if it cannot be had whole."""
    with socket.create_connection((order.host, order.port), _TIMEOUT_S) as sock:
        sock.settimeout(_TIMEOUT_S)
        blocks = _ask(sock, ListBlocks(0, order.chunk, order.version))[1]
        written = int.from_bytes(blocks[4 * BLOCKS_PER_CHUNK :], "little")
        store.adopt(order.chunk, order.version, _pieces(sock, order, written))


def _pieces(
    sock: socket.socket, order: Replicate, written: int
) -> Iterator[tuple[int, frame.Buffer]]:
    """Runs of written blocks, each at most one request long."""
    block = 0
    while written >> block:
        if not written >> block & 1:
            block += 1
            continue
        run = 1
        while run < _BLOCKS_PER_READ and written >> (block + run) & 1:
            run += 1
        offset, length = block * BLOCK_SIZE, run * BLOCK_SIZE
        head, data = _ask(sock, ReadData(block, order.chunk, order.version, offset, length))
        if len(data) != length or frame.piece_crcs(offset, data) != list(head.crcs):
            raise ReplyError(Status.BAD_CRC)
        yield offset, _trimmed(data)
        block += run


def _trimmed(data: memoryview) -> memoryview:
    """Without trailing zeros of the last block, so that a small file stays small."""
    last = bytes(data[-BLOCK_SIZE:]).rstrip(b"\0")
    return data[: max(1, len(data) - BLOCK_SIZE + len(last))]


def _ask(sock: socket.socket, request: Any) -> tuple[DataReply, memoryview]:
    frame.send_data(sock, request)
    head, data = frame.recv_data(sock, DataReply)
    if head.status:
        raise ReplyError(head.status)
    return head, data


