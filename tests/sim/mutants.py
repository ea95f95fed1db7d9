"""`python -m tests.sim.mutants`: faults are planted into the product, one at a time; the first
seed that finds each is printed.
"""

from typing import Any
from unittest.mock import patch

from raftfs.meta.raft.checkpoints import Checkpoints
from raftfs.meta.raft.safety import SafeSyncObj
from raftfs.meta.state.model import ResultRow
from tests.sim.__main__ import outcome
from tests.sim.planted import RAFT_LAYER, Planted, table
from tests.sim.store import SimStore


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


MUTANTS: dict[str, Planted] = {
    "a retry is not recognised": _forget_results,
    "checkpoints do not wait for the journal": _checkpoints_do_not_wait,
    "a sent snapshot counts as the whole log": _snapshots_claim_the_end_of_the_log,
    "a snapshot leaves the old log as it was": _install_whatever_comes,
    "one replica applies otherwise": _one_replica_differs,
    **RAFT_LAYER,
}


def finding(seed: int) -> str:
    """What the seed's story came to, "" if all was well."""
    return outcome(seed).error


if __name__ == "__main__":
    raise SystemExit(table("python -m tests.sim.mutants", MUTANTS, finding, 60))
