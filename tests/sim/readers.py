"""Readers that ask certain masters, whoever leads: as a client does that has not heard the news."""

import asyncio
import random
from typing import TYPE_CHECKING, Any

from raftfs.client.session import Session
from raftfs.const import ROOT_INODE
from raftfs.errors import LinkError, ReplyError
from raftfs.wire import frame, rpc
from raftfs.wire import messages as m
from tests.sim.clock import Process

if TYPE_CHECKING:
    from tests.sim.world import World

_CLIENT_PORT = 4
_EVERY_S = 0.025
_PATIENCE_S = 3.0


class Readers:
    """One for each of these hosts, all on one machine that nothing cuts off. They ask again and
    again, without waiting for answers; each answer must be no older than when it was asked for.
    """

    def __init__(self, world: "World", hosts: list[str]) -> None:
        self.world, self._hosts = world, hosts
        self.answered = 0
        self._until = 0.0
        chance = random.Random(f"{world.seed}/readers")
        self._process = Process("readers", "readers", chance, lambda: None)

    def start(self, seconds: float) -> None:
        """Read for so long."""
        loop = self.world.loop
        self._until = loop.now + seconds
        for host in self._hosts:
            loop.create_task(self._read(host), context=self._process.here.copy())

    @property
    def done(self) -> bool:
        """The time is up."""
        return self.world.loop.now > self._until

    async def _read(self, host: str) -> None:
        while not self.done:
            link = None
            try:
                link = await rpc.connect(
                    host, _CLIENT_PORT, incoming=m.ClientNotice, handler=lambda link, notice: None
                )
                await self._ask_on(link)
            except LinkError:
                await asyncio.sleep(_EVERY_S)
            finally:
                if link is not None:
                    link.close()

    async def _ask_on(self, link: rpc.Link) -> None:
        while not self.done and not link.closed.done():
            try:
                await Session(tool=True).register(link)
                break
            except ReplyError:
                await asyncio.sleep(_EVERY_S)
        while not self.done and not link.closed.done():
            self._ask(link, self.world.law.acknowledged)
            await asyncio.sleep(_EVERY_S)
        await asyncio.sleep(_EVERY_S)

    def _ask(self, link: rpc.Link, since: int) -> None:
        def answered(reply: "asyncio.Future[Any]") -> None:
            if reply.cancelled() or reply.exception() is not None:
                return
            self.world.law.listed(frame.decode(m.DirPage, reply.result()), since)
            self.answered += 1

        ask = m.ReadDir(ROOT_INODE, b"", 100)
        link.call(ask, _PATIENCE_S).add_done_callback(answered)
