"""Faults of the state machine and the store that were shown by running them, and mended.

Each test says what must be true, and failed on the first form of the code.
"""

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from raftfs.errors import StateDiffers, UserError
from raftfs.meta.store import MetaStore
from raftfs.wire import ops
from raftfs.wire.ops import Batch, Command, Written
from tests.unit.state.cluster import Cluster
from tests.unit.store.driver import Driver


@pytest.mark.parametrize(
    "op",
    [ops.Unlink(-1, b"x"), ops.SetAttr(-1), ops.Acquire(-1),
     ops.Create(-5, b"x", 1, 0, 0, 0, 0)],
)  # fmt: skip
def test_no_client_can_stop_the_masters_with_a_negative_inode(op: ops.Op) -> None:
    assert Cluster().refused(op) == errno.ENOENT


def test_a_chunk_named_twice_in_a_commit_does_not_corrupt_its_lock() -> None:
    c = Cluster()
    file = c.file()
    g = c.do(ops.GrantWrite(file, 0, False))
    twice = [Written(g.chunk, g.lock, True), Written(g.chunk, g.lock, False)]
    c.refused(ops.CommitWrite(file, 5, -1, twice))


def test_a_commit_on_a_chunk_that_is_gone_is_stale() -> None:
    c = Cluster()
    assert c.refused(ops.CommitWrite(c.file(), 5, -1, [Written(9, 1, True)])) == errno.ESTALE


def test_found_is_ignored_ever_after() -> None:
    c = Cluster()
    before = c.rows.digest()
    assert c.apply(ops.Found(b"d" * 16, {}), session=0).version == 0
    c.do(ops.Found(b"d" * 16, {}), session=0)
    assert c.rows.digest() == before


def test_the_lock_of_a_leader_that_died_while_settling_gives_way() -> None:
    c = Cluster()
    file = c.file()
    g = c.do(ops.GrantWrite(file, 0, False))
    c.do(ops.CommitWrite(file, 5, -1, [Written(g.chunk, g.lock, True)]))
    left = c.do(ops.GrantWrite(file, 0, True), session=0)
    assert c.do(ops.GrantWrite(file, 0, True)).lock > left.lock
    assert c.refused(ops.SetVersion(g.chunk, left.reserved, left.lock), session=0) == errno.ESTALE


def test_an_empty_file_is_no_new_state(tmp_path: Path) -> None:
    (tmp_path / "s").touch()
    with pytest.raises(UserError):
        MetaStore(tmp_path / "s")


def test_a_truncated_file_is_refused_not_a_bus_error(tmp_path: Path) -> None:
    d = Driver(tmp_path / "s")
    for k in range(2000):
        d.create(b"%d" % k)
    d.checkpoint()
    d.store.close()
    os.truncate(d.path, 8 * 4096)
    program = (
        "import pathlib, sys\nfrom raftfs.errors import UserError\n"
        "from raftfs.meta.store import MetaStore\n"
        "try: MetaStore(pathlib.Path(sys.argv[1]))\nexcept UserError: sys.exit(3)"
    )
    run = subprocess.run([sys.executable, "-c", program, str(d.path)], timeout=20, check=False)
    assert run.returncode == 3


def test_a_bad_snapshot_does_not_replace_a_good_state(tmp_path: Path) -> None:
    d = Driver(tmp_path / "s")
    d.checkpoint()
    (tmp_path / "bad").write_bytes(os.urandom(40_000))
    with pytest.raises(UserError):
        d.store.install(tmp_path / "bad")
    d.store.close()
    assert MetaStore(d.path).applied == (2, 1)


def test_after_a_failed_entry_nothing_is_checkpointed(tmp_path: Path) -> None:
    d = Driver(tmp_path / "s")
    good = Command(1, 0, ops.Create(1, b"half", 1, 0, 0, 0, 0))
    wrong = Command(0, 0, ops.Digest(d.store.checkpointed[0], b"x" * 16))
    with pytest.raises(StateDiffers):
        d.store.apply_entry(3, 1, ops.encode_batch(Batch(10**18, [good, wrong])))
    with pytest.raises(AssertionError):
        d.store.freeze()


def test_a_copy_survives_checkpoints_that_happen_meanwhile(tmp_path: Path) -> None:
    """The file has no reader table (lock=False), so a checkpoint reuses pages being copied."""
    d = Driver(tmp_path / "s")
    for k in range(40_000):
        d.create(b"name-%d" % k)
    d.checkpoint()
    at = d.store.applied
    reader, writer = os.pipe()
    failed: list[Exception] = []

    def copy() -> None:  # `copy_to` through a pipe, so that the test decides how fast it is
        try:
            d.store._env.copyfd(writer, compact=True)
        except Exception as e:
            failed.append(e)
        os.close(writer)

    thread = threading.Thread(target=copy)
    thread.start()
    time.sleep(0.3)
    for turn in range(6):
        for k in range(turn * 5000, turn * 5000 + 5000):
            d.do(ops.Unlink(1, b"name-%d" % k))
        for k in range(2000):
            d.create(b"new-%d-%d" % (turn, k))
        d.checkpoint()
    with open(tmp_path / "copy", "wb") as file:
        while piece := os.read(reader, 1 << 20):
            file.write(piece)
    thread.join(20)
    assert not failed
    assert MetaStore(tmp_path / "copy").applied == at
