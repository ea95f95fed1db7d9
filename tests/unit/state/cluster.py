"""A state machine for tests: one call is one command in one entry."""

from typing import Any

import msgspec

from raftfs.meta.state import invariants
from raftfs.meta.state.apply import Applied, apply_batch
from raftfs.meta.state.dictrows import DictRows
from raftfs.wire import ops
from raftfs.wire.ops import Batch, Command

RESULTS: dict[type, Any] = {
    ops.Create: ops.Attr, ops.Symlink: ops.Attr, ops.Link: ops.Attr, ops.SetAttr: ops.Attr,
    ops.Length: ops.Attr, ops.CommitWrite: ops.Attr, ops.Acquire: ops.Attr,
    ops.Unlink: ops.Removed, ops.Rmdir: ops.Removed, ops.Rename: ops.Removed,
    ops.GrantWrite: ops.Granted, ops.SetGoal: ops.GoalCounts,
}  # fmt: skip


class Cluster:
    """A founded cluster with two sessions, 1 and 2."""

    def __init__(self) -> None:
        self.rows = DictRows()
        self.index = 0
        self.lines: list[tuple[int, Applied]] = []
        self.do(ops.Found(b"c" * 16, {"a:1": b"1" * 16}), session=0)
        for _ in range(2):
            self.do(ops.NewSession(b"secret", "host:/mnt"), session=0)

    def apply(self, op: Any, session: int = 1, seq: int = 0) -> Applied:
        """Apply; a refusal must leave the state as it was."""
        before = self.rows.digest()
        self.index += 1
        time = 10**18 + self.index
        applied = apply_batch(self.rows, self.index, Batch(time, [Command(session, seq, op)]))[0]
        if applied.result.status:
            assert self.rows.digest() == before, "a refused operation changed something"
        if applied.version:
            self.lines.append((time, applied))
        invariants.check_all(self.rows)
        return applied

    def do(self, op: Any, session: int = 1, seq: int = 0) -> Any:
        """Apply what must succeed; gives the decoded result."""
        result = self.apply(op, session, seq).result
        assert result.status == 0, f"{op}: {result.status}"
        return msgspec.msgpack.decode(result.value, type=RESULTS.get(type(op), Any))

    def refused(self, op: Any, session: int = 1, seq: int = 0) -> int:
        """Apply what must fail; gives the status."""
        status = self.apply(op, session, seq).result.status
        assert status, f"{op} succeeded"
        return status

    def file(self, name: bytes = b"f", parent: int = 1, mode: int = 0o644) -> int:
        """A new file's inode."""
        inode: int = self.do(ops.Create(parent, name, 1, mode, 0, 5, 6)).inode
        return inode

    def dir(self, name: bytes = b"d", parent: int = 1, mode: int = 0o755) -> int:
        """A new directory's inode."""
        inode: int = self.do(ops.Create(parent, name, 2, mode, 0, 5, 6)).inode
        return inode
