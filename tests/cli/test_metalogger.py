"""`raftfs-metalogger`: what is asked wrongly is said in one sentence."""

import json
import time
from pathlib import Path

import pytest

from raftfs.cli.metalogger import configure, main, parser
from raftfs.errors import UserError
from raftfs.meta.learner import status
from raftfs.meta.learner.service import _last_night


def test_help_names_the_files(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    for word in ("changelog_ml.N.mfs", "metadata_ml.mfs.back", "# HOLE", "--keep-log-mib"):
        assert word in said


@pytest.mark.parametrize(("words", "said"), [
    ((), "--peers names no master"), (("--peers", ","), "--peers names no master"),
    (("--peers", "a:x"), "'a:x' is not host or host:port"),
    (("--peers", "a", "--back-logs", "-1"), "--back-logs -1: must be between 0 and 10000"),
    (("--peers", "a", "--images", "0"), "--images 0: must be between 1 and 100"),
    (("--peers", "a", "--night-hour", "24"), "--night-hour 24: must be between 0 and 23"),
])  # fmt: skip
def test_wrong_options(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError) as refused:
        configure(parser().parse_args(words))
    assert said in str(refused.value)


def test_questions_about_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", str(tmp_path)]
    assert main(["--data", str(tmp_path / "none"), "--rehearse"]) == 1
    assert "there is no folder" in capsys.readouterr().err
    assert main([*data, "--image"]) == 1
    assert f"no metalogger runs in {tmp_path}" in capsys.readouterr().err
    assert main([*data, "--rehearse"]) == 1
    assert "no metalogger has run there yet" in capsys.readouterr().err
    status.replace(tmp_path / status.NAME, {
        "holes": [{"first": 3, "last": 9, "time": 1}], "image_problem": "no room",
    })  # fmt: skip
    assert main([*data, "--status"]) == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert problems[:2] == ["lines 3 to 9 are missing, in no image", "no image was made: no room"]
    assert "the last rehearsal failed" in problems[2]


@pytest.mark.parametrize("place", ["UTC", "Europe/Berlin", "America/New_York"])
def test_the_last_night(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the clocks change between two nights."""
    monkeypatch.setenv("TZ", place)
    time.tzset()
    try:
        for now in range(1_711_700_000, 1_711_950_000, 5_003):  # the last days of March 2024
            last = _last_night(now, 3)
            assert now - 90_000 < last <= now
            assert time.localtime(last)[3:6] in ((3, 0, 0), (2, 0, 0), (4, 0, 0))
            assert _last_night(last, 3) == last
    finally:
        monkeypatch.undo()
        time.tzset()
