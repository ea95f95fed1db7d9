"""Old segments of the journal that stay on the disk for learners which were away.

All their entries are in a checkpoint: they are committed, nothing will ever cut them off, and this
replica does not need them itself. So memory holds only where each segment begins, and the runs of
terms. A segment that is asked for is read and checked whole, in a thread (`load`); the last few
stay in memory. One that is damaged costs the history up to there, never the replica: a learner that
needed it gets a snapshot instead, and marks a hole.

The file `kept.idx` tells the next start what is kept, so that it need not read a gigabyte:

    kept.idx := magic 8 | crc u32 over the rest | MessagePack of `_Index`

It is replaced before segments are unlinked. If it is missing or unreadable, everything is replayed.
"""

from array import array
from bisect import bisect_right
from pathlib import Path
from typing import NamedTuple

import msgspec

from raftfs.errors import RaftfsError, invariant
from raftfs.meta.raft import segments
from raftfs.meta.raft.segments import BLOB_HEAD, Files
from raftfs.wire.frame import crc32

FILE_NAME = "kept.idx"
_MAGIC = b"RFSKEPT\x01"
_LOADED_MAX = 3  # segments in memory: for so many learners that are at different places


class KeptDamaged(RaftfsError):
    """A kept segment is not as it was written."""


class KeptSegment(NamedTuple):
    """`first`: its first living entry (the last one stands before the next segment's first);
    `blob`: the number of its first blob.
    """

    number: int
    first: int
    blob: int


class _Index(NamedTuple):
    """What `kept.idx` says. `end` and `end_blob`: the entry and the blob that follow."""

    segments: list[KeptSegment]
    end: int
    end_blob: int
    terms: list[tuple[int, int]]  # (first index, term), rising


class Loaded(NamedTuple):
    """A segment in memory, and where its living entries lie."""

    number: int
    first: int
    data: bytes
    offsets: "array[int]"
    lengths: "array[int]"
    terms: "array[int]"

    def entries(self, index: int, max_bytes: int) -> list[tuple[bytes, int, int]]:
        """From `index` on, at least one, of about `max_bytes` in all."""
        found, size = [], 0
        for at in range(index - self.first, len(self.offsets)):
            start, length = self.offsets[at], self.lengths[at]
            found.append((self.data[start : start + length], self.first + at, self.terms[at]))
            size += length
            if size >= max_bytes:
                break
        return found


def load(files: Files, path: Path, number: int, first: int, end: int) -> Loaded:
    """Any thread: a segment whose living entries are `first` to `end - 1`. KeptDamaged, OSError.

    What was cut off within the log's life stands before what took its place, so of several entries
    with an index the last one lives; the ones outside of the range were cut off later.
    """
    data = files.read(path)
    offsets, lengths, terms = array("I"), array("I"), array("Q")
    at = 0
    while (blob := segments.blob_at(data, at)) is not None:
        for kind, index, term, content, offset in segments.records(blob[1], at + BLOB_HEAD):
            position = index - first
            if kind != b"E" or index >= end or not 0 <= position <= len(offsets):
                continue
            for column in (offsets, lengths, terms):
                del column[position:]
            offsets.append(offset)
            lengths.append(len(content))
            terms.append(term)
        at += BLOB_HEAD + len(blob[1])
    if len(offsets) != end - first:
        raise KeptDamaged(f"{path}: byte {at}: entries {first + len(offsets)} to {end - 1} lost")
    return Loaded(number, first, data, offsets, lengths, terms)


class KeptLog:
    """What is kept. Belongs to the event loop."""

    def __init__(self) -> None:
        self._segments: list[KeptSegment] = []
        self._terms: list[tuple[int, int]] = []
        self._loaded: dict[int, Loaded] = {}  # the least recently used first
        self.end = 0  # the index after the last one; without meaning while nothing is kept
        self.end_blob = 0
        self.wanted = 0  # the segment that somebody asked for and that is not in memory

    def __len__(self) -> int:
        return len(self._segments)

    @property
    def first(self) -> int:
        """Index of the first entry, 0 if there is none."""
        return self._segments[0].first if self._segments else 0

    @property
    def first_segment(self) -> int:
        """Number of the first segment, 0 if there is none."""
        return self._segments[0].number if self._segments else 0

    @property
    def last_segment(self) -> int:
        """Number of the last segment, 0 if there is none."""
        return self._segments[-1].number if self._segments else 0

    def has(self, index: int) -> bool:
        """Whether the entry is kept here."""
        return bool(self._segments) and self.first <= index < self.end

    def term(self, index: int) -> int:
        """Term of an entry that is kept here."""
        return self._terms[bisect_right(self._terms, (index, 2**64)) - 1][1]

    # --- what is kept

    def add(self, segment: KeptSegment, terms: "array[int]", end_blob: int) -> None:
        """The next segment, with the terms of its living entries."""
        invariant(not self._segments or segment.first == self.end, "gap in the kept log")
        invariant(segment.number == self.last_segment + 1 or not self._segments, "kept: gap")
        self._segments.append(segment)
        at = 0
        while at < len(terms):  # terms never fall
            if not self._terms or self._terms[-1][1] != terms[at]:
                self._terms.append((segment.first + at, terms[at]))
            at = bisect_right(terms, terms[at], at)
        self.end, self.end_blob = segment.first + len(terms), end_blob

    def drop_before(self, number: int) -> bool:
        """Forget segments before this one. False if there is none."""
        dropped = [s for s in self._segments if s.number < number]
        self._segments = self._segments[len(dropped) :]
        for segment in dropped:
            self._loaded.pop(segment.number, None)
        first = self.first
        while len(self._terms) > 1 and self._terms[1][0] <= first:
            del self._terms[0]
        if not self._segments:
            self._terms.clear()
        return bool(dropped)

    def cut_to(self, index: int) -> None:
        """At start: keep only segments that end before an entry, which others will bring back."""
        while self._segments and self.end > index:
            last = self._segments.pop()
            self.end, self.end_blob = last.first, last.blob
        self._terms = [t for t in self._terms if self._segments and t[0] < self.end]

    def beyond(self, max_segments: int) -> int:
        """The first segment that may stay if there may be so many."""
        at = max(0, len(self._segments) - max_segments)
        return self._segments[at].number if at < len(self._segments) else self.last_segment + 1

    # --- reading

    def at_hand(self, index: int) -> bool:
        """Whether the entry can be read without waiting for the disk."""
        return not self.has(index) or self._segment_of(index).number in self._loaded

    def read(self, index: int, max_bytes: int) -> list[tuple[bytes, int, int]]:
        """Entries from `index` on; none if their segment must be loaded first (`wanted`)."""
        segment = self._segment_of(index)
        loaded = self._loaded.pop(segment.number, None)
        if loaded is None:
            self.wanted = segment.number
            return []
        self._loaded[segment.number] = loaded
        return loaded.entries(index, max_bytes)

    def _segment_of(self, index: int) -> KeptSegment:
        return self._segments[bisect_right(self._segments, index, key=lambda s: s.first) - 1]

    def range_of(self, number: int) -> tuple[int, int] | None:
        """First living entry of a segment and the one after its last; None: it is not kept."""
        at = number - self.first_segment
        if not self._segments or not 0 <= at < len(self._segments):
            return None
        following = self._segments[at + 1].first if at + 1 < len(self._segments) else self.end
        return self._segments[at].first, following

    def adopt(self, loaded: Loaded) -> None:
        """The wanted segment is in memory now."""
        self.wanted = 0
        if self.range_of(loaded.number) is not None:
            self._loaded[loaded.number] = loaded
        while len(self._loaded) > _LOADED_MAX:
            del self._loaded[next(iter(self._loaded))]

    # --- the file

    def pack(self) -> bytes:
        """As it is written to `kept.idx`."""
        index = _Index(self._segments, self.end, self.end_blob, self._terms)
        raw = msgspec.msgpack.encode(index)
        return _MAGIC + crc32(raw).to_bytes(4, "big") + raw

    @classmethod
    def unpack(cls, data: bytes, there: set[int]) -> "KeptLog | None":
        """What the file says, less what is not there any more; None if it is unreadable."""
        head = len(_MAGIC) + 4
        if data[:head] != _MAGIC + crc32(data[head:]).to_bytes(4, "big"):
            return None
        try:
            index = msgspec.msgpack.decode(data[head:], type=_Index)
        except msgspec.MsgspecError:
            return None
        kept = cls()
        kept._segments, kept._terms = index.segments, index.terms
        kept.end, kept.end_blob = index.end, index.end_blob
        missing = [s.number for s in kept._segments if s.number not in there]
        if missing:
            kept.drop_before(missing[-1] + 1)
        return kept
