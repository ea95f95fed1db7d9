"""A disk in memory for the journal: what was written, what is durable, and calls that fail."""

from pathlib import Path
from typing import Any

from raftfs.meta.raft.segments import Files


class PowerCut(Exception):
    """The machine stops at this call."""


class FakeFiles(Files):
    """`fail_at` n: the n-th call that changes something raises `error` instead (1 is the first)."""

    def __init__(self, fail_at: int = 0, error: type[BaseException] = PowerCut) -> None:
        self.content: dict[str, bytearray] = {}
        self.durable: dict[str, bytes] = {}
        self.names_durable: set[str] = set()
        self.calls = 0
        self._fail_at, self._error = fail_at, error

    def _call(self) -> None:
        self.calls += 1
        if self.calls == self._fail_at:
            raise self._error(5, "injected")

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
        self._call()
        self.content[path.name] = bytearray(size)
        self.durable[path.name] = bytes(size)
        return path.name

    def write(self, handle: Any, data: bytes, offset: int) -> None:
        """Into the page cache."""
        self._call()
        file = self.content[handle]
        file.extend(bytes(max(0, offset + len(data) - len(file))))
        file[offset : offset + len(data)] = data

    def sync(self, handle: Any) -> None:
        """Onto the disk."""
        self._call()
        self.durable[handle] = bytes(self.content[handle])

    def sync_folder(self, folder: Path) -> None:
        """Names are durable now."""
        self._call()
        self.names_durable = set(self.content)

    def replace(self, path: Path, data: bytes) -> None:
        """All of it, or nothing."""
        self._call()
        self.content[path.name] = bytearray(data)
        self.durable[path.name] = data
        self.names_durable.add(path.name)

    def unlink(self, path: Path) -> None:
        """Gone at once (the worst case: the folder need not be synced for it)."""
        self._call()
        del self.content[path.name]

    def close(self, handle: Any) -> None:
        """Nothing."""

    def after_power_cut(self) -> "FakeFiles":
        """The disk as the next start finds it: only what was synced."""
        new = FakeFiles()
        names = self.names_durable & set(self.content)
        new.content = {n: bytearray(self.durable[n]) for n in names}
        new.durable = {n: bytes(c) for n, c in new.content.items()}
        new.names_durable = set(new.content)
        return new

    def after_kill(self) -> "FakeFiles":
        """The disk after kill -9: everything written is there."""
        new = FakeFiles()
        new.content = {n: bytearray(c) for n, c in self.content.items()}
        new.durable = {n: bytes(c) for n, c in new.content.items()}
        new.names_durable = set(new.content)
        return new
