"""A disk in memory for the journal: what was written, what is durable, and calls that fail."""

import random
from pathlib import Path
from typing import Any

from raftfs.meta.raft.segments import Files

SECTOR = 512


class PowerCut(Exception):
    """The machine stops at this call."""


class FakeFiles(Files):
    """`fail_at` n: the n-th call that changes something raises `error` instead (1 is the first).
    `partly`: if that is a write, half of it happens.
    """

    def __init__(
        self, fail_at: int = 0, error: type[BaseException] = PowerCut, *, number: int = 5,
        partly: bool = False,
    ) -> None:  # fmt: skip
        self._number, self._partly = number, partly
        self.failed_in: list[str] = []  # the calls that failed
        self.gone: list[tuple[str, bytes]] = []  # unlinked, and the folder is not synced yet
        self.content: dict[str, bytearray] = {}
        self.durable: dict[str, bytes] = {}
        self.names_durable: set[str] = set()
        self.calls = 0
        self._fail_at, self._error = fail_at, error

    def _call(self, what: str) -> None:
        self.calls += 1
        if self.calls == self._fail_at:
            self.failed_in.append(what)
            raise self._error(self._number, "injected")

    def names(self, folder: Path) -> list[str]:
        """All files."""
        return list(self.content)

    def read(self, path: Path) -> bytes:
        """Content."""
        return bytes(self.content[path.name])

    def read_at(self, path: Path, offset: int, length: int) -> bytes:
        """A part of it."""
        return bytes(self.content[path.name][offset : offset + length])

    def create(self, path: Path, size: int) -> Any:
        """Zeros, durable; the name is not yet."""
        if self._partly and self.calls + 1 == self._fail_at:
            self.content[path.name] = bytearray(size // 2)
            self.durable[path.name] = bytes(size // 4)
        self._call("create")
        self.content[path.name] = bytearray(size)
        self.durable[path.name] = bytes(size)
        return path.name

    def write(self, handle: Any, data: bytes, offset: int) -> None:
        """Into the page cache."""
        if self._partly and self.calls + 1 == self._fail_at:
            self._put(handle, data[: len(data) // 2], offset)
        self._call("write")
        self._put(handle, data, offset)

    def _put(self, handle: Any, data: bytes, offset: int) -> None:
        file = self.content[handle]
        file.extend(bytes(max(0, offset + len(data) - len(file))))
        file[offset : offset + len(data)] = data

    def sync(self, handle: Any) -> None:
        """Onto the disk."""
        self._call("sync")
        self.durable[handle] = bytes(self.content[handle])

    def sync_folder(self, folder: Path) -> None:
        """Names are durable now."""
        self._call("sync_folder")
        self.gone.clear()
        self.names_durable = set(self.content)

    def replace(self, path: Path, data: bytes) -> None:
        """All of it, or nothing."""
        self._call("replace")
        self.content[path.name] = bytearray(data)
        self.durable[path.name] = data
        self.names_durable.add(path.name)

    def unlink(self, path: Path) -> None:
        """Gone at once (the worst case: the folder need not be synced for it)."""
        self._call("unlink")
        del self.content[path.name]
        if path.name in self.names_durable:
            self.gone.append((path.name, self.durable[path.name]))

    def close(self, handle: Any) -> None:
        """Nothing."""

    def after_power_cut(
        self, chance: random.Random | None = None, *, undone_unlinks: int = 0
    ) -> "FakeFiles":
        """The disk as the next start finds it: what was synced, and with `chance` also any of the
        sectors that were not. The last unlinks since the last sync of the folder may be undone.
        """
        new = FakeFiles()
        names = self.names_durable & set(self.content)
        new.content = {n: bytearray(self.durable[n]) for n in names}
        for name, content in self.gone[len(self.gone) - undone_unlinks :]:
            new.content[name] = bytearray(content)
        if chance is not None:
            for name in sorted(names):
                self._tear(new.content[name], self.content[name], chance)
        new.durable = {n: bytes(c) for n, c in new.content.items()}
        new.names_durable = set(new.content)
        return new

    def _tear(self, disk: bytearray, cache: bytearray, chance: random.Random) -> None:
        disk.extend(bytes(max(0, len(cache) - len(disk))))
        for at in range(0, len(cache), SECTOR):
            part = slice(at, at + SECTOR)
            if disk[part] != cache[part] and chance.random() < 0.5:
                disk[part] = cache[part]

    def after_kill(self) -> "FakeFiles":
        """The disk after kill -9: everything written is there."""
        new = FakeFiles()
        new.content = {n: bytearray(c) for n, c in self.content.items()}
        new.durable = {n: bytes(c) for n, c in new.content.items()}
        new.names_durable = set(new.content)
        return new
