"""How late the event loop is: what a heartbeat, a vote or a client has had to wait for it."""

from collections import deque

_KEPT = 1_000


class LoopWatch:
    """Told of each turn of a timer; remembers the longest delays. The timer's period is what a
    stall may be longer than what is seen of it.
    """

    def __init__(self) -> None:
        self.longest_s = 0.0  # since the start
        self.checkpoint_longest_s = 0.0  # while a checkpoint was made, since the start
        self.last_checkpoint_s = 0.0  # while the last one was made
        self._in_checkpoint = False

    def turned(self, late_s: float) -> None:
        """The timer came so much later than it should have."""
        self.longest_s = max(self.longest_s, late_s)
        if self._in_checkpoint:
            self.last_checkpoint_s = max(self.last_checkpoint_s, late_s)
            self.checkpoint_longest_s = max(self.checkpoint_longest_s, late_s)

    def checkpoint(self, *, begins: bool) -> None:
        """One begins or has ended."""
        self._in_checkpoint = begins
        if begins:
            self.last_checkpoint_s = 0.0


class Times:
    """The last 1,000 durations of something. Written by one thread, read by another."""

    def __init__(self) -> None:
        self.count = 0
        self._last: deque[float] = deque(maxlen=_KEPT)

    def add(self, seconds: float) -> None:
        """One more."""
        self.count += 1
        self._last.append(seconds)

    def percentile(self, percent: int) -> float:
        """Of those that are kept; 0.0 if there is none."""
        found = sorted(self._last.copy())
        return found[min(len(found) - 1, len(found) * percent // 100)] if found else 0.0
