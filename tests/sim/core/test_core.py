"""Seeded simulations: nothing acknowledged is lost, none applied twice, no read is stale."""

import os
import random
from collections import Counter
from collections.abc import Iterator

import pytest
from pysyncobj import syncobj

from tests.sim.core.mutants import IN_THE_SUITE, MUTANTS, finding
from tests.sim.core.stories import FAULTS
from tests.sim.core.world import story
from tests.sim.planted import first_finding

SEEDS = int(os.environ.get("RAFTFS_SEEDS", "300"))
_SLICE = 10
_happened: Counter[str] = Counter()


@pytest.fixture(autouse=True)
def real_clock() -> Iterator[None]:
    """Give pysyncobj its own clock and chance back."""
    clock = syncobj.monotonicTime
    yield
    syncobj.monotonicTime, syncobj.random = clock, random


@pytest.mark.parametrize("first", range(0, SEEDS, _SLICE))
def test_simulated_faults(first: int) -> None:
    for seed in range(first, first + _SLICE):
        print(f"reproduce: python -m tests.sim.core --seed {seed}")
        world = story(seed)
        assert world.faults >= 25 - FAULTS and world.leaders, "the faults must have had an effect"
        _happened.update(world.seen, acked=len(world.acked), reads=world.reads)


def test_every_kind_of_fault_has_happened_while_work_was_done() -> None:
    """After the stories above; else they would prove nothing."""
    if not _happened:
        pytest.skip("the stories were not run")
    for kind in ("kill", "power cut", "power cut of all", "partition", "one-way partition", "pause",
                 "everybody suspended", "slow disk", "disk stops a node", "disk lost", "checkpoint",
                 "snapshot", "membership changed", "learner votes", "deposed leader read",
                 "last word", "figure eight", "old acknowledgement", "old disk"):  # fmt: skip
        assert _happened[kind] >= SEEDS // 60, f"{kind}: {_happened[kind]} times"
    assert _happened["acked"] > 20 * SEEDS and _happened["reads"] > 20 * SEEDS


@pytest.mark.parametrize("name", IN_THE_SUITE)
def test_a_planted_fault_is_found(name: str) -> None:
    assert first_finding(MUTANTS[name], finding, range(30)), f"{name}: not found"


def test_a_seed_is_one_story() -> None:
    first, second = story(3), story(3)
    assert (first.acked, first.log, first.votes) == (second.acked, second.log, second.votes)
