"""Whole clusters under faults, seed by seed: no promise is broken, and everything has happened."""

import os
import subprocess
import sys
from collections import Counter

import pytest

from tests.sim.__main__ import many, outcome
from tests.sim.faults import EFFECTS, KINDS
from tests.sim.mutants import DATA, IN_THE_SUITE, MUTANTS, finding
from tests.sim.planted import first_finding
from tests.sim.stories_data import STORIES as DATA_STORIES
from tests.sim.stories_data import seeds
from tests.sim.stories_raft import STORIES as RAFT_STORIES

SEEDS = int(os.environ.get("RAFTFS_SIM_SEEDS", "300"))
_SLICE = 10
_happened: Counter[str] = Counter()


@pytest.mark.parametrize("first", range(0, SEEDS, _SLICE))
def test_no_promise_is_broken(first: int) -> None:
    for one in many(first, min(_SLICE, SEEDS - first), min(2, os.cpu_count() or 1)):
        _happened.update(one.seen)
        assert not one.error, f"{one.error}; {one.reproduce}"
        assert one.acked, f"nothing was done; {one.reproduce}"
        _happened.update(acked=one.acked, reads=one.reads)


@pytest.mark.parametrize(
    "kind", [*KINDS, *EFFECTS, *RAFT_STORIES, *(s.__name__ for s in DATA_STORIES)]
)
def test_each_kind_of_fault_has_happened(kind: str) -> None:
    """In the stories above, while operations were acknowledged; else they would prove nothing."""
    if not _happened:
        pytest.skip("the stories were not run")
    assert _happened[kind] > 0, f"no {kind} in {SEEDS} seeds"
    assert _happened["acked"] > 20 * SEEDS and _happened["reads"] > 20 * SEEDS


def test_a_seed_is_one_story_whatever_the_hash_seed() -> None:
    here = outcome(5).fingerprint
    for hash_seed in ("1", "2"):
        there = subprocess.run(
            [sys.executable, "-m", "tests.sim", "--seed", "5"], text=True, check=True,
            capture_output=True, timeout=60, env={**os.environ, "PYTHONHASHSEED": hash_seed},
        )  # fmt: skip
        assert there.stdout.split()[-1] == here


def test_another_seed_is_another_story() -> None:
    assert outcome(5).fingerprint != outcome(6).fingerprint


def test_a_finding_ends_with_the_line_that_repeats_it(capsys: pytest.CaptureFixture[str]) -> None:
    name = "one replica applies otherwise"
    with MUTANTS[name]():
        found = outcome(0)
        assert found.error and found.reproduce == "reproduce: python -m tests.sim --seed 0"
        assert outcome(0).error == found.error, "and it is found again"


@pytest.mark.parametrize("name", IN_THE_SUITE)
def test_a_planted_fault_is_found(name: str) -> None:
    where = seeds(0, 60) if name in DATA else range(120)
    assert first_finding(MUTANTS[name], finding, where), f"{name}: not found"


@pytest.mark.parametrize("name", [n for n in MUTANTS if n not in IN_THE_SUITE])
def test_the_other_faults_can_be_planted(name: str) -> None:
    """`python -m tests.sim.mutants` looks for all of them; a change of the code may not end that
    unnoticed.
    """
    with MUTANTS[name]():
        pass
