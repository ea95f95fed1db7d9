"""`raftfs cluster` without a cluster: what it refuses, and how it tells processes apart."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from raftfs.cli import cluster, localcluster, processes
from raftfs.cli.localcluster import LocalCluster, Node


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["up", "--masters", "2"], "--masters 2: with two, losing either stops both"),
        (["up", "--masters", "0"], "--masters 0: must be between 1 and"),
        (["up", "--chunkservers", "0"], "--chunkservers 0: must be between 1 and"),
        (["up", "--hdds", "0"], "--hdds 0: must be between 1 and"),
        (["up", "--port-base", "70000"], "--port-base 70000: must be between"),
        (["status"], "there is no cluster in"),
        (["kill", "leader"], "there is no cluster in"),
        (["start", "m1"], "there is no cluster in"),
        (["status", "--", "-o", "ro"], "options after -- are for mount: -o ro"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "c"
    split = words.index("--") if "--" in words else len(words)
    status = cluster.main([*words[:split], "--dir", str(folder), *words[split:]])
    captured = capsys.readouterr()
    assert status == 1
    assert captured.err.startswith(f"raftfs cluster {words[0]}: ") and said in captured.err
    assert captured.err.count("\n") == 1
    assert not (folder / "cluster.json").exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert cluster.main(["up", "--dir", str(tmp_path / "file" / "c")]) == 1
    assert "cannot be used: Not a directory" in capsys.readouterr().err


def test_down_of_nothing_is_harmless(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cluster.main(["down", "--dir", str(tmp_path / "none")]) == 0
    assert not (tmp_path / "none").exists()


def _written(folder: Path) -> LocalCluster:
    """A cluster of one master and one chunkserver that does not run."""
    argv = ["x", "--hdd", "a", "--hdd", "b"]
    made = LocalCluster(
        folder, 20_000,
        [Node({"name": "m1", "role": "master", "argv": [], "ports": {"clients": 20_003}}),
         Node({"name": "cs1", "role": "chunkserver", "argv": argv, "ports": {}})],
    )  # fmt: skip
    made.save()
    return made


@pytest.mark.parametrize(
    ("option", "number"),
    [("--masters", 3), ("--chunkservers", 2), ("--hdds", 1), ("--port-base", 20_100)],
)
def test_a_cluster_keeps_its_shape(
    option: str, number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _written(tmp_path)
    assert cluster.main(["up", "--dir", str(tmp_path), option, str(number)]) == 1
    assert f"was made with {option} " in capsys.readouterr().err


def test_a_damaged_cluster_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cluster.json").write_text("{")
    assert cluster.main(["status", "--dir", str(tmp_path)]) == 1
    assert "cluster.json cannot be read" in capsys.readouterr().err


def test_a_recycled_pid_is_never_signalled() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        started = processes.start_time(child.pid)
        assert processes.state_of(child.pid, started) == "running"
        assert processes.state_of(child.pid, started - 1) == "stopped"
        assert not processes.send(child.pid, started - 1, signal.SIGKILL)
        processes.end(child.pid, started - 1, 0.5)
        assert child.poll() is None, "another process of that number was ended"
        assert processes.send(child.pid, started, signal.SIGSTOP)
        until = time.monotonic() + 5
        while processes.state_of(child.pid, started) != "paused":
            assert time.monotonic() < until
            time.sleep(0.01)
        processes.end(child.pid, started)
        assert processes.state_of(child.pid, started) == "stopped"
    finally:
        child.kill()
        child.wait()


def test_a_paused_process_is_not_started_twice(tmp_path: Path) -> None:
    made = _written(tmp_path)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        node = made.nodes[0]
        node.pid, node.started = child.pid, processes.start_time(child.pid)
        os.kill(child.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED)
        with pytest.raises(localcluster.UserError, match=r"m1 is paused: .*--signal CONT"):
            made.start(node)
    finally:
        child.kill()
        child.wait()


def test_two_commands_do_not_mix(tmp_path: Path) -> None:
    order: list[str] = []

    def second() -> None:
        with localcluster.locked(tmp_path):
            order.append("second")

    with localcluster.locked(tmp_path):
        other = threading.Thread(target=second)
        other.start()
        time.sleep(0.3)
        order.append("first")
    other.join(10)
    assert order == ["first", "second"]


def test_a_command_that_stays_too_long_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(localcluster, "_LOCK_TIMEOUT_S", 0.2)
    with (
        localcluster.locked(tmp_path),
        pytest.raises(localcluster.UserError, match="another raftfs cluster command"),
        localcluster.locked(tmp_path),
    ):
        pass


def test_mountpoints_are_recognised() -> None:
    assert processes.mounted_at(Path("/proc")) != ""
    assert processes.mounted_at(Path("/proc/no such")) == ""
