"""Who gets which ticket from the masters."""

import asyncio
import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raftfs.conf import exports
from raftfs.errors import ReplyError, Status
from raftfs.meta.chunkhub import ChunkHub
from raftfs.meta.service import ClientService
from raftfs.meta.tickets import Tickets
from raftfs.wire import messages as m
from raftfs.wire import ops
from raftfs.wire.auth import ClusterKey
from raftfs.wire.frame import decode, encode
from raftfs.wire.ticket import Right, Ticket, ticket_key, unseal
from tests.unit.meta.fake_cluster import World

CLUSTER, KEY = b"c" * 16, ClusterKey(b"k" * 32)
READS = Right.LIST | Right.READ


def opened(raw: bytes) -> Ticket:
    return unseal(ticket_key(KEY, CLUSTER), raw)


class Leader:
    """A replica that leads."""

    config = SimpleNamespace(name="127.0.0.1:9418")
    leader, is_leader, term, members = "127.0.0.1:9418", True, 1, {"127.0.0.1:9418": b"i" * 16}

    def __init__(self) -> None:
        self.deposed = False

    async def read_barrier(self) -> None:
        """A majority answers, or not."""
        if self.deposed:
            raise ReplyError(Status.NOT_LEADER)


async def serving(world: World, lines: list[exports.ExportLine]) -> tuple[ClientService, Leader]:
    grants, unused, leader = await world.elect(), SimpleNamespace(), Leader()
    replica: Any = leader
    return ClientService(
        world.rows, replica, grants._proposer, grants, unused, lines, unused, unused, KEY, unused,
        world.hub.tickets,
    ), leader  # fmt: skip


class Link:
    """A client's connection."""

    peer, context = ("127.0.0.1", 1), None

    def __init__(self) -> None:
        self.closed = asyncio.get_running_loop().create_future()


async def client(service: ClientService, *, tool: bool = False) -> Any:
    link: Any = Link()
    await service.handle(link, m.Register(1, "0", 0, b"s" * 16, b"/", "", b"", tool))
    return link


def test_a_map_allows_to_read_and_a_grant_to_write_under_its_lock() -> None:
    async def story() -> None:
        world = World(1)
        service, leader = await serving(world, exports.default_lines())
        link = await client(service)
        write = m.WriteChunk(world.inode, 0, [])
        fresh = await service.handle(link, write)
        ticket = opened(fresh.ticket)
        assert (ticket.chunk, ticket.version, ticket.lock) == (
            fresh.chunk, fresh.version, fresh.lock,
        )  # fmt: skip
        assert ticket.rights == READS | Right.WRITE | Right.CREATE and fresh.fresh
        assert ticket.session == link.context.session and fresh.ticket_s == 300.0
        world.write(fresh)
        done = [ops.Written(fresh.chunk, fresh.lock, True)]
        world.apply(link.context.session, 1, ops.CommitWrite(world.inode, 1000, -1, done))
        again = await service.handle(link, write)
        assert opened(again.ticket).rights == READS | Right.WRITE and not again.fresh
        assert opened(again.ticket).lock == again.lock > fresh.lock
        found = await service.handle(link, m.ReadChunk(world.inode, 0))
        ticket = opened(found.ticket)
        assert (ticket.chunk, ticket.rights, ticket.lock) == (found.chunk, READS, 0)
        hole = await service.handle(link, m.ReadChunk(world.inode, 5))
        assert hole.chunk == 0 and hole.ticket == b""
        leader.deposed = True  # and does not know it
        with pytest.raises(ReplyError):
            await service.handle(link, m.ReadChunk(world.inode, 0))

    asyncio.run(story())


def test_a_read_only_mount_gets_no_ticket_to_write(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(1)
        path = tmp_path / "mfsexports.cfg"
        path.write_text("* / ro\n")
        service, _ = await serving(world, exports.parse_file(path))
        link = await client(service)
        assert link.context.registered.readonly
        with pytest.raises(ReplyError) as refused:
            await service.handle(link, m.WriteChunk(world.inode, 0, []))
        assert refused.value.status == errno.EROFS
        grant = await world.grants.grant(world.session, m.WriteChunk(world.inode, 0, []))
        world.write(grant)
        found = await service.handle(link, m.ReadChunk(world.inode, 0))
        assert opened(found.ticket).rights == READS

    asyncio.run(story())


def test_a_tool_which_proves_nothing_sees_checksums_at_most() -> None:
    async def story() -> None:
        world = World(1)
        service, _ = await serving(world, exports.default_lines())
        grant = await world.grants.grant(world.session, m.WriteChunk(world.inode, 0, []))
        world.write(grant)
        world.finish(grant)
        link = await client(service, tool=True)
        (chunk,) = await service.handle(link, m.FileChunks(world.inode, 0))
        assert opened(chunk.ticket).rights == Right.LIST
        assert opened(chunk.ticket).chunk == chunk.chunk == grant.chunk
        for ask in (m.ReadChunk(world.inode, 0), m.WriteChunk(world.inode, 0, [])):
            with pytest.raises(ReplyError) as refused:
                await service.handle(link, ask)
            assert refused.value.status == errno.EPERM

    asyncio.run(story())


def test_chunkservers_are_told_the_time_at_once_and_with_each_heartbeat() -> None:
    async def story() -> None:
        told: list[Any] = []
        tickets = Tickets(KEY, lambda: CLUSTER)
        hub = ChunkHub(lambda: CLUSTER, lambda: 1, lambda chunks: None, tickets=tickets)
        closed = asyncio.get_running_loop().create_future()
        for clocks in (False, True):  # an old one would not understand it
            link: Any = SimpleNamespace(context=None, closed=closed, notify=told.append,
                                        close=lambda: None)  # fmt: skip
            hub.handle(link, m.ServerHello(m.PROTOCOL, "", b"s" * 16, b"", "h", 1, clocks))
            assert len(told) == clocks
            hub.handle(link, m.Space(1, 1, 0))
            assert len(told) == 2 * clocks
        assert {t.clock for t in told} == {opened(tickets.for_list(1, 1)).clock}
        assert decode(m.ChunkOrder, encode(told[0])) == told[0]  # type: ignore[arg-type]

    asyncio.run(story())


def test_an_order_to_replicate_has_a_ticket_for_the_source() -> None:
    async def story() -> None:
        world = World(1, servers=3, goal=1)
        await world.elect()
        orders: list[Any] = []
        for server in world.servers:
            server.obey = lambda order, _: orders.append(order)  # type: ignore[method-assign]
        sources = [world.servers[0].uuid]
        await world.grants.replicate(77, 3, sources, [world.servers[1].uuid])
        (order,) = [o for o in orders if isinstance(o, m.Replicate)]
        ticket = opened(order.ticket)
        assert (ticket.chunk, ticket.rights) == (77, READS)

    asyncio.run(story())
