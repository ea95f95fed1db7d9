"""Keeps every chunk at its goal: replicates, settles, destroys what no longer counts. Leader's
work.

Tasks: `_run` (one loop: examines chunks that changed, sweeps all chunks and the doomed ones in
slices) and up to `REPAIRS_MAX` repairs side by side, each under the chunk's lock in `grants`.

Nothing is destroyed that was not condemned by a committed entry: a chunk whose last reference is
gone is *doomed* in the state; a stale copy is older than the committed version; a surplus copy is
named in a `DropCopy` entry, and only while servers that answer meet the goal without it; a copy
that the state does not know is kept for `orphan_delay_s` first. Before a copy goes, those that stay
are asked whether they are what their names say. A damaged copy is set aside when there is a good
one.
"""

import asyncio
import itertools
import random
import time
from collections.abc import Coroutine, Iterable
from typing import NamedTuple

import structlog

from raftfs.const import ORPHAN_DELAY_S
from raftfs.errors import LinkError, RaftfsError, ReplyError
from raftfs.meta.chunkhub import ChunkHub
from raftfs.meta.grants import Grants
from raftfs.meta.plan.healing import Verdict, spared, unsettled
from raftfs.meta.plan.outlook import DISCONNECTED, ENDANGERED, Facts, Outlook, outlook
from raftfs.meta.plan.placement import choose_servers
from raftfs.meta.proposer import Proposer
from raftfs.meta.state import read
from raftfs.meta.state.model import ChunkRow, Rows
from raftfs.wire import messages as m
from raftfs.wire.ops import DropCopy, ForgetChunk

log = structlog.get_logger("raftfs.healer")

TICK_S = 0.25
SLICE = 100  # chunks examined before the loop gets a turn
SWEEP_PAUSE_S = 0.02  # between slices of a sweep, so that it takes a small share of the time
REPAIRS_MAX = 8
DOOMED_SLICE = 200
AWAIT_S = 1.0  # so often a chunk is looked at that waits for copies which may be better
ASIDE_AGAIN_S = 60.0  # a damaged copy that its disk would not move


class HealingConfig(NamedTuple):
    """Delays in seconds, all counted from when this leader saw the fact."""

    start_delay_s: float = 5.0  # after an election: chunkservers are still announcing themselves
    endangered_delay_s: float = 3.0  # one copy left of several
    disconnect_delay_s: float = 300.0  # some copies left
    orphan_delay_s: float = ORPHAN_DELAY_S
    sweep_every_s: float = 60.0


class Healer:
    """Examines chunks and repairs them."""

    def __init__(
        self,
        rows: Rows,
        hub: ChunkHub,
        grants: Grants,
        proposer: Proposer,
        config: HealingConfig | None = None,
    ) -> None:
        self._rows = rows
        self._hub = hub
        self._grants = grants
        self._proposer = proposer
        self._config = config or HealingConfig()
        self._loop_task: asyncio.Task[None] | None = None
        self._repairs: dict[int, asyncio.Task[None]] = {}
        self._due: dict[int, float] = {}  # chunk -> when to examine it
        self._first_short: dict[int, float] = {}  # chunk -> since when it lacks copies
        self._orphans: dict[tuple[int, bytes], float] = {}  # (chunk, server) -> first seen
        self._stuck: dict[tuple[int, bytes], float] = {}  # damaged copies; when to try again
        self._leading_since = 0.0
        self.leading_since_ns = 0
        self.swept = False  # this leader has looked at everything once
        self.undergoal: set[int] = set()
        self.missing: set[int] = set()

    def lead(self) -> None:
        """Begin, as the leader."""
        self._leading_since = time.monotonic()
        self.leading_since_ns = self._hub.stories.now_ns()
        if self._loop_task is None:
            self._loop_task = asyncio.ensure_future(self._run())

    async def follow(self) -> None:
        """Stop everything; what was under way is left to the next leader."""
        tasks = [t for t in (self._loop_task, *self._repairs.values()) if t is not None]
        self._loop_task = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for memory in (self._repairs, self._due, self._first_short, self._orphans, self._stuck):
            memory.clear()
        self.swept = False
        self.undergoal.clear()
        self.missing.clear()

    def examine(self, chunks: Iterable[int], delay_s: float = 1.0) -> None:
        """Look at these chunks soon. Does nothing unless leading."""
        if self._loop_task is None:
            return
        due = time.monotonic() + delay_s
        for chunk in chunks:
            # One that waits for minutes may have become endangered meanwhile.
            self._due[chunk] = min(due, self._due.get(chunk, due))

    # --- the loop

    async def _run(self) -> None:
        await asyncio.sleep(self._config.start_delay_s)
        next_sweep = 0.0
        while True:
            try:
                self._hub.drop_silent()
                if time.monotonic() >= next_sweep:
                    await self._sweep()
                    self.swept = True
                    next_sweep = time.monotonic() + self._config.sweep_every_s
                await self._examine_due()
                await self._destroy_doomed()
            except RaftfsError as e:
                log.warning("healing interrupted", reason=str(e))
            await asyncio.sleep(TICK_S)

    async def _sweep(self) -> None:
        """Every chunk of the state, and every copy that the state does not know."""
        after = 0
        while rows := read.chunks(self._rows, after, SLICE):
            for chunk in rows:
                self._due[chunk.id] = 0.0
            after = rows[-1].id
            await self._examine_due()
            await asyncio.sleep(SWEEP_PAUSE_S)
        for at, chunk_id in enumerate([*self._hub.where, *self._hub.damaged]):
            if read.chunk(self._rows, chunk_id) is None:
                self._due.setdefault(chunk_id, 0.0)
            if at % SLICE == 0:
                await asyncio.sleep(0)
        held = (self._hub.where, self._hub.damaged)
        self._orphans = {
            k: v for k, v in self._orphans.items() if any(k[0] in where for where in held)
        }
        self._stuck = {k: v for k, v in self._stuck.items() if k[0] in self._hub.damaged}

    async def _examine_due(self) -> None:
        now = time.monotonic()
        due = [chunk for chunk, at in self._due.items() if at <= now]
        for at, chunk_id in enumerate(due):
            if len(self._repairs) >= REPAIRS_MAX:
                return
            del self._due[chunk_id]
            self._examine(chunk_id, now)
            if at % SLICE == SLICE - 1:
                await asyncio.sleep(0)

    def _examine(self, chunk_id: int, now: float) -> None:
        if chunk_id in self._repairs:
            return  # it is examined again when that repair is done
        chunk = read.chunk(self._rows, chunk_id)
        if chunk is None:
            self._set_counts(chunk_id, None)
            self._begin(chunk_id, self._destroy_orphans(chunk_id, now))
            return
        if chunk.refs == 0:
            return
        verdict = self._grants.verdict(chunk)
        self._set_counts(chunk_id, verdict if chunk.born else None)
        if chunk.lock and chunk.lock_session:
            return  # a writer is at work; its unlock has the chunk examined again
        if not verdict.chosen:
            return
        if self._grants.awaits_copies(chunk):
            self._due[chunk_id] = now + AWAIT_S
            return
        damaged = self._movable(chunk_id, now)
        if damaged:
            self._begin(chunk_id, self._set_aside(chunk, damaged))
        elif verdict.settle or chunk.lock:  # the latter: a dead leader's unfinished settling
            self._begin(chunk_id, self._grants.settle(chunk))
        elif verdict.wanted and self._can_add(verdict):
            self._add_when_due(chunk, verdict, now)
        elif verdict.surplus or verdict.stale:
            self._begin(chunk_id, self._destroy_surplus(chunk))

    def _movable(self, chunk: int, now: float) -> dict[bytes, m.Damage]:
        """Damaged copies that should be set aside, for there is a good one."""
        if chunk not in self._hub.damaged:
            return {}
        return {
            server: story for server, story in self._hub.damaged_of(chunk).items()
            if self._hub.is_fenced(self._hub.servers[server])
            and story.part != "disk"  # that one is not asked to move anything
            and self._stuck.get((chunk, server), 0.0) <= now
        }  # fmt: skip

    def _set_counts(self, chunk: int, verdict: Verdict | None) -> None:
        short = verdict is not None and verdict.wanted > 0
        gone = verdict is not None and not verdict.chosen
        (self.undergoal.add if short and not gone else self.undergoal.discard)(chunk)
        (self.missing.add if gone else self.missing.discard)(chunk)
        if not short:
            self._first_short.pop(chunk, None)

    def _can_add(self, verdict: Verdict) -> bool:
        return any(c.server not in verdict.chosen for c in self._hub.candidates())

    def _add_when_due(self, chunk: ChunkRow, verdict: Verdict, now: float) -> None:
        since = self._first_short.setdefault(chunk.id, now)
        _, delay = self._delay(verdict)
        if now - since < delay:
            self._due[chunk.id] = since + delay
        else:
            self._begin(chunk.id, self._add_copies(chunk))

    def _delay(self, verdict: Verdict) -> tuple[str, float]:
        """Why copies are not made at once, and for how long not."""
        if self._hub.all_connected():
            return "", 0.0  # nobody is awaited who could bring the copies back: a goal was raised
        if len(verdict.chosen) == 1:
            return ENDANGERED, self._config.endangered_delay_s
        return DISCONNECTED, self._config.disconnect_delay_s

    # --- what is asked

    def outlook(self, chunk: ChunkRow) -> Outlook:
        """What `_examine` will do with a chunk that files own. Changes nothing."""
        verdict, now = self._grants.verdict(chunk), time.monotonic()
        delay, delay_s = self._delay(verdict)
        facts = Facts(
            starts_in_s=self._leading_since + self._config.start_delay_s - now,
            repairing=chunk.id in self._repairs,
            session=chunk.lock_session if chunk.lock else 0,
            born=chunk.born,
            awaits=self._grants.awaits_copies(chunk),
            damaged=bool(self._movable(chunk.id, now)),
            unfinished=bool(chunk.lock),
            can_add=self._can_add(verdict),
            short_for_s=now - self._first_short.get(chunk.id, now),
            delay=delay,
            delay_s=delay_s,
        )
        return outlook(verdict, facts)

    def kept_s(self, chunk: int, server: bytes) -> float:
        """So long a copy that the state does not know is kept yet; -1: it has not been looked at.
        """
        since = self._orphans.get((chunk, server))
        if since is None:
            return -1.0
        return max(0.0, since + self._config.orphan_delay_s - time.monotonic())

    def missing_chunks(self, most: int) -> tuple[list[int], int]:
        """Up to `most` chunks without a good copy, sorted; and how many there are."""
        return sorted(itertools.islice(self.missing, most)), len(self.missing)

    def kept_copies(self, most: int) -> tuple[list[tuple[int, bytes]], int]:
        """(chunk, server) of up to `most` copies that wait for their end; and how many there are.
        """
        return sorted(itertools.islice(self._orphans, most)), len(self._orphans)

    # --- repairs at work

    def _begin(self, chunk: int, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(self._guard(chunk, work))
        self._repairs[chunk] = task
        task.add_done_callback(lambda _: self._repairs.pop(chunk, None))
        task.add_done_callback(lambda _: work.close())  # if it was cancelled before it began

    async def _guard(self, chunk: int, work: Coroutine[None, None, None]) -> None:
        try:
            await work
        except (ReplyError, LinkError) as e:
            log.warning("repair put off", chunk=f"{chunk:016X}", reason=str(e))
            self._hub.stories.note(chunk, "repair failed", detail=str(e))
            self.examine([chunk], delay_s=5.0)

    # --- repairs, each under the chunk's lock, each judging anew

    async def _add_copies(self, chunk: ChunkRow) -> None:
        async with self._grants.lock(chunk.owner, chunk.index):
            now = read.chunk(self._rows, chunk.id)
            if now is None or now.lock or not now.refs:
                return
            verdict = self._grants.verdict(now)
            if verdict.settle or not verdict.wanted or not verdict.chosen:
                return
            targets = await self._targets(now, verdict)
            made = await self._grants.replicate(
                now.id, verdict.version, list(verdict.chosen), targets
            )
            self._grants.prove_more(now.id, made)
        self.examine([chunk.id])

    async def _targets(self, chunk: ChunkRow, verdict: Verdict) -> list[bytes]:
        """Servers for the wanted copies; one that holds a stale copy only if there is no other."""
        holders = dict(verdict.stale)
        free = self._hub.candidates()
        targets = choose_servers(free, verdict.wanted, [*verdict.chosen, *holders], random.random)
        usable = {c.server for c in free}
        for server, version in verdict.stale:
            needed = len(targets) < verdict.wanted and server in usable
            if needed and self._may_go(chunk, server, version):
                await self._destroy(chunk.id, version, server, "stale, its server is needed")
                targets.append(server)
        return targets

    async def _set_aside(self, chunk: ChunkRow, damaged: dict[bytes, m.Damage]) -> None:
        """Have damaged copies moved to quarantine, while a good one is there that says so itself.
        """
        async with self._grants.lock(chunk.owner, chunk.index):
            now = read.chunk(self._rows, chunk.id)
            if now is None or now.lock or not now.refs:
                return
            verdict = self._grants.verdict(now)
            if not await self._confirmed(now.id, verdict.version, verdict.chosen):
                raise LinkError("no server confirms that it has a good copy")
            for server, story in damaged.items():
                if story.version == now.version:
                    await self._proposer.commit(DropCopy(now.id, now.version, server))
                order = m.SetAside(self._hub.term, now.id, story.version)
                try:
                    await self._hub.order(server, order)
                except (ReplyError, LinkError) as e:
                    self._stuck[now.id, server] = time.monotonic() + ASIDE_AGAIN_S
                    log.warning("damaged copy stays where it is", chunk=f"{now.id:016X}",
                                server=server.hex(), reason=str(e))  # fmt: skip
        self.examine([chunk.id], delay_s=0.0)

    async def _confirmed(self, chunk: int, version: int, servers: Iterable[bytes]) -> list[bytes]:
        """Those that have looked just now: theirs are good copies of this chunk and version."""
        ask = m.Confirm(self._hub.term, chunk, version)
        return await self._hub.order_all({server: ask for server in servers})

    async def _destroy_surplus(self, chunk: ChunkRow) -> None:
        async with self._grants.lock(chunk.owner, chunk.index):
            now = read.chunk(self._rows, chunk.id)
            if now is None or now.lock or not now.refs:
                return
            verdict = self._grants.verdict(now)
            if verdict.settle or verdict.wanted:
                return
            going = self._to_give_up(now.id, verdict)
            stay = [server for server in verdict.chosen if server != going]
            sure = await self._confirmed(now.id, now.version, stay)
            if len(sure) < len(stay):
                self.examine([now.id], delay_s=5.0)
                return
            for server, version in verdict.stale:
                if self._may_go(now, server, version):
                    await self._destroy(now.id, version, server, "stale")
            if going is not None:
                await self._give_up(now, going, sure)
        if verdict.surplus > 1:
            self.examine([chunk.id], delay_s=0.0)

    def _to_give_up(self, chunk: int, verdict: Verdict) -> bytes | None:
        """Whose copy goes if there are too many: one on a disk that is to be pulled, or else that
        of the fullest server.
        """
        if not verdict.surplus:
            return None
        leaving = self._hub.leaving_of(chunk, verdict.chosen)
        return min(leaving or verdict.chosen, key=lambda s: self._hub.servers[s].free)

    async def _give_up(self, chunk: ChunkRow, server: bytes, sure: Iterable[bytes]) -> None:
        """Destroy a surplus copy. `sure`: the other servers, which have just confirmed theirs; who
        has died a moment ago still counts as connected. LinkError, and all stay, if the goal is not
        met by what would be left.
        """
        now = read.chunk(self._rows, chunk.id)  # its goal may have risen
        if now is None:
            return
        # Whatever befell their copies was reported before they answered.
        left = set(sure) & set(self._grants.verdict(now).chosen)
        if len(left) < now.goal:
            raise LinkError("servers that hold the other copies do not answer")
        await self._proposer.commit(DropCopy(now.id, now.version, server))
        await self._destroy(now.id, now.version, server, "surplus")
        self._grants.prove_less(now.id, server)

    def _may_go(self, chunk: ChunkRow, server: bytes, version: int) -> bool:
        """Whether a stale copy may be destroyed; one that a restore made stale is kept as long as
        an orphan is.
        """
        if version >= chunk.version:
            return False
        if not spared(chunk.version, chunk.restored, chunk.settled, version):
            return True
        return self._kept_long_enough(chunk.id, server, version)

    def _kept_long_enough(self, chunk: int, server: bytes, version: int) -> bool:
        """For copies that hold what a restore has forgotten; tells the operator of each once."""
        now = time.monotonic()
        if (chunk, server) not in self._orphans:
            self._orphans[chunk, server] = now
            log.warning(
                "copy newer than the restored metadata is kept", chunk=f"{chunk:016X}",
                version=version, server=server.hex(), seconds=self._config.orphan_delay_s,
            )  # fmt: skip
        return now >= self._orphans[chunk, server] + self._config.orphan_delay_s

    async def _destroy(self, chunk: int, version: int, server: bytes, reason: str) -> None:
        await self._hub.order(server, m.Destroy(self._hub.term, chunk, version))
        log.info("copy destroyed", chunk=f"{chunk:016X}", version=version, server=server.hex(),
                 reason=reason)  # fmt: skip
        self._hub.stories.note(chunk, "destroyed", server, version, reason)

    async def _destroy_orphans(self, chunk_id: int, now: float) -> None:
        for server, version in self._hub.holders(chunk_id, fenced=True).items():
            since = self._orphans.setdefault((chunk_id, server), now)
            wait = since + self._config.orphan_delay_s - now
            if wait > 0:
                self._due[chunk_id] = now + wait
                continue
            result = await self._proposer.propose(0, 0, DropCopy(chunk_id, version, server))
            if result.status and read.chunk(self._rows, chunk_id) is None:
                # The committed state has no such chunk: that is what condemns the copy.
                await self._destroy(chunk_id, version, server, "orphan")
                self._orphans.pop((chunk_id, server), None)

    async def _destroy_doomed(self) -> None:
        after = 0
        while doomed := read.doomed(self._rows, after, DOOMED_SLICE):
            after = doomed[-1]
            orders: dict[bytes, list[int]] = {}
            for chunk in doomed:
                row = read.chunk(self._rows, chunk)
                for server, version in self._hub.holders(chunk, fenced=True).items():
                    # A restore may have brought back a time before it was written.
                    unsure = row is not None and unsettled(row.version, row.restored)
                    if not unsure or self._kept_long_enough(chunk, server, version):
                        orders.setdefault(server, []).append(chunk)
            await asyncio.gather(*(self._destroy_all(s, c) for s, c in orders.items()))
            gone = [c for c in doomed if not self._hub.holders(c, fenced=False)]
            await asyncio.gather(*(self._proposer.propose(0, 0, ForgetChunk(c)) for c in gone))
            for chunk in gone:
                self._grants.forget(chunk)
                self._hub.stories.forget(chunk)
                self._set_counts(chunk, None)

    async def _destroy_all(self, server: bytes, chunks: list[int]) -> None:
        done = await asyncio.gather(
            *(self._hub.order(server, m.Destroy(self._hub.term, c, 0)) for c in chunks),
            return_exceptions=True,
        )
        failed = [d for d in done if d is not None]
        if failed:
            log.warning("copies not destroyed", server=server.hex(), number=len(failed),
                        reason=str(failed[0]))  # fmt: skip
        log.info("copies destroyed", server=server.hex(), number=len(done) - len(failed),
                 reason="no file owns them")  # fmt: skip
