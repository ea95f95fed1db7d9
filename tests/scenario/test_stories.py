"""Stories that an administrator would tell: each a cluster of its own, real processes, a real
mount.
"""

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from tests.scenario.cluster import KILLED, ScenarioCluster


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_synced(path: Path, data: bytes) -> None:
    """Write and fsync."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def test_files_come_back_equal_after_remount(cluster: ScenarioCluster) -> None:
    big, small = os.urandom(65 * 2**20), os.urandom(63 * 2**20)
    write_synced(cluster.mnt / "big", big)
    (cluster.mnt / "small").write_bytes(small)
    source = Path(os.__file__).parent / "json"
    shutil.copytree(source, cluster.mnt / "tree")
    os.link(cluster.mnt / "small", cluster.mnt / "hard")
    os.symlink("small", cluster.mnt / "soft")
    os.mkfifo(cluster.mnt / "fifo")
    (cluster.mnt / "sparse").touch()
    os.truncate(cluster.mnt / "sparse", 200 * 2**20)
    cluster.remount()
    assert (cluster.mnt / "big").read_bytes() == big
    assert (cluster.mnt / "hard").read_bytes() == small
    assert os.readlink(cluster.mnt / "soft") == "small"
    assert os.stat(cluster.mnt / "hard").st_nlink == 2
    assert os.stat(cluster.mnt / "sparse").st_size == 200 * 2**20
    for path in source.rglob("*"):
        if path.is_file():
            assert digest(cluster.mnt / "tree" / path.relative_to(source)) == digest(path)
    info = cluster.raftfs("fileinfo", str(cluster.mnt / "big"))
    assert "\tchunk 1: " in info and "\tchunk 2: " not in info
    assert info.count("(status:VALID)") == 4
    info = cluster.raftfs("fileinfo", str(cluster.mnt / "small"))
    assert "\tchunk 0: " in info and "\tchunk 1: " not in info


def test_the_leader_dies_and_the_mount_goes_on(cluster: ScenarioCluster) -> None:
    cluster.expect(*KILLED)
    write_synced(cluster.mnt / "before", b"before")
    held = open(cluster.mnt / "held", "wb")  # noqa: SIM115 - open across the failover
    held.write(b"first ")
    os.unlink(cluster.mnt / "before")
    old = cluster.status()
    cluster.raftfs("cluster", "kill", "leader")
    (cluster.mnt / "after").write_bytes(b"after")
    held.write(b"second")
    held.close()
    new = cluster.status()
    assert new["leader"] != old["leader"] and new["term"] > old["term"]
    assert (cluster.mnt / "held").read_bytes() == b"first second"
    cluster.raftfs("cluster", "start", old["leader"])
    cluster.remount()
    assert sorted(os.listdir(cluster.mnt)) == ["after", "held"]


def test_a_lost_chunkserver_is_healed_from_the_other_copies(cluster: ScenarioCluster) -> None:
    cluster.expect(*KILLED)
    data = os.urandom(3 * 2**20)
    path = cluster.mnt / "file"
    write_synced(path, data)
    info = cluster.raftfs("fileinfo", str(path))
    port = int(info.split("copy 1: 127.0.0.1:")[1].split()[0])
    processes = cluster.status()["processes"]
    (victim,) = [p["name"] for p in processes if p["ports"].get("data") == port]
    cluster.raftfs("cluster", "kill", victim)
    assert path.read_bytes() == data, "the other copy is read"

    def healed() -> bool:
        info = cluster.raftfs("fileinfo", str(path))
        return info.count("(status:VALID)") == 2 and f":{port} " not in info

    cluster.wait("two copies again, without the lost server", healed)
    cluster.remount()
    assert path.read_bytes() == data
    cluster.raftfs("cluster", "start", victim)

    def surplus_gone() -> bool:
        return cluster.raftfs("fileinfo", str(path)).count("(status:VALID)") == 2

    cluster.wait("the surplus copy is destroyed", surplus_gone)
    assert path.read_bytes() == data


def test_raising_and_lowering_goals_changes_the_copies(cluster: ScenarioCluster) -> None:
    path = cluster.mnt / "file"
    write_synced(path, os.urandom(100_000))
    for goal in (3, 1, 2):
        cluster.raftfs("setgoal", str(goal), str(path))
        cluster.wait(
            f"{goal} copies",
            lambda g=goal: cluster.raftfs("checkfile", str(path)).split()[-4:]
            == ["with", str(g), "copy:" if g == 1 else "copies:", "1"],
        )


def test_deleted_files_leave_the_disks(cluster: ScenarioCluster) -> None:
    for number in range(20):
        (cluster.mnt / f"f{number}").write_bytes(os.urandom(10_000))
    disks = list(cluster.dir.glob("cs*/hdd1"))
    assert sum(1 for d in disks for _ in d.glob("??/chunk_*.mfs")) >= 20
    for number in range(20):
        (cluster.mnt / f"f{number}").unlink()
    cluster.wait(
        "no chunk file is left",
        lambda: not any(True for d in disks for _ in d.glob("??/chunk_*.mfs")),
    )


def test_a_follower_that_lost_its_disk_is_refused_and_replaced(cluster: ScenarioCluster) -> None:
    cluster.expect("replica refused", "refused by a peer")
    for number in range(50):
        (cluster.mnt / f"f{number}").write_bytes(b"x" * number)
    status = cluster.status()
    (victim, *_) = [
        p["name"] for p in status["processes"]
        if p["role"] == "master" and p["name"] != status["leader"]
    ]  # fmt: skip
    cluster.raftfs("cluster", "kill", victim)
    shutil.rmtree(cluster.dir / victim)
    said = cluster.raftfs("cluster", "start", victim, ok=False)
    assert "lost its data" in said and "raftfs cluster replace" in said
    cluster.raftfs("cluster", "replace", victim)
    (cluster.mnt / "later").write_bytes(b"later")

    def agree() -> bool:
        views = cluster.status()["replicas"].values()
        states = {(v["applied"], v["digest"]) for v in views}
        return len(views) == 3 and len(states) == 1

    cluster.wait("the digests of the three agree", agree)
    # It votes: with the leader gone, the other one needs its vote.
    cluster.expect(*KILLED)
    cluster.raftfs("cluster", "kill", "leader")
    (cluster.mnt / "last").write_bytes(b"last")
    assert (cluster.mnt / "last").read_bytes() == b"last"


def test_everything_restarts_with_what_it_had(cluster: ScenarioCluster) -> None:
    data = os.urandom(1_000_000)
    write_synced(cluster.mnt / "file", data)
    os.chmod(cluster.mnt / "file", 0o640)
    cluster.raftfs("cluster", "down")
    assert not os.path.ismount(cluster.mnt)
    assert all(p["state"] == "stopped" for p in cluster.status()["processes"])
    cluster.raftfs("cluster", "up", "--mount", str(cluster.mnt))
    assert (cluster.mnt / "file").read_bytes() == data
    assert os.stat(cluster.mnt / "file").st_mode & 0o777 == 0o640


@pytest.mark.parametrize("verb", ["up", "down"])
def test_twice_is_harmless(cluster: ScenarioCluster, verb: str) -> None:
    (cluster.mnt / "file").write_text("here")
    mount = ["--mount", str(cluster.mnt)] if verb == "up" else []
    cluster.raftfs("cluster", verb, *mount)
    cluster.raftfs("cluster", verb, *mount)
    if verb == "up":
        assert (cluster.mnt / "file").read_text() == "here"
