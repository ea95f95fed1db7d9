"""`python -m tests.sim.mutants`: faults planted into what only this simulation runs, and some
of the core's; the first seed that finds each is printed.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from raftfs.meta.raft.checkpoints import Checkpoints
from raftfs.meta.raft.safety import SafeSyncObj
from raftfs.meta.state.model import ResultRow
from tests.sim import mutants as core_mutants
from tests.sim.__main__ import outcome
from tests.sim.store import SimStore

Planted = Callable[[], Any]


def _forget_results() -> Any:
    original = SimStore.get

    def get(self: SimStore, key: bytes) -> Any:
        row = original(self, key)
        return None if isinstance(row, ResultRow) else row

    return patch.object(SimStore, "get", get)


def _checkpoints_do_not_wait() -> Any:
    async def at_once(self: Checkpoints, index: int) -> None:
        return

    return patch.object(Checkpoints, "_until_durable", at_once)


def _snapshots_claim_the_end_of_the_log() -> Any:
    original = SafeSyncObj.sent_snapshot

    def sent(self: SafeSyncObj, node: Any, index: int) -> None:
        original(self, node, self.journal.last_index)

    return patch.object(SafeSyncObj, "sent_snapshot", sent)


def _install_whatever_comes() -> Any:
    def installed(self: SafeSyncObj, index: int, term: int) -> None:
        self.last_applied = index  # and the log stays as it was
        self.commit_index = max(self.commit_index, index)

    return patch.object(SafeSyncObj, "snapshot_installed", installed)


def _one_replica_differs() -> Any:
    original = SimStore.put

    def put(self: SimStore, key: bytes, row: Any) -> None:
        if self._who.startswith("b") and self.applied[0] % 7 == 0:
            return
        original(self, key, row)

    return patch.object(SimStore, "put", put)


_OF_THE_CORE = (
    "acknowledged before it is durable",
    "the leader's commit index is believed for what was not compared",
)

MUTANTS: dict[str, Planted] = {
    "a retry is not recognised": _forget_results,
    "checkpoints do not wait for the journal": _checkpoints_do_not_wait,
    "a sent snapshot counts as the whole log": _snapshots_claim_the_end_of_the_log,
    "a snapshot leaves the old log as it was": _install_whatever_comes,
    "one replica applies otherwise": _one_replica_differs,
    **{name: core_mutants.MUTANTS[name] for name in _OF_THE_CORE},
}


@contextmanager
def planted(name: str) -> Iterator[None]:
    """The fault is there inside."""
    with MUTANTS[name]():
        yield


def first_finding(name: str, seeds: range) -> tuple[int, str] | None:
    """The first seed whose story fails with the fault planted, and how."""
    with planted(name):
        for seed in seeds:
            found = outcome(seed)
            if found.error:
                return seed, found.error
    return None


def main() -> int:
    """Print a line for each fault; 1 if one was not found."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim.mutants")
    parser.add_argument("--seeds", type=int, default=60)
    parser.add_argument("--only", default="", help="part of a fault's name")
    args = parser.parse_args()
    missed = 0
    for name in MUTANTS:
        if args.only in name:
            found = first_finding(name, range(args.seeds))
            missed += found is None
            told = f"seed {found[0]:4}  {found[1][:70]}" if found else "NOT FOUND"
            print(f"{name:65} {told}", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
