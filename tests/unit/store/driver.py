"""A MetaStore driven as a replica drives it."""

from pathlib import Path
from typing import Any

import msgspec

from raftfs.meta.store import MetaStore
from raftfs.wire import ops
from raftfs.wire.ops import Batch, Command, encode_batch


class Driver:
    """Feeds entries; remembers the log, so that it can be replayed."""

    def __init__(self, path: Path, log: list[bytes] | None = None) -> None:
        self.path, self.log = path, [] if log is None else log
        self.store = MetaStore(path)
        for data in self.log[self.store.applied[0] :]:
            self.store.apply_entry(self.store.applied[0] + 1, 1, data)
        if not self.log:
            self.do(ops.Found(b"c" * 16, {"a:1": b"1" * 16}), session=0)
            self.do(ops.NewSession(b"s", "x"), session=0)

    def do(self, op: Any, session: int = 1, seq: int = 0) -> int:
        """One command in one entry; gives the status."""
        time = 10**18 + len(self.log)
        self.log.append(encode_batch(Batch(time, [Command(session, seq, op)])))
        applied = self.store.apply_entry(len(self.log), 1, self.log[-1])
        self.value = applied[0].result.value
        return applied[0].result.status

    def create(self, name: bytes) -> int:
        """A file's inode."""
        assert self.do(ops.Create(1, name, 1, 0o644, 0, 0, 0)) == 0
        return msgspec.msgpack.decode(self.value, type=ops.Attr).inode

    def checkpoint(self) -> None:
        """All of a checkpoint at once."""
        if self.store.freeze():
            self.store.write_frozen()
            self.store.thaw()

    def reopen(self) -> "Driver":
        """As after a crash: the overlay is gone, the journal is replayed."""
        self.store.close()
        return Driver(self.path, self.log)
