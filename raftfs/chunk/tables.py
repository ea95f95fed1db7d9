"""Which copies a chunkserver has, and which of them are in use; opened files are bounded here.

    _index    every copy: chunk -> (version, disk), packed in one integer (a server has millions)
    _active   copies with something in memory: open files, or changes that are not at rest yet
    _opened   those of them that hold a descriptor, least recently used first

Thread-safe. Lock order: a copy's own lock first, then the table's, which is never held during I/O.
"""

import threading
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress

import structlog

from raftfs.chunk.copyfile import Copy
from raftfs.chunk.disk import Disk
from raftfs.chunk.door import FileDoor
from raftfs.wire.messages import CopyId, Damage

log = structlog.get_logger("raftfs.chunkstore")

OPEN_FILES_MAX = 512  # half of the usual limit of 1,024 descriptors; sockets need the rest
ACTIVE_MAX = 8_192  # about 6 KiB each; beyond, who makes another active brings one to rest
IDLE_S = 5.0  # a copy that nobody used for so long is brought to rest
_FLUSH_FROM = 32  # with so many copies to bring to rest, the disk is flushed as a whole first
_CLOSE_S = 30.0  # an orderly stop takes no longer; marks that stay are settled at the next start
_DISK_BITS = 16
_DISK_MASK = (1 << _DISK_BITS) - 1

OnError = Callable[[Copy, OSError], object]


class CopyTable:
    """See the module. `on_error` is told, under the copy's lock, when one cannot come to rest;
    `on_rest` when one did, or is no more.
    """

    def __init__(
        self, disks: list[Disk], door: FileDoor, open_files_max: int, on_error: OnError,
        on_rest: Callable[[Copy], None],
    ) -> None:  # fmt: skip
        self._disks = disks
        self._door = door
        self._open_files_max = open_files_max
        self._on_error = on_error
        self._on_rest = on_rest
        self._lock = threading.Lock()
        self._index: dict[int, int] = {}
        self._active: OrderedDict[int, Copy] = OrderedDict()
        self._opened: OrderedDict[int, Copy] = OrderedDict()
        self._on_disk = [0] * len(disks)  # how many copies each has
        self._damaged: dict[int, Damage] = {}  # copies that do not count, and why

    def __len__(self) -> int:
        return len(self._index)

    def version_of(self, chunk: int) -> int | None:
        """The version of the copy, if there is one."""
        packed = self._index.get(chunk)
        return None if packed is None else packed >> _DISK_BITS

    def place_of(self, chunk: int) -> tuple[int, int] | None:
        """Version and number of the disk, if there is such a copy."""
        packed = self._index.get(chunk)
        return None if packed is None else (packed >> _DISK_BITS, packed & _DISK_MASK)

    def copies(self) -> list[CopyId]:
        """Every copy as it is now, but the damaged ones."""
        with self._lock:
            packed = list(self._index.items())
            damaged = set(self._damaged)
        return [CopyId(c, p >> _DISK_BITS) for c, p in packed if c not in damaged]

    def chunks_on(self, disk: int, after: int) -> "array[int]":
        """The chunks of a disk's copies beyond one, ascending."""
        with self._lock:
            packed = list(self._index.items())
        return array("Q", sorted(c for c, p in packed if p & _DISK_MASK == disk and c > after))

    def count_on(self, disk: int) -> int:
        """How many copies a disk has."""
        return self._on_disk[disk]

    def _set_place(self, chunk: int, version: int, disk: int) -> None:
        self._drop_place(chunk)
        self._index[chunk] = version << _DISK_BITS | disk
        self._on_disk[disk] += 1

    def _drop_place(self, chunk: int) -> None:
        packed = self._index.pop(chunk, None)
        if packed is not None:
            self._on_disk[packed & _DISK_MASK] -= 1

    def damage_of(self, chunk: int) -> Damage | None:
        """Why the copy does not count; None if it does."""
        return self._damaged.get(chunk)

    def damages(self) -> list[Damage]:
        """The stories of all copies that do not count."""
        with self._lock:
            return list(self._damaged.values())

    # --- changes

    def put(self, chunk: int, version: int, disk: int) -> None:
        """The copy is known by this version, on this disk, from now on."""
        with self._lock:
            self._set_place(chunk, version, disk)

    def add(self, copy: Copy, disk: int) -> bool:
        """A copy that is being made, in use by the caller. False if there is one of its chunk."""
        with self._lock:
            if copy.chunk in self._index:
                return False
            copy.users += 1
            self._set_place(copy.chunk, copy.version, disk)
            self._active[copy.chunk] = copy
            return True

    def raised(self, copy: Copy) -> None:
        """The copy's version is another now."""
        with self._lock:
            disk = self._index[copy.chunk] & _DISK_MASK
            self._index[copy.chunk] = copy.version << _DISK_BITS | disk

    def drop(self, copy: Copy) -> None:
        """The copy is no longer ours. Its lock is held."""
        with self._lock:
            self._deactivate(copy)
            self._drop_place(copy.chunk)
            self._damaged.pop(copy.chunk, None)

    def replace(self, copy: Copy, version: int, disk: int) -> None:
        """Another file is the copy from now on. The old one's lock is held."""
        with self._lock:
            self._deactivate(copy)
            self._set_place(copy.chunk, version, disk)
            self._damaged.pop(copy.chunk, None)

    def damage(self, chunk: int, story: Damage) -> bool:
        """The copy does not count from now on. False if it is gone, or did not before."""
        with self._lock:
            if chunk not in self._index or chunk in self._damaged:
                return False
            self._damaged[chunk] = story
            return True

    def undamage(self, chunk: int) -> None:
        """The copy counts again."""
        with self._lock:
            self._damaged.pop(chunk, None)

    def _deactivate(self, copy: Copy) -> None:
        copy.gone = True
        self._active.pop(copy.chunk, None)
        self._opened.pop(copy.chunk, None)
        self._on_rest(copy)

    # --- use

    def enter(self, chunk: int) -> Copy | None:
        """The copy, in use by the caller until `leave`. None if there is none."""
        with self._lock:
            copy = self._active.get(chunk)
            if copy is None:
                packed = self._index.get(chunk)
                if packed is None:
                    return None
                disk = self._disks[packed & _DISK_MASK]
                copy = self._active[chunk] = Copy(disk, self._door, chunk, packed >> _DISK_BITS)
            copy.users += 1
            return copy

    def is_active(self, chunk: int) -> bool:
        """Whether something of it is in memory: somebody used it just now."""
        return chunk in self._active

    def put_down(self, copy: Copy) -> None:
        """As `leave`, for one who came without a client: nothing of it stays in memory."""
        with self._lock:
            copy.users -= 1
        if not copy.users and not copy.gone and not self._rest(copy) and copy.is_open:
            with self._lock:  # somebody has come, or it cannot rest
                self._opened[copy.chunk] = copy

    def leave(self, copy: Copy, *, is_client: bool = True) -> None:
        """The caller is done with it (and holds its lock no more). Whoever serves no client does
        not put off its coming to rest.
        """
        evicted = None
        with self._lock:
            copy.users -= 1
            if is_client:
                copy.used_at = time.monotonic()
            if copy.gone:
                return
            if is_client:
                self._active.move_to_end(copy.chunk)
            if copy.is_open:
                self._opened[copy.chunk] = copy
                self._opened.move_to_end(copy.chunk)
                if len(self._opened) > self._open_files_max:
                    evicted = self._opened.popitem(last=False)[1]
            crowded = len(self._active) > ACTIVE_MAX
        if evicted is not None and evicted.lock.acquire(blocking=False):
            # (else somebody uses it just now, and puts it back when done)
            try:
                evicted.close()
            finally:
                evicted.lock.release()
        if crowded:
            self._rest_oldest()

    # --- coming to rest

    def rest_idle(self, idle_s: float = IDLE_S) -> int:
        """Bring copies to rest that nobody used for so long, and the oldest if there are many;
        gives their number. Called regularly by one thread.
        """
        limit = time.monotonic() - idle_s
        with self._lock:
            extra = len(self._active) - ACTIVE_MAX // 2
            idle = [
                copy
                for at, copy in enumerate(self._active.values())
                if not copy.users and (copy.used_at <= limit or at < extra)
            ]
        self._flush_disks([c for c in idle if not c.at_rest])
        return sum(self._rest(c) for c in idle)

    def rest_all(self) -> None:
        """For an orderly stop: everything on the disks, no marks left; in at most `_CLOSE_S`."""
        deadline = time.monotonic() + _CLOSE_S
        with self._lock:
            copies = list(self._active.values())
        self._flush_disks([c for c in copies if not c.at_rest])
        left = sum(time.monotonic() > deadline or not self._rest(c) for c in copies)
        if left:
            log.warning("copies left with marks", number=left)

    def _flush_disks(self, copies: list[Copy]) -> None:
        if len(copies) < _FLUSH_FROM:
            return
        for disk in {c.disk.path: c.disk for c in copies}.values():
            with suppress(OSError):  # a hint only
                self._door.flush_disk(disk.path)

    def _rest(self, copy: Copy) -> bool:
        if not copy.lock.acquire(blocking=False):
            return False
        try:
            if copy.gone or copy.lost_sync:
                return False
            try:
                copy.retire()
            except OSError as e:
                self._on_error(copy, e)
                return False
            with self._lock:
                if copy.users:
                    return False
                self._deactivate(copy)  # nobody holds a reference: the next user makes another
            copy.close()
            return True
        finally:
            copy.lock.release()

    def _rest_oldest(self) -> None:
        with self._lock:
            oldest = next((c for c in self._active.values() if not c.users), None)
        if oldest is not None:
            self._rest(oldest)
