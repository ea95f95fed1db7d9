"""Who votes: the voters of the applied state, and of each change that is still on its way.

Raft is safe under changes of its membership if no two majorities that may decide anything at the
same time are disjoint. The rule here is the simplest that gives this whatever the change (one
added, one removed, one replaced): between the moment when a change enters a node's log and the
moment when the node applies it, that node needs a majority of the voters *before* and one of those
*after*, for elections, commits, reads and leadership alike.

Why it is safe: an entry with change k is committed by majorities before and after it. Whoever is
elected has it in its log (its voters overlap with those of the commit before the change) and so
needs a majority after it, too; that overlaps with every majority of whoever has applied it. Raft's
own rule (the latest change in the log counts alone) needs single steps; this one does not, and a
replacement, one out and one in at once, is none. `docs/decisions/003` has the whole argument.
"""

from raftfs.errors import invariant

# The voters: name -> identity; b"" as long as the cluster was not founded.
Members = dict[str, bytes]


class Configurations:
    """Counts majorities. Nodes are named as on the links: a voter by its name, a learner (which may
    be about to become a voter) as `name#identity`.
    """

    def __init__(self, applied: Members) -> None:
        self._applied = applied
        self._coming: list[tuple[int, Members]] = []
        self._voters: list[set[str]] = []  # of each configuration; empty: to be worked out anew

    @property
    def changing(self) -> bool:
        """A change is in the log and not applied."""
        return bool(self._coming)

    @property
    def latest(self) -> Members:
        """The voters after everything in the log."""
        return self._coming[-1][1] if self._coming else self._applied

    def propose(self, index: int, members: Members) -> None:
        """A change came into the log."""
        invariant(len(members) > 0, "a cluster without voters")
        self._coming.append((index, members))
        self._voters = []

    def cut(self, index: int) -> None:
        """The log was cut from `index` on."""
        self._coming = [c for c in self._coming if c[0] < index]
        self._voters = []

    def apply(self, index: int, members: Members) -> None:
        """These are the voters of the state after entry `index`."""
        self._applied = members
        self._coming = [c for c in self._coming if c[0] > index]
        self._voters = []

    def agree(self, nodes: set[str]) -> bool:
        """Whether these nodes are a majority of each configuration."""
        there = {self._voter(node) for node in nodes}
        return all(2 * len(c & there) > len(c) for c in self._all())

    def reached(self, numbers: dict[str, int]) -> int:
        """The highest number that a majority of each configuration has reached."""
        by_voter: dict[str, int] = {}
        for node, number in numbers.items():
            voter = self._voter(node)
            by_voter[voter] = max(number, by_voter.get(voter, 0))
        return min(self._reached(c, by_voter) for c in self._all())

    def _reached(self, voters: set[str], numbers: dict[str, int]) -> int:
        ordered = sorted((numbers.get(v, 0) for v in voters), reverse=True)
        return ordered[len(ordered) // 2]

    def electorate(self) -> set[str]:
        """Every voter of every configuration, under each name by which it may be connected."""
        found = set()
        for members in self._members():
            for name, identity in members.items():
                found |= {name, f"{name}#{identity.hex()}"}
        return found

    def reached_before(self, numbers: dict[str, int]) -> int:
        """The highest number that a majority of the applied configuration alone has reached."""
        return self._reached(self._names(self._applied), numbers)

    def is_coming(self, node: str) -> bool:
        """Whether a change in the log makes this learner a voter."""
        name, _, identity = node.partition("#")
        return any(m.get(name, b"").hex() == identity for _, m in self._coming)

    def names(self) -> set[str]:
        """Names of the voters of every configuration."""
        return {name for members in self._members() for name in members}

    def _voter(self, node: str) -> str:
        """A learner that is a voter, which it need not know yet, is called by the voter's name; but
        not while another identity votes under that name.
        """
        name, _, identity = node.partition("#")
        if not identity:
            return node
        if name in self._applied:
            return name if self._applied[name].hex() == identity else node
        return name if self.is_coming(node) else node

    def _members(self) -> list[Members]:
        return [self._applied, *(m for _, m in self._coming)]

    def _all(self) -> list[set[str]]:
        """Asked several times a command, and changed once in a cluster's life."""
        if not self._voters:
            self._voters = [self._names(m) for m in self._members()]
        return self._voters

    def _names(self, members: Members) -> set[str]:
        return {
            name if self._applied.get(name, identity) in (identity, b"")
            else f"{name}#{identity.hex()}"
            for name, identity in members.items()
        }  # fmt: skip
