"""Stories: what goes wrong goes wrong in one order, so that a certain rule of Raft is all that
stands between the cluster and the loss. Chance alone meets these orders in no seed of thousands.

Half of the seeds begin with one. Each says which rule it is after.
"""

import random
from collections.abc import Callable
from typing import TYPE_CHECKING
from unittest.mock import patch

from pysyncobj.node import Node

from raftfs.meta.raft import safety
from raftfs.meta.raft.safety import LEADER
from tests.sim.core.member import Member

if TYPE_CHECKING:
    from tests.sim.core.world import World

_STEP_S = 0.005
_LIMIT_S = 4.0  # a step of a story that has not come by then does not come
FAULTS = 8  # of the usual ones, in whose place a story is told


class Stories:
    """Chooses one and tells it. What it cut, stopped or slowed down works again afterwards."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self._chance = random.Random(f"{world.seed}/story")
        self._told: dict[int, list[Callable[[Member], bool]]] = {
            3: [self._deposed_leader_read, self._last_word, self._figure_eight, self._old_disk],
            5: [self._last_word, self._old_acknowledgement, self._old_acknowledgement],
        }

    def tell(self) -> bool:
        """Tell one, or not. True if one was told to its end."""
        if self._chance.random() < 0.5 or not self._until(lambda: self._leader() is not None):
            return False
        leader = self._leader()
        assert leader is not None
        story = self._chance.choice(self._told[len(self.world.voters)])
        self.world.net.bad = False
        told = story(leader)
        self.world.mend(bad=True)
        self.world.seen[story.__name__.strip("_").replace("_", " ")] += told
        return told

    # --- the stories

    def _deposed_leader_read(self, leader: Member) -> bool:
        """Whoever was deposed does not know it. Reads wait for a majority's word."""
        self._isolate(leader, self._rest(leader), one_way=self._chance.random() < 0.25)
        if self._chance.random() < 0.7:
            leader.paused_until = self.world.now + 1.5
        for _ in range(40):
            self.world.propose()
            self.world.read()
            self.world.run(0.03)
        return True

    def _last_word(self, leader: Member) -> bool:
        """It dies as it acknowledges; nobody else knows that the entry is committed, and disks are
        slow. A new leader serves when its own first entry is committed.
        """
        acked = len(self.world.acked)
        self.world.propose()
        if not self._until(lambda: len(self.world.acked) > acked):
            return False
        leader.stop(power=False)
        for member in self._rest(leader):
            member.slow_until = self.world.now + 3.0
        for _ in range(80):
            self.world.read()
            self.world.run(0.02)
        return True

    def _figure_eight(self, first: Member) -> bool:
        """Figure 8 of the Raft paper: an entry of an older term is on a majority, and yet not
        committed, as somebody who lacks it may still be elected.
        """
        rest = self._rest(first)
        self._isolate(first, rest)
        old = first.journal.last_index + 1
        for _ in range(3):
            self.world.propose_to(first)
        if not self._until(lambda: first.journal.durable_index >= old + 2):
            return False
        first.stop(power=False)
        # The second leader has written its first entry, which reaches nobody.
        second = self._elected(rest)
        if second is None:
            return False
        (third,) = [m for m in rest if m is not second]
        self._isolate(second, [third])
        if not self._until(lambda: second.journal.durable_index >= second.journal.last_index):
            return False
        second.stop(power=False)
        # The first one leads again, and brings its old entry to the third, no more.
        first.start()
        self.world.net.cut.clear()
        with patch.object(safety, "APPEND_BYTES", 1):
            if not self._until(lambda: third.journal.last_index >= old):
                return False
        self.world.net.cut.add((first.name, third.name))
        self.world.run(0.4)
        first.stop(power=False)
        self.world.net.cut.clear()
        second.start()
        self.world.run(1.5)
        return True

    def _old_acknowledgement(self, first: Member) -> bool:
        """An acknowledgement comes when what it tells of has been cut again."""
        follower, second, third, fourth = self._shuffled(self._rest(first))
        others = [second, third, fourth]
        end = first.journal.last_index + 10
        if not self._written_in_vain(first, follower, others, end):
            return False
        # The others elect one of them; then first the follower and then the old leader follow it.
        new = self._elected(others)
        if new is None:
            return False
        self._join(follower, others)
        if not self._until(lambda: self._as_long_as(follower, new)):
            return False
        self._isolate(follower, others)
        self._join(first, others)
        if not self._until(lambda: self._as_long_as(first, new)) or new.core is None:
            return False
        new.core.hand_over(Node(first.name))
        if not self._until(lambda: first.core is not None and first.core.leads):
            return False
        # It leads again, reaches only one, and hears what the follower said in its first term.
        self._isolate(first, [second, fourth])
        while first.journal.last_index < end + 3:
            self.world.propose_to(first)
        self.world.net.deliver_late(self.world.now)
        self.world.run(0.5)
        first.stop(power=False)
        third.stop(power=False)
        self.world.net.cut.clear()
        self.world.run(1.5)
        self.world.propose()
        self.world.run(0.5)
        return True

    def _written_in_vain(
        self, leader: Member, follower: Member, others: list[Member], end: int
    ) -> bool:
        """Up to `end` the log comes to one follower, no more; what it answers is held up."""
        net = self.world.net
        net.late.add((follower.name, leader.name))
        for one in (leader, follower):
            self._isolate(one, others)
        while leader.journal.last_index < end:  # one by one: none overtakes another
            self.world.propose_to(leader)
            self.world.run(_STEP_S)
        if not self._until(lambda: follower.journal.durable_index >= end):
            return False
        self.world.run(0.1)
        net.late.clear()
        self._isolate(follower, [leader])
        return True

    def _old_disk(self, leader: Member) -> bool:
        """A master was replaced, and its old disk is found and put back. One of the others knows of
        the replacement, and not that it is committed: it may not lead with the old disk's vote.
        """
        replaced, other = self._shuffled(self._rest(leader))
        replaced.stop(power=False)
        old = replaced.take_disk()
        replaced.new_disk(voter=False)
        replaced.start()
        if not self._until(lambda: self._changing(other), self.world.promote):
            return False
        self.world.net.cut.add((leader.name, other.name))
        if not self._until(lambda: leader.members.get(replaced.name) == replaced.uuid):
            return False
        acked = len(self.world.acked)
        self._isolate(other, [leader, replaced])
        for _ in range(3):
            self.world.propose_to(leader)
        if not self._until(lambda: len(self.world.acked) > acked):
            return False
        leader.stop(power=False)
        replaced.stop(power=False)
        new = replaced.take_disk()
        replaced.put_disk(old)
        replaced.start()
        self.world.net.cut.clear()
        for _ in range(10):
            self.world.run(0.2)
            self.world.propose()
        replaced.stop(power=False)
        replaced.put_disk(new)
        return True

    # --- what they are made of

    def _leader(self) -> Member | None:
        leads = [m for m in self.world.running() if m.core is not None and m.core.leads]
        return leads[0] if len(leads) == 1 else None

    def _rest(self, one: Member) -> list[Member]:
        return [self.world.members[n] for n in sorted(self.world.voters) if n != one.name]

    def _shuffled(self, members: list[Member]) -> list[Member]:
        return self._chance.sample(members, len(members))

    def _isolate(self, one: Member, others: list[Member], *, one_way: bool = False) -> None:
        """Nothing gets from it to the others, nor (unless `one_way`) back."""
        for other in others:
            self.world.net.cut.add((one.name, other.name))
            if not one_way:
                self.world.net.cut.add((other.name, one.name))

    def _join(self, one: Member, others: list[Member]) -> None:
        for other in others:
            self.world.net.cut -= {(one.name, other.name), (other.name, one.name)}

    def _until(self, true: Callable[[], bool], meanwhile: Callable[[], None] | None = None) -> bool:
        """Let time pass until it is so. False if it does not come to be."""
        until = self.world.now + _LIMIT_S
        while not true():
            if self.world.now > until:
                return False
            if meanwhile is not None:
                meanwhile()
            self.world.run(_STEP_S)
        return True

    def _elected(self, among: list[Member]) -> Member | None:
        """Who of these is elected, as soon as it is."""
        def found() -> list[Member]:
            return [m for m in among if m.core is not None and m.core.state == LEADER]

        return found()[0] if self._until(lambda: bool(found())) else None

    def _as_long_as(self, one: Member, leader: Member) -> bool:
        """Whether it has the leader's whole log."""
        mine, its = one.journal, leader.journal
        end = its.last_index
        return mine.last_index == end and mine.term_at(end) == its.term_at(end)

    def _changing(self, member: Member) -> bool:
        return member.core is not None and member.core.configurations.changing
