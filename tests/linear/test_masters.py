"""Histories of operations on three real masters while their leader dies, sleeps, is cut off.

A failing test prints its seed; `SEED=N pytest tests/linear/test_masters.py` makes the same choices
(not the same moments).
"""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from chaos.linear import Operation, Violation, check
from raftfs.wire import messages as m
from tests.conftest import free_port_base
from tests.linear.clients import NAMES, Recorder, make_roots
from tests.linear.masters import Masters

SEED = int(os.environ.get("SEED", "0")) or int.from_bytes(os.urandom(3), "big")
_LIMIT_S = 40.0


class Story:
    """Masters, clients of all of them, and `lone`: a client that was told of the leader only."""

    def __init__(self, masters: Masters) -> None:
        self.masters = masters
        self.history: list[Operation] = []
        self.clients: list[Recorder] = []
        self.roots: list[int] = []
        self._stop = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def begin(self, clients: int = 6) -> None:
        """Connect and go to work."""
        for number in range(clients):
            self.clients.append(await self.client(f"c{number}"))
        self.roots = await make_roots(self.clients[0].meta)
        for client in self.clients:
            self._tasks.append(asyncio.create_task(client.work(self.roots, self._stop)))

    async def client(self, name: str, only: int | None = None) -> Recorder:
        """One more, which knows all masters or only one."""
        known = self.masters.addresses if only is None else [self.masters.addresses[only]]
        made = Recorder(name, known, SEED, self.history)
        await made.meta.start(20.0)
        return made

    async def leader(self, other_than: int | None = None) -> int:
        """The number of the master that leads (in the newest term that anybody knows)."""
        until = time.monotonic() + _LIMIT_S
        while time.monotonic() < until:
            answers = await self.clients[0].meta.ask_each(m.WhoLeads(), 0.5)
            known = [a for a in answers.values() if isinstance(a, m.Leader) and a.name]
            if known:
                host, _, port = max(known, key=lambda a: a.term).clients.rpartition(":")
                number = self.masters.addresses.index((host, int(port)))
                if number != other_than:
                    return number
            await asyncio.sleep(0.02)
        raise AssertionError(f"no leader within {_LIMIT_S} s")

    async def until_done(self, operations: int) -> None:
        """Until so many more operations have been answered."""
        wanted = len(self.history) + operations
        until = time.monotonic() + _LIMIT_S
        while len(self.history) < wanted:
            assert time.monotonic() < until, f"{len(self.history)} of {wanted} operations"
            await asyncio.sleep(0.01)

    async def end(self) -> None:
        """Let everyone finish."""
        self._stop.set()
        await asyncio.wait_for(asyncio.gather(*self._tasks), _LIMIT_S)
        for client in self.clients:
            await client.meta.close()


def tell(folder: Path, fault: Callable[[Story], Awaitable[None]], planted: bool = False) -> Story:
    """A history with a fault in its middle; every operation in it has been answered."""
    print(f"SEED={SEED}")

    async def story(masters: Masters) -> Story:
        made = Story(masters)
        try:
            await made.begin()
            await made.until_done(300)
            await fault(made)
            await made.until_done(300)
        finally:
            await made.end()
        return made

    with Masters(folder, free_port_base(), planted=planted) as masters:
        told = asyncio.run(story(masters))
        assert "Traceback" not in masters.log()
    unknown = [op for op in told.history if op.unknown]
    assert not unknown, f"no answer: {unknown[:3]}"
    return told


def judged(told: Story) -> Violation | None:
    """What no order explains."""
    kinds = {op.what for op in told.history if not op.error}
    assert len(kinds) == 8, f"only {kinds} ever succeeded: the history proves little"
    return check(told.history, told.roots)


async def kill_leaders(story: Story) -> None:
    """kill -9 of the leader, twice, each back before the next."""
    for _ in range(2):
        leader = await story.leader()
        story.masters.kill(leader)
        await story.leader(other_than=leader)
        await story.until_done(200)
        story.masters.start(leader)
        await story.until_done(200)


async def reads_of(lone: Recorder, roots: list[int], label: str) -> None:
    """Look at every name, all at once."""
    await asyncio.gather(
        *(lone.do("lookup", (root, name), f"/{label}/{root}/{name}")
          for root in roots for name in NAMES),
        *(lone.do("list", (root,), f"/{label}/{root}") for root in roots),
    )  # fmt: skip


async def pause_leaders(story: Story) -> None:
    """SIGSTOP, a new leader, acknowledged changes; a client that knows no other asks; SIGCONT."""
    for number in range(3):
        leader = await story.leader()
        lone = await story.client(f"lone{number}-", only=leader)
        story.masters.signal(leader, signal.SIGSTOP)
        await story.leader(other_than=leader)
        await story.until_done(100)
        asked = asyncio.create_task(reads_of(lone, story.roots, "asleep"))
        await asyncio.sleep(0.05)
        assert not asked.done(), "the leader sleeps and answers"
        story.masters.signal(leader, signal.SIGCONT)
        await asyncio.wait_for(asked, _LIMIT_S)
        await lone.meta.close()
        await story.until_done(100)


async def cut_leaders(story: Story) -> None:
    """The others hear nothing of the leader and choose another; its own clients go on asking it."""
    for number in range(3):
        leader = await story.leader()
        lone = await story.client(f"lone{number}-", only=leader)
        story.masters.cut(leader)
        until = asyncio.create_task(story.leader(other_than=leader))
        asked = []
        while not until.done():
            asked.append(asyncio.create_task(reads_of(lone, story.roots, f"{len(asked)}")))
            await asyncio.sleep(0.05)
        await story.until_done(100)
        asked.append(asyncio.create_task(reads_of(lone, story.roots, "last")))
        await asyncio.sleep(0.1)
        story.masters.mend(leader)
        await asyncio.wait_for(asyncio.gather(*asked), _LIMIT_S)
        await lone.meta.close()
        await story.until_done(100)


@pytest.mark.parametrize("fault", [kill_leaders, pause_leaders, cut_leaders])
def test_the_masters_are_one_tree(
    tmp_path: Path, fault: Callable[[Story], Awaitable[None]]
) -> None:
    told = tell(tmp_path, fault)
    found = judged(told)
    assert found is None, f"SEED={SEED}: {found}"
    assert len(told.history) > 1_000


def test_masters_that_answer_without_proof_are_found(tmp_path: Path) -> None:
    told = tell(tmp_path, cut_leaders, planted=True)
    assert judged(told) is not None
