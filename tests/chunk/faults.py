"""A door to files that forgets, tears and stops: what a kill -9 and a power cut leave behind."""

import os
import random
from pathlib import Path
from typing import Any

from raftfs.chunk.disk import FileDoor

SECTOR = 512
_PAGE = 4096  # the kernel takes a write page by page


class Stopped(Exception):
    """The process was stopped at this call."""


class CrashDoor(FileDoor):
    """Real files; remembers of each what is durable, and stops at the `stop_at`-th change."""

    def __init__(self, rng: random.Random, stop_at: int = 0) -> None:
        self.rng, self.stop_at, self.calls = rng, stop_at, 0
        self.syncs = 0
        self._fds: dict[int, int] = {}  # descriptor -> inode
        self._images: dict[int, list[bytes]] = {}  # inode -> durable content, and each one since
        self._paths: dict[int, Path] = {}
        self._born: set[int] = set()  # inodes whose name is not durable
        self._moved: dict[int, Path] = {}  # inode -> its durable name

    def _step(self) -> bool:
        """Count a change; True at the one where the process stops."""
        self.calls += 1
        if self.stop_at and self.calls > self.stop_at:
            raise Stopped
        return self.calls == self.stop_at

    def _step_or_stop(self) -> None:
        if self._step():
            raise Stopped

    def open(self, path: Path, *, create: bool) -> int:
        """As the real one; an opened file counts as durable as it is."""
        if create:
            self._step_or_stop()
        fd = super().open(path, create=create)
        inode = os.fstat(fd).st_ino
        self._fds[fd], self._paths[inode] = inode, path
        if create:
            self._born.add(inode)
            self._images[inode] = [b""]
        else:
            self._images.setdefault(inode, [path.read_bytes()])
        return fd

    def pwrite(self, fd: int, data: Any, offset: int) -> None:
        """Stopped in the middle of a write, its first pages are there."""
        stop = self._step()
        view = memoryview(data)
        if stop:
            end = self.rng.randrange(offset, offset + len(view) + 1) // _PAGE * _PAGE
            view = view[: max(0, end - offset)]
        super().pwrite(fd, view, offset)
        inode = self._fds[fd]
        self._images[inode].append(self._paths[inode].read_bytes())
        if stop:
            raise Stopped

    def sync(self, fd: int) -> None:
        """What was written is durable."""
        self._step_or_stop()
        self.syncs += 1
        inode = self._fds[fd]
        self._images[inode] = self._images[inode][-1:]

    def sync_folder(self, path: Path) -> None:
        """What was named is durable."""
        self._step_or_stop()
        self._born = {i for i in self._born if self._paths[i].parent != path}
        self._moved = {i: p for i, p in self._moved.items() if p.parent != path}

    def rename(self, old: Path, new: Path) -> None:
        """Atomic, but not durable yet."""
        self._step_or_stop()
        super().rename(old, new)
        inode = new.stat().st_ino
        self._moved.setdefault(inode, old)
        self._paths[inode] = new

    def close(self, fd: int) -> None:
        """As the real one."""
        self._fds.pop(fd, None)
        super().close(fd)

    def kill(self) -> None:
        """kill -9: descriptors are gone, what was written stays."""
        for fd in list(self._fds):
            self.close(fd)

    def power_cut(self, *, torn: bool) -> None:
        """What is not durable is gone; torn: each sector is any state it had since."""
        self.kill()
        for inode, images in self._images.items():
            path = self._paths[inode]
            if inode in self._born and not (torn and self.rng.random() < 0.5):
                path.unlink()
                continue
            path.write_bytes(self._mixed(images) if torn else images[0])
            if inode in self._moved and not (torn and self.rng.random() < 0.5):
                path.rename(self._moved[inode])

    def _mixed(self, images: list[bytes]) -> bytes:
        size = self.rng.choice([len(i) for i in images])
        eager = self.rng.random()  # how much of what was not synced reached the disk
        out = bytearray()
        for at in range(0, size, SECTOR):
            image = images[0] if self.rng.random() > eager else self.rng.choice(images)
            out += image[at : min(at + SECTOR, size)].ljust(min(SECTOR, size - at), b"\0")
        return bytes(out)
