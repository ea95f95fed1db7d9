"""A file door that dies at a chosen step, and disks that forget what was not synced.

It works on real files and keeps beside them what would be left of them after a power cut: the
content at the last fdatasync of each file, the names at the last fsync of each folder. What was
done since may be on the disk or not, in sectors of 512 bytes, each of which holds the state of some
moment since; names come in the order of the operations on their folder, up to some point.
"""

import os
import random
from pathlib import Path

from raftfs.chunk.door import FileDoor

SECTOR = 512
PAGE = 4096


class Kill(BaseException):
    """The process ends here."""


class _Inode:
    def __init__(self) -> None:
        self.durable = b""
        # sector -> contents it had since; sizes the file had since
        self.sectors: dict[int, list[bytes]] = {}
        self.sizes: list[int] = []

    def after_power_cut(self, draw: random.Random) -> bytes:
        size = draw.choice([len(self.durable), *self.sizes])
        content = bytearray(self.durable[:size].ljust(size, b"\0"))
        everything = draw.random()
        for sector, states in self.sectors.items():
            if draw.random() < everything:
                start = sector * SECTOR
                state = draw.choice(states)[: max(0, size - start)]
                content[start : start + len(state)] = state
        return bytes(content)


class CrashDoor(FileDoor):
    """See the module. `die_at`: the step (1 for the first call that changes anything) to die in."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.steps = 0
        self.die_at: int | None = None
        self._dead = False
        self._fds: dict[int, _Inode] = {}
        self._inodes: dict[Path, _Inode] = {}  # as the running system sees the names
        self._durable: dict[Path, dict[Path, _Inode]] = {}  # folder -> names on the disk
        self._pending: dict[Path, list[dict[Path, _Inode]]] = {}  # folder -> states since

    def _step(self) -> bool:
        """Count. True: die in this call (whether it takes effect is up to the call)."""
        if self._dead:
            raise Kill
        self.steps += 1
        self._dead = self.steps == self.die_at
        return self._dead

    def _names_changed(self, folder: Path) -> None:
        here = {p: i for p, i in self._inodes.items() if p.parent == folder}
        self._pending.setdefault(folder, []).append(here)

    def create(self, path: Path) -> int:
        dying = self._step()
        if dying and self.draw.random() < 0.5:
            raise Kill
        fd = super().create(path)
        self._fds[fd] = self._inodes[path] = _Inode()
        self._names_changed(path.parent)
        if dying:
            raise Kill
        return fd

    def open(self, path: Path) -> int:
        if self._dead:
            raise Kill
        fd = super().open(path)
        self._fds[fd] = self._inodes[path]
        return fd

    def pwrite(self, fd: int, parts, offset: int) -> None:
        data = b"".join(parts)
        if self._step():
            # A kill ends a write between two pages.
            ends = [0, *range(PAGE - offset % PAGE, len(data), PAGE), len(data)]
            self._write(fd, data[: self.draw.choice(ends)], offset)
            raise Kill
        self._write(fd, data, offset)

    def _write(self, fd: int, data: bytes, offset: int) -> None:
        super().pwrite(fd, [data], offset)
        if data:
            self._note(fd, offset, len(data))

    def _note(self, fd: int, offset: int, length: int) -> None:
        inode = self._fds[fd]
        inode.sizes.append(os.fstat(fd).st_size)
        for sector in range(offset // SECTOR, (offset + length - 1) // SECTOR + 1):
            state = os.pread(fd, SECTOR, sector * SECTOR)
            inode.sectors.setdefault(sector, []).append(state)

    def truncate(self, fd: int, size: int) -> None:
        dying = self._step()
        if not dying or self.draw.random() < 0.5:
            old = os.fstat(fd).st_size
            super().truncate(fd, size)
            inode = self._fds[fd]
            inode.sizes.append(size)
            for sector in range(size // SECTOR, -(-old // SECTOR)):
                keep = os.pread(fd, SECTOR, sector * SECTOR)
                inode.sectors.setdefault(sector, []).append(keep.ljust(SECTOR, b"\0"))
        if dying:
            raise Kill

    def sync(self, fd: int) -> None:
        if self._step():
            raise Kill
        inode = self._fds[fd]
        inode.durable = os.pread(fd, os.fstat(fd).st_size, 0)
        inode.sectors, inode.sizes = {}, []

    def sync_folder(self, path: Path) -> None:
        if self._step():
            raise Kill
        self._durable[path] = {p: i for p, i in self._inodes.items() if p.parent == path}
        self._pending[path] = []

    def rename(self, old: Path, new: Path) -> None:
        dying = self._step()
        if not dying or self.draw.random() < 0.5:
            super().rename(old, new)
            self._inodes[new] = self._inodes.pop(old)
            self._names_changed(new.parent)
        if dying:
            raise Kill

    def unlink(self, path: Path) -> None:
        dying = self._step()
        if not dying or self.draw.random() < 0.5:
            super().unlink(path)
            if self._inodes.pop(path, None):
                self._names_changed(path.parent)
        if dying:
            raise Kill

    def flush_disk(self, path: Path) -> None:
        if self._dead:
            raise Kill

    def sync_disk(self, path: Path) -> None:
        if self._step():
            raise Kill
        for file, inode in self._inodes.items():
            inode.durable, inode.sectors, inode.sizes = file.read_bytes(), {}, []
        for folder in {p.parent for p in self._inodes} | set(self._durable) | set(self._pending):
            self._durable[folder] = {p: i for p, i in self._inodes.items() if p.parent == folder}
            self._pending[folder] = []

    def close(self, fd: int) -> None:
        self._fds.pop(fd)
        super().close(fd)

    # --- after the crash

    def arm(self, die_at: int | None) -> None:
        """Die at this step, counted from now."""
        self.steps, self.die_at = 0, die_at

    def revive(self) -> None:
        """A new process: the old one's descriptors are gone, the page cache is not."""
        for fd in list(self._fds):
            self.close(fd)
        self._dead = False
        self.arm(None)

    def power_cut(self) -> None:
        """Make the real files what the disk has, and all of it durable."""
        self.revive()
        for folder in sorted({*self._durable, *self._pending}):
            states = [self._durable.get(folder, {}), *self._pending.get(folder, [])]
            names = self.draw.choice(states)
            for path in [p for p in self._inodes if p.parent == folder]:
                path.unlink()
                del self._inodes[path]
            for path, inode in names.items():
                inode.durable = inode.after_power_cut(self.draw)
                inode.sectors, inode.sizes = {}, []
                path.write_bytes(inode.durable)
            self._inodes |= names
            self._durable[folder], self._pending[folder] = dict(names), []

    def wipe(self) -> None:
        """Begin again with no files."""
        self.revive()
        for path in self._inodes:
            path.unlink()
        self._inodes, self._durable, self._pending = {}, {}, {}
