"""The unrest file: after a power cut, copies that were not at rest are doubtful, and few others."""

import errno
import os
import random
import threading
import time
from pathlib import Path

import pytest

from raftfs.chunk.door import FileDoor
from raftfs.chunk.unrest import UNREST, Unrest


class Refusing(FileDoor):
    """A door on a disk that refuses some writes."""

    def __init__(self, refuses=lambda: False) -> None:
        self.refuses = refuses

    def _maybe(self) -> None:
        if self.refuses():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def create(self, path: Path) -> int:
        self._maybe()
        return super().create(path)

    def pwrite(self, fd: int, parts, offset: int) -> None:
        if self.refuses():
            data = b"".join(parts)
            super().pwrite(fd, [data[: len(data) // 2]], offset)
            self._maybe()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().pwrite(fd, parts, offset)

    def sync_folder(self, path: Path) -> None:
        self._maybe()
        super().sync_folder(path)


def begun(folder: Path, boot: str, copies: set[int], door: FileDoor | None = None) -> Unrest:
    unrest = Unrest(folder, door or FileDoor(), boot)
    unrest.begin(copies)
    return unrest


def used(folder: Path, copies: set[int], door: FileDoor | None = None) -> Unrest:
    """A disk in boot "a" that has these copies, all at rest."""
    first = begun(folder, "a", set())
    for chunk in copies:
        first.enter(chunk)
        first.rested(chunk)
    first.close()
    unrest = begun(folder, "a", copies, door)
    assert not unrest.doubtful()
    return unrest


def test_after_a_power_cut_what_was_written_is_doubtful_and_what_rested_is_not(tmp_path) -> None:
    unrest = begun(tmp_path, "a", set())
    for chunk in (1, 2, 3):
        unrest.enter(chunk)
    unrest.rested(1)
    unrest.refresh()
    unrest.enter(4)  # beyond the horizon
    unrest.close_file()
    again = begun(tmp_path, "b", {1, 2, 3, 4})
    assert again.doubtful() == {2, 3, 4}


def test_an_old_copy_that_is_written_again_is_named_before_the_write(tmp_path: Path) -> None:
    unrest = used(tmp_path, {1, 2, 3})
    unrest.refresh()
    unrest.enter(2)
    unrest.close_file()
    assert begun(tmp_path, "b", {1, 2, 3}).doubtful() == {2}


def test_after_a_kill_nothing_is_doubtful_but_a_power_cut_may_still_take_it(tmp_path: Path) -> None:
    unrest = used(tmp_path, {1, 2})
    unrest.refresh()
    unrest.enter(1)
    unrest.close_file()
    killed = begun(tmp_path, "a", {1, 2})
    assert not killed.doubtful()
    killed.close_file()
    assert begun(tmp_path, "b", {1, 2}).doubtful() == {1}


def test_what_a_killed_process_left_is_at_rest_once_the_disk_was_synced(tmp_path: Path) -> None:
    unrest = used(tmp_path, {1, 2})
    unrest.enter(1)
    unrest.close_file()
    killed = begun(tmp_path, "a", {1, 2})
    killed.refresh()
    killed.close_file()
    assert not begun(tmp_path, "b", {1, 2}).doubtful()


def test_doubt_stays_over_restarts_until_the_leader_has_decided(tmp_path: Path) -> None:
    unrest = used(tmp_path, {1, 2})
    unrest.enter(1)
    unrest.enter(2)
    unrest.close_file()
    cut = begun(tmp_path, "b", {1, 2})
    cut.close()
    again = begun(tmp_path, "b", {1, 2})
    assert again.is_doubtful(1) and again.is_doubtful(2)
    again.sure(1)
    again.close()
    assert begun(tmp_path, "c", {1, 2}).doubtful() == {2}


def test_an_orderly_stop_leaves_no_doubt(tmp_path: Path) -> None:
    unrest = begun(tmp_path, "a", set())
    for chunk in range(1, 50):
        unrest.enter(chunk)
        unrest.rested(chunk)
    unrest.close()
    assert not begun(tmp_path, "b", set(range(1, 50))).doubtful()


@pytest.mark.parametrize("damage", ["missing", "head", "record", "short"])
def test_when_the_file_is_damaged_every_copy_is_doubtful(tmp_path: Path, damage: str) -> None:
    unrest = used(tmp_path, {1, 2, 3})
    unrest.enter(2)
    unrest.close_file()
    file = tmp_path / UNREST
    raw = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    else:
        raw[{"head": 9, "record": len(raw) - 300, "short": 0}[damage]] ^= 4
        file.write_bytes(raw[: 3 if damage == "short" else None])
    assert begun(tmp_path, "a", {1, 2, 3}).doubtful() == {1, 2, 3}


def test_a_torn_record_is_no_damage(tmp_path: Path) -> None:
    unrest = used(tmp_path, {1, 2, 3})
    unrest.enter(2)
    unrest.close_file()
    with open(tmp_path / UNREST, "ab") as file:
        file.write(bytes(512))  # the file had grown, the sector was not written
    assert begun(tmp_path, "b", {1, 2, 3}).doubtful() == {2}


def test_writers_share_an_fdatasync(tmp_path: Path) -> None:
    everybody = threading.Event()
    syncs = []

    class Slow(FileDoor):
        def sync(self, fd: int) -> None:
            syncs.append(fd)
            super().sync(fd)

        def pwrite(self, fd: int, parts, offset: int) -> None:
            assert everybody.wait(10)
            super().pwrite(fd, parts, offset)

    everybody.set()
    unrest = used(tmp_path, set(range(1, 20)), Slow())
    everybody.clear()
    before = len(syncs)
    threads = [threading.Thread(target=unrest.enter, args=(c,)) for c in range(1, 9)]
    for thread in threads:
        thread.start()
    while len(unrest._pending) < len(threads):
        time.sleep(0.001)
    everybody.set()
    for thread in threads:
        thread.join()
    assert len(syncs) - before <= 2, "one for the first, one for all who came meanwhile"
    unrest.close_file()
    assert begun(tmp_path, "b", set(range(1, 20))).doubtful() == set(range(1, 9))


@pytest.mark.parametrize("seed", [int(s) for s in os.environ.get("RAFTFS_SEED", "").split()]
                         or range(20))  # fmt: skip
def test_whatever_happens_no_copy_that_was_not_at_rest_is_trusted(tmp_path: Path, seed) -> None:
    """Random use on a disk that refuses now and then, cut off at a random moment."""
    print(f"RAFTFS_SEED={seed} python -m pytest tests/chunk/test_unrest.py -k whatever")
    draw = random.Random(seed)
    failing = False
    door = Refusing(lambda: failing and draw.random() < 0.5)
    boot, restless, inherited, doubtful = 0, set[int](), set[int](), set[int]()
    copies = {3, 5, 8}
    unrest = used(tmp_path, copies, door)
    for _ in range(200):
        failing = draw.random() < 0.3
        kind = draw.choice(["enter"] * 6 + ["rest"] * 3 + ["refresh", "sure", "kill", "cut"])
        chunk = draw.choice([*copies, draw.randrange(1, 60)])
        try:
            if kind == "enter":
                unrest.enter(chunk)
                copies.add(chunk)
                restless.add(chunk)
                inherited.discard(chunk)
            elif kind == "rest":
                unrest.rested(chunk)
                restless.discard(chunk)
            elif kind == "refresh":
                restless -= inherited  # the disk is synced as a whole
                inherited.clear()
                unrest.refresh()
            elif kind == "sure":
                unrest.sure(chunk)
                doubtful.discard(chunk)
        except OSError as e:
            assert e.errno == errno.ENOSPC and failing
        if kind in ("kill", "cut"):
            failing = False
            unrest.close_file()
            boot += kind == "cut"
            unrest = begun(tmp_path, f"a{boot or ''}", copies, door)
            must = doubtful | (restless if kind == "cut" else set())
            assert must <= unrest.doubtful(), f"boot {boot}"
            doubtful = unrest.doubtful()
            restless = restless if kind == "kill" else set()
            inherited = set(restless)
    assert boot > 2
