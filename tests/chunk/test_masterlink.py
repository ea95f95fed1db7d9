"""The links to the masters, against a master made of nothing but a port."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raftfs.chunk.disk import Disk
from raftfs.chunk.masterlink import MasterLinks
from raftfs.chunk.server import DataServer
from raftfs.chunk.store import ChunkStore
from raftfs.errors import RaftfsError, ReplyError, Status, UserError
from raftfs.wire import messages as m
from raftfs.wire import rpc
from raftfs.wire.auth import ClusterKey
from raftfs.wire.frame import encode, piece_crcs

KEY = ClusterKey(b"k" * 32)
CLUSTER = b"c" * 16


class FakeMaster:
    """Writes down what chunkservers say, in order, replies to orders included."""

    def __init__(self, cluster: bytes = CLUSTER) -> None:
        self.cluster = cluster
        self.heard: list[Any] = []
        self.links: list[rpc.Link] = []
        self.port = 0

    async def start(self, port: int = 0) -> None:
        """Listen."""
        self._server = await rpc.serve(
            "127.0.0.1", port, incoming=m.ChunkEvent, handler=self._event, key=KEY,
            role="master", name="fake", on_open=self.links.append,
        )  # fmt: skip
        self.port = self._server._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening, drop the links."""
        await self._server.close()

    def _event(self, link: rpc.Link, event: Any) -> Any:
        if isinstance(event, m.ServerHello) and event.cluster not in (b"", self.cluster):
            text = f"this server's disks belong to cluster {event.cluster.hex()}"
            raise ReplyError(Status.BUSY, encode(text))
        self.heard.append(event)
        return self.cluster if isinstance(event, m.ServerHello) else None

    async def order(self, order: Any) -> None:
        """Give an order over the newest link; its end is written down too."""
        try:
            await self.links[-1].call(order, 5.0)
        finally:
            self.heard.append("replied")

    async def until(self, kind: type, count: int = 1) -> None:
        """Wait until so many messages of a kind were heard."""
        async with asyncio.timeout(8):
            while sum(isinstance(e, kind) for e in self.heard) < count:
                await asyncio.sleep(0.01)

    def kinds(self) -> list[str]:
        """What was heard, by name, without heartbeats."""
        names = ["replied" if e == "replied" else type(e).__name__ for e in self.heard]
        return [n for i, n in enumerate(names) if n != "Space" or i < 3]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ChunkStore]:
    """A store of no cluster yet, with copies 1 to 5."""
    made = ChunkStore([Disk(tmp_path / "d")])
    for chunk in range(1, 6):
        _put(made, chunk)
    yield made
    made.close()


def _put(store: ChunkStore, chunk: int, version: int = 1) -> None:
    store.write(chunk, version, 1, True, 0, b"abc", piece_crcs(0, b"abc"))


Story = Callable[[FakeMaster, MasterLinks], Awaitable[None]]


def _play(store: ChunkStore, story: Story, master: FakeMaster | None = None) -> FakeMaster:
    """Run a story with one master and a chunkserver that knows its port."""
    master = master or FakeMaster()

    async def whole() -> None:
        await master.start()
        links = MasterLinks(store, [("127.0.0.1", master.port)], ("127.0.0.1", 9422), KEY)
        links.start()
        try:
            async with asyncio.timeout(20):
                await story(master, links)
        finally:
            await links.stop()
            await master.stop()
            if links.failed.done():
                links.failed.exception()

    asyncio.run(whole())
    return master


def test_introduction(store: ChunkStore) -> None:
    async def story(master: FakeMaster, links: MasterLinks) -> None:
        await master.until(m.Ready)
        await master.until(m.Space, 3)  # the heart beats

    master = _play(store, story)
    assert master.kinds()[:4] == ["ServerHello", "Copies", "Space", "Ready"]
    hello, copies, space = master.heard[:3]
    assert (hello.server, hello.cluster, hello.port) == (store.server, b"", 9422)
    assert sorted(c.chunk for c in copies.copies) == [1, 2, 3, 4, 5]
    assert space.chunks == 5 and 0 < space.used <= space.total
    assert store.cluster == CLUSTER, "it joined"


def test_long_reports_come_in_slices(store: ChunkStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raftfs.chunk.masterlink._REPORT_SLICE", 2)

    async def story(master: FakeMaster, links: MasterLinks) -> None:
        await master.until(m.Ready)

    slices = [e.copies for e in _play(store, story).heard if isinstance(e, m.Copies)]
    assert [len(s) for s in slices] == [2, 2, 1]
    assert sorted(c.chunk for s in slices for c in s) == [1, 2, 3, 4, 5]


def test_a_change_is_told_before_the_order_is_answered(store: ChunkStore, tmp_path: Path) -> None:
    source = ChunkStore([Disk(tmp_path / "source")])
    _put(source, 77, 3)
    data = DataServer(source, "127.0.0.1", 0)

    async def story(master: FakeMaster, links: MasterLinks) -> None:
        await master.until(m.Ready)
        for order, told in (
            (m.RaiseVersion(1, 2, 6, 9), m.Changed([m.CopyId(2, 6)], [m.CopyId(2, 1)], [])),
            (m.Destroy(1, 3, 1), m.Changed([], [m.CopyId(3, 1)], [])),
            (m.Replicate(1, 77, 3, "127.0.0.1", data.port), m.Changed([m.CopyId(77, 3)], [], [])),
        ):
            master.heard.clear()
            await master.order(order)
            heard = [e for e in master.heard if not isinstance(e, m.Space)]
            assert heard == [told, "replied"]

    _play(store, story)
    data.close()
    source.close()


def test_changes_by_clients_are_told(store: ChunkStore) -> None:
    async def story(master: FakeMaster, links: MasterLinks) -> None:
        await master.until(m.Ready)
        await asyncio.to_thread(_put, store, 9)
        await master.until(m.Changed)

    told = [e for e in _play(store, story).heard if isinstance(e, m.Changed)]
    assert told == [m.Changed([m.CopyId(9, 1)], [], [])]


def test_orders_of_lower_terms_are_refused(store: ChunkStore) -> None:
    async def story(master: FakeMaster, links: MasterLinks) -> None:
        await master.until(m.Ready)
        await master.order(m.NewTerm(5))
        await master.order(m.RaiseVersion(5, 1, 2, 1))
        for order in (m.NewTerm(4), m.RaiseVersion(4, 1, 3, 1), m.Destroy(4, 1, 2),
                      m.Replicate(4, 50, 1, "127.0.0.1", 1)):  # fmt: skip
            with pytest.raises(ReplyError) as e:
                await master.order(order)
            assert e.value.status == Status.OLD_TERM
        await master.order(m.RaiseVersion(6, 1, 4, 1))

    _play(store, story)
    assert m.CopyId(1, 4) in store.copies()


def test_orders_that_fail_say_so(store: ChunkStore) -> None:
    async def story(master: FakeMaster, links: MasterLinks) -> None:
        await master.until(m.Ready)
        for order in (m.RaiseVersion(1, 99, 2, 1), m.Replicate(1, 98, 1, "127.0.0.1", 1),
                      m.Replicate(1, 1, 7, "127.0.0.1", 1)):  # fmt: skip
            with pytest.raises(RaftfsError):
                await master.order(order)
        await master.order(m.Destroy(1, 99, 1))  # what is not there is destroyed

    _play(store, story)
    assert len(store) == 5


def test_after_a_broken_link_everything_is_told_again(store: ChunkStore) -> None:
    async def story(master: FakeMaster, links: MasterLinks) -> None:
        await master.until(m.Ready)
        master.links[-1].close()
        await asyncio.to_thread(_put, store, 6)
        await master.until(m.Ready, 2)
        port = master.port
        await master.stop()
        await asyncio.sleep(0.3)
        await asyncio.to_thread(store.destroy, 1, 1)
        await master.start(port)
        await master.until(m.Ready, 3)
        await asyncio.to_thread(_put, store, 7)
        await master.until(m.Changed)

    reports = [e.copies for e in _play(store, story).heard if isinstance(e, m.Copies)]
    assert [sorted(c.chunk for c in r) for r in reports] == [
        [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6], [2, 3, 4, 5, 6],
    ]  # fmt: skip


def test_a_foreign_cluster_is_an_error_for_the_user(store: ChunkStore) -> None:
    store.join(b"x" * 16)

    async def story(master: FakeMaster, links: MasterLinks) -> None:
        with pytest.raises(UserError, match="belong to cluster") as e:
            await asyncio.wait_for(links.failed, 5)
        assert "\n" not in str(e.value)

    assert _play(store, story).kinds() == []
    assert store.cluster == b"x" * 16 and len(store) == 5


def test_a_master_of_another_key_hears_nothing(store: ChunkStore) -> None:
    async def story(master: FakeMaster, links: MasterLinks) -> None:
        links._key = ClusterKey(b"o" * 32)
        await asyncio.sleep(0.8)
        assert not links.failed.done()

    assert _play(store, story).kinds() == []
