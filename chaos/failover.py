"""The leader goes, in every way there is: how long do clients wait?

    python -m chaos.failover [--trials 50] [--kinds kill,stop,pause,full,deaf,mute]

    kill    kill -9, restarted two seconds later
    stop    orderly stop (SIGTERM): leadership is handed over first
    pause   SIGSTOP for three seconds, then SIGCONT: a deposed leader wakes up
    full    the leader's disk is full until it stops; restarted with room (needs root: the masters'
            folders are small file systems of their own)
    deaf    one-way partition: the leader hears no other master for two seconds, they hear it
    mute    the other way: no other master hears the leader (both need root: network namespaces)

Two probes make directories without a pause through a mount; a stall is the longest time between two
completed operations of one probe, from the fault on. The table shows their distribution. At the end
every directory that was acknowledged must be there, once. `--quiet-minutes M` instead counts the
elections in M minutes of load without a fault; there must be none.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from chaos import network
from chaos.cluster import Cluster
from chaos.leaderfaults import FAULTS, ON_LOOPBACK, ON_MACHINES
from chaos.netcluster import CHUNKSERVERS, MASTERS, NetCluster
from chaos.network import Network
from chaos.probes import Probes

_SMALL_DISK = "192M"


def parser() -> argparse.ArgumentParser:
    """Options of the story."""
    p = argparse.ArgumentParser(prog="failover", description=__doc__.splitlines()[0])
    p.add_argument("--dir", type=Path, help="where to work (default: a new temporary folder)")
    p.add_argument("--trials", type=int, default=50, help="of each kind (default: %(default)s)")
    p.add_argument("--kinds", default="kill,stop,pause", help=f"of {','.join(FAULTS)}")
    p.add_argument("--quiet-minutes", type=float, default=0.0, metavar="M")
    p.add_argument("--probes", type=int, default=2)
    p.add_argument("--port-base", type=int, default=28400)
    p.add_argument("--keep", action="store_true", help="keep data and logs")
    return p  # fmt: skip


# --- the story


class Place(NamedTuple):
    """A cluster, where it is mounted, and how that is done anew."""

    cluster: Any
    root: Path
    remount: Callable[[], None]


def trial(cluster: Any, folder: Path, probes: Probes, kind: str) -> float:
    """One fault under load; gives the stall in seconds."""
    leader, term = cluster.leader()
    steps = FAULTS[kind](cluster, folder, leader)
    at = next(steps)
    time.sleep(2.0)
    until = time.monotonic()
    for _ in steps:
        raise AssertionError("a fault has two steps")
    time.sleep(1.0)
    if not probes.done_between(at - 1.0, at) or cluster.leader()[1] == term:
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


def refusal(kinds: list[str]) -> str:
    """Why these kinds cannot be had here, or ""."""
    if set(kinds) - set(FAULTS):
        return f"--kinds takes {','.join(FAULTS)}, not {','.join(kinds)}"
    if "full" in kinds and os.geteuid() != 0:
        return "the kind full mounts file systems: run it as root"
    why = network.missing() if set(kinds) & set(ON_MACHINES) else ""
    return f"the kinds {','.join(ON_MACHINES)}: {why}" if why else ""


@contextmanager
def on_loopback(args: argparse.Namespace, folder: Path, kinds: list[str]) -> Iterator[Place]:
    """All on this machine, as `raftfs cluster` makes it."""
    full = "full" in kinds
    with small_disks(folder, full), Cluster(
        folder, args.port_base, keep=args.keep or full
    ) as cluster:
        yield Place(cluster, cluster.mountpoint, cluster.remount)


@contextmanager
def on_machines(args: argparse.Namespace, folder: Path, kinds: list[str]) -> Iterator[Place]:
    """Every daemon on a machine of its own."""
    with Network([*MASTERS, *CHUNKSERVERS, "a"]) as net, NetCluster(
        folder / "machines", net, mounts=("a",)
    ) as cluster:
        yield Place(cluster, cluster.root("a"), lambda: cluster.remount("a"))


def story(args: argparse.Namespace, folder: Path) -> int:
    """Tell it; gives the exit status."""
    kinds = args.kinds.split(",")
    why = refusal(kinds)
    if why:
        print(f"failover: {why}", file=sys.stderr)
        return 2
    if args.quiet_minutes:
        with on_loopback(args, folder, []) as place, probing(place, args, folder) as probes:
            return quiet(place.cluster, probes, args.quiet_minutes)
    stalls: dict[str, list[float]] = {}
    problems: list[str] = []
    for where, faults in ((on_loopback, ON_LOOPBACK), (on_machines, ON_MACHINES)):
        here = [kind for kind in kinds if kind in faults]
        if here:
            with where(args, folder, here) as place:
                problems += measure(place, args, folder, here, stalls)
    print(table(stalls))
    for line in problems[:20]:
        print(f"PROBLEM {line}", file=sys.stderr)
    print("LOST OR WRONG" if problems else "nothing lost")
    return 1 if problems else 0


@contextmanager
def probing(place: Place, args: argparse.Namespace, folder: Path) -> Iterator[Probes]:
    """Probes are at work."""
    root = place.root / "probes"
    root.mkdir()
    records = Path(tempfile.mkdtemp(prefix="records-", dir=folder))
    probes = Probes(root, records, args.probes)
    probes.start()
    try:
        time.sleep(2.0)
        yield probes
    finally:
        probes.stop()


def measure(
    place: Place, args: argparse.Namespace, folder: Path, kinds: list[str],
    stalls: dict[str, list[float]],
) -> list[str]:  # fmt: skip
    """All trials in one place: adds to `stalls` by kind; gives what is lost or went wrong."""
    with probing(place, args, folder) as probes:
        for kind in kinds:
            stalls[kind] = [trial(place.cluster, folder, probes, kind) for _ in range(args.trials)]
    place.remount()
    done = probes.done_between(0, time.monotonic())
    print(f"{done} operations acknowledged ({','.join(kinds)})")
    return probes.problems()


def quiet(cluster: Any, probes: Probes, minutes: float) -> int:
    """Load without a fault: nobody may call an election."""
    _, before = cluster.leader()
    began = time.monotonic()
    time.sleep(60 * minutes)
    _, after = cluster.leader()
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
