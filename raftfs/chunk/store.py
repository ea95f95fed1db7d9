"""All copies of a chunkserver over its disks, and everything that is done with them.

Thread-safe: a copy's own lock serialises what happens to its file (see also `tables.py`).

What changes a copy's existence or version is reported (`report`) while the copy's lock is held, so
that reports of one chunk are in the order of its changes.

A copy that turns out damaged leaves the store at once: its file is moved aside (`.damaged` is
appended to the name) and the masters are told.

A copy is deleted by a Destroy order, or when a newer one of its chunk, just verified, has taken
its place; by nothing else (an empty file, of a stop while it was made, is no copy).
"""

import errno
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog

from raftfs.chunk import layout
from raftfs.chunk.chunkfile import DamageError, UnfinishedError
from raftfs.chunk.copyfile import Copy
from raftfs.chunk.disk import Disk
from raftfs.chunk.door import FileDoor
from raftfs.chunk.tables import IDLE_S, OPEN_FILES_MAX, CopyTable
from raftfs.chunk.unrest import Unrest, boot_id
from raftfs.const import BLOCK_SIZE, CHUNK_SIZE, DATA_PAYLOAD_MAX
from raftfs.errors import ReplyError, Status, UserError
from raftfs.wire.frame import piece_crcs
from raftfs.wire.messages import CopyId

log = structlog.get_logger("raftfs.chunkstore")

REFRESH_S = 5.0  # so often, at most, the unrest files are brought up to date
READ_BUFFER = DATA_PAYLOAD_MAX + 2 * BLOCK_SIZE
# Errors that say nothing of the disk's health.
_NO_FAULT = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR}

# made, gone, damaged: what the masters are told. Called by any thread; must not block.
Report = Callable[[list[CopyId], list[CopyId], list[CopyId]], None]


class ChunkStore:
    """The copies on this server's disks."""

    def __init__(
        self,
        disks: list[Disk],
        door: FileDoor | None = None,
        *,
        open_files_max: int = OPEN_FILES_MAX,
        draw: Callable[[], float] = random.random,
        boot: str = "",
    ) -> None:
        """UserError if the disks disagree on server or cluster. `boot`: which one of the machine
        this is, if it is not to be asked.
        """
        self.door = door or FileDoor()
        self.report: Report = lambda made, gone, damaged: None
        self._disks = disks
        self._draw = draw
        self._join_lock = threading.Lock()
        self._unrest = {d.path: Unrest(d.path, self.door, boot or boot_id()) for d in disks}
        self._refreshed_at = 0.0
        self._table = CopyTable(disks, self.door, open_files_max, self._io_failed, self._rested)
        self.server: bytes = self._agree("server") or uuid.uuid4().bytes
        self.cluster: bytes = self._agree("cluster")
        for number, disk in enumerate(disks):
            if disk.label["server"] != self.server or disk.label["cluster"] != self.cluster:
                disk.claim(self.server, self.cluster)
            copies = list(disk.copies())
            for chunk, version in copies:
                self._found(chunk, version, number)
            self._unrest[disk.path].begin(chunk for chunk, _ in copies)

    def _agree(self, what: str) -> bytes:
        found = {d.label[what]: d.path for d in self._disks if d.label[what]}
        if len(found) > 1:
            paths = " and ".join(str(p) for p in found.values())
            raise UserError(
                f"disk folders {paths} belong to different {what}s: give the folders of one only"
            )
        return next(iter(found), b"")

    def _found(self, chunk: int, version: int, number: int) -> None:
        """At start. Two files of one chunk are what a stop left of a replication over an older
        copy: the newer was whole before it got its name, so the older is superseded.
        """
        known = self._table.place_of(chunk)
        places = sorted([(version, number), *([known] if known else [])])
        self._table.put(chunk, *places[-1])
        if known:
            old_version, old_disk = places[0]
            path = self._disks[old_disk].path / layout.file_name(chunk, old_version)
            log.warning("superseded copy moved aside", file=str(path), kept=places[1][0])
            self._move_aside(path)

    # --- the server's identity

    def join(self, cluster: bytes) -> None:
        """The server belongs to this cluster from now on. UserError if it belongs to another."""
        with self._join_lock:
            if self.cluster == cluster:
                return
            if self.cluster:
                raise UserError(
                    f"the disks belong to cluster {self.cluster.hex()}, the master to "
                    f"{cluster.hex()}: check -H, or give empty disk folders"
                )
            for disk in self._disks:
                disk.claim(self.server, cluster)
            self.cluster = cluster

    @property
    def term(self) -> int:
        """The highest term that was remembered."""
        return max((d.label["term"] for d in self._disks), default=0)

    def remember_term(self, term: int) -> None:
        """Durable, on every disk that works, when this returns. OSError if on none."""
        errors: list[OSError] = []
        for disk in self._disks:
            try:
                disk.remember_term(term)
            except OSError as e:
                log.error("term not written", disk=str(disk.path), reason=str(e))
                errors.append(e)
        if errors and len(errors) == len(self._disks):
            raise errors[0]

    # --- overview

    def copies(self) -> list[CopyId]:
        """Every usable copy as it is now."""
        doubtful = set[int]().union(*(u.doubtful() for u in self._unrest.values()))
        if not doubtful:
            return self._table.copies()
        return [CopyId(c.chunk, c.version, c.chunk in doubtful) for c in self._table.copies()]

    def is_doubtful(self, chunk: int) -> bool:
        """The copy may lack writes that a power cut took, and the leader has not decided yet."""
        return any(u.is_doubtful(chunk) for u in self._unrest.values())

    def version_of(self, chunk: int) -> int | None:
        """The version of the copy, if there is one."""
        return self._table.version_of(chunk)

    def __len__(self) -> int:
        return len(self._table)

    def space(self) -> tuple[int, int]:
        """Bytes in all and used, over all disks; folders on one file system count once."""
        total = used = 0
        for disk in {d.device: d for d in self._disks}.values():
            try:
                of_disk = disk.space()
            except OSError as e:
                log.error("disk does not answer", disk=str(disk.path), reason=str(e))
                continue
            total, used = total + of_disk[0], used + of_disk[1]
        return total, used

    # --- having a copy in hand

    @contextmanager
    def _held(self, chunk: int, version: int | None, *, create: bool = False) -> Iterator[Copy]:
        """The open copy under its lock.

        ReplyError: NO_CHUNK, WRONG_VERSION (also while the copy is doubtful, except for the leader,
        who asks for no version), BAD_CRC (and the copy is moved aside), ENOSPC, DISK_ERROR.
        """
        copy = self._table.enter(chunk)
        if copy is None:
            if not create or version is None:
                raise ReplyError(Status.NO_CHUNK)
            copy = self._create(chunk, version)
        try:
            with copy.lock:
                if copy.gone:
                    raise ReplyError(Status.NO_CHUNK)
                doubtful = self._unrest[copy.disk.path].is_doubtful(chunk)
                if version is not None and (doubtful or copy.version != version):
                    raise ReplyError(Status.WRONG_VERSION)
                try:
                    copy.open(self.cluster)
                    yield copy
                except DamageError as e:
                    self._quarantine(copy, str(e))
                    raise ReplyError(Status.BAD_CRC) from None
                except UnfinishedError:
                    self._forget_unfinished(copy)
                    raise ReplyError(Status.NO_CHUNK) from None
                except FileNotFoundError:
                    self._quarantine(copy, "the file is missing")
                    raise ReplyError(Status.NO_CHUNK) from None
                except OSError as e:
                    raise self._io_failed(copy, e) from e
        finally:
            self._table.leave(copy)

    def _create(self, chunk: int, version: int) -> Copy:
        """A new copy, in use by the caller."""
        _check_ids(chunk, version)
        number = self._choose_disk(BLOCK_SIZE)
        copy = Copy(self._disks[number], self.door, chunk, version)
        with copy.lock:
            if not self._table.add(copy, number):
                known = self._table.enter(chunk)  # another thread was faster
                if known is None:
                    raise ReplyError(Status.NO_CHUNK)
                return known
            try:
                self._unrest[copy.disk.path].enter(chunk)
                copy.create(self.cluster or bytes(16))
            except OSError as e:
                self._table.drop(copy)
                with suppress(OSError):
                    self.door.unlink(copy.path)
                raise self._io_failed(copy, e) from e
            self.report([CopyId(chunk, version)], [], [])
        return copy

    def _choose_disk(self, need: int) -> int:
        """A disk with room, more probably the more room it has. ReplyError ENOSPC."""
        rooms = [d.room() for d in self._disks]
        rooms = [r if r >= need else 0 for r in rooms]
        point = self._draw() * sum(rooms)
        for number, room in enumerate(rooms):
            point -= room
            if room and point <= 0:
                return number
        raise ReplyError(errno.ENOSPC)

    # --- when something is wrong

    def _quarantine(self, copy: Copy, reason: str) -> None:
        log.error("copy damaged", chunk=f"{copy.chunk:016X}", version=copy.version,
                  server=self.server.hex(), disk=str(copy.disk.path), reason=reason)  # fmt: skip
        self._table.drop(copy)
        self._decided(copy.chunk)
        copy.abandon()
        self._move_aside(copy.path)
        self.report([], [], [CopyId(copy.chunk, copy.version)])

    def _forget_unfinished(self, copy: Copy) -> None:
        log.info("unfinished copy removed", chunk=f"{copy.chunk:016X}", version=copy.version)
        self._table.drop(copy)
        self._decided(copy.chunk)
        with suppress(OSError):  # found again at the next start
            self.door.unlink(copy.path)
            self.door.sync_folder(copy.path.parent)
        self.report([], [CopyId(copy.chunk, copy.version)], [])

    def _move_aside(self, path: Path) -> None:
        """Keep a file that is not to be used, under another name, for the administrator."""
        try:
            self.door.rename(path, path.with_name(path.name + layout.DAMAGED_SUFFIX))
            self.door.sync_folder(path.parent)
        except OSError as e:
            log.error("damaged copy not moved aside", file=str(path), reason=str(e))

    def _io_failed(self, copy: Copy, error: OSError) -> ReplyError:
        """What the caller is told. The copy's memory is dropped, as by a stop."""
        copy.abandon()
        if error.errno in _NO_FAULT:
            log.error("disk refuses", chunk=f"{copy.chunk:016X}", disk=str(copy.disk.path),
                      reason=str(error))  # fmt: skip
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            return ReplyError(errno.ENOSPC if full else Status.DISK_ERROR)
        log.error("disk error", chunk=f"{copy.chunk:016X}", version=copy.version,
                  server=self.server.hex(), disk=str(copy.disk.path),
                  reason=str(error))  # fmt: skip
        if self._table.fail(copy):
            self.report([], [], [CopyId(copy.chunk, copy.version)])
        return ReplyError(Status.DISK_ERROR)

    # --- data

    def write(
        self, chunk: int, version: int, token: int, create: bool, offset: int, data: memoryview,
        crcs: list[int],
    ) -> None:  # fmt: skip
        """Write a range under a grant's token. BAD_CRC, and nothing is touched, if `crcs` differ.

        ReplyErrors of `_held`; WRONG_VERSION if a higher token was seen.
        """
        _check_range(offset, len(data), token, DATA_PAYLOAD_MAX)
        if piece_crcs(offset, data) != crcs:
            log.warning("data arrived damaged", chunk=f"{chunk:016X}", offset=offset)
            raise ReplyError(Status.BAD_CRC)
        with self._held(chunk, version, create=create) as copy:
            self._stir(copy)
            copy.write(offset, data, crcs, token)

    def zero(
        self, chunk: int, version: int, token: int, create: bool, offset: int, length: int
    ) -> None:
        """Make a range read as zeros, under a grant's token."""
        _check_range(offset, length, token, CHUNK_SIZE)
        with self._held(chunk, version, create=create) as copy:
            self._stir(copy)
            copy.zero(offset, length, token)

    def _stir(self, copy: Copy) -> None:
        """A copy at rest will be changed. OSError."""
        if copy.at_rest:
            self._unrest[copy.disk.path].enter(copy.chunk)

    def _rested(self, copy: Copy) -> None:
        self._unrest[copy.disk.path].rested(copy.chunk)

    def _decided(self, chunk: int) -> None:
        """The leader raised, replaced or destroyed the copy, or it is damaged: no doubt is left."""
        for unrest in self._unrest.values():
            unrest.sure(chunk)

    def sync(self, chunk: int, version: int) -> None:
        """The copy and its name are on the disk when this returns."""
        with self._held(chunk, version) as copy:
            copy.sync()

    def read(
        self, chunk: int, version: int, offset: int, length: int, into: memoryview | None = None
    ) -> tuple[memoryview, list[int]]:
        """A range and the CRCs of its pieces. `into`: room of READ_BUFFER bytes to read into."""
        _check_range(offset, length, 0, DATA_PAYLOAD_MAX)
        if into is None:
            first, last = layout.block_span(offset, length)
            into = memoryview(bytearray((last - first + 1) * BLOCK_SIZE))
        with self._held(chunk, version) as copy:
            return copy.read(offset, length, into)

    def block_list(self, chunk: int, version: int) -> bytes:
        """CRC table and bitmap of the copy, as `ListBlocks` asks."""
        with self._held(chunk, version) as copy:
            return copy.block_list()

    # --- orders

    def raise_version(self, chunk: int, version: int, token: int) -> None:
        """Become a higher version, durably; a repeated order is fine. WRONG_VERSION if it is higher
        already.
        """
        _check_ids(chunk, version)
        with self._held(chunk, None) as copy:
            old = copy.version
            if old > version:
                raise ReplyError(Status.WRONG_VERSION)
            if copy.lost_sync:
                raise ReplyError(Status.DISK_ERROR)
            if old == version:
                copy.fence(token)
                self._decided(chunk)
                return
            try:
                copy.raise_version(version, token)
            finally:
                if copy.version != old:  # the name is the truth, whatever failed after it
                    self._table.raised(copy)
                    self._decided(chunk)
                    self.report([CopyId(chunk, version)], [CopyId(chunk, old)], [])

    def destroy(self, chunk: int, version: int) -> None:
        """Destroy the copy at exactly this version (0: any). Absent counts as done.

        Durable when this returns: a copy that came back after a power cut could be at the committed
        version and lack later writes. DISK_ERROR if it cannot be had; then the order is repeated.
        """
        copy = self._table.enter(chunk)
        if copy is None:
            return
        try:
            with copy.lock:
                if copy.gone or version not in (0, copy.version):
                    return
                copy.abandon()
                try:
                    self.door.unlink(copy.path)
                    self.door.sync_folder(copy.path.parent)
                except OSError as e:
                    raise self._io_failed(copy, e) from e
                self._table.drop(copy)
                self._decided(chunk)
                self.report([], [CopyId(chunk, copy.version)], [])
        finally:
            self._table.leave(copy)

    def place_for(self, chunk: int, version: int) -> Disk:
        """A disk with room for a whole new copy. ReplyError ENOSPC."""
        _check_ids(chunk, version)
        return self._disks[self._choose_disk(CHUNK_SIZE)]

    def adopt(self, chunk: int, version: int, disk: Disk, part: Path) -> None:
        """A replicated copy, whole and durable under the name `part`, becomes one of ours.

        An older copy of the chunk is superseded by it: whatever it had, the newer has.
        WRONG_VERSION if there is one at this version or a newer one; BUSY; OSError.
        """
        number = self._disks.index(disk)
        new = Copy(disk, self.door, chunk, version)
        old = self._table.enter(chunk)
        try:
            with (old or new).lock, new.lock:
                if old is None:
                    if not self._table.add(new, number):
                        raise ReplyError(Status.BUSY)
                    try:
                        self._install(part, new.path)
                    except OSError:
                        self._table.drop(new)
                        raise
                    finally:
                        self._table.leave(new)
                    self._decided(chunk)
                    self.report([CopyId(chunk, version)], [], [])
                    return
                if old.gone:
                    raise ReplyError(Status.BUSY)
                if old.version >= version:
                    raise ReplyError(Status.WRONG_VERSION)
                self._install(part, new.path)
                self._supersede(old, version, number)
        finally:
            if old is not None:
                self._table.leave(old)

    def _install(self, part: Path, path: Path) -> None:
        self.door.rename(part, path)
        self.door.sync_folder(path.parent)

    def _supersede(self, old: Copy, version: int, number: int) -> None:
        old.abandon()
        self._table.replace(old, version, number)
        self._decided(old.chunk)
        try:
            self.door.unlink(old.path)
            self.door.sync_folder(old.path.parent)
        except OSError as e:  # found, and moved aside, at the next start
            log.error("superseded copy not removed", file=str(old.path), reason=str(e))
        self.report([CopyId(old.chunk, version)], [CopyId(old.chunk, old.version)], [])

    # --- housekeeping

    def rest_idle(self, idle_s: float = IDLE_S) -> int:
        """Bring copies to rest that nobody used for so long. Called regularly by one thread."""
        rested = self._table.rest_idle(idle_s)
        if time.monotonic() - self._refreshed_at > REFRESH_S:
            self._refreshed_at = time.monotonic()
            for unrest in self._unrest.values():
                self._told(unrest.refresh)
        return rested

    def _told(self, write: Callable[[], None]) -> None:
        """What the unrest file says too much does no harm: then it is written later."""
        try:
            write()
        except OSError as e:
            log.error("unrest file not written", reason=str(e))

    def close(self) -> None:
        """Orderly stop: everything on the disks, no marks left."""
        self._table.rest_all()
        for unrest in self._unrest.values():
            self._told(unrest.close)
        for disk in self._disks:
            disk.close()


def _check_ids(chunk: int, version: int) -> None:
    if not (0 < chunk <= layout.CHUNK_ID_MAX and 0 < version <= layout.VERSION_MAX):
        raise ReplyError(errno.EINVAL)


def _check_range(offset: int, length: int, token: int, length_max: int) -> None:
    inside = offset >= 0 and 0 < length <= length_max and offset + length <= CHUNK_SIZE
    if not inside or not 0 <= token < 2**64:
        raise ReplyError(errno.EINVAL)
