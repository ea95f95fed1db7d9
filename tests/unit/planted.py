"""`python -m tests.unit.planted`: do the unit tests bite? Faults are planted, one at a time, and
the test that names each must go red.

`tests.sim.core.mutants` and `tests.sim.mutants` do the same for the simulations. What pysyncobj
itself gets wrong is shown on it, side by side with ours, in `tests/unit/raft/test_stock_*`.
"""

import argparse
import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest

from raftfs.cli.master import main as master_main
from raftfs.meta.healer import Healer
from raftfs.meta.raft import segments
from raftfs.meta.raft.checkpoints import Checkpoints
from raftfs.meta.raft.configurations import Configurations
from raftfs.meta.raft.journal import BLOB_HEAD, DurableJournal, JournalError
from raftfs.meta.raft.messages import Ack
from raftfs.meta.raft.replica import Replica
from raftfs.meta.raft.safety import SafeSyncObj
from raftfs.meta.raft.snapshot import SnapshotReceiver
from raftfs.meta.service import ClientService
from raftfs.meta.state import digest, ops_namespace
from raftfs.meta.store import MetaStore
from raftfs.mount.writer import FileWriter
from raftfs.wire import ops, rpc
from tests.sim.core import mutants as core
from tests.sim.planted import edited

RAFT, STORE, STATE = "tests/unit/raft/", "tests/unit/store/", "tests/unit/state/"
_ENVIRONMENT = "RAFTFS_PLANTED"


class Planted(NamedTuple):
    """A fault, and the test (or a group of its cases) that must find it."""

    plant: Callable[[], Any]
    test: str


def _replace(owner: Any, name: str, by: Any) -> Callable[[], Any]:
    return lambda: patch.object(owner, name, by)


def _damage_is_cut_off(self: DurableJournal, segment: int, path: Any, data: bytes, at: int) -> None:
    """As if every bad blob were a torn tail."""
    place = 0
    while (blob := segments.blob_at(data, place)) is not None:
        self._blob_number = blob[0]
        for record in segments.records(blob[1], place + BLOB_HEAD):
            self._replay_record(segment, path, record, at)
        place += BLOB_HEAD + len(blob[1])


def _hurry(self: SafeSyncObj, node: Any, m: Any) -> None:
    self.heartbeat_due = 0.0


def _not_sooner(self: Healer, chunks: Iterable[int], delay_s: float = 1.0) -> None:
    for chunk in chunks:
        self._due.setdefault(chunk, time.monotonic() + delay_s)


def _of_everybody(self: Configurations, have: dict[str, int]) -> int:
    return sorted([*have.values(), 0, 0], reverse=True)[1]


def _by_office(self: Checkpoints, index: int, mine: bytes, propose: Any, agree: Any) -> None:
    self._told = index
    propose(ops.Digest(index, mine))


def _write_again() -> Any:
    original = DurableJournal._fail

    def fail(self: DurableJournal, error: OSError) -> Any:
        made = original(self, error)
        self._failed = False
        return made

    return patch.object(DurableJournal, "_fail", fail)


def _passed_over() -> Any:
    original = DurableJournal.unlink_before

    def unlink(self: DurableJournal, segment: int) -> None:
        with contextlib.suppress(JournalError):
            original(self, segment)

    return patch.object(DurableJournal, "unlink_before", unlink)


def _a_segment_too_many() -> Any:
    original = DurableJournal.compact

    def compact(self: DurableJournal, *limits: int) -> int:
        return original(self, *limits) + 1

    return patch.object(DurableJournal, "compact", compact)


def _names_are_not_synced() -> Any:
    return patch("tests.unit.raft.disks.FakeFiles.sync_folder", lambda self, folder: None)


def _votes_are_not_restated() -> Any:
    original = DurableJournal._begin_segment

    def begin(self: DurableJournal) -> None:
        with patch.object(self, "_vote", ""):
            original(self)

    return patch.object(DurableJournal, "_begin_segment", begin)


def _no_announcement() -> Any:
    return patch.object(DurableJournal, "expect", lambda self, index, term: None)


def _half_an_entry() -> Any:
    original = MetaStore.freeze

    def freeze(self: MetaStore) -> bool:
        self._failed = False
        return original(self)

    return patch.object(MetaStore, "freeze", freeze)


def _silent_in_the_middle() -> Any:
    original = SnapshotReceiver.piece

    def piece(self: SnapshotReceiver, node: Any, m: Any) -> None:
        if m.offset <= self._have:
            original(self, node, m)

    return patch.object(SnapshotReceiver, "piece", piece)


def _any_snapshot() -> Any:
    original = SnapshotReceiver.piece

    def piece(self: SnapshotReceiver, node: Any, m: Any) -> None:
        self._applied = lambda: -1
        original(self, node, m)

    return patch.object(SnapshotReceiver, "piece", piece)


def _no_checksums() -> Any:
    return patch("raftfs.meta.raft.snapshot.crc32", lambda data: _Equal())


class _Equal(int):
    """Equal to anything."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


def _several_changes(self: SafeSyncObj, command: bytes, done: Any) -> None:
    self._propose(b"\x02" + command, done)


def _by_hash_seed() -> Any:
    original = ops_namespace.create

    def create(c: Any, op: Any) -> Any:
        return original(c, op) if hash(op.name) % 7 else original(c, op.__class__(
            op.parent, op.name, op.type, op.mode ^ 1, op.umask, op.uid, op.gid))  # fmt: skip

    return patch.dict("raftfs.meta.state.apply._OPS", {ops.Create: create})


def _no_handshake() -> Any:
    original = rpc.Link.__init__

    def init(self: rpc.Link, incoming: Any, handler: Any, handshake: Any, *more: Any) -> None:
        original(self, incoming, handler, None, *more)

    return patch.object(rpc.Link, "__init__", init)


def _as_founded() -> Any:
    return patch.object(ClientService, "_serves", lambda self: self._replica.is_leader)


PLANTED: dict[str, Planted] = {
    "acknowledged before it is durable": Planted(
        core.MUTANTS["acknowledged before it is durable"],
        RAFT + "test_stock_disk.py::test_h1_nothing_is_acknowledged_before_the_disk_has_it[ours]",
    ),
    "a segment too many is unlinked": Planted(
        _a_segment_too_many,
        RAFT + "test_stock_disk.py::test_h3_a_kill_at_each_step_of_compaction_loses_no_entry[ours]",
    ),
    "the name of a new segment is not synced": Planted(
        _names_are_not_synced, RAFT + "test_journal_crashes.py"
        "::test_a_stop_at_every_call_loses_nothing[power cut]",
    ),
    "the vote is not restated in a new segment": Planted(
        _votes_are_not_restated, RAFT + "test_journal_crashes.py"
        "::test_a_stop_at_every_call_loses_nothing[kill]",
    ),
    "a snapshot is installed without an announcement in the journal": Planted(
        _no_announcement, RAFT + "test_journal_crashes.py"
        "::test_a_stop_at_every_call_loses_nothing[kill]",
    ),
    "an error of the disk is passed over": Planted(
        _passed_over, RAFT + "test_journal_crashes.py"
        "::test_an_error_at_every_call_stops_the_journal_for_good",
    ),
    "the commit index is believed for what was not compared": Planted(
        core.MUTANTS["the leader's commit index is believed for what was not compared"],
        RAFT + "test_safety.py::test_only_what_was_compared_is_committed",
    ),
    "the log is cut without a conflict": Planted(
        core.MUTANTS["the log is cut without a conflict"],
        RAFT + "test_stock_messages.py::test_h5_a_late_duplicate_does_not_cut_the_log[ours]",
    ),
    "acknowledgements of older terms count": Planted(
        core.MUTANTS["acknowledgements of older terms count"],
        RAFT + "test_stock_messages.py::test_h6_a_late_acknowledgement_commits_nothing[ours]",
    ),
    "half of an entry becomes durable": Planted(
        _half_an_entry,
        STATE + "test_known_faults.py::test_after_a_failed_entry_nothing_is_checkpointed",
    ),
    "a log without its state is believed": Planted(
        _replace(DurableJournal, "fits", lambda self, index, term: True),
        RAFT + "test_stock_disk.py::test_h10_a_log_without_its_state_does_not_start_empty[ours]",
    ),
    "pieces of a snapshot are not compared with their checksums": Planted(
        _no_checksums,
        RAFT + "test_stock_disk.py::test_h11_a_snapshot_with_a_hole_replaces_nothing[ours]",
    ),
    "an older snapshot is taken": Planted(
        _any_snapshot,
        RAFT + "test_stock_disk.py"
        "::test_h11_an_older_snapshot_does_not_replace_a_newer_state[ours]",
    ),
    "a voter that takes itself for a learner is not asked": Planted(
        edited(SafeSyncObj, "_stand",
               ("self.connected.intersection(self._electorate())", "self.connected & self.voters")),
        RAFT + "test_safety.py::"
        "test_who_reaches_only_a_voter_that_takes_itself_for_a_learner_asks_it",
    ),
    "a grant ends before anything was sent": Planted(
        edited(FileWriter, "_yield", ("chunk.seal()", "pass")),
        "tests/unit/mount/test_writing.py::"
        "test_a_grant_that_is_held_for_long_does_not_end_before_something_was_sent",
    ),
    "a replacement waits for a lull": Planted(
        edited(Replica, "_promote_joined",
               ("matched and core.commit_index - matched <= BEHIND_MAX",
                "matched >= core.commit_index")),
        RAFT + "test_replica.py::test_a_replacement_need_not_have_the_last_entries",
    ),
    "a piece from the middle is not answered": Planted(
        _silent_in_the_middle,
        RAFT + "test_snapshot.py::test_whoever_is_killed_in_the_middle_begins_anew_at_once",
    ),
    "damage in the journal passes for a torn tail": Planted(
        _replace(DurableJournal, "_replay", _damage_is_cut_off),
        RAFT + "test_journal.py::test_damage_before_durable_data_stops_the_node",
    ),
    "a damaged vote passes for a torn tail": Planted(
        _replace(DurableJournal, "_replay", _damage_is_cut_off),
        RAFT + "test_stock_disk.py::test_h12_a_damaged_vote_is_not_taken_for_none[ours]",
    ),
    "votes are not kept": Planted(
        core.MUTANTS["votes are not kept"],
        RAFT + "test_safety.py::test_one_vote_a_term_also_after_a_restart",
    ),
    "several changes of the members at once": Planted(
        _replace(SafeSyncObj, "change_members", _several_changes),
        RAFT + "test_stock_messages.py::test_h13_one_change_of_the_members_at_a_time[ours]",
    ),
    "reads without asking a majority": Planted(
        core.MUTANTS["reads without asking a majority"],
        RAFT + "test_safety.py::test_reads_wait_for_a_majority_of_a_later_round",
    ),
    "a node that waits for a snapshot is hurried": Planted(
        lambda: patch.dict(SafeSyncObj._HANDLERS, {Ack: _hurry}),
        RAFT + "test_safety.py::test_a_node_that_waits_for_a_snapshot_is_not_hurried",
    ),
    "learners count": Planted(
        _replace(Configurations, "reached", _of_everybody),
        RAFT + "test_stock_messages.py::test_learners_do_not_count",
    ),
    "writing goes on after a failed sync": Planted(
        _write_again,
        RAFT + "test_journal.py::test_after_a_failed_sync_the_journal_is_never_used_again",
    ),
    "digests are not compared": Planted(
        lambda: patch("raftfs.meta.store.compare", lambda *_: None),
        STORE + "test_store.py::test_another_digest_than_the_leaders_is_an_alarm",
    ),
    "the leader's digest is the right one by office": Planted(
        _replace(Checkpoints, "_compare", _by_office),
        RAFT + "test_replica.py::test_the_majority_of_the_voters_has_the_right_digest",
    ),
    "an audit does not add up": Planted(
        _replace(digest.Audit, "changed", lambda *_: None),
        STORE + "test_store.py::test_an_audit_counts_every_row_while_checkpoints_change_them",
    ),
    "nobody looks for rows that rot": Planted(
        _replace(MetaStore, "audit_some", lambda self: 1_000),
        STORE + "test_store.py::test_a_row_that_rots_is_found_by_an_audit",
    ),
    "a snapshot is not looked at before it is taken": Planted(
        lambda: patch("raftfs.meta.store.file_index", lambda path: (1, 1)),
        STATE + "test_known_faults.py::test_a_bad_snapshot_does_not_replace_a_good_state",
    ),
    "applying depends on the hash seed": Planted(
        _by_hash_seed,
        STATE + "test_determinism.py::test_three_processes_that_differ_in_everything_else_agree",
    ),
    "links need no key": Planted(
        _no_handshake,
        RAFT + "test_stock_links.py::test_h26_a_frame_without_the_key_is_not_even_decoded",
    ),
    "the disk is not asked, in a real process": Planted(
        _replace(segments.Files, "sync", lambda self, handle: None),
        "tests/scenario/test_syncs.py"
        "::test_every_answer_to_a_change_leaves_after_an_fdatasync_that_returned",
    ),
    "damage in the journal passes for a torn tail, in a real process": Planted(
        _replace(DurableJournal, "_replay", _damage_is_cut_off),
        "tests/scenario/test_damage.py::test_a_damaged_master_ends_with_a_sentence"
        "[entry in the journal]",
    ),
    "clients are refused for good before the founding": Planted(
        _as_founded,
        "tests/unit/meta/test_service.py"
        "::test_a_client_that_comes_before_the_cluster_is_founded_is_sent_away_for_a_moment",
    ),
    "a chunk that waits for minutes is not looked at sooner": Planted(
        _replace(Healer, "examine", _not_sooner),
        "tests/unit/meta/test_healer.py"
        "::test_a_chunk_that_waits_for_minutes_is_repaired_at_once_when_one_copy_is_left",
    ),
}  # fmt: skip


def plant_from_environment() -> None:
    """For processes that a test starts: the fault that the test was given."""
    name = os.environ.get(_ENVIRONMENT)
    if name:
        PLANTED[name].plant().start()


def master() -> list[str]:
    """How to start a master: with the fault that was planted here, if one was."""
    module = "tests.unit.planted" if _ENVIRONMENT in os.environ else "raftfs.cli.master"
    return [sys.executable, "-m", module]


def goes_red(name: str) -> tuple[bool, str]:
    """Whether the test fails with the fault planted, and what pytest said."""
    said = io.StringIO()
    os.environ[_ENVIRONMENT] = name
    try:
        with PLANTED[name].plant(), contextlib.redirect_stdout(said), \
                contextlib.redirect_stderr(said):  # fmt: skip
            status = pytest.main(["-q", "-p", "no:cacheprovider", PLANTED[name].test])
    finally:
        del os.environ[_ENVIRONMENT]
    return status == pytest.ExitCode.TESTS_FAILED, said.getvalue()


def main() -> int:
    """Print a line for each fault; 1 if one was not found."""
    if _ENVIRONMENT in os.environ:
        plant_from_environment()
        return master_main()
    parser = argparse.ArgumentParser(prog="python -m tests.unit.planted")
    parser.add_argument("--only", default="", help="part of a fault's name")
    parser.add_argument("--verbose", action="store_true", help="print what pytest says")
    args = parser.parse_args()
    missed = 0
    for name in PLANTED:
        if args.only in name:
            red, said = goes_red(name)
            missed += not red
            print(f"{name:65} {'found' if red else 'NOT FOUND'}", flush=True)
            if args.verbose:
                print(said)
    return int(missed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
