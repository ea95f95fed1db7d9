"""What must hold after every event, whatever has gone wrong."""

from typing import Any

from raftfs.meta.raft.safety import LEADER
from raftfs.meta.state.apply import Applied
from raftfs.wire.ops import Result


class Broken(BaseException):
    """A promise was not kept. No `except Exception` of a node may catch it."""


def must(holds: bool, what: str) -> None:
    """Broken unless it holds."""
    if not holds:
        raise Broken(what)


class Invariants:
    """An observer that sees all nodes at once, and forgets nothing."""

    def __init__(self) -> None:
        self.leaders: dict[int, str] = {}
        self.votes: dict[tuple[int, str], str] = {}
        self.log: dict[int, tuple[int, bytes]] = {}
        self.results: dict[int, list[Applied]] = {}
        self.entries: dict[tuple[int, int], tuple[int, bytes]] = {}
        self.digests: dict[int, bytes] = {}
        self.done: dict[tuple[int, int], tuple[int, Result]] = {}
        self.committed = 0
        self.acknowledged = 0  # the highest index that a client was told of
        self._terms: dict[str, int] = {}
        self._commits: dict[int, tuple[Any, int]] = {}

    # --- elections

    def look(self, who: str, core: Any) -> None:
        """At one node, after each of its events: one leader a term, terms and commits only grow."""
        term, commit = core.term, core.commit_index
        must(term >= self._terms.get(who, 0), f"{who}'s term fell to {term}")
        self._terms[who] = term
        before = self._commits.get(id(core))
        must(before is None or commit >= before[1], f"{who}'s commit index fell to {commit}")
        self._commits[id(core)] = (core, commit)  # with the core, so that its id stays taken
        if core.state == LEADER and self.leaders.get(term) != who:
            other = self.leaders.get(term)
            must(other is None, f"two leaders in {term}: {other} and {who}")
            self.leaders[term] = who
            self._complete(who, core)

    def _complete(self, who: str, core: Any) -> None:
        """Leader completeness: whoever is elected has everything that was committed."""
        journal = core.journal
        must(journal.last_index >= self.committed, f"leader {who} lacks committed entries")
        for index in range(max(journal.first_index, 1), self.committed + 1):
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
            self.results[index] = results
            self.committed = max(self.committed, index)
            for one in results:
                self._once(index, one)
        must(self.results[index] == results, f"{who} has another result of entry {index}")

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

    def told(self, session: int, seq: int, result: Result, since: int) -> None:
        """A client got an answer to what it first asked when `since` was acknowledged."""
        if result.status:
            return
        must((session, seq) in self.done, f"{session}/{seq} was acknowledged, not applied")
        index, applied = self.done[session, seq]
        must(applied == result, f"{session}/{seq} got {result} instead of {applied}")
        must(index > since, f"{session}/{seq} took effect before it was asked")
        self.acknowledged = max(self.acknowledged, index)

    def read(self, who: str, index: int, since: int) -> None:
        """A guarded read sees everything that was acknowledged before it was asked."""
        must(index >= since, f"stale read at {who}: {index}, acknowledged {since}")
