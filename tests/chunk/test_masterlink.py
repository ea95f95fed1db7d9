"""The chunkserver and its masters: reports in order, orders by term, replication."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from raftfs.chunk import masterlink
from raftfs.chunk.masterlink import MasterLinks
from raftfs.chunk.terms import TermGate
from raftfs.errors import RaftfsError, ReplyError, Status, UserError
from raftfs.wire import messages as m
from raftfs.wire import rpc
from tests.chunk.parts import (
    CLUSTER,
    KEY,
    MASTER,
    Server,
    chunk_file,
    noise,
    read,
    servers,
    write,
)  # fmt: skip


class Master:
    """Keeps what it is told."""

    def __init__(self, cluster: bytes = CLUSTER) -> None:
        self.cluster = cluster
        self.told: list[Any] = []
        self.link: rpc.Link | None = None
        self.others: list[str] = []  # what it says of other masters
        self.port = 0
        self._server: rpc.Server | None = None

    async def start(self) -> None:
        self._server = await rpc.serve(
            "127.0.0.1", self.port, incoming=m.ChunkEvent, handler=self._event, key=KEY,
            role="master",
        )  # fmt: skip
        self.port = self._server._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        await self._server.close()

    def _event(self, link: rpc.Link, event: Any) -> Any:
        self.told.append(event)
        if isinstance(event, m.Space):
            return self.others
        if isinstance(event, m.ServerHello):
            return self.cluster
        if isinstance(event, m.Ready):
            self.link = link
        return None

    async def order(self, order: m.ChunkOrder) -> None:
        assert self.link is not None
        if isinstance(order, m.Replicate) and not order.ticket:
            order = MASTER.for_replication(order)
        try:
            await self.link.call(order, 10.0)
        finally:
            self.told.append("answer")

    def kinds(self) -> list[str]:
        return [type(t).__name__ for t in self.told if not isinstance(t, m.Space)]


async def until(true: Callable[[], Any], timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not true():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def linked(server: Server, *masters: Master) -> AsyncIterator[MasterLinks]:
    for master in masters:
        await master.start()
    links = MasterLinks(
        server.store, [("127.0.0.1", x.port) for x in masters], ("h", server.data.port), KEY,
        server.tickets,
    )  # fmt: skip
    links.start()
    try:
        yield links
    finally:
        await links.stop()
        for master in masters:
            await master.stop()


def run(story: Awaitable[None]) -> None:
    asyncio.run(story)  # type: ignore[arg-type]


async def refused(order: Awaitable[None], status: int) -> None:
    with pytest.raises(ReplyError) as e:
        await order
    assert e.value.status == status


def test_every_master_hears_all_and_links_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masterlink, "REPORT_SLICE", 2)

    async def story() -> None:
        with servers(tmp_path, 1) as (server,):
            for chunk in (1, 2, 3):
                write(server.store, chunk, 0, b"x")
            a, b = Master(), Master()
            async with linked(server, a, b):
                await until(lambda: a.link and b.link)
                write(server.store, 4, 0, b"x")
                await until(lambda: a.kinds()[-1] == b.kinds()[-1] == "Changed")
                for master in (a, b):
                    assert master.kinds() == ["ServerHello", "Copies", "Copies", "Ready", "Changed"]
                    copies = {c.chunk for t in master.told if isinstance(t, m.Copies)
                              for c in t.copies}  # fmt: skip
                    assert copies == {1, 2, 3}
                    (changed,) = (t for t in master.told if isinstance(t, m.Changed))
                    assert changed.made == [m.CopyId(4, 1)]  # a Space may have come behind it
                await a.stop()
                a.told.clear()
                write(server.store, 5, 0, b"x")
                await a.start()
                await until(lambda: "Ready" in a.kinds())
                found = [c.chunk for t in a.told if isinstance(t, m.Copies) for c in t.copies]
                assert sorted(found) == [1, 2, 3, 4, 5]

    run(story())


def test_orders_of_deposed_leaders_are_refused_also_after_a_restart(tmp_path: Path) -> None:
    async def story() -> None:
        server = Server(tmp_path)
        write(server.store, 1, 0, b"x")
        try:
            old, new = Master(), Master()
            async with linked(server, old, new):
                await until(lambda: old.link and new.link)
                await old.order(m.NewTerm(4))
                await old.order(m.RaiseVersion(4, 1, 2, 10))
                changed = [t for t in old.told if isinstance(t, m.Changed)][-1]
                assert (changed.made, changed.gone) == ([m.CopyId(1, 2)], [m.CopyId(1, 1)])
                # The report comes before the answer.
                kinds = [k for k in old.kinds() if k in ("Changed", "str")]
                assert kinds == ["str", "Changed", "str"]
                await new.order(m.NewTerm(5))
                for late in (m.Destroy(4, 1, 2), m.RaiseVersion(4, 1, 3, 11), m.NewTerm(4)):
                    await refused(old.order(late), Status.OLD_TERM)
                assert server.store.copies() == [m.CopyId(1, 2)]
        finally:
            server.close()
        again = Server(tmp_path)
        master = Master()
        async with linked(again, master):
            await until(lambda: master.link)
            await refused(master.order(m.Destroy(4, 1, 0)), Status.OLD_TERM)
            await master.order(m.NewTerm(5))
            await master.order(m.Destroy(5, 1, 0))
            assert again.store.copies() == []
        again.close()

    run(story())


def test_a_new_term_waits_for_what_older_orders_are_doing() -> None:
    gate = TermGate(3)
    happened: list[str] = []
    with gate.effect(3):
        gate.announce(5, lambda: happened.append("announced"))
        with pytest.raises(ReplyError), gate.effect(4):
            happened.append("never")
        with gate.effect(5):
            happened.append("newer goes on")
        assert happened == ["newer goes on"]
    assert happened == ["newer goes on", "announced"]
    gate.announce(6, lambda: happened.append("at once"))
    assert happened[-1] == "at once"
    with pytest.raises(ReplyError):
        gate.announce(5, lambda: None)
    gate.shut()
    with pytest.raises(ReplyError), gate.effect(10**9):
        happened.append("never")


def test_replication(tmp_path: Path) -> None:
    data = noise(1, 200_000)

    async def story() -> None:
        with servers(tmp_path, 2) as (source, target):
            write(source.store, 1, 70_000, data, version=3)
            write(source.store, 1, 5_000_000, b"far", version=3)
            master = Master()
            async with linked(target, master):
                await until(lambda: master.link)
                order = m.Replicate(1, 1, 3, "127.0.0.1", source.data.port)
                await master.order(order)
                assert target.store.copies() == [m.CopyId(1, 3)]
                for offset, length in ((70_000, len(data)), (0, 70_000), (5_000_000, 10)):
                    assert read(target.store, 1, offset, length, 3) == read(
                        source.store, 1, offset, length, 3
                    )
                assert target.store.block_list(1, 3) == source.store.block_list(1, 3)
                size = chunk_file(target.root, 1).stat().st_size
                assert size == chunk_file(source.root, 1).stat().st_size
                await master.order(order)  # repeated: it is there
                source.store.raise_version(1, 9, 9)
                wrong = m.Replicate(1, 1, 8, "127.0.0.1", source.data.port)
                await refused(master.order(wrong), Status.WRONG_VERSION)
                newer = m.Replicate(1, 1, 9, "127.0.0.1", source.data.port)
                await master.order(newer)  # takes the older one's place
                assert target.store.copies() == [m.CopyId(1, 9)]
                assert len(list(target.root.glob("01/*"))) == 1
                changed = [t for t in master.told if isinstance(t, m.Changed)]
                assert [(c.made, c.gone) for c in changed] == [
                    ([m.CopyId(1, 3)], []), ([m.CopyId(1, 9)], [m.CopyId(1, 3)]),
                ]  # fmt: skip

    run(story())


def test_replication_of_a_damaged_copy_fails_and_leaves_nothing(tmp_path: Path) -> None:
    async def story() -> None:
        with servers(tmp_path, 2) as (source, target):
            write(source.store, 1, 0, noise(1, 500_000))
            source.store.rest_idle(-1.0)
            with open(chunk_file(source.root, 1), "r+b") as file:
                file.seek(8192 + 300_000)
                file.write(b"rot")
            master = Master()
            async with linked(target, master):
                await until(lambda: master.link)
                order = m.Replicate(1, 1, 1, "127.0.0.1", source.data.port)
                await refused(master.order(order), Status.BAD_CRC)
                assert len(target.store) == 0 and not list(target.root.glob("01/*"))
                source.data.close()
                nobody = m.Replicate(1, 2, 1, "127.0.0.1", source.data.port)
                await refused(master.order(nobody), 5)

    run(story())


def test_a_master_of_another_cluster_is_refused(tmp_path: Path) -> None:
    async def story() -> None:
        with servers(tmp_path, 1) as (server,):
            good, bad = Master(), Master(b"x" * 16)
            async with linked(server, bad) as links:
                with pytest.raises(UserError, match="of another cluster"):
                    async with asyncio.timeout(5.0):
                        await links.failed
            async with linked(server, good) as links:
                await until(lambda: good.link)
                await bad.start()
                task = asyncio.ensure_future(links._keep("127.0.0.1", bad.port))
                await until(lambda: bad.told)
                await asyncio.sleep(0.1)
                assert not links.failed.done()  # one wrong master does not stop a working server
                task.cancel()
                await bad.stop()

    run(story())


def test_a_master_that_another_one_names_is_reported_to(tmp_path: Path) -> None:
    """It was added while the chunkserver ran."""

    async def story() -> None:
        with servers(tmp_path, 1) as (server,):
            write(server.store, 1, 0, b"x")
            known, new = Master(), Master()
            await new.start()
            known.others = [f"127.0.0.1:{new.port}", f"127.0.0.1:{new.port}"]
            async with linked(server, known):
                await until(lambda: new.link)
                assert new.kinds() == ["ServerHello", "Copies", "Ready"]
            await new.stop()

    run(story())


def test_masters_hear_of_damaged_and_leaving_copies_also_when_they_come_later(
    tmp_path: Path,
) -> None:
    async def story() -> None:
        with servers(tmp_path, 1) as (server,):
            store = server.store
            for chunk in (1, 2, 3):
                write(store, chunk, 0, noise(chunk, 100))
            store.rest_idle(-1.0)
            path = chunk_file(server.root, 2)
            path.write_bytes(path.read_bytes()[:-1])
            a, b = Master(), Master()
            async with linked(server, a):
                await until(lambda: a.link)
                with pytest.raises(ReplyError):
                    read(store, 2, 0, 100)
                store.push(0, away=True)
                await until(lambda: a.kinds()[-2:] == ["Changed", "Changed"])
                damaged, leaving = [t for t in a.told if isinstance(t, m.Changed)]
                assert damaged.damaged == [m.CopyId(2, 1)]
                (told,) = damaged.stories
                assert (told.chunk, told.block, told.part, told.found_by) == (2, 0, "data", "read")
                assert sorted(leaving.leaving) == [1, 2, 3] and leaving.staying == ()
                store.push(0, away=False)
                await until(lambda: a.kinds()[-1:] == ["Changed"] and a.told)
                await until(lambda: [t for t in a.told if getattr(t, "staying", ())])
                store.push(0, away=True)
            async with linked(server, b):
                await until(lambda: b.link)
                parts = [t for t in b.told if isinstance(t, m.Copies)]
                assert sorted(c.chunk for t in parts for c in t.copies) == [1, 3]
                assert [d for t in parts for d in t.damaged] == [told]
                assert sorted(c for t in parts for c in t.leaving) == [1, 2, 3]

    run(story())


def test_orders_about_damage_and_disks(tmp_path: Path) -> None:
    tuned: list[tuple[str, str]] = []

    def tune(action: str, value: str) -> None:
        if value == "/none":
            raise RaftfsError("/none is no disk")
        tuned.append((action, value))

    async def story() -> None:
        with servers(tmp_path, 1) as (server,):
            store = server.store
            for chunk in (1, 2):
                write(store, chunk, 0, noise(chunk, 100))
            store.rest_idle(-1.0)
            rotten = chunk_file(server.root, 2)
            raw = rotten.read_bytes()
            rotten.write_bytes(bytes([raw[0] ^ 1]) + raw[1:])
            master = Master()
            await master.start()
            links = MasterLinks(
                store, [("127.0.0.1", master.port)], ("h", server.data.port), KEY,
                server.tickets, list, tune,
            )
            links.start()
            try:
                await until(lambda: master.link)
                await master.order(m.Confirm(3, 1, 1))
                await refused(master.order(m.Confirm(3, 1, 2)), Status.WRONG_VERSION)
                await refused(master.order(m.Confirm(3, 2, 1)), Status.BAD_CRC)
                await refused(master.order(m.SetAside(2, 2, 1)), Status.OLD_TERM)
                assert rotten.exists()
                await master.order(m.SetAside(3, 2, 1))
                assert not rotten.exists() and store.copies() == [m.CopyId(1, 1)]
                gone = [t for t in master.told if isinstance(t, m.Changed)][-1]
                assert gone.gone == [m.CopyId(2, 1)]
                await master.order(m.Tune(3, "scrub-rate", "5"))
                assert tuned == [("scrub-rate", "5")]
                with pytest.raises(ReplyError) as e:
                    await master.order(m.Tune(3, "retest", "/none"))
                assert b"/none is no disk" in e.value.value
            finally:
                await links.stop()
                await master.stop()

    run(story())
