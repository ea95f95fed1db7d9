"""`python -m tests.sim.mutants`: faults are planted into the product, one at a time; the first
seed that finds each is printed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from raftfs.chunk.terms import TermGate
from raftfs.meta.chunkhub import ChunkHub
from raftfs.meta.grants import Grants
from raftfs.meta.healer import Healer
from raftfs.meta.plan import healing
from raftfs.meta.proposer import Proposer
from raftfs.meta.raft.checkpoints import Checkpoints
from raftfs.meta.raft.journal import DurableJournal
from raftfs.meta.raft.replica import Replica
from raftfs.meta.raft.roster import Roster
from raftfs.meta.raft.safety import SafeSyncObj
from raftfs.meta.service import ClientService
from raftfs.meta.state import apply, ops_data
from raftfs.meta.store import MetaStore
from raftfs.wire import ops
from tests.sim.__main__ import outcome
from tests.sim.copies import CopyStore
from tests.sim.node import ObservedStore
from tests.sim.planted import COVERED, RAFT_LAYER, Planted, edited, several, table


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
    original = ObservedStore.put

    def put(self: ObservedStore, key: bytes, row: Any) -> None:
        if self._who.startswith("b") and self.applied[0] % 7 == 0:
            return
        original(self, key, row)

    return patch.object(ObservedStore, "put", put)


def _forget_terms() -> Any:
    return patch.object(CopyStore, "remember_term", lambda self, term: None)


def _operation(op: type, owner: Any, name: str, *changes: tuple[str, str]) -> Planted:
    """As `edited`, of what the state does with an operation: it is called by way of a table."""
    fault = edited(owner, name, *changes)

    @contextmanager
    def plant() -> Iterator[None]:
        with fault(), patch.dict(apply._OPS, {op: getattr(owner, name)}):
            yield

    return plant


JOURNAL: dict[str, Planted] = {
    "the journal is not synced": edited(
        DurableJournal, "_write", ("self._files.sync(self._handle)", "pass")
    ),
    "a hole in the journal is not noticed": edited(
        DurableJournal, "_replay",
        ("if self._blob_number and number != self._blob_number + 1:", "if False:"),
        ("if segments.blob_at(data, found) is not None:", "if False:"),
    ),
    "the name of a new segment is not synced": edited(
        DurableJournal, "_begin_segment", ("self._files.sync_folder(self._folder)", "pass")
    ),
    "checkpoints do not wait for the journal": edited(
        Checkpoints, "_until_durable",
        ("while self._journal.durable_index < index:", "while False:"),
    ),
}  # fmt: skip

REPLICA: dict[str, Planted] = {
    "a sent snapshot counts as the whole log": _snapshots_claim_the_end_of_the_log,
    "a snapshot leaves the old log as it was": _install_whatever_comes,
    "a snapshot may lead back": edited(
        Replica, "_install", ("or index <= core.last_applied", "")
    ),
    "one replica applies otherwise": _one_replica_differs,
    "rows of the state are not audited": lambda: patch.object(
        MetaStore, "audit_some", lambda self: 1
    ),
    "a learner asks for strangers' names": edited(
        Roster, "refusal", ("if not self._identity.voter:", "if False:")
    ),
    "a lost disk may come back under its old name": edited(
        Roster, "refusal", ("if known not in (None, peer.uuid):", "if False:")
    ),
}  # fmt: skip

SERVICES: dict[str, Planted] = {
    "a retry is not recognised": edited(
        apply, "_apply", ("isinstance(kept, ResultRow) and kept.seq == seq", "False")
    ),
    "answers of a batch are mixed up": edited(
        Proposer, "_finished", ("applied, strict", "reversed(applied), strict")
    ),
    "reads without a barrier": edited(
        ClientService, "_read", ("await self._replica.read_barrier()", "pass")
    ),
}  # fmt: skip

_NOBODY_CONFIRMS = edited(
    Healer, "_destroy_surplus",
    ("await self._confirmed(now.id, now.version, stay)", "stay"),
)  # fmt: skip

DATA: dict[str, Planted] = {
    "chunkservers obey deposed leaders": edited(
        TermGate, "check", ("if term < self._highest:", "if False:")
    ),
    "chunkservers forget the term in a restart": _forget_terms,
    # The first alone does no harm any more: before a copy is given up, the others are asked, and
    # whoever answers the leader knows its term. Nothing else that is counted is relied on without
    # an order, which tells the term as well.
    "servers count before they know the term, and are not asked": several(
        edited(ChunkHub, "is_fenced", ("and server.fenced_term == self._term()", "")),
        _NOBODY_CONFIRMS,
    ),
    "surplus copies go although the others do not answer": _NOBODY_CONFIRMS,
    "versions are never raised": edited(
        Grants, "grant",
        ("clean and self._is_proven(chunk, usable) and len(usable) >= self._attainable(chunk)",
         "clean"),
    ),
    "a version counts although an answer is missing": edited(
        Grants, "_raise", ("complete = len(raised) == len(servers)", "complete = True")
    ),
    "stale copies count": edited(
        healing, "_current", (" if committed <= v <= max(committed, reserved)", "")
    ),
    "surplus copies go without being condemned": edited(
        Healer, "_give_up",
        ("await self._proposer.commit(DropCopy(now.id, now.version, server))", "pass"),
    ),
    "copies are made while somebody writes": several(
        edited(Healer, "_examine", ("if chunk.lock and chunk.lock_session:", "if False:"),
               ("or chunk.lock:", "or False:")),
        edited(Healer, "_add_copies", ("or now.lock", "")),
    ),
    "an acknowledged chunk is replaced when its copies are away": several(
        edited(Grants, "_without_copies", ("if chunk.born or ask.acked:", "if False:")),
        _operation(ops.GrantWrite, ops_data, "grant_write", ("if old.born:", "if False:")),
    ),
}  # fmt: skip

MUTANTS: dict[str, Planted] = {**JOURNAL, **RAFT_LAYER, **REPLICA, **SERVICES, **DATA}

# Only the Raft layer by itself shows these (`python -m tests.sim.core.mutants` finds each).
EXCUSED = {
    **COVERED,
    "acknowledgements of older terms count":
        "links keep the order and replaced ones are not heard, so none outlives its term",
    "only the majority before a change counts":
        "it takes the old disk of a replaced master, put back while the others are down",
    "entries of older terms are committed by counting":
        "it takes two leaders in turn that die with their last entries, and messages cut short",
}  # fmt: skip

# Found soon; the others take the command.
IN_THE_SUITE = (
    "the journal is not synced", "the name of a new segment is not synced",
    "a sent snapshot counts as the whole log", "one replica applies otherwise",
    "a snapshot leaves the old log as it was", "checkpoints do not wait for the journal",
    "acknowledged before it is durable", "a retry is not recognised",
    "the leader's commit index is believed for what was not compared",
    "reads without a barrier",
    "a leader serves before it knows what is committed", "reads without asking a majority",
    "chunkservers obey deposed leaders", "chunkservers forget the term in a restart",
    "servers count before they know the term, and are not asked",
    "surplus copies go although the others do not answer", "versions are never raised",
    "a version counts although an answer is missing", "stale copies count",
    "surplus copies go without being condemned", "rows of the state are not audited",
    "copies are made while somebody writes",
    "an acknowledged chunk is replaced when its copies are away",
)  # fmt: skip


def finding(seed: int) -> str:
    """What the seed's story came to, "" if all was well."""
    return outcome(seed).error


if __name__ == "__main__":
    raise SystemExit(table("python -m tests.sim.mutants", MUTANTS, finding, 60, EXCUSED))
