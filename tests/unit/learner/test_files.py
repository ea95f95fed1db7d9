"""Changelog files: nothing durable is lost, nothing torn is kept, nothing needed is dropped."""

import os
import random
from pathlib import Path

import pytest

from raftfs.errors import UserError
from raftfs.meta.changelogfiles import digest_comment, merged, read_lines, survey
from raftfs.meta.learner.files import ChangelogFiles, Hole, changelogs, last_line
from raftfs.meta.learner.store import LearnerStore, Point
from raftfs.meta.state import changelog
from raftfs.meta.state.changelog import render
from raftfs.meta.store import MetaStore
from raftfs.wire import ops
from raftfs.wire.frame import encode
from raftfs.wire.ops import Batch, Command, Result, encode_batch

NEWEST = "changelog_ml.0.mfs"
CAME = 1_700_000_000 * 10**9


def line(version: int) -> tuple[int, str]:
    command = Command(0, 0, ops.SetVersion(version, 7, 3))
    return version, render(version, CAME + version, command, Result(0, encode(None)))


def lines(first: int, last: int) -> list[tuple[int, str]]:
    return [line(v) for v in range(first, last + 1)]


def filled(folder: Path, last: int) -> Path:
    """A closed file with lines 1 to `last`."""
    files = ChangelogFiles(folder, 0)
    files.append(lines(1, last))
    files.close()
    return folder / NEWEST


def numbers(folder: Path) -> list[int]:
    """Of all lines in all files, as a restore reads them; each must be whole."""
    return [changelog.parse(n.text).version
            for n in merged([survey(p) for p in changelogs(folder).values()])]  # fmt: skip


def test_lines_that_are_there_are_not_written_again(tmp_path: Path) -> None:
    files = ChangelogFiles(tmp_path, 0)
    files.append(lines(1, 5))
    files.append(lines(3, 7))
    files.close()
    again = ChangelogFiles(tmp_path, 4)
    assert again.last == 7
    again.append(lines(5, 9))
    again.close()
    assert numbers(tmp_path) == list(range(1, 10))
    assert (tmp_path / NEWEST).stat().st_mode & 0o077 == 0, "secrets are in it"


def test_an_end_torn_at_any_byte_is_repaired(tmp_path: Path) -> None:
    """Lines up to 6 are durable; whatever is left of the rest, at the end all lines are there."""
    whole = filled(tmp_path, 6).read_bytes()
    comment = digest_comment(7, 99, b"d" * 16) + "\n"
    rest = (line(7)[1] + "\n" + comment + line(8)[1] + "\n" + line(9)[1] + "\n").encode()
    for kept in range(len(rest) + 1):
        (tmp_path / NEWEST).write_bytes(whole + rest[:kept])
        files = ChangelogFiles(tmp_path, 6, on_hole=lambda hole: pytest.fail(f"{hole}"))
        whole_lines = rest[:kept].split(b"\n")[:-1]
        assert files.last == 6 + sum(text[:1].isdigit() for text in whole_lines)
        files.append(lines(7, 9))
        files.close()
        assert numbers(tmp_path) == list(range(1, 10)), f"{kept} bytes were left"


def test_pages_that_never_came_do_not_hide_what_stands_behind_them(tmp_path: Path) -> None:
    """After a power cut any part of what was not durable may be zeros, with good lines behind."""
    whole = filled(tmp_path, 40).read_bytes()
    durable = whole.index(b"\n21: ") + 1
    chance = random.Random(5)
    for _ in range(60):
        start = chance.randrange(durable, len(whole))
        end = chance.randrange(start, len(whole)) + 1
        (tmp_path / NEWEST).write_bytes(whole[:start] + bytes(end - start) + whole[end:])
        files = ChangelogFiles(tmp_path, 20)
        assert 20 <= files.last < 40
        files.append(lines(21, 40))
        files.close()
        assert numbers(tmp_path) == list(range(1, 41))


def test_what_was_durable_is_never_cut_off(tmp_path: Path) -> None:
    """A line that rots there is for the rehearsal to find; the lines behind it are still good."""
    path = filled(tmp_path, 10)
    data = bytearray(path.read_bytes())
    data[data.index(b"\n5: ") + 8] ^= 1
    path.write_bytes(data)
    files = ChangelogFiles(tmp_path, 8)
    assert files.last == 10
    files.close()
    assert path.read_bytes() == data


def test_long_files_are_repaired_from_their_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raftfs.meta.learner.files._WINDOW", 100)
    path = filled(tmp_path, 60)
    whole = path.read_bytes()
    for settled in (0, 1, 30, 59, 60):
        path.write_bytes(whole[:-4])
        files = ChangelogFiles(tmp_path, settled)
        files.append(lines(60, 60))
        files.close()
        assert path.read_bytes() == whole or settled == 60
    assert b"# HOLE: lines 60 to 60 missing\n" in path.read_bytes(), "60 was durable, and is gone"


def test_a_hole_is_marked_and_told(tmp_path: Path) -> None:
    holes: list[Hole] = []
    files = ChangelogFiles(tmp_path, 0, holes.append)
    files.append(lines(1, 3))
    files.jump(8)  # a snapshot
    files.append(lines(9, 10))
    files.close()
    text = [t for _, t in read_lines(tmp_path / NEWEST)]
    assert text[3] == "# HOLE: lines 4 to 8 missing" and text[4] == line(9)[1]
    again = ChangelogFiles(tmp_path, 8, holes.append)
    assert again.last == 10 and holes == [Hole(4, 8)], "told once"
    again.close()
    # Stopped between the snapshot and its mark: the state says that lines are missing.
    again = ChangelogFiles(tmp_path, 15, holes.append)
    again.append(lines(16, 16))
    again.close()
    assert holes[1:] == [Hole(11, 15)] and numbers(tmp_path) == [1, 2, 3, 9, 10, 16]


def test_a_lost_file_is_a_hole(tmp_path: Path) -> None:
    filled(tmp_path, 5).unlink()
    holes: list[Hole] = []
    ChangelogFiles(tmp_path, 5, holes.append).close()
    assert holes == [Hole(1, 5)]


@pytest.mark.parametrize("compress", [False, True])
def test_rotation_keeps_every_line_and_its_order(tmp_path: Path, compress: bool) -> None:
    files = ChangelogFiles(tmp_path, 0)
    for hour in range(5):
        files.append(lines(hour * 10 + 1, hour * 10 + 10))
        files.rotate()
        if compress:
            files.compress_old()
    files.append(lines(51, 52))
    there = changelogs(tmp_path)
    assert sorted(there) == list(range(6))
    assert [p.suffix for n, p in sorted(there.items()) if n] == [".zst" if compress else ".mfs"] * 5
    assert [last_line(there[n]) for n in range(6)] == [52, 50, 40, 30, 20, 10]
    assert numbers(tmp_path) == list(range(1, 53))
    assert all(p.stat().st_mode & 0o077 == 0 for p in there.values())
    files.close()
    (tmp_path / NEWEST).unlink()  # a crash after the last rotation's renames
    again = ChangelogFiles(tmp_path, 50)
    assert again.last == 50
    again.close()


def test_a_rotation_that_was_cut_short_is_healed_by_the_next(tmp_path: Path) -> None:
    files = ChangelogFiles(tmp_path, 0)
    for hour in range(3):
        files.append(lines(hour + 1, hour + 1))
        files.rotate()
    files.close()
    (tmp_path / "changelog_ml.3.mfs").rename(tmp_path / "changelog_ml.4.mfs")
    (tmp_path / "changelog_ml.2.mfs").rename(tmp_path / "changelog_ml.3.mfs")
    again = ChangelogFiles(tmp_path, 3)
    again.append(lines(4, 4))
    again.rotate()
    again.close()
    assert sorted(changelogs(tmp_path)) == [0, 1, 2, 3, 4]
    assert [last_line(p) for _, p in sorted(changelogs(tmp_path).items())] == [0, 4, 3, 2, 1]


def test_a_compression_that_was_cut_short_is_done_again(tmp_path: Path) -> None:
    files = ChangelogFiles(tmp_path, 0)
    files.append(lines(1, 9))
    files.rotate()
    files.close()
    for left in (".zst", ".zst.new"):
        (tmp_path / f"changelog_ml.1.mfs{left}").write_bytes(b"half a fi")
    again = ChangelogFiles(tmp_path, 9)
    assert numbers(tmp_path) == list(range(1, 10))
    again.compress_old()
    assert sorted(p.name for p in tmp_path.iterdir()) == [NEWEST, "changelog_ml.1.mfs.zst"]
    assert numbers(tmp_path) == list(range(1, 10))
    again.close()


def test_old_files_go_only_when_an_image_covers_them(tmp_path: Path) -> None:
    files = ChangelogFiles(tmp_path, 0)
    for hour in range(6):
        files.append(lines(hour * 10 + 1, hour * 10 + 10))
        files.rotate()
    assert files.drop_old(2, covered=0) == []
    assert files.drop_old(2, covered=29) == [tmp_path / f"changelog_ml.{n}.mfs" for n in (6, 5)]
    assert numbers(tmp_path)[0] == 21, "the image has lines 21 to 29, but not 30"
    files.drop_old(2, covered=60)
    assert sorted(changelogs(tmp_path)) == [0, 1, 2] and numbers(tmp_path)[0] == 41
    files.close()


def test_a_full_disk_is_said_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ChangelogFiles(tmp_path, 0)

    def full(fd: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UserError, match=r"changelog_ml\.0\.mfs cannot be written: No space left"):
        files.append(lines(1, 1))


# --- lines and state together ---------------------------------------------------------------------


class Machine:
    """A learner's state and files, fed with one entry after another; it may lose its power."""

    def __init__(self, folder: Path, entries: list[bytes], chance: random.Random) -> None:
        self.folder, self.entries, self.chance = folder, entries, chance
        self.points: list[Point] = []
        self.store = LearnerStore(folder / "state.mdb", self.points.append)
        self.files = ChangelogFiles(folder, self.store.version, self._hole)
        self.synced = os.stat(folder / NEWEST).st_size
        self.store.files = self.files
        sync = self.files.sync

        def watched() -> None:
            sync()
            self.synced = os.stat(folder / NEWEST).st_size

        self.files.sync = watched  # type: ignore[method-assign]

    def _hole(self, hole: Hole) -> None:
        raise AssertionError(f"{hole}: the state was ahead of the lines on the disk")

    def run(self, steps: int) -> None:
        for _ in range(steps):
            index = self.store.applied[0] + 1
            if index > len(self.entries):
                return
            data = self.entries[index - 1]
            applied = self.store.apply_entry(index, 1, data)
            self.files.append([
                (a.version, render(a.version, CAME, a.command, a.result))
                for a in applied if a.version
            ])  # fmt: skip
            what = self.chance.random()
            if what < 0.05:
                self.store.freeze()
            elif what < 0.12 and self.store.freezing:
                self.store.write_frozen()
                if self.chance.random() < 0.5:
                    return  # the power goes before the loop hears of it
                self.store.thaw()
            elif what < 0.13:
                self.files.rotate()
                self.synced = 0

    def power_cut(self) -> None:
        """What was not synced is there in part."""
        self.store.close()
        path = self.folder / NEWEST
        data = path.read_bytes()
        os.close(self.files._fd)
        kept = self.chance.randint(self.synced, len(data))
        path.write_bytes(data[:kept])


@pytest.mark.parametrize("seed", range(40))
def test_no_line_is_missing_or_twice_after_power_cuts(tmp_path: Path, seed: int) -> None:
    print(f"pytest tests/unit/learner/test_files.py -k 'power_cuts and {seed}'")
    chance = random.Random(seed)
    founding = encode_batch(Batch(CAME, [Command(0, 0, ops.Found(b"c" * 16, {"a:1": b"1" * 16}))]))
    entries = [b"", founding] + [
        encode_batch(Batch(CAME, [
            Command(0, 0, ops.Create(1, b"d%d-%d" % (n, k), ops.NodeType.DIR, 0o755, 0, 0, 0))
            for k in range(chance.randint(1, 3))
        ]))
        for n in range(150)
    ]  # fmt: skip
    cuts = 0
    while True:
        machine = Machine(tmp_path, entries, chance)
        machine.run(chance.randint(10, 60))
        done = machine.store.applied[0] == len(entries)
        last = machine.store.version
        if done:
            machine.files.sync()
        machine.power_cut()
        if done:
            break
        cuts += 1
    assert cuts > 1 and last > 200
    assert numbers(tmp_path) == list(range(1, last + 1))


def test_masters_that_went_back_in_time_begin_a_new_history(tmp_path: Path) -> None:
    """Their lines have numbers that are taken here: passing over them would lose them."""
    founding = encode_batch(Batch(CAME, [Command(0, 0, ops.Found(b"c" * 16, {"a:1": b"1" * 16}))]))

    def mkdir(name: bytes) -> bytes:
        op = ops.Create(1, name, ops.NodeType.DIR, 0o755, 0, 0, 0)
        return encode_batch(Batch(CAME, [Command(0, 0, op)]))

    old = [b"", founding, *(mkdir(b"old%d" % n) for n in range(8))]
    (tmp_path / "ml").mkdir()
    machine = Machine(tmp_path / "ml", old, random.Random(1))
    machine.run(len(old))
    if machine.store.freezing:
        machine.store.write_frozen()
        machine.store.thaw()
    assert machine.files.last == 9
    restored = MetaStore(tmp_path / "restored.mdb")
    for index, data in enumerate(old[:6], 1):
        restored.apply_entry(index, 5, data)
    restored.applied = (100, 5)  # in other places of the log than before
    restored.freeze()
    restored.write_frozen()
    restored.thaw()
    restored.close()
    holes: list[Hole] = []
    machine.files._on_hole = holes.append
    machine.store.install(tmp_path / "restored.mdb")
    (applied,) = machine.store.apply_entry(101, 5, mkdir(b"new"))
    assert applied.version == 6
    machine.files.append([(6, render(6, CAME, applied.command, applied.result))])
    assert numbers(tmp_path / "ml") == [6] and holes == [Hole(1, 5)]
    (aside,) = (tmp_path / "ml").glob("before-*-line-5")
    assert numbers(aside) == list(range(1, 10))
    assert machine.points[-1].version == 5
    machine.store.close()
    machine.files.close()
