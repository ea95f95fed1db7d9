"""Every disk of every master is lost; the metalogger's files and the chunkservers bring all back.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.scenario.cluster import KILLED, ScenarioCluster
from tests.scenario.test_stories import digest, write_synced

MASTERS = ("m1", "m2", "m3")


class Metalogger:
    """A metalogger of a scenario's cluster."""

    def __init__(self, cluster: ScenarioCluster) -> None:
        self.cluster = cluster
        self.folder = cluster.dir / "metalogger"
        peers = ",".join(f"127.0.0.1:{cluster.port_base + 10 * n}" for n in range(3))
        with open(cluster.dir / "log" / "metalogger.log", "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "raftfs.cli.metalogger", "--peers", peers, "--data",
                 str(self.folder), "--key", str(cluster.dir / "cluster.key")],
                stdout=log, stderr=log,
            )  # fmt: skip

    def lines(self) -> list[str]:
        """The changelog so far."""
        path = self.folder / "changelog_ml.0.mfs"
        return path.read_text().splitlines() if path.exists() else []

    def wait_for(self, text: str) -> int:
        """Until a line has this in it; gives its number."""
        found: list[str] = []

        def there() -> bool:
            found[:] = [line for line in self.lines() if text in line]
            return bool(found)

        self.cluster.wait(f"the line of {text}", there)
        return int(found[0].partition(":")[0])


@pytest.fixture
def metalogger(cluster: ScenarioCluster) -> Iterator[Metalogger]:
    made = Metalogger(cluster)
    try:
        yield made
    finally:
        made.process.terminate()
        made.process.wait(30)


def lose_all_masters(cluster: ScenarioCluster) -> None:
    """kill -9, and their disks are gone."""
    for name in MASTERS:
        cluster.raftfs("cluster", "kill", name)
    for name in MASTERS:
        shutil.rmtree(cluster.dir / name)


def new_mount(cluster: ScenarioCluster) -> Path:
    """A second mount, which knows nothing of the first."""
    path = cluster.mnt.parent / "fresh"
    cluster.raftfs("cluster", "mount", str(path))
    return path


def test_all_masters_disks_are_lost(cluster: ScenarioCluster, metalogger: Metalogger) -> None:
    cluster.expect(*KILLED, "hole in the changelog")
    source = Path(os.__file__).parent / "json"
    shutil.copytree(source, cluster.mnt / "tree")
    big = os.urandom(65 * 2**20)
    write_synced(cluster.mnt / "big", big)
    os.link(cluster.mnt / "big", cluster.mnt / "tree" / "hard")
    os.symlink("big", cluster.mnt / "soft")
    write_synced(cluster.mnt / "unlinked", b"gone")
    os.unlink(cluster.mnt / "unlinked")
    held = open(cluster.mnt / "held", "wb")  # noqa: SIM115 - open across the disaster
    held.write(b"before, ")
    os.fsync(held.fileno())
    write_synced(cluster.mnt / "last", b"last")
    last = metalogger.wait_for("CREATE(1,last,")
    cluster.wait("the last lines", lambda: any(
        "LENGTH(" in line for line in metalogger.lines()[last:]
    ))  # fmt: skip
    lose_all_masters(cluster)
    said = cluster.raftfs("metarestore", "-a", "-d", str(metalogger.folder))
    assert "metadata.mfs: line " in said
    image = metalogger.folder / "metadata.mfs"
    said = cluster.raftfs("cluster", "bootstrap", str(image))
    assert "term 10995116277" in said, "beyond every term of the lost masters"
    # Whoever comes anew finds everything, and can go on.
    fresh = new_mount(cluster)
    assert digest(fresh / "big") == digest(fresh / "tree" / "hard")
    assert (fresh / "big").read_bytes() == big
    assert os.readlink(fresh / "soft") == "big" and not (fresh / "unlinked").exists()
    assert (fresh / "last").read_bytes() == b"last"
    for path in source.rglob("*"):
        if path.is_file():
            assert digest(fresh / "tree" / path.relative_to(source)) == digest(path)
    write_synced(fresh / "new", b"new")
    with open(fresh / "last", "ab") as file:
        file.write(b" but not least")
    assert (fresh / "last").read_bytes() == b"last but not least"
    # Who was there before goes on as well, with its open file.
    held.write(b"after")
    held.close()
    assert (cluster.mnt / "held").read_bytes() == b"before, after"
    assert (fresh / "held").read_bytes() == b"before, after"
    metalogger.wait_for("CREATE(1,new,")
    status = cluster.status()
    clients = ",".join(status["masters"])
    cluster.wait(
        "health", lambda: cluster.raftfs("status", "-H", clients).startswith("OK"), timeout_s=90
    )
    # Once more, to show that this was no matter of a first start.
    for name in MASTERS:
        cluster.raftfs("cluster", "kill", name)
    cluster.raftfs("cluster", "up")
    assert (fresh / "new").read_bytes() == b"new"


def test_metadata_older_than_the_copies(cluster: ScenarioCluster, metalogger: Metalogger) -> None:
    """The restored metadata do not know that a chunk was written once more, while one of its two
    servers was away: the newer bytes are read, whichever server is asked.
    """
    cluster.expect(*KILLED, "hole in the changelog", "version raised")
    write_synced(cluster.mnt / "file", b"old " * 1000)
    line = metalogger.wait_for("LENGTH(2,4000,")
    info = cluster.raftfs("fileinfo", str(cluster.mnt / "file"))
    away = next(n for n in (1, 2, 3) if f":{cluster.port_base + 500 + n} " in info)
    cluster.raftfs("cluster", "kill", f"cs{away}")
    with open(cluster.mnt / "file", "r+b") as file:
        file.write(b"NEW " * 1000)
        os.fsync(file.fileno())
    lose_all_masters(cluster)
    out = metalogger.folder / "earlier"
    cluster.raftfs("metarestore", "-a", "-d", str(metalogger.folder), "--until", str(line))
    os.rename(metalogger.folder / "metadata.mfs", out)
    cluster.raftfs("cluster", "bootstrap", str(out))
    fresh = new_mount(cluster)
    for _ in range(5):
        assert (fresh / "file").read_bytes() == b"NEW " * 1000
    with open(fresh / "file", "r+b") as file:
        file.write(b"NEXT")
        os.fsync(file.fileno())
    assert (fresh / "file").read_bytes() == b"NEXT" + b"NEW " * 999


def test_what_bootstrap_refuses(cluster: ScenarioCluster, metalogger: Metalogger) -> None:
    cluster.expect(*KILLED, "hole in the changelog")
    write_synced(cluster.mnt / "file", b"content")
    metalogger.wait_for("LENGTH(2,7,")
    cluster.raftfs("metarestore", "-a", "-d", str(metalogger.folder))
    image = metalogger.folder / "metadata.mfs"
    assert "m1 is running" in cluster.raftfs("cluster", "bootstrap", str(image), ok=False)
    for name in MASTERS:
        cluster.raftfs("cluster", "kill", name)
    said = cluster.raftfs("cluster", "bootstrap", str(image), ok=False)
    assert "m1 has data in" in said and "move it away first" in said
    for name in MASTERS:
        os.rename(cluster.dir / name, cluster.dir / f"{name}.lost")
    raw = image.read_bytes()
    image.write_bytes(raw[:-1])
    said = cluster.raftfs("cluster", "bootstrap", str(image), ok=False)
    assert "ended while waiting" in said and "is damaged" in said
    for process in cluster.status()["processes"]:
        assert (process["state"] == "stopped") is (process["role"] == "master")
    # Nothing is left of it: the masters' own disks still serve.
    for name in MASTERS:
        left = cluster.dir / name  # one that was ended early has not even made it
        assert not left.exists() or [p.name for p in left.iterdir()] in ([], [".lock"])
        shutil.rmtree(left, ignore_errors=True)
        os.rename(cluster.dir / f"{name}.lost", cluster.dir / name)
    cluster.raftfs("cluster", "up")
    assert (cluster.mnt / "file").read_bytes() == b"content"
