"""Bad input: one sentence, an exit status that is not 0, nothing damaged, no traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

from raftfs.wire.auth import ClusterKey
from tests.conftest import NEEDS_FUSE
from tests.scenario.cluster import KILLED, ScenarioCluster

MASTER, CHUNK, MOUNT = "raftfs.cli.master", "raftfs.chunk.main", "raftfs.mount.main"


def refused(module: str, *words: str, timeout_s: int = 25) -> str:
    """Run a program that must refuse; gives its one sentence."""
    done = subprocess.run(
        ["timeout", "-s", "KILL", str(timeout_s), sys.executable, "-m", module, *words],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode not in (0, -9, 137), f"{done.returncode}: {done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr
    said = [x for x in done.stderr.splitlines() if x and not x.startswith("{")]
    assert len(said) == 1, done.stderr
    return said[0]


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """A cluster key."""
    path = tmp_path / "key"
    ClusterKey.generate(path)
    return path


def master(tmp_path: Path, key: Path, peers: str, *more: str) -> str:
    """A master that must refuse."""
    return refused(MASTER, "--peers", peers, "--data", str(tmp_path / "m"), "--key", str(key),
                   "--listen", "127.0.0.1", *more)  # fmt: skip


def test_two_masters(tmp_path: Path, key: Path) -> None:
    said = master(tmp_path, key, "127.0.0.1:7000,127.0.0.1:7010", "--name", "127.0.0.1:7000")
    assert "two masters" in said and "at least three" in said


@pytest.mark.parametrize("peers", ["", "a:b,c", "host:99999", "h:1,h:1,h:2"])
def test_peers_that_are_none(tmp_path: Path, key: Path, peers: str) -> None:
    assert "--peers" in master(tmp_path, key, peers, "--name", "h:1")


def test_a_name_that_is_no_peer(tmp_path: Path, key: Path) -> None:
    said = master(tmp_path, key, "127.0.0.1:7000", "--name", "127.0.0.1:7001")
    assert "127.0.0.1:7001 is not among --peers" in said


def test_an_address_that_is_not_this_machine(tmp_path: Path, key: Path) -> None:
    said = master(tmp_path, key, "192.0.2.1:7000", "--name", "192.0.2.1:7000")
    assert "192.0.2.1:7000" in said and "cannot listen" in said


def test_keys(tmp_path: Path, key: Path) -> None:
    assert "raftfs keygen" in master(tmp_path, tmp_path / "none", "127.0.0.1:7000")
    key.chmod(0o644)
    assert "chmod 600" in master(tmp_path, key, "127.0.0.1:7000")


def test_an_unwritable_data_folder(tmp_path: Path, key: Path) -> None:
    (tmp_path / "m").write_text("a file where a folder should be")
    assert "cannot be used" in master(tmp_path, key, "127.0.0.1:7000")


def test_a_corrupt_exports_line(tmp_path: Path, key: Path) -> None:
    exports = tmp_path / "mfsexports.cfg"
    exports.write_text("# who may mount\n* / rw\n10.0.0.0/8 / rw,maproot=nobody-of-this-name\n")
    said = master(tmp_path, key, "127.0.0.1:7000", "--exports", str(exports))
    assert f"{exports}:3:" in said and "nobody-of-this-name" in said


def test_a_chunkserver_without_usable_disks(tmp_path: Path, key: Path) -> None:
    (tmp_path / "file").write_text("")
    said = refused(CHUNK, "--hdd", str(tmp_path / "file"), "-H", "127.0.0.1", "--key", str(key))
    assert "cannot be used" in said
    disk = tmp_path / "disk"
    (disk / "00").mkdir(parents=True)
    (disk / "00" / "chunk_0000000000000100_00000001.mfs").write_bytes(b"old")
    said = refused(CHUNK, "--hdd", str(disk), "-H", "127.0.0.1", "--key", str(key))
    assert "cannot be told to which server" in said
    assert (disk / "00" / "chunk_0000000000000100_00000001.mfs").read_bytes() == b"old"


@pytest.mark.skipif(NEEDS_FUSE, reason="this machine has no /dev/fuse or no fusermount3")
class TestMount:
    """raftfs-mount refuses with a sentence."""

    def test_mountpoint_missing(self, tmp_path: Path) -> None:
        said = refused(MOUNT, str(tmp_path / "none"), "-H", "127.0.0.1:1")
        assert str(tmp_path / "none") in said

    def test_mountpoint_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        assert "not a directory" in refused(MOUNT, str(tmp_path / "file"), "-H", "127.0.0.1:1")

    def test_no_master_reachable(self, tmp_path: Path) -> None:
        said = refused(MOUNT, str(tmp_path), "-H", "127.0.0.1:1")
        assert "can't connect" in said and "127.0.0.1:1" in said

    def test_bad_option(self, tmp_path: Path) -> None:
        assert "nonsense" in refused(MOUNT, str(tmp_path), "-H", "127.0.0.1:1", "-o", "nonsense")


def test_bad_input_to_a_running_cluster(cluster: ScenarioCluster) -> None:
    """Already mounted, busy ports, unknown names, foreign disks and folders: nothing is harmed."""
    cluster.expect("master refuses", "client refused", *KILLED)
    (cluster.mnt / "file").write_text("unharmed")
    base = cluster.port_base
    clients = f"127.0.0.1:{base + 3},127.0.0.1:{base + 13},127.0.0.1:{base + 23}"
    assert "mount" in refused(MOUNT, str(cluster.mnt), "-H", clients)
    assert "subfolder" in refused(MOUNT, str(cluster.dir), "-H", clients, "-S", "/no/such")
    key = str(cluster.dir / "cluster.key")
    name = f"127.0.0.1:{base}"
    peers = f"{name},127.0.0.1:{base + 10},127.0.0.1:{base + 20}"
    said = refused(MASTER, "--peers", peers, "--name", name, "--data", str(cluster.dir / "m1"),
                   "--key", key, "--listen", "127.0.0.1")  # fmt: skip
    assert "in use by another daemon" in said
    said = refused(MASTER, "--peers", peers, "--name", name, "--data", str(cluster.dir / "x"),
                   "--key", key, "--listen", "127.0.0.1")  # fmt: skip
    assert "is another master running?" in said
    masters = f"127.0.0.1:{base + 2}"
    disk = str(cluster.dir / "cs1/hdd1")
    said = refused(CHUNK, "--hdd", disk, "-H", masters, "--key", key)
    assert "in use by another chunkserver" in said
    said = refused(CHUNK, "--hdd", str(cluster.dir / "new"), "-H", masters, "--key", key,
                   "--listen", "127.0.0.1", "--port", str(base + 501))  # fmt: skip
    assert "is another chunkserver running?" in said
    assert "no running nobody" in cluster.raftfs("cluster", "kill", "nobody", ok=False)
    assert "m9" in cluster.raftfs("cluster", "start", "m9", ok=False)
    # a follower started on another one's folder
    cluster.raftfs("cluster", "kill", "m1")
    said = refused(MASTER, "--peers", peers, "--name", f"127.0.0.1:{base + 10}", "--data",
                   str(cluster.dir / "m1"), "--key", key, "--listen", "127.0.0.1")  # fmt: skip
    assert "cannot listen" in said or "is the data folder of master" in said
    cluster.raftfs("cluster", "start", "m1")
    for goal in ("0", "10", "x"):
        said = cluster.raftfs("setgoal", goal, str(cluster.mnt / "file"), ok=False)
        assert f"{goal}: wrong goal definition" in said
    assert (cluster.mnt / "file").read_text() == "unharmed"


def test_other_peers_than_the_clusters(cluster: ScenarioCluster) -> None:
    """A master that was told a wrong --peers would count a wrong majority."""
    cluster.expect(*KILLED)
    cluster.raftfs("cluster", "kill", "m1")
    key = str(cluster.dir / "cluster.key")
    name = f"127.0.0.1:{cluster.port_base}"
    said = refused(MASTER, "--peers", name, "--data", str(cluster.dir / "m1"), "--key", key,
                   "--listen", "127.0.0.1")  # fmt: skip
    assert "this cluster's masters are" in said and f"127.0.0.1:{cluster.port_base + 20}" in said
    cluster.raftfs("cluster", "start", "m1")


def test_a_folder_with_other_things_is_no_disk(tmp_path: Path, key: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("dear")
    said = refused(CHUNK, "--hdd", str(tmp_path / "home"), "-H", "127.0.0.1", "--key", str(key))
    assert "is not empty" in said and "letter" in said


def test_a_disk_of_another_cluster_is_refused(cluster: ScenarioCluster, tmp_path: Path) -> None:
    from raftfs.chunk.disk import Disk

    cluster.expect("master refuses")
    foreign = Disk(tmp_path / "foreign")
    foreign.claim(b"s" * 16, b"another cluster!")
    foreign.close()
    said = refused(
        CHUNK, "--hdd", str(tmp_path / "foreign"), "-H", f"127.0.0.1:{cluster.port_base + 2}",
        "--listen", "127.0.0.1", "--port", str(cluster.port_base + 509), "--key",
        str(cluster.dir / "cluster.key"),
    )  # fmt: skip
    assert "belong to cluster" in said
