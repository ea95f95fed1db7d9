"""The leader goes, in every way there is: how long do clients wait?

    python -m chaos.failover [--trials 50] [--kinds kill,stop,pause,full]

    kill    kill -9, restarted two seconds later
    stop    orderly stop (SIGTERM): leadership is handed over first
    pause   SIGSTOP for three seconds, then SIGCONT: a deposed leader wakes up
    full    the leader's disk is full until it stops; restarted with room (needs root: the masters'
            folders are small file systems of their own)

Two probes make directories without a pause through a mount; a stall is the longest time between two
completed operations of one probe, from the fault on. The table shows their distribution. At the end
every directory that was acknowledged must be there, once. `--quiet-minutes M` instead counts the
elections in M minutes of load without a fault; there must be none.
"""

import argparse
import itertools
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path

from chaos.cluster import Cluster

KINDS = ("kill", "stop", "pause", "full")
_WINDOW_S = 6.0
_FULL_WINDOW_S = 40.0
_SMALL_DISK = "192M"
_PER_DIR = 500


def parser() -> argparse.ArgumentParser:
    """Options of the story."""
    p = argparse.ArgumentParser(prog="failover", description=__doc__.splitlines()[0])
    p.add_argument("--dir", type=Path, help="where to work (default: a new temporary folder)")
    p.add_argument("--trials", type=int, default=50, help="of each kind (default: %(default)s)")
    p.add_argument("--kinds", default="kill,stop,pause", help=f"of {','.join(KINDS)}")
    p.add_argument("--quiet-minutes", type=float, default=0.0, metavar="M")
    p.add_argument("--probes", type=int, default=2)
    p.add_argument("--port-base", type=int, default=28400)
    p.add_argument("--keep", action="store_true", help="keep data and logs")
    return p  # fmt: skip


def probe(root: Path, number: int, record: Path, stop: Event) -> None:
    """Make directories until told to stop; a line with the time for each that was acknowledged."""
    count = 0
    with open(record, "a", buffering=1, encoding="ascii") as lines:
        while not stop.is_set():
            name = f"p{number}/d{count // _PER_DIR}/{count}"
            try:
                (root / name).mkdir(parents=count % _PER_DIR == 0)
            except OSError as e:
                lines.write(f"{time.monotonic()} ERROR {name} {e.strerror}\n")
                return
            lines.write(f"{time.monotonic()} {name}\n")
            count += 1


class Probes:
    """All probes, and what they have written down."""

    def __init__(self, root: Path, records: Path, number: int) -> None:
        self.root = root
        self._records = [records / f"probe{n}" for n in range(number)]
        self._stop = multiprocessing.Event()
        self._processes = [
            multiprocessing.Process(target=probe, args=(root, n, record, self._stop))
            for n, record in enumerate(self._records)
        ]

    def start(self) -> None:
        """Begin."""
        for process in self._processes:
            process.start()

    def stop(self) -> None:
        """End; whoever hangs is killed, which `problems` will show."""
        self._stop.set()
        for process in self._processes:
            process.join(90)
            if process.is_alive():
                process.kill()

    def _lines(self) -> list[list[tuple[float, str]]]:
        found = []
        for record in self._records:
            parts = (line.split(" ", 1) for line in record.read_text("ascii").splitlines())
            found.append([(float(at), name) for at, name in parts])
        return found

    def stall_s(self, since: float, until: float) -> float:
        """The longest pause of a probe that begins or ends in this time."""
        longest = 0.0
        for lines in self._lines():
            times = [since, *(at for at, _ in lines if since <= at <= until)]
            longest = max(longest, *(b - a for a, b in zip(times, [*times[1:], until], strict=True)
                                     if b != until or b - a > 0.5))  # fmt: skip
        return longest

    def took_s(self, since: float, until: float) -> list[float]:
        """How long each operation took that ended in this time: probes make no pause."""
        return [
            b - a
            for lines in self._lines()
            for (a, _), (b, _) in itertools.pairwise(lines)
            if since <= b <= until
        ]

    def done_between(self, since: float, until: float) -> int:
        """Operations of all probes."""
        return sum(since <= at <= until for lines in self._lines() for at, _ in lines)

    def problems(self) -> list[str]:
        """What was acknowledged and is not there, and errors that a probe saw."""
        found = []
        for lines in self._lines():
            for _, name in lines:
                if name.startswith("ERROR"):
                    found.append(f"a probe saw an error: {name}")
                elif not (self.root / name).is_dir():
                    found.append(f"lost: {name}")
        return found


# --- the faults: each gives when it began, and mends what it broke


def kill(cluster: Cluster, folder: Path, leader: str) -> Iterator[float]:
    """kill -9."""
    at = time.monotonic()
    cluster.run("kill", leader)
    yield at
    cluster.run("start", leader)


def stop(cluster: Cluster, folder: Path, leader: str) -> Iterator[float]:
    """An orderly stop."""
    at = time.monotonic()
    cluster.run("kill", leader, "--signal", "TERM")
    yield at
    cluster.run("start", leader)


def pause(cluster: Cluster, folder: Path, leader: str) -> Iterator[float]:
    """SIGSTOP for three seconds."""
    at = time.monotonic()
    cluster.run("kill", leader, "--signal", "STOP")
    time.sleep(3.0)
    cluster.run("kill", leader, "--signal", "CONT")
    yield at


def full(cluster: Cluster, folder: Path, leader: str) -> Iterator[float]:
    """Nothing more fits on the leader's disk, until it has stopped."""
    filler = folder / "cluster" / leader / "filler"
    at = time.monotonic()
    with open(filler, "wb") as file:
        try:
            while True:
                file.write(bytes(1 << 20))
                file.flush()
        except OSError:
            print(f"{leader}: {filler.stat().st_size >> 20} MiB of filler", end="; ")
    until = time.monotonic() + _FULL_WINDOW_S
    while _state(cluster, leader) == "running" and time.monotonic() < until:
        time.sleep(0.2)
    stopped = _state(cluster, leader) != "running"
    print("it stopped" if stopped else "it did not stop")
    filler.unlink()
    yield at
    if stopped:
        cluster.run("start", leader)


FAULTS: dict[str, Callable[[Cluster, Path, str], Iterator[float]]] = {
    "kill": kill, "stop": stop, "pause": pause, "full": full,
}  # fmt: skip


def _state(cluster: Cluster, name: str) -> str:
    return next(str(p["state"]) for p in cluster.status()["processes"] if p["name"] == name)


def _leader(cluster: Cluster) -> tuple[str, int]:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        status = cluster.status()
        if status["leader"]:
            return status["leader"], status["term"]
        time.sleep(0.1)
    raise TimeoutError("no leader within 30 s")


# --- the story


def trial(cluster: Cluster, folder: Path, probes: Probes, kind: str) -> float:
    """One fault under load; gives the stall in seconds."""
    leader, term = _leader(cluster)
    steps = FAULTS[kind](cluster, folder, leader)
    at = next(steps)
    time.sleep(2.0)
    until = time.monotonic()
    for _ in steps:
        raise AssertionError("a fault has two steps")
    time.sleep(1.0)
    if not probes.done_between(at - 1.0, at) or _leader(cluster)[1] == term:
        raise AssertionError(f"{kind}: nobody was working, or the leader stayed the same")
    return probes.stall_s(at, until)


def table(stalls: dict[str, list[float]]) -> str:
    """Milliseconds by kind."""
    lines = ["fault    trials    p50    p90    p99    max  ms"]
    for kind, seconds in stalls.items():
        ms = sorted(1000 * s for s in seconds)
        at = [ms[min(len(ms) - 1, len(ms) * p // 100)] for p in (90, 99)]
        lines.append(f"{kind:8} {len(ms):6} {statistics.median(ms):6.0f} {at[0]:6.0f} "
                     f"{at[1]:6.0f} {ms[-1]:6.0f}")  # fmt: skip
    return "\n".join(lines)


@contextmanager
def small_disks(folder: Path, wanted: bool) -> Iterator[None]:
    """Each master's folder is a file system of its own."""
    mounted = []
    try:
        for name in ("m1", "m2", "m3") if wanted else ():
            place = folder / "cluster" / name
            place.mkdir(parents=True, exist_ok=True)
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={_SMALL_DISK}", "raftfs-small", str(place)],
                check=True, timeout=30,
            )  # fmt: skip
            mounted.append(place)
        yield
    finally:
        for place in mounted:
            subprocess.run(["umount", str(place)], check=True, timeout=30)


def story(args: argparse.Namespace, folder: Path) -> int:
    """Tell it; gives the exit status."""
    kinds = args.kinds.split(",")
    if set(kinds) - set(KINDS):
        print(f"failover: --kinds takes {','.join(KINDS)}, not {args.kinds}", file=sys.stderr)
        return 2
    if "full" in kinds and os.geteuid() != 0:
        print("failover: the kind full mounts file systems: run it as root", file=sys.stderr)
        return 2
    with small_disks(folder, "full" in kinds), Cluster(
        folder, args.port_base, keep=args.keep or "full" in kinds
    ) as cluster:
        root = cluster.mountpoint / "probes"
        root.mkdir()
        probes = Probes(root, folder, args.probes)
        probes.start()
        try:
            time.sleep(2.0)
            if args.quiet_minutes:
                return quiet(cluster, probes, args.quiet_minutes)
            stalls: dict[str, list[float]] = {}
            for kind in kinds:
                for _ in range(args.trials):
                    stalls.setdefault(kind, []).append(trial(cluster, folder, probes, kind))
        finally:
            probes.stop()
        print(table(stalls))
        cluster.remount()
        problems = probes.problems()
        done = probes.done_between(0, time.monotonic())
    for line in problems[:20]:
        print(f"PROBLEM {line}", file=sys.stderr)
    print(f"{done} operations acknowledged; {'LOST OR WRONG' if problems else 'nothing lost'}")
    return 1 if problems else 0


def quiet(cluster: Cluster, probes: Probes, minutes: float) -> int:
    """Load without a fault: nobody may call an election."""
    _, before = _leader(cluster)
    began = time.monotonic()
    time.sleep(60 * minutes)
    _, after = _leader(cluster)
    done = probes.done_between(began, time.monotonic())
    print(f"{minutes:g} minutes, {done} operations, {after - before} elections")
    return int(after != before)


def main() -> int:
    """Run the story in a folder of its own."""
    args = parser().parse_args()
    if args.dir is not None:
        args.dir.mkdir(parents=True, exist_ok=True)
        return story(args, args.dir.absolute())
    with tempfile.TemporaryDirectory(prefix="raftfs-failover-") as folder:
        return story(args, Path(folder))


if __name__ == "__main__":
    raise SystemExit(main())
