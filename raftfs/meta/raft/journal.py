"""The durable log of one replica: append-only segments, group commit, damage told from torn tails.

All records since the last sync leave as one blob: one write, one fdatasync. The next blob is
written only after that returned, so

    the last blob is incomplete or fails its CRC      torn by a crash, nobody was told: cut
    a bad blob, and a valid later one with a higher   the disk changed what was durable: stop
    number than the bad one's

Segments (`segments.py` has the format) are created in their full size and never changed in place.
Compaction unlinks whole ones. Each begins with the current V, so what an unlinked one said is never
missed. An error of a write or sync is final (`JournalError`): the kernel may have dropped
the dirty pages, so trying again could report a durability that does not exist.

Entries stay in memory until a checkpoint has them (`compact`); behind it a tail stays on the disk
for followers that lag, and is read from there. Behind the tail whole segments are kept for learners
that were away (`keptlog.py`); a start does not read those.

Two ways to make things durable: `sync()` at once, in the event loop; or

    loop      take()          what was added so far is to be written next
    thread    write_taken()   one blob, one fdatasync; the loop goes on
    loop      settle()        `durable` has moved
"""

import threading
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

from pysyncobj.journal import Journal

from raftfs.errors import DiskFailed, RaftfsError, UserError, invariant
from raftfs.meta.raft import keptlog, segments
from raftfs.meta.raft.keptlog import KeptLog, KeptSegment
from raftfs.meta.raft.segments import BLOB_HEAD, RECORD_HEAD, Files, Record
from raftfs.meta.raft.tail import Place, Tail
from raftfs.wire.frame import crc32

SEGMENT_BYTES = 4 << 20

Entry = tuple[bytes, int, int]  # command, index, term: pysyncobj's form


class JournalError(UserError):
    """The journal can no longer be relied on: this replica must stop at once."""


class JournalDiskFailed(DiskFailed, JournalError):
    """It cannot be written."""


class _Batch(NamedTuple):
    """Records that were taken together; `mark` and `last_index` are the journal's at that time."""

    records: list[Record]
    mark: int
    last_index: int


class _Written(NamedTuple):
    """Batches that are durable now, and where their entries lie."""

    records: list[Record]
    places: list[Place | None]
    mark: int
    last_index: int


class DurableJournal(Journal):  # type: ignore[misc]
    """pysyncobj's journal interface over durable segments.

    All methods belong to the event loop, but for `write_taken`, `unlink_before` and `load_kept`,
    which threads may call meanwhile.
    """

    def __init__(
        self,
        folder: Path,
        files: Files | None = None,
        segment_bytes: int = SEGMENT_BYTES,
        checkpointed: int = 0,
    ) -> None:
        """Entries before `checkpointed` are not loaded into memory. UserError for damage."""
        self._folder = folder
        self._files = files or Files()
        self._segment_bytes = segment_bytes
        self._entries: list[Entry] = []
        self._bytes = 0
        self._tail = Tail()
        self.kept = KeptLog()
        self._index_due: bytes | None = None  # to be written before anything is unlinked
        self._term, self._vote = 0, ""
        self._expected: tuple[int, int] | None = None  # a snapshot that is about to be installed
        self._pending: list[Record] = []
        self._taken: deque[_Batch] = deque()
        self._written: deque[_Written] = deque()
        self.mark = 0  # counts what was added
        self.durable = 0  # the mark up to which it is on the disk
        self.durable_index = 0  # the last entry that is on the disk
        self._cuts: list[tuple[int, int]] = []  # mark and index of cuts that are not durable yet
        # What follows is guarded by this lock: a thread may be writing.
        self._disk = threading.Lock()
        self._segments: list[int] = []
        self._first_blobs: dict[int, int] = {}  # of the segments that are not kept ones
        self._blob_number = 0
        self._handle: Any = None
        self._offset = 0
        self._failed = False
        self.syncs = 0
        self._recover(checkpointed)
        with self._disk:
            self._begin_segment()
        self.sync()

    # --- recovery

    def _recover(self, checkpointed: int) -> None:
        try:
            names = self._files.names(self._folder)
            numbers = sorted(int(n[:-4]) for n in names if n.endswith(".seg"))
            if keptlog.FILE_NAME in names:
                self._recover_kept(numbers, checkpointed)
            for number in numbers:
                if number > self.kept.last_segment:
                    path = self._path(number)
                    self._replay(number, path, self._files.read(path), checkpointed)
                if number >= self.kept.first_segment:
                    self._segments.append(number)
        except OSError as e:
            raise UserError(f"journal {self._folder} cannot be read: {e}") from None
        if self.kept and self.oldest_behind_kept not in (0, self.kept.end):
            raise UserError(
                f"journal {self._folder}: the entries from {self.kept.end} on are missing: "
                "do not start this replica with it; replace it (raftfs cluster replace)"
            )
        self.durable_index = self.last_index

    def _recover_kept(self, numbers: list[int], checkpointed: int) -> None:
        """What kept.idx says need not be replayed; what stands before it was to be unlinked."""
        data = self._files.read(self._folder / keptlog.FILE_NAME)
        kept = KeptLog.unpack(data, set(numbers))
        if kept is None:
            return
        kept.cut_to(checkpointed)
        if not kept:
            return
        for number in [n for n in numbers if n < kept.first_segment]:
            self._files.unlink(self._path(number))
        following = kept.last_segment + 1
        if following not in numbers and numbers[-1] > kept.last_segment:
            raise UserError(f"journal {self._path(following)} is missing: replace this master")
        self.kept, self._blob_number = kept, kept.end_blob - 1

    def _replay(self, segment: int, path: Path, data: bytes, checkpointed: int) -> None:
        at = 0
        while (blob := segments.blob_at(data, at)) is not None:
            number, payload = blob
            # A blob that was torn gives its number to the next one written; so a gap in the numbers
            # means that something durable is missing between two blobs.
            if self._blob_number and number != self._blob_number + 1:
                raise _damaged(path, at)
            self._blob_number = number
            self._first_blobs.setdefault(segment, number)
            for record in segments.records(payload, at + BLOB_HEAD):
                self._replay_record(segment, path, record, checkpointed)
            at += BLOB_HEAD + len(payload)
        self._first_blobs.setdefault(segment, self._blob_number + 1)
        found = data.find(segments.MAGIC, at + 1)
        while found >= 0:
            if segments.blob_at(data, found) is not None:
                raise _damaged(path, at)
            found = data.find(segments.MAGIC, found + 1)

    def _replay_record(self, segment: int, path: Path, record: Record, checkpointed: int) -> None:
        kind, index, term, data, offset = record
        if kind == b"V":
            self._term, self._vote = term, data.decode()
        elif kind == b"T":
            self._cut(index)
            self._tail.cut(index)
        elif kind == b"S":
            self._expected = (index, term)
        elif kind == b"B":
            self._begin_anew(index, term)
        elif kind == b"E":
            # The first one behind the kept log may be one that was cut off afterwards.
            gap = self.last_index and index != self.last_index + 1
            if gap or index < self.kept.end:
                raise UserError(f"journal {path}: entry {index} follows {self.last_index}")
            self._tail.append(index, term, Place(segment, offset, len(data), crc32(data)))
            if index < checkpointed:
                self._entries, self._bytes = [], 0  # a base that the checkpoint is beyond
            else:
                self._push(data, index, term)

    # --- segments (the disk lock is held)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:012d}.seg"

    def _begin_segment(self) -> None:
        number = self._segments[-1] + 1 if self._segments else 1
        try:
            if self._handle is not None:
                self._files.close(self._handle)
            self._handle = self._files.create(self._path(number), self._segment_bytes)
            self._offset = 0
            self._segments.append(number)
            self._first_blobs[number] = self._blob_number + 1
            self._files.sync_folder(self._folder)
        except OSError as e:
            raise self._fail(e) from None
        self._write([Record(b"V", 0, self._term, self._vote.encode())])

    def _fail(self, error: OSError) -> JournalError:
        self._failed = True
        return JournalDiskFailed(f"journal {self._folder}", error)

    def _write(self, batch: list[Record]) -> list[Place | None]:
        """One durable blob; gives where its entries lie."""
        invariant(not self._failed, "the journal has failed before")
        places: list[Place | None] = []
        packed = [record.pack() for record in batch]
        size = BLOB_HEAD + sum(map(len, packed))
        if self._offset + size > self._segment_bytes and self._offset:
            self._begin_segment()
        at = self._offset + BLOB_HEAD
        for record, raw in zip(batch, packed, strict=True):
            place = Place(self._segments[-1], at + RECORD_HEAD, len(record.data),
                          crc32(record.data)) if record.kind == b"E" else None  # fmt: skip
            places.append(place)
            at += len(raw)
        blob = segments.pack_blob(self._blob_number + 1, b"".join(packed))
        try:
            self._files.write(self._handle, blob, self._offset)
            self._files.sync(self._handle)
        except OSError as e:
            raise self._fail(e) from None
        self._blob_number += 1
        self._offset += len(blob)
        self.syncs += 1
        return places

    # --- durability

    def take(self) -> bool:
        """What was added so far is to be written next. False if there is nothing to write."""
        if self._pending:
            self._taken.append(_Batch(self._pending, self.mark, self.last_index))
            self._pending = []
        return bool(self._taken)

    def write_taken(self) -> None:
        """Any thread: everything taken becomes durable in one blob. JournalError is final."""
        with self._disk:
            batches = []
            while self._taken:
                batches.append(self._taken.popleft())
            if not batches:
                return
            batch = [record for b in batches for record in b.records]
            places = self._write(batch)
            self._written.append(_Written(batch, places, batches[-1].mark, batches[-1].last_index))

    def settle(self) -> None:
        """Learn what has become durable."""
        while self._written:
            written = self._written.popleft()
            for record, place in zip(written.records, written.places, strict=True):
                if record.kind == b"T":
                    self._tail.cut(record.entry)
                elif place is not None:
                    self._tail.append(record.entry, record.term, place)
            self.durable = written.mark
            self._cuts = [cut for cut in self._cuts if cut[0] > written.mark]
            self.durable_index = min([written.last_index, *(index - 1 for _, index in self._cuts)])

    def sync(self) -> bool:
        """Make everything so far durable, now. False if there was nothing. JournalError is final.
        """
        if not self.take():
            self.settle()
            return False
        self.write_taken()
        self.settle()
        return True

    # --- the log in memory

    @property
    def last_index(self) -> int:
        """Index of the last entry, 0 if there is none."""
        return self._entries[-1][1] if self._entries else self._tail.last

    @property
    def first_index(self) -> int:
        """Index of the first entry in memory."""
        return self._entries[0][1] if self._entries else 0

    @property
    def oldest_index(self) -> int:
        """Index of the first entry that is still there, in memory or on the disk."""
        return self.kept.first or self.oldest_behind_kept

    @property
    def oldest_behind_kept(self) -> int:
        """As `oldest_index`, without what is kept only for learners."""
        if not self._entries or not len(self._tail):
            return self._tail.first if len(self._tail) else self.first_index
        return min(self._tail.first, self.first_index)

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
        self._tail = Tail()
        if self.kept:
            self.kept = KeptLog()
            self._index_due = self.kept.pack()

    def _note(self, kind: bytes, index: int, term: int, data: bytes = b"") -> None:
        self._pending.append(Record(kind, index, term, data))
        self.mark += 1

    def compact(
        self, index: int, keep_entries: int, keep_bytes: int, kept_bytes: int = 0
    ) -> int:
        """A checkpoint has everything up to `index`: keep only that entry and later ones in memory,
        and a bounded tail before it on the disk, and before that whole segments of about
        `kept_bytes` in all. Gives the first segment that is still needed.
        """
        index = min(index, self.last_index)
        self.deleteEntriesTo(index - self.first_index)
        end = min(index, self._tail.last)
        first = max(self._tail.first, end - keep_entries)
        if first < end:
            first = self._tail.start_within(first, end, keep_bytes)
        needed = self._tail.place(first).segment if self._tail.has(first) else 0
        most = kept_bytes // self._segment_bytes
        if most and needed:
            first = self._tail.start_of(needed)
            self._keep_before(needed)
        self._tail.drop_before(first)
        if self.kept.drop_before(self.kept.beyond(most)):
            self._index_due = self.kept.pack()
        return self.kept.first_segment or needed

    def _keep_before(self, needed: int) -> None:
        """The tail's segments before this one become kept ones."""
        begin = self._tail.place(self._tail.first).segment
        if self.kept:
            begin = self.kept.last_segment + 1
        for number in range(begin, needed):
            first, end = self._tail.start_of(number), self._tail.start_of(number + 1)
            segment = KeptSegment(number, first, self._first_blobs.pop(number))
            terms = self._tail.terms(first, end)
            self.kept.add(segment, terms, self._first_blobs[number + 1])
            self._index_due = self.kept.pack()

    def load_kept(self, number: int) -> keptlog.Loaded | None:
        """Any thread: a kept segment; None if it is not kept any more. KeptDamaged."""
        living = self.kept.range_of(number)
        if living is None:
            return None
        try:
            return keptlog.load(self._files, self._path(number), number, *living)
        except OSError as e:
            raise keptlog.KeptDamaged(f"{self._path(number)} cannot be read: {e}") from None

    def forget_kept(self, number: int) -> None:
        """A kept segment is damaged: it and what stands before it goes with the next compaction."""
        if self.kept.drop_before(number + 1):
            self._index_due = self.kept.pack()
        self.kept.wanted = 0

    def unlink_before(self, segment: int) -> None:
        """Any thread: remove segments before this one. JournalError."""
        with self._disk:
            old = [s for s in self._segments[:-1] if s < segment]
            try:
                due, self._index_due = self._index_due, None
                if due is not None:  # before the segments that the old one names are gone
                    self._files.replace(self._folder / keptlog.FILE_NAME, due)
                for number in old:
                    self._files.unlink(self._path(number))
                    self._first_blobs.pop(number, None)
                if old:
                    self._segments = self._segments[len(old) :]
                    self._files.sync_folder(self._folder)
            except OSError as e:
                raise self._fail(e) from None

    # --- pysyncobj's Journal

    def add(self, command: bytes, idx: int, term: int) -> None:
        """Append an entry; durable after the next sync."""
        invariant(not self._entries or idx == self.last_index + 1, "gap in the log")
        self._push(command, idx, term)
        self._note(b"E", idx, term, command)

    def clear(self) -> None:
        """Not used: `reset_to` says where the log begins anew."""
        raise RaftfsError("the journal is never emptied")

    def expect(self, index: int, term: int) -> None:
        """A snapshot up to this entry is about to be installed. Durable on return."""
        self._note(b"S", index, term)
        self.sync()
        self._expected = (index, term)

    def fits(self, index: int, term: int) -> bool:
        """At start: whether a state after entry `index` belongs to this log. Finishes what a stop
        between the installation of a snapshot and `reset_to` left undone.
        """
        if index == 0:
            return self.oldest_index <= 1
        inside = self.oldest_index <= index <= self.last_index
        if inside and self.term_at(index) == term:
            return True
        if self._expected == (index, term):
            self.reset_to(index, term)
            return True
        return False

    def reset_to(self, index: int, term: int) -> None:
        """A snapshot up to this entry was installed: the log begins there. Durable on return."""
        self.sync()
        self._begin_anew(index, term)
        self._expected = None
        with self._disk:
            self._begin_segment()
            self._write([Record(b"B", index, term, b"")])
            last = self._segments[-1]
        self.durable_index = index
        self.unlink_before(last)

    def deleteEntriesFrom(self, entryFrom: int) -> None:  # noqa: N802, N803
        """Cut the log from a position (not index) on: a conflict with the leader."""
        if entryFrom < len(self._entries):
            index = self._entries[entryFrom][1]
            self._cut(index)
            self._note(b"T", index, 0)
            self._cuts.append((self.mark, index))
            self.durable_index = min(self.durable_index, index - 1)

    def deleteEntriesTo(self, entryTo: int) -> None:  # noqa: N802, N803
        """Forget the entries before a position (not index) in memory."""
        if entryTo > 0:
            self._bytes -= sum(len(e[0]) for e in self._entries[:entryTo])
            del self._entries[:entryTo]

    def __getitem__(self, at: Any) -> Any:
        return self._entries[at]

    def __len__(self) -> int:
        return len(self._entries)

    def entries_from(self, index: int, max_bytes: int) -> list[Entry]:
        """Entries from `index` on, at least one if there is one, of about `max_bytes` in all.

        Those before `first_index` are read from the disk. JournalError if they are damaged there.
        None of the kept log while the segment is not in memory: `kept.wanted` says which.
        """
        if self.kept.has(index):
            return self.kept.read(index, max_bytes)
        if index < self.first_index and self._tail.has(index):
            return self._from_disk(index, max_bytes)
        at, size = index - self.first_index, 0
        found: list[Entry] = []
        while 0 <= at < len(self._entries) and (not found or size < max_bytes):
            found.append(self._entries[at])
            size += len(self._entries[at][0])
            at += 1
        return found

    def _from_disk(self, index: int, max_bytes: int) -> list[Entry]:
        """As many as lie behind each other in one segment: one read."""
        begin = self._tail.place(index)
        places = [begin]
        for later in range(index + 1, self.first_index):
            place = self._tail.place(later)
            if place.segment != begin.segment or place.offset - begin.offset > max_bytes:
                break
            places.append(place)
        end = places[-1].offset + places[-1].length
        path = self._path(begin.segment)
        try:
            raw = self._files.read_at(path, begin.offset, end - begin.offset)
        except OSError as e:
            raise JournalError(f"journal {path} cannot be read: {e}") from None
        found: list[Entry] = []
        for number, place in enumerate(places, index):
            start = place.offset - begin.offset
            data = raw[start : start + place.length]
            if crc32(data) != place.crc:
                raise JournalError(f"journal {path} is damaged: entry {number} is not as written")
            found.append((data, number, self._tail.term(number)))
        return found

    def term_at(self, index: int) -> int:
        """The term of an entry that is still there (from `oldest_index` on)."""
        if self.kept.has(index):
            return self.kept.term(index)
        if index < self.first_index:
            return self._tail.term(index)
        term: int = self._entries[index - self.first_index][2]
        return term

    def setCurrentTerm(self, term: int, votedForNodeId: str | None) -> None:  # noqa: N802, N803
        """Term and vote, durable on return."""
        vote = votedForNodeId or ""
        if (term, vote) != (self._term, self._vote):
            self._term, self._vote = term, vote
            self._note(b"V", 0, term, vote.encode())
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


def _damaged(path: Path, at: int) -> UserError:
    return UserError(
        f"journal {path} is damaged at byte {at}, before data that was durable: "
        "do not start this replica with it; replace it (raftfs cluster replace)"
    )
