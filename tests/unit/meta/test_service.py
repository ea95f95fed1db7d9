"""The masters' service for clients, with a replica that says what the test wants."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from raftfs.conf import exports
from raftfs.errors import ReplyError, Status
from raftfs.meta.service import ClientService
from raftfs.meta.state import read
from raftfs.meta.state.apply import apply_batch
from raftfs.meta.state.dictrows import DictRows
from raftfs.meta.tickets import Tickets
from raftfs.wire import inquiries as q
from raftfs.wire import messages as m
from raftfs.wire import ops
from raftfs.wire.auth import ClusterKey
from raftfs.wire.frame import encode
from raftfs.wire.ops import Batch, Command


class FakeLink:
    """A client's connection."""

    peer = ("127.0.0.1", 1)
    context = None

    def __init__(self) -> None:
        self.closed = asyncio.get_running_loop().create_future()


class Leader:
    """A replica that leads, alone."""

    config = SimpleNamespace(name="127.0.0.1:9418")
    leader = "127.0.0.1:9418"
    is_leader = True
    term = 1

    def __init__(self, rows: DictRows) -> None:
        self._rows = rows

    @property
    def members(self) -> dict[str, bytes]:
        """Who votes; nobody before the founding."""
        return read.members(self._rows)

    async def read_barrier(self) -> None:
        """Nobody else leads."""


class Proposals:
    """Every operation is committed at once."""

    def __init__(self, rows: DictRows) -> None:
        self._rows = rows

    async def commit(self, op: ops.Op) -> bytes:
        """The value of its result."""
        batch = Batch(1_000, [Command(0, 0, op)])
        return bytes(apply_batch(self._rows, 2, batch)[0].result.value)


KEY = ClusterKey(b"k" * 32)


def service(rows: DictRows) -> ClientService:
    """Everybody may mount."""
    unused: Any = SimpleNamespace()
    proposals: Any = Proposals(rows)
    leader: Any = Leader(rows)
    return ClientService(
        rows, leader, proposals, unused, unused, exports.default_lines(), unused, unused,
        KEY, unused, Tickets(KEY, lambda: b"c" * 16),
    )  # fmt: skip


def test_a_client_that_comes_before_the_cluster_is_founded_is_sent_away_for_a_moment() -> None:
    async def story() -> None:
        rows = DictRows()
        clients = service(rows)
        link: Any = FakeLink()
        ask = m.Register(m.PROTOCOL, "0", 0, b"s" * 16, b"/", "a test", b"", False)
        with pytest.raises(ReplyError) as refused:
            await clients.handle(link, ask)
        # ENOENT would be final for the client: "cannot mount subfolder /".
        assert refused.value.status == Status.NOT_LEADER
        assert refused.value.value == encode(m.Leader(1, "", ""))
        apply_batch(rows, 1, Batch(1_000, [Command(0, 0, ops.Found(b"c" * 16, {"a": b"i" * 16}))]))
        registered = await clients.handle(link, ask)
        assert registered.session == 1 and registered.cluster == b"c" * 16
        assert clients.leader().name == "127.0.0.1:9418"

    asyncio.run(story())


def test_questions_of_tools_are_answered_after_a_barrier_and_by_the_leader_only() -> None:
    async def story() -> None:
        rows = DictRows()
        await Proposals(rows).commit(ops.Found(b"c" * 16, {"127.0.0.1:9418": b"u" * 16}))
        clients = service(rows)
        happened: list[str] = []
        replica: Any = clients._replica

        async def barrier() -> None:
            happened.append("barrier")

        replica.read_barrier = barrier
        clients.answers({q.ExplainChunk: lambda ask: happened.append(f"chunk {ask.chunk}")})
        link: Any = FakeLink()
        with pytest.raises(ReplyError):
            clients.handle(link, q.ExplainChunk(7))  # it has not said who it is
        await clients.handle(link, m.Register(m.PROTOCOL, "0", 0, b"", b"/", "tool", b"", True))
        await clients.handle(link, q.ExplainChunk(7))
        assert happened == ["barrier", "chunk 7"]
        replica.is_leader = False
        with pytest.raises(ReplyError) as refused:
            clients.handle(link, q.ExplainChunk(7))
        assert refused.value.status == Status.NOT_LEADER

    asyncio.run(story())
