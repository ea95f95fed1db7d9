"""A master loses everything while the others are full and busy: it comes back by a snapshot.

    python -m chaos.snapshot_install [--files 1000000] [--kills 5] [--seed N]

Fills a cluster with files, then takes a follower's data away and has it replaced, and kills it with
kill -9 at random moments of the transfer. Two probes make directories through a mount all the time.
In the end all three must have the same digest, and every directory that was acknowledged must be
there. The table shows how long an operation took before, and while the snapshot was on its way.

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
_POLL_S = 0.002


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
        self._leaders_lines = len(self._log(self.leader))
        self.killed_at: list[float] = []  # which part of the snapshot had arrived
        self._command: subprocess.Popen[bytes] | None = None

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
            size = arrived.stat().st_size if arrived.exists() else 0
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
            self._command.wait(120)
        self._command = subprocess.Popen(
            [*RAFTFS, "cluster", verb, "--dir", str(self._folder), self.name],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        until = time.monotonic() + 60
        while self._pid() == before:
            if time.monotonic() > until:
                raise TimeoutError(f"{self.name} does not start")
            time.sleep(_POLL_S)

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
        """So says its log, since it was started last."""
        events = [line["event"] for line in self._log(self.name)]
        return "this replica votes from now on" in events

    def snapshots(self) -> list[int]:
        """How many bytes each of them had that the leader began to send."""
        lines = self._log(self.leader)[self._leaders_lines :]
        return [line["bytes"] for line in lines if line["event"] == "snapshot begins"]

    def _pid(self) -> int:
        kept = json.loads((self._folder / "cluster.json").read_text())
        return next(int(n["pid"]) for n in kept["nodes"] if n["name"] == self.name)

    def _log(self, name: str) -> list[dict[str, Any]]:
        lines = []
        for line in (self._folder / "log" / f"{name}.log").read_text().splitlines():
            with contextlib.suppress(ValueError):  # the last one may be half written
                lines.append(json.loads(line))
        return lines


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
    """Wait until all masters have made the same checkpoint; AssertionError if they differ."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        views = cluster.status()["replicas"].values()
        if len({v["digest_index"] for v in views}) == 1 and len(list(views)) == 3:
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
            before, during = probes.took_s(began, lost), probes.took_s(lost, back)
        same = cluster.status()["leader"] == receiver.leader
        sent = receiver.snapshots()
    print(f"seconds until it voted again  {back - lost:.1f}")
    parts = " ".join(f"{part:.2f}" for part in receiver.killed_at)
    print(f"killed when there was         {parts} of the snapshot")
    print(f"snapshots begun, bytes        {len(sent)}, {sent[-1]}")
    return report(before, during, problems, leader_stayed=same)


def report(
    before: list[float], during: list[float], problems: list[str], *, leader_stayed: bool
) -> int:
    """Print it; gives the exit status."""
    print("operations      number       p50       p99  ms")
    rows = {"before": percentiles(before), "meanwhile": percentiles(during)}
    for (name, (p50, p99)), took in zip(rows.items(), (before, during), strict=True):
        print(f"{name:12} {len(took):9} {p50:9.2f} {p99:9.2f}")
    print(f"p99 meanwhile / before        {rows['meanwhile'][1] / rows['before'][1]:.2f}")
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
