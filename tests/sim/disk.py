"""The disk of a simulated machine: what was written, what is durable, and how it fails.

A power cut keeps any of the sectors that were not synced, the names that were, and forgets the last
removals. A planned failure strikes at the n-th change from now on.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raftfs.meta.raft import segments
from raftfs.meta.raft.segments import Files

SECTOR = 512


class Disk(Files):
    """The journal's files of one machine."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._content: dict[str, bytearray] = {}
        self._unsynced: list[tuple[str, int, bytes]] = []  # file, offset, what was there before
        self._new: set[str] = set()  # names that are not durable
        self._removed: list[tuple[str, bytearray]] = []  # removals that are not durable
        self._left = 0
        self._strike: Callable[[], None] | None = None

    @property
    def empty(self) -> bool:
        """Nothing was ever written."""
        return not self._content

    def strike_after(self, changes: int, strike: Callable[[], None]) -> None:
        """`strike` is called at a change to come; it may raise."""
        self._left, self._strike = changes, strike

    def repair(self) -> None:
        """Nothing is planned any more."""
        self._strike = None

    def _changing(self) -> None:
        self._left -= 1
        if self._left <= 0 and self._strike is not None:
            strike, self._strike = self._strike, None
            strike()

    # --- Files

    def names(self, folder: Path) -> list[str]:
        """All files."""
        return sorted(self._content)

    def read(self, path: Path) -> bytes:
        """Content."""
        return bytes(self._content[path.name])

    def read_at(self, path: Path, offset: int, length: int) -> bytes:
        """A part of it."""
        return bytes(self._content[path.name][offset : offset + length])

    def create(self, path: Path, size: int) -> Any:
        """Zeros, durable; the name is not yet."""
        self._changing()
        self._content[path.name] = bytearray(size)
        self._new.add(path.name)
        return path.name

    def write(self, handle: Any, data: bytes, offset: int) -> None:
        """Into the page cache."""
        file = self._content[handle]
        file.extend(bytes(max(0, offset + len(data) - len(file))))
        for at in range(offset // SECTOR * SECTOR, offset + len(data), SECTOR):
            self._unsynced.append((handle, at, bytes(file[at : at + SECTOR])))
        file[offset : offset + len(data)] = data
        self._changing()

    def sync(self, handle: Any) -> None:
        """Onto the disk."""
        self._changing()
        self._unsynced = [u for u in self._unsynced if u[0] != handle]

    def sync_folder(self, folder: Path) -> None:
        """Names and removals are durable now."""
        self._changing()
        self._new.clear()
        self._removed.clear()

    def replace(self, path: Path, data: bytes) -> None:
        """All of it, or nothing."""
        self._changing()
        self._content[path.name] = bytearray(data)

    def unlink(self, path: Path) -> None:
        """Gone, unless the power goes before the folder is synced."""
        self._removed.append((path.name, self._content.pop(path.name)))
        self._changing()

    def close(self, handle: Any) -> None:
        """Nothing."""

    # --- faults

    def killed(self) -> None:
        """The kernel has everything that was written."""
        self._unsynced.clear()
        self._new.clear()
        self._removed.clear()

    def power_cut(self) -> int:
        """Sectors come and go; the file system's own log keeps names in the order of their changes.
        Gives how many sectors were torn away.
        """
        lost = 0
        for name, at, before in reversed(self._unsynced):
            if name in self._content and self._chance.random() < 0.5:
                lost += 1
                self._content[name][at : at + len(before)] = before
        for name in sorted(self._new):
            if self._chance.random() < 0.5:
                self._content.pop(name, None)
        back = self._chance.randint(0, len(self._removed))
        self._content.update(self._removed[len(self._removed) - back :])
        self.killed()
        return lost

    def flip(self) -> bool:
        """One bit of what has been durable for long (not of the last blob, which may always be a
        torn one). False if there is none.
        """
        places = []
        for name in sorted(self._content):
            data, at = bytes(self._content[name]), 0
            while (blob := segments.blob_at(data, at)) is not None:
                size = segments.BLOB_HEAD + len(blob[1])
                places.append((name, at, size))
                at += size
        if len(places) < 2:
            return False
        name, at, size = self._chance.choice(places[:-1])
        self._content[name][at + self._chance.randrange(size)] ^= 1 << self._chance.randrange(8)
        return True
