"""Where each entry of the log lies on the disk, so that memory need not hold what a checkpoint has.

28 bytes of memory an entry, in arrays: a log of 100,000 entries takes 2.8 MB here, whatever is in
them. Indexes are those of Raft. Not thread-safe.
"""

from array import array
from bisect import bisect_left, bisect_right
from itertools import accumulate
from typing import NamedTuple

from raftfs.errors import invariant


class Place(NamedTuple):
    """An entry on the disk: `length` bytes of command at `offset` of a segment, and their CRC32."""

    segment: int
    offset: int
    length: int
    crc: int


class Tail:
    """The places and terms of consecutive entries."""

    def __init__(self) -> None:
        self.first = 0  # index of the first entry; without meaning while there is none
        self._terms = array("Q")
        self._segments = array("Q")
        self._offsets = array("I")
        self._lengths = array("I")
        self._crcs = array("I")

    def __len__(self) -> int:
        return len(self._terms)

    @property
    def last(self) -> int:
        """Index of the last entry, 0 if there is none."""
        return self.first + len(self._terms) - 1 if self._terms else 0

    def append(self, index: int, term: int, place: Place) -> None:
        """The next entry."""
        if not self._terms:
            self.first = index
        invariant(index == self.first + len(self._terms), "gap in the log on the disk")
        self._terms.append(term)
        self._segments.append(place.segment)
        self._offsets.append(place.offset)
        self._lengths.append(place.length)
        self._crcs.append(place.crc)

    def cut(self, index: int) -> None:
        """Forget entries from `index` on."""
        self._keep(0, max(0, index - self.first))

    def drop_before(self, index: int) -> None:
        """Forget entries before `index`."""
        count = min(max(0, index - self.first), len(self._terms))
        self._keep(count, len(self._terms))
        self.first += count

    def _keep(self, start: int, end: int) -> None:
        for column in (self._terms, self._segments, self._offsets, self._lengths, self._crcs):
            del column[end:]
            del column[:start]

    def has(self, index: int) -> bool:
        """Whether the entry is known here."""
        return bool(self._terms) and self.first <= index <= self.last

    def term(self, index: int) -> int:
        """Term of an entry that is known here."""
        return self._terms[index - self.first]

    def terms(self, first: int, end: int) -> "array[int]":
        """Terms of the entries `first` to `end - 1`, which are known here."""
        return self._terms[first - self.first : end - self.first]

    def place(self, index: int) -> Place:
        """Place of an entry that is known here."""
        at = index - self.first
        return Place(self._segments[at], self._offsets[at], self._lengths[at], self._crcs[at])

    def start_of(self, segment: int) -> int:
        """Index of the first entry that lies in this segment or a later one."""
        return self.first + bisect_left(self._segments, segment)

    def start_within(self, first: int, end: int, most_bytes: int) -> int:
        """From where on the entries before `end` take at most so many bytes; not before `first`."""
        lengths = self._lengths[first - self.first : max(0, end - self.first)]
        return end - bisect_right(list(accumulate(reversed(lengths))), most_bytes)
