"""Frames: cut right, bounded, and checksummed at the right borders."""

import random
import socket
import struct

import pytest

from raftfs.const import BLOCK_SIZE, CONTROL_FRAME_MAX, DATA_PAYLOAD_MAX
from raftfs.wire import frame
from raftfs.wire import messages as m


def test_splitter_gives_the_same_frames_however_the_stream_is_cut() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    contents = [chance.randbytes(chance.randrange(0, 3000)) for _ in range(50)]
    stream = b"".join(frame.pack_control(c) for c in contents)
    splitter, got, at = frame.Splitter(), [], 0
    while at < len(stream):
        step = chance.randrange(1, 700)
        got += splitter.feed(stream[at : at + step])
        at += step
    assert got == contents


def test_a_frame_beyond_the_bound_is_refused_before_it_is_read() -> None:
    with pytest.raises(frame.FrameError, match="limit"):
        list(frame.Splitter().feed(struct.pack(">I", CONTROL_FRAME_MAX + 1)))
    with pytest.raises(frame.FrameError, match="limit"):
        frame.pack_control(bytes(CONTROL_FRAME_MAX + 1))


def test_data_frame_round_trip_with_the_largest_payload() -> None:
    left, right = socket.socketpair()
    left.settimeout(5)
    right.settimeout(5)
    head = m.ReadData(7, 1, 2, 3, 4)
    small = random.Random(1).randbytes(10_000)
    with left, right:
        frame.send_data(left, head, small)
        got, payload = frame.recv_data(right, m.DataRequest)
        assert got == head and payload == small
        into = memoryview(bytearray(DATA_PAYLOAD_MAX))
        frame.send_data(left, head)
        got, payload = frame.recv_data(right, m.DataRequest, into)
        assert got == head and len(payload) == 0


def test_data_frames_refuse_garbage_and_the_end_of_the_stream() -> None:
    left, right = socket.socketpair()
    right.settimeout(5)
    with left, right:
        left.sendall(b"GET / HTTP/1.0\r\n\r\n")
        with pytest.raises(frame.FrameError):
            frame.recv_data(right, m.DataRequest)
    left, right = socket.socketpair()
    right.settimeout(5)
    with right:
        left.close()
        with pytest.raises(EOFError):
            frame.recv_data(right, m.DataRequest)


def test_oversized_payload_is_refused_by_the_receiver() -> None:
    left, right = socket.socketpair()
    right.settimeout(5)
    with left, right:
        left.sendall(struct.pack(">HII", 0x5246, 10, DATA_PAYLOAD_MAX + 1))
        with pytest.raises(frame.FrameError):
            frame.recv_data(right, m.DataRequest)


@pytest.mark.parametrize("offset", [0, 1, BLOCK_SIZE - 1, BLOCK_SIZE, 3 * BLOCK_SIZE + 17])
@pytest.mark.parametrize("length", [0, 1, 17, BLOCK_SIZE, BLOCK_SIZE + 1, 3 * BLOCK_SIZE])
def test_pieces_are_cut_at_block_borders_of_the_chunk(offset: int, length: int) -> None:
    data = random.Random(offset + length).randbytes(length)
    want, at = [], 0
    while at < length:
        step = min(length - at, BLOCK_SIZE - (offset + at) % BLOCK_SIZE)
        want.append(frame.crc32(data[at : at + step]))
        at += step
    assert frame.piece_crcs(offset, data) == want


def test_decode_checks_the_type() -> None:
    with pytest.raises(frame.FrameError):
        frame.decode(m.ClientRequest, frame.encode([99, 1]))
    with pytest.raises(frame.FrameError):
        frame.decode(m.Lookup, frame.encode([5, "not an inode", b"x"]))
