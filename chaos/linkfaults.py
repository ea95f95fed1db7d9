"""What can be wrong between machines, each as a fault that begins, lasts and ends.

Cuts lose packets (nftables); toxics slow down, cut up and break connections (toxiproxy). `L` is the
master that leads when the fault begins, `F` and `G` are the others, `a b r` the mounts:

    isolated     L | everything             hearsnot    F G -> L lost     heardnot   L -> F G lost
    clients      L | a b r                  followers   L | F G           sides      L r | F G a b
    bridge       L | G, and F sees both     pause       L sleeps (SIGSTOP) for 0.1 to 5 s

`followers` and `sides` are traps for stale reads: the deposed leader still hears clients, or even
only it does (and they only read: see `chaos.history.Clients`).

A toxic is called TOXIC:FLOW, with the toxics of `chaos.toxics` and the flows below, each one way
alone; besides there are `down:masters`, `down:clients`, and `mix`: four toxics by chance.
"""

import itertools
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from chaos.netcluster import CHUNKSERVERS, MASTERS, MOUNTS, NetCluster
from chaos.toxics import TOXICS, Toxics

Flows = list[tuple[str, str]]  # from whom, to whom


class Stage(NamedTuple):
    """Where faults happen."""

    cluster: NetCluster
    toxics: Toxics | None
    chance: random.Random


def _others(leader: str) -> list[str]:
    return [name for name in MASTERS if name != leader]


def _both(some: list[str], others: list[str]) -> Flows:
    return [pair for a in some for b in others for pair in ((a, b), (b, a))]


FLOWS: dict[str, Callable[[str], Flows]] = {
    "masters>leader": lambda leader: [(other, leader) for other in _others(leader)],
    "leader>masters": lambda leader: [(leader, other) for other in _others(leader)],
    "clients>masters": lambda leader: list(itertools.product(MOUNTS, MASTERS)),
    "masters>clients": lambda leader: list(itertools.product(MASTERS, MOUNTS)),
}
_DOWN: dict[str, Callable[[str], Flows]] = {
    "masters": FLOWS["masters>leader"], "clients": FLOWS["clients>masters"]
}  # fmt: skip

CUTS: dict[str, Callable[[str], Flows]] = {
    "isolated": lambda leader: _both([leader], [*_others(leader), *CHUNKSERVERS, *MOUNTS]),
    "hearsnot": FLOWS["masters>leader"],
    "heardnot": FLOWS["leader>masters"],
    "clients": lambda leader: _both([leader], list(MOUNTS)),
    "followers": lambda leader: _both([leader], _others(leader)),
    "sides": lambda leader: _both([leader, "r"], [*_others(leader), "a", "b"]),
    "bridge": lambda leader: _both([leader], _others(leader)[1:]),
}
# The others cannot but choose another leader. (`bridge`: it may stay, F follows it.)
DEPOSING = {"isolated", "hearsnot", "heardnot", "followers", "sides"}

NAMESPACE_FAULTS = [*CUTS, "pause"]
TOXIC_FAULTS = [
    *(f"{toxic}:{flow}" for toxic in TOXICS for flow in FLOWS), *(f"down:{who}" for who in _DOWN),
    "mix",
]  # fmt: skip


@contextmanager
def fault(name: str, stage: Stage, leader: str) -> Iterator[str]:
    """From entry to exit the fault is there; gives what was done in words."""
    if name == "pause":
        yield _pause(stage, leader)
        return
    if name in CUTS:
        for sender, receiver in CUTS[name](leader):
            stage.cluster.network.cut(sender, receiver)
        said = leader
    else:
        assert stage.toxics is not None
        said = _poison(name, stage, stage.toxics, leader)
    try:
        yield said
    finally:
        stage.cluster.network.mend()
        if stage.toxics is not None:
            stage.toxics.heal()


def _pause(stage: Stage, leader: str) -> str:
    length_s = stage.chance.uniform(0.1, 5.0)
    stage.cluster.signal(leader, signal.SIGSTOP)
    time.sleep(length_s)
    stage.cluster.signal(leader, signal.SIGCONT)
    return f"{leader} {length_s:.1f} s"


def _poison(name: str, stage: Stage, toxics: Toxics, leader: str) -> str:
    if name == "mix":
        said = []
        for _ in range(4):
            toxic = stage.chance.choice([*TOXICS, "down"])
            sender, receiver = stage.chance.choice(
                [flow for flows in FLOWS.values() for flow in flows(leader)]
            )
            toxics.poison(sender, receiver, toxic)
            said.append(f"{toxic}:{sender}>{receiver}")
        return " ".join(said)
    toxic, _, where = name.partition(":")
    flows = (_DOWN if toxic == "down" else FLOWS)[where](leader)
    for sender, receiver in flows:
        toxics.poison(sender, receiver, toxic)
    return leader
