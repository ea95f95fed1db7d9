"""What must hold after every event, whatever has gone wrong."""

from collections.abc import Callable
from typing import Any

from raftfs.const import ROOT_INODE
from raftfs.meta.raft.safety import LEADER
from raftfs.meta.state import read
from raftfs.meta.state.apply import Applied, apply_batch
from raftfs.meta.state.dictrows import DictRows
from raftfs.wire import frame
from raftfs.wire.messages import DirPage
from raftfs.wire.ops import Found, MembershipOp, Result, decode_batch
from tests.sim.broken import must

_TERM, _COMMIT, _STATE = (
    f"_SyncObj__{name}" for name in ("raftCurrentTerm", "raftCommitIndex", "raftState")
)


class Invariants:
    """An observer that sees all nodes at once, and forgets nothing.

    `truth`: the state after everything committed so far, applied here once more.
    """

    def __init__(self) -> None:
        self.truth = DictRows()
        self.on_commit: list[Callable[[list[Applied]], None]] = []
        self.listings: list[tuple[int, DirPage]] = []  # of the root, as it came to be at an index
        self.leaders: dict[int, str] = {}
        self.votes: dict[tuple[int, str], str] = {}
        self.log: dict[int, tuple[int, bytes]] = {}
        self.results: dict[int, list[Applied]] = {}
        self.entries: dict[tuple[int, int], tuple[int, bytes]] = {}
        self.digests: dict[int, bytes] = {}
        self.done: dict[tuple[int, int], tuple[int, Result]] = {}
        self.committed = 0
        self.members_since = 0  # the entry that said last who votes
        self.acknowledged = 0  # the highest index that a client was told of
        self._terms: dict[str, int] = {}
        self._looked: dict[str, tuple[Any, tuple[int, int, int]]] = {}

    # --- elections

    def look(self, who: str, core: Any) -> None:
        """At one node, after each of its events: one leader a term, terms and commits only grow."""
        mine = core.__dict__  # its properties are too slow for being asked after each event
        now = (mine[_TERM], mine[_COMMIT], mine[_STATE])
        last = self._looked.get(who)
        if last is not None and last[0] is core and last[1] == now:
            return
        self._looked[who] = (core, now)
        term, commit, _ = now
        must(term >= self._terms.get(who, 0), f"{who}'s term fell to {term}")
        self._terms[who] = term
        fell = last is not None and last[0] is core and commit < last[1][1]
        must(not fell, f"{who}'s commit index fell to {commit}")
        if core.state == LEADER and self.leaders.get(term) != who:
            other = self.leaders.get(term)
            must(other is None, f"two leaders in {term}: {other} and {who}")
            self.leaders[term] = who
            self._complete(who, core)

    def _complete(self, who: str, core: Any) -> None:
        """Leader completeness: whoever is elected has everything that older terms committed.

        Of its own term nothing yet, and of newer ones nothing ever: who was suspended may count its
        last vote when another one leads already.
        """
        journal, needed = core.journal, self.committed
        while needed and needed in self.log and self.log[needed][0] >= core.term:
            needed -= 1
        must(journal.last_index >= needed, f"leader {who} lacks committed entries")
        for index in range(max(journal.first_index, 1), needed + 1):
            if index in self.log:
                same = journal.term_at(index) == self.log[index][0]
                must(same, f"leader {who} has another entry {index}")

    def voted(self, who: str, term: int, candidate: str) -> None:
        """One vote a term, whatever the voter has gone through."""
        known = self.votes.setdefault((term, who), candidate)
        must(known == candidate, f"{who} voted for {known} and {candidate} in term {term}")

    # --- logs and states

    def added(self, index: int, term: int, before: int, command: bytes) -> None:
        """Log matching: the same index and term is the same entry after the same entry."""
        known = self.entries.setdefault((index, term), (before, command))
        must(known == (before, command), f"two entries {index} in term {term}")

    def applied(self, who: str, index: int, term: int, data: bytes, results: list[Applied]) -> None:
        """State-machine safety: one entry an index and one result, whoever applies it, whenever."""
        known = self.log.setdefault(index, (term, data))
        must(known == (term, data), f"{who} applies another entry {index}")
        if index not in self.results:
            self._commit(index, data)
        must(self.results[index] == results, f"{who} has another result of entry {index}")

    def _commit(self, index: int, data: bytes) -> None:
        must(index == self.committed + 1, f"entry {index} is applied before {self.committed + 1}")
        self.committed = index
        results = apply_batch(self.truth, index, decode_batch(data)) if data else []
        self.results[index] = results
        for one in results:
            self._once(index, one)
            if isinstance(one.command.op, Found | MembershipOp) and not one.result.status:
                self.members_since = index
        if self.truth.rows:
            page = read.readdir(self.truth, ROOT_INODE, b"", 100)
            if not self.listings or self.listings[-1][1] != page:
                self.listings.append((index, page))
        for tell in self.on_commit:
            tell(results)

    def _once(self, index: int, one: Applied) -> None:
        key = (one.command.session, one.command.seq)
        if one.version and all(key):
            must(key not in self.done, f"{key} was applied at {self.done.get(key)} and {index}")
            self.done[key] = (index, one.result)

    def checkpoint(self, who: str, index: int, digest: bytes) -> None:
        """Digests are equal at equal index."""
        known = self.digests.setdefault(index, digest)
        must(known == digest, f"{who}'s state after entry {index} differs")

    def installed(self, who: str, index: int, digest: bytes) -> None:
        """A snapshot is exactly the state that its sender had."""
        must(self.digests.get(index) == digest, f"{who} installed another state at {index}")

    # --- clients

    def told(self, session: int, seq: int, value: Any, answer: Any, since: int) -> None:
        """A client got `value` (of type `answer`) as the answer to what it first asked when `since`
        was acknowledged.
        """
        must((session, seq) in self.done, f"{session}/{seq} was acknowledged, not applied")
        index, applied = self.done[session, seq]
        right = None if answer is None else frame.decode(answer, applied.value)
        must(value == right, f"{session}/{seq} got {value} instead of {right}")
        must(index > since, f"{session}/{seq} took effect before it was asked")
        self.acknowledged = max(self.acknowledged, index)

    def refused(self, session: int, seq: int) -> None:
        """A client was told that it failed."""
        must((session, seq) not in self.done, f"{session}/{seq} took effect, but was refused")

    def listed(self, page: DirPage, since: int) -> None:
        """A directory was read that was asked for when `since` was acknowledged: it is as it was at
        some moment from then on.
        """
        ends = [index for index, _ in self.listings[1:]] + [self.committed + 1]
        fresh = any(
            page == known and end > since
            for (_, known), end in zip(self.listings, ends, strict=True)
        )
        must(fresh, f"stale read: {page.entries}, acknowledged {since}")
