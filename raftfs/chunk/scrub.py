"""The scrub: every copy is read and checked again and again, so that rot is found before somebody
asks for it, and while there is still a good copy.

A thread for each disk. A cycle visits the disk's copies in the order of their chunks; before it,
the folders are looked through for files that are no copies (`strangers.py`). What is found is told
by the store, which knows what to do with a damaged copy.

The scrub reads `mib_s` MiB a second at most, and stands back while clients use the disk, but never
for longer than `YIELD_MAX_S` before the next MiB: a disk that is always busy is scrubbed, too.

Where a cycle stands is kept on the disk (`scrubstate.py`), so a restart goes on from there.
"""

import threading
import time
from collections.abc import Callable

import structlog

from raftfs.chunk.disk import Disk
from raftfs.chunk.scrubstate import ScrubState
from raftfs.chunk.store import ChunkStore
from raftfs.chunk.strangers import take_in_strangers
from raftfs.const import MIB
from raftfs.errors import ReplyError, Status
from raftfs.wire.messages import DiskStatus, ScrubStatus

log = structlog.get_logger("raftfs.scrub")

DEFAULT_MIB_S = 8.0  # 18 days for 12 TB; a twentieth of what a hard disk gives
MIB_S_MAX = 100_000.0
PAUSE_S = 60.0  # between two cycles at least: a small disk is not read without end
QUIET_S = 0.05  # a disk that no client used for so long is free
YIELD_MAX_S = 0.25
SAVE_EVERY_S = 30.0
CLEAN_EVERY_S = 600.0
_SLICE = MIB
_COPY_COST = 64 * 1024  # bytes that opening a file counts as, for the rate
_STOP_S = 10.0


class Pace:
    """Lets so many bytes a second pass. The rate may be changed at any time; 0 stops."""

    def __init__(self, mib_s: float) -> None:
        self._changed = threading.Condition()
        self._mib_s = mib_s
        self._free_at = time.monotonic()
        self._ended = False

    @property
    def mib_s(self) -> float:
        """The rate now."""
        return self._mib_s

    def set(self, mib_s: float) -> None:
        """Another rate, from now on; whoever waits is told."""
        with self._changed:
            self._mib_s = mib_s
            self._free_at = time.monotonic()
            self._changed.notify_all()

    def end(self) -> None:
        """Nobody waits any more."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return self._ended

    def sleep(self, seconds: float) -> None:
        """A pause, which `end` cuts short."""
        until = time.monotonic() + seconds
        with self._changed:
            while not self._ended and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)

    def spend(self, count: int) -> None:
        """Wait until the rate has room for what was read."""
        with self._changed:
            if self._mib_s:
                self._free_at = max(self._free_at, time.monotonic() - 1.0)
                self._free_at += count / (self._mib_s * MIB)
            while not self._ended:
                left = self._free_at - time.monotonic()
                if self._mib_s and left <= 0:
                    return
                self._changed.wait(left if self._mib_s else None)


class DiskScrub:
    """The scrub of one disk; `run` is its thread."""

    def __init__(self, store: ChunkStore, number: int, mib_s: float) -> None:
        self._store, self._number = store, number
        self.disk = store.disks()[number]
        self.pace = Pace(mib_s)
        self.state = ScrubState(self.disk.path)
        self.damaged = 0  # found since the start
        self._left = 0
        self._visited = 0
        self._room = memoryview(bytearray(_SLICE))

    def status(self) -> ScrubStatus:
        """For the masters."""
        state, seen = self.state, self._visited
        progress = seen / (seen + self._left) if seen + self._left else 0.0
        return ScrubStatus(self.pace.mib_s, int(state.began), progress, int(state.last_began),
                           int(state.last_ended), self.damaged)  # fmt: skip

    def run(self) -> None:
        """Cycle after cycle, until the pace ends."""
        while not self.pace.ended:
            self.pace.spend(0)  # a rate of 0 means: not at all
            self._look_around()
            if self._cycle():
                self.pace.sleep(PAUSE_S)
        self.state.save()

    def _look_around(self) -> None:
        self.damaged += take_in_strangers(self._store, self._number)

    def _cycle(self) -> bool:
        """What is left of the cycle; whether it came to its end."""
        state = self.state
        if not state.began:
            state.begin(time.time())
            self._visited = 0
        chunks = self._store.chunks_on(self._number, state.position)
        saved_at = time.monotonic()
        for at, chunk in enumerate(chunks):
            self._left = len(chunks) - at
            self._check(chunk)
            if self.pace.ended:
                return False
            self._visited += 1
            state.passed(chunk, time.time())
            if time.monotonic() - saved_at > SAVE_EVERY_S:
                state.save()
                saved_at = time.monotonic()
        self._left = 0
        state.end(time.time())
        state.save()
        log.info("scrub cycle ended", disk=str(self.disk.path), copies=self._visited,
                 seconds=round(state.last_ended - state.last_began),
                 damaged=self.damaged)  # fmt: skip
        return True

    def _check(self, chunk: int) -> None:
        first = 0
        while not self.pace.ended:
            self._stand_back()
            try:
                first, read_bytes = self._store.verify(chunk, first, self._room)
            except ReplyError as e:
                self.damaged += e.status in (Status.BAD_CRC, Status.DISK_ERROR)
                if e.status == Status.NO_CHUNK:  # gone: destroyed, or its name has rotted
                    self.damaged += take_in_strangers(self._store, self._number)
                return
            self.pace.spend(max(read_bytes, _COPY_COST))
            if not first:
                return

    def _stand_back(self) -> None:
        """Clients come first."""
        until = time.monotonic() + YIELD_MAX_S
        while not self.pace.ended:
            now = time.monotonic()
            if now >= until or now - self.disk.used_at >= QUIET_S:
                return
            self.pace.sleep(QUIET_S / 2)


class Scrubber:
    """The scrubs of all disks."""

    def __init__(self, store: ChunkStore, mib_s: float = DEFAULT_MIB_S) -> None:
        self._store = store
        self._clean_at = 0.0
        self.disks = [DiskScrub(store, n, mib_s) for n in range(len(store.disks()))]
        self._threads = [
            threading.Thread(target=_loudly(disk.run), name=f"scrub-{n}", daemon=True)
            for n, disk in enumerate(self.disks)
        ]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def set_rate(self, mib_s: float) -> None:
        """MiB a second and disk, from now on; 0: none."""
        log.info("scrub rate set", mib_s=mib_s)
        for disk in self.disks:
            disk.pace.set(mib_s)

    def disk_statuses(self) -> list[DiskStatus]:
        """What the masters are told of the disks."""
        return [self._disk_status(number, scrub) for number, scrub in enumerate(self.disks)]

    def _disk_status(self, number: int, scrub: DiskScrub) -> DiskStatus:
        disk, store = scrub.disk, self._store
        try:
            total, used = disk.space()
        except OSError:
            total = used = 0
        here = str(disk.path)
        damaged = sum(story.disk == here for story in store.damages())
        files, size = store.quarantines()[number].size()
        copies = store.copies_on(number)
        return DiskStatus(here, disk.label["disk"], total, used, copies, _state(disk, copies),
                          damaged, files, size, scrub.status(), disk.health.evidence)  # fmt: skip

    def clean(self) -> None:
        """Let what is old go from the quarantines. Called every second or so by one thread."""
        if time.monotonic() < self._clean_at:
            return
        self._clean_at = time.monotonic() + CLEAN_EVERY_S
        for scrub, quarantine in zip(self.disks, self._store.quarantines(), strict=True):
            try:
                quarantine.drop_old(now=time.time(), disk_bytes=scrub.disk.space()[0])
            except OSError as e:
                log.error("quarantine not cleaned", disk=str(scrub.disk.path), reason=str(e))

    def checked_at(self, chunk: int) -> float:
        """When the chunk's copy was checked last (seconds since the epoch); 0: not yet."""
        return max((d.state.checked_at(chunk) for d in self.disks), default=0.0)

    def stop(self) -> None:
        """End all threads; where they stood is kept."""
        for disk in self.disks:
            disk.pace.end()
        deadline = time.monotonic() + _STOP_S
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))


def _state(disk: Disk, copies: int) -> str:
    if disk.health.evidence:
        return "damaged"
    if disk.leaving:
        return "removing" if copies else "removable"
    return "good" if disk.room() else "full"


def _loudly(run: Callable[[], None]) -> Callable[[], None]:
    def thread() -> None:
        try:
            run()
        except Exception as e:
            log.error("scrub failed", exc_info=e)
            raise

    return thread
