"""Restoring from an image and changelogs: equal to the live state after any line, or refused."""

from pathlib import Path

import pytest

from raftfs.meta import image
from raftfs.meta.restore import Until, restore
from tests.unit.restore.history import History


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
