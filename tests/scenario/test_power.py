"""A chunkserver loses power, and with it writes that it had acknowledged: real processes.

The power cut is played: the server is killed, its copy becomes what it was before the write that
nobody synced, and it starts with another boot id (in a mount namespace of its own).
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.scenario.cluster import KILLED, ScenarioCluster
from tests.scenario.test_stories import write_synced

BOOT_ID = "/proc/sys/kernel/random/boot_id"
REST_S = 12.0  # a copy rests after 5 s without use, and the unrest file follows in 5 s
NEEDS_ROOT = os.geteuid() != 0 or shutil.which("unshare") is None


def start_in_another_boot(cluster: ScenarioCluster, server: str, folder: Path) -> None:
    """`raftfs cluster start`, in what looks like the next boot of the machine."""
    boot = folder / "boot_id"
    boot.write_text("11111111-2222-3333-4444-555555555555\n")
    start = [sys.executable, "-m", "raftfs.cli.raftfs", "cluster", "start", "--dir",
             str(cluster.dir), server]  # fmt: skip
    # Not the mount, too: as long as one namespace has it, it is not unmounted.
    bind = f'umount {cluster.mnt} && mount --bind {boot} {BOOT_ID} && exec "$@"'
    subprocess.run(["timeout", "-s", "KILL", "60", "unshare", "-m", "sh", "-c", bind, "sh", *start],
                   check=True, capture_output=True)  # fmt: skip


def holders(cluster: ScenarioCluster, path: Path) -> dict[str, int]:
    """Name of each server that holds the first chunk -> its port."""
    info = cluster.raftfs("fileinfo", str(path))
    ports = [int(part.split()[0]) for part in info.split("127.0.0.1:")[1:]]
    processes = cluster.status()["processes"]
    return {p["name"]: p["ports"]["data"] for p in processes if p["ports"].get("data") in ports}


@pytest.mark.skipif(NEEDS_ROOT, reason="needs root and unshare for a boot id of its own")
def test_what_one_power_cut_took_is_read_from_the_other_copy_and_healed(
    cluster: ScenarioCluster, tmp_path: Path
) -> None:
    cluster.expect(*KILLED, "copies may lack writes that a power cut took")
    path = cluster.mnt / "file"
    write_synced(path, b"old" * 40_000)
    robbed, other = holders(cluster, path)
    time.sleep(REST_S)
    (copy,) = (cluster.dir / robbed).glob("hdd1/??/chunk_*.mfs")
    before = copy.read_bytes()
    with open(path, "r+b") as file:
        file.write(b"new" * 20_000)  # acknowledged by both servers, synced by none
    new = b"new" * 20_000 + b"old" * 20_000
    (copy,) = (cluster.dir / robbed).glob("hdd1/??/chunk_*.mfs")
    assert copy.read_bytes() != before
    cluster.raftfs("cluster", "kill", robbed)
    copy.write_bytes(before)
    start_in_another_boot(cluster, robbed, tmp_path)
    cluster.remount()
    assert path.read_bytes() == new

    def healed() -> bool:
        return cluster.raftfs("fileinfo", str(path)).count("(status:VALID)") == 2

    cluster.wait("two copies that count", healed)
    cluster.raftfs("cluster", "kill", other)
    cluster.remount()
    assert path.read_bytes() == new, "the copy that was robbed has been made anew"
