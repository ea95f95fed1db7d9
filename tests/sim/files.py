"""How a client uses the contents of files: as a mount does, with numbered writes in place of bytes.

A grant is used over links of its own, one to each copy. A copy whose link broke is a failed one,
because what it had not synced may be gone; everything that no fsync covered is written again.
"""

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from raftfs.errors import LinkError, ReplyError
from raftfs.wire import messages as m
from raftfs.wire import ops, rpc
from raftfs.wire.frame import decode

if TYPE_CHECKING:
    from tests.sim.clients import Client

_ANSWER_S = 1.0
_TRIES = 6


class FileUser:
    """Writes and reads the first chunks of files."""

    def __init__(self, client: "Client") -> None:
        self._client, self._chance = client, client.chance

    async def one(self) -> None:
        """Write to a file that this client made, or read one."""
        client = self._client
        files = [i for i in client.inodes if i != 1]
        if not files:
            return
        inode, index = self._chance.choice(files), self._chance.randrange(2)
        if self._chance.random() < 0.4:
            await self.read(inode, index)
        else:
            await Writer(client, inode, index).run()

    async def read(self, inode: int, index: int) -> None:
        """Whatever copy answers first must have what was promised before it was asked for."""
        client = self._client
        promises = client.world.promises
        everything = {chunk: promises.expected(chunk) for chunk in promises.written}
        try:
            where: m.ChunkMap = await client.meta.call(m.ReadChunk(inode, index))
        except ReplyError:
            return
        promises.located(inode, index, where.chunk)
        for copy in where.copies:
            seen = await _read_copy(where, copy)
            if seen is not None:
                promises.read(where.chunk, seen, everything.get(where.chunk, (set(), set())))
                client.world.seen["content read"] += 1
                return


async def _read_copy(where: m.ChunkMap, copy: m.Location) -> set[int] | None:
    link = await _connect(copy)
    if link is None:
        return None
    try:
        ask = m.ReadData(1, where.chunk, copy.version, 0, 1, where.ticket)
        raw = await link.call(ask, _ANSWER_S)
        return set(decode(list[int], raw))
    except (LinkError, ReplyError):
        return None
    finally:
        link.close()


async def _connect(copy: m.Location) -> rpc.Link | None:
    try:
        return await rpc.connect(copy.host, copy.port, timeout_s=_ANSWER_S)
    except LinkError:
        return None


class Writer:
    """One opening of a chunk: granted, written, perhaps synced, committed."""

    def __init__(
        self, client: "Client", inode: int, index: int = 0, failed: Iterable[bytes] = ()
    ) -> None:
        """`failed`: copies that it could not reach just before."""
        self._client, self._inode, self._index = client, inode, index
        self._world, self._chance = client.world, client.chance
        self.grant: m.ChunkMap | None = None
        self._links: dict[bytes, rpc.Link] = {}
        self._failed = list(failed)
        self._acked: list[int] = []  # under the chunk of this grant

    async def run(self) -> None:
        """Gives up as a mount would, with an error for the application."""
        try:
            for _ in range(self._chance.randint(1, 3)):
                if not await self.write():
                    break
                if self._chance.random() < 0.5 and not await self.sync():
                    break
                await asyncio.sleep(self._chance.choice((0.0, 0.0, 0.3)))
            await self.commit()
        except ReplyError:
            self._world.seen["write given up"] += 1
        finally:
            self.close()

    def close(self) -> None:
        """Drop its links; what is locked stays so."""
        for link in self._links.values():
            link.close()
        self._links = {}

    async def _obtain(self) -> m.ChunkMap:
        """The grant, asked for again without the copies that failed."""
        if self.grant is None or self._failed:
            self.close()
            ask = m.WriteChunk(self._inode, self._index, self._failed, bool(self._acked))
            grant: m.ChunkMap = await self._client.meta.call(ask)
            if self.grant is not None and grant.chunk != self.grant.chunk:
                self._acked = []
            self.grant, self._failed = grant, []
            for copy in grant.copies:
                link = await _connect(copy)
                if link is None:
                    self._failed.append(copy.server)
                else:
                    self._links[copy.server] = link
        return self.grant

    async def write(self) -> bool:
        """One more write. True once every copy of one grant has it, and all before it."""
        self._world.writes += 1
        write = self._world.writes
        for _ in range(_TRIES):
            grant = await self._obtain()
            if self._failed:
                continue
            again = [*self._acked, write]
            heads = [
                m.WriteData(n, grant.chunk, grant.version, grant.lock, grant.fresh, n, [], [],
                            grant.ticket)
                for n in again
            ]
            if await self._all_answer(heads):
                if write not in self._acked:
                    self._acked.append(write)
                self._world.promises.acknowledged(grant.chunk, write)
                self._world.seen["write acknowledged"] += 1
                return True
        return False

    async def sync(self) -> bool:
        """True once everything so far is on the disks of all copies."""
        grant = self.grant
        assert grant is not None
        ask = m.SyncData(0, grant.chunk, grant.version, [], grant.ticket)
        if not await self._all_answer([ask]):
            return False
        for write in self._acked:
            self._world.promises.fsynced(grant.chunk, write)
        self._world.seen["fsync"] += 1
        return True

    async def _all_answer(self, heads: list[Any]) -> bool:
        """Whether every copy did everything; who did not has failed."""
        servers = list(self._links)
        calls = [self._links[s].call(head, _ANSWER_S) for s in servers for head in heads]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        for at, server in enumerate(servers):
            part = answers[at * len(heads) : (at + 1) * len(heads)]
            if any(isinstance(a, BaseException) for a in part):
                self._failed.append(server)
        return not self._failed

    async def commit(self) -> None:
        """Tell the masters; the grant ends."""
        grant = self.grant
        if grant is None:
            return
        length = self._chance.randrange(1, 9_999)
        written = [ops.Written(grant.chunk, grant.lock, True)]
        op = ops.CommitWrite(self._inode, length if self._acked else -1, 0, written)
        status, _ = await self._client.mutate(op)
        if not status:
            self._world.seen["write committed"] += 1
            self._world.promises.committed(self._inode, self._index, grant.chunk)
