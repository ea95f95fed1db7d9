"""What happened to chunks lately, as this master saw it, for people who ask why one is as it is.

Nothing decides by it. It is kept in memory only and bounded in all: of the `CHUNKS_MAX` chunks to
which something happened last, the last `INCIDENTS_MAX` incidents, and which copies they lost.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import NamedTuple

CHUNKS_MAX = 10_000
INCIDENTS_MAX = 16
LEFT_MAX = 16
DETAIL_MAX = 300


class Incident(NamedTuple):
    """As `inquiries.Incident` has it; `server` b"": no one server. `at`: ns since the epoch."""

    at: int
    what: str
    server: bytes
    version: int
    detail: str


class Left(NamedTuple):
    """A copy that was there: `why` is damaged, gone or destroyed."""

    version: int
    why: str
    at: int


class _Story:
    def __init__(self) -> None:
        self.incidents: deque[Incident] = deque(maxlen=INCIDENTS_MAX)
        self.left: OrderedDict[bytes, Left] = OrderedDict()


_LOST = ("damaged", "gone", "destroyed")


class Stories:
    """The memory of one master."""

    def __init__(
        self,
        worth: Callable[[int], bool] = lambda chunk: True,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """`worth`: whether anybody will ask for the chunk (one that files own, say)."""
        self._worth = worth
        self._now_ns = now_ns
        self._stories: OrderedDict[int, _Story] = OrderedDict()
        self.since = now_ns()

    def now_ns(self) -> int:
        """The time that incidents get."""
        return self._now_ns()

    def note(
        self, chunk: int, what: str, server: bytes = b"", version: int = 0, detail: str = ""
    ) -> None:
        """Something happened to a chunk (`what` as in `inquiries.Incident`)."""
        if not self._worth(chunk):
            return
        story = self._stories.get(chunk)
        if story is None:
            story = self._stories[chunk] = _Story()
            if len(self._stories) > CHUNKS_MAX:
                self._stories.popitem(last=False)
        self._stories.move_to_end(chunk)
        at = self._now_ns()
        story.incidents.append(Incident(at, what, server, version, detail[:DETAIL_MAX]))
        if what in _LOST:
            story.left[server] = Left(version, what, at)
            if len(story.left) > LEFT_MAX:
                story.left.popitem(last=False)

    def came(self, chunk: int, server: bytes) -> None:
        """The server has a copy (again)."""
        story = self._stories.get(chunk)
        if story is not None:
            story.left.pop(server, None)

    def forget(self, chunk: int) -> None:
        """The chunk is no more."""
        self._stories.pop(chunk, None)

    def incidents(self, chunk: int) -> list[Incident]:
        """What is remembered, oldest first."""
        story = self._stories.get(chunk)
        return list(story.incidents) if story else []

    def left(self, chunk: int) -> dict[bytes, Left]:
        """Server -> the copy that it had."""
        story = self._stories.get(chunk)
        return dict(story.left) if story else {}
