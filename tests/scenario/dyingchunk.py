"""A chunkserver whose disks die on command: `python -m tests.scenario.dyingchunk FILE OPTIONS...`.

While FILE exists, every call on a file below one of the folders that it names, a line each, fails
with EIO. The rest is the real program.
"""

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raftfs.chunk import main, store
from raftfs.chunk.door import FileDoor

WHEN = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("/nonexistent")


class DyingDoor(FileDoor):
    """See the module."""

    def __init__(self) -> None:
        self._paths: dict[int, str] = {}

    def _touch(self, path: str) -> None:
        try:
            sick = WHEN.read_text().split()
        except FileNotFoundError:
            return
        if any(path.startswith(folder + "/") for folder in sick):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    def create(self, path: Path) -> int:
        """As the real one, unless the disk is dying."""
        self._touch(str(path))
        fd = super().create(path)
        self._paths[fd] = str(path)
        return fd

    def open(self, path: Path) -> int:
        """As the real one, unless the disk is dying."""
        self._touch(str(path))
        fd = super().open(path)
        self._paths[fd] = str(path)
        return fd

    def pread(self, fd: int, into: memoryview, offset: int) -> int:
        """As the real one, unless the disk is dying."""
        self._touch(self._paths[fd])
        return super().pread(fd, into, offset)

    def pwrite(self, fd: int, parts: Sequence[Any], offset: int) -> None:
        """As the real one, unless the disk is dying."""
        self._touch(self._paths[fd])
        super().pwrite(fd, parts, offset)

    def sync(self, fd: int) -> None:
        """As the real one, unless the disk is dying."""
        self._touch(self._paths[fd])
        super().sync(fd)

    def rename(self, old: Path, new: Path) -> None:
        """As the real one, unless the disk is dying."""
        self._touch(str(old))
        super().rename(old, new)

    def unlink(self, path: Path) -> None:
        """As the real one, unless the disk is dying."""
        self._touch(str(path))
        super().unlink(path)


if __name__ == "__main__":
    store.FileDoor = DyingDoor  # type: ignore[misc]
    raise SystemExit(main.main(sys.argv[2:]))
