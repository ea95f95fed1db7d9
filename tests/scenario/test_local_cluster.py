"""`raftfs cluster` itself, on real processes."""

import socket
import time
from pathlib import Path

from tests.conftest import free_port_base
from tests.scenario.cluster import ScenarioCluster


def _running(cluster: ScenarioCluster) -> list[str]:
    return [p["name"] for p in cluster.status()["processes"] if p["state"] != "stopped"]


def _is_mounted(path: Path) -> bool:
    return f" {path} " in Path("/proc/self/mountinfo").read_text()


def test_two_clusters_do_not_disturb_each_other(cluster: ScenarioCluster, tmp_path: Path) -> None:
    folder = tmp_path / "second"
    folder.mkdir()
    other = ScenarioCluster(folder, free_port_base())
    other.raftfs("cluster", "up", "--port-base", str(other.port_base), "--mount", str(other.mnt))
    try:
        (cluster.mnt / "name").write_text("first")
        (other.mnt / "name").write_text("second")
        other.raftfs("cluster", "kill", "leader")
        assert (cluster.mnt / "name").read_text() == "first"
        assert (other.mnt / "name").read_text() == "second"
    finally:
        other.raftfs("cluster", "down", "--wipe")
    assert not other.dir.exists() and not _is_mounted(other.mnt)
    assert len(_running(cluster)) == 7
    assert (cluster.mnt / "name").read_text() == "first"


def test_a_first_start_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    base = free_port_base()
    cluster = ScenarioCluster(tmp_path, base)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", base + 13))
        sock.listen()
        said = cluster.raftfs("cluster", "up", "--port-base", str(base), ok=False)
        assert f"port {base + 13} (m2, clients)" in said
    assert not (cluster.dir / "cluster.json").exists()
    cluster.raftfs("cluster", "up", "--port-base", str(base), "--chunkservers", "1")
    cluster.raftfs("cluster", "down", "--wipe")


def test_a_paused_mount_goes_down_too(cluster: ScenarioCluster) -> None:
    (cluster.mnt / "file").write_text("here")
    cluster.raftfs("cluster", "kill", "mount", "--signal", "STOP")
    assert "paused" in cluster.raftfs("cluster", "status")
    start = time.monotonic()
    cluster.raftfs("cluster", "down")
    assert time.monotonic() - start < 12
    assert _running(cluster) == [] and not _is_mounted(cluster.mnt)


def test_a_mount_that_was_killed_is_mounted_again(cluster: ScenarioCluster) -> None:
    with open(cluster.mnt / "file", "w") as file:
        file.write("closed")
    cluster.raftfs("cluster", "kill", "mount")
    assert not _is_mounted(cluster.mnt)
    cluster.raftfs("cluster", "up", "--mount", str(cluster.mnt))
    assert (cluster.mnt / "file").read_text() == "closed"


def test_options_after_two_dashes_reach_the_mount(cluster: ScenarioCluster) -> None:
    (cluster.mnt / "file").write_text("here")
    second = cluster.dir.parent / "second"
    said = cluster.raftfs("cluster", "mount", str(second), "--", "-o", "nonsense", ok=False)
    assert "nonsense" in said and "mnt2" not in cluster.raftfs("cluster", "status")
    cluster.raftfs("cluster", "mount", str(second), "--", "-o", "ro")
    assert (second / "file").read_text() == "here"
    try:
        (second / "other").write_text("no")
        raise AssertionError("a read-only mount was written to")
    except OSError as e:
        assert "Read-only" in str(e)
