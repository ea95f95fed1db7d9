"""The namespace against an independent model, on two containers, with checkpoints and crashes.

The model is a tree of plain Python objects that knows POSIX and nothing of rows. Hypothesis prints
the steps of a failure; to reproduce one: pytest tests/model --hypothesis-seed=N
"""

import errno
import shutil
import tempfile
from pathlib import Path
from typing import Any

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from raftfs.meta.state import invariants, read
from raftfs.meta.state.apply import apply_batch
from raftfs.meta.state.dictrows import DictRows
from raftfs.meta.store import MetaStore
from raftfs.wire import ops
from raftfs.wire.ops import Batch, Command, decode_batch, encode_batch

NAMES = st.sampled_from([b"a", b"b", b"c", b"\xff%,"])
PLACE = st.integers(0, 5)  # picks one of the directories there are
SESSIONS = st.sampled_from([1, 2])


class Thing:
    """A file (entries None) or a directory of the model."""

    def __init__(self, inode: int, is_dir: bool) -> None:
        self.inode = inode
        self.entries: dict[bytes, Thing] | None = {} if is_dir else None
        self.links = 0


class Model:
    """What POSIX says. Methods give an errno, or 0."""

    def __init__(self) -> None:
        self.root = Thing(1, True)
        self.held: dict[int, set[int]] = {}

    def dirs(self, top: Thing | None = None) -> list[Thing]:
        """Every directory."""
        top = top or self.root
        below = [d for t in (top.entries or {}).values() if t.entries is not None
                 for d in self.dirs(t)]  # fmt: skip
        return [top, *below]

    def remove(self, where: Thing, name: bytes, *, is_dir: bool) -> int:
        """unlink and rmdir."""
        assert where.entries is not None
        thing = where.entries.get(name)
        if thing is None:
            return errno.ENOENT
        if is_dir and thing.entries is None:
            return errno.ENOTDIR
        if not is_dir and thing.entries is not None:
            return errno.EISDIR
        if thing.entries:
            return errno.ENOTEMPTY
        del where.entries[name]
        thing.links -= 1
        return 0

    def rename(self, src: Thing, a: bytes, dst: Thing, b: bytes, flags: int) -> int:
        """renameat2."""
        assert src.entries is not None and dst.entries is not None
        moved, there = src.entries.get(a), dst.entries.get(b)
        if moved is None:
            return errno.ENOENT
        if moved.entries is not None and dst in self.dirs(moved):
            return errno.EINVAL
        if flags == 2:
            if there is None:
                return errno.ENOENT
            if there.entries is not None and there is not moved and src in self.dirs(there):
                return errno.EINVAL
            src.entries[a], dst.entries[b] = there, moved
            return 0
        if there is not None and flags == 1:
            return errno.EEXIST
        if there is moved:
            return 0
        if there is not None:
            if moved.entries is None and there.entries is not None:
                return errno.EISDIR
            if moved.entries is not None and there.entries is None:
                return errno.ENOTDIR
            if there.entries:
                return errno.ENOTEMPTY
            there.links -= 1
        del src.entries[a]
        dst.entries[b] = moved
        return 0


class Namespace(RuleBasedStateMachine):
    """Random operations on the model, on MetaStore and on DictRows."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="raftfs-model-"))
        self.store, self.rows = MetaStore(self.folder / "s"), DictRows()
        self.log: list[bytes] = []
        self.model, self.seq = Model(), 0
        self.apply(ops.Found(b"c" * 16, {}), 0)
        self.apply(ops.NewSession(b"", ""), 0)
        self.apply(ops.NewSession(b"", ""), 0)

    def teardown(self) -> None:
        """Replay everything on fresh rows, then clean up."""
        fresh = DictRows()
        for index, data in enumerate(self.log, 1):
            apply_batch(fresh, index, decode_batch(data))
        assert fresh.digest() == self.rows.digest()
        self.store.close()
        shutil.rmtree(self.folder)

    def apply(self, op: Any, session: int = 1) -> tuple[int, bytes]:
        """One entry holding the command and its retry: the retry must answer the same."""
        self.seq += 1
        command = Command(session, self.seq if session else 0, op)
        twice = [command, command] if session else [command]
        self.log.append(encode_batch(Batch(10**18 + len(self.log), twice)))
        applied = self.store.apply_entry(len(self.log), 1, self.log[-1])
        assert apply_batch(self.rows, len(self.log), decode_batch(self.log[-1])) == applied
        assert applied[0].result == applied[-1].result
        return applied[0].result.status, applied[0].result.value

    def place(self, at: int) -> Thing:
        """One of the directories."""
        dirs = self.model.dirs()
        return dirs[at % len(dirs)]

    @rule(at=PLACE, name=NAMES, is_dir=st.booleans(), hold=st.booleans(), session=SESSIONS)
    def create(self, at: int, name: bytes, is_dir: bool, hold: bool, session: int) -> None:
        where = self.place(at)
        hold = hold and not is_dir
        op = ops.Create(where.inode, name, 2 if is_dir else 1, 0o777, 0, 0, 0, 0, hold)
        status, value = self.apply(op, session)
        assert where.entries is not None
        assert status == (errno.EEXIST if name in where.entries else 0)
        if status == 0:
            thing = Thing(msgspec.msgpack.decode(value, type=ops.Attr).inode, is_dir)
            thing.links = 1
            where.entries[name] = thing
            if hold:
                self.model.held.setdefault(thing.inode, set()).add(session)

    @rule(at=PLACE, name=NAMES, to=PLACE, new=NAMES)
    def link(self, at: int, name: bytes, to: int, new: bytes) -> None:
        where, target = self.place(at), self.place(to)
        assert where.entries is not None and target.entries is not None
        thing = where.entries.get(name)
        if thing is None:
            return
        status, _ = self.apply(ops.Link(thing.inode, target.inode, new))
        if thing.entries is not None:
            assert status in (errno.EPERM, errno.EEXIST)
            return
        assert status == (errno.EEXIST if new in target.entries else 0)
        if status == 0:
            target.entries[new] = thing
            thing.links += 1

    @rule(at=PLACE, name=NAMES, is_dir=st.booleans())
    def remove(self, at: int, name: bytes, is_dir: bool) -> None:
        where = self.place(at)
        op: Any = ops.Rmdir if is_dir else ops.Unlink
        inode = where.inode
        assert self.apply(op(inode, name))[0] == self.model.remove(where, name, is_dir=is_dir)

    @rule(at=PLACE, a=NAMES, to=PLACE, b=NAMES, flags=st.sampled_from([0, 0, 1, 2]))
    def rename(self, at: int, a: bytes, to: int, b: bytes, flags: int) -> None:
        src, dst = self.place(at), self.place(to)
        status, _ = self.apply(ops.Rename(src.inode, a, dst.inode, b, flags))
        want = self.model.rename(src, a, dst, b, flags)
        # A directory that holds the source cannot be replaced: Linux says ENOTEMPTY before EISDIR.
        assert status == want or {status, want} == {errno.EISDIR, errno.ENOTEMPTY}

    @rule(session=SESSIONS)
    def release_all(self, session: int) -> None:
        for inode, holders in self.model.held.items():
            if session in holders:
                assert self.apply(ops.Release(inode), session)[0] == 0
                holders.discard(session)

    @rule()
    def checkpoint(self) -> None:
        if self.store.freeze():
            self.store.write_frozen()
            self.store.thaw()

    @rule()
    def crash(self) -> None:
        self.store.close()
        self.store = MetaStore(self.folder / "s")
        for index in range(self.store.applied[0] + 1, len(self.log) + 1):
            self.store.apply_entry(index, 1, self.log[index - 1])

    @invariant()
    def the_trees_are_equal(self) -> None:
        for thing in self.model.dirs():
            page = read.readdir(self.store, thing.inode, b"", 1000)
            assert thing.entries is not None
            want = sorted((n, t.inode) for n, t in thing.entries.items())
            assert [(n, a.inode) for n, a in page.entries] == want
            for name, attr in page.entries:
                if thing.entries[name].entries is None:
                    assert attr.nlink == thing.entries[name].links

    @invariant()
    def the_states_are_equal_and_sound(self) -> None:
        assert self.store.digest() == self.rows.digest()
        invariants.check_all(self.store)


Namespace.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestNamespace = Namespace.TestCase
