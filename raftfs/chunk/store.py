"""All copies of a chunkserver over its disks: found by number, opened on demand, changed in order.

Thread-safe. The index maps a chunk to its `CopyFile`; a copy's own lock serialises what happens to
its file; the store's lock guards only the index and is never held during I/O. At most
`OPEN_FILES_MAX` files are open; the least recently used are retired.
"""

import errno
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import structlog

from raftfs.chunk.copyfile import CopyFile, PartialCopy
from raftfs.chunk.disk import Disk, FileDoor
from raftfs.chunk.layout import LayoutError, UnfinishedError
from raftfs.errors import ReplyError, Status, UserError
from raftfs.wire.frame import Buffer, piece_crcs
from raftfs.wire.messages import CopyId

log = structlog.get_logger("raftfs.chunkstore")

OPEN_FILES_MAX = 512
IDLE_S = 5.0  # an open copy that nobody used for so long is retired

# made, gone, damaged: what the masters are told
Report = Callable[[list[CopyId], list[CopyId], list[CopyId]], None]


class ChunkStore:
    """The copies on this server's disks."""

    def __init__(self, disks: list[Disk], door: FileDoor | None = None) -> None:
        """UserError if the disks disagree on server or cluster."""
        self._disks = disks
        self._door = door or FileDoor()
        self._copies: dict[int, CopyFile] = {}
        self._open: dict[int, CopyFile] = {}
        self._lock = threading.Lock()
        self.report: Report = lambda made, gone, damaged: None
        self.server = self._agree("server") or uuid.uuid4().bytes
        self.cluster = self._agree("cluster")
        for disk in disks:
            if disk.label["server"] != self.server:
                disk.claim(self.server, self.cluster)
            for chunk, version in disk.copies():
                self._index(disk, chunk, version)

    def _agree(self, what: str) -> bytes:
        found = {d.label[what]: d.path for d in self._disks if d.label[what]}
        if len(found) > 1:
            paths = " and ".join(str(p) for p in found.values())
            raise UserError(f"{paths} belong to different {what}s: use the disks of one only")
        return next(iter(found), b"")

    def _index(self, disk: Disk, chunk: int, version: int) -> None:
        known = self._copies.get(chunk)
        if known is None or known.version < version:
            self._copies[chunk] = CopyFile(disk, self._door, chunk, version)

    def join(self, cluster: bytes) -> None:
        """The server belongs to this cluster from now on."""
        if self.cluster != cluster:
            self.cluster = cluster
            for disk in self._disks:
                disk.claim(self.server, cluster)

    # --- finding

    def copies(self) -> list[CopyId]:
        """Every copy as it is now."""
        with self._lock:
            return [CopyId(c.chunk, c.version) for c in self._copies.values()]

    def __len__(self) -> int:
        return len(self._copies)

    def space(self) -> tuple[int, int]:
        """Bytes in all and used, over all disks; a disk is counted once per file system."""
        spaces = [d.space() for d in self._disks]
        return sum(s[0] for s in spaces), sum(s[1] for s in spaces)

    @contextmanager
    def _held(self, chunk: int, version: int | None, *, create: bool = False) -> Iterator[CopyFile]:
        """The open copy under its lock. NO_CHUNK, WRONG_VERSION, or BAD_CRC if it is damaged."""
        copy = self._copies.get(chunk)
        if copy is None and create and version is not None:
            copy = self._create(chunk, version)
        if copy is None:
            raise ReplyError(Status.NO_CHUNK)
        with copy.lock:
            if self._copies.get(chunk) is not copy:
                raise ReplyError(Status.NO_CHUNK)
            if version is not None and copy.version != version:
                raise ReplyError(Status.WRONG_VERSION)
            self._open_copy(copy)
            copy.used_at = time.monotonic()
            with self._lock:
                self._open.pop(chunk, None)
                self._open[chunk] = copy
            try:
                yield copy
            except ReplyError as e:
                if e.status == Status.BAD_CRC:
                    self._damaged(copy, "a block does not match its checksum")
                raise
            finally:
                if copy.broken:
                    self._damaged(copy, "the disk failed to sync it")

    def _open_copy(self, copy: CopyFile) -> None:
        try:
            copy.open()
        except UnfinishedError:
            # Stopped between making the file and its first write: nothing was ever in it.
            log.info("unfinished copy removed", chunk=f"{copy.chunk:016X}")
            self.destroy(copy.chunk, copy.version)
            raise ReplyError(Status.NO_CHUNK) from None
        except (LayoutError, FileNotFoundError) as e:
            self._damaged(copy, str(e))
            raise ReplyError(Status.BAD_CRC) from None

    def _damaged(self, copy: CopyFile, reason: str) -> None:
        log.error("copy damaged", chunk=f"{copy.chunk:016X}", version=copy.version,
                  disk=str(copy.disk.path), reason=reason)  # fmt: skip
        self.report([], [], [CopyId(copy.chunk, copy.version)])

    def _create(self, chunk: int, version: int) -> CopyFile:
        disk = self._roomiest()
        copy = CopyFile(disk, self._door, chunk, version)
        with copy.lock:
            with self._lock:
                known = self._copies.setdefault(chunk, copy)
            if known is not copy:
                return known
            try:
                copy.create(self.cluster)
            except OSError:
                with self._lock:
                    self._copies.pop(chunk, None)
                if copy.discard():
                    self._door.unlink(copy.path)
                raise
        self.report([CopyId(chunk, version)], [], [])
        return copy

    def _roomiest(self) -> Disk:
        usable = [d for d in self._disks if not d.full()]
        if not usable:
            raise ReplyError(errno.ENOSPC)
        if len(usable) == 1:
            return usable[0]

        def free(disk: Disk) -> int:
            total, used = disk.space()
            return total - used

        return max(usable, key=free)

    # --- data

    def write(
        self, chunk: int, version: int, token: int, create: bool, offset: int, data: Buffer,
        crcs: list[int],
    ) -> None:  # fmt: skip
        """Write a range under a grant's token."""
        with self._held(chunk, version, create=create) as copy:
            self._check_token(copy, token)
            copy.write(offset, data, crcs)

    def zero(
        self, chunk: int, version: int, token: int, create: bool, offset: int, length: int
    ) -> None:
        """Make a range read as zeros, under a grant's token."""
        with self._held(chunk, version, create=create) as copy:
            self._check_token(copy, token)
            copy.zero(offset, length)

    def _check_token(self, copy: CopyFile, token: int) -> None:
        if token < copy.token:
            raise ReplyError(Status.WRONG_VERSION)
        copy.token = token

    def sync(self, chunk: int, version: int) -> None:
        """Make the copy durable."""
        with self._held(chunk, version) as copy:
            copy.sync()

    def read(self, chunk: int, version: int, offset: int, length: int) -> tuple[Buffer, list[int]]:
        """A range and the CRCs of its pieces."""
        with self._held(chunk, version) as copy:
            return copy.read(offset, length)

    def blocks(self, chunk: int, version: int) -> bytes:
        """CRC table and bitmap of the copy."""
        with self._held(chunk, version) as copy:
            return copy.blocks()

    # --- orders

    def raise_version(self, chunk: int, version: int, token: int) -> None:
        """Become a higher version, durably; a repeated order is fine."""
        with self._held(chunk, None) as copy:
            if copy.version > version:
                raise ReplyError(Status.WRONG_VERSION)
            copy.token = max(copy.token, token)
            old = copy.version
            if old < version:
                copy.raise_version(version)
        if old < version:
            self.report([CopyId(chunk, version)], [CopyId(chunk, old)], [])

    def destroy(self, chunk: int, version: int) -> None:
        """Destroy the copy at exactly this version (0: any)."""
        copy = self._copies.get(chunk)
        if copy is None:
            return
        with copy.lock:
            if version not in (0, copy.version) or self._copies.get(chunk) is not copy:
                return
            with self._lock:
                del self._copies[chunk]
                self._open.pop(chunk, None)
            copy.discard()
            self._door.unlink(copy.path)
            # Durable before it is told: the copy must not come back after a power cut.
            self._door.sync_folder(copy.path.parent)
        self.report([], [CopyId(chunk, copy.version)], [])

    def adopt(self, chunk: int, version: int, blocks: Iterable[tuple[int, Buffer]]) -> None:
        """A replicated copy: (offset, data) of what is written, checked by the caller. Durable."""
        with self._lock:
            if chunk in self._copies:
                raise ReplyError(Status.WRONG_VERSION)
        copy = PartialCopy(self._roomiest(), self._door, chunk, version)
        try:
            copy.create(self.cluster)
            for offset, data in blocks:
                copy.write(offset, data, piece_crcs(offset, data))
            copy.finish()
        except BaseException:
            copy.discard()
            self._door.unlink(copy.path)
            raise
        with self._lock:
            known = self._copies.setdefault(chunk, CopyFile(copy.disk, self._door, chunk, version))
        if known.version != version:
            raise ReplyError(Status.WRONG_VERSION)
        self.report([CopyId(chunk, version)], [], [])

    # --- housekeeping

    def retire_idle(self) -> None:
        """Close copies that nobody uses: the oldest beyond the limit, and those idle for long."""
        limit = time.monotonic() - IDLE_S
        with self._lock:
            extra = max(0, len(self._open) - OPEN_FILES_MAX)
            old = [c for at, c in enumerate(self._open.values()) if at < extra or c.used_at < limit]
        for copy in old:
            if copy.lock.acquire(blocking=False):
                try:
                    with self._lock:
                        self._open.pop(copy.chunk, None)
                    copy.retire()
                except (OSError, ReplyError) as e:
                    log.error("copy not retired", chunk=f"{copy.chunk:016X}", reason=str(e))
                finally:
                    copy.lock.release()

    def close(self) -> None:
        """Orderly stop: everything synced, no dirty bits left."""
        with self._lock:
            copies, self._open = list(self._open.values()), {}
        for copy in copies:
            with copy.lock:
                try:
                    copy.retire()
                except (OSError, ReplyError) as e:
                    log.error("copy not retired", chunk=f"{copy.chunk:016X}", reason=str(e))
        for disk in self._disks:
            disk.close()
