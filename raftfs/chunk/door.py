"""The chunk store's only door to files: tests put a faulty or recording one in its place."""

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

from raftfs.wire.frame import Buffer

_libc = ctypes.CDLL(None, use_errno=True)


class FileDoor:
    """Thin names for the system calls that the store uses. OSError as they give it.

    Durable on return: `sync` a file's content and size, `sync_folder` the names in a folder.
    Nothing else is.
    """

    def create(self, path: Path) -> int:
        """A descriptor of a new file. FileExistsError."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)

    def open(self, path: Path) -> int:
        """A descriptor of an existing file, for reading and writing."""
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def size(self, fd: int) -> int:
        """Length of the file in bytes."""
        return os.fstat(fd).st_size

    def pread(self, fd: int, into: memoryview, offset: int) -> int:
        """Fill `into`; gives the number of bytes, fewer only at the end of the file."""
        got = os.preadv(fd, [into], offset)
        while 0 < got < len(into):
            more = os.preadv(fd, [into[got:]], offset + got)
            if more == 0:
                break
            got += more
        return got

    def pwrite(self, fd: int, parts: Sequence[Buffer], offset: int) -> None:
        """All of `parts`, one after another."""
        want = sum(len(p) for p in parts)
        done = os.pwritev(fd, parts, offset)
        if done < want:
            rest = memoryview(b"".join(parts))
            while done < want:
                done += os.pwrite(fd, rest[done:], offset + done)

    def truncate(self, fd: int, size: int) -> None:
        """Cut the file to `size` bytes."""
        os.ftruncate(fd, size)

    def sync(self, fd: int) -> None:
        """fdatasync."""
        os.fdatasync(fd)

    def sync_folder(self, path: Path) -> None:
        """Make the names in a folder durable."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def forget_cached(self, fd: int, offset: int, length: int) -> None:
        """The next read of this range asks the disk. A hint."""
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)

    def flush_disk(self, path: Path) -> None:
        """Have the file system write out what it has, so that single syncs after it are cheap.

        A hint: promises nothing, and errors are told by the syncs that follow.
        """
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _libc.syncfs(fd)
        finally:
            os.close(fd)

    def sync_disk(self, path: Path) -> None:
        """All that was written to the folder's file system so far is on the disk."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if _libc.syncfs(fd):
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number), str(path))
        finally:
            os.close(fd)

    def rename(self, old: Path, new: Path) -> None:
        """Atomically."""
        os.rename(old, new)

    def unlink(self, path: Path) -> None:
        """Remove the name; absent is fine."""
        path.unlink(missing_ok=True)

    def close(self, fd: int) -> None:
        """Give the descriptor back."""
        os.close(fd)
