"""Random histories of a cluster: its changelog lines, and its digest after each of them."""

import random
from pathlib import Path
from typing import Any

import msgspec

from raftfs.meta.image import ImageHead, write_image
from raftfs.meta.state import changelog
from raftfs.meta.state.model import COUNTERS_KEY, Counters
from raftfs.meta.store import MetaStore
from raftfs.wire import ops
from raftfs.wire.ops import Batch, Command, Written, encode_batch

SECOND = 10**9
START = 1_800_000_000 * SECOND
_NAMES = [b"a", b"b", b"\xff%,", b"long" * 30]


class History:
    """A founded cluster that lives on a real state file and writes lines, one per second."""

    def __init__(self, folder: Path, seed: int = 1, name: str = "live.mdb") -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.store = MetaStore(folder / name)
        self.now = START
        self.lines: list[str] = []
        self.digests = [self.store.digest()]  # after line n
        self._seq = 0
        self._locks: list[tuple[int, ops.Granted]] = []
        self.apply(ops.Found(b"c" * 16, {"a:1": b"1" * 16}), session=0)
        for _ in range(2):
            self.apply(ops.NewSession(b"secret", "host:/mnt"), session=0)

    @property
    def version(self) -> int:
        """Number of the last line."""
        return len(self.lines)

    def apply(self, op: Any, session: int = 1, seq: int = 0) -> ops.Result:
        """One command in one entry."""
        self.now += SECOND
        data = encode_batch(Batch(self.now, [Command(session, seq, op)]))
        applied = self.store.apply_entry(self.store.applied[0] + 1, 1, data)[0]
        if applied.version:
            self.lines.append(
                changelog.render(applied.version, self.now, applied.command, applied.result)
            )
            self.digests.append(self.store.digest())
        return applied.result

    def checkpoint(self) -> None:
        """What is in the overlay goes into the file."""
        if self.store.freeze():
            self.store.write_frozen()
            self.store.thaw()

    def image(self, target: Path) -> ImageHead:
        """An image of the state now, made as a running replica would."""
        self.checkpoint()
        copy = self.folder / "copy.mdb"
        self.store.copy_to(copy)
        return write_image(copy, target, time_ns=self.now)

    def go_on(self, steps: int) -> None:
        """Random operations; some are refused."""
        for _ in range(steps):
            self._step()

    def reach(self, version: int) -> None:
        """Random operations until that line is there."""
        while self.version < version:
            self._step()

    def _step(self) -> None:
        draw = self.random
        row = self.store.get(COUNTERS_KEY)
        assert isinstance(row, Counters)
        inode, parent = draw.randrange(1, row.next_inode + 1), draw.choice([1, 1, 2, 3, 4])
        name, session = draw.choice(_NAMES), draw.choice([1, 2])
        self._seq += 1
        choices: list[Any] = [
            ops.Create(parent, name, draw.choice([1, 2]), 0o755, 0, 3, 4, 0, draw.random() < 0.3),
            ops.Symlink(parent, name, b"target", 1, 2), ops.Link(inode, parent, name),
            ops.Unlink(parent, name), ops.Rmdir(parent, name),
            ops.Rename(parent, name, draw.choice([1, 2]), draw.choice(_NAMES)),
            ops.SetAttr(inode, mode=0o640, atime=-1), ops.Length(inode, draw.randrange(10**6)),
            ops.Acquire(inode), ops.Release(inode), ops.SetGoal(inode, 0, draw.choice([1, 2, 3])),
            ops.GrantWrite(inode, draw.randrange(2), draw.random() < 0.5),
        ]  # fmt: skip
        op = draw.choice(choices)
        seq = self._seq if draw.random() < 0.7 else 0
        result = self.apply(op, session, seq)
        if seq and draw.random() < 0.1:
            self.apply(op, session, seq)  # a retry: kept answers are no lines
        if isinstance(op, ops.GrantWrite) and not result.status:
            granted = msgspec.msgpack.decode(result.value, type=ops.Granted)
            if granted.reserved:
                self.apply(ops.SetVersion(granted.chunk, granted.reserved, granted.lock), 0)
            if draw.random() < 0.8:
                written = Written(granted.chunk, granted.lock, draw.random() < 0.8)
                self.apply(ops.CommitWrite(inode, draw.randrange(10**7), -1, [written]), session)

    def write_file(self, name: bytes, parent: int = 1) -> int:
        """A file with one chunk that is still being written; gives its inode."""
        created = self.apply(ops.Create(parent, name, 1, 0o644, 0, 5, 6))
        inode = msgspec.msgpack.decode(created.value, type=ops.Attr).inode
        self.apply(ops.GrantWrite(inode, 0, False))
        return inode

    def write(self, path: Path, first: int, last: int, *more: str) -> Path:
        """A changelog file of some lines, and comments behind them."""
        path.write_text("".join(x + "\n" for x in (*self.lines[first - 1 : last], *more)))
        return path
