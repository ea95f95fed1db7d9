"""Three real replicas in one event loop, on real sockets and disks, when one of them goes wrong."""

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from pysyncobj.node import Node

from raftfs.cli.benchcore import free_ports
from raftfs.errors import (
    InvariantError,
    NotLeader,
    OutcomeUnknown,
    RaftfsError,
    ReplyError,
    StateDiffers,
    Status,
    UserError,
)
from raftfs.meta.raft import safety
from raftfs.meta.raft.checkpoints import CheckpointLimits, Checkpoints
from raftfs.meta.raft.configurations import Configurations
from raftfs.meta.raft.journal import SEGMENT_BYTES, DurableJournal, JournalError
from raftfs.meta.raft.loopwatch import LoopWatch, Times
from raftfs.meta.raft.messages import PeerName, Refused
from raftfs.meta.raft.replica import Replica, ReplicaConfig
from raftfs.meta.raft.segments import Files
from raftfs.meta.raft.surroundings import Surroundings
from raftfs.meta.state.apply import Applied
from raftfs.meta.store import MetaStore
from raftfs.wire import ops
from raftfs.wire.auth import ClusterKey
from raftfs.wire.ops import Batch, Command, encode_batch
from tests.unit.raft.disks import FakeFiles
from tests.unit.raft.stock import B, StockNode, both, verdict

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

    def __init__(self, folder: Path, limits: CheckpointLimits, segment_bytes: int) -> None:
        self.peers = peers = tuple(f"127.0.0.1:{port}" for port in free_ports(3))
        around = Surroundings(segment_bytes=segment_bytes)
        self.files = [SickFiles() for _ in peers]
        self.stores = [MetaStore(folder / f"{n}" / "state.mdb") for n in range(3)]
        self.replicas = [
            Replica(ReplicaConfig(name, peers, folder / f"{n}", checkpoints=limits),
                    self.stores[n], KEY, around)
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

    async def mkdir(self, *, busy: bool = False) -> list[Applied]:
        """Commit one, whoever leads. `busy`: raise if it is refused as such."""
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
            except ReplyError:
                if busy:
                    raise
                await asyncio.sleep(0.02)


@asynccontextmanager
async def trio(
    folder: Path, limits: CheckpointLimits = CheckpointLimits(quiet_s=0.2),  # noqa: B008
    segment_bytes: int = SEGMENT_BYTES,
) -> AsyncIterator[Trio]:  # fmt: skip
    made = Trio(folder, limits, segment_bytes)
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


@pytest.mark.parametrize("who", ["follower", "leader"])
def test_a_replica_that_differs_stops_and_the_others_go_on(tmp_path: Path, who: str) -> None:
    async def story() -> None:
        async with trio(tmp_path) as t:
            await t.mkdir()
            leader = t.leader()
            assert leader is not None
            wrong = leader if who == "leader" else (leader + 1) % 3
            store, original = t.stores[wrong], t.stores[wrong].put
            store.put = (  # type: ignore[method-assign]
                lambda key, row: original(key, row) if b"dir" not in key else None
            )
            await t.mkdir()
            await t.until(t.replicas[wrong].failed.done, "the alarm")
            error = t.replicas[wrong].failed.exception()
            assert isinstance(error, StateDiffers) and "raftfs cluster replace" in str(error)
            for _ in range(5):
                assert (await t.mkdir())[0].result.status == 0
            others = [n for n in range(3) if n != wrong]
            assert t.leader() in others
            await t.until(
                lambda: t.stores[others[0]].applied == t.stores[others[1]].applied, "both others"
            )
            before = t.stores[others[0]].checkpointed[0]
            await t.mkdir()
            await t.until(
                lambda: t.stores[others[0]].digests[-1] == t.stores[others[1]].digests[-1]
                and t.stores[others[0]].checkpointed[0] > before,
                "their next checkpoint",
            )
            assert not any(t.replicas[n].failed.done() for n in others)

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


def test_a_follower_with_a_slow_disk_applies_what_the_others_commit(tmp_path: Path) -> None:
    """A pass that begins a sync leaves the rest for later, but not until the sync has ended."""

    async def story() -> None:
        async with trio(tmp_path) as t:
            await t.mkdir()
            leader = t.leader()
            assert leader is not None
            follower = (leader + 1) % 3
            t.files[follower].delay_s = 2.0
            for _ in range(5):
                await t.mkdir()
            reached = t.stores[leader].applied[0]
            await t.until(lambda: t.stores[follower].applied[0] >= reached, "applied")
            assert t.files[follower].slow_syncs == 1, "all this happened within one sync"
            assert t.replicas[follower]._journal.durable_index < reached
            t.files[follower].delay_s = 0.0

    run(story())


@pytest.mark.parametrize("who", ["leader", "follower"])
def test_changes_wait_for_checkpoints_that_lag_so_memory_is_bounded(
    tmp_path: Path, who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safety, "WINDOW_ENTRIES", 10)
    limits = CheckpointLimits(rows=30, quiet_s=0.2)

    async def story() -> None:
        async with trio(tmp_path, limits) as t:
            await t.mkdir()
            leader = t.leader()
            assert leader is not None
            slow = leader if who == "leader" else (leader + 1) % 3
            store, may_go, busy = t.stores[slow], threading.Event(), 0
            write = store.write_frozen

            def write_late() -> None:
                assert may_go.wait(30)
                write()

            store.write_frozen = write_late  # type: ignore[method-assign]
            made, per_dir = 0, 5
            try:
                for _ in range(200):
                    try:
                        await t.mkdir(busy=True)
                        made += 1
                    except ReplyError as e:
                        assert e.status == Status.BUSY
                        busy += 1
                    assert store.dirty() <= 4 * limits.rows + 10 * per_dir
                assert store.freezing is not None
                assert (busy > 0) is (who == "leader"), f"{busy} refused, {made} made"
                if who == "follower":
                    assert store.applied[0] < t.stores[leader].applied[0] - 50, "it takes no more"
                    assert t.replicas[slow].leader, "but it follows"
            finally:
                may_go.set()
            await t.mkdir()
            await t.until(lambda: len({s.applied for s in t.stores}) == 1, "all as far as one")
            assert len({s.digest() for s in t.stores}) == 1

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


@both
@pytest.mark.parametrize("who", ["follower", "leader"])
def test_h8_an_exception_while_applying_stops_that_replica_alone(
    side: str, who: str, tmp_path: Path
) -> None:
    """Stock tries again with every tick, for ever, each time with its first effects."""
    if side == "stock":
        node = StockNode()
        entries = [(node.command(value), n, 1) for n, value in ((2, "a"), (3, "boom"), (4, "b"))]
        node.receive(B, "append_entries", term=1, commit_index=4, prevLogIdx=1, prevLogTerm=0,
                     entries=entries)  # fmt: skip
        for _ in range(5):
            with pytest.raises(ZeroDivisionError):
                node.doTick(0)
        verdict(side, node.attempts > 5 and "b" not in node.values)
        return

    async def story() -> None:
        async with trio(tmp_path) as t:
            await t.mkdir()
            leader = t.leader()
            assert leader is not None
            sick = leader if who == "leader" else (leader + 1) % 3
            store, original, attempts = t.stores[sick], t.stores[sick].put, [0]

            def put(key: bytes, row: Any) -> None:
                if key[:1] == b"E":
                    attempts[0] += 1
                    raise ZeroDivisionError
                original(key, row)

            store.put = put  # type: ignore[method-assign]
            before = store.applied
            await t.mkdir()
            await t.until(t.replicas[sick].failed.done, "the end of that replica")
            assert isinstance(t.replicas[sick].failed.exception(), ZeroDivisionError)
            for _ in range(5):
                assert (await t.mkdir())[0].result.status == 0
            others = [n for n in range(3) if n != sick]
            assert t.leader() in others and not any(t.replicas[n].failed.done() for n in others)
            assert store.applied >= before and store.checkpointed[0] <= store.applied[0]
            with pytest.raises(InvariantError):
                store.freeze()  # nothing of the entry becomes durable
            verdict(side, attempts[0] != 1)

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


@pytest.mark.parametrize(
    ("matched", "votes"), [(0, False), (899, False), (900, True), (1_000, True)]
)
def test_a_replacement_need_not_have_the_last_entries(
    tmp_path: Path, matched: int, votes: bool
) -> None:
    """Under load it never has at the moment when the leader looks, and once waited for a lull."""

    async def story() -> None:
        names = tuple(f"127.0.0.1:{port}" for port in free_ports(3))
        store = MetaStore(tmp_path / "state.mdb")
        replica = Replica(ReplicaConfig(names[0], names, tmp_path), store, KEY)
        replica._roster.members = {name: b"old" for name in names}
        node = Node(f"{names[1]}#{b'new'.hex()}")
        core = SimpleNamespace(
            learners={node}, match_index={node: matched}, commit_index=1_000,
            configurations=SimpleNamespace(changing=False),
        )  # fmt: skip
        with patch.object(replica, "change_members") as change:
            replica._promote_joined(core)  # type: ignore[arg-type]
        assert [call.args[0] for call in change.call_args_list] == (
            [ops.ReplaceMember(names[1], b"new")] if votes else []
        )
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


def test_checkpoints_end_when_they_are_cancelled_in_the_turn_in_which_one_begins() -> None:
    """They once went on, and waited for a journal that nobody wrote any more."""

    async def story() -> None:
        checkpoints = Checkpoints(
            CheckpointLimits(), BusyMachine(), DurableJournal(Path("j"), FakeFiles()), print
        )
        running = asyncio.ensure_future(checkpoints.run())
        await asyncio.sleep(0.01)
        checkpoints._frozen.set()
        await asyncio.sleep(0)
        running.cancel()
        done, _ = await asyncio.wait({running}, timeout=5)
        assert done and running.cancelled()

    run(story())


def test_a_checkpoint_that_met_another_one_is_asked_for_again() -> None:
    async def story() -> None:
        machine, three = BusyMachine(), Configurations(dict.fromkeys("abc", b""))
        checkpoints = Checkpoints(
            CheckpointLimits(quiet_s=-1.0), machine, DurableJournal(Path("j"), FakeFiles()), print
        )
        asked: list[ops.Op] = []
        checkpoints.lead(asked.append, "a", three.agree)
        checkpoints.lead(asked.append, "a", three.agree)
        assert [type(op) for op in asked] == [ops.Checkpoint], "not twice"
        machine.applied = (1, 1)  # its entry; but another one is under way
        machine.freezing = (0, 0)
        checkpoints.applied(asked[0])
        checkpoints.lead(asked.append, "a", three.agree)
        assert len(asked) == 1
        machine.freezing = None
        checkpoints.lead(asked.append, "a", three.agree)
        assert len(asked) == 2

    run(story())


class MadeMachine(BusyMachine):
    """Its checkpoint after entry 1 has a digest."""

    applied = checkpointed = (1, 1)
    digests: Sequence[tuple[int, bytes]] = ((1, b"A" * 16),)

    def dirty(self) -> int:
        return 0


@pytest.mark.parametrize(
    ("claims", "told", "stops"),
    [({}, False, ""), ({"b": "A"}, True, ""), ({"b": "B"}, False, "no state has a majority"),
     ({"b": "B", "c": "A"}, True, ""), ({"b": "B", "c": "B"}, False, "of the other masters"),
     ({"b": "B", "c": "C"}, False, "no state has a majority"), ({"x": "A"}, False, "")],
)  # fmt: skip
def test_the_majority_of_the_voters_has_the_right_digest(
    claims: dict[str, str], told: bool, stops: str
) -> None:
    """The leader's own was once the right one whatever the others had: both of them stopped."""

    async def story() -> None:
        three, failed = Configurations(dict.fromkeys("abc", b"")), list[BaseException]()
        made = Checkpoints(
            CheckpointLimits(), MadeMachine(), DurableJournal(Path("j"), FakeFiles()),
            failed.append,
        )  # fmt: skip
        made._asked = 1
        for name, digest in claims.items():
            made.heard(name, 1, digest.encode() * 16)
        proposed: list[ops.Op] = []
        for _ in range(2):
            made.lead(proposed.append, "a", three.agree)
            made._undecided_since = made._undecided_since and made._undecided_since - 10
        assert [type(op) for op in proposed] == [ops.Digest] * told
        assert len(failed) == bool(stops)
        assert all(isinstance(e, UserError) and stops in str(e) for e in failed)

    run(story())


def test_figures_tell_of_stalls_checkpoints_and_syncs(tmp_path: Path) -> None:
    async def story() -> None:
        async with trio(tmp_path) as t:
            await t.mkdir()
            one = t.replicas[0]
            await t.until(lambda: one.figures()["raftfs_checkpoints_total"], "a checkpoint")
            await t.until(lambda: t.stores[0].freezing is None, "its end")
            time.sleep(0.3)  # the loop stands still
            await asyncio.sleep(0.05)
            after = one.figures()
            assert after["raftfs_loop_stall_longest_seconds"] > 0.25
            t.files[0].delay_s = 0.2
            for _ in range(3):
                await t.mkdir()
            await t.until(lambda: t.files[0].slow_syncs, "a slow sync")
            t.files[0].delay_s = 0.0
            syncs = after["raftfs_journal_syncs_total"]
            await t.until(
                lambda: one.figures()["raftfs_journal_syncs_total"] > syncs, "the end of it"
            )
            assert one.figures()["raftfs_journal_sync_p99_seconds"] >= 0.2
            await t.mkdir()
            await t.until(
                lambda: one.figures()["raftfs_checkpoint_last_rows"] > 0, "a checkpoint with rows"
            )
            assert one.figures()["raftfs_elections_total"] >= 1

    run(story())


def test_a_stall_is_that_of_a_checkpoint_only_while_one_is_made() -> None:
    watch = LoopWatch()
    watch.turned(0.4)
    watch.checkpoint(begins=True)
    watch.turned(0.2)
    watch.turned(0.1)
    watch.checkpoint(begins=False)
    watch.turned(0.3)
    assert (watch.longest_s, watch.checkpoint_longest_s, watch.last_checkpoint_s) == (0.4, 0.2, 0.2)
    watch.checkpoint(begins=True)
    assert (watch.checkpoint_longest_s, watch.last_checkpoint_s) == (0.2, 0.0)


def test_times_are_of_the_last_thousand() -> None:
    times = Times()
    assert times.percentile(99) == 0.0
    for n in range(2_000):
        times.add(n)
    assert (times.count, times.percentile(50), times.percentile(99)) == (2_000, 1_500, 1_990)


_KEEPING = CheckpointLimits(quiet_s=0.1, tail_entries=5, tail_bytes=500, kept_bytes=1 << 20)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_learner_that_comes_late_gets_all_entries_unless_they_are_damaged(
    tmp_path: Path, damaged: bool
) -> None:
    """From the log that is kept behind the tail. Damage there costs it a part of the history; the
    leader goes on.
    """

    async def story() -> None:
        async with trio(tmp_path, _KEEPING, segment_bytes=2_000) as t:
            for _ in range(100):
                await t.mkdir()
            leader = t.leader()
            assert leader is not None
            journal = t.replicas[leader]._journal
            await t.until(
                lambda: len(journal.kept) > 3 and journal.oldest_behind_kept > 40, "a kept log"
            )
            assert journal.oldest_index == 1
            if damaged:
                path = tmp_path / f"{leader}" / "journal" / f"{2:012d}.seg"
                data = bytearray(path.read_bytes())
                data[200] ^= 1
                path.write_bytes(data)
            store = MetaStore(tmp_path / "learner" / "state.mdb")
            config = ReplicaConfig("metalogger", t.peers, tmp_path / "learner", learner=True)
            learner, got = Replica(config, store, KEY), list[int]()
            learner.on_applied.append(lambda index, data, applied: got.append(index))
            await learner.start()
            try:
                await t.mkdir()
                there = t.stores[leader].applied
                await t.until(lambda: store.applied >= there, "the learner")
            finally:
                await learner.stop()
                store.close()
            assert (got == list(range(2, got[-1] + 1))) is not damaged
            assert journal.kept.first_segment == (3 if damaged else 1)
            assert (t.leader(), t.replicas[leader].failed.done()) == (leader, False)
            assert len(journal.kept._loaded) <= 3

    run(story())
