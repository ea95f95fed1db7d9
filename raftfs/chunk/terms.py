"""Which orders may still take effect: those of the highest term seen, checked at the effect itself.

    with gate.effect(order.term):        # OLD_TERM if a higher one was announced
        ... change copies, report ...

`announce(term, then)` shuts out all lower terms at once, and calls `then` when every effect of a
lower term that was already under way has ended. What takes long (fetching a copy) is done outside
the gate, and enters it only to make the result count.

The highest term is kept on the disks. Not for orders that were under way at a stop (they died with
the process) but for a deposed leader that does not know it yet, say one that was suspended: its
server may have restarted meanwhile, would reconnect to it, and obey a Destroy of a copy that the
new leader counts. So a term is durable before it is acknowledged.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from raftfs.errors import ReplyError, Status

_NEVER = 2**64  # above every term


class TermGate:
    """See the module. Thread-safe."""

    def __init__(self, highest: int) -> None:
        self._lock = threading.Lock()
        self._highest = highest
        self._under_way: Counter[int] = Counter()
        self._waiting: list[tuple[int, Callable[[], None]]] = []

    @property
    def highest(self) -> int:
        """The highest term seen."""
        return self._highest

    def check(self, term: int) -> None:
        """ReplyError OLD_TERM if a higher term is known."""
        if term < self._highest:
            raise ReplyError(Status.OLD_TERM)

    @contextmanager
    def effect(self, term: int) -> Iterator[None]:
        """Around whatever an order of `term` changes. OLD_TERM if a higher one is known."""
        with self._lock:
            self.check(term)
            self._highest = term
            self._under_way[term] += 1
        try:
            yield
        finally:
            with self._lock:
                self._under_way[term] -= 1
                if not self._under_way[term]:
                    del self._under_way[term]
                ready = self._take_ready()
            for then in ready:
                then()

    def announce(self, term: int, then: Callable[[], None]) -> None:
        """Obey nobody below `term` from now on; `then` follows the end of every older effect, in
        whichever thread that happens. OLD_TERM if a higher one is known.
        """
        with self._lock:
            self.check(term)
            self._highest = term
            self._waiting.append((term, then))
            ready = self._take_ready()
        for call in ready:
            call()

    def shut(self) -> None:
        """Obey nobody any more: the server stops."""
        with self._lock:
            self._highest = _NEVER

    def _take_ready(self) -> list[Callable[[], None]]:
        oldest = min(self._under_way, default=None)
        ready = [t for t in self._waiting if oldest is None or t[0] <= oldest]
        self._waiting = [t for t in self._waiting if t not in ready]
        return [then for _, then in ready]
