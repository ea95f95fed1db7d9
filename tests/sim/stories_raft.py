"""Stories about the masters: what goes wrong goes wrong in one order, so that a certain rule is all
that stands between the clients and a wrong answer. Chance alone hardly ever meets these orders.

About a third of the seeds begin with one; it takes the place of some of the usual faults. What only
the Raft layer by itself can show is in `core/stories.py`.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from tests.sim.clock import USUAL_THREAD_S
from tests.sim.node import Machine
from tests.sim.readers import Readers

if TYPE_CHECKING:
    from tests.sim.world import World

STORIES = ("deposed leader read", "last word", "snapshot overtaken", "everybody replaced")
FAULTS = 4  # of the usual ones, in whose place a story is told
_SHARE = 0.5
_LIMIT_S = 4.0  # what a story waits for and has not come by then does not come
_LOOK_S = 0.003
_NO_ELECTION_S = 0.25  # so long nobody misses a leader
_SLOW_THREAD_S, _SLOW_UNPACKING_S = (3.0, 4.0), (1.5, 2.0)


class RaftStories:
    """Chooses one and tells it. What it cut works again afterwards."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self._chance = random.Random(f"{world.seed}/raft story")
        self._told: dict[str, Callable[[Machine], Awaitable[bool]]] = {
            "deposed leader read": self._deposed_leader_read,
            "last word": self._last_word,
            "snapshot overtaken": self._snapshot_overtaken,
            "everybody replaced": self._everybody_replaced,
        }

    async def tell(self) -> bool:
        """Tell one, or not. True if one was told to its end."""
        if self._chance.random() >= _SHARE or not await self._until(self._leader_known):
            return False
        leader = next(m for m in self.world.masters if m.leads)
        name = self._chance.choice(STORIES[: 4 if len(self.world.members()) == 3 else 3])
        self.world.hurried = name != "everybody replaced"
        told = await self._told[name](leader)
        self.world.hurried = False
        for machine in self.world.masters:
            if machine.process is not None:
                machine.process.thread_s = USUAL_THREAD_S
        self.world.net.heal()
        self.world.revive()
        self.world.note(name, told)
        return told

    # --- the stories

    async def _deposed_leader_read(self, leader: Machine) -> bool:
        """Whoever was deposed does not know it: it has just heard answers that were long under way.
        Clients that still reach it read there, and others write elsewhere. Reads wait for a
        majority's word that was asked for later.
        """
        readers = Readers(self.world, [leader.host])
        readers.start(1.8)
        await asyncio.sleep(0.1)
        others = [m.host for m in self.world.machines if m is not leader]
        there, back = {(leader.host, o) for o in others}, {(o, leader.host) for o in others}
        self.world.net.cut |= back
        await asyncio.sleep(0.03)
        self.world.net.cut |= there
        await asyncio.sleep(_NO_ELECTION_S)
        self.world.net.mend(back)
        self.world.net.cut |= back
        if self._chance.random() < 0.4 and leader.process is not None:
            leader.process.paused = True
            await asyncio.sleep(self._chance.uniform(0.7, 1.1))
            self.world.loop.resume(leader.process)
        await self._until(lambda: readers.done)
        return readers.answered > 0

    async def _last_word(self, leader: Machine) -> bool:
        """It dies as it acknowledges; nobody else knows that the entry is committed, and disks are
        slow. A new leader serves when its own first entry is committed.
        """
        acknowledged = self.world.law.acknowledged
        if not await self._until(lambda: self.world.law.acknowledged > acknowledged):
            return False
        leader.die(power=False)
        rest = self._rest(leader)
        for machine in rest:
            machine.slow_until = self.world.loop.now + 2.0
        readers = Readers(self.world, [m.host for m in rest])
        readers.start(1.5)
        await self._until(lambda: readers.done)
        return readers.answered > 0

    async def _snapshot_overtaken(self, leader: Machine) -> bool:
        """While a snapshot is unpacked, another leader, which still has the older log, brings more
        than is in it. An older state replaces no newer one.
        """
        behind, other = self._chance.sample(self._rest(leader), 2)
        if leader.replica is None or other.process is None or behind.replica is None:
            return False
        other.process.thread_s = _SLOW_THREAD_S  # it makes no checkpoint, so it keeps its log
        end, journal = behind.replica.last_index, leader.replica._journal
        behind.die(power=False)
        if not await self._until(lambda: journal.oldest_behind_kept > end):
            return False
        self._isolate(behind)
        self.world.net.mend({(behind.host, leader.host), (leader.host, behind.host)})
        behind.start()
        assert behind.process is not None
        behind.process.thread_s = _SLOW_UNPACKING_S
        if not await self._until(lambda: self._installs(behind)):
            return False
        behind.process.thread_s = USUAL_THREAD_S
        self.world.net.heal()
        self._isolate(leader)
        since = behind.store.applied[0]
        ended = await self._until(lambda: not self._installs(behind))
        return ended and behind.running and behind.store.applied[0] > since

    async def _everybody_replaced(self, leader: Machine) -> bool:
        """All masters lose their disks, one after another, while the learner is away. It knows
        nobody when it comes back, and lets everybody in.
        """
        for learner in self.world.learners:
            learner.die(power=False)
        for machine in [m for m in self.world.masters if m.name in self.world.members()]:
            if not await self._until(lambda m=machine: self.world.may_lose(m)):
                return False
            machine.die(power=False)
            machine.new_disk(join=True)
            machine.peers = tuple(sorted(self.world.members()))
            machine.start()
            if not await self._until(lambda m=machine: self._votes(m)):
                return False
        return True

    # --- what they are made of

    def _leader_known(self) -> bool:
        return sum(m.leads for m in self.world.masters) == 1

    def _rest(self, one: Machine) -> list[Machine]:
        members = self.world.members()
        return [m for m in self.world.masters if m.name in members and m is not one]

    def _votes(self, machine: Machine) -> bool:
        return self.world.members().get(machine.name) == machine.uuid

    def _installs(self, machine: Machine) -> bool:
        receiver = getattr(machine.replica, "_receiver", None)
        return bool(receiver and receiver._installing)

    def _isolate(self, one: Machine) -> None:
        """Nothing gets from it to the other masters, nor back."""
        for other in self.world.machines:
            if other is not one:
                self.world.net.cut |= {(one.host, other.host), (other.host, one.host)}

    async def _until(self, true: Callable[[], bool]) -> bool:
        """Wait until it is so. False if it does not come to be."""
        until = self.world.loop.now + _LIMIT_S
        while not true():
            if self.world.loop.now > until:
                return False
            await asyncio.sleep(_LOOK_S)
        return True
