"""Chunks of files as the tools show them: from the masters, and checksums from the chunkservers."""

import hashlib
from collections.abc import Iterator

from raftfs.client.chunk import ChunkPool, ChunkReader
from raftfs.client.meta import ToolClient
from raftfs.wire import messages as m


def chunks(client: ToolClient, inode: int) -> Iterator[m.FileChunk]:
    """Every index of a file, holes included."""
    first = 0
    while part := client.call(m.FileChunks(inode, first)):
        yield from part
        first = part[-1].index + 1


def block_crcs(pool: ChunkPool, chunk: m.FileChunk, copy: m.Location) -> bytes:
    """The CRCs (big-endian, 4 bytes each) of a copy's blocks up to the last written one.

    LinkError or ReplyError if the chunkserver does not give them.
    """
    reader = ChunkReader(pool, (copy.host, copy.port), ticket=chunk.ticket)
    table, written = reader.block_list(chunk.chunk, copy.version)
    return bytes(table[: 4 * written.bit_length()])


def digest(crcs: bytes) -> str:
    """MD5 of block CRCs, in the tools' spelling; equal for copies with equal content."""
    return hashlib.md5(crcs).hexdigest().upper()


def copies_table(client: ToolClient, inode: int) -> dict[int, int]:
    """How many chunks have how many valid copies."""
    counts: dict[int, int] = {}
    for chunk in chunks(client, inode):
        if chunk.chunk:
            counts[len(chunk.copies)] = counts.get(len(chunk.copies), 0) + 1
    return counts
