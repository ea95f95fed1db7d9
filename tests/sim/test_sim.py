"""Seeded simulations: nothing acknowledged is lost, none applied twice, no read is stale."""

import os
import random
from collections.abc import Iterator

import pytest
from pysyncobj import syncobj

from tests.sim.world import story

SEEDS = int(os.environ.get("RAFTFS_SEEDS", "60"))


@pytest.fixture(autouse=True)
def real_clock() -> Iterator[None]:
    """Give pysyncobj its own clock and chance back."""
    clock = syncobj.monotonicTime
    yield
    syncobj.monotonicTime, syncobj.random = clock, random


@pytest.mark.parametrize("seed", range(SEEDS))
def test_simulated_faults(seed: int) -> None:
    print(f"reproduce: python -m tests.sim --seed {seed}")
    world = story(seed)
    assert world.faults == 25 and len(world.leaders) > 1, "the faults must have had an effect"


def test_the_simulation_does_work() -> None:
    """Commands are acknowledged and reads answered; else the stories would prove nothing."""
    worlds = [story(seed) for seed in range(5)]
    assert sum(len(w.acked) for w in worlds) > 200
    assert sum(w.reads for w in worlds) > 200
