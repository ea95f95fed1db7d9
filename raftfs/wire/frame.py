"""Frames: how messages are cut out of a byte stream, bounded before anything is read.

Control frame: `u32 length | body`, where body is `u8 kind | u64 id | MessagePack` (sealed as a
whole on authenticated links). Data frame: `u16 magic | u32 head length | u32 payload length | head
| payload`; the head is MessagePack, the payload raw. All integers big-endian.
"""

import socket
import struct
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec
from isal import isal_zlib

from raftfs.const import BLOCK_SIZE, CONTROL_FRAME_MAX, DATA_HEAD_MAX, DATA_PAYLOAD_MAX
from raftfs.errors import RaftfsError

T = TypeVar("T")
Buffer = bytes | bytearray | memoryview

_LENGTH = struct.Struct(">I")
_INNER = struct.Struct(">BQ")
_DATA = struct.Struct(">HII")
_DATA_MAGIC = 0x5246  # "RF"

REQUEST, REPLY, NOTICE, HANDSHAKE = 0, 1, 2, 3

_encoder = msgspec.msgpack.Encoder()
_decoders: dict[Any, Any] = {}


class FrameError(RaftfsError):
    """The other side sent something that is no frame of ours, or one beyond the bound."""


def encode(message: Any) -> bytes:
    """MessagePack of any message."""
    return _encoder.encode(message)


def decode(kind: type[T], raw: Buffer) -> T:
    """Inverse of `encode`, checked against the type `kind`. FrameError if it does not fit."""
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(kind)
    try:
        return decoder.decode(raw)  # type: ignore[no-any-return]
    except msgspec.MsgspecError as e:
        raise FrameError(f"message does not decode: {e}") from e


def pack_inner(kind: int, ident: int, body: bytes) -> bytes:
    """The plain content of a control frame."""
    return _INNER.pack(kind, ident) + body


def unpack_inner(data: Buffer) -> tuple[int, int, memoryview]:
    """Inverse of `pack_inner`: kind, id, body."""
    if len(data) < _INNER.size:
        raise FrameError("frame too short")
    kind, ident = _INNER.unpack_from(data)
    return kind, ident, memoryview(data)[_INNER.size :]


def pack_control(content: bytes) -> bytes:
    """A whole control frame around plain or sealed content."""
    if len(content) > CONTROL_FRAME_MAX:
        raise FrameError(f"control frame of {len(content)} bytes, limit {CONTROL_FRAME_MAX}")
    return _LENGTH.pack(len(content)) + content


class Splitter:
    """Cuts a byte stream into the contents of control frames; holds at most one unfinished frame.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the content of each frame that `data` completes. FrameError beyond the bound."""
        buffer = self._buffer
        buffer += data
        start, end = 0, len(buffer)
        try:
            while end - start >= 4:
                (length,) = _LENGTH.unpack_from(buffer, start)
                if length > CONTROL_FRAME_MAX:
                    raise FrameError(f"control frame of {length} bytes, limit {CONTROL_FRAME_MAX}")
                if end - start - 4 < length:
                    break
                content = bytes(memoryview(buffer)[start + 4 : start + 4 + length])
                start += 4 + length
                yield content
        finally:
            del buffer[:start]


# --- data port, blocking sockets --------------------------------------------------------------


def send_data(sock: socket.socket, head: Any, payload: Buffer = b"") -> None:
    """Send one data frame; the payload is never copied. OSError (TimeoutError) if the link breaks.
    """
    body = _encoder.encode(head)
    size = len(payload)
    if size > DATA_PAYLOAD_MAX or len(body) > DATA_HEAD_MAX:
        raise FrameError(f"data frame of {len(body)} + {size} bytes is beyond the bound")
    first = _DATA.pack(_DATA_MAGIC, len(body), size) + body
    if not size:
        sock.sendall(first)
        return
    sent = sock.sendmsg((first, payload))
    if sent < len(first):
        sock.sendall(memoryview(first)[sent:])
        sent = len(first)
    if sent < len(first) + size:
        sock.sendall(memoryview(payload)[sent - len(first) :])


def recv_data(
    sock: socket.socket, head_type: type[T], into: memoryview | None = None
) -> tuple[T, memoryview]:
    """Receive one data frame: its head and its payload.

    The payload lies in `into` when given (at least DATA_PAYLOAD_MAX long), else in fresh memory.
    EOFError when the other side closed between frames; FrameError for anything that is no frame.
    """
    first = recv_exactly(sock, memoryview(bytearray(_DATA.size)))
    magic, head_len, size = _DATA.unpack(first)
    if magic != _DATA_MAGIC or head_len > DATA_HEAD_MAX or size > DATA_PAYLOAD_MAX:
        raise FrameError("not a data frame, or one beyond the bound")
    head = decode(head_type, recv_exactly(sock, memoryview(bytearray(head_len))))
    payload = memoryview(bytearray(size)) if into is None else into[:size]
    return head, recv_exactly(sock, payload)


def recv_exactly(sock: socket.socket, view: memoryview) -> memoryview:
    """Fill `view` from the socket. EOFError if the stream ends before."""
    got, want = 0, len(view)
    while got < want:
        n = sock.recv_into(view[got:])
        if n == 0:
            raise EOFError("connection closed")
        got += n
    return view


# --- checksums ------------------------------------------------------------------------------------


def crc32(data: Buffer, value: int = 0) -> int:
    """CRC32 (zlib's polynomial), continued from `value`; releases the GIL for large data."""
    return isal_zlib.crc32(data, value)


def piece_crcs(offset: int, data: Buffer) -> list[int]:
    """CRC32 of each piece of `data`, which starts at `offset` in its chunk, cut at block borders.
    """
    view = memoryview(data)
    crcs, at, end = [], 0, len(view)
    step = BLOCK_SIZE - offset % BLOCK_SIZE
    while at < end:
        crcs.append(isal_zlib.crc32(view[at : at + step]))
        at += step
        step = BLOCK_SIZE
    return crcs


ZERO_BLOCK_CRC = crc32(bytes(BLOCK_SIZE))
