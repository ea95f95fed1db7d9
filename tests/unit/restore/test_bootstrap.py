"""A new cluster from an image: what its masters begin with, and with whom they will not begin."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path

import pytest

from raftfs.cli.benchcore import free_ports
from raftfs.errors import UserError
from raftfs.meta import image
from raftfs.meta.bootstrap import bootstrap
from raftfs.meta.raft.checkpoints import CheckpointLimits
from raftfs.meta.raft.identity import Identity
from raftfs.meta.raft.journal import DurableJournal
from raftfs.meta.raft.replica import Replica, ReplicaConfig
from raftfs.meta.state import invariants, read
from raftfs.meta.state.model import COUNTERS_KEY, Counters
from raftfs.meta.state.reseed import JUMP
from raftfs.meta.store import MetaStore
from raftfs.wire import ops
from raftfs.wire.auth import ClusterKey
from raftfs.wire.ops import Batch, Command, encode_batch
from tests.unit.restore.history import History

KEY = ClusterKey(b"k" * 32)
QUICK = CheckpointLimits(quiet_s=0.2)


@pytest.fixture
def history(tmp_path: Path) -> History:
    """With an image `i` of its end."""
    made = History(tmp_path, 6)
    made.reach(60)
    made.write_file(b"kept")
    made.image(tmp_path / "i")
    return made


def test_what_a_master_begins_with(history: History, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / ".lock").touch()
    origin = bootstrap(tmp_path / "i", tmp_path / "m", "a:1")
    head = image.read_head(tmp_path / "i")
    identity = Identity.load_or_create(tmp_path / "m" / "identity.cbor", "a:1", voter=True)
    assert (identity.origin, identity.voter, identity.peers) == (origin, True, {})
    store = MetaStore(tmp_path / "m" / "state.mdb")
    assert store.applied == (head.index + JUMP, head.term + JUMP)
    invariants.check_all(store)
    assert store.members() == {}
    old, new = history.store.get(COUNTERS_KEY), store.get(COUNTERS_KEY)
    assert isinstance(old, Counters) and isinstance(new, Counters)
    for field in ("next_inode", "next_chunk", "next_session", "next_lock", "version"):
        assert getattr(new, field) == getattr(old, field) + JUMP, field
    for field in ("cluster", "nodes", "chunks", "sessions"):
        assert getattr(new, field) == getattr(old, field), field
    walked = [list(read.walk(rows, 1)) for rows in (store, history.store)]
    assert walked[0] == walked[1] and len(walked[0]) > 3
    journal = DurableJournal(tmp_path / "m" / "journal")
    assert journal.fits(*store.applied) and journal.getCurrentTerm() == head.term + JUMP
    assert journal.oldest_index == journal.last_index == store.applied[0]
    journal._destroy()
    store.close()


def test_the_same_image_gives_the_same_origin_another_one_another(
    history: History, tmp_path: Path
) -> None:
    history.go_on(30)
    history.image(tmp_path / "later")
    # The same rows, but known to be of another entry: the logs would not fit together.
    image.write_image(tmp_path / "copy.mdb", tmp_path / "shifted", time_ns=history.now, at=(1, 1))
    origins = []
    for number, name in enumerate(("i", "i", "later", "shifted")):
        (tmp_path / f"m{number}").mkdir()
        origins.append(bootstrap(tmp_path / name, tmp_path / f"m{number}", f"a:{number}"))
    assert origins[0] == origins[1] and len(set(origins)) == 3


def test_a_folder_that_is_not_empty_is_refused(history: History, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    bootstrap(tmp_path / "i", tmp_path / "m", "a:1")
    before = {p: p.read_bytes() for p in (tmp_path / "m").rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=r"is not empty \(it has identity\.cbor\)"):
        bootstrap(tmp_path / "i", tmp_path / "m", "a:1")
    assert before == {p: p.read_bytes() for p in (tmp_path / "m").rglob("*") if p.is_file()}


def test_a_bad_image_is_refused_and_nothing_is_left(history: History, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    raw = (tmp_path / "i").read_bytes()
    for bad, sign in (
        (raw[:-1] + bytes([raw[-1] ^ 1]), "damaged"), (raw[:-9], "damaged"), (b"", "no raftfs"),
        (raw[: len(raw) // 2] + b"\0" + raw[len(raw) // 2 + 1 :], "damaged"),
    ):  # fmt: skip
        (tmp_path / "bad").write_bytes(bad)
        with pytest.raises(image.ImageError, match=sign):
            bootstrap(tmp_path / "bad", tmp_path / "m", "a:1")
        assert list((tmp_path / "m").iterdir()) == []
    with pytest.raises(image.ImageError, match="cannot be read: No such file"):
        bootstrap(tmp_path / "none", tmp_path / "m", "a:1")
    bootstrap(tmp_path / "i", tmp_path / "m", "a:1")


def test_an_image_of_no_cluster_is_refused(tmp_path: Path) -> None:
    store = MetaStore(tmp_path / "s.mdb")
    store.applied = (1, 0)
    store.freeze()
    store.write_frozen()
    store.thaw()
    store.close()
    image.write_image(tmp_path / "s.mdb", tmp_path / "i")
    (tmp_path / "m").mkdir()
    with pytest.raises(UserError, match="holds no cluster"):
        bootstrap(tmp_path / "i", tmp_path / "m", "a:1")


# --- real replicas


class Cluster:
    """Three masters of a folder, some of which begin with an image; and learners."""

    def __init__(self, folder: Path, images: list[Path | None]) -> None:
        self.folder = folder
        self.peers = tuple(f"127.0.0.1:{port}" for port in free_ports(3))
        self.stores: list[MetaStore] = []
        self.replicas: list[Replica] = []
        for number, (name, path) in enumerate(zip(self.peers, images, strict=True)):
            home = folder / f"m{number}"
            home.mkdir()
            if path is not None:
                bootstrap(path, home, name)
            self.add(ReplicaConfig(name, self.peers, home, checkpoints=QUICK))

    def add(self, config: ReplicaConfig) -> Replica:
        """One more replica, not started."""
        store = MetaStore(config.data_dir / "state.mdb")
        config = config._replace(cluster=read.totals(store).cluster)
        self.stores.append(store)
        self.replicas.append(Replica(config, store, KEY))
        return self.replicas[-1]

    def leader(self) -> Replica | None:
        """Who leads."""
        return next((r for r in self.replicas if r.is_leader), None)

    async def mkdir(self, name: bytes) -> ops.Result:
        """Commit one."""
        await until(lambda: self.leader() is not None)
        leader = self.leader()
        assert leader is not None
        op = ops.Create(1, name, ops.NodeType.DIR, 0o755, 0, 0, 0)
        return (await leader.submit(encode_batch(Batch(1, [Command(0, 0, op)]))))[0].result


async def until(true, timeout_s: float = 30.0) -> None:  # type: ignore[no-untyped-def]
    async with asyncio.timeout(timeout_s):
        while not true():
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def cluster(folder: Path, images: list[Path | None]) -> AsyncIterator[Cluster]:
    made = Cluster(folder, images)
    try:
        yield made
    finally:
        await asyncio.gather(*(r.stop() for r in made.replicas), return_exceptions=True)
        for store in made.stores:
            store.close()


def run(story: Awaitable[None]) -> None:
    asyncio.run(story)  # type: ignore[arg-type]


def test_masters_of_one_image_become_a_cluster_that_others_can_join(
    history: History, tmp_path: Path
) -> None:
    async def story() -> None:
        path = tmp_path / "i"
        async with cluster(tmp_path, [path] * 3) as c:
            await asyncio.gather(*(r.start() for r in c.replicas))
            await until(lambda: all(set(s.members()) == set(c.peers) for s in c.stores))
            assert {read.totals(s).cluster for s in c.stores} == {b"c" * 16}
            assert all(r.term > image.read_head(path).term + JUMP for r in c.replicas)
            assert (await c.mkdir(b"new")).status == 0
            # Whoever has nothing, or what the lost cluster had, gets a snapshot.
            (tmp_path / "empty").mkdir()
            (tmp_path / "old").mkdir()
            history.store.copy_to(tmp_path / "old" / "state.mdb")
            index, term = history.store.checkpointed
            journal = DurableJournal(tmp_path / "old" / "journal")
            journal.reset_to(index, term)
            journal._destroy()
            for name in ("empty", "old"):
                config = ReplicaConfig(name, c.peers, tmp_path / name, learner=True)
                await c.add(config).start()
            await until(lambda: len({s.applied for s in c.stores}) == 1)
            assert len({s.digest() for s in c.stores}) == 1
            for store in c.stores:
                invariants.check_all(store)
                assert read.lookup(store, 1, b"new").inode > JUMP
                assert read.lookup(store, 1, b"kept").inode < JUMP

    run(story())


@pytest.mark.parametrize("other", ["later", None])
def test_masters_of_different_images_do_not_become_a_cluster(
    history: History, tmp_path: Path, other: str | None
) -> None:
    history.go_on(30)
    history.image(tmp_path / "later")
    path = tmp_path / other if other else None

    async def story() -> None:
        async with cluster(tmp_path, [tmp_path / "i", tmp_path / "i", path]) as c:
            starts = [asyncio.ensure_future(r.start()) for r in c.replicas]
            ended, waiting = await asyncio.wait(
                starts, timeout=30, return_when=asyncio.FIRST_COMPLETED
            )
            await asyncio.sleep(1.0)  # the others wait for the right one, or end as well
            assert ended
            for start in (s for s in starts if s.done()):
                said = str(start.exception())
                assert isinstance(start.exception(), UserError)
                assert "from image" in said and "and the same image" in said
                assert ("without an image" in said) is (other is None)
            for start in waiting:
                start.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            assert not any(s.members() for s in c.stores)
            assert not any(r.is_leader for r in c.replicas)

    run(story())
