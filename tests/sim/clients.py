"""Clients that never give up: each operation is asked again, with its sequence number, at whatever
master there is, until somebody gives a definite answer.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from raftfs.errors import NotLeader, OutcomeUnknown, ReplyError, Status
from raftfs.wire import frame, ops
from raftfs.wire.ops import Attr, Granted, NodeType, Op, Result
from tests.sim.invariants import must
from tests.sim.node import Machine

if TYPE_CHECKING:
    from tests.sim.world import World

_PATIENCE_S = 0.8
_NAMES = [b"a", b"b", b"c", b"d", b"e"]
_ROOT = 1


class Client:
    """One session after another is not needed: it keeps its first."""

    def __init__(self, world: "World", number: int) -> None:
        self.world, self.name = world, f"client{number}"
        self.chance = random.Random(f"{world.seed}/{self.name}")
        self.acked = self.retried = self.reads = 0
        self._session = self._seq = 0
        self._inodes = [_ROOT]
        self._target: Machine | None = None

    async def work(self) -> None:
        """Until the story ends."""
        while not self.world.ended:
            await self.one()
            await asyncio.sleep(self.chance.uniform(0.0, 0.08))

    async def one(self) -> None:
        """An operation, or a guarded read."""
        if not self._session:
            secret = self.chance.randbytes(8)
            result = await self._ask(0, 0, ops.NewSession(secret, self.name))
            if not result.status:
                self._session = frame.decode(int, result.value)
        elif self.chance.random() < 0.3:
            await self._read()
        else:
            self._seq += 1
            since = self.world.law.acknowledged
            op = self._choose()
            result = await self._ask(self._session, self._seq, op)
            forgotten = result.status in (Status.NO_SESSION, Status.STALE_SEQ)
            must(not forgotten, f"{self.name}'s session is gone: {result}")
            self.world.law.told(self._session, self._seq, result, since)
            self.acked += 1
            await self._learn(op, result)

    def _choose(self) -> Op:
        name, other = self.chance.sample(_NAMES, 2)
        inode = self.chance.choice(self._inodes)
        kind = NodeType.DIR if self.chance.random() < 0.2 else NodeType.FILE
        create = ops.Create(_ROOT, name, kind, 0o644, 0, 0, 0)
        return self.chance.choice([
            create, create, ops.Unlink(_ROOT, name), ops.Rmdir(_ROOT, name),
            ops.Rename(_ROOT, name, _ROOT, other), ops.Link(inode, _ROOT, name),
            ops.SetAttr(inode, mode=0o600), ops.Symlink(_ROOT, name, other, 0, 0),
            ops.GrantWrite(inode, 0, True),
        ])  # fmt: skip

    async def _learn(self, op: Op, result: Result) -> None:
        """Inodes to work with; a granted write is committed as a chunkserver's client would."""
        if result.status:
            return
        if isinstance(op, ops.Create):
            self._inodes = [*self._inodes[-4:], frame.decode(Attr, result.value).inode]
        elif isinstance(op, ops.GrantWrite):
            grant = frame.decode(Granted, result.value)
            written = [ops.Written(grant.chunk, grant.lock, True)]
            self._seq += 1
            since = self.world.law.acknowledged
            commit = ops.CommitWrite(op.inode, self.chance.randrange(1, 9_999), 0, written)
            told = await self._ask(self._session, self._seq, commit)
            self.world.law.told(self._session, self._seq, told, since)
            self.acked += not told.status

    # --- asking

    async def _ask(self, session: int, seq: int, op: Op) -> Result:
        tries = 0
        while True:
            machine = self._somebody()
            answer = await self._call(machine, lambda m: _propose(m, session, seq, op))
            if isinstance(answer, Result):
                self.retried += tries > 0
                return answer
            tries += 1
            self._target = None
            await asyncio.sleep(self.chance.uniform(0.01, 0.15))

    def _somebody(self) -> Machine:
        if self._target is None:
            self._target = self.chance.choice(self.world.masters)
        return self._target

    async def _read(self) -> None:
        machine, since = self._somebody(), self.world.law.acknowledged

        async def barrier(m: Machine) -> int:
            assert m.replica is not None
            await m.replica.read_barrier()
            return int(m.store.applied[0])

        index = await self._call(machine, barrier)
        if isinstance(index, int):
            self.world.law.read(machine.ident, index, since)
            self.reads += 1
        else:
            self._target = None

    async def _call(self, machine: Machine, work: Callable[[Machine], Awaitable[Any]]) -> Any:
        """Run it over there, as a request would; None if no answer came in time."""
        loop, process = self.world.loop, machine.process
        reply: asyncio.Future[Any] = loop.create_future()
        there, back = (self.name, machine.name), (machine.name, self.name)

        def answer(result: Any) -> None:
            if not reply.done():
                reply.set_result(result)

        async def serve() -> None:
            try:
                result = await work(machine)
            except (ReplyError, NotLeader, OutcomeUnknown) as e:
                result = e
            if self.chance.random() > 0.03:
                delay = self.world.net.delay(back)
                loop.call_later(delay, answer, result, context=self.world.outside)

        def arrive() -> None:
            if machine.replica is not None and machine.process is process:
                loop.create_task(serve())

        if process is not None and process.alive:
            copies = self.chance.choices((0, 1, 2), (2, 93, 5))[0]
            self.world.seen["request asked twice"] += copies == 2
            for _ in range(copies):
                loop.call_later(self.world.net.delay(there), arrive, context=process.here)
        try:
            return await asyncio.wait_for(reply, _PATIENCE_S)
        except TimeoutError:
            return None


async def _propose(machine: Machine, session: int, seq: int, op: Op) -> Result:
    assert machine.proposer is not None
    return await machine.proposer.propose(session, seq, op)
