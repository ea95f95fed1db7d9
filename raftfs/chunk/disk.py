"""A disk of a chunkserver: a folder that belongs to one server of one cluster, and its files."""

import contextlib
import fcntl
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cbor2
import structlog

from raftfs.chunk import layout
from raftfs.const import DISK_LEAVE_FREE
from raftfs.errors import UserError

log = structlog.get_logger("raftfs.disk")

_LABEL = ".raftfs-disk"
_FORMAT = 1


class FileDoor:
    """The chunk store's only door to files; tests put a faulty one in its place."""

    def open(self, path: Path, *, create: bool) -> int:
        """A descriptor for reading and writing."""
        flags = os.O_RDWR | (os.O_CREAT | os.O_EXCL if create else 0)
        return os.open(path, flags, 0o640)

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        """Up to `length` bytes."""
        return os.pread(fd, length, offset)

    def pwrite(self, fd: int, data: Any, offset: int) -> None:
        """All of `data`."""
        view = memoryview(data)
        while view:
            done = os.pwrite(fd, view, offset)
            view, offset = view[done:], offset + done

    def sync(self, fd: int) -> None:
        """fdatasync."""
        os.fdatasync(fd)

    def sync_folder(self, path: Path) -> None:
        """Make names durable."""
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, old: Path, new: Path) -> None:
        """Atomically."""
        os.rename(old, new)

    def unlink(self, path: Path) -> None:
        """Remove; absent is fine."""
        path.unlink(missing_ok=True)

    def close(self, fd: int) -> None:
        """Give the descriptor back."""
        os.close(fd)


class Disk:
    """A folder for chunks, locked for this process."""

    def __init__(self, path: Path) -> None:
        """UserError if the folder cannot be used or somebody else uses it."""
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as e:
            raise UserError(f"disk folder {path} cannot be used: {e.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise UserError(f"disk folder {path} is in use by another chunkserver") from None
        try:
            self.label = self._read_label()
        except UserError:
            os.close(self._lock)
            raise

    def _read_label(self) -> dict[str, Any]:
        try:
            raw = (self.path / _LABEL).read_bytes()
        except FileNotFoundError:
            if any(self.path.glob("??/chunk_*.mfs")):
                raise UserError(
                    f"disk folder {self.path} has chunks but no {_LABEL}: it cannot be told to "
                    "which server and cluster they belong"
                ) from None
            strangers = {p.name for p in self.path.iterdir()} - {".lock", "lost+found"}
            if strangers:
                raise UserError(
                    f"disk folder {self.path} is not empty ({min(strangers)}, ...) and no disk of "
                    "raftfs: give an empty folder"
                ) from None
            return {"format": _FORMAT, "disk": uuid.uuid4().bytes, "server": b"", "cluster": b""}
        except OSError as e:
            raise UserError(f"{self.path / _LABEL} cannot be read: {e.strerror}") from None
        try:
            label = cbor2.loads(raw)
            good = label["format"] == _FORMAT and len(label["server"]) == 16
        except (cbor2.CBORDecodeError, KeyError, TypeError, ValueError):
            good = False
        if not good:
            raise UserError(f"{self.path / _LABEL} is damaged or of another format")
        return dict(label)

    def claim(self, server: bytes, cluster: bytes) -> None:
        """Write down, durably, to whom the disk belongs; makes the 256 folders."""
        self.label |= {"server": server, "cluster": cluster}
        new = self.path / (_LABEL + ".new")
        try:
            with open(new, "wb") as file:
                file.write(cbor2.dumps(self.label, canonical=True))
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, self.path / _LABEL)
            for number in range(256):
                (self.path / f"{number:02X}").mkdir(exist_ok=True)
            FileDoor().sync_folder(self.path)
        except OSError as e:
            raise UserError(f"disk folder {self.path} is not writable: {e.strerror}") from None

    def copies(self) -> Iterator[tuple[int, int]]:
        """Chunk and version of every file, by name alone; leftovers of unfinished work go."""
        for number in range(256):
            with contextlib.suppress(FileNotFoundError), os.scandir(
                self.path / f"{number:02X}"
            ) as entries:
                for entry in entries:
                    found = layout.parse_name(entry.name)
                    if found is not None:
                        yield found
                    elif entry.name.endswith(".part"):
                        os.unlink(entry.path)

    def space(self) -> tuple[int, int]:
        """Bytes in all and bytes used, as far as this server may use the disk."""
        stat = os.statvfs(self.path)
        total = stat.f_blocks * stat.f_frsize
        free = stat.f_bavail * stat.f_frsize
        return total, total - free

    def full(self) -> bool:
        """Whether no new chunk may begin here."""
        total, used = self.space()
        return total - used < DISK_LEAVE_FREE

    def close(self) -> None:
        """Unlock."""
        os.close(self._lock)
