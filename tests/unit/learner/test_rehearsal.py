"""The rehearsal succeeds on what a learner writes, and finds whatever is not as it was written."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from raftfs.errors import UserError
from raftfs.meta.changelogfiles import digest_comment
from raftfs.meta.learner import images, rehearsal, status
from raftfs.meta.learner.files import ChangelogFiles, changelogs
from raftfs.meta.learner.service import problems
from tests.unit.restore.history import History


class Folder:
    """A learner's folder after two nights: images, rotated files, and lines behind the status."""

    def __init__(self, folder: Path, scratch: Path, *, compress: bool = False) -> None:
        self.path = folder
        folder.mkdir()
        scratch.mkdir()
        self.history = History(scratch, 3)
        files = ChangelogFiles(folder, 0)
        for part in range(4):
            before = self.history.version
            self.history.go_on(40)
            new = self.history.lines[before:] if part else self.history.lines
            files.append(list(enumerate(new, self.history.version - len(new) + 1)))
            version = self.history.version
            files.comment(digest_comment(version, 7, self.history.digests[version]))
            if part in (0, 1):
                self.history.checkpoint()
                self.history.store.copy_to(scratch / "copy")
                images.add_image(folder, scratch / "copy", 3)
                files.rotate()
                if compress:
                    files.compress_old()
            if part == 2:
                status.replace(folder / status.NAME, {
                    "version": version, "digest": self.history.digests[version].hex(),
                })  # fmt: skip
        files.close()

    def rehearse(self) -> str:
        """The problem."""
        result = rehearsal.rehearse(self.path)
        assert status.read_json(self.path / rehearsal.RESULT) == result
        assert not list(self.path.glob(".re*")), "scratch files were left"
        problem = str(result["problem"])
        assert problems(self.path) == [f"the last rehearsal failed: {problem}"] * bool(problem)
        return problem


@pytest.mark.parametrize("compress", [False, True])
def test_good_files_are_good(tmp_path: Path, compress: bool) -> None:
    folder = Folder(tmp_path / "ml", tmp_path / "scratch", compress=compress)
    assert folder.rehearse() == ""
    result = status.read_json(folder.path / rehearsal.RESULT)
    said = status.read(folder.path)
    assert result["version"] == said["version"] < folder.history.version
    assert result["digest"] == said["digest"] and result["digests"] >= 1
    newest = images.images(folder.path)[0]
    assert result["lines"] == said["version"] - newest.head.version > 10
    (folder.path / images.NAME).unlink()
    assert folder.rehearse() == "", "lines are there from the first on"
    assert status.read_json(folder.path / rehearsal.RESULT)["lines"] == said["version"]


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_any_flipped_byte_behind_the_image_is_found(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "ml", tmp_path / "scratch")
    newest = folder.path / "changelog_ml.0.mfs"
    whole = newest.read_bytes()
    last = status.read(folder.path)["version"]
    end = whole.index(f"\n{last + 1}: ".encode())
    chance = random.Random(1)
    for _ in range(25):
        at = chance.randrange(end)
        if whole[whole.rfind(b"\n", 0, at) + 1 :].startswith(b"#"):
            continue
        _flip(newest, at)
        assert folder.rehearse(), f"byte {at} of {newest.name}"
        newest.write_bytes(whole)
    assert folder.rehearse() == ""


def test_a_flipped_byte_of_the_image_is_found(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "ml", tmp_path / "scratch")
    image = folder.path / images.NAME
    whole = image.read_bytes()
    chance = random.Random(2)
    for _ in range(15):
        _flip(image, chance.randrange(len(whole)))
        assert "image" in folder.rehearse()
        image.write_bytes(whole)


def _remove_line(folder: Path) -> None:
    path = folder / "changelog_ml.0.mfs"
    text = path.read_text().splitlines(keepends=True)
    path.write_text("".join(text[:5] + text[6:]))


def _remove_file(folder: Path) -> None:
    (folder / "changelog_ml.0.mfs").unlink()


def _another_digest(folder: Path) -> None:
    status.replace(folder / status.NAME, status.read(folder) | {"digest": "00" * 16})


def _an_image_of_the_future(folder: Path) -> None:
    status.replace(folder / status.NAME, status.read(folder) | {"version": 3})


@pytest.mark.parametrize(("harm", "said"), [
    (_remove_line, "are missing"), (_remove_file, "end with line"),
    (_another_digest, "the learner has 0000"), (_an_image_of_the_future, "later than"),
])  # fmt: skip
def test_whatever_is_missing_is_found(
    tmp_path: Path, harm: Callable[[Path], None], said: str
) -> None:
    folder = Folder(tmp_path / "ml", tmp_path / "scratch")
    harm(folder.path)
    assert said in folder.rehearse()


def test_files_that_are_rotated_meanwhile_are_all_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(tmp_path / "ml", tmp_path / "scratch")
    link, rotated = os.link, []

    def rotating(source: Path, target: Path) -> None:
        if len(rotated) < 3:
            rotated.append(source)
            files = ChangelogFiles(folder.path, folder.history.version)
            files.append([(folder.history.version + 1, "x")])
            files.rotate()
            files.close()
        link(source, target)

    monkeypatch.setattr(os, "link", rotating)
    assert folder.rehearse() == "" and len(rotated) == 3
    assert len(changelogs(folder.path)) == 6


def test_an_empty_folder_says_so(tmp_path: Path) -> None:
    assert "no metalogger has run there yet" in rehearsal.rehearse(tmp_path)["problem"]
    (tmp_path / status.NAME).write_text("{")
    with pytest.raises(UserError, match=r"learner\.json cannot be read"):
        status.read(tmp_path)


def test_images_are_kept_in_order_and_bounded(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "ml", tmp_path / "scratch")
    versions = [i.head.version for i in images.images(folder.path)]
    for _ in range(4):
        folder.history.go_on(5)
        folder.history.checkpoint()
        folder.history.store.copy_to(tmp_path / "copy")
        images.add_image(folder.path, tmp_path / "copy", 3)
        versions.insert(0, folder.history.version)
    found = images.images(folder.path)
    assert [i.head.version for i in found] == versions[:3]
    assert [i.path.name for i in found] == [images.NAME, f"{images.NAME}.1", f"{images.NAME}.2"]
    assert all(i.path.stat().st_mode & 0o077 == 0 for i in found)
    sessions = (folder.path / images.SESSIONS).read_text()
    assert sessions.count("host:/mnt") == 2 and "secret" not in sessions
    assert json.dumps(sessions)
