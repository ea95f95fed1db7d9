"""A disk of a chunkserver: a folder that belongs to one server of one cluster.

    .raftfs-disk     the label (CBOR): format, UUIDs of disk, server and cluster, highest term seen
    .raftfs-lock     held (flock) by the process that uses the disk
    .raftfs-unrest   what a power cut may take, see `unrest.py`
    00 .. FF         chunk files, see `layout.py`

The server's UUID lives here and nowhere else: a server *is* its disks.
"""

import contextlib
import errno
import fcntl
import os
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cbor2
import structlog

from raftfs.chunk import layout
from raftfs.chunk.diskhealth import DiskHealth
from raftfs.chunk.door import FileDoor
from raftfs.chunk.unrest import UNREST
from raftfs.const import DISK_LEAVE_FREE
from raftfs.errors import UserError

log = structlog.get_logger("raftfs.disk")

LABEL = ".raftfs-disk"
LOCK = ".raftfs-lock"
_FORMAT = 2  # 1 was never released: its header could be torn by a power cut
_LABEL_MAX = 4096
_FOLDERS = [f"{number:02X}" for number in range(256)]


class Disk:
    """A folder for chunks, locked for this process until `close`."""

    def __init__(
        self, path: Path, *, leave_free: int = DISK_LEAVE_FREE, limit: int = 0, leaving: str = ""
    ) -> None:
        """UserError if the folder cannot be used, is in use, or its label is no good. `limit` and
        `leaving` as in `conf.hdd.HddLine`.
        """
        self.path = path
        self.used_at = 0.0  # when a client's request came last (monotonic)
        self.leave_free, self.limit, self.leaving = leave_free, limit, leaving
        self.is_pushed = False  # what is left on it must go to other servers
        self._label_lock = threading.Lock()
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise UserError(_unusable(path, e)) from None
        try:
            self._take_lock()
            self.label = self._read_label()
            self.device = os.stat(path).st_dev
            self.health = DiskHealth(path)
        except BaseException:
            os.close(self._lock)
            raise

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._lock, 32, 0).decode("ascii", "replace").strip()
            raise UserError(
                f"disk folder {self.path} is in use by another chunkserver "
                f"(process {holder or 'unknown'}): stop that one, or give another folder"
            ) from None
        except OSError as e:
            raise UserError(
                f"disk folder {self.path} cannot be locked ({e.strerror}): its file system must "
                "support flock"
            ) from None
        try:
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
        except OSError as e:
            if e.errno != errno.ENOSPC:  # a full disk can still be read
                raise UserError(_unusable(self.path, e)) from None

    # --- label

    def _read_label(self) -> dict[str, Any]:
        place = self.path / LABEL
        try:
            with open(place, "rb") as file:
                raw = file.read(_LABEL_MAX)
        except FileNotFoundError:
            if any(self.path.glob("??/chunk_*.mfs")):
                raise UserError(
                    f"disk folder {self.path} has chunks but no {LABEL}: it cannot be told to "
                    "which server and cluster they belong; restore it, or give an empty folder"
                ) from None
            self._refuse_strangers()
            return {
                "format": _FORMAT, "disk": uuid.uuid4().bytes, "server": b"", "cluster": b"",
                "term": 0,
            }  # fmt: skip
        except OSError as e:
            raise UserError(f"{place} cannot be read: {e.strerror}") from None
        return _checked_label(raw, place)

    def _refuse_strangers(self) -> None:
        """A new disk is an empty folder, or what a stop while it was claimed left of it."""
        ours = {LOCK, LABEL + ".new", UNREST, UNREST + ".new", "lost+found", *_FOLDERS}
        strangers = {p.name for p in self.path.iterdir()} - ours
        if strangers:
            raise UserError(
                f"disk folder {self.path} is not empty ({min(strangers)}, ...) and no disk of "
                "raftfs: give an empty folder"
            )

    def claim(self, server: bytes, cluster: bytes) -> None:
        """Write down, durably, to whom the disk belongs; makes the 256 folders. UserError."""
        with self._label_lock:
            try:
                for name in _FOLDERS:
                    (self.path / name).mkdir(exist_ok=True)
                self._write_label(self.label | {"server": server, "cluster": cluster})
            except OSError as e:
                raise UserError(_unusable(self.path, e)) from None

    def remember_term(self, term: int) -> None:
        """Durable when this returns: no order of a lower term is obeyed, ever. OSError."""
        with self._label_lock:
            if term > self.label["term"]:
                self._write_label(self.label | {"term": term})

    def _write_label(self, label: dict[str, Any]) -> None:
        new = self.path / (LABEL + ".new")
        with open(new, "wb") as file:
            file.write(cbor2.dumps(label, canonical=True))
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.path / LABEL)
        FileDoor().sync_folder(self.path)
        self.label = label

    # --- files

    def copies(self) -> Iterator[tuple[int, int]]:
        """Chunk and version of every file, by name alone; unfinished replications are removed.

        Files under names that cannot be theirs are left for `strangers.py`.
        """
        for name in _FOLDERS:
            with contextlib.suppress(FileNotFoundError), os.scandir(self.path / name) as entries:
                for entry in entries:
                    found = layout.parse_name(entry.name)
                    if found is not None and layout.folder_of(found[0]) == name:
                        yield found
                    elif entry.name.endswith(layout.PART_SUFFIX):
                        os.unlink(entry.path)

    def files(self) -> Iterator[Path]:
        """Every file in the chunks' folders, whatever its name; no unfinished replications."""
        for name in _FOLDERS:
            with contextlib.suppress(FileNotFoundError), os.scandir(self.path / name) as entries:
                for entry in entries:
                    whole = not entry.name.endswith(layout.PART_SUFFIX)
                    if whole and entry.is_file(follow_symlinks=False):
                        yield Path(entry.path)

    def space(self) -> tuple[int, int]:
        """Bytes in all (at most the limit) and bytes used of the disk's file system. OSError if
        the disk is gone.
        """
        stat = os.statvfs(self.path)
        total = stat.f_blocks * stat.f_frsize
        used = total - stat.f_bavail * stat.f_frsize
        if self.limit:  # what must stay free stays, too
            total = min(self.limit, total - self.leave_free)
        return max(total, used), used

    def room(self) -> int:
        """Bytes that new copies may take: what is free, less what must stay free. None on a disk
        that is damaged or marked for removal.
        """
        if self.leaving or self.health.evidence:
            return 0
        try:
            total, used = self.space()
        except OSError as e:
            log.error("disk does not answer", disk=str(self.path), reason=str(e))
            return 0
        return max(0, total - used - (0 if self.limit else self.leave_free))

    def close(self) -> None:
        """Unlock."""
        os.close(self._lock)


def _checked_label(raw: bytes, place: Path) -> dict[str, Any]:
    try:
        label = cbor2.loads(raw)
    except (cbor2.CBORError, ValueError, EOFError):
        label = None
    if isinstance(label, dict) and label.get("format", _FORMAT) != _FORMAT:
        raise UserError(
            f"{place} is of format {label['format']}, this program reads format {_FORMAT}: use the "
            "program that made it, or give an empty folder"
        )
    shape = {"format": int, "disk": bytes, "server": bytes, "cluster": bytes, "term": int}
    if (
        not isinstance(label, dict)
        or any(not isinstance(label.get(k), t) for k, t in shape.items())
        or len(label["disk"]) != 16
        or len(label["server"]) != 16
        or len(label["cluster"]) not in (0, 16)
    ):
        raise UserError(f"{place} is damaged: restore it from a backup, or give an empty folder")
    return label


def _unusable(path: Path, error: OSError) -> str:
    return (
        f"disk folder {path} cannot be used: {error.strerror}; it must be a folder that this user "
        "may write"
    )
