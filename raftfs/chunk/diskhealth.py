"""When a disk is taken for damaged: so many I/O errors within so long, and which they were.

    .raftfs-damaged    the evidence, as lines of text; there only while the disk is damaged

What is on a damaged disk does not count for the masters, and nothing new is put there. It stays so
over restarts, until an administrator has the disk tested again.
"""

import os
import time
from collections import deque
from pathlib import Path

import structlog

from raftfs.chunk.door import FileDoor

log = structlog.get_logger("raftfs.disk")

NAME = ".raftfs-damaged"
ERRORS_MAX = 3  # one bad sector is one copy's end, not the disk's
WINDOW_S = 600.0
_TEXT_MAX = 4096
_TEST_NAME = ".raftfs-test"
_TEST_SIZE = 1024 * 1024


class DiskHealth:
    """The errors of one disk. Thread-safe: single steps on a deque."""

    def __init__(self, disk: Path) -> None:
        self._disk = disk
        self._errors: deque[tuple[float, str]] = deque(maxlen=ERRORS_MAX)
        self.evidence = self._kept()

    def _kept(self) -> str:
        try:
            with open(self._disk / NAME, encoding="utf-8", errors="replace") as file:
                return file.read(_TEXT_MAX) or "damaged"
        except FileNotFoundError:
            return ""
        except OSError as e:
            return f"{self._disk / NAME}: {e.strerror}"

    def error(self, what: str) -> bool:
        """An I/O error; `what` names it and the file. True if the disk is damaged from now on."""
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
        self._errors.append((now, f"{stamp} {what}"))
        many = len(self._errors) == ERRORS_MAX and now - self._errors[0][0] <= WINDOW_S
        if self.evidence or not many:
            return False
        self.evidence = "\n".join(line for _, line in self._errors)[:_TEXT_MAX]
        try:
            (self._disk / NAME).write_text(self.evidence, encoding="utf-8")
        except OSError as e:  # as may be expected of such a disk; it will give errors again
            log.warning("evidence not kept", disk=str(self._disk), reason=str(e))
        return True

    def test(self, door: FileDoor) -> None:
        """Write, sync and read a file, and forget the errors if that works. OSError if not."""
        path = self._disk / _TEST_NAME
        written = os.urandom(_TEST_SIZE)
        found = memoryview(bytearray(_TEST_SIZE))
        door.unlink(path)
        fd = door.create(path)
        try:
            door.pwrite(fd, [written], 0)
            door.sync(fd)
            door.forget_cached(fd, 0, _TEST_SIZE)
            if door.pread(fd, found, 0) < _TEST_SIZE or found != written:
                raise OSError(f"{path}: other bytes were read than had been written")
        finally:
            door.close(fd)
            door.unlink(path)
        door.unlink(self._disk / NAME)
        self._errors.clear()
        self.evidence = ""
