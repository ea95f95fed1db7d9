"""The durable log of one replica: append-only segments, group commit, damage told from torn tails.

A segment is a file of *blobs*. All records since the last `sync()` leave as one blob: one write,
one fdatasync. The next blob is written only after that returned, so

    the last blob is incomplete or fails its CRC      torn by a crash, nobody was told: cut
    a bad blob, and a valid later one with a higher   the disk changed what was durable: stop
    number than the bad one's

    blob    := magic 8 | number u64 | length u32 | crc u32 over number, length, payload | payload
    payload := record*        record := length u32 | kind u8 | index u64 | term u64 | data

    kinds: E entry, V term and vote (data: the vote), T truncated from index on,
           B the log begins anew at (index, term): a snapshot was installed

Segments are created in their full size and never changed in place. Compaction unlinks whole ones.
Each begins with the current V (and B), so what an unlinked one said is never missed.
An error of a write or sync is final (`JournalError`): the kernel may have dropped the dirty pages,
so trying again could report a durability that does not exist.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pysyncobj.journal import Journal

from raftfs.errors import RaftfsError, UserError, invariant
from raftfs.wire.frame import crc32

SEGMENT_BYTES = 4 << 20  # small, because a new one is filled with zeros while the loop waits
_MAGIC = b"RFSJRNL\x01"
_BLOB = struct.Struct("<8sQII")
_CRC_PART = struct.Struct("<QI")
_RECORD = struct.Struct("<IcQQ")

Entry = tuple[bytes, int, int]  # command, index, term: pysyncobj's form


class JournalError(RaftfsError):
    """Writing or syncing the journal failed: this replica must stop at once."""


class Files:
    """The journal's only door to the disk; tests put a faulty one in its place."""

    def names(self, folder: Path) -> list[str]:
        """Files in the folder, which is made if it is missing."""
        folder.mkdir(parents=True, exist_ok=True)
        return os.listdir(folder)

    def read(self, path: Path) -> bytes:
        """Whole content."""
        return path.read_bytes()

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

    def unlink(self, path: Path) -> None:
        """Remove a file."""
        os.unlink(path)

    def close(self, handle: Any) -> None:
        """Give the handle back."""
        os.close(handle)


class _Segment:
    """A file of the journal and the highest entry index that it holds."""

    def __init__(self, number: int, last_index: int) -> None:
        self.number, self.last_index = number, last_index


class DurableJournal(Journal):  # type: ignore[misc]
    """pysyncobj's journal interface over durable segments. Not thread-safe."""

    def __init__(
        self, folder: Path, files: Files | None = None, segment_bytes: int = SEGMENT_BYTES
    ) -> None:
        self._folder = folder
        self._files = files or Files()
        self._segment_bytes = segment_bytes
        self._entries: list[Entry] = []
        self._bytes = 0
        self._term, self._vote = 0, ""
        self._base: tuple[int, int] | None = None
        self._pending: list[bytes] = []
        self._segments: list[_Segment] = []
        self._blob_number = 0
        self._handle: Any = None
        self._failed = False
        self.syncs = 0
        self._recover()
        self._begin_segment()

    # --- recovery

    def _recover(self) -> None:
        try:
            names = self._files.names(self._folder)
            numbers = sorted(int(n[:-4]) for n in names if n.endswith(".seg"))
            for number in numbers:
                path = self._path(number)
                self._replay(path, self._files.read(path))
                self._segments.append(_Segment(number, self.last_index))
        except OSError as e:
            raise UserError(f"journal {self._folder} cannot be read: {e}") from None

    def _replay(self, path: Path, data: bytes) -> None:
        at = 0
        while (blob := _blob_at(data, at)) is not None:
            number, payload = blob
            # A blob that was torn gives its number to the next one written; so a gap in the numbers
            # means that something durable is missing between two blobs.
            if self._blob_number and number != self._blob_number + 1:
                raise _damaged(path, at)
            self._blob_number = number
            for record in _records(payload):
                self._take(path, *record)
            at += _BLOB.size + len(payload)
        found = data.find(_MAGIC, at + 1)
        while found >= 0:
            if _blob_at(data, found) is not None:
                raise _damaged(path, at)
            found = data.find(_MAGIC, found + 1)

    def _take(self, path: Path, kind: bytes, index: int, term: int, data: bytes) -> None:
        if kind == b"V":
            self._term, self._vote = term, data.decode()
        elif kind == b"T":
            self._cut(index)
        elif kind == b"B":
            if self._base != (index, term):
                self._begin_anew(index, term)
        elif kind == b"E":
            if self._entries and index != self.last_index + 1:
                raise UserError(f"journal {path}: entry {index} follows {self.last_index}")
            self._push(data, index, term)

    # --- segments

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:012d}.seg"

    def _begin_segment(self) -> None:
        number = self._segments[-1].number + 1 if self._segments else 1
        try:
            if self._handle is not None:
                self._files.close(self._handle)
            self._handle = self._files.create(self._path(number), self._segment_bytes)
            self._offset = 0
            self._segments.append(_Segment(number, self.last_index))
            self._files.sync_folder(self._folder)
        except OSError as e:
            raise self._fail(e) from None
        restated = [_pack(b"V", 0, self._term, self._vote.encode())]
        if self._base is not None:
            restated.append(_pack(b"B", *self._base))
        self._pending = restated + self._pending
        self._write()

    def _fail(self, error: OSError) -> JournalError:
        self._failed = True
        return JournalError(f"journal {self._folder} cannot be written: {error}")

    def sync(self) -> bool:
        """Make everything so far durable. False if there was nothing. JournalError is final."""
        if not self._pending:
            return False
        size = _BLOB.size + sum(map(len, self._pending))
        if self._offset + size > self._segment_bytes and self._offset:
            self._begin_segment()
        else:
            self._write()
        return True

    def _write(self) -> None:
        invariant(not self._failed, "the journal has failed before")
        payload = b"".join(self._pending)
        number = self._blob_number + 1
        crc = crc32(payload, crc32(_CRC_PART.pack(number, len(payload))))
        blob = _BLOB.pack(_MAGIC, number, len(payload), crc) + payload
        try:
            self._files.write(self._handle, blob, self._offset)
            self._files.sync(self._handle)
        except OSError as e:
            raise self._fail(e) from None
        self._pending.clear()
        self._blob_number = number
        self._offset += len(blob)
        self._segments[-1].last_index = max(self._segments[-1].last_index, self.last_index)
        self.syncs += 1

    # --- the log in memory

    @property
    def last_index(self) -> int:
        """Index of the last entry, 0 if there is none."""
        return self._entries[-1][1] if self._entries else 0

    @property
    def first_index(self) -> int:
        """Index of the first entry that is still there."""
        return self._entries[0][1] if self._entries else 0

    @property
    def bytes_kept(self) -> int:
        """Bytes of commands in memory."""
        return self._bytes

    def _push(self, command: bytes, index: int, term: int) -> None:
        self._entries.append((command, index, term))
        self._bytes += len(command)

    def _cut(self, index: int) -> None:
        keep = max(0, index - self.first_index)
        self._bytes -= sum(len(e[0]) for e in self._entries[keep:])
        del self._entries[keep:]

    def _begin_anew(self, index: int, term: int) -> None:
        self._entries = [(b"\x01", index, term)]
        self._bytes = 1
        self._base = (index, term)

    def compact(self, index: int, keep_entries: int, keep_bytes: int) -> None:
        """Forget entries below `index`, which a checkpoint covers, but keep a bounded tail."""
        index = min(index, self.last_index)
        kept = 0
        first = index
        while first > self.first_index and index - first < keep_entries:
            kept += len(self._entries[first - 1 - self.first_index][0])
            if kept > keep_bytes:
                break
            first -= 1
        self.deleteEntriesTo(first - self.first_index)

    # --- pysyncobj's Journal

    def add(self, command: bytes, idx: int, term: int) -> None:
        """Append an entry; durable after the next sync."""
        invariant(not self._entries or idx == self.last_index + 1, "gap in the log")
        self._push(command, idx, term)
        self._pending.append(_pack(b"E", idx, term, command))

    def clear(self) -> None:
        """Not used: `reset_to` says where the log begins anew."""
        raise RaftfsError("the journal is never emptied")

    def reset_to(self, index: int, term: int) -> None:
        """A snapshot up to this entry was installed: the log begins there. Durable on return."""
        self._begin_anew(index, term)
        self._pending.append(_pack(b"B", index, term))
        self._begin_segment()
        self._drop_segments(len(self._segments) - 1)

    def deleteEntriesFrom(self, entryFrom: int) -> None:  # noqa: N802, N803
        """Cut the log from a position (not index) on: a conflict with the leader."""
        if entryFrom < len(self._entries):
            index = self._entries[entryFrom][1]
            self._pending.append(_pack(b"T", index, 0))
            self._cut(index)

    def deleteEntriesTo(self, entryTo: int) -> None:  # noqa: N802, N803
        """Forget the entries before a position (not index), and segments that hold only such."""
        if entryTo <= 0:
            return
        self._bytes -= sum(len(e[0]) for e in self._entries[:entryTo])
        del self._entries[:entryTo]
        droppable = 0
        for segment in self._segments[:-1]:
            if segment.last_index >= self.first_index:
                break
            droppable += 1
        self._drop_segments(droppable)

    def _drop_segments(self, count: int) -> None:
        try:
            for segment in self._segments[:count]:
                self._files.unlink(self._path(segment.number))
            if count:
                del self._segments[:count]
                self._files.sync_folder(self._folder)
        except OSError as e:
            raise self._fail(e) from None

    def __getitem__(self, at: Any) -> Any:
        return self._entries[at]

    def __len__(self) -> int:
        return len(self._entries)

    def entries_from(self, index: int, max_bytes: int) -> list[Entry]:
        """Entries from `index` on, at least one if there is one, of about `max_bytes` in all."""
        at, size = index - self.first_index, 0
        found: list[Entry] = []
        while 0 <= at < len(self._entries) and (not found or size < max_bytes):
            found.append(self._entries[at])
            size += len(self._entries[at][0])
            at += 1
        return found

    def term_at(self, index: int) -> int:
        """The term of an entry that is in memory."""
        term: int = self._entries[index - self.first_index][2]
        return term

    def setCurrentTerm(self, term: int, votedForNodeId: str | None) -> None:  # noqa: N802, N803
        """Term and vote, durable on return."""
        vote = votedForNodeId or ""
        if (term, vote) != (self._term, self._vote):
            self._term, self._vote = term, vote
            self._pending.append(_pack(b"V", 0, term, vote.encode()))
            self.sync()

    def getCurrentTerm(self) -> int:  # noqa: N802
        """The term last set."""
        return self._term

    def getVotedForNodeId(self) -> str | None:  # noqa: N802
        """The vote in that term."""
        return self._vote or None

    def setRaftCommitIndex(self, raftCommitIndex: int) -> None:  # noqa: N802, N803
        """Not kept: what is committed is learned from the leader, what is applied from LMDB."""

    def getRaftCommitIndex(self) -> int:  # noqa: N802
        """1: see `setRaftCommitIndex`."""
        return 1

    def onOneSecondTimer(self) -> None:  # noqa: N802
        """Nothing is put off here."""

    def _destroy(self) -> None:
        if self._handle is not None:
            if not self._failed:
                self.sync()
            self._files.close(self._handle)
            self._handle = None


def _blob_at(data: bytes, at: int) -> tuple[int, bytes] | None:
    """Number and payload of the valid blob at a place, else None."""
    if at + _BLOB.size > len(data):
        return None
    magic, number, length, crc = _BLOB.unpack_from(data, at)
    start = at + _BLOB.size
    if magic != _MAGIC or start + length > len(data):
        return None
    payload = data[start : start + length]
    if crc32(payload, crc32(_CRC_PART.pack(number, length))) != crc:
        return None
    return number, payload


def _damaged(path: Path, at: int) -> UserError:
    return UserError(
        f"journal {path} is damaged at byte {at}, before data that was durable: "
        "do not start this replica with it; replace it (raftfs cluster replace)"
    )


def _pack(kind: bytes, index: int, term: int, data: bytes = b"") -> bytes:
    return _RECORD.pack(len(data), kind, index, term) + data


def _records(payload: bytes) -> Iterator[tuple[bytes, int, int, bytes]]:
    at = 0
    while at < len(payload):
        length, kind, index, term = _RECORD.unpack_from(payload, at)
        at += _RECORD.size
        yield kind, index, term, payload[at : at + length]
        at += length
