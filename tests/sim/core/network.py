"""The network between simulated nodes: delay, loss, duplicates, partitions, all from the seed."""

import heapq
import random
from typing import Any

Edge = tuple[str, str]


class Network:
    """Messages between machines by name. Chance is a stream for each pair, so that the order of a
    loop over a set does not matter. Messages may overtake each other.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self.bad = True
        self.cut: set[Edge] = set()
        self.late: set[Edge] = set()  # what is sent there now comes when `deliver_late` says
        self._late: list[tuple[str, str, Any]] = []
        self.lost = self.doubled = 0
        self._streams: dict[Edge, random.Random] = {}
        self._queue: list[tuple[float, str, str, int, Any]] = []
        self._sent = 0

    def send(self, now: float, source: str, target: str, message: Any) -> None:
        """Delay, perhaps lose, perhaps duplicate."""
        edge = (source, target)
        if edge in self.late and edge not in self.cut:
            self._late.append((source, target, message))
            return
        stream = self._streams.get(edge)
        if stream is None:
            stream = self._streams[edge] = random.Random(f"{self._seed}/{source}/{target}")
        copies = 1
        if self.bad:
            luck = stream.random()
            copies = 0 if luck < 0.05 else 2 if luck > 0.95 else 1
            self.lost += copies == 0
            self.doubled += copies == 2
        for _ in range(copies):
            delay = stream.uniform(0.001, 0.03 if self.bad else 0.002)
            self._push(now + delay, source, target, message)

    def _push(self, at: float, source: str, target: str, message: Any) -> None:
        self._sent += 1
        heapq.heappush(self._queue, (at, source, target, self._sent, message))

    def deliver_late(self, now: float) -> None:
        """What was held up arrives, whatever is cut by now."""
        for source, target, message in self._late:
            self.cut.discard((source, target))
            self._push(now, source, target, message)
        self._late.clear()

    def due(self, now: float) -> list[tuple[str, str, Any]]:
        """What arrives now; what a partition swallows does not."""
        found = []
        while self._queue and self._queue[0][0] <= now:
            _, source, target, _, message = heapq.heappop(self._queue)
            if (source, target) not in self.cut:
                found.append((source, target, message))
        return found
