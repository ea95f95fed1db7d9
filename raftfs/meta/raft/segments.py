"""The files of the journal: their format, and the only door to the disk.

    segment := blob*           (the rest of the file is zeros)
    blob    := magic 8 | number u64 | length u32 | crc u32 over number, length, payload | payload
    payload := record*         record := length u32 | kind u8 | index u64 | term u64 | data

    kinds: E entry, V term and vote (data: the vote), T truncated from index on,
           S a snapshot at (index, term) is about to be installed
           B the log begins anew at (index, term): it was
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from raftfs.wire.frame import crc32

MAGIC = b"RFSJRNL\x01"
_BLOB = struct.Struct("<8sQII")
_CRC_PART = struct.Struct("<QI")
_RECORD = struct.Struct("<IcQQ")
BLOB_HEAD = _BLOB.size
RECORD_HEAD = _RECORD.size


class Files:
    """The journal's only door to the disk; tests put a faulty one in its place."""

    def names(self, folder: Path) -> list[str]:
        """Files in the folder, which is made if it is missing."""
        folder.mkdir(parents=True, exist_ok=True)
        return os.listdir(folder)

    def read(self, path: Path) -> bytes:
        """Whole content."""
        return path.read_bytes()

    def read_at(self, path: Path, offset: int, length: int) -> bytes:
        """A part of it, shorter if the file ends before."""
        with open(path, "rb", buffering=0) as file:
            return os.pread(file.fileno(), length, offset)

    def create(self, path: Path, size: int) -> Any:
        """A new file of `size` zero bytes, durable; gives a handle.

        The zeros are written, not only allocated: an fdatasync that must turn unwritten extents
        into written ones waits for the file system's own journal, and for whatever else is in it.
        """
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        self.write(fd, bytes(size), 0)
        os.fsync(fd)
        return fd

    def write(self, handle: Any, data: bytes, offset: int) -> None:
        """All of `data` at `offset`."""
        view = memoryview(data)
        while view:
            done = os.pwrite(handle, view, offset)
            view, offset = view[done:], offset + done

    def sync(self, handle: Any) -> None:
        """fdatasync."""
        os.fdatasync(handle)

    def sync_folder(self, folder: Path) -> None:
        """Make creations and unlinks durable."""
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def replace(self, path: Path, data: bytes) -> None:
        """A small file with this content instead of the old one, durably; never a part of it."""
        new = path.with_suffix(".new")
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            self.write(fd, data, 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(new, path)
        self.sync_folder(path.parent)

    def unlink(self, path: Path) -> None:
        """Remove a file."""
        os.unlink(path)

    def close(self, handle: Any) -> None:
        """Give the handle back."""
        os.close(handle)


class Record(NamedTuple):
    """What a payload is made of. `entry`: an index of the log. `offset`: where the data lies in the
    segment, once it is there.
    """

    kind: bytes
    entry: int
    term: int
    data: bytes
    offset: int = 0

    def pack(self) -> bytes:
        """As it lies in the payload."""
        return _RECORD.pack(len(self.data), self.kind, self.entry, self.term) + self.data


def pack_blob(number: int, payload: bytes) -> bytes:
    """Head and payload."""
    crc = crc32(payload, crc32(_CRC_PART.pack(number, len(payload))))
    return _BLOB.pack(MAGIC, number, len(payload), crc) + payload


def blob_at(data: bytes, at: int) -> tuple[int, bytes] | None:
    """Number and payload of the valid blob at a place, else None."""
    if at + _BLOB.size > len(data):
        return None
    magic, number, length, crc = _BLOB.unpack_from(data, at)
    start = at + _BLOB.size
    if magic != MAGIC or start + length > len(data):
        return None
    payload = data[start : start + length]
    if crc32(payload, crc32(_CRC_PART.pack(number, length))) != crc:
        return None
    return number, payload


def records(payload: bytes, start: int) -> Iterator[Record]:
    """What is in a valid payload that lies at `start` of its segment."""
    at = 0
    while at < len(payload):
        length, kind, index, term = _RECORD.unpack_from(payload, at)
        at += _RECORD.size
        yield Record(kind, index, term, payload[at : at + length], start + at)
        at += length
