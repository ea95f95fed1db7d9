"""`python -m tests.sim.core.mutants`: does the simulation bite? Known faults are planted back,
one at a time, and the first seed that finds each is printed.
"""

import logging
from typing import Any
from unittest.mock import patch

from pysyncobj import syncobj

from raftfs.meta.raft.journal import DurableJournal
from tests.sim.core.member import Member
from tests.sim.core.world import story
from tests.sim.planted import COVERED, RAFT_LAYER, Planted, table


def _checkpoint_ahead_of_the_journal() -> Any:
    class Ahead:
        """Claims that everything is durable."""

        def __get__(self, journal: DurableJournal, kind: Any = None) -> int:
            return journal.last_index

    original = Member._save

    def save(self: Member, index: int) -> None:
        durable, self.journal.durable_index = self.journal.durable_index, self.journal.last_index
        try:
            original(self, index)
        finally:
            self.journal.durable_index = durable

    return patch.object(Member, "_save", save)


def _come_back_without_the_disk() -> Any:
    """As its old self, having forgotten its votes and acknowledgements."""
    original = Member.new_disk

    def new_disk(self: Member, *, voter: bool) -> None:
        original(self, voter=voter or self.name in self.initial)

    return patch.object(Member, "new_disk", new_disk)


MUTANTS: dict[str, Planted] = {
    **RAFT_LAYER,
    "a lost disk comes back under its old identity": _come_back_without_the_disk,
    "checkpoints ahead of the journal": _checkpoint_ahead_of_the_journal,
}

# Found soon, by a story that is told for it; the others take the command.
IN_THE_SUITE = (
    "acknowledgements of older terms count", "reads without asking a majority",
    "only the majority before a change counts",
    "entries of older terms are committed by counting",
    "a leader serves before it knows what is committed",
)  # fmt: skip


def finding(seed: int) -> str:
    """What the seed's story came to, "" if all was well."""
    clock, chance = syncobj.monotonicTime, syncobj.random
    try:
        story(seed)
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    finally:
        syncobj.monotonicTime, syncobj.random = clock, chance
    return ""


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    raise SystemExit(table("python -m tests.sim.core.mutants", MUTANTS, finding, 400, COVERED))
