"""Operations: what they do, what they refuse and with which errno, and that a retry does nothing.

`Cluster` checks after every step that the invariants hold and that a refusal changed nothing.
"""

import errno
from typing import Any

import pytest

from raftfs.const import CHUNK_SIZE, FILE_LENGTH_MAX
from raftfs.errors import ReplyError, StateDiffers, Status
from raftfs.meta.state import read
from raftfs.wire import ops
from raftfs.wire.ops import Written
from tests.unit.state.cluster import Cluster


@pytest.fixture
def c() -> Cluster:
    return Cluster()


def test_root(c: Cluster) -> None:
    root = read.getattr(c.rows, 1)
    assert (root.type, root.mode, root.uid, root.gid) == (2, 0o777, 0, 0)
    assert (root.nlink, root.goal) == (2, 2)


@pytest.mark.parametrize(
    ("name", "status"),
    [(b"", errno.EINVAL), (b".", errno.EINVAL), (b"..", errno.EINVAL), (b"a/b", errno.EINVAL),
     (b"a\0b", errno.EINVAL), (b"x" * 256, errno.ENAMETOOLONG)],
)  # fmt: skip
def test_bad_names_are_refused(c: Cluster, name: bytes, status: int) -> None:
    inode = c.file()
    assert c.refused(ops.Create(1, name, 1, 0o644, 0, 0, 0)) == status
    assert c.refused(ops.Symlink(1, name, b"t", 0, 0)) == status
    assert c.refused(ops.Link(inode, 1, name)) == status
    assert c.refused(ops.Rename(1, b"f", 1, name)) == status


def test_create_applies_umask_and_inherits_from_a_setgid_directory(c: Cluster) -> None:
    top = c.dir(mode=0o2775)
    c.do(ops.SetGoal(top, 0, 3))
    below = c.do(ops.Create(top, b"x", 2, 0o777, 0o022, 1, 2))
    assert (below.mode, below.gid, below.goal, below.nlink) == (0o2755, 6, 3, 2)
    file = c.do(ops.Create(top, b"y", 1, 0o666, 0o027, 1, 2))
    assert (file.mode, file.gid, file.goal, file.nlink) == (0o640, 6, 3, 1)
    assert read.getattr(c.rows, top).nlink == 3


def test_create_refusals(c: Cluster) -> None:
    file = c.file()
    assert c.refused(ops.Create(1, b"f", 1, 0, 0, 0, 0)) == errno.EEXIST
    assert c.refused(ops.Create(99, b"x", 1, 0, 0, 0, 0)) == errno.ENOENT
    assert c.refused(ops.Create(file, b"x", 1, 0, 0, 0, 0)) == errno.ENOTDIR
    assert c.refused(ops.Create(1, b"x", 3, 0, 0, 0, 0)) == errno.EINVAL
    assert c.refused(ops.Create(1, b"x", 8, 0, 0, 0, 0)) == errno.EINVAL


def test_symlink(c: Cluster) -> None:
    attr = c.do(ops.Symlink(1, b"s", b"target", 0, 0))
    assert (attr.mode, attr.length) == (0o777, 6)
    assert read.readlink(c.rows, attr.inode) == b"target"
    assert c.refused(ops.Symlink(1, b"t", b"", 0, 0)) == errno.ENOENT
    assert c.refused(ops.Symlink(1, b"t", b"x" * 4096, 0, 0)) == errno.ENAMETOOLONG
    with pytest.raises(ReplyError) as error:
        read.readlink(c.rows, 1)
    assert error.value.status == errno.EINVAL


def test_links_and_unlink(c: Cluster) -> None:
    file = c.file()
    assert c.do(ops.Link(file, 1, b"g")).nlink == 2
    assert c.refused(ops.Link(c.dir(), 1, b"h")) == errno.EPERM
    assert c.refused(ops.Unlink(1, b"d")) == errno.EISDIR
    assert c.refused(ops.Rmdir(1, b"f")) == errno.ENOTDIR
    assert c.do(ops.Unlink(1, b"f")) == ops.Removed(file, False)
    assert c.do(ops.Unlink(1, b"g")) == ops.Removed(file, True)
    assert c.refused(ops.Unlink(1, b"g")) == errno.ENOENT
    assert c.file(b"again") > file, "inodes are never used again"


def test_rmdir(c: Cluster) -> None:
    top = c.dir()
    c.file(parent=top)
    assert c.refused(ops.Rmdir(1, b"d")) == errno.ENOTEMPTY
    c.do(ops.Unlink(top, b"f"))
    assert c.do(ops.Rmdir(1, b"d")) == ops.Removed(top, True)
    assert read.getattr(c.rows, 1).nlink == 2


def test_sustained_until_the_last_holder_lets_go(c: Cluster) -> None:
    file = c.file()
    c.do(ops.Acquire(file))
    c.do(ops.Acquire(file), session=2)
    assert c.do(ops.Unlink(1, b"f")).freed
    assert read.getattr(c.rows, file).nlink == 0
    assert c.refused(ops.Link(file, 1, b"back")) == errno.ENOENT
    assert c.do(ops.Release(file)) is False
    assert c.do(ops.Release(file)) is False, "a second release is harmless"
    c.do(ops.EndSession(2), session=0)
    with pytest.raises(ReplyError):
        read.getattr(c.rows, file)


def test_rename(c: Cluster) -> None:
    a, b = c.dir(b"a"), c.dir(b"b")
    file, other = c.file(b"f", a), c.file(b"g", b)
    assert c.refused(ops.Rename(1, b"a", a, b"x")) == errno.EINVAL
    assert c.refused(ops.Rename(a, b"f", 1, b"b")) == errno.EISDIR
    assert c.refused(ops.Rename(1, b"a", b, b"g")) == errno.ENOTDIR
    assert c.refused(ops.Rename(1, b"a", 1, b"b")) == errno.ENOTEMPTY
    assert c.refused(ops.Rename(a, b"f", b, b"g", 1)) == errno.EEXIST
    assert c.refused(ops.Rename(a, b"f", b, b"no", 2)) == errno.ENOENT
    assert c.refused(ops.Rename(a, b"f", b, b"g", 3)) == errno.EINVAL
    assert c.do(ops.Rename(a, b"f", b, b"g", 2)) == ops.Removed(file, False)
    assert read.lookup(c.rows, b, b"g").inode == file
    assert read.lookup(c.rows, a, b"f").inode == other
    assert c.do(ops.Rename(a, b"f", b, b"g")) == ops.Removed(other, True)
    assert c.do(ops.Rename(1, b"b", 1, b"a")) == ops.Removed(b, True), "over an empty directory"


def test_renaming_one_of_two_names_of_a_file_onto_the_other_does_nothing(c: Cluster) -> None:
    file = c.file()
    c.do(ops.Link(file, 1, b"g"))
    assert c.do(ops.Rename(1, b"f", 1, b"g")) == ops.Removed(file, False)
    assert read.getattr(c.rows, file).nlink == 2


def test_setattr_and_the_fate_of_setid_bits(c: Cluster) -> None:
    file = c.file(mode=0o6755)
    assert c.do(ops.SetAttr(file, uid=7)).mode == 0o755
    assert c.do(ops.SetAttr(file, mode=0o6745)).mode == 0o6745
    assert c.do(ops.SetAttr(file, gid=7)).mode == 0o2745, "no group-exec: sgid means locking"
    assert c.do(ops.SetAttr(file, mode=0o6755)).mode == 0o6755
    assert c.do(ops.CommitWrite(file, 5, -1, [])).mode == 0o755
    assert c.do(ops.SetAttr(c.dir(mode=0o2755), uid=9)).mode == 0o2755
    now = 10**18 + c.index + 1
    attr = c.do(ops.SetAttr(file, atime=5, mtime=-1))
    assert (attr.atime, attr.mtime, attr.ctime) == (5, now, now)


def grant(c: Cluster, file: int, index: int = 0, session: int = 1, *, up: bool = False) -> Any:
    return c.do(ops.GrantWrite(file, index, up), session)


def test_grants_lock_renew_and_reserve(c: Cluster) -> None:
    file = c.file()
    first = grant(c, file)
    assert (first.version, first.reserved, first.fresh, first.length) == (1, 0, True, 0)
    assert c.refused(ops.GrantWrite(file, 0, False), session=2) == Status.LOCKED
    second = grant(c, file, up=True)
    assert (second.chunk, second.reserved) == (first.chunk, 2) and second.lock > first.lock
    assert grant(c, file, up=True).reserved == 3, "a reserved version is never given out twice"
    assert c.refused(ops.GrantWrite(file, 2**31, False)) == errno.EFBIG
    assert c.refused(ops.GrantWrite(1, 0, False)) == errno.EISDIR


def test_set_version_needs_the_current_lock_and_the_reserved_version(c: Cluster) -> None:
    g = grant(c, c.file())
    up = grant(c, read.chunk(c.rows, g.chunk).owner, up=True)  # type: ignore[union-attr]
    assert c.refused(ops.SetVersion(g.chunk, 2, g.lock)) == errno.ESTALE
    assert c.refused(ops.SetVersion(g.chunk, 3, up.lock)) == errno.ESTALE
    c.do(ops.SetVersion(g.chunk, 2, up.lock), session=0)
    assert read.chunk(c.rows, g.chunk).version == 2  # type: ignore[union-attr]


def test_commit_write(c: Cluster) -> None:
    file = c.file()
    g = grant(c, file)
    good = Written(g.chunk, g.lock, True)
    other = Written(g.chunk, g.lock + 1, True)
    assert c.refused(ops.CommitWrite(file, 9, -1, [other])) == errno.ESTALE
    assert c.refused(ops.CommitWrite(file, 9, -1, [good]), session=2) == errno.ESTALE
    assert c.refused(ops.CommitWrite(file, FILE_LENGTH_MAX + 1, -1, [good])) == errno.EFBIG
    assert c.do(ops.CommitWrite(file, 9, 77, [good])).length == 9
    assert c.do(ops.CommitWrite(file, 4, -1, [])).length == 9, "never lowers the length"
    row = read.chunk(c.rows, g.chunk)
    assert row is not None and row.born and not row.lock
    assert c.refused(ops.GrantWrite(file, 0, False, True)) != 0, "a born chunk is never replaced"


def test_a_chunk_never_born_goes_with_its_lock(c: Cluster) -> None:
    file = c.file()
    g = grant(c, file)
    c.do(ops.Unlock(g.chunk, g.lock), session=0)
    assert read.file_chunk(c.rows, file, 0) == (None, 0)
    assert read.doomed(c.rows, 0, 9) == [g.chunk]
    g = grant(c, file)
    new = c.do(ops.GrantWrite(file, 0, False, True))
    assert new.chunk != g.chunk and g.chunk in read.doomed(c.rows, 0, 9)
    c.do(ops.EndSession(1), session=0)
    assert new.chunk in read.doomed(c.rows, 0, 9)


def test_length_cuts_chunks_and_respects_other_writers(c: Cluster) -> None:
    file = c.file()
    for index in range(3):
        g = grant(c, file, index)
        end = (index + 1) * CHUNK_SIZE
        c.do(ops.CommitWrite(file, end, -1, [Written(g.chunk, g.lock, True)]))
    last = grant(c, file, 2, session=2)
    assert c.refused(ops.Length(file, 2 * CHUNK_SIZE)) == Status.LOCKED
    assert c.refused(ops.Length(file, 2 * CHUNK_SIZE + 1)) == Status.LOCKED
    c.do(ops.Unlock(last.chunk, last.lock), session=0)
    c.do(ops.Length(file, CHUNK_SIZE + 1))
    assert [r is not None for _, r in read.file_chunks(c.rows, file, 0, 9)] == [True, True]
    assert read.doomed(c.rows, 0, 9) == [last.chunk]
    assert c.refused(ops.ForgetChunk(read.file_chunk(c.rows, file, 0)[0].id)) == errno.EBUSY
    c.do(ops.ForgetChunk(last.chunk), session=0)
    assert read.chunk(c.rows, last.chunk) is None
    assert c.refused(ops.Length(file, -1)) == errno.EINVAL
    assert c.refused(ops.Length(file, FILE_LENGTH_MAX + 1)) == errno.EFBIG


def test_drop_copy(c: Cluster) -> None:
    file = c.file()
    g = grant(c, file)
    assert c.refused(ops.DropCopy(g.chunk, 1, b"s" * 16)) == errno.EBUSY
    c.do(ops.CommitWrite(file, 1, -1, [Written(g.chunk, g.lock, True)]))
    assert c.refused(ops.DropCopy(g.chunk, 2, b"s" * 16)) == errno.ESTALE
    assert c.refused(ops.DropCopy(99, 1, b"s" * 16)) == errno.ENOENT
    c.do(ops.DropCopy(g.chunk, 1, b"s" * 16), session=0)


def test_set_goal(c: Cluster) -> None:
    file = c.file()
    g = grant(c, file)
    assert c.do(ops.SetGoal(file, 5, 3)) == ops.GoalCounts(1, 0, 0)
    assert read.chunk(c.rows, g.chunk).goal == 3  # type: ignore[union-attr]
    assert c.do(ops.SetGoal(file, 5, 2, 1)) == ops.GoalCounts(0, 1, 0)
    assert c.do(ops.SetGoal(file, 5, 4, 2)) == ops.GoalCounts(0, 1, 0)
    assert c.do(ops.SetGoal(file, 8, 4)) == ops.GoalCounts(0, 0, 1)
    assert c.refused(ops.SetGoal(file, 0, 10)) == errno.EINVAL


def test_a_retry_finds_its_answer_and_gets_no_line(c: Cluster) -> None:
    first = c.apply(ops.Create(1, b"f", 1, 0o644, 0, 0, 0), seq=5)
    state = c.rows.digest()
    again = c.apply(ops.Create(1, b"f", 1, 0o644, 0, 0, 0), seq=5)
    assert again.result == first.result and (first.version > 0, again.version) == (True, 0)
    assert c.rows.digest() == state
    c.do(ops.Create(1, b"g", 1, 0, 0, 0, 0), seq=5 + 1024)
    assert c.refused(ops.Unlink(1, b"f"), seq=5) == Status.STALE_SEQ


def test_a_refusal_is_not_remembered_and_unknown_sessions_are_told(c: Cluster) -> None:
    assert c.refused(ops.Unlink(1, b"f"), seq=3) == errno.ENOENT
    c.file()
    c.do(ops.Unlink(1, b"f"), seq=3)
    assert c.refused(ops.Unlink(1, b"f"), session=77) == Status.NO_SESSION


def test_digest_of_another_state_stops_the_replica(c: Cluster) -> None:
    c.do(ops.Checkpoint(), session=0)
    at, digest = c.index, c.rows.digest()
    c.rows.checkpoints[at] = digest
    assert c.apply(ops.Digest(at - 1, b"x" * 16), session=0).result.status == 0, "not known here"
    assert c.apply(ops.Digest(at, digest), session=0).result.status == 0
    with pytest.raises(StateDiffers, match="differs from the leader's"):
        c.apply(ops.Digest(at, b"x" * 16), session=0)
