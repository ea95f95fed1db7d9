"""Chunks of files as the tools show them: from the masters, and checksums from the chunkservers."""

import hashlib
import socket
from collections.abc import Iterator

from raftfs.client.meta import ToolClient
from raftfs.const import BLOCKS_PER_CHUNK
from raftfs.errors import ReplyError
from raftfs.wire import frame
from raftfs.wire import messages as m

_TIMEOUT_S = 5.0


def chunks(client: ToolClient, inode: int) -> Iterator[m.FileChunk]:
    """Every index of a file, holes included."""
    first = 0
    while part := client.call(m.FileChunks(inode, first)):
        yield from part
        first = part[-1].index + 1


def block_crcs(chunk: int, copy: m.Location) -> bytes:
    """The CRCs (big-endian, 4 bytes each) of a copy's blocks up to the last written one.

    OSError or ReplyError if the chunkserver does not give them.
    """
    with socket.create_connection((copy.host, copy.port), _TIMEOUT_S) as sock:
        sock.settimeout(_TIMEOUT_S)
        frame.send_data(sock, m.ListBlocks(0, chunk, copy.version))
        head, data = frame.recv_data(sock, m.DataReply)
    if head.status:
        raise ReplyError(head.status)
    written = int.from_bytes(data[4 * BLOCKS_PER_CHUNK :], "little")
    return bytes(data[: 4 * written.bit_length()])


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
