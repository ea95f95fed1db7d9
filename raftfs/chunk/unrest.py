"""Which copies of a disk may lack acknowledged writes after a power cut: its *unrest* file.

A copy is at rest when all of it is on the disk. One that is written is not, and a power cut may
take what was acknowledged since; a copy that looks whole afterwards can still be an older one. So
before the first write to a copy at rest is acknowledged, a power cut that happens from then on must
find the copy's name in `.raftfs-unrest`:

    boot       which boot of the machine wrote the file; another one found it after a power cut
    horizon    copies of chunks beyond it are not at rest, named or not
    active     copies that are not at rest
    doubtful   copies that lost, or may have lost, writes in an earlier power cut

    then, a sector of 512 bytes for each time that copies became active since: their chunks. A disk
    writes a sector whole or not at all, so a torn one is zeros; anything else is damage.

Chunk ids only grow, so a new copy lies beyond the horizon and costs nothing here; only writing to
an old copy at rest costs an fdatasync, shared by all who wait for one. The file is written anew now
and then (`refresh`), with a higher horizon and without what came to rest.

A *doubtful* copy is neither read nor written until the leader has decided: with a sure copy
elsewhere it is stale, without one the leader raises one of the doubtful and all is as it is there.

Thread-safe. Lock order: `_file_lock`, which is held during I/O, then `_lock`.
"""

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cbor2
import structlog

from raftfs.chunk.door import FileDoor
from raftfs.wire.frame import crc32

log = structlog.get_logger("raftfs.unrest")

UNREST = ".raftfs-unrest"
_FORMAT = 1
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_SECTOR = 512
_ID_BYTES = 8
_CRC_BYTES = 4
_LENGTH_BYTES = 4
_IDS_PER_SECTOR = (_SECTOR - _CRC_BYTES) // _ID_BYTES
_NOTHING = bytes(_SECTOR)


def boot_id() -> str:
    """Which boot of the machine this is. OSError."""
    return _BOOT_ID.read_text("ascii").strip()


class Unrest:
    """The unrest file of one disk, see the module."""

    def __init__(self, folder: Path, door: FileDoor, boot: str) -> None:
        self._path = folder / UNREST
        self._door = door
        self._boot = boot
        self._file_lock = threading.Lock()
        self._fd = -1  # -1: the file must be written anew before anything is appended
        self._end = 0
        self._lock = threading.Lock()
        self._active: set[int] = set()
        self._inherited: set[int] = set()  # as an earlier process of this boot left them
        self._doubtful: set[int] = set()
        self._highest = 0
        # What the file says for sure: a copy beyond the horizon or listed needs no mention.
        self._horizon = 0
        self._listed: set[int] = set()
        self._pending: set[int] = set()
        self._stale = True  # the file says more than is true, or says it in many words

    # --- start

    def begin(self, copies: Iterable[int]) -> None:
        """At start, with the chunks whose copies are on the disk: find out what is doubtful."""
        here = set(copies)
        self._highest = max(here, default=0)
        try:
            found = self._read()
        except _Damaged as e:
            if here:
                log.warning("every copy of the disk is doubtful", file=str(self._path),
                            reason=str(e), copies=len(here))  # fmt: skip
            self._doubtful = here
        else:
            restless = here & found.active | {c for c in here if c > found.horizon}
            self._doubtful = here & found.doubtful
            if found.boot == self._boot:
                self._inherited = restless
            else:
                self._doubtful |= restless
        if self._doubtful:
            log.warning("copies may lack writes that a power cut took", disk=str(self._path.parent),
                        copies=len(self._doubtful))  # fmt: skip
        try:
            self._rewrite()
        except OSError as e:  # say, a full disk: what the file says stays true
            log.error("unrest file not written", file=str(self._path), reason=str(e))

    def _read(self) -> "_Found":
        try:
            fd = self._door.open(self._path)
        except FileNotFoundError:
            raise _Damaged("there is no such file") from None
        except OSError as e:
            raise _Damaged(f"it cannot be read: {e.strerror}") from None
        try:
            raw = memoryview(bytearray(self._door.size(fd)))
            got = self._door.pread(fd, raw, 0)
        except OSError as e:
            raise _Damaged(f"it cannot be read: {e.strerror}") from None
        finally:
            self._door.close(fd)
        return _parse(raw[:got])

    # --- what happens to copies

    def is_doubtful(self, chunk: int) -> bool:
        """The copy may lack writes that were acknowledged."""
        return chunk in self._doubtful

    def doubtful(self) -> set[int]:
        """Chunks whose copies are doubtful."""
        with self._lock:
            return set(self._doubtful)

    def enter(self, chunk: int) -> None:
        """The copy is about to be changed. What it is from now on a power cut cannot hide when this
        returns. OSError if that cannot be written.
        """
        with self._lock:
            self._highest = max(self._highest, chunk)
            if chunk in self._active:
                return
            if self._covered(chunk):
                self._active.add(chunk)
                return
            self._pending.add(chunk)
        with self._file_lock:
            with self._lock:
                if chunk not in self._pending:  # whoever had the lock before wrote ours, too
                    return
                batch = sorted(self._pending)
            try:
                if self._fd < 0:
                    self._write_whole()
                else:
                    self._append(batch)
            except BaseException:
                with self._lock:
                    self._pending.discard(chunk)  # the others try for themselves
                raise
            with self._lock:
                self._listed.update(batch)
                self._active.update(batch)
                self._pending.difference_update(batch)

    def _covered(self, chunk: int) -> bool:
        return chunk > self._horizon or chunk in self._listed

    def rested(self, chunk: int) -> None:
        """All of the copy is on the disk, or there is no such copy any more."""
        with self._lock:
            if chunk in self._active or chunk in self._inherited:
                self._active.discard(chunk)
                self._inherited.discard(chunk)
                self._stale = True

    def sure(self, chunk: int) -> None:
        """The leader decided about the copy: whatever it lacks counts no more."""
        with self._lock:
            if chunk in self._doubtful:
                self._doubtful.discard(chunk)
                self._stale = True

    # --- the file

    def refresh(self) -> None:
        """Bring the file up to date, if that is due. Called regularly by one thread. OSError."""
        if self._inherited:
            left = set(self._inherited)
            self._door.sync_disk(self._path.parent)
            with self._lock:
                self._inherited -= left
                self._stale = True
        with self._lock:
            due = self._stale or self._highest > self._horizon
        if due:
            self._rewrite()

    def _rewrite(self) -> None:
        with self._file_lock:
            self._write_whole()

    def _write_whole(self) -> None:
        """Write the file anew. What is said while that goes on must hold for both files."""
        with self._lock:
            listed = self._active | self._inherited | self._pending
            horizon, doubtful = self._highest, sorted(self._doubtful)
            self._horizon = max(horizon, self._horizon)
            self._listed &= listed
            self._stale = False
        body = {"format": _FORMAT, "boot": self._boot, "horizon": self._horizon,
                "active": sorted(listed), "doubtful": doubtful}  # fmt: skip
        try:
            self._replace(_head(body))
        except BaseException:
            with self._lock:
                self._stale = True
            raise
        with self._lock:
            self._listed |= listed

    def _replace(self, content: bytes) -> None:
        new = self._path.with_name(UNREST + ".new")
        self.close_file()
        self._door.unlink(new)
        fd = self._door.create(new)
        try:
            self._door.pwrite(fd, [content], 0)
            self._door.sync(fd)
            self._door.rename(new, self._path)
            self._door.sync_folder(self._path.parent)
        except BaseException:
            self._door.close(fd)
            raise
        self._fd, self._end = fd, len(content)

    def _append(self, chunks: list[int]) -> None:
        records = _sectors(chunks)
        try:
            self._door.pwrite(self._fd, [records], self._end)
            self._door.sync(self._fd)
        except BaseException:
            self.close_file()  # the next one writes it anew
            raise
        self._end += len(records)
        with self._lock:
            self._stale = True

    def close_file(self) -> None:
        """Give the descriptor back."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            self._door.close(fd)

    def close(self) -> None:
        """Orderly stop, after the copies came to rest: say how things are. OSError."""
        try:
            self.refresh()
        finally:
            self.close_file()


class _Damaged(Exception):
    """Nobody knows what the file said."""


class _Found:
    """What a file says."""

    def __init__(self, body: dict[str, Any], appended: list[int]) -> None:
        self.boot: str = body["boot"]
        self.horizon: int = body["horizon"]
        self.active: set[int] = {*body["active"], *appended}
        self.doubtful: set[int] = set(body["doubtful"])


def _head(body: dict[str, Any]) -> bytes:
    """Whole sectors: length, CBOR, CRC32."""
    raw = cbor2.dumps(body, canonical=True)
    framed = len(raw).to_bytes(_LENGTH_BYTES, "big") + raw
    framed += crc32(framed).to_bytes(_CRC_BYTES, "big")
    return framed + bytes(-len(framed) % _SECTOR)


def _sectors(chunks: list[int]) -> bytes:
    """Chunks (0: none) and a CRC32 in each sector."""
    made = []
    for start in range(0, len(chunks), _IDS_PER_SECTOR):
        ids = b"".join(
            c.to_bytes(_ID_BYTES, "big") for c in chunks[start : start + _IDS_PER_SECTOR]
        ).ljust(_SECTOR - _CRC_BYTES, b"\0")
        made.append(ids + crc32(ids).to_bytes(_CRC_BYTES, "big"))
    return b"".join(made)


def _parse(raw: memoryview) -> _Found:
    size = int.from_bytes(raw[:_LENGTH_BYTES], "big")
    end = _LENGTH_BYTES + size
    if len(raw) < end + _CRC_BYTES:
        raise _Damaged("it is too short")
    if crc32(raw[:end]) != int.from_bytes(raw[end : end + _CRC_BYTES], "big"):
        raise _Damaged("its checksum is wrong")
    body = cbor2.loads(raw[_LENGTH_BYTES:end])
    if body.get("format") != _FORMAT:
        raise _Damaged(f"it is of format {body.get('format')}, not {_FORMAT}")
    appended = raw[-(-(end + _CRC_BYTES) // _SECTOR) * _SECTOR :]
    return _Found(body, _appended(appended))


def _appended(raw: memoryview) -> list[int]:
    chunks: list[int] = []
    for start in range(0, len(raw), _SECTOR):
        sector = bytes(raw[start : start + _SECTOR])
        if len(sector) < _SECTOR or sector == _NOTHING:
            continue  # torn: nobody was told that it is there
        ids = sector[:-_CRC_BYTES]
        if crc32(ids) != int.from_bytes(sector[-_CRC_BYTES:], "big"):
            raise _Damaged(f"the sector at {start} behind its head is damaged")
        found = (ids[at : at + _ID_BYTES] for at in range(0, len(ids) - _ID_BYTES + 1, _ID_BYTES))
        chunks += [chunk for i in found if (chunk := int.from_bytes(i, "big"))]
    return chunks
