"""What this master knows of the chunkservers: links, space, and where every copy is.

Soft state, built from the chunkservers' own reports, which every chunkserver streams to every
master; so a new leader knows the copies at once. Only the leader gives orders, each under its term.
A server counts for decisions of a leader only once it has acknowledged the leader's term (it is
*fenced*): from then on it obeys no older leader, and all that older leaders made it do is reported.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import structlog

from raftfs.const import CHUNK_SIZE, DISK_LEAVE_FREE, HEARTBEAT_S
from raftfs.errors import LinkError, RaftfsError, ReplyError
from raftfs.meta.plan.placement import Candidate
from raftfs.meta.stories import Stories
from raftfs.meta.tickets import Tickets
from raftfs.wire import messages as m
from raftfs.wire.rpc import Link, decode

log = structlog.get_logger("raftfs.chunkhub")

T = TypeVar("T")
ORDER_TIMEOUT_S = 1.5  # a stopped chunkserver delays a writer by no more than this
REPLICATE_TIMEOUT_S = 30.0  # 64 MiB over a slow network
FENCE_RETRY_S = 0.2
SILENCE_S = 4 * HEARTBEAT_S
SUSPECT_S = 10.0
SERVERS_MAX = 1_000
NOTED_MAX = 1_000  # of one report, copies that went whose stories are told one by one
ABSENT_MAX = 200_000  # of a server, copies that went all together and are remembered


class ChunkServer:
    """One chunkserver as this master sees it. `copies`: chunk -> version of the good ones.

    `damaged`: those that do not count but are still in their places.
    """

    def __init__(self, hello: m.ServerHello, link: Link) -> None:
        self.uuid = hello.server
        self.host, self.port = hello.host, hello.port
        self.link = link
        self.clocks = hello.clocks
        self.ready = False
        self.fenced_term = 0
        self.total = self.used = 0
        self.room = -1
        self.suspect_until = 0.0
        self.copies: dict[int, int] = {}
        self.doubtful: set[int] = set()  # of these chunks it may have lost acknowledged writes
        self.ready_at = 0.0
        self.damaged: dict[int, m.Damage] = {}
        self.leaving: set[int] = set()  # chunks whose copies are on disks that are to be pulled
        self.disks: tuple[m.DiskStatus, ...] = ()
        self.away: dict[int, int] = {}  # what it had when its link was lost, until it is back
        self.away_since = 0  # ns since the epoch
        # Copies that it had and then, many at once, had no longer: a disk was lost, perhaps.
        self.absent: dict[int, int] = {}
        self.absent_since = 0

    @property
    def connected(self) -> bool:
        """The link is up and the full report has arrived."""
        return self.ready and not self.link.closed.done()

    @property
    def free(self) -> int:
        """Bytes that are not used."""
        return max(0, self.total - self.used)

    @property
    def for_new(self) -> int:
        """Bytes that new chunks may take, as the server says."""
        return self.room if self.room >= 0 else max(0, self.free - DISK_LEAVE_FREE)

    def status(self) -> m.ServerStatus:
        """For status messages."""
        return m.ServerStatus(
            self.uuid, self.host, self.port, self.total, self.used, len(self.copies),
            self.connected, self.disks,
        )  # fmt: skip


class ChunkHub:
    """The chunkservers' registry. `on_change(chunks)` hears of chunks whose copies changed."""

    def __init__(
        self,
        cluster: Callable[[], bytes],
        term: Callable[[], int],
        on_change: Callable[[Iterable[int]], None],
        masters: Callable[[], list[str]] = list,
        stories: Stories | None = None,
        *,
        tickets: Tickets,
    ) -> None:
        """`masters()`: where all masters listen for chunkservers, as host:port."""
        self.stories = stories or Stories()
        self._cluster = cluster
        self._term = term
        self._on_change = on_change
        self._masters = masters
        self.tickets = tickets
        self._leading = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.servers: dict[bytes, ChunkServer] = {}
        self.where: dict[int, dict[bytes, int]] = {}
        self.damaged: dict[int, set[bytes]] = {}  # chunk -> servers with a damaged copy

    @property
    def term(self) -> int:
        """The term under which orders are given."""
        return self._term()

    # --- links

    def handle(self, link: Link, event: m.ChunkEvent) -> Any:
        """One event of a chunkserver (an RPC handler)."""
        if isinstance(event, m.ServerHello):
            return self._hello(link, event)
        server: ChunkServer | None = link.context
        if server is None:
            raise RaftfsError("the first message of a chunkserver must be its hello")
        if self.servers.get(server.uuid) is not server:
            raise RaftfsError("a newer connection of this chunkserver took over")
        if isinstance(event, m.Copies):
            self._made(server, event.copies)
            self._note_damaged(server, event.damaged)
            server.leaving.update(event.leaving)
        elif isinstance(event, m.Ready):
            self._ready(server)
        elif isinstance(event, m.Changed):
            self._changed(server, event)
        elif isinstance(event, m.Space):
            server.total, server.used, server.room = event.total, event.used, event.room
            server.disks = event.disks
            self._tell_time(server)
            return self._masters()
        return None

    def _hello(self, link: Link, hello: m.ServerHello) -> bytes:
        cluster = self._cluster()
        if not cluster:
            raise RaftfsError("this master belongs to no cluster yet")
        if hello.cluster and hello.cluster != cluster:
            raise RaftfsError(
                f"the disks belong to cluster {hello.cluster.hex()}, this is {cluster.hex()}"
            )
        if hello.protocol != m.PROTOCOL:
            raise RaftfsError(f"protocol {hello.protocol} is not spoken here ({m.PROTOCOL} is)")
        old = self.servers.get(hello.server)
        if old is None and len(self.servers) >= SERVERS_MAX:
            raise RaftfsError(f"there are {SERVERS_MAX} chunkservers already")
        server = ChunkServer(hello, link)
        if old is not None:
            self._forget_copies(old)
            old.link.close()
            server.away, server.away_since = old.away, old.away_since
            server.absent, server.absent_since = old.absent, old.absent_since
        link.context = self.servers[hello.server] = server
        self._tell_time(server)  # before any client can be sent there
        log.info("chunkserver connected", server=hello.server.hex(), address=_address(hello))
        return cluster

    def _tell_time(self, server: ChunkServer) -> None:
        if server.clocks:
            server.link.notify(self.tickets.clock())

    def _ready(self, server: ChunkServer) -> None:
        server.ready = True
        server.ready_at = time.monotonic()
        self._lack(server, {c: v for c, v in server.away.items() if c not in server.copies})
        server.away = {}
        log.info("chunkserver ready", server=server.uuid.hex(), copies=len(server.copies),
                 doubtful=len(server.doubtful))  # fmt: skip
        if self._leading:
            self._start(self._fence(server))

    def closed(self, link: Link) -> None:
        """The link is gone; so, for all that this master knows, are the copies behind it."""
        server: ChunkServer | None = link.context
        if server is None or self.servers.get(server.uuid) is not server:
            return
        log.warning("chunkserver lost", server=server.uuid.hex(), address=_address(server))
        server.ready = False
        self._forget_copies(server)

    def _forget_copies(self, server: ChunkServer) -> None:
        copies, server.copies = server.copies, {}
        if copies:
            server.away, server.away_since = {**server.away, **copies}, self.stories.now_ns()
        server.doubtful.clear()
        server.leaving.clear()
        for chunk in copies:
            self._gone(server.uuid, chunk)
        for chunk in list(server.damaged):
            self._mended(server, chunk)
        self._on_change(copies)

    # --- copies

    def _lack(self, server: ChunkServer, copies: dict[int, int]) -> None:
        """The server no longer has any of these: kept for who asks why a chunk is missing."""
        if copies:
            absent = {**server.absent, **copies}
            excess = max(0, len(absent) - ABSENT_MAX)
            server.absent = dict(itertools.islice(absent.items(), excess, None))
            server.absent_since = self.stories.now_ns()

    def _made(self, server: ChunkServer, copies: Iterable[m.CopyId]) -> None:
        for copy in copies:
            self._mended(server, copy.chunk)
            server.copies[copy.chunk] = copy.version
            (server.doubtful.add if copy.doubtful else server.doubtful.discard)(copy.chunk)
            self.where.setdefault(copy.chunk, {})[server.uuid] = copy.version
            server.absent.pop(copy.chunk, None)
            self.stories.came(copy.chunk, server.uuid)

    def _gone(self, uuid: bytes, chunk: int) -> None:
        holders = self.where.get(chunk)
        if holders is not None:
            holders.pop(uuid, None)
            if not holders:
                del self.where[chunk]

    def _changed(self, server: ChunkServer, event: m.Changed) -> None:
        replaced = {copy.chunk for copy in event.made}
        for copy in (*event.gone, *event.damaged):
            if server.copies.get(copy.chunk) == copy.version:
                del server.copies[copy.chunk]
                server.doubtful.discard(copy.chunk)
                self._gone(server.uuid, copy.chunk)
            self._mended(server, copy.chunk)
        gone = [copy for copy in event.gone if copy.chunk not in replaced]
        if len(gone) > NOTED_MAX:
            self._lack(server, {copy.chunk: copy.version for copy in gone[NOTED_MAX:]})
        for copy in gone[:NOTED_MAX]:
            self.stories.note(copy.chunk, "gone", server.uuid, copy.version)
        for story in event.stories:
            self.stories.note(story.chunk, "damaged", server.uuid, story.version, story.text)
            log.warning(
                "copy damaged", chunk=f"{story.chunk:016X}", version=story.version,
                server=server.uuid.hex(), address=_address(server), disk=story.disk,
                part=story.part, block=story.block, expected=story.expected, found=story.found,
                found_by=story.found_by, reason=story.text,
            )  # fmt: skip
        self._note_damaged(server, event.stories)
        self._made(server, event.made)
        server.leaving.update(event.leaving)
        server.leaving.difference_update(event.staying)
        changed = {c.chunk for c in (*event.made, *event.gone, *event.damaged)}
        server.leaving -= {chunk for chunk in changed if chunk not in server.copies}
        self._on_change({*changed, *event.leaving, *event.staying})

    def _note_damaged(self, server: ChunkServer, stories: Iterable[m.Damage]) -> None:
        for story in stories:
            if story.part in ("name", "file"):
                continue  # nothing of that chunk is there
            server.damaged[story.chunk] = story
            self.damaged.setdefault(story.chunk, set()).add(server.uuid)

    def _mended(self, server: ChunkServer, chunk: int) -> None:
        """Its damaged copy of the chunk is no longer there."""
        if server.damaged.pop(chunk, None) is not None:
            self.damaged[chunk].discard(server.uuid)
            if not self.damaged[chunk]:
                del self.damaged[chunk]

    def leaving_of(self, chunk: int, servers: Iterable[bytes]) -> set[bytes]:
        """Those of the servers whose copy of the chunk is on a disk that is to be pulled."""
        return {uuid for uuid in servers if chunk in self.servers[uuid].leaving}

    def damaged_of(self, chunk: int) -> dict[bytes, m.Damage]:
        """Server -> story of the damaged copies that are still in their places."""
        servers = (self.servers[uuid] for uuid in self.damaged.get(chunk, ()))
        return {s.uuid: s.damaged[chunk] for s in servers if s.connected}

    def holders(self, chunk: int, *, fenced: bool) -> dict[bytes, int]:
        """As `copies_of`, with the damaged ones: for those who want all of them to go."""
        found = self.copies_of(chunk, fenced=fenced)
        for uuid, story in self.damaged_of(chunk).items():
            if not fenced or self.is_fenced(self.servers[uuid]):
                found.setdefault(uuid, story.version)
        return found

    def note_copy(self, uuid: bytes, chunk: int, version: int) -> None:
        """An order succeeded: do not wait for the report that tells the same."""
        server = self.servers.get(uuid)
        if server is not None and server.connected:
            self._made(server, [m.CopyId(chunk, version)])

    def copies_of(self, chunk: int, *, fenced: bool) -> dict[bytes, int]:
        """Server -> version of the connected copies; `fenced`: only on servers that obey our term.
        """
        usable = {}
        for uuid, version in self.where.get(chunk, {}).items():
            server = self.servers[uuid]
            if server.connected and (not fenced or self.is_fenced(server)):
                usable[uuid] = version
        return usable

    def doubtful(self, chunk: int, holders: Iterable[bytes]) -> set[bytes]:
        """Those of the servers that hold the chunk whose copy may lack acknowledged writes."""
        return {uuid for uuid in holders if chunk in self.servers[uuid].doubtful}

    # --- leading

    def lead(self) -> None:
        """This master leads now: announce the term to every server."""
        self._leading = True
        for server in list(self.servers.values()):
            if server.connected:
                self._start(self._fence(server))

    def follow(self) -> None:
        """This master leads no longer: no more orders."""
        self._leading = False

    def is_fenced(self, server: ChunkServer) -> bool:
        """The server has acknowledged the current leader's term."""
        return server.connected and server.fenced_term == self._term()

    def fenced_servers(self) -> list[ChunkServer]:
        """The servers that a leader may count on now."""
        return [s for s in self.servers.values() if self.is_fenced(s)]

    def all_connected(self) -> bool:
        """Whether every server that this master has seen is there and obeys it."""
        return all(self.is_fenced(s) for s in self.servers.values())

    def candidates(self) -> list[Candidate]:
        """Servers that may take a new copy."""
        return [
            Candidate(s.uuid, s.host, s.for_new)
            for s in self.fenced_servers()
            if s.for_new > CHUNK_SIZE and s.suspect_until < time.monotonic()
        ]

    def is_full(self) -> bool:
        """Whether all servers are there and none has room: waiting would not help."""
        servers = self.fenced_servers()
        full = all(0 <= s.room <= CHUNK_SIZE for s in servers)
        return full and bool(servers) and self.all_connected()

    def suspect(self, uuid: bytes) -> None:
        """A client's write failed there: give it no new chunks for a while."""
        if uuid in self.servers:
            self.servers[uuid].suspect_until = time.monotonic() + SUSPECT_S

    def drop_silent(self) -> None:
        """Close the links of servers that have not been heard for some heartbeats (stopped, cut).
        """
        limit = time.monotonic() - SILENCE_S
        for server in self.servers.values():
            if server.connected and server.link.last_heard < limit:
                server.link.close()

    async def _fence(self, server: ChunkServer) -> None:
        while self._leading and server.connected and not self.is_fenced(server):
            term = self._term()
            try:
                await server.link.call(m.NewTerm(term), ORDER_TIMEOUT_S)
            except RaftfsError as e:
                log.warning("chunkserver does not take the term", term=term, reason=str(e))
                await asyncio.sleep(FENCE_RETRY_S)
                continue
            server.fenced_term = term
            self._on_change([*server.copies, *server.damaged])

    async def order(self, uuid: bytes, order: m.ChunkOrder) -> None:
        """Send an order and wait until it is done. ReplyError or LinkError if it is not."""
        server = self.servers.get(uuid)
        if server is None or not self.is_fenced(server):
            raise LinkError(f"chunkserver {uuid.hex()} is not connected")
        slow = isinstance(order, m.Replicate)
        if isinstance(order, m.Replicate):
            order = self.tickets.for_replication(order)
        await server.link.call(order, REPLICATE_TIMEOUT_S if slow else ORDER_TIMEOUT_S)

    async def order_all(self, orders: dict[bytes, m.ChunkOrder]) -> list[bytes]:
        """Send orders to several servers at once; gives those that carried theirs out."""
        done = await asyncio.gather(
            *(self.order(u, o) for u, o in orders.items()), return_exceptions=True
        )
        good = []
        for (uuid, order), outcome in zip(orders.items(), done, strict=True):
            if outcome is None:
                good.append(uuid)
            elif isinstance(outcome, ReplyError | LinkError):
                log.warning("order failed", order=repr(order), server=uuid.hex(),
                            reason=str(outcome))  # fmt: skip
                self._note_failed(uuid, order, str(outcome))
            else:
                raise outcome
        return good

    def _note_failed(self, uuid: bytes, order: m.ChunkOrder, reason: str) -> None:
        if not isinstance(order, m.NewTerm | m.Tune | m.MasterClock):
            version = order.version
            detail = f"{type(order).__name__}: {reason}"
            self.stories.note(order.chunk, "order failed", uuid, version, detail)

    def address_of(self, uuid: bytes) -> str:
        """Where a server is or was, as host:port; "" for one that this master never saw."""
        server = self.servers.get(uuid)
        return _address(server) if server is not None else ""

    def location(self, uuid: bytes, version: int) -> m.Location:
        """Where a copy is, for a client."""
        server = self.servers[uuid]
        return m.Location(uuid, server.host, server.port, version)

    def space(self) -> tuple[int, int]:
        """Bytes in all and bytes free over the connected servers."""
        up = [s for s in self.servers.values() if s.connected]
        return sum(s.total for s in up), sum(s.for_new for s in up)

    async def tune(self, name: str, action: str, value: str) -> str:
        """Have one chunkserver (host:port), or all, change something. RaftfsError says why not."""
        servers = [s for s in self.fenced_servers() if name in ("", f"{s.host}:{s.port}")]
        if not servers:
            raise RaftfsError(f"no chunkserver {name or 'at all'} is connected")
        for server in servers:
            order = m.Tune(self._term(), action, value)
            try:
                await server.link.call(order, REPLICATE_TIMEOUT_S)
            except ReplyError as e:
                reason = decode(str, e.value) if e.value else str(e)
                raise RaftfsError(f"chunkserver {_address(server)}: {reason}") from None
        return f"{action} {value}: done on {', '.join(_address(s) for s in servers)}"

    def _start(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """End the hub's own tasks."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _address(server: ChunkServer | m.ServerHello) -> str:
    return f"{server.host}:{server.port}"
