"""A master loses everything while the others are full and busy: it comes back by a snapshot.

    python -m chaos.snapshot_install [--files 1000000] [--kills 5] [--seed N]

Fills a cluster with files, then takes a follower's data away and has it replaced, and kills it with
kill -9 at random moments of the transfer. Two probes make directories through a mount all the time.
In the end all three must have the same digest, and every directory that was acknowledged must be
there. The table shows how long an operation took before, while the follower was killed and started
as often with its data (what that costs a machine on which all of this runs), and while the snapshot
was on its way.

With `--dir` on the folder of an earlier run that was kept (`--keep`) its files are used again.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from chaos.cluster import RAFTFS, Cluster
from chaos.probes import Probes

_TRANSFER_S = 300.0
_LOAD_S = 3600
_POLL_S = 0.005


def parser() -> argparse.ArgumentParser:
    """Options of the story."""
    p = argparse.ArgumentParser(prog="snapshot_install", description=__doc__.splitlines()[0])
    p.add_argument("--dir", type=Path, help="where to work (default: a new temporary folder)")
    p.add_argument("--files", type=int, default=1_000_000, help="(default: %(default)s)")
    p.add_argument("--kills", type=int, default=5, help="of the receiver (default: %(default)s)")
    p.add_argument("--probes", type=int, default=2)
    p.add_argument("--before", type=float, default=20.0, metavar="S",
                   help="seconds of load before anything happens (default: %(default)s)")
    p.add_argument("--seed", type=int, default=None)
    p.add_argument("--port-base", type=int, default=29400)
    p.add_argument("--keep", action="store_true", help="keep data and logs")
    return p  # fmt: skip


class Receiver:
    """The follower that loses everything."""

    def __init__(self, cluster: Cluster, chance: random.Random) -> None:
        status = cluster.status()
        self._folder, self._chance = cluster.folder / "cluster", chance
        self.leader = str(status["leader"])
        self.name = next(n for n in status["replicas"] if n != self.leader)
        self.data = self._folder / self.name
        self._leaders_log = self._folder / "log" / f"{self.leader}.log"
        self._from = self._leaders_log.stat().st_size
        self._sent: tuple[int, list[int]] = (self._from, [])  # size of the log, what it says
        self._before = (self._folder / "log" / f"{self.name}.log").stat().st_size
        self._started = 0.0
        self.killed_at: list[float] = []  # which part of the snapshot had arrived
        self._command: subprocess.Popen[bytes] | None = None

    def restart(self) -> None:
        """kill -9, and start it with its data."""
        os.kill(self._pid(), signal.SIGKILL)
        self._run("start")
        assert self._command is not None
        self._command.wait(120)

    def lose_everything(self) -> None:
        """kill -9; the folder is gone; it is told to come back."""
        os.kill(self._pid(), signal.SIGKILL)
        shutil.rmtree(self.data)
        self._run("replace")

    def kill_during_the_transfer(self) -> None:
        """kill -9 at a random moment of it, then start it again."""
        part, arrived = self._chance.random(), self.data / "snapshot.in"
        until = time.monotonic() + _TRANSFER_S
        while True:
            sent = self.snapshots()
            size = 0
            with contextlib.suppress(FileNotFoundError):
                found = arrived.stat()
                if found.st_mtime > self._started:  # not what was left by the last kill
                    size = found.st_size
            if sent and size >= part * sent[-1] > 0:
                break
            if time.monotonic() > until:
                raise TimeoutError(f"no snapshot comes to {self.name}")
            time.sleep(_POLL_S)
        os.kill(self._pid(), signal.SIGKILL)
        if self.votes():
            raise AssertionError("the snapshot was installed before the kill")
        self.killed_at.append(size / sent[-1])
        self._run("start")

    def _run(self, verb: str) -> None:
        """A command that waits for it; not waited for here, as it will see the next kill."""
        before = self._pid()
        if self._command is not None:
            self._command.wait(120)  # it holds the cluster's lock, and sees the kill
        self._command = subprocess.Popen(
            [*RAFTFS, "cluster", verb, "--dir", str(self._folder), self.name],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        until = time.monotonic() + 60
        while self._pid() == before:
            if time.monotonic() > until:
                raise TimeoutError(f"{self.name} does not start")
            time.sleep(_POLL_S)
        self._started = time.time()

    def wait_for_its_vote(self) -> None:
        """Until it is a master again."""
        until = time.monotonic() + _TRANSFER_S
        while not self.votes():
            if time.monotonic() > until:
                raise TimeoutError(f"{self.name} does not become a master again")
            time.sleep(0.05)
        if self._command is not None:
            self._command.wait(120)

    def votes(self) -> bool:
        """So says its log, since it lost everything."""
        lines = _records(self._folder / "log" / f"{self.name}.log", self._before)
        return any(line["event"] == "this replica votes from now on" for line in lines)

    def snapshots(self) -> list[int]:
        """How many bytes each of them had that the leader began to send."""
        size = self._leaders_log.stat().st_size  # asked often: only a log that grew is read
        if size != self._sent[0]:
            lines = _records(self._leaders_log, self._from)
            found = [line["bytes"] for line in lines if line["event"] == "snapshot begins"]
            self._sent = (size, found)
        return self._sent[1]

    def _pid(self) -> int:
        kept = json.loads((self._folder / "cluster.json").read_text())
        return next(int(n["pid"]) for n in kept["nodes"] if n["name"] == self.name)


def _records(log: Path, begin: int) -> list[dict[str, Any]]:
    """What a process logged from a place in its log on."""
    with open(log, "rb") as file:
        file.seek(begin)
        lines = file.read().splitlines()
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):  # the last one may be half written
            found.append(json.loads(line))
    return found


def percentiles(took: list[float]) -> tuple[float, float]:
    """p50 and p99, milliseconds."""
    took = sorted(took)
    return 1e3 * took[len(took) // 2], 1e3 * took[len(took) * 99 // 100]


def fill(cluster: Cluster, files: int) -> None:
    """Unless an earlier run did."""
    status = cluster.status()
    if status["replicas"][status["leader"]]["nodes"] > files:
        return
    done = subprocess.run(
        [*RAFTFS, "bench-load", "-H", ",".join(status["masters"]), "--files", str(files)],
        capture_output=True, text=True, timeout=_LOAD_S, check=True,
    )  # fmt: skip
    print(done.stdout, flush=True)


def one_digest(cluster: Cluster) -> None:
    """Wait until all masters have made the same checkpoint, with everything that was done before;
    AssertionError if they differ.
    """
    until = time.monotonic() + 120
    done = max(view["applied"] for view in cluster.status()["replicas"].values())
    while time.monotonic() < until:
        views = cluster.status()["replicas"].values()
        indexes = {v["digest_index"] for v in views}
        # Behind a checkpoint its digest has an entry of its own, and then nothing if all is quiet.
        if len(indexes) == 1 and min(indexes) + 1 >= done and len(list(views)) == 3:
            digests = {v["digest"] for v in views}
            if len(digests) > 1:
                raise AssertionError(f"the masters differ: {digests}")
            return
        time.sleep(0.3)
    raise TimeoutError("no checkpoint that all three have made")


def story(args: argparse.Namespace, folder: Path) -> int:
    """Tell it; gives the exit status."""
    seed = random.randrange(2**32) if args.seed is None else args.seed
    print(f"reproduce: python -m chaos.snapshot_install --files {args.files} --kills {args.kills} "
          f"--seed {seed}")  # fmt: skip
    with Cluster(folder, args.port_base, keep=args.keep) as cluster:
        fill(cluster, args.files)
        one_digest(cluster)  # else the snapshot would be of before
        root = cluster.mountpoint / f"probes-{time.time_ns()}"
        root.mkdir()
        receiver = Receiver(cluster, random.Random(seed))
        with tempfile.TemporaryDirectory(dir=folder) as records:
            probes = Probes(root, Path(records), args.probes)
            probes.start()
            try:
                time.sleep(2.0)
                began = time.monotonic()
                time.sleep(args.before)
                restarts = time.monotonic()
                for _ in range(args.kills + 1):
                    receiver.restart()
                lost = time.monotonic()
                receiver.lose_everything()
                for _ in range(args.kills):
                    receiver.kill_during_the_transfer()
                receiver.wait_for_its_vote()
                back = time.monotonic()
            finally:
                probes.stop()
            one_digest(cluster)
            cluster.remount()
            problems = probes.problems()
            rows = {
                "before": probes.took_s(began, restarts),
                "restarts": probes.took_s(restarts, lost),
                "snapshot": probes.took_s(lost, back),
            }
        same = cluster.status()["leader"] == receiver.leader
        sent = receiver.snapshots()
    print(f"seconds until it voted again  {back - lost:.1f}")
    parts = " ".join(f"{part:.2f}" for part in receiver.killed_at)
    print(f"killed when there was         {parts} of the snapshot")
    print(f"snapshots begun, bytes        {len(sent)}, {sent[-1]}")
    return report(rows, problems, leader_stayed=same)


def report(rows: dict[str, list[float]], problems: list[str], *, leader_stayed: bool) -> int:
    """Print it; gives the exit status."""
    print("operations      number       p50       p99  ms")
    p99s = {}
    for name, took in rows.items():
        p50, p99s[name] = percentiles(took)
        print(f"{name:12} {len(took):9} {p50:9.2f} {p99s[name]:9.2f}")
    for other in ("before", "restarts"):
        print(f"p99 snapshot / {other:8}       {p99s['snapshot'] / p99s[other]:.2f}")
    for line in problems[:20]:
        print(f"PROBLEM {line}", file=sys.stderr)
    if not leader_stayed:
        print("PROBLEM another leader was elected", file=sys.stderr)
    print("LOST OR WRONG" if problems else "digests equal, nothing lost")
    return int(bool(problems) or not leader_stayed)


def main() -> int:
    """Run the story in a folder of its own."""
    args = parser().parse_args()
    if args.dir is not None:
        args.dir.mkdir(parents=True, exist_ok=True)
        return story(args, args.dir.absolute())
    with tempfile.TemporaryDirectory(prefix="raftfs-snapshot-") as folder:
        return story(args, Path(folder))


if __name__ == "__main__":
    raise SystemExit(main())
