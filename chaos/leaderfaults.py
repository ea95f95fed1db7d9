"""Ways in which the leader goes. Each gives when it began, and then mends what it broke."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from chaos.cluster import Cluster
from chaos.linkfaults import CUTS
from chaos.netcluster import NetCluster

_FULL_WINDOW_S = 40.0


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


def _one_way(cut: str) -> Callable[[NetCluster, Path, str], Iterator[float]]:
    def partition(cluster: NetCluster, folder: Path, leader: str) -> Iterator[float]:
        before, at = cluster.network.lost(), time.monotonic()
        for sender, receiver in CUTS[cut](leader):
            cluster.network.cut(sender, receiver)
        yield at
        lost = cluster.network.lost() - before
        cluster.network.mend()
        if not lost:
            raise AssertionError(f"{cut}: the partition met no packet")

    return partition


ON_LOOPBACK: dict[str, Callable[[Any, Path, str], Iterator[float]]] = {
    "kill": kill, "stop": stop, "pause": pause, "full": full,
}  # fmt: skip
ON_MACHINES: dict[str, Callable[[Any, Path, str], Iterator[float]]] = {
    "deaf": _one_way("hearsnot"), "mute": _one_way("heardnot"),
}  # fmt: skip
FAULTS = ON_LOOPBACK | ON_MACHINES


def _state(cluster: Cluster, name: str) -> str:
    return next(str(p["state"]) for p in cluster.status()["processes"] if p["name"] == name)
