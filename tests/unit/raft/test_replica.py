"""Three real replicas in one event loop, on real sockets and disks, when one of them goes wrong."""

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from raftfs.cli.benchcore import free_ports
from raftfs.errors import InvariantError, NotLeader, OutcomeUnknown, RaftfsError, UserError
from raftfs.meta.raft.checkpoints import CheckpointLimits, Checkpoints
from raftfs.meta.raft.journal import DurableJournal, JournalError
from raftfs.meta.raft.messages import PeerName, Refused
from raftfs.meta.raft.replica import Replica, ReplicaConfig
from raftfs.meta.raft.segments import Files
from raftfs.meta.state.apply import Applied
from raftfs.meta.store import MetaStore
from raftfs.wire import ops
from raftfs.wire.auth import ClusterKey
from raftfs.wire.ops import Batch, Command, encode_batch
from tests.unit.raft.disks import FakeFiles

KEY = ClusterKey(b"k" * 32)
_names = itertools.count()


class SickFiles(Files):
    """A disk whose syncs take `delay_s`, or fail with `error`."""

    def __init__(self) -> None:
        self.delay_s = 0.0
        self.error: OSError | None = None
        self.slow_syncs = 0

    def sync(self, handle: Any) -> None:
        """As the disk is."""
        if self.error is not None:
            raise self.error
        if self.delay_s:
            assert threading.current_thread() is not threading.main_thread(), "the loop waits"
            self.slow_syncs += 1
            time.sleep(self.delay_s)
        super().sync(handle)


class BusyMachine:
    """A state machine with changed rows, which freezes nothing."""

    applied = checkpointed = (0, 0)
    freezing: tuple[int, int] | None = None
    digests: Sequence[tuple[int, bytes]] = ((0, b""),)

    def dirty(self) -> int:
        return 1

    def freeze(self) -> bool:
        return False

    def write_frozen(self) -> None:
        raise AssertionError("nothing is frozen")

    def thaw(self) -> None:
        raise AssertionError("nothing is frozen")


class Trio:
    """The replicas by number; `stores` and `files` likewise."""

    def __init__(self, folder: Path) -> None:
        peers = tuple(f"127.0.0.1:{port}" for port in free_ports(3))
        self.files = [SickFiles() for _ in peers]
        self.stores = [MetaStore(folder / f"{n}" / "state.mdb") for n in range(3)]
        self.replicas = [
            Replica(ReplicaConfig(name, peers, folder / f"{n}",
                                  checkpoints=CheckpointLimits(quiet_s=0.2)),
                    self.stores[n], KEY)
            for n, name in enumerate(peers)
        ]  # fmt: skip

    def leader(self) -> int | None:
        """The number of the one that leads."""
        found = [n for n, r in enumerate(self.replicas) if r.is_leader and not r.failed.done()]
        return found[0] if found else None

    async def until(self, true: Callable[[], Any], what: str, timeout_s: float = 20.0) -> None:
        limit = time.monotonic() + timeout_s
        while not true():
            assert time.monotonic() < limit, f"{what}: not within {timeout_s} s"
            await asyncio.sleep(0.02)

    async def mkdir(self) -> list[Applied]:
        """Commit one, whoever leads."""
        name = b"dir%d" % next(_names)
        op = ops.Create(1, name, ops.NodeType.DIR, 0o755, 0, 0, 0)
        while True:
            await self.until(lambda: self.leader() is not None, "a leader")
            number = self.leader()
            assert number is not None
            try:
                batch = encode_batch(Batch(time.time_ns(), [Command(0, 0, op)]))
                return await self.replicas[number].submit(batch)
            except (NotLeader, OutcomeUnknown):
                await asyncio.sleep(0.02)


@asynccontextmanager
async def trio(folder: Path) -> AsyncIterator[Trio]:
    made = Trio(folder)
    await asyncio.gather(*(r.start() for r in made.replicas))
    for replica, files in zip(made.replicas, made.files, strict=True):
        replica._journal._files = files
    try:
        await made.until(lambda: all(s.members() for s in made.stores), "the founding")
        yield made
    finally:
        await asyncio.gather(*(r.stop() for r in made.replicas), return_exceptions=True)
        for store in made.stores:
            store.close()


def run(story: Awaitable[None]) -> None:
    asyncio.run(story)  # type: ignore[arg-type]


def test_a_replica_that_differs_stops_and_the_others_go_on(tmp_path: Path) -> None:
    async def story() -> None:
        async with trio(tmp_path) as t:
            await t.mkdir()
            leader = t.leader()
            assert leader is not None
            wrong = (leader + 1) % 3
            store, original = t.stores[wrong], t.stores[wrong].put
            store.put = (  # type: ignore[method-assign]
                lambda key, row: original(key, row) if b"dir" not in key else None
            )
            await t.mkdir()
            await t.until(t.replicas[wrong].failed.done, "the alarm")
            error = t.replicas[wrong].failed.exception()
            assert isinstance(error, InvariantError) and "differs from the leader's" in str(error)
            before = t.stores[leader].applied[0]
            for _ in range(5):
                assert (await t.mkdir())[0].result.status == 0
            assert t.stores[leader].applied[0] > before
            healthy = 3 - leader - wrong
            await t.until(
                lambda: t.stores[healthy].applied == t.stores[leader].applied, "the other one"
            )
            assert not t.replicas[healthy].failed.done()

    run(story())


def test_checkpoints_are_made_at_one_entry_and_agree(tmp_path: Path) -> None:
    async def story() -> None:
        async with trio(tmp_path) as t:
            for _ in range(3):
                await t.mkdir()

                def common() -> set[tuple[int, bytes]]:
                    return set.intersection(*(set(s.digests) for s in t.stores))

                known = len(common())
                await t.until(lambda known=known: len(common()) > known, "a common checkpoint")
            at_once = {s.digest() for s in t.stores}
            assert len(at_once) == 1

    run(story())


def test_a_leader_with_a_slow_disk_goes_on_with_those_of_the_others(tmp_path: Path) -> None:
    """An fdatasync of two seconds: neither its office nor a commit waits for it."""

    async def story() -> None:
        async with trio(tmp_path) as t:
            await t.mkdir()
            leader = t.leader()
            assert leader is not None
            term = t.replicas[leader].term
            t.files[leader].delay_s = 2.0
            for _ in range(20):
                await t.mkdir()
            assert t.files[leader].slow_syncs == 1, "all this happened within one sync"
            assert t.replicas[leader]._journal.durable_index < t.stores[leader].applied[0]
            assert (t.leader(), t.replicas[leader].term) == (leader, term)
            t.files[leader].delay_s = 0.0

    run(story())


def test_a_leader_whose_disk_fails_stops_and_another_one_leads(tmp_path: Path) -> None:
    async def story() -> None:
        async with trio(tmp_path) as t:
            await t.mkdir()
            leader = t.leader()
            assert leader is not None
            t.files[leader].error = OSError(28, "No space left on device")
            await t.mkdir()
            await t.until(t.replicas[leader].failed.done, "the end of the leader")
            error = t.replicas[leader].failed.exception()
            assert isinstance(error, JournalError) and "No space left" in str(error)
            await t.mkdir()
            assert t.leader() not in (None, leader)
            t.files[leader].error = None

    run(story())


def test_a_leader_that_a_peer_refuses_as_a_stranger_hands_over_once(tmp_path: Path) -> None:
    """The peer was away while this leader replaced a lost master; it knows the others."""

    async def story() -> None:
        async with trio(tmp_path) as t:
            await t.mkdir()
            leader = t.leader()
            assert leader is not None
            refused = Refused("its identity is not known here", stranger=True)
            t.replicas[leader]._refused("somebody", refused)
            await t.until(lambda: t.leader() not in (None, leader), "another leader")
            first = t.replicas[leader]._no_hand_over_until
            t.replicas[leader]._refused("somebody", refused)
            assert t.replicas[leader]._no_hand_over_until == first, "it leads no more"
            assert (await t.mkdir())[0].result.status == 0

    run(story())


def test_who_joins_lets_in_a_master_that_its_peers_leave_out(tmp_path: Path) -> None:
    """It was added after the joining one was set up; if it leads, nobody else has the log."""

    async def story() -> None:
        names = tuple(f"127.0.0.1:{port}" for port in free_ports(4))
        config = ReplicaConfig(names[0], names[:3], tmp_path, join=True)
        store = MetaStore(tmp_path / "state.mdb")
        replica = Replica(config, store, KEY)
        await replica.start()
        try:
            assert replica._refusal(PeerName(names[3], b"d" * 16, True, False)) is None
        finally:
            await replica.stop()
            store.close()

    run(story())


def test_a_disk_that_fails_while_a_snapshot_is_installed_stops_the_replica(tmp_path: Path) -> None:
    """It once went on with a journal that had failed, and could never install another one."""

    async def story() -> None:
        async with trio(tmp_path) as t:
            leader = t.leader()
            assert leader is not None
            one = t.replicas[(leader + 1) % 3]

            def full(index: int, term: int) -> None:
                raise JournalError("No space left on device")

            one._journal.expect = full  # type: ignore[method-assign]
            one.machine.index_of = lambda path: (999, 9)  # type: ignore[method-assign]
            with pytest.raises(RaftfsError, match="not installed"):
                await one._install(tmp_path / "snapshot", 999, 9)
            assert isinstance(one.failed.exception(), JournalError)

    run(story())


def test_a_start_does_not_wait_for_a_master_that_only_the_state_knows(tmp_path: Path) -> None:
    """A stop came between installing a snapshot that names it and learning who it is."""

    async def story() -> None:
        async with trio(tmp_path) as t:
            stopped = t.replicas[0]
            await t.until(lambda: stopped.machine.members() and stopped.machine.checkpointed[0],
                          "a checkpoint that names the masters")  # fmt: skip
            await stopped.stop()
            forgotten = stopped.config.peers[1]
            del stopped._identity.peers[forgotten]
            stopped._identity.save()
            t.stores[0].close()
            store = t.stores[0] = MetaStore(tmp_path / "0" / "state.mdb")
            t.replicas[0] = Replica(stopped.config, store, KEY)
            await asyncio.wait_for(t.replicas[0].start(), 20)
            assert forgotten in t.replicas[0]._identity.peers

    run(story())


def test_only_who_was_removed_is_told_so_not_who_came_again(tmp_path: Path) -> None:
    """A replica that had missed a master's return once told it, which stopped, the leader even."""

    async def story() -> None:
        async with trio(tmp_path) as t:
            one = t.replicas[0]
            old = PeerName("127.0.0.1:1", b"o" * 16, voter=True, joining=False)
            one._identity.learn(old.name, old.uuid)
            told = one._refusal(old)
            assert told is not None and told.removed
            again = one._refusal(PeerName(old.name, b"n" * 16, True, False))
            assert again is None or not again.removed

    run(story())


def test_a_learner_that_missed_a_masters_coming_is_told_of_it_and_dials_it(tmp_path: Path) -> None:
    """Nobody dials a learner; if the new master leads, it once waited for another leader."""

    async def story() -> None:
        async with trio(tmp_path) as t:
            leader = t.leader()
            assert leader is not None
            everybody = t.replicas[0].config.peers
            follower = everybody[(leader + 1) % 3]
            config = ReplicaConfig("watcher", (follower,), tmp_path / "w", learner=True)
            store = MetaStore(tmp_path / "w" / "state.mdb")
            learner = Replica(config, store, KEY)
            await learner.start()
            try:
                links = learner._links
                assert links is not None
                await t.until(lambda: set(links.connected()) == set(everybody), "links to all")
            finally:
                await learner.stop()
                store.close()

    run(story())


def test_a_master_that_lost_its_disk_stops_however_late_it_is_refused(tmp_path: Path) -> None:
    """It once waited for ever if it had met all others before the first of them refused it."""

    async def story() -> None:
        async with trio(tmp_path) as t:
            leader = t.leader()
            assert leader is not None
            lost = t.replicas[(leader + 1) % 3]
            await lost.stop()
            config = lost.config._replace(data_dir=tmp_path / "empty")
            store = MetaStore(tmp_path / "empty" / "state.mdb")
            newcomer = Replica(config, store, KEY)
            refused = newcomer._refused

            def later(peer: str, why: Refused) -> None:
                asyncio.get_running_loop().call_later(0.3, refused, peer, why)

            newcomer._refused = later  # type: ignore[method-assign]
            await asyncio.wait_for(newcomer.start(), 20)
            with pytest.raises(UserError, match=r"lost its data.*raftfs cluster replace"):
                await asyncio.wait_for(newcomer.failed, 20)
            await newcomer.stop()
            store.close()

    run(story())


def test_a_checkpoint_that_met_another_one_is_asked_for_again() -> None:
    async def story() -> None:
        machine = BusyMachine()
        checkpoints = Checkpoints(
            CheckpointLimits(quiet_s=-1.0), machine, DurableJournal(Path("j"), FakeFiles()), print
        )
        asked: list[ops.Op] = []
        checkpoints.lead(asked.append)
        checkpoints.lead(asked.append)
        assert [type(op) for op in asked] == [ops.Checkpoint], "not twice"
        machine.applied = (1, 1)  # its entry; but another one is under way
        machine.freezing = (0, 0)
        checkpoints.applied(asked[0])
        checkpoints.lead(asked.append)
        assert len(asked) == 1
        machine.freezing = None
        checkpoints.lead(asked.append)
        assert len(asked) == 2

    run(story())
