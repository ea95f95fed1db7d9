"""The tools without a cluster: paths lead to nodes of the real, pure state machine."""

import errno
from collections.abc import Callable
from typing import Any

import pytest

from raftfs.cli import target
from raftfs.cli.target import Target, TargetError
from raftfs.errors import ReplyError
from raftfs.meta.state import read
from raftfs.meta.state.apply import apply_batch
from raftfs.meta.state.dictrows import DictRows
from raftfs.wire import messages as m
from raftfs.wire import ops
from raftfs.wire.ops import Batch, Command, NodeType
from raftfs.wire.rpc import decode

MIB = 2**20
SERVERS = [(b"a" * 16, "10.77.0.11"), (b"b" * 16, "10.77.0.12"), (b"c" * 16, "10.77.0.13")]


class FakeTree:
    """A small tree as in the recorded sessions, and what the masters would answer about it."""

    def __init__(self) -> None:
        self.rows = DictRows()
        self._index = 0
        self.inodes: dict[str, int] = {}
        self.copies: dict[int, list[m.Location]] = {}
        self.apply(ops.Found(b"c" * 16, {}))
        self.apply(ops.NewSession(b"s", "test"))
        for name in ("file", "file2"):
            self.make(name, NodeType.FILE)
        self.make("fifo", NodeType.FIFO)
        for name in ("dir", "dir/sub"):
            self.make(name, NodeType.DIR)
        for name in ("dir/a", "dir/big", "dir/sub/b", "dir/sub/empty"):
            self.make(name, NodeType.FILE)

    def apply(self, op: ops.Op, session: int = 0) -> bytes:
        """One operation that must succeed."""
        self._index += 1
        batch = Batch(10**18 + self._index, [Command(session, 0, op)])
        result = apply_batch(self.rows, self._index, batch)[0].result
        if result.status:
            raise ReplyError(result.status)
        return result.value

    def make(self, path: str, kind: int, uid: int = 0) -> int:
        """A node under a path."""
        parent, _, name = path.rpartition("/")
        above = self.inodes[parent] if parent else 1
        op = ops.Create(above, name.encode(), kind, 0o644, 0, uid, 0)
        self.inodes[path] = decode(ops.Attr, self.apply(op)).inode
        return self.inodes[path]

    def write(self, path: str, length: int, servers: tuple[int, ...]) -> None:
        """Give a file chunks with copies on some servers."""
        inode = self.inodes[path]
        for index in range(-(-length // (64 * MIB))):
            granted = decode(ops.Granted, self.apply(ops.GrantWrite(inode, index, False), 1))
            done = [ops.Written(granted.chunk, granted.lock, True)]
            self.apply(ops.CommitWrite(inode, min(length, (index + 1) * 64 * MIB), -1, done), 1)
            self.copies[granted.chunk] = [
                m.Location(SERVERS[s][0], SERVERS[s][1], 9422, 1) for s in servers
            ]

    def call(self, ask: Any, timeout_s: float | None = None) -> Any:
        """What the leader answers."""
        if isinstance(ask, m.GetGoal):
            return self._goals(ask)
        if isinstance(ask, m.SetGoalTree):
            return self._set_goals(ask)
        assert isinstance(ask, m.FileChunks)
        return [
            m.FileChunk(i, row.id, row.version, self.copies.get(row.id, [])) if row
            else m.FileChunk(i, 0, 0, [])
            for i, row in read.file_chunks(self.rows, ask.inode, ask.first, 1000)
        ]  # fmt: skip

    def _nodes(self, inode: int, deep: bool) -> list[ops.Attr]:
        found = list(read.walk(self.rows, inode)) if deep else [read.getattr(self.rows, inode)]
        with_goal = [a for a in found if a.type in (NodeType.FILE, NodeType.DIR)]
        if not with_goal:
            raise ReplyError(errno.EPERM)
        return with_goal

    def _goals(self, ask: m.GetGoal) -> m.GoalTable:
        table = m.GoalTable({}, {})
        for attr in self._nodes(ask.inode, ask.recursive):
            counts = table.dirs if attr.type == NodeType.DIR else table.files
            counts[attr.goal] = counts.get(attr.goal, 0) + 1
        return table

    def _set_goals(self, ask: m.SetGoalTree) -> ops.GoalCounts:
        sums = [0, 0, 0]
        for attr in self._nodes(ask.inode, ask.recursive):
            value = self.apply(ops.SetGoal(attr.inode, ask.uid, ask.goal, ask.mode))
            counts = decode(ops.GoalCounts, value)
            for at, number in enumerate((counts.changed, counts.unchanged, counts.denied)):
                sums[at] += number
        return ops.GoalCounts(*sums)


Tool = Callable[..., tuple[int, str, str]]


def runner(
    tree: FakeTree, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Tool:
    """A function that runs a tool's main: `run(main, *words)` -> status, stdout, stderr."""

    def find(name: str) -> Target:
        if name.startswith("/"):
            raise TargetError("not MFS object")
        if name not in tree.inodes:
            raise TargetError(
                f"realpath error on (/mnt/{name}): ENOENT (No such file or directory)"
            )
        return Target("masters", 1, tree.inodes[name])

    monkeypatch.setattr(target, "find", find)
    monkeypatch.setattr(target.Clients, "of", lambda self, t: tree)
    monkeypatch.delenv("MFSHRFORMAT", raising=False)

    def run(main: Callable[[list[str]], int], *words: str) -> tuple[int, str, str]:
        status = main(list(words))
        out, err = capsys.readouterr()
        return status, out, err

    return run
