"""Masters come and go under load; nobody notices."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.scenario.cluster import KILLED, ScenarioCluster


class Writer(threading.Thread):
    """Makes files until stopped; remembers those that were closed without an error."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.done, self.stopping = folder, 0, False
        self.error: OSError | None = None

    def run(self) -> None:
        while not self.stopping and self.error is None:
            try:
                (self.folder / f"file{self.done + 1}").write_text(f"content {self.done + 1}")
                self.done += 1
            except OSError as e:
                self.error = e

    def check(self) -> None:
        """Stop, and find everything."""
        self.stopping = True
        self.join(60)
        assert self.error is None and self.done > 50, f"{self.done} files, then {self.error}"
        for number in range(1, self.done + 1):
            assert (self.folder / f"file{number}").read_text() == f"content {number}"


class Masters:
    """New masters of a scenario's cluster, and the commands that change who votes."""

    def __init__(self, cluster: ScenarioCluster) -> None:
        self.cluster = cluster
        self.key = str(cluster.dir / "cluster.key")
        self.names = [f"127.0.0.1:{cluster.port_base + 10 * n}" for n in range(6)]
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, number: int) -> None:
        """A new master that wants to join."""
        with open(self.cluster.dir / "log" / f"new{number}.log", "wb") as log:
            self.processes.append(subprocess.Popen(
                [sys.executable, "-m", "raftfs.cli.master", "--peers", ",".join(self.names),
                 "--name", self.names[number], "--join", "--key", self.key, "--listen",
                 "127.0.0.1", "--data", str(self.cluster.dir / f"new{number}")],
                stdout=log, stderr=log,
            ))  # fmt: skip

    def member(self, *words: str, ok: bool = True) -> str:
        return self._raftfs("member", *words, ok=ok)

    def lead(self, number: int) -> None:
        """Hand leadership to this one."""
        said = self._raftfs("leader", "transfer", self.names[number])
        assert f"{self.names[number]} leads" in said

    def _raftfs(self, *words: str, ok: bool = True) -> str:
        clients = ",".join(f"127.0.0.1:{int(n.rpartition(':')[2]) + 3}" for n in self.names)
        return self.cluster.raftfs(*words, "-H", clients, "--key", self.key, ok=ok)


@contextmanager
def masters(cluster: ScenarioCluster) -> Iterator[Masters]:
    made = Masters(cluster)
    try:
        yield made
    finally:
        for process in made.processes:
            process.terminate()
        for process in made.processes:
            process.wait(30)


def test_all_masters_are_replaced_under_load(cluster: ScenarioCluster) -> None:
    """Three new ones take the places of the three old ones; the mount is told of no new address
    and still finds the last of them through the leader it knows.
    """
    cluster.expect(*KILLED)
    with masters(cluster) as them:
        writer = Writer(cluster.mnt)
        writer.start()
        for old in range(2):  # the mount's own list names old ones only: one of them must stay
            them.start(old + 3)
            said = them.member("replace", them.names[old], them.names[old + 3])
            assert "votes now" in said and "votes no more" in said
        listed = them.member("list")
        assert [line.split()[0] for line in listed.splitlines()] == them.names[2:5]
        them.lead(3)  # one that the chunkservers were never told of by hand
        done = writer.done
        cluster.wait("files under the new leader", lambda: writer.done > done + 20)
        writer.check()
        said = them.member("remove", them.names[2], ok=False)
        assert "would leave 2 masters" in said
        said = them.member("add", them.names[2], ok=False)
        assert "is a master already" in said
        status = cluster.raftfs("status", "-H", ",".join(
            f"127.0.0.1:{cluster.port_base + 10 * n + 3}" for n in (2, 3, 4)
        ))  # fmt: skip
        assert status.startswith("OK")
        for removed in ("m1", "m2"):
            log = (cluster.dir / "log" / f"{removed}.log").read_text()
            assert "was removed from the cluster" in log.splitlines()[-1]


def test_the_wrong_key_changes_nothing(cluster: ScenarioCluster) -> None:
    cluster.expect("administration refused")
    wrong = cluster.dir / "wrong.key"
    cluster.raftfs("keygen", str(wrong))
    clients = ",".join(f"127.0.0.1:{cluster.port_base + 10 * n + 3}" for n in range(3))
    before = cluster.raftfs("leader", "show", "-H", clients)
    said = cluster.raftfs("leader", "transfer", "-H", clients, "--key", str(wrong), ok=False)
    assert "the cluster key does not match" in said
    assert cluster.raftfs("leader", "show", "-H", clients) == before


def test_leadership_is_handed_over_under_load(cluster: ScenarioCluster) -> None:
    clients = ",".join(f"127.0.0.1:{cluster.port_base + 10 * n + 3}" for n in range(3))
    key = str(cluster.dir / "cluster.key")
    writer = Writer(cluster.mnt)
    writer.start()
    led = {cluster.raftfs("leader", "show", "-H", clients).strip()}
    for number in (0, 1, 2, 0):
        name = f"127.0.0.1:{cluster.port_base + 10 * number}"
        cluster.raftfs("leader", "transfer", name, "-H", clients, "--key", key)
        led.add(cluster.raftfs("leader", "show", "-H", clients).strip())
    assert len(led) == 3
    writer.check()
