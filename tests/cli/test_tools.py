"""What the mfs* tools print, byte for byte as the classic ones do, and how they exit."""

import os

import pytest

from raftfs.cli import (
    mfscheckfile,
    mfsfileinfo,
    mfsgetgoal,
    mfsrgetgoal,
    mfsrsetgoal,
    mfssetgoal,
)
from raftfs.cli.output import counts_by_copies, number
from raftfs.wire.ops import NodeType
from tests.cli.faketools import MIB, FakeTree, Tool, runner

GET, SET = mfsgetgoal.main, mfssetgoal.main


@pytest.fixture
def tree() -> FakeTree:
    return FakeTree()


@pytest.fixture
def run(
    tree: FakeTree, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Tool:
    return runner(tree, monkeypatch, capsys)


def test_the_recorded_session_of_goals(run: Tool) -> None:
    for main, words, printed in (
        (GET, ["file"], "file: 2\n"),
        (GET, ["file", "dir"], "file: 2\ndir: 2\n"),
        (SET, ["2", "file"], "file: goal: 2\n"),
        (SET, ["3", "file", "file2"], "file: goal: 3\nfile2: goal: 3\n"),
        (SET, ["2+", "file"], "file: goal not changed\n"),
        (SET, ["3+", "file2"], "file2: goal not changed\n"),
        (SET, ["1-", "file"], "file: goal: 1\n"),
        (SET, ["2-", "file2"], "file2: goal: 2\n"),
        (
            GET, ["-r", "dir"],
            "dir:\n files with goal                2 :          4\n"
            " directories with goal          2 :          2\n",
        ),
        (
            SET, ["-r", "3", "dir"],
            "dir:\n inodes with goal changed:                       6\n"
            " inodes with goal not changed:                   0\n"
            " inodes with permission denied:                  0\n",
        ),
        (
            SET, ["-r", "2+", "dir"],
            "dir:\n inodes with goal changed:                       0\n"
            " inodes with goal not changed:                   6\n"
            " inodes with permission denied:                  0\n",
        ),
        (GET, ["-n", "dir"], "dir: 3\n"),
        (GET, ["-h", "dir"], "dir: 3\n"),
        (GET, ["-H", "dir"], "dir: 3\n"),
        (SET, ["9", "file"], "file: goal: 9\n"),
        (GET, ["-r", "file"], "file:\n files with goal                9 :          1\n"),
    ):  # fmt: skip
        assert run(main, *words) == (0, printed, ""), words


def test_deprecated_names(run: Tool) -> None:
    status, out, err = run(mfsrgetgoal.main, "file")
    assert (status, out) == (0, "file:\n files with goal                2 :          1\n")
    assert err == 'deprecated tool - use "mfsgetgoal -r"\n'
    status, out, err = run(mfsrsetgoal.main, "2", "dir")
    assert status == 0 and out.startswith("dir:\n inodes with goal changed:")
    assert err == 'deprecated tool - use "mfssetgoal -r"\n'


@pytest.mark.parametrize("goal", ["0", "10", "x", "-", "+", "2++", "²", "1.5", ""])
def test_goals_that_are_none(run: Tool, goal: str) -> None:
    words = ("--", goal, "file") if goal.startswith("-") else (goal, "file")
    status, out, err = run(SET, *words)
    assert status == 1 and out == f"{goal}: wrong goal definition\n"
    assert "usage: mfssetgoal" in err
    assert run(GET, "file") == (0, "file: 2\n", "")


def test_wrong_usage(run: Tool) -> None:
    for main, name in ((GET, "mfsgetgoal"), (SET, "mfssetgoal"),
                       (mfsfileinfo.main, "mfsfileinfo"), (mfscheckfile.main, "mfscheckfile")):
        status, out, err = run(main)
        assert (status, out) == (1, "") and f"usage: {name} " in err
        status, out, err = run(main, "-x", "file")
        assert (status, out) == (1, "")
        assert err.startswith(f"{name}: invalid option -- 'x'\n") and "usage:" in err
    status, out, err = run(SET, "2")
    assert (status, out) == (1, "") and "usage: mfssetgoal" in err


def test_a_bad_name_does_not_stop_the_others(run: Tool) -> None:
    status, out, err = run(GET, "file", "nofile", "/etc/passwd", "fifo", "dir")
    assert (status, err) == (1, "")
    assert out == (
        "file: 2\n"
        "nofile: realpath error on (/mnt/nofile): ENOENT (No such file or directory)\n"
        "/etc/passwd: not MFS object\n"
        "fifo: Operation not permitted\n"
        "dir: 2\n"
    )


def test_who_may_change_a_goal(
    run: Tool, tree: FakeTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree.make("mine", NodeType.FILE, uid=1000)
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    assert run(SET, "3", "mine") == (0, "mine: goal: 3\n", "")
    assert run(SET, "3", "file") == (1, "file: Operation not permitted\n", "")
    status, out, _ = run(SET, "-r", "3", "dir")
    assert status == 0 and " inodes with permission denied:                  6\n" in out


def test_fileinfo(run: Tool, tree: FakeTree) -> None:
    tree.write("file", 1000, (0, 2))
    tree.write("dir/big", 70 * MIB, (1, 2))
    assert run(mfsfileinfo.main, "file", "dir/big", "dir/sub/empty") == (0, (
        "file:\n"
        "\tchunk 0: 0000000000000001_00000001 / (id:1 ver:1)\n"
        "\t\tcopy 1: 10.77.0.11:9422 (status:VALID)\n"
        "\t\tcopy 2: 10.77.0.13:9422 (status:VALID)\n"
        "dir/big:\n"
        "\tchunk 0: 0000000000000002_00000001 / (id:2 ver:1)\n"
        "\t\tcopy 1: 10.77.0.12:9422 (status:VALID)\n"
        "\t\tcopy 2: 10.77.0.13:9422 (status:VALID)\n"
        "\tchunk 1: 0000000000000003_00000001 / (id:3 ver:1)\n"
        "\t\tcopy 1: 10.77.0.12:9422 (status:VALID)\n"
        "\t\tcopy 2: 10.77.0.13:9422 (status:VALID)\n"
        "dir/sub/empty:\n"
        "\tno chunks - empty file\n"
    ), "")  # fmt: skip
    assert run(mfsfileinfo.main, "-q", "dir/big") == (
        0, "dir/big:\n chunks with 2 copies:            2\n", ""
    )  # fmt: skip
    assert run(mfsfileinfo.main, "dir") == (1, "dir: Operation not permitted\n", "")
    tree.copies[1] = []
    status, out, _ = run(mfsfileinfo.main, "file")
    assert status == 0 and out.endswith("\t\tno valid copies !!!\n")


def test_holes_are_shown_as_such(run: Tool, tree: FakeTree) -> None:
    from raftfs.wire.ops import Length

    tree.apply(Length(tree.inodes["file2"], 100 * MIB))
    assert run(mfsfileinfo.main, "file2") == (
        0, "file2:\n\tchunk 0: empty\n\tchunk 1: empty\n", ""
    )  # fmt: skip


def test_checkfile(run: Tool, tree: FakeTree) -> None:
    tree.write("dir/big", 70 * MIB, (1, 2))
    assert run(mfscheckfile.main, "dir/big") == (
        0, "dir/big:\n chunks with 2 copies:            2\n", ""
    )  # fmt: skip
    assert run(mfscheckfile.main, "dir/sub/empty") == (0, "dir/sub/empty:\n", "")
    for name in ("dir", "fifo"):
        assert run(mfscheckfile.main, name) == (1, f"{name}: Operation not permitted\n", "")


def test_counts_beyond_nine_are_one_line() -> None:
    lines = counts_by_copies({0: 1, 1: 2, 10: 3, 12: 4}, "n")
    assert [x.split() for x in lines] == [
        ["chunks", "with", "0", "copies:", "1"], ["chunks", "with", "1", "copy:", "2"],
        ["chunks", "with", "10+", "copies:", "7"],
    ]  # fmt: skip
    assert len({len(x) for x in lines}) == 1


@pytest.mark.parametrize(
    ("value", "style", "text"),
    [(7, "n", "7"), (1536, "h", "1.5Ki"), (1500, "H", "1.5k"), (1500, "k", "2"), (0, "g", "0"),
     (3 * 2**30, "g", "3"), (3 * 2**20, "h", "3.0Mi"), (999, "H", "999")],
)  # fmt: skip
def test_number_styles(value: int, style: str, text: str) -> None:
    assert number(value, style) == text.rjust(10)


def test_the_environment_chooses_the_style(
    run: Tool, tree: FakeTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree.write("file", 1, (0,))
    monkeypatch.setenv("MFSHRFORMAT", "h")
    assert run(mfscheckfile.main, "file")[0] == 0
