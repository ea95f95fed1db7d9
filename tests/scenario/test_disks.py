"""Disks of chunkservers: one dies, one is to be pulled, one is full."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import NEEDS_FUSE, free_port_base
from tests.scenario.cluster import KILLED, ScenarioCluster
from tests.scenario.test_full_disk import small_disk
from tests.scenario.test_rot import Reader
from tests.scenario.test_stories import write_synced

FILES = 24


def _state(cluster: ScenarioCluster, name: str) -> str:
    return next(str(p["state"]) for p in cluster.status()["processes"] if p["name"] == name)


def restart(
    cluster: ScenarioCluster, name: str, change: Callable[[list[str]], list[str]]
) -> None:
    """Stop a process, and start it with another command line."""
    cluster.raftfs("cluster", "kill", name, "--signal", "TERM")
    cluster.wait(f"the end of {name}", lambda: _state(cluster, name) == "stopped")
    kept = json.loads((cluster.dir / "cluster.json").read_text())
    (node,) = [n for n in kept["nodes"] if n["name"] == name]
    node["argv"] = change(node["argv"])
    (cluster.dir / "cluster.json").write_text(json.dumps(kept))
    cluster.raftfs("cluster", "start", name)


def disks(cluster: ScenarioCluster) -> dict[str, dict[str, Any]]:
    """What `raftfs disks list` says of each, by its folder."""
    masters = ",".join(cluster.status()["masters"])
    servers = json.loads(cluster.raftfs("disks", "list", "-H", masters, "--json"))
    return {d["path"]: d for s in servers for d in s["disks"]}


def admin(cluster: ScenarioCluster, *words: str) -> str:
    """`raftfs disks ...` with the cluster's key."""
    masters = ",".join(cluster.status()["masters"])
    key = str(cluster.dir / "cluster.key")
    return cluster.raftfs("disks", *words, "-H", masters, "--key", key)


def fill(cluster: ScenarioCluster) -> dict[Path, bytes]:
    """Some files, synced."""
    content = {cluster.mnt / f"f{n}": os.urandom(100_000 + n) for n in range(FILES)}
    for path, data in content.items():
        write_synced(path, data)
    return content


def all_whole(cluster: ScenarioCluster, content: dict[Path, bytes]) -> bool:
    """Each file has its two copies."""
    said = cluster.raftfs("checkfile", *map(str, content)).split("\n")
    return sum("with 2 copies" in line for line in said) == len(content)


def equal(content: dict[Path, bytes]) -> bool:
    """Each file has its bytes."""
    return all(path.read_bytes() == data for path, data in content.items())


@pytest.mark.parametrize("cluster", [("--hdds", "2")], indirect=True)
def test_a_dying_disk_loses_nothing_and_can_be_tested_again(cluster: ScenarioCluster) -> None:
    cluster.expect(
        *KILLED, "disk error", "disk damaged", "copy damaged", "damaged copy not set aside",
        "damaged copy stays where it is", "repair put off", "story not written", "story not read",
        "unrest file not written",
        "term not written", "replication failed", "copies not destroyed", "name of a copy mended",
        "strange file set aside", "file not readable", "file not set aside",
    )  # fmt: skip
    sick, dying = cluster.dir / "cs1/hdd1", cluster.dir / "dying"
    restart(cluster, "cs1", lambda argv: [
        argv[0], "-m", "tests.scenario.dyingchunk", str(dying), *argv[3:],
    ])  # fmt: skip
    content = fill(cluster)
    there = len(list(sick.glob("??/chunk_*.mfs")))
    assert there, "the disk has copies"
    cluster.remount()
    reader = Reader(next(iter(content)), next(iter(content.values())))
    dying.write_text(str(sick))
    reader.start()
    for number in range(12):  # nobody who writes or reads meanwhile sees an error
        path = cluster.mnt / f"late{number}"
        content[path] = os.urandom(70_000)
        write_synced(path, content[path])
        assert equal(content)
    cluster.wait("evidence", lambda: disks(cluster)[str(sick)]["state"] == "damaged")
    evidence = disks(cluster)[str(sick)]["evidence"]
    assert len(evidence) == 3 and all("EIO" in e and str(sick) in e for e in evidence)
    masters = ",".join(cluster.status()["masters"])
    said = cluster.raftfs("status", "-H", masters, ok=False)
    assert f"DISK_DAMAGED: {sick} of" in said
    cluster.wait("two good copies of all", lambda: all_whole(cluster, content))
    reader.stop()
    assert (reader.wrong, reader.errors) == (0, []) and reader.equal
    cluster.remount()
    assert equal(content)
    server = "127.0.0.1:" + str(next(
        p["ports"]["data"] for p in cluster.status()["processes"] if p["name"] == "cs1"
    ))  # fmt: skip
    masters = ",".join(cluster.status()["masters"])
    said = cluster.raftfs("disks", "retest", server, str(sick), "-H", masters, "--key",
                          str(cluster.dir / "cluster.key"), ok=False)  # fmt: skip
    assert "still fails" in said and "Input/output error" in said
    dying.unlink()
    assert "done on" in admin(cluster, "retest", server, str(sick))
    cluster.wait("a good disk", lambda: disks(cluster)[str(sick)]["state"] == "good")
    assert equal(content)


@pytest.mark.parametrize(
    ("cluster", "hdds"), [(("--hdds", "2"), 2), (("--hdds", "1"), 1)], indirect=["cluster"]
)
def test_a_disk_is_marked_emptied_and_pulled(cluster: ScenarioCluster, hdds: int) -> None:
    """With two disks its copies go to the other one; alone, to the other servers."""
    cluster.expect(*KILLED, "disk is no longer listed", "master of another cluster")
    config = cluster.dir / "mfshdd.cfg"
    folders = [cluster.dir / f"cs1/hdd{n}" for n in range(1, hdds + 1)]
    config.write_text("".join(f"{folder}\n" for folder in folders))
    restart(cluster, "cs1", lambda argv: [
        *argv[: argv.index("--hdd")], "--hdd-config", str(config),
    ])  # fmt: skip
    content = fill(cluster)
    pulled = folders[0]
    assert list(pulled.glob("??/chunk_*.mfs"))
    config.write_text("".join(f"{'*' * (f == pulled)}{f}\n" for f in folders))
    cluster.raftfs("cluster", "kill", "cs1", "--signal", "HUP")
    cluster.wait("the disk may be pulled",
                 lambda: disks(cluster)[str(pulled)]["state"] == "removable")  # fmt: skip
    assert not list(pulled.glob("??/chunk_*.mfs"))
    assert "it may be pulled" in cluster.raftfs(
        "disks", "list", "-H", ",".join(cluster.status()["masters"]))  # fmt: skip
    assert all_whole(cluster, content) and equal(content)
    cluster.raftfs("cluster", "kill", "cs1", "--signal", "TERM")
    cluster.wait("the end of cs1", lambda: _state(cluster, "cs1") == "stopped")
    shutil.rmtree(pulled)
    if hdds == 2:
        config.write_text(f"{folders[1]}\n")
        cluster.raftfs("cluster", "start", "cs1")
    cluster.wait("all copies", lambda: all_whole(cluster, content))
    cluster.remount()
    assert equal(content)


@pytest.mark.skipif(NEEDS_FUSE, reason="this machine has no /dev/fuse or no fusermount3")
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system: needs root")
def test_a_full_disk_is_an_error_for_the_writer_and_tears_nothing(tmp_path: Path) -> None:
    made = ScenarioCluster(tmp_path, free_port_base())
    made.expect(*KILLED, "disk refuses", "write refused by master", "written data lost")
    with small_disk(made.dir / "cs1/hdd1", "430M"):
        try:
            made.raftfs("cluster", "up", "--port-base", str(made.port_base), "--mount",
                        str(made.mnt), "--chunkservers", "1")  # fmt: skip
            _until_full(made)
            unexpected = made.unexpected_log_lines()
            assert not unexpected, unexpected[:20]
        finally:
            subprocess.run(
                [sys.executable, "-m", "raftfs.cli.raftfs", "cluster", "down", "--dir",
                 str(made.dir)], timeout=120, check=False, capture_output=True,
            )  # fmt: skip


def _until_full(made: ScenarioCluster) -> None:
    content: dict[Path, bytes] = {}
    seen = 0
    for number in range(100):
        path, data = made.mnt / f"f{number}", os.urandom(9 * 2**20)
        try:
            write_synced(path, data)
        except OSError as e:
            seen = e.errno or 0
            break
        content[path] = data
    assert seen == errno.ENOSPC and len(content) > 5
    assert equal(content), "what was synced before"
    made.remount()
    assert equal(content)
    for path in list(content)[: 3 * len(content) // 4]:
        path.unlink()
        del content[path]

    def goes_on() -> bool:
        data = os.urandom(2**20)
        try:
            write_synced(made.mnt / "again", data)
        except OSError as e:
            assert e.errno == errno.ENOSPC
            return False
        content[made.mnt / "again"] = data
        return True

    made.wait("room again", goes_on)
    made.remount()
    assert equal(content)
