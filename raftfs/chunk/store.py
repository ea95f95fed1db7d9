"""All copies of a chunkserver over its disks, and everything that is done with them.

Thread-safe: a copy's own lock serialises what happens to its file (see also `tables.py`).

What changes a copy's existence or version is reported (`report`) while the copy's lock is held, so
that reports of one chunk are in the order of its changes.

A copy that turns out damaged does not count from then on, also after a restart: the masters are
told its story. It stays where it is, and its good blocks can be read, until the leader knows of a
good copy elsewhere (`set_aside`), or one was fetched; then it goes to the quarantine.

A copy is deleted by a Destroy order, or when a newer one of its chunk, just verified, has taken
its place; by nothing else (an empty file, of a stop while it was made, is no copy).
"""

import errno
import os
import random
import threading
import time
import uuid
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog

from raftfs.chunk import layout
from raftfs.chunk.chunkfile import DamageError, UnfinishedError
from raftfs.chunk.copyfile import Copy, Resting
from raftfs.chunk.disk import Disk
from raftfs.chunk.door import FileDoor
from raftfs.chunk.quarantine import Quarantine
from raftfs.chunk.tables import IDLE_S, OPEN_FILES_MAX, CopyTable
from raftfs.chunk.unrest import Unrest, boot_id
from raftfs.const import BLOCK_SIZE, CHUNK_SIZE, DATA_PAYLOAD_MAX
from raftfs.errors import RaftfsError, ReplyError, Status, UserError
from raftfs.wire.frame import piece_crcs
from raftfs.wire.messages import CopyId, Damage

log = structlog.get_logger("raftfs.chunkstore")

REFRESH_S = 5.0  # so often, at most, the unrest files are brought up to date
REPORT_SLICE = 10_000  # copies in one message to the masters
READ_BUFFER = DATA_PAYLOAD_MAX + 2 * BLOCK_SIZE
# Errors that say nothing of the disk's health.
_NO_FAULT = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR}

# made, gone, damaged: what the masters are told. Called by any thread; must not block.
Report = Callable[[list[CopyId], list[CopyId], list[Damage]], None]


# Chunks whose copies should have others on other servers, or no longer. As `Report`.
ReportLeaving = Callable[[list[int], bool], None]


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
        self.report_leaving: ReportLeaving = lambda chunks, leaving: None
        self._disks = disks
        self._draw = draw
        self._join_lock = threading.Lock()
        self._unrest = {d.path: Unrest(d.path, self.door, boot or boot_id()) for d in disks}
        self._refreshed_at = 0.0
        self._table = CopyTable(disks, self.door, open_files_max, self._io_failed, self._rested)
        self._quarantines = [Quarantine(disk.path, self.door) for disk in disks]
        self.server: bytes = self._agree("server") or uuid.uuid4().bytes
        self.cluster: bytes = self._agree("cluster")
        for number, disk in enumerate(disks):
            if disk.label["server"] != self.server or disk.label["cluster"] != self.cluster:
                disk.claim(self.server, self.cluster)
            copies = list(disk.copies())
            for chunk, version in copies:
                self._found(chunk, version, number)
            self._unrest[disk.path].begin(chunk for chunk, _ in copies)
        for number, quarantine in enumerate(self._quarantines):
            for story in quarantine.in_place():
                if self._table.place_of(story.chunk) == (story.version, number):
                    self._table.damage(story.chunk, story)
                else:
                    quarantine.forget(story.chunk, story.version)
            if disks[number].health.evidence:
                self._disk_failed(number)

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
        copy: the newer was whole before it got its name, so the older is superseded. Unless one of
        them is another chunk's, whose name has rotted; `strangers.py` will find it.
        """
        known = self._table.place_of(chunk)
        places = sorted([(version, number), *([known] if known else [])])
        true = [p for p in places if len(places) > 1 and self._is_named_right(chunk, *p)] or places
        self._table.put(chunk, *true[-1])
        if len(true) > 1:
            self._supersede_found(chunk, *true)

    def _is_named_right(self, chunk: int, version: int, number: int) -> bool:
        copy = Copy(self._disks[number], self.door, chunk, version)
        try:
            copy.check_name()
        except (DamageError, UnfinishedError, OSError) as e:
            log.warning("name and header differ", file=str(copy.path), reason=str(e))
            return False
        return True

    def _supersede_found(self, chunk: int, old: tuple[int, int], new: tuple[int, int]) -> None:
        path = self._disks[old[1]].path / layout.file_name(chunk, old[0])
        log.warning("superseded copy set aside", file=str(path), kept=new[0])
        story = Damage(chunk, old[0], str(self._disks[old[1]].path), "file", -1, str(new[0]),
                       str(old[0]), "start", int(time.time()), "a newer copy was here")  # fmt: skip
        try:
            self._quarantines[old[1]].take(path, story)
        except OSError as e:
            log.error("superseded copy not set aside", file=str(path), reason=str(e))

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
        """The version of the copy, if there is a good one."""
        return None if self._table.damage_of(chunk) else self._table.version_of(chunk)

    def damages(self) -> list[Damage]:
        """The stories of all copies that are damaged and still in their place."""
        return self._table.damages()

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
            closed = disk.leaving or disk.health.evidence
            total, used = total + of_disk[closed != ""], used + of_disk[1]
        return total, used

    def room(self) -> int:
        """Bytes that new copies may take; folders on one file system count once."""
        rooms: dict[int, int] = {}
        for disk in self._disks:
            rooms[disk.device] = max(rooms.get(disk.device, 0), disk.room())
        return sum(rooms.values())

    # --- having a copy in hand

    @contextmanager
    def _held(
        self, chunk: int, version: int | None, by: str, *, create: bool = False
    ) -> Iterator[Copy]:
        """The open copy under its lock. `by`: as in `Damage.found_by`; a read may have a damaged
        one.

        ReplyError: NO_CHUNK, WRONG_VERSION (also while the copy is doubtful, except for the leader,
        who asks for no version), BAD_CRC (and the copy counts no more), ENOSPC, DISK_ERROR.
        """
        unused = by == "scrub" and not self._table.is_active(chunk)
        copy = self._table.enter(chunk)
        if copy is None:
            if not create or version is None:
                raise ReplyError(Status.NO_CHUNK)
            copy = self._create(chunk, version)
        try:
            with copy.lock:
                self._check_usable(copy, version, by)
                try:
                    copy.open(self.cluster)
                    yield copy
                except DamageError as e:
                    self._found_damaged(copy, by, e)
                    raise ReplyError(Status.BAD_CRC) from None
                except UnfinishedError:
                    self._forget_unfinished(copy)
                    raise ReplyError(Status.NO_CHUNK) from None
                except FileNotFoundError:
                    self._found_damaged(copy, by, DamageError("file", "the file is missing"))
                    raise ReplyError(Status.NO_CHUNK) from None
                except OSError as e:
                    raise self._io_failed(copy, e, by) from e
        finally:
            if by != "scrub":
                copy.disk.used_at = time.monotonic()
            if unused:
                self._table.put_down(copy)
            else:
                self._table.leave(copy, is_client=by != "scrub")

    def _check_usable(self, copy: Copy, version: int | None, by: str) -> None:
        if copy.gone:
            raise ReplyError(Status.NO_CHUNK)
        doubtful = by != "scrub" and self._unrest[copy.disk.path].is_doubtful(copy.chunk)
        if version is not None and (doubtful or copy.version != version):
            raise ReplyError(Status.WRONG_VERSION)
        story = self._table.damage_of(copy.chunk)
        if story is not None and by != "read":
            failing = story.part in ("disk", "io")
            raise ReplyError(Status.DISK_ERROR if failing else Status.BAD_CRC)

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
                raise self._io_failed(copy, e, "write") from e
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

    def _found_damaged(self, copy: Copy, by: str, e: DamageError) -> None:
        """The copy does not count from now on. It stays, unless its file is another's or gone."""
        story = Damage(copy.chunk, copy.version, str(copy.disk.path), e.part, e.block, e.expected,
                       e.found, by, int(time.time()), str(e))  # fmt: skip
        copy.abandon()
        if e.part in ("name", "file"):
            self._quarantine_of(copy).forget(copy.chunk, copy.version)
            self._table.drop(copy)
            self._decided(copy.chunk)
        elif self._table.damage(copy.chunk, story):
            try:
                self._quarantine_of(copy).note(story)
            except OSError as error:  # it counts again after a restart, until it is read again
                log.error("story not written", disk=story.disk, reason=str(error))
        else:
            return
        log.error("copy damaged", chunk=f"{copy.chunk:016X}", version=copy.version,
                  server=self.server.hex(), disk=story.disk, part=e.part, block=e.block,
                  expected=e.expected, found=e.found, found_by=by, reason=str(e))  # fmt: skip
        self.report([], [], [story])

    def _quarantine_of(self, copy: Copy) -> Quarantine:
        return self._quarantines[self._disks.index(copy.disk)]

    def set_aside(self, chunk: int, version: int) -> None:
        """A damaged copy goes to the quarantine: a good one is known elsewhere. A good one stays.
        ReplyError DISK_ERROR.
        """
        copy = self._table.enter(chunk)
        if copy is None:
            return
        try:
            with copy.lock:
                story = self._table.damage_of(chunk)
                if copy.gone or copy.version != version or story is None:
                    return
                copy.abandon()
                try:
                    kept = self._quarantine_of(copy).take(copy.path, story)
                    log.info("damaged copy set aside", chunk=f"{chunk:016X}", file=str(kept))
                except FileNotFoundError:
                    log.warning("damaged copy is gone", file=str(copy.path))
                except OSError as e:
                    log.error("damaged copy not set aside", file=str(copy.path), reason=str(e))
                    raise ReplyError(Status.DISK_ERROR) from e
                self._table.drop(copy)
                self._decided(chunk)
                self.report([], [CopyId(chunk, version)], [])
        finally:
            self._table.leave(copy)

    def _forget_unfinished(self, copy: Copy) -> None:
        log.info("unfinished copy removed", chunk=f"{copy.chunk:016X}", version=copy.version)
        self._table.drop(copy)
        self._decided(copy.chunk)
        with suppress(OSError):  # found again at the next start
            self.door.unlink(copy.path)
            self.door.sync_folder(copy.path.parent)
        self.report([], [CopyId(copy.chunk, copy.version)], [])

    def _io_failed(self, copy: Copy, error: OSError, by: str = "rest") -> ReplyError:
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
        number = error.errno or errno.EIO
        code = errno.errorcode.get(number, str(number))
        story = Damage(copy.chunk, copy.version, str(copy.disk.path), "io", -1, "", code, by,
                       int(time.time()), os.strerror(number))  # fmt: skip
        if not copy.gone and self._table.damage(copy.chunk, story):
            self.report([], [], [story])
        if copy.disk.health.error(f"{code} ({os.strerror(number)}) {by} {copy.path}"):
            self._disk_failed(self._disks.index(copy.disk))
        return ReplyError(Status.DISK_ERROR)

    def _disk_failed(self, number: int) -> None:
        """Nothing on it counts any more; what can be read is still given to readers."""
        disk = self._disks[number]
        evidence = disk.health.evidence
        log.error("disk damaged", disk=str(disk.path), evidence=evidence)
        at, last = int(time.time()), evidence.splitlines()[-1]
        stories = []
        for chunk in self._table.chunks_on(number, 0):
            version = self._table.version_of(chunk) or 0
            story = Damage(chunk, version, str(disk.path), "disk", -1, "", "", "disk", at, last)
            if self._table.damage(chunk, story):
                stories.append(story)
        for start in range(0, len(stories), REPORT_SLICE):
            self.report([], [], stories[start : start + REPORT_SLICE])

    def retest(self, path: str) -> None:
        """What is on a damaged disk counts again, if the disk works now. RaftfsError says why not.

        Copies that gave an error themselves stay damaged.
        """
        disk = next((d for d in self._disks if str(d.path) == path), None)
        if disk is None:
            known = ", ".join(str(d.path) for d in self._disks)
            raise RaftfsError(f"{path} is no disk of this server: it has {known}")
        try:
            disk.health.test(self.door)
        except OSError as e:
            raise RaftfsError(f"{path} still fails: {e}") from None
        again = [s for s in self._table.damages() if s.part == "disk" and s.disk == path]
        for story in again:
            self._table.undamage(story.chunk)
        log.info("disk tested and counted again", disk=path, copies=len(again))
        for start in range(0, len(again), REPORT_SLICE):
            part = again[start : start + REPORT_SLICE]
            again_ids = [CopyId(s.chunk, s.version, self.is_doubtful(s.chunk)) for s in part]
            self.report(again_ids, [], [])

    def _let_go(self, chunk: int, version: int) -> None:
        """The copy is none any more; its file stays where it is, for `strangers.py`."""
        copy = self._table.enter(chunk)
        if copy is None:
            return
        try:
            with copy.lock:
                if not copy.gone and copy.version == version:
                    copy.abandon()
                    self._table.drop(copy)
                    self.report([], [CopyId(chunk, version)], [])
        finally:
            self._table.leave(copy)

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
        with self._held(chunk, version, "write", create=create) as copy:
            self._stir(copy)
            copy.write(offset, data, crcs, token)

    def zero(
        self, chunk: int, version: int, token: int, create: bool, offset: int, length: int
    ) -> None:
        """Make a range read as zeros, under a grant's token."""
        _check_range(offset, length, token, CHUNK_SIZE)
        with self._held(chunk, version, "write", create=create) as copy:
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
        with self._held(chunk, version, "write") as copy:
            copy.sync()

    def read(
        self, chunk: int, version: int, offset: int, length: int, into: memoryview | None = None
    ) -> tuple[memoryview, list[int]]:
        """A range and the CRCs of its pieces. `into`: room of READ_BUFFER bytes to read into."""
        _check_range(offset, length, 0, DATA_PAYLOAD_MAX)
        if into is None:
            first, last = layout.block_span(offset, length)
            into = memoryview(bytearray((last - first + 1) * BLOCK_SIZE))
        with self._held(chunk, version, "read") as copy:
            return copy.read(offset, length, into)

    def block_list(self, chunk: int, version: int) -> bytes:
        """CRC table and bitmap of the copy, as `ListBlocks` asks."""
        with self._held(chunk, version, "order") as copy:
            return copy.block_list()

    # --- orders

    def raise_version(self, chunk: int, version: int, token: int) -> None:
        """Become a higher version, durably; a repeated order is fine. WRONG_VERSION if it is higher
        already.
        """
        _check_ids(chunk, version)
        with self._held(chunk, None, "order") as copy:
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

    def confirm(self, chunk: int, version: int) -> None:
        """ReplyError unless there is a good copy at exactly this version, as its header says."""
        with self._held(chunk, version, "order") as copy:
            copy.check_head()

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
                    raise self._io_failed(copy, e, "order") from e
                self._quarantine_of(copy).forget(chunk, copy.version)
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
        if (story := self._table.damage_of(chunk)) is not None:
            # Whoever adopts has a good copy in hand. A damaged disk is not asked to move anything.
            (self._let_go if story.part == "disk" else self.set_aside)(chunk, story.version)
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

    # --- the scrub's side

    def disks(self) -> list[Disk]:
        """The disks, by number."""
        return list(self._disks)

    def quarantines(self) -> list[Quarantine]:
        """The disks' quarantines, by number of the disk."""
        return list(self._quarantines)

    def chunks_on(self, number: int, after: int) -> "array[int]":
        """The chunks of a disk's copies beyond one, ascending."""
        return self._table.chunks_on(number, after)

    def path_of(self, chunk: int) -> Path | None:
        """Where the copy's file should be; damaged or not."""
        place = self._table.place_of(chunk)
        return place and self._disks[place[1]].path / layout.file_name(chunk, place[0])

    def settled_path(self, chunk: int) -> Path | None:
        """As `path_of`, after whatever is being done with the copy just now."""
        copy = self._table.enter(chunk)
        if copy is None:
            return None
        try:
            with copy.lock:
                return None if copy.gone else copy.path
        finally:
            self._table.leave(copy)

    def reclaim(self, chunk: int, version: int, path: Path) -> bool:
        """Give a file its name back that it lost while it was a copy of ours. False if it is none,
        or has not lost it. OSError.
        """
        copy = self._table.enter(chunk)
        if copy is None:
            return False
        try:
            with copy.lock:
                if copy.gone or copy.version != version or copy.path.exists():
                    return False
                self._install(path, copy.path)
                return True
        finally:
            self._table.leave(copy)

    def copies_on(self, number: int) -> int:
        """How many copies a disk has."""
        return self._table.count_on(number)

    def verify(self, chunk: int, first: int, into: memoryview) -> tuple[int, int]:
        """Header, table and as many blocks from `first` on as `into` has room for are what was
        written: gives the block to go on with (0: that was all) and the bytes read.

        ReplyErrors of `_held`; what is wrong has been noted and told. A copy that was found damaged
        before is passed over.
        """
        if self._table.damage_of(chunk) is not None:
            return 0, 0
        cold = not self._table.is_active(chunk)
        with self._held(chunk, None, "scrub") as copy:
            if not cold:
                copy.check_head()
            further, read_bytes = copy.check_blocks(first, into, cold=cold)
            return further, read_bytes + layout.DATA_OFFSET

    # --- the mover's side

    def leaving(self) -> list[int]:
        """The chunks that other servers must take over."""
        pushed = [n for n, disk in enumerate(self._disks) if disk.is_pushed]
        return [chunk for n in pushed for chunk in self._table.chunks_on(n, 0)]

    def push(self, number: int, *, away: bool) -> None:
        """Have other servers take over what is on a disk; or no longer. The masters are told."""
        if self._disks[number].is_pushed != away:
            self._disks[number].is_pushed = away
            chunks = self._table.chunks_on(number, 0).tolist()
            for start in range(0, len(chunks), REPORT_SLICE):
                self.report_leaving(chunks[start : start + REPORT_SLICE], away)

    def resting(self, chunk: int) -> Resting | None:
        """The copy, if it is good and nobody changes it just now. Not a doubtful one: on another
        disk nothing would say what may be missing in it.
        """
        if self._table.damage_of(chunk) is not None or self.is_doubtful(chunk):
            return None
        with self._held(chunk, None, "scrub") as copy:
            return copy.resting()

    def replace_file(self, chunk: int, old: Resting, disk: Disk, part: Path) -> bool:
        """A whole and durable twin of the copy, under the name `part`, is the copy from now on. The
        old file goes. False, and nothing happens, if the copy is not what it was. OSError.
        """
        copy = self._table.enter(chunk)
        if copy is None:
            return False
        try:
            with copy.lock:
                if copy.gone or copy.path != old.path or self._table.damage_of(chunk):
                    return False
                copy.open(self.cluster)
                if not old.is_still(copy.resting()):
                    return False
                self._install(part, disk.path / layout.file_name(chunk, old.version))
                copy.abandon()
                self._table.replace(copy, old.version, self._disks.index(disk))
                if copy.disk.is_pushed:
                    self.report_leaving([chunk], False)
                self.door.unlink(old.path)
                self.door.sync_folder(old.path.parent)
                return True
        except (DamageError, UnfinishedError) as e:
            log.warning("copy not moved", chunk=f"{chunk:016X}", reason=str(e))
            return False
        finally:
            self._table.leave(copy)

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
