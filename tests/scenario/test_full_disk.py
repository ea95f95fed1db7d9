"""A master whose disk is full ends with one sentence; the others go on; with room it is back."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import NEEDS_FUSE, free_port_base
from tests.scenario.cluster import KILLED, ScenarioCluster
from tests.scenario.test_membership import Writer

DISK = "48M"


@contextmanager
def small_disk(place: Path, size: str = DISK) -> Iterator[Path]:
    """A file system of its own."""
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "raftfs-test", str(place)],
                   check=True, timeout=30)  # fmt: skip
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True, timeout=30)


def fill(filler: Path) -> None:
    """Until nothing more fits."""
    with open(filler, "wb", buffering=0) as file:
        for size in (1 << 20, 4096):
            try:
                while True:
                    file.write(bytes(size))
            except OSError as e:
                assert e.strerror == "No space left on device"


@pytest.mark.skipif(NEEDS_FUSE, reason="this machine has no /dev/fuse or no fusermount3")
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system: needs root")
@pytest.mark.parametrize("who", ["follower", "leader"])
def test_a_full_disk_ends_that_master_with_a_sentence(tmp_path: Path, who: str) -> None:
    made = ScenarioCluster(tmp_path, free_port_base())
    made.expect(*KILLED, "replica stops")
    with small_disk(made.dir / "m1") as disk:
        try:
            made.raftfs("cluster", "up", "--port-base", str(made.port_base), "--mount",
                        str(made.mnt))  # fmt: skip
            _story(made, disk, who)
            unexpected = made.unexpected_log_lines()
            assert not unexpected, unexpected[:20]
        finally:
            subprocess.run(
                [sys.executable, "-m", "raftfs.cli.raftfs", "cluster", "down", "--dir",
                 str(made.dir)], timeout=120, check=False, capture_output=True,
            )  # fmt: skip


def _story(made: ScenarioCluster, disk: Path, who: str) -> None:
    leads = made.status()["leader"] == "m1"
    if leads != (who == "leader"):
        name = f"127.0.0.1:{made.port_base + (0 if who == 'leader' else 10)}"
        made.raftfs("leader", "transfer", name, "-H", ",".join(made.status()["masters"]), "--key",
                    str(made.dir / "cluster.key"))  # fmt: skip
    writer = Writer(made.mnt)
    writer.start()
    fill(disk / "filler")

    def state() -> str:
        return next(p["state"] for p in made.status()["processes"] if p["name"] == "m1")

    made.wait("the end of m1", lambda: state() == "stopped")
    lines = (made.dir / "log" / "m1.log").read_text().splitlines()
    sentences = [line for line in lines if not line.startswith("{")]
    assert len(sentences) == 1, sentences
    assert "raftfs-master: " in sentences[0] and "No space left on device" in sentences[0]
    assert "make room" in sentences[0]
    alarm = [r for r in map(json.loads, lines[:-1]) if r["event"] == "replica stops"]
    assert [r["level"] for r in alarm] == ["error"]

    done = writer.done
    made.wait("files without m1", lambda: writer.done > done + 20)
    (disk / "filler").unlink()
    made.raftfs("cluster", "start", "m1")
    writer.check()

    def agree() -> bool:
        views = made.status()["replicas"].values()
        return len(views) == 3 and len({(v["digest_index"], v["digest"]) for v in views}) == 1

    made.wait("one checkpoint of all three", agree)
