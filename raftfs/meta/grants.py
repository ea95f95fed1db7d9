"""Write grants: who may write a chunk, on which copies, under which version. Leader's work.

The life of a grant of an existing chunk whose copies may differ:

    1. GrantWrite committed      lock and a *reserved* version, never used before, are in the log
    2. RaiseVersion to each copy each one durably becomes the reserved version; if any did not
                                 answer: from 1 again with the others
    3. (too few copies: other servers replicate the raised chunk; then from 1 again with them)
    4. SetVersion committed      from now on older copies are stale
    5. the client gets the map   and only now writes

    crash after 1: nothing happened to any copy; the reserved number is never used again.
    crash in 2..4: some copies have the reserved version, some the committed one; all have every
                   acknowledged byte, so all are good; the next grant raises the chosen group again.
    crash after 4: as if the client had got the map and never written.

Raising is skipped only when this leader, in this term, has itself established that exactly these
servers hold the committed version (`_proven`): then no copy elsewhere can pretend to be current.
"""

import asyncio
import contextlib
import errno
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

import structlog

from raftfs.errors import ReplyError, Status
from raftfs.meta.chunkhub import ChunkHub
from raftfs.meta.plan.healing import Verdict, good, judge, unsettled
from raftfs.meta.plan.placement import choose_servers, read_order
from raftfs.meta.proposer import Proposer
from raftfs.meta.state import read
from raftfs.meta.state.model import ChunkRow, Rows
from raftfs.wire import messages as m
from raftfs.wire.ops import Granted, GrantWrite, SetVersion, Unlock
from raftfs.wire.rpc import decode

log = structlog.get_logger("raftfs.grants")

# So long after a doubtful copy came back, a chunk that has only such ones waits for the others.
DOUBT_PATIENCE_S = 60.0


class _KeyLock:
    """A lock and how many hold it or wait for it, so that it can be dropped with the last one."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.users = 0


class Grants:
    """Locates copies for readers and prepares them for writers."""

    def __init__(
        self,
        rows: Rows,
        hub: ChunkHub,
        proposer: Proposer,
        term: Callable[[], int],
        draw: Callable[[], float] = random.random,
        patience_s: float = 0.0,
    ) -> None:
        """`patience_s`: so long from now, chunks of a restored state wait for all their copies."""
        self._patient_until = time.monotonic() + patience_s
        self._rows = rows
        self._hub = hub
        self._proposer = proposer
        self._term = term
        self._draw = draw
        self._proven: dict[int, frozenset[bytes]] = {}
        # Servers of fresh grants, which may not have reported their new copy yet.
        self._expected: dict[int, tuple[bytes, ...]] = {}
        self._locks: dict[tuple[int, int], _KeyLock] = {}

    def reset(self) -> None:
        """Leadership changed: nothing is proven any more."""
        self._proven.clear()
        self._expected.clear()

    def doubt(self, chunk: int) -> None:
        """Copies of `chunk` may differ now (a grant ended by force): raise before the next write.
        """
        self._proven.pop(chunk, None)

    def settled(self, chunk: int) -> None:
        """The chunk's grant ended well: its copies have been reported, or never will be."""
        self._expected.pop(chunk, None)

    def forget(self, chunk: int) -> None:
        """The chunk is gone."""
        self._proven.pop(chunk, None)
        self._expected.pop(chunk, None)

    @contextlib.asynccontextmanager
    async def lock(self, inode: int, index: int) -> AsyncIterator[None]:
        """Serialises everything that touches the copies of one chunk: grants, repair, removal."""
        held = self._locks.setdefault((inode, index), _KeyLock())
        held.users += 1
        try:
            async with held.lock:
                yield
        finally:
            held.users -= 1
            if not held.users:
                del self._locks[inode, index]

    # --- readers

    def copies(self, chunk: ChunkRow, *, fenced: bool) -> dict[bytes, int]:
        """Server -> version of every copy that is connected, reported or just being made."""
        found = self._hub.copies_of(chunk.id, fenced=fenced)
        for uuid in self._expected.get(chunk.id, ()):
            server = self._hub.servers.get(uuid)
            rotten = uuid in self._hub.damaged.get(chunk.id, ())
            if uuid in found or rotten or server is None:
                continue
            if self._hub.is_fenced(server):
                found[uuid] = chunk.version
        return found

    def verdict(self, chunk: ChunkRow) -> Verdict:
        """What the connected copies are worth."""
        copies = self.copies(chunk, fenced=True)
        return judge(
            chunk.version, chunk.reserved, chunk.goal, copies, chunk.restored,
            self._hub.doubtful(chunk.id, copies), self._hub.leaving_of(chunk.id, copies),
        )  # fmt: skip

    def awaits_copies(self, chunk: ChunkRow) -> bool:
        """Whether servers that have not come yet may hold copies that are better than all here:
        newer ones just after a bootstrap, sure ones after a power cut.
        """
        known = self.copies(chunk, fenced=False)
        now = time.monotonic()
        if unsettled(chunk.version, chunk.restored) and now < self._patient_until:
            return len(known) < chunk.goal
        doubtful = self._hub.doubtful(chunk.id, known)
        if not doubtful:
            return False
        known = good(chunk.version, chunk.reserved, known, chunk.restored)
        counted = known.keys() & self.copies(chunk, fenced=True)
        if not counted or not doubtful.issuperset(counted):
            return False
        last_came = max(self._hub.servers[uuid].ready_at for uuid in doubtful)
        others = not doubtful.issuperset(known) or len(counted) < chunk.goal
        return others and now < last_came + DOUBT_PATIENCE_S

    def locate(self, inode: int, index: int, reader_host: str) -> m.ChunkMap:
        """Where to read. A map without copies means: none is connected now."""
        chunk, length = read.file_chunk(self._rows, inode, index)
        if chunk is None:
            return m.ChunkMap(0, 0, length, [])
        copies = self.locations(chunk, reader_host) or self._damaged(chunk)
        return m.ChunkMap(chunk.id, chunk.version, length, copies)

    def _damaged(self, chunk: ChunkRow) -> list[m.Location]:
        """Copies that are damaged, when there is no other: most of their blocks may be good, and
        the servers give no others away.
        """
        versions = {u: s.version for u, s in self._hub.damaged_of(chunk.id).items()}
        usable = good(chunk.version, chunk.reserved, versions, chunk.restored)
        return [self._hub.location(uuid, version) for uuid, version in sorted(usable.items())]

    def locations(self, chunk: ChunkRow, reader_host: str) -> list[m.Location]:
        """The good copies of a chunk in the order in which a reader should try them."""
        if self.awaits_copies(chunk):
            return []
        copies = self.copies(chunk, fenced=False)
        doubtful = self._hub.doubtful(chunk.id, copies)
        usable = good(chunk.version, chunk.reserved, copies, chunk.restored, doubtful)
        if doubtful.issuperset(usable):
            return []  # none may be read before one was chosen
        hosts = [(uuid, self._hub.servers[uuid].host) for uuid in usable]
        order = read_order(hosts, reader_host, self._draw)
        return [self._hub.location(uuid, usable[uuid]) for uuid in order]

    # --- writers

    async def grant(self, session: int, ask: m.WriteChunk) -> m.ChunkMap:
        """Lock a chunk for the session and give the copies that it must write.

        ReplyError: LOCKED (another session writes), NO_SERVERS, ENOSPC, NO_COPIES, or apply's
        errno.
        """
        async with self.lock(ask.inode, ask.index):
            chunk, _ = read.file_chunk(self._rows, ask.inode, ask.index)
            if chunk is None:
                return await self._fresh(session, ask, replace=False)
            # A lock of session 0 is a dead leader's unfinished settling: whoever comes next, ends
            # it.
            if chunk.lock and chunk.lock_session not in (0, session):
                raise ReplyError(Status.LOCKED)
            failed = set(ask.failed)
            for uuid in failed:
                self._hub.suspect(uuid)
            verdict = self.verdict(chunk)
            usable = [u for u in verdict.chosen if u not in failed]
            if self.awaits_copies(chunk):
                raise ReplyError(Status.NO_COPIES)
            if not usable:
                return await self._without_copies(session, ask, chunk)
            clean = not ask.failed and not chunk.lock and not verdict.settle
            if clean and self._is_proven(chunk, usable) and len(usable) >= self._attainable(chunk):
                granted = await self._commit_grant(session, ask)
                return self._map(granted, usable, granted.version)
            return await self._raise(session, ask, usable, verdict.version)

    async def settle(self, chunk: ChunkRow) -> None:
        """Bring the good copies of an unlocked chunk to one new committed version."""
        ask = m.WriteChunk(chunk.owner, chunk.index, [], acked=True)
        async with self.lock(chunk.owner, chunk.index):
            now = read.chunk(self._rows, chunk.id)
            if now is None or (now.lock and now.lock_session):
                return
            verdict = self.verdict(now)
            if verdict.chosen:
                await self._raise(0, ask, list(verdict.chosen), verdict.version, unlock=True)

    def _is_proven(self, chunk: ChunkRow, good: Iterable[bytes]) -> bool:
        return self._proven.get(chunk.id) == frozenset(good)

    def _attainable(self, chunk: ChunkRow) -> int:
        """How many copies the goal asks for and the live servers can give."""
        have = set(self.copies(chunk, fenced=True))
        room = {c.server for c in self._hub.candidates()} - have
        return min(chunk.goal, len(have) + len(room))

    async def _without_copies(
        self, session: int, ask: m.WriteChunk, chunk: ChunkRow
    ) -> m.ChunkMap:
        """No copy is left. Only a chunk on which nothing was ever acknowledged may be replaced."""
        if chunk.born or ask.acked:
            raise ReplyError(Status.NO_COPIES)
        return await self._fresh(session, ask, replace=True)

    async def _fresh(self, session: int, ask: m.WriteChunk, *, replace: bool) -> m.ChunkMap:
        goal = read.getattr(self._rows, ask.inode).goal
        servers = choose_servers(self._hub.candidates(), goal, ask.failed, self._draw)
        if not servers:
            raise ReplyError(errno.ENOSPC if self._hub.is_full() else Status.NO_SERVERS)
        granted = await self._commit_grant(session, ask, replace=replace)
        self._proven[granted.chunk] = frozenset(servers)
        self._expected[granted.chunk] = tuple(servers)
        return self._map(granted, servers, granted.version)

    async def _raise(
        self, session: int, ask: m.WriteChunk, chosen: list[bytes], source: int, *,
        unlock: bool = False,
    ) -> m.ChunkMap:  # fmt: skip
        """Raise the copies on `chosen`, of version `source`, and make theirs the committed version.

        A version may be committed only if every order that could put it on a disk has succeeded: a
        server that obeyed, but whose answer was lost, would hold the committed version without the
        writes that follow. So after any failure the rest is raised once more, beyond its reach.
        """
        servers, replicated = chosen, unlock
        while True:
            granted = await self._commit_grant(session, ask, source=source)
            self.forget(granted.chunk)
            order = m.RaiseVersion(self._term(), granted.chunk, granted.reserved, granted.lock)
            raised = await self._hub.order_all({uuid: order for uuid in servers})
            if not raised:
                row = read.chunk(self._rows, granted.chunk)
                if row is None or unlock:
                    raise ReplyError(Status.NO_COPIES)
                if row.born:
                    # The writer learns nothing of this grant, so it could not end it. (To unlock a
                    # chunk that is not born removes it, with what is on copies that are away.)
                    await self._proposer.commit(Unlock(granted.chunk, granted.lock))
                return await self._without_copies(session, ask, row)
            complete = len(raised) == len(servers)
            servers = raised
            if complete and not replicated:
                # A writer waits: first give the chunk the copies that its goal asks for.
                replicated = True
                targets = self._targets(granted.chunk, raised, ask.failed)
                if targets:
                    servers = raised + await self.replicate(
                        granted.chunk, granted.reserved, raised, targets
                    )
                    continue
            if complete:
                break
        version = granted.reserved
        await self._proposer.commit(SetVersion(granted.chunk, version, granted.lock, unlock))
        for uuid in raised:
            self._hub.note_copy(uuid, granted.chunk, version)
        self._proven[granted.chunk] = frozenset(raised)
        log.info("version raised", chunk=f"{granted.chunk:016X}", version=version,
                 copies=len(raised), failed=[f.hex() for f in ask.failed])  # fmt: skip
        failed = "".join(f", without {self._hub.address_of(uuid)}" for uuid in ask.failed)
        detail = f"{len(raised)} copies{failed}"
        self._hub.stories.note(granted.chunk, "raised", version=version, detail=detail)
        return self._map(granted, raised, version)

    def _targets(self, chunk: int, have: list[bytes], failed: list[bytes]) -> list[bytes]:
        """Servers that should get a copy too, before the writer goes on."""
        row = read.chunk(self._rows, chunk)
        missing = 0 if row is None else row.goal - len(have)
        return choose_servers(
            self._hub.candidates(), max(0, missing), [*have, *failed], self._draw
        )

    async def replicate(
        self, chunk: int, version: int, sources: list[bytes], targets: list[bytes]
    ) -> list[bytes]:
        """Have `targets` fetch the copy; gives those that have it now. The caller holds the lock.
        """
        orders: dict[bytes, m.ChunkOrder] = {}
        for at, target in enumerate(targets):
            source = self._hub.servers[sources[at % len(sources)]]
            orders[target] = m.Replicate(self._term(), chunk, version, source.host, source.port)
        made = await self._hub.order_all(orders)
        if len(made) < len(targets):
            self.doubt(chunk)  # a lost answer may hide a copy
        for uuid in made:
            log.info("replicated", chunk=f"{chunk:016X}", version=version, to=uuid.hex())
            self._hub.stories.note(chunk, "replicated", uuid, version)
        return made

    def prove_more(self, chunk: int, servers: Iterable[bytes]) -> None:
        """Replication under this leader, with no write since, gave `servers` the same bytes."""
        if chunk in self._proven:
            self._proven[chunk] |= frozenset(servers)

    def prove_less(self, chunk: int, server: bytes) -> None:
        """The server's copy was destroyed by our committed order: it can never come back."""
        if chunk in self._proven:
            self._proven[chunk] -= {server}

    async def _commit_grant(
        self, session: int, ask: m.WriteChunk, *, source: int = 0, replace: bool = False
    ) -> Granted:
        """`source`: reserve a version for copies that have this one now."""
        op = GrantWrite(ask.inode, ask.index, source > 0, replace, source)
        return decode(Granted, await self._proposer.commit(op, session))

    def _map(self, granted: Granted, servers: Sequence[bytes], version: int) -> m.ChunkMap:
        # Not always the same server at the head of the chain: it carries the client's traffic.
        turn = granted.chunk % len(servers)
        return m.ChunkMap(
            granted.chunk, version, granted.length,
            [self._hub.location(u, version) for u in (*servers[turn:], *servers[:turn])],
            granted.lock, granted.fresh,
        )  # fmt: skip
