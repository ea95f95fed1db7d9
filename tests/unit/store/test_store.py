"""The store: what survives, what scans see, how a state moves to another replica."""

import threading
from pathlib import Path

import pytest

from raftfs.errors import InvariantError, StateDiffers, UserError
from raftfs.meta.rowcache import Overlay
from raftfs.meta.state import invariants, read
from raftfs.meta.state.apply import apply_batch
from raftfs.meta.state.dictrows import DictRows
from raftfs.meta.state.model import GROUP_LEN
from raftfs.meta.store import MetaStore, file_index
from raftfs.wire import ops
from raftfs.wire.ops import decode_batch
from tests.unit.store.driver import Driver


@pytest.fixture
def d(tmp_path: Path) -> Driver:
    return Driver(tmp_path / "state.mdb")


def names(store: MetaStore) -> list[bytes]:
    return [name for name, _ in read.readdir(store, 1, b"", 10_000).entries]


def test_a_new_store_is_empty(tmp_path: Path) -> None:
    store = MetaStore(tmp_path / "s")
    assert (store.applied, store.checkpointed, store.members()) == ((0, 0), (0, 0), {})
    assert store.digest() == DictRows().digest()
    assert store.freeze() is False


def test_what_was_not_checkpointed_is_older_after_a_crash_and_replays(d: Driver) -> None:
    d.create(b"a")
    d.checkpoint()
    saved, digest = d.store.applied, d.store.digest()
    d.create(b"b")
    after = d.store.digest()
    d.store.close()
    store = MetaStore(d.path)
    assert store.applied == store.checkpointed == saved
    assert (store.digest(), names(store)) == (digest, [b"a"])
    store.close()
    again = Driver(d.path, d.log)
    assert (again.store.digest(), names(again.store)) == (after, [b"a", b"b"])
    assert again.store.members() == {"a:1": b"1" * 16}


def test_a_crash_between_freeze_and_write_loses_only_the_overlay(d: Driver) -> None:
    d.checkpoint()
    saved = d.store.applied
    d.create(b"a")
    assert d.store.freeze() and not d.store.freeze()
    d.store.close()
    assert MetaStore(d.path).applied == saved


def test_the_loop_goes_on_while_a_checkpoint_is_written(d: Driver) -> None:
    keep, gone = d.create(b"keep"), d.create(b"gone")
    assert d.store.freeze()
    at = d.store.applied
    assert names(d.store) == [b"gone", b"keep"]
    thread = threading.Thread(target=d.store.write_frozen)
    thread.start()
    assert d.do(ops.Unlink(1, b"gone")) == 0
    new = d.create(b"new")
    assert names(d.store) == [b"keep", b"new"]
    thread.join(10)
    d.store.thaw()
    assert d.store.checkpointed == at
    assert names(d.store) == [b"keep", b"new"]
    assert {keep, new}.isdisjoint({gone})
    digest = d.store.digest()
    assert d.reopen().store.digest() == digest


def test_a_scan_finds_a_group_of_one_changed_row_and_of_several() -> None:
    """A group is its only key, or a set of keys."""
    overlay = Overlay()
    one, several = b"E" + b"1" * 8, b"E" + b"2" * 8
    assert len(one) == GROUP_LEN
    overlay.put(one + b"a", None)
    for name in (b"c", b"b", b"b", b"d"):
        overlay.put(several + name, None)
    assert overlay.matching(one, b"") == [one + b"a"]
    assert overlay.matching(one + b"b", b"") == []
    assert overlay.matching(several, b"") == [several + b"b", several + b"c", several + b"d"]
    assert overlay.matching(several, b"b") == [several + b"c", several + b"d"]
    assert overlay.matching(b"E" + b"3" * 8, b"") == []


def test_scans_merge_overlay_frozen_and_file(d: Driver) -> None:
    for k in range(0, 600, 3):
        d.create(b"%03d" % k)
    d.checkpoint()
    for k in range(1, 600, 3):
        d.create(b"%03d" % k)
    for k in range(0, 600, 30):
        d.do(ops.Unlink(1, b"%03d" % k))
    d.store.freeze()
    for k in range(2, 600, 3):
        d.create(b"%03d" % k)
    for k in range(1, 600, 30):
        d.do(ops.Unlink(1, b"%03d" % k))
    want = [b"%03d" % k for k in range(600) if k % 30 not in (0, 1)]
    assert names(d.store) == want
    page = read.readdir(d.store, 1, b"299", 7)
    assert [n for n, _ in page.entries] == [n for n in want if n > b"299"][:7] and page.more
    d.store.write_frozen()
    d.store.thaw()
    assert names(d.store) == want


def test_the_digest_is_that_of_all_rows(d: Driver) -> None:
    plain = DictRows()
    for k in range(50):
        d.create(b"%d" % k)
        if k % 7 == 0:
            d.checkpoint()
        if k % 3 == 0:
            d.do(ops.Unlink(1, b"%d" % (k // 2)))
    for index, data in enumerate(d.log, 1):
        apply_batch(plain, index, decode_batch(data))
    assert d.store.digest() == plain.digest()
    invariants.check_all(d.store)


def test_a_small_cache_changes_nothing(tmp_path: Path, d: Driver) -> None:
    for k in range(100):
        d.create(b"%d" % k)
    d.checkpoint()
    d.store.close()
    small = MetaStore(d.path, cache_rows=10)
    assert len(names(small)) == 100
    assert [read.lookup(small, 1, b"%d" % k).nlink for k in range(100)] == [1] * 100
    invariants.check_all(small)


def test_a_copy_is_the_last_checkpoint_and_can_be_installed(tmp_path: Path, d: Driver) -> None:
    d.create(b"a")
    d.checkpoint()
    at, digest = d.store.applied, d.store.digest()
    d.create(b"b")
    copy = tmp_path / "copy"
    assert d.store.copy_to(copy) == at == file_index(copy)
    other = Driver(tmp_path / "other.mdb")
    other.create(b"something else")
    other.store.install(copy)
    assert other.store.applied == other.store.checkpointed == at
    assert (other.store.digest(), names(other.store)) == (digest, [b"a"])
    assert not copy.exists()


def test_garbage_is_refused_with_a_sentence(tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.write_bytes(b"no database" * 1000)
    with pytest.raises(UserError, match="bad"):
        MetaStore(bad)
    with pytest.raises(UserError, match="bad"):
        file_index(bad)


@pytest.mark.parametrize("when", ["after the checkpoint", "while it is written"])
def test_another_digest_than_the_leaders_is_an_alarm(d: Driver, when: str) -> None:
    d.checkpoint()
    d.create(b"a")
    assert d.store.freeze()
    index, mine = d.store.applied[0], d.store.digest()
    if when == "while it is written":
        d.do(ops.Digest(index, b"x" * 16), session=0)
        d.store.write_frozen()
        with pytest.raises(StateDiffers, match="raftfs cluster replace"):
            d.store.thaw()
    else:
        d.store.write_frozen()
        d.store.thaw()
        d.do(ops.Digest(index, mine), session=0)
        with pytest.raises(StateDiffers, match="raftfs cluster replace"):
            d.do(ops.Digest(index, b"x" * 16), session=0)


def audited(store: MetaStore) -> int:
    """Go through the whole file."""
    while not (rows := store.audit_some()):
        pass
    return rows


def test_an_audit_counts_every_row_while_checkpoints_change_them(d: Driver) -> None:
    for k in range(1200):
        d.create(b"%d" % k)
    d.checkpoint()
    for k in range(0, 1200, 7):  # some of them are counted already when they go, some are not
        assert not d.store.audit_some() or k > 21
        d.do(ops.Unlink(1, b"%d" % k))
        d.create(b"new%d" % k)
        d.checkpoint()
    assert audited(d.store) > 2400


def test_a_row_that_rots_is_found_by_an_audit(d: Driver) -> None:
    """The digest of a checkpoint is made of what changes: it says nothing of what lies still."""
    for k in range(100):
        d.create(b"%d" % k)
    d.checkpoint()
    assert audited(d.store) > 200
    with d.store._env.begin(write=True) as txn, txn.cursor() as cursor:
        assert cursor.set_range(b"E")
        cursor.put(cursor.key(), cursor.value()[:-1] + bytes([cursor.value()[-1] ^ 1]))
    d.do(ops.Unlink(1, b"99"))
    d.checkpoint()
    with pytest.raises(StateDiffers, match="raftfs cluster replace"):
        audited(d.store)


@pytest.mark.parametrize("how", ["get", "scan"])
def test_whoever_meets_a_row_that_is_none_any_more_finds_damage(d: Driver, how: str) -> None:
    d.create(b"a")
    d.checkpoint()
    with d.store._env.begin(write=True) as txn, txn.cursor() as cursor:
        assert cursor.set_range(b"E")
        key = cursor.key()
        cursor.put(key, b"\xc1")  # which no MessagePack begins with
    d.store.close()
    store = MetaStore(d.path)
    with pytest.raises(StateDiffers, match="is damaged"):
        _ = store.get(key) if how == "get" else list(store.scan(key[:1]))
    assert store.damage is not None, "so that the master stops"
    store.close()


def test_entries_come_in_order(d: Driver) -> None:
    with pytest.raises(InvariantError):
        d.store.apply_entry(d.store.applied[0] + 2, 1, b"")
    index = d.store.applied[0] + 1
    assert d.store.apply_entry(index, 9, b"") == []
    assert d.store.applied == (index, 9)
    assert d.store.freeze(), "an entry of Raft's own moves the checkpoint too"
