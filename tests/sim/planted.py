"""Faults planted into the Raft layer, for both simulations, and the search for the seed that finds
each. Most are faults that stock pysyncobj has (`docs/decisions/001`); the others are mistakes that
the rules for durability and membership are there to prevent.
"""

import argparse
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from raftfs.meta.raft.configurations import Configurations
from raftfs.meta.raft.journal import DurableJournal
from raftfs.meta.raft.messages import Ack, Append
from raftfs.meta.raft.safety import LEADER, SafeSyncObj

Planted = Callable[[], Any]  # a context manager: the fault is there inside


def edited(owner: Any, name: str, *changes: tuple[str, str]) -> Planted:
    """A function of the product with some of its text replaced. Each text must be there once, so
    a fault that nobody plants any more is noticed.
    """

    def plant() -> Any:
        known = inspect.getattr_static(owner, name)
        function = known.fget if isinstance(known, property) else known
        source = textwrap.dedent(inspect.getsource(function))
        for old, new in changes:
            assert source.count(old) == 1, f"{name} does not have {old!r} once"
            source = source.replace(old, new)
        made: dict[str, Any] = {}
        exec(source, function.__globals__, made)
        return patch.object(owner, name, made[name])

    return plant


def several(*planted: Planted) -> Planted:
    """All of them at once."""

    @contextmanager
    def plant() -> Iterator[None]:
        with ExitStack() as stack:
            for one in planted:
                stack.enter_context(one())
            yield

    return plant


def _acknowledge_at_once() -> Any:
    def ack(self: SafeSyncObj, node: Any, seq: int, next_index: int, *, matched: bool = False,
            reset: bool = False) -> None:  # fmt: skip
        self._transport_.send(node, Ack(self.term, seq, next_index, matched, reset))

    return patch.object(SafeSyncObj, "_ack", ack)


def _count_oneself_before_the_disk() -> Any:
    original = SafeSyncObj._advance_commit

    def advance(self: SafeSyncObj) -> None:
        durable, self.journal.durable_index = self.journal.durable_index, self.journal.last_index
        try:
            original(self)
        finally:
            self.journal.durable_index = durable

    return patch.object(SafeSyncObj, "_advance_commit", advance)


def _forget_votes() -> Any:
    def set_term(self: DurableJournal, term: int, vote: str | None) -> None:
        self._term, self._vote = term, vote or ""

    return patch.object(DurableJournal, "setCurrentTerm", set_term)


def _count_old_acknowledgements() -> Any:
    original = SafeSyncObj._on_ack

    def on_ack(self: SafeSyncObj, node: Any, m: Ack) -> None:
        if m.term < self.term and self.state == LEADER:
            m = Ack(self.term, m.seq, m.next_index, m.matched, m.reset)
        original(self, node, m)

    return patch.dict(SafeSyncObj._HANDLERS, {Ack: on_ack})


def _cut_without_conflict() -> Any:
    def take(self: SafeSyncObj, prev: int, entries: list[Any]) -> None:
        if prev < self.journal.last_index:
            self.journal.deleteEntriesFrom(prev + 1 - self.journal.first_index)
        for entry in entries:
            self._add(*entry)

    return patch.object(SafeSyncObj, "_take_entries", take)


def _believe_the_commit_index() -> Any:
    original = SafeSyncObj._on_append

    def on_append(self: SafeSyncObj, node: Any, m: Append) -> None:
        original(self, node, m)
        if m.term == self.term:
            self.commit_index = max(self.commit_index, min(m.commit, self.journal.last_index))

    return patch.dict(SafeSyncObj._HANDLERS, {Append: on_append})


def _read_without_asking() -> Any:
    def read(self: SafeSyncObj, done: Callable[[Exception | None], None]) -> None:
        if self.leads:
            done(None)

    return patch.object(SafeSyncObj, "read_index", read)


def _commit_entries_of_older_terms() -> Any:
    def advance(self: SafeSyncObj) -> None:
        have = {n.id: i for n, i in self.match_index.items()}
        have[self.selfNode.id] = self.journal.durable_index
        self.commit_index = max(self.commit_index, min(
            self.configurations.reached(have), self.journal.last_index))  # fmt: skip

    return patch.object(SafeSyncObj, "_advance_commit", advance)


def _only_the_old_majority() -> Any:
    return patch.object(Configurations, "_all", lambda self: [self._names(self._applied)])


RAFT_LAYER: dict[str, Planted] = {
    "acknowledged before it is durable": _acknowledge_at_once,
    "the leader counts itself before its disk has it": _count_oneself_before_the_disk,
    "votes are not kept": _forget_votes,
    "acknowledgements of older terms count": _count_old_acknowledgements,
    "the log is cut without a conflict": _cut_without_conflict,
    "the leader's commit index is believed for what was not compared": _believe_the_commit_index,
    "reads without asking a majority": _read_without_asking,
    "only the majority before a change counts": _only_the_old_majority,
    "entries of older terms are committed by counting": _commit_entries_of_older_terms,
    "a leader serves before it knows what is committed": edited(
        SafeSyncObj, "leads", ("self.last_applied >= self.noop_index", "True")
    ),
    "reads do not wait for the state": edited(
        SafeSyncObj, "_answer_reads", ("and read[1] <= self.last_applied", "")
    ),
}


# What can do no harm, and why: another rule covers it. Looked for all the same.
COVERED = {
    "reads do not wait for the state":
        "a leader answers for what it has applied, and `leads` waits for what older ones answered",
}  # fmt: skip


# Runs one seed's story; gives what was found, "" for nothing.
Run = Callable[[int], str]


def first_finding(fault: Planted, run: Run, seeds: range) -> tuple[int, str] | None:
    """The first seed whose story fails with the fault planted, and how."""
    with fault():
        for seed in seeds:
            if found := run(seed):
                return seed, found
    return None


def table(
    prog: str, mutants: dict[str, Planted], run: Run, seeds: int, excused: dict[str, str]
) -> int:
    """A command: print a line for each fault; 1 if one was not found that is not `excused`, which
    says why a fault does no harm that can be seen here.
    """
    parser = argparse.ArgumentParser(prog=prog)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--only", default="", help="part of a fault's name")
    args = parser.parse_args()
    missed = 0
    for name in [n for n in mutants if args.only in n]:
        found = first_finding(mutants[name], run, range(args.seeds))
        missed += found is None and name not in excused
        not_found = f"none: {excused[name]}" if name in excused else "NOT FOUND"
        told = f"seed {found[0]:4}  {found[1][:70]}" if found else not_found
        print(f"{name:65} {told}", flush=True)
    return int(missed > 0)
