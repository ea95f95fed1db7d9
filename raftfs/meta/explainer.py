"""Answers what people ask about chunks (`wire/inquiries.py`). On the leader, after a read barrier.

Every answer is of one moment and small; who wants all asks page by page, and the leader goes on
with its work in between.
"""

import errno
from collections.abc import Callable, Iterable
from typing import Any

from msgspec.structs import replace

from raftfs.errors import ReplyError
from raftfs.meta.chunkhub import ChunkHub, ChunkServer
from raftfs.meta.grants import Grants
from raftfs.meta.healer import Healer
from raftfs.meta.plan.healing import Verdict, good
from raftfs.meta.state import read, rowcheck
from raftfs.meta.state.model import ChunkRow, Rows
from raftfs.wire import inquiries as q

CHUNKS_PAGE = 200
ROWS_PAGE = 1_000
NAMES_PAGE = 5_000
ORPHANS_PAGE = 1_000
LISTED_MAX = 10_000  # of missing chunks and of orphans, so that a page is found without a search
PLACES_MAX = 1_000
NAMES_ASKED_MAX = 20_000


class Explainer:
    """Reads the state, the copies, the stories and the healer's intentions; changes nothing."""

    def __init__(self, rows: Rows, hub: ChunkHub, grants: Grants, healer: Healer) -> None:
        self._rows = rows
        self._hub = hub
        self._grants = grants
        self._healer = healer

    def questions(self) -> dict[type, Callable[[Any], Any]]:
        """What is answered here, and how."""
        return {
            q.WhereNodes: self._where_nodes,
            q.FindNames: self._find_names,
            q.ExplainChunk: lambda ask: self.explain(ask.chunk),
            q.ListMissing: lambda ask: self.missing(ask.after),
            q.CheckChunks: lambda ask: self.check_chunks(ask.after),
            q.CheckRows: self._check_rows,
            q.ListOrphans: lambda ask: self.orphans((ask.chunk, ask.server)),
        }

    def _where_nodes(self, ask: q.WhereNodes) -> list[q.NodePlace]:
        if len(ask.inodes) > PLACES_MAX:
            raise ReplyError(errno.E2BIG)
        return read.places(self._rows, ask.inodes)

    def _find_names(self, ask: q.FindNames) -> q.NamesPage:
        if len(ask.inodes) > NAMES_ASKED_MAX:
            raise ReplyError(errno.E2BIG)
        return read.find_names(self._rows, ask, NAMES_PAGE)

    def _check_rows(self, ask: q.CheckRows) -> q.RowsPage:
        if ask.table not in rowcheck.CHECKED:
            raise ReplyError(errno.EINVAL)
        return rowcheck.check_some(self._rows, ask.table, ask.after, ROWS_PAGE)

    # --- one chunk

    def explain(self, number: int) -> q.ChunkStory:
        """All about a chunk. ENOENT: there is nothing about it."""
        row = read.chunk(self._rows, number)
        copies = self._copies(number, row)
        if row is None and not copies:
            raise ReplyError(errno.ENOENT)
        incidents = [
            q.Incident(i.at, i.what, self._hub.address_of(i.server), i.version, i.detail)
            for i in self._hub.stories.incidents(number)
        ]
        failed = [i for i in incidents if i.what in ("repair failed", "order failed")]
        plan = self._plan(number, row)
        if failed:
            said = f"{failed[-1].address}: " if failed[-1].address else ""
            plan = replace(plan, error=said + failed[-1].detail, error_at=failed[-1].at)
        c = row or ChunkRow(number, 0, 0, 0, 0, 0, 0, 0, False, 0, 0)
        writer = read.session(self._rows, c.lock_session) if c.lock else None
        return q.ChunkStory(
            number, row is not None, c.version, c.reserved, c.goal, c.refs, c.born, c.owner,
            c.index, c.restored, c.lock, c.lock_session, c.lock_time,
            writer.info if writer else "", copies, incidents, plan,
            watching=self._hub.stories.since, leading=self._healer.leading_since_ns,
        )  # fmt: skip

    def _plan(self, number: int, row: ChunkRow | None) -> q.Plan:
        if row is None:
            kept = [self._healer.kept_s(number, s) for s in self._hub.where.get(number, ())]
            return q.Plan("orphan", wait_s=min(kept, default=-1.0))
        if row.refs == 0:
            return q.Plan("doomed")
        verdict, next_step = self._grants.verdict(row), self._healer.outlook(row)
        return q.Plan(
            next_step.step, verdict.wanted, verdict.surplus, next_step.delay, next_step.delay_s,
            next_step.wait_s,
        )  # fmt: skip

    def _copies(self, number: int, row: ChunkRow | None) -> list[q.CopyStory]:
        """Those that are connected, those of servers that are away, those that went."""
        found = self._present(number, row)
        known = {copy.server for copy in found}
        for server in self._hub.servers.values():
            version = server.away.get(number)
            if version is not None and server.uuid not in known:
                known.add(server.uuid)
                copy = self._copy(server, version, "away")
                found.append(replace(copy, since=server.away_since))
            version = server.absent.get(number)
            if version is not None and server.uuid not in known:
                known.add(server.uuid)
                copy = self._copy(server, version, "left")
                found.append(replace(copy, since=server.absent_since, why="absent"))
        for uuid, left in self._hub.stories.left(number).items():
            if uuid not in known and uuid in self._hub.servers:
                copy = self._copy(self._hub.servers[uuid], left.version, "left")
                found.append(replace(copy, since=left.at, why=left.why))
        return sorted(found, key=lambda c: (c.state in ("away", "left"), c.address))

    def _present(self, number: int, row: ChunkRow | None) -> list[q.CopyStory]:
        if row is None:
            copies = self._hub.copies_of(number, fenced=False)
            return [
                replace(
                    self._copy(self._hub.servers[uuid], version, "orphan"),
                    kept_s=self._healer.kept_s(number, uuid),
                )
                for uuid, version in copies.items()
            ]
        copies = self._grants.copies(row, fenced=False)
        doubtful = self._hub.doubtful(number, copies)
        counted = good(row.version, row.reserved, copies, row.restored, doubtful)
        present = [
            self._copy(self._hub.servers[uuid], version, _state(row, uuid, version, counted,
                                                               doubtful))
            for uuid, version in copies.items()
        ]  # fmt: skip
        damaged = self._hub.damaged_of(number)
        return present + [
            self._copy(self._hub.servers[uuid], story.version, "damaged")
            for uuid, story in damaged.items()
        ]

    def _copy(self, server: ChunkServer, version: int, state: str) -> q.CopyStory:
        return q.CopyStory(
            server.uuid, self._hub.address_of(server.uuid), version, state, server.connected,
            self._hub.is_fenced(server),
        )  # fmt: skip

    # --- all chunks, page by page

    def missing(self, after: int) -> q.MissingPage:
        """Chunks without a good copy, as far as the healer has found out."""
        listed, total = self._healer.missing_chunks(LISTED_MAX)
        page = [number for number in listed if number > after][:CHUNKS_PAGE]
        rows = [read.chunk(self._rows, number) for number in page]
        problems = [self._problem(row, "missing", 0) for row in rows if row is not None]
        return q.MissingPage(problems, total, self._healer.swept, self._hub.stories.since)

    def check_chunks(self, after: int) -> q.CheckedPage:
        """The next chunks of the state: each has as many good copies as its goal, or is listed."""
        rows = read.chunks(self._rows, after, CHUNKS_PAGE)
        last = rows[-1].id if len(rows) == CHUNKS_PAGE else 0
        doomed = sum(1 for row in rows if not row.refs)
        writing = sum(1 for row in rows if row.refs and row.lock and row.lock_session)
        problems = []
        for row in rows:
            verdict = self._grants.verdict(row)
            what = _what_is_wrong(row, verdict)
            if what:
                problems.append(self._problem(row, what, len(verdict.chosen)))
        return q.CheckedPage(len(rows), last, doomed, writing, problems)

    def _problem(self, row: ChunkRow, what: str, number_good: int) -> q.ChunkProblem:
        return q.ChunkProblem(
            row.id, row.owner, row.index, row.version, row.goal, number_good, what,
            self._copies(row.id, row),
        )  # fmt: skip

    def orphans(self, after: tuple[int, bytes]) -> q.OrphansPage:
        """Copies that the state does not know, or that know more than it: they are kept for now."""
        kept, total = self._healer.kept_copies(LISTED_MAX)
        page = [key for key in kept if key > after][:ORPHANS_PAGE]
        return q.OrphansPage(list(self._orphan_copies(page)), total, self._healer.swept)

    def _orphan_copies(
        self, keys: Iterable[tuple[int, bytes]]
    ) -> Iterable[tuple[int, q.CopyStory]]:
        for chunk, uuid in keys:
            server = self._hub.servers.get(uuid)
            if server is not None:
                version = self._hub.where.get(chunk, {}).get(uuid, 0)
                copy = self._copy(server, version, "orphan" if version else "away")
                yield chunk, replace(copy, kept_s=self._healer.kept_s(chunk, uuid))


def _state(
    row: ChunkRow, uuid: bytes, version: int, counted: dict[bytes, int], doubtful: set[bytes]
) -> str:
    if uuid in doubtful:
        return "doubtful"
    if uuid in counted:
        return "good"
    return "ahead" if version > max(row.version, row.reserved) else "stale"


def _what_is_wrong(row: ChunkRow, verdict: Verdict) -> str:
    if not row.refs or not row.born:
        return ""
    if not verdict.chosen:
        return "missing"
    if row.lock and row.lock_session:
        return ""  # its writer sees to it
    if verdict.wanted:
        return "undergoal"
    if verdict.settle:
        return "unsettled"
    return "stale" if verdict.stale else ""
