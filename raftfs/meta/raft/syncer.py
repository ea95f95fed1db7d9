"""The thread that makes the journal durable, so that a slow disk does not stop the event loop.

A leader whose loop waits for its disk sends no heartbeats and loses its office; with this thread it
goes on, and a majority of the others may commit without it. Whatever comes in while one sync is
under way goes into the next: group commit without a timer.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable

from raftfs.meta.raft.journal import DurableJournal
from raftfs.meta.raft.loopwatch import Times

_JOIN_S = 10.0  # a disk that does not answer must not keep the process from ending


class Syncer:
    """Runs `write_taken` of one journal. Made and used in the event loop."""

    def __init__(
        self, journal: DurableJournal, done: Callable[[BaseException | None], None]
    ) -> None:
        """`done(error)` is called in the event loop after each sync."""
        self._journal = journal
        self._done = done
        self._loop = asyncio.get_running_loop()
        self._busy = False
        self.times = Times()  # of syncs
        self._go: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="raftfs-journal", daemon=True)
        self._thread.start()

    def kick(self) -> bool:
        """Sync what is pending, unless a sync is under way; it is followed by another. Whether one
        begins now.
        """
        if self._busy or not self._journal.take():
            return False
        self._busy = True
        self._go.put(True)
        return True

    def _run(self) -> None:
        while self._go.get():
            error: BaseException | None = None
            began = time.monotonic()
            try:
                self._journal.write_taken()
                self.times.add(time.monotonic() - began)
            except Exception as e:  # handed over to the loop, which stops the node
                error = e
            try:
                self._loop.call_soon_threadsafe(self._finished, error)
            except RuntimeError:
                return  # the loop has ended

    def _finished(self, error: BaseException | None) -> None:
        self._busy = False
        self._done(error)

    def stop(self) -> None:
        """Wait for the sync that is under way, and end the thread."""
        self._go.put(False)
        self._thread.join(_JOIN_S)
