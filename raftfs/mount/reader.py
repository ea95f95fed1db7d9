"""Reads one file: where its chunks are, read-ahead, and other copies when one fails.

Sequential readers are served from segments of 1 MiB that are fetched ahead, twice as far each time
up to `AHEAD_MAX`; the kernel keeps what it was given, so a segment is dropped once passed. Random
readers get exactly what they ask for. A copy that does not answer, or whose bytes do not match
their checksums, is passed over; only when every copy fails until the timeout (or all say that the
bytes are damaged) the reader gets EIO.
"""

import asyncio
import time
from collections.abc import Callable
from errno import EIO
from typing import Any, NamedTuple

import structlog

from raftfs.const import CHUNK_SIZE, MIB
from raftfs.errors import LinkError, RaftfsError, ReplyError, Status
from raftfs.mount.cache import Budget, Recent
from raftfs.mount.datalink import DataLinks
from raftfs.wire import messages as m

log = structlog.get_logger("raftfs.reader")

SEGMENT = MIB
AHEAD_MAX = 8 * MIB
AHEAD_FIRST = 1 * MIB
SEGMENT_AGE_S = 2.0  # read-ahead that nobody fetched in time is read anew: it may have changed
MAPS_PER_FILE = 1024  # 64 GiB of one file
FAST_TIMEOUT_S = 1.5  # another copy is tried after that
LAST_TIMEOUT_S = 15.0  # for the last one: slow is better than not at all
_PAUSES_S = (0.02, 0.05, 0.1, 0.2)
_TICKET = (Status.NO_TICKET, Status.TICKET_EXPIRED)


class ReadError(RaftfsError):
    """No copy could give the bytes."""

    errno = EIO


class ReadContext:
    """What all readers of a mount share. `budget` bounds the read-ahead of all files together."""

    def __init__(self, meta: Any, links: DataLinks, budget: Budget, timeout_s: float) -> None:
        self.meta = meta
        self.links = links
        self.budget = budget
        self.timeout_s = timeout_s
        self._ident = 0

    def next_ident(self) -> int:
        """A number for a request."""
        self._ident += 1
        return self._ident


class _Known(NamedTuple):
    """Where a chunk is, and when that was asked for."""

    map: m.ChunkMap
    asked_at: float


class _Segment:
    """A piece of the file that is being fetched ahead or was."""

    __slots__ = ("budget", "length", "made_at", "size", "task")

    def __init__(self, task: "asyncio.Task[Any]", size: int, budget: Budget) -> None:
        self.task = task
        self.size = size
        self.budget = budget
        self.length = size
        self.made_at = time.monotonic()

    def usable(self, length: int) -> bool:
        """Young enough, and fetched when the file already had these `length` bytes of it."""
        return self.length >= length and time.monotonic() - self.made_at <= SEGMENT_AGE_S

    def drop(self) -> None:
        """Give its memory back; whoever still waits for it gets it all the same."""
        self.budget.give(self.size)
        self.size = 0


class FileReader:
    """Reads one file. `length` is passed with each read: the caller knows the file's end."""

    def __init__(
        self,
        inode: int,
        context: ReadContext,
        granted: Callable[[int], m.ChunkMap | None] = lambda index: None,
    ) -> None:
        """`granted(index)`: the chunk's map if this mount holds its write grant."""
        self.inode = inode
        self._granted = granted
        self.context = context
        self._maps: Recent[int, _Known] = Recent(MAPS_PER_FILE)
        self._renewing: dict[int, asyncio.Task[Any]] = {}
        self._segments: dict[int, _Segment] = {}
        self._expected = 0  # where a sequential reader would go on
        self._ahead = 0

    async def read(
        self, offset: int, size: int, length: int, *, settled: bool = True
    ) -> bytes | bytearray | memoryview:
        """`size` bytes at `offset`, fewer only at the end of the file. ReadError.

        Not `settled`: this mount has written bytes that are not committed, so nothing beyond what
        is asked for may be read (and kept): it may change at any moment.
        """
        end = min(offset + size, length)
        if end <= offset:
            return b""
        sequential = settled and abs(offset - self._expected) <= 2 * SEGMENT
        self._note(offset, end)
        parts: list[Any] = []
        at = offset
        while at < end:
            start = at - at % SEGMENT
            segment = self._segment(start, length) if sequential else self._segments.get(start)
            stop = min(end, start + SEGMENT)
            if segment is None or not segment.usable(stop - start):
                self._forget(start)
                parts.append(self._fetch(at, stop - at))
            else:
                parts.append(self._from_segment(segment, start, at, stop))
            at = stop
        if sequential:
            self._read_ahead(end, length)
        done = [await part for part in parts] if len(parts) == 1 else await asyncio.gather(*parts)
        self._pass(offset)
        return done[0] if len(done) == 1 else b"".join(done)

    def forget_data(self) -> None:
        """The bytes change: drop what was read ahead."""
        for start in list(self._segments):
            self._forget(start)

    def forget_all(self) -> None:
        """The file has changed: drop the map of its chunks as well."""
        self.forget_data()
        self._maps.clear()

    def forget_map(self, index: int) -> None:
        """Ask again where chunk `index` is."""
        self._maps.drop(index)

    # --- read-ahead

    def _note(self, offset: int, end: int) -> None:
        if abs(offset - self._expected) <= 2 * SEGMENT:
            self._expected = max(self._expected, end)
        else:
            self._expected = end
            self._ahead = 0
            self.forget_data()

    def _read_ahead(self, end: int, length: int) -> None:
        at = end - end % SEGMENT
        limit = min(length, end + self._ahead)
        while at < limit:
            if self._segment(at, length) is None:
                break  # no memory to spare
            at += SEGMENT
        self._ahead = min(AHEAD_MAX, max(AHEAD_FIRST, 2 * self._ahead))

    def _segment(self, start: int, length: int) -> _Segment | None:
        segment = self._segments.get(start)
        if segment is None:
            size = min(SEGMENT, length - start)
            if not self.context.budget.try_take(size):
                return None
            task = asyncio.get_running_loop().create_task(self._fetch(start, size))
            task.add_done_callback(_no_lost_exception)
            segment = self._segments[start] = _Segment(task, size, self.context.budget)
        return segment

    async def _from_segment(self, segment: _Segment, start: int, at: int, stop: int) -> Any:
        try:
            data = await asyncio.shield(segment.task)
        except RaftfsError:
            self.forget_data()  # whoever asks again tries again
            if segment.length == stop - at:
                raise
            return await self._fetch(at, stop - at)  # what is damaged may lie beside it
        return memoryview(data)[at - start : stop - start]

    def _pass(self, offset: int) -> None:
        """Drop segments that lie well behind the reader: the kernel has them."""
        for start in [s for s in self._segments if s + 2 * SEGMENT <= offset]:
            self._forget(start)

    def _forget(self, start: int) -> None:
        segment = self._segments.pop(start, None)
        if segment is not None:
            segment.drop()

    # --- chunks

    async def _fetch(self, offset: int, size: int) -> Any:
        """Exactly `size` bytes, which do not cross a segment's border."""
        index, within = divmod(offset, CHUNK_SIZE)
        deadline = time.monotonic() + self.context.timeout_s
        turn = 0
        while True:
            chunk = await self._map(index, deadline)
            if not chunk.chunk:
                return bytes(size)
            data, why = await self._from_copies(chunk, within, size, deadline)
            if data is not None:
                return data
            self._maps.drop(index)
            damaged = bool(why) and all(reason == "BAD_CRC" for reason in why.values())
            if damaged or time.monotonic() > deadline:
                log.error("cannot read", inode=self.inode, chunk=f"{chunk.chunk:016X}",
                          offset=within, copies=why or "none connected")  # fmt: skip
                raise ReadError(f"chunk {chunk.chunk:016X} cannot be read")
            await asyncio.sleep(_PAUSES_S[min(turn, len(_PAUSES_S) - 1)])
            turn += 1

    async def _map(self, index: int, deadline: float) -> m.ChunkMap:
        known = self._known(index)
        if known is None:
            asked_at = time.monotonic()
            known = await self._ask(index, max(0.1, deadline - asked_at))
            if known.copies or not known.chunk:
                self._maps.set(index, _Known(known, asked_at))
        return known

    def _known(self, index: int) -> m.ChunkMap | None:
        """The map, if its ticket is good. It is renewed when half as old as it may get: readers
        wait for it only if it could not be had in all the time that is left then.
        """
        granted = self._granted(index)
        known = None if granted else self._maps.get(index)
        if known is None:
            return granted
        age_s, life_s = time.monotonic() - known.asked_at, known.map.ticket_s
        if life_s and age_s > life_s:
            return None
        if life_s and age_s > life_s / 2 and index not in self._renewing:
            task = asyncio.get_running_loop().create_task(self._renew(index, known))
            self._renewing[index] = task
            task.add_done_callback(_no_lost_exception)
        return known.map

    async def _renew(self, index: int, known: _Known) -> None:
        asked_at = time.monotonic()
        try:
            found = await self._ask(index, self.context.timeout_s)
        finally:
            del self._renewing[index]
        if found.copies and self._maps.get(index) is known:  # else it was forgotten meanwhile
            self._maps.set(index, _Known(found, asked_at))

    async def _ask(self, index: int, timeout_s: float) -> m.ChunkMap:
        try:
            found: m.ChunkMap = await self.context.meta.call(
                m.ReadChunk(self.inode, index), timeout_s
            )
        except ReplyError as e:
            if e.status != Status.NO_COPIES:
                raise
            return m.ChunkMap(-1, 0, 0, [])  # exists, nobody has it now
        return found

    async def _from_copies(
        self, chunk: m.ChunkMap, offset: int, size: int, deadline: float
    ) -> tuple[memoryview | None, dict[str, str]]:
        """The bytes from the first copy that has them, or why each one did not give them."""
        why: dict[str, str] = {}
        copies = self.context.links.preference(chunk.copies)
        for number, copy in enumerate(copies):
            address = (copy.host, copy.port)
            ident = m.CopyId(chunk.chunk, copy.version)
            last = number == len(copies) - 1
            left_s = max(0.2, deadline - time.monotonic())
            timeout_s = min(LAST_TIMEOUT_S if last else FAST_TIMEOUT_S, left_s)
            try:
                data = await self.context.links.fetch(
                    address, ident, offset, size, timeout_s, chunk.ticket
                )
                return data, why
            except ReplyError as e:
                why[f"{copy.host}:{copy.port}"] = str(e)
                if e.status in _TICKET:  # a new map has a new one, for all copies
                    log.info("ticket refused", chunk=f"{chunk.chunk:016X}", reason=str(e),
                             server=f"{copy.host}:{copy.port}")  # fmt: skip
                    return None, why
            except LinkError as e:
                self.context.links.suspect(address)
                why[f"{copy.host}:{copy.port}"] = str(e)
            log.warning("copy not readable", chunk=f"{chunk.chunk:016X}", version=copy.version,
                        server=f"{copy.host}:{copy.port}",
                        reason=why[f"{copy.host}:{copy.port}"])  # fmt: skip
        return None, why


def _no_lost_exception(task: "asyncio.Task[Any]") -> None:
    """Read-ahead that fails is nobody's error until somebody reads there."""
    if not task.cancelled():
        task.exception()
