"""Restoring from an image and changelogs: equal to the live state after any line, or refused."""

from pathlib import Path

import pytest
import zstandard

from raftfs.errors import UserError
from raftfs.meta import image
from raftfs.meta.changelogfiles import digest_comment, hole_comment, merged, survey
from raftfs.meta.restore import RestoreError, Until, restore
from tests.unit.restore.history import SECOND, START, History


@pytest.mark.parametrize("seed", range(12))
def test_any_history_is_restored_to_any_line(tmp_path: Path, seed: int) -> None:
    history = History(tmp_path, seed)
    history.go_on(60)
    middle = history.image(tmp_path / "middle").version
    history.go_on(120)
    end = history.version
    cut = history.random.randrange(middle, end)
    files = [
        history.write(tmp_path / "changelog_ml.1.mfs", 1, cut),
        history.write(tmp_path / "changelog_ml.0.mfs", cut + 1, end),
    ]
    done = restore(tmp_path / "middle", files, tmp_path / "out")
    assert (done.version, done.digest, done.problem) == (end, history.digests[-1], "")
    assert done.lines == end - middle
    assert image.read_head(tmp_path / "out").digest == history.digests[-1]
    for version in (middle, history.random.randrange(middle, end), end):
        done = restore(tmp_path / "middle", files, None, until=Until(version))
        assert (done.version, done.digest) == (version, history.digests[version])
    version = history.random.randrange(1, end)
    done = restore(None, files, tmp_path / "out", until=Until(version))
    assert (done.version, done.digest) == (version, history.digests[version])
    # A result is an image that can be gone on from.
    done = restore(tmp_path / "out", files, tmp_path / "out2")
    assert (done.version, done.digest) == (end, history.digests[-1])


@pytest.fixture
def history(tmp_path: Path) -> History:
    """With an image in the middle, `i`."""
    made = History(tmp_path, 3)
    made.reach(28)
    made.image(tmp_path / "i")
    made.reach(100)
    return made


def _image_line(folder: Path) -> int:
    return image.read_head(folder / "i").version


def _left_behind(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if p.name.startswith(".restore") or ".new" in p.name]


def test_until_a_moment(history: History, tmp_path: Path) -> None:
    log = history.write(tmp_path / "log", 1, history.version)
    times = [START + SECOND * n for n in range(1, 250)]
    seen = set()
    for moment in times[::9]:
        done = restore(None, [log], None, until=Until(time=moment))
        assert done.time <= moment
        assert done.digest == history.digests[done.version]
        following = history.lines[done.version : done.version + 1]
        assert all(int(x.split(": ")[1].split("|")[0]) * SECOND > moment for x in following)
        seen.add(done.version)
    assert len(seen) > 8
    with pytest.raises(RestoreError, match=r"later than --until.*older image"):
        restore(tmp_path / "i", [log], None, until=Until(time=START))
    with pytest.raises(RestoreError, match=f"later than --until.*line {_image_line(tmp_path)}"):
        restore(tmp_path / "i", [log], None, until=Until(1))


def test_until_a_line_that_never_comes(history: History, tmp_path: Path) -> None:
    log = history.write(tmp_path / "log", 1, 50)
    with pytest.raises(RestoreError, match="end with line 50, before --until 51"):
        restore(None, [log], tmp_path / "out", until=Until(51))
    assert not (tmp_path / "out").exists() and not _left_behind(tmp_path)
    done = restore(None, [log], tmp_path / "out", until=Until(51), best_effort=True)
    assert (done.version, done.digest) == (50, history.digests[50])


def test_compressed_files_of_several_frames(history: History, tmp_path: Path) -> None:
    end = history.version
    plain = history.write(tmp_path / "log", 1, end).read_bytes()
    packed = tmp_path / "changelog.1.mfs.zst"
    pack = zstandard.ZstdCompressor().compress
    packed.write_bytes(pack(plain[:3000]) + pack(plain[3000:]))
    assert restore(None, [packed], None).digest == history.digests[end]
    raw = bytearray(packed.read_bytes())
    raw[-20] ^= 1
    packed.write_bytes(raw)
    with pytest.raises(UserError, match=r"changelog\.1\.mfs\.zst is damaged.*-b"):
        restore(None, [packed], None)
    done = restore(None, [packed], None, best_effort=True)
    assert done.version < end and "damaged" in done.problem
    assert done.digest == history.digests[done.version]
    # A damaged file that nothing is needed of stands in nobody's way.
    first = _image_line(tmp_path) + 1
    rest = history.write(tmp_path / "rest", first, end)
    assert restore(tmp_path / "i", [packed, rest], None).digest == history.digests[end]


def test_overlapping_files_in_any_order(history: History, tmp_path: Path) -> None:
    end = history.version
    files = [
        history.write(tmp_path / "a", 30, end), history.write(tmp_path / "b", 1, 45),
        history.write(tmp_path / "c", 20, 50), history.write(tmp_path / "d", 1, 0),
    ]  # fmt: skip
    numbers = [n.version for n in merged([survey(f) for f in files])]
    assert numbers == sorted(numbers) and set(numbers) == set(range(1, end + 1))
    assert restore(None, files, None).digest == history.digests[end]


def test_two_histories_are_not_mixed(history: History, tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    other = History(tmp_path / "o", 4)
    other.reach(70)
    files = [history.write(tmp_path / "a", 1, 40), other.write(tmp_path / "b", 1, 60)]
    with pytest.raises(RestoreError, match="different clusters"):
        restore(None, files, None)
    with pytest.raises(RestoreError, match="not of this cluster"):
        restore(tmp_path / "i", [other.write(tmp_path / "c", 1, other.version)], None)


def test_holes_stop_a_restore(history: History, tmp_path: Path) -> None:
    end = history.version
    first = history.write(tmp_path / "a", 1, 50, hole_comment(51, 52))
    files = [first, history.write(tmp_path / "b", 53, end)]
    with pytest.raises(RestoreError, match=r"b, line 1: lines 51 to 52 are missing.*-b"):
        restore(None, files, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    done = restore(None, files, tmp_path / "out", best_effort=True)
    assert (done.version, done.digest) == (50, history.digests[50])
    assert "51 to 52 are missing" in done.problem
    # What fills the hole may come from another file.
    fill = history.write(tmp_path / "c", 48, 55)
    assert restore(None, [*files, fill], None).digest == history.digests[end]


@pytest.mark.parametrize("damage", ["cut", "flipped", "number", "no number", "binary"])
def test_a_damaged_line_stops_a_restore(history: History, tmp_path: Path, damage: str) -> None:
    bad = 45
    log = history.write(tmp_path / "log", 1, history.version)
    lines = log.read_bytes().splitlines()
    line = lines[bad - 1]
    lines[bad - 1] = {
        "cut": line[: len(line) // 2], "flipped": line.replace(b"|", b"}", 1),
        "number": b"9" + line, "no number": b"x" + line, "binary": b"45: \xff\x00\xfe",
    }[damage]  # fmt: skip
    log.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(RestoreError, match=f"log, line {bad}: .*up to line {bad - 1} is good"):
        restore(None, [log], None)
    done = restore(None, [log], tmp_path / "out", best_effort=True)
    assert (done.version, done.digest) == (bad - 1, history.digests[bad - 1])
    assert image.read_head(tmp_path / "out").digest == history.digests[bad - 1]
    assert restore(None, [log], None, until=Until(bad - 1)).problem == ""


def test_a_line_with_another_result_is_named_and_leaves_no_trace(
    history: History, tmp_path: Path
) -> None:
    """Lines of another cluster may apply, but with other results."""
    (tmp_path / "o").mkdir()
    other = History(tmp_path / "o", 3)
    other.reach(30)
    assert other.lines == history.lines[: other.version]
    good = other.version
    other.write_file(b"only here")  # two lines, the same numbers as in the first history
    log = tmp_path / "log"
    log.write_text("\n".join([*other.lines[:good], *history.lines[good:]][: good + 30]) + "\n")
    assert restore(None, [log], None).digest == history.digests[good + 30]
    wrong = other.lines[: good + 1] + history.lines[good + 1 :]
    log.write_text("\n".join(wrong) + "\n")
    with pytest.raises(RestoreError, match="does not give the result that it says") as refused:
        restore(None, [log], None)
    line = int(str(refused.value).split(": line ")[1].split()[0])
    done = restore(None, [log], None, best_effort=True)
    assert done.version == line - 1
    if done.version == good + 1:
        assert done.digest == other.digests[good + 1]


def test_digests_that_the_masters_agreed_on_are_compared(history: History, tmp_path: Path) -> None:
    end = history.version
    notes = [digest_comment(n, n + 7, history.digests[n]) for n in (50, 60, end)]
    notes.append(digest_comment(end + 5, end + 12, b"y" * 16))
    log = history.write(tmp_path / "log", 1, end, *notes)
    done = restore(None, [log], tmp_path / "out")
    assert (done.digests, done.index) == (3, end + 7)
    assert image.read_head(tmp_path / "out").index == end + 7
    assert restore(tmp_path / "i", [log], None, until=Until(55)).digests == 1
    log = history.write(tmp_path / "log", 1, end, digest_comment(60, 67, b"x" * 16))
    with pytest.raises(RestoreError, match="after line 60 the digest is"):
        restore(None, [log], None)
    done = restore(None, [log], None, best_effort=True)
    assert done.version == 60 and "the masters had" in done.problem


def test_force_checks_what_is_not_needed(history: History, tmp_path: Path) -> None:
    first, end = _image_line(tmp_path) + 1, history.version
    old = history.write(tmp_path / "old", 1, first - 1)
    new = history.write(tmp_path / "new", first, end)
    told: list[str] = []
    restore(tmp_path / "i", [old, new], None, report=told.append)
    assert [t for t in told if "not needed" in t] == [f"{old}: lines 1 to {first - 1}: not needed"]
    done = restore(tmp_path / "i", [old, new], None, force=True)
    assert done.digest == history.digests[end]
    old.write_text(old.read_text().replace("|", "}", 1))
    restore(tmp_path / "i", [old, new], None)
    with pytest.raises(RestoreError, match="old, line 1"):
        restore(tmp_path / "i", [old, new], None, force=True)


def test_a_damaged_image_is_refused(history: History, tmp_path: Path) -> None:
    raw = bytearray((tmp_path / "i").read_bytes())
    raw[len(raw) // 2] ^= 8
    (tmp_path / "i").write_bytes(raw)
    with pytest.raises(image.ImageError, match="damaged"):
        restore(tmp_path / "i", [], tmp_path / "out")
    assert not (tmp_path / "out").exists() and not _left_behind(tmp_path)


def test_a_folder_that_is_not_there(history: History, tmp_path: Path) -> None:
    with pytest.raises(RestoreError, match="no scratch files"):
        restore(tmp_path / "i", [], tmp_path / "none" / "out")
