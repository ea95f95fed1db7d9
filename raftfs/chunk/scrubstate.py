"""Where a disk's scrub stands, and when each copy was checked last; kept over restarts.

    .raftfs-scrub    CBOR: when the cycle began, the chunk up to which it came, marks; the same of
                     the cycle before. Lost or damaged, it costs a cycle that begins anew.

A cycle visits chunks in ascending order, so a few hundred marks (chunk, time) say of each copy when
it was visited, exact to a few thousandths of the cycle, without a word for every copy.
"""

import bisect
import os
from pathlib import Path

import cbor2
import structlog

log = structlog.get_logger("raftfs.scrub")

NAME = ".raftfs-scrub"
MARKS_MAX = 512
_SIZE_MAX = 256 * 1024
_FORMAT = 1


class ScrubState:
    """Changed by one thread; others may look at any time."""

    def __init__(self, disk: Path) -> None:
        self._path = disk / NAME
        self.began = 0.0  # of the cycle under way; 0: none
        self.position = 0  # chunks up to here have been visited
        self.last_began = self.last_ended = 0.0  # of the last whole cycle
        self._marks: list[tuple[int, float]] = []  # chunks up to .. were visited by then
        self._last_marks: list[tuple[int, float]] = []
        self._step = 1  # every so many visits leave a mark
        self._since_mark = 0
        self._load()

    def _load(self) -> None:
        try:
            with open(self._path, "rb") as file:
                kept = cbor2.loads(file.read(_SIZE_MAX))
            if kept["format"] != _FORMAT:
                return
            self.began, self.position = float(kept["began"]), int(kept["position"])
            self.last_began, self.last_ended = float(kept["last_began"]), float(kept["last_ended"])
            self._marks = [(int(c), float(t)) for c, t in kept["marks"]]
            self._last_marks = [(int(c), float(t)) for c, t in kept["last_marks"]]
        except FileNotFoundError:
            pass  # the first scrub of this disk
        except (OSError, cbor2.CBORError, ValueError, EOFError, TypeError, KeyError) as e:
            log.warning("scrub begins anew", file=str(self._path), reason=str(e))

    def save(self) -> None:
        """Keep it. An error is told and costs no more than a longer cycle after a restart."""
        kept = {
            "format": _FORMAT, "began": self.began, "position": self.position,
            "last_began": self.last_began, "last_ended": self.last_ended, "marks": self._marks,
            "last_marks": self._last_marks,
        }  # fmt: skip
        new = self._path.with_suffix(".new")
        try:
            new.write_bytes(cbor2.dumps(kept, canonical=True))
            os.replace(new, self._path)
        except OSError as e:
            log.warning("scrub position not kept", file=str(self._path), reason=str(e))

    def begin(self, now: float) -> None:
        """A new cycle."""
        self.began, self.position = now, 0
        self._marks, self._step, self._since_mark = [], 1, 0

    def passed(self, chunk: int, now: float) -> None:
        """The chunk's copy, and all before it, have been visited."""
        self.position = chunk
        self._since_mark += 1
        if self._since_mark < self._step:
            return
        self._since_mark = 0
        marks = [*self._marks, (chunk, now)]
        if len(marks) > MARKS_MAX:
            marks, self._step = marks[1::2], self._step * 2
        self._marks = marks  # a new list: readers keep theirs

    def end(self, now: float) -> None:
        """The cycle visited every copy."""
        self.last_began, self.last_ended = self.began, now
        self._last_marks = [*self._marks, (2**64 - 1, now)]
        self.begin(0.0)

    def checked_at(self, chunk: int) -> float:
        """When a copy of this chunk was visited last, at the latest; 0: not yet."""
        for marks, reached in ((self._marks, self.position), (self._last_marks, 2**64 - 1)):
            at = bisect.bisect_left(marks, chunk, key=lambda mark: mark[0])
            if chunk <= reached and at < len(marks):
                return marks[at][1]
        return 0.0
