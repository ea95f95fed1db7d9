"""Copies leave a disk that is marked for removal: to the server's other disks, one after another.
When those have no room, the masters are told, and make other copies on other servers.

A copy is moved while nobody changes it: copied under a `.part` name, checked against its CRC table,
synced; then, if it is still what it was, the copied file is the copy, and the old one goes. A stop
in between leaves a `.part` file, or two files of one chunk, of which the store keeps one.

Task: one thread, which looks at the marks every `LOOK_S`.
"""

import errno
import threading
import time
from contextlib import suppress
from pathlib import Path

import structlog

from raftfs.chunk import layout
from raftfs.chunk.chunkfile import DamageError
from raftfs.chunk.store import ChunkStore
from raftfs.const import MIB
from raftfs.errors import ReplyError

log = structlog.get_logger("raftfs.moving")

LOOK_S = 2.0
_STOP_S = 10.0


class Mover:
    """Empties disks that are marked, as far as the server's other disks have room."""

    def __init__(self, store: ChunkStore) -> None:
        self._store = store
        self._ended = threading.Event()
        self._room = memoryview(bytearray(MIB))
        self._told_full_at = -3600.0
        self._thread = threading.Thread(target=self._run, name="moving", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End; the copy that is under way is given up."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join(_STOP_S)

    def _run(self) -> None:
        while not self._ended.wait(LOOK_S):
            for number, disk in enumerate(self._store.disks()):
                if disk.leaving and not disk.health.evidence:
                    self.empty(number)
                elif disk.is_pushed:
                    self._store.push(number, away=False)

    def empty(self, number: int) -> int:
        """Move what can be moved now; gives how many copies that were."""
        moved = 0
        for chunk in self._store.chunks_on(number, 0):
            if self._ended.is_set():
                break
            try:
                moved += self._move(chunk)
            except ReplyError as e:
                if e.status == errno.ENOSPC:  # else it is gone, or damaged, which has been told
                    self._tell_stuck(number, str(e))
                    self._store.push(number, away=self._store.disks()[number].leaving != "local")
                    break
            except DamageError as e:  # the scrub will say more of it
                log.warning("copy not moved", chunk=f"{chunk:016X}", reason=str(e))
            except OSError as e:
                log.error("copy not moved", chunk=f"{chunk:016X}", reason=str(e))
                break
        if moved:
            log.info("copies moved off a disk", disk=str(self._store.disks()[number].path),
                     moved=moved, left=self._store.copies_on(number))  # fmt: skip
        return moved

    def _tell_stuck(self, number: int, reason: str) -> None:
        if time.monotonic() - self._told_full_at > 600.0:
            self._told_full_at = time.monotonic()
            log.info("copies stay on a disk marked for removal", reason=reason,
                     disk=str(self._store.disks()[number].path),
                     left=self._store.copies_on(number))  # fmt: skip

    def _move(self, chunk: int) -> bool:
        store = self._store
        source = store.resting(chunk)
        if source is None:
            return False
        target = store.place_for(chunk, source.version)
        part = target.path / (layout.file_name(chunk, source.version) + layout.PART_SUFFIX)
        try:
            self._copy(source.path, part, source.table, source.header)
            return store.replace_file(chunk, source, target, part)
        finally:
            with suppress(OSError):  # also removed at the next start
                store.door.unlink(part)

    def _copy(
        self, source: Path, part: Path, table: layout.CrcTable, header: layout.Header
    ) -> None:
        """The file under another name, checked and durable. DamageError, OSError."""
        door = self._store.door
        door.unlink(part)
        old = door.open(source)
        try:
            new = door.create(part)
            try:
                door.pwrite(new, [header.pack_page(), table.page()], 0)
                for first, count in layout.runs_of(header.written, 16):
                    self._copy_run(old, new, table, first, count)
                door.sync(new)
            finally:
                door.close(new)
        finally:
            door.close(old)

    def _copy_run(
        self, old: int, new: int, table: layout.CrcTable, first: int, count: int
    ) -> None:
        door = self._store.door
        offset, length = layout.place_of(first, count)
        view = self._room[:length]
        got = door.pread(old, view, offset)
        view[got:] = bytes(length - got)
        if not table.fits(first, view):
            raise DamageError("data", "a block changed or does not match its checksum")
        door.pwrite(new, [view[:got]], offset)
