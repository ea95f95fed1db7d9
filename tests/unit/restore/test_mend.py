"""-i: a structure that is not sound is made so; nothing that there is gets lost."""

import random
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from raftfs.meta import image, statefile
from raftfs.meta.restore import RestoreError, restore
from raftfs.meta.state import invariants, model, read
from raftfs.meta.state.dictrows import DictRows
from raftfs.meta.state.mend import mend
from raftfs.meta.state.model import ChunkRow, Edge, Node
from raftfs.wire import ops
from tests.unit.restore.history import History
from tests.unit.state.cluster import Cluster


def _rows(path: Path) -> DictRows:
    """What is in an image."""
    rows = DictRows()
    for key, raw in image.read_rows(path):
        rows.put(key, msgspec.msgpack.decode(raw, type=model.TABLES[key[0]]))
    return rows


def _inodes(rows: model.Rows) -> set[int]:
    return {model.number_at(key) for key, _ in rows.scan(b"N")}


def test_a_sound_state_is_left_alone() -> None:
    c = Cluster()
    c.file(parent=c.dir())
    assert mend(c.rows) == []


def _branch() -> tuple[Cluster, int, int, int]:
    """/d/e/f; gives the inodes of d, e and f."""
    c = Cluster()
    d = c.dir(b"d")
    e = c.dir(b"e", d)
    return c, d, e, c.file(b"f", e)


def test_orphans_are_linked_to_the_root_with_all_that_hangs_below() -> None:
    c, d, e, f = _branch()
    c.rows.delete(model.edge_key(d, b"e"))
    edits = mend(c.rows)
    invariants.check_all(c.rows)
    assert read.lookup(c.rows, 1, b"orphan-%d" % e).inode == e
    assert read.lookup(c.rows, e, b"f").inode == f
    assert any(f"node {e} hung in the air" in edit for edit in edits)
    assert not any(f"node {f} hung" in edit for edit in edits)


def test_a_directory_that_is_gone_lets_go_of_what_was_in_it() -> None:
    c, d, e, f = _branch()
    c.rows.put(model.edge_key(1, b"orphan-%d" % f), Edge(d))  # the name is taken
    c.rows.delete(model.edge_key(1, b"d"))
    c.rows.delete(model.node_key(e))
    edits = mend(c.rows)
    invariants.check_all(c.rows)
    assert read.lookup(c.rows, 1, b"orphan-%d-1" % f).inode == f
    assert any("totals: 3 nodes" in edit for edit in edits)


def test_a_circle_is_cut() -> None:
    c, d, e, f = _branch()
    c.rows.delete(model.edge_key(1, b"d"))
    c.rows.put(model.edge_key(e, b"up"), Edge(d))
    mend(c.rows)
    invariants.check_all(c.rows)
    assert read.lookup(c.rows, 1, b"orphan-%d" % d).inode == d
    assert read.lookup(c.rows, e, b"f").inode == f


def test_sustained_files_stay_without_a_name() -> None:
    c = Cluster()
    f = c.file()
    c.do(ops.Acquire(f))
    c.do(ops.Unlink(1, b"f"))
    assert mend(c.rows) == []
    c.rows.delete(model.held_key(1, f))
    mend(c.rows)
    invariants.check_all(c.rows)
    assert read.lookup(c.rows, 1, b"orphan-%d" % f).inode == f


def test_chunks_are_counted_anew() -> None:
    c = Cluster()
    a, b = c.file(b"a"), c.file(b"b")
    first, second = c.do(ops.GrantWrite(a, 0, False)), c.do(ops.GrantWrite(b, 0, False))
    c.rows.delete(model.map_key(b, 0))
    row = c.rows.get(model.chunk_key(first.chunk))
    assert isinstance(row, ChunkRow)
    c.rows.put(model.chunk_key(first.chunk), replace(row, refs=3, owner=77, goal=9, reserved=0))
    c.rows.put(model.map_key(a, 5), model.MapEntry(first.chunk))
    c.rows.put(model.map_key(a, 6), model.MapEntry(99))
    for key, _ in list(c.rows.scan(b"L")):
        c.rows.delete(key)
    mend(c.rows)
    invariants.check_all(c.rows)
    assert read.doomed(c.rows, 0, 9) == [second.chunk]
    assert read.file_chunk(c.rows, a, 0)[0] == row


@pytest.mark.parametrize("seed", range(40))
def test_random_damage_is_mended(tmp_path: Path, seed: int) -> None:
    """Rows of any table go or change; afterwards every node that was left is still there."""
    history = History(tmp_path, seed % 4)
    history.go_on(250)
    history.image(tmp_path / "i")
    draw, rows = random.Random(seed), _rows(tmp_path / "i")
    structure = [key for key in rows.rows if key[:1] != b"R"]
    for key in draw.sample(structure, min(12, len(structure) // 3)):
        row = rows.get(key)
        if draw.random() < 0.3 and isinstance(row, Node):
            rows.put(key, replace(row, nlink=7, parent=3, entries=1))
        elif draw.random() < 0.3 and isinstance(row, Edge):
            rows.put(key, Edge(draw.randrange(1, 20)))
        else:
            rows.delete(key)
    before = _inodes(rows)
    edits = mend(rows)
    invariants.check_all(rows)
    assert before <= _inodes(rows) <= before | {1}
    assert edits and all(edits)
    assert mend(rows) == []


def unsound(history: History, folder: Path) -> Path:
    """An image of the history in which the entry b"orphan to be" of the root is missing."""
    history.image(folder / "sound")
    edge = model.edge_key(1, b"orphan to be")
    rows = [(key, raw) for key, raw in image.read_rows(folder / "sound") if key != edge]
    statefile.build(folder / "bad.mdb", rows, 9, 1)
    image.write_image(folder / "bad.mdb", folder / "bad")
    return folder / "bad"


def test_a_restore_refuses_what_is_not_sound_unless_it_may_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = History(tmp_path, 1)
    history.go_on(40)
    inode = history.write_file(b"orphan to be")
    bad = unsound(history, tmp_path)
    with pytest.raises(RestoreError, match=r"not sound: .*-i mends it"):
        restore(bad, [], tmp_path / "out")
    monkeypatch.setattr("raftfs.meta.restore.CHECKED_MAX", 3)
    assert not restore(bad, [], None).structure_checked
    with pytest.raises(RestoreError, match="not sound"):
        restore(bad, [], None, force=True)
    done = restore(bad, [], tmp_path / "out", ignore_structure=True)
    assert any(f"as orphan-{inode}" in edit for edit in done.mended)
    again = _rows(tmp_path / "out")
    invariants.check_all(again)
    assert again.digest() == done.digest == image.read_head(tmp_path / "out").digest
    assert read.lookup(again, 1, b"orphan-%d" % inode).inode == inode
