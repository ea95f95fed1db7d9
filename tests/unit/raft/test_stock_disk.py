"""Faults of stock pysyncobj in what it keeps and finds on its disk, asked of both sides. Numbers as
in docs/known-faults.md.
"""

import asyncio
import os
import struct
import threading
from pathlib import Path
from typing import Any

import pytest
from pysyncobj import journal as stock_journal
from pysyncobj.journal import FileJournal
from pysyncobj.node import Node
from pysyncobj.serializer import Serializer

from raftfs.const import BATCH_BYTES_MAX, CONTROL_FRAME_MAX
from raftfs.errors import UserError
from raftfs.meta.raft import snapshot
from raftfs.meta.raft.journal import SEGMENT_BYTES, DurableJournal
from raftfs.meta.raft.messages import Ack, SnapshotNext, SnapshotPiece
from raftfs.meta.raft.replica import Replica, ReplicaConfig
from raftfs.meta.raft.safety import SafeSyncObj
from raftfs.meta.store import MetaStore
from raftfs.wire.auth import ClusterKey
from raftfs.wire.frame import crc32
from tests.unit.raft.disks import FakeFiles, PowerCut
from tests.unit.raft.stock import B, StockNode, both, verdict
from tests.unit.raft.test_journal import SMALL, entry, journal
from tests.unit.raft.test_safety import Wire, append, entries
from tests.unit.store.driver import Driver

FOLDER = Path("journal")


@both
def test_h1_nothing_is_acknowledged_before_the_disk_has_it(
    side: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Real files; what happens in which order."""
    happened: list[str] = []

    def spy(name: str, original: Any) -> Any:
        def call(*args: Any) -> Any:
            happened.append(name)
            return original(*args)

        return call

    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, spy("sync", getattr(os, name)))
    flush = stock_journal.ResizableFile.flush
    monkeypatch.setattr(stock_journal.ResizableFile, "flush", spy("sync", flush))
    if side == "stock":
        node = StockNode(journalFile=str(tmp_path / "j"))
        node.append([], 1, 0)  # the term is known, so nothing but the entries is to be written
        happened.clear()
        monkeypatch.setattr(node.wire, "send", spy("ack", node.wire.send))
        node.append(range(2, 10), 1, 0, commit=9)
        for _ in range(3):
            node.doTick(0)
    else:
        wire, log = Wire(), DurableJournal(tmp_path)
        log.add(b"\x01", 1, 0)
        core = SafeSyncObj("a", ["b", "c"], log, wire, lambda *_: None, lambda node: None)
        core.receive(B, append([], 1, 0))
        core.tick()
        wire.take(Ack)
        monkeypatch.setattr(wire, "send", spy("ack", wire.send))
        happened.clear()
        core.receive(B, append(entries(*range(2, 10)), 1, 0))
        core.tick()
        assert wire.take(Ack)
    assert "ack" in happened
    verdict(side, "sync" not in happened[: happened.index("ack")])


@both
def test_h2_a_state_newer_than_the_trimming_of_the_log_costs_nothing(
    side: str, tmp_path: Path
) -> None:
    """The state at entry 8 is on the disk, the log was not trimmed yet, it goes up to 10: kill."""
    if side == "stock":
        conf = {
            "journalFile": str(tmp_path / "j"), "fullDumpFile": str(tmp_path / "d"),
            "useFork": False,
        }  # fmt: skip
        node = StockNode(**conf)
        node.append(range(2, 11), 1, 0, commit=8)  # 9 and 10 are acknowledged, so they count
        node.doTick(0)
        node.forceLogCompaction()
        node.doTick(0)
        assert node.indexes() == list(range(1, 11)) and (tmp_path / "d").exists()
        again = StockNode(**conf)
        again.doTick(0)
        verdict(side, again.indexes()[-1] == 8)
    else:
        files = FakeFiles()
        j = journal(files)
        for index in range(1, 11):
            j.add(*entry(index))
        j.sync()
        again_ours = DurableJournal(FOLDER, files.after_kill(), SMALL, checkpointed=8)
        verdict(side, not again_ours.fits(8, 1) or again_ours.last_index != 10)
        assert [e for e in again_ours[:]] == [entry(n) for n in (8, 9, 10)]


@both
def test_h3_a_kill_at_each_step_of_compaction_loses_no_entry(side: str, tmp_path: Path) -> None:
    kept = set(range(80, 121))
    lost = steps = 0
    while True:
        steps += 1
        if side == "stock":
            ended, found = _compacted_stock(tmp_path / f"j{steps}", kill_at=steps)
        else:
            ended, found = _compacted_ours(kill_at=steps)
        lost += not kept <= found
        if ended:
            break
    assert steps > 3
    verdict(side, lost > 0)


def _compacted_stock(path: Path, kill_at: int) -> tuple[bool, set[int]]:
    """Whether it came to the end, and the entries after a restart."""
    j = FileJournal(str(path))
    for index in range(1, 121):
        j.add(*entry(index))
    calls, original = [0], j.add

    def add(*args: Any) -> None:
        calls[0] += 1
        if calls[0] == kill_at:
            raise PowerCut
        original(*args)

    j.add = add
    ended = False
    try:
        j.deleteEntriesTo(79)
        ended = True
    except PowerCut:
        pass
    again = FileJournal(str(path))
    return ended, {again[k][1] for k in range(len(again))}


def _compacted_ours(kill_at: int) -> tuple[bool, set[int]]:
    files = FakeFiles()
    j = journal(files)
    for index in range(1, 121):
        j.add(*entry(index))
        j.sync()
    files._fail_at = files.calls + kill_at
    ended = False
    try:
        j.unlink_before(j.compact(100, keep_entries=20, keep_bytes=10_000))
        ended = True
    except PowerCut:
        pass
    files._fail_at = 0
    found = {e[1] for e in journal(files.after_kill())[:]}
    assert found == {e[1] for e in journal(files.after_power_cut())[:]}
    return ended, found


@both
def test_h9_a_damaged_state_does_not_start_empty(side: str, tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"garbage" * 1000)
    if side == "stock":
        node = StockNode(fullDumpFile=str(tmp_path / "state"))
        node.doTick(0)
        node.serve()
        verdict(side, node._isLeader() and node.values == [])
    else:
        with pytest.raises(UserError, match="state"):
            MetaStore(tmp_path / "state")
        verdict(side, False)


@both
def test_h10_a_log_without_its_state_does_not_start_empty(side: str, tmp_path: Path) -> None:
    if side == "stock":
        conf = {"journalFile": str(tmp_path / "j")}  # and no fullDumpFile: it is taken
        node = StockNode(**conf)
        node.append(range(2, 31), 1, 0, commit=30)
        node.doTick(0)
        node.forceLogCompaction()
        for _ in range(3):
            node.doTick(0)
        again = StockNode(**conf)
        for _ in range(3):
            again.doTick(0)
        verdict(side, again.values == [] and again.indexes()[0] > 1)
    else:
        j = DurableJournal(tmp_path / "journal", segment_bytes=SMALL)
        for index in range(1, 41):
            j.add(*entry(index))
            j.sync()
        j.unlink_before(j.compact(40, keep_entries=2, keep_bytes=10_000))
        j._destroy()

        async def start() -> None:
            store = MetaStore(tmp_path / "state.mdb")
            config = ReplicaConfig("h:1", ("h:1",), tmp_path)
            with pytest.raises(UserError, match="replace this master"):
                await Replica(config, store, ClusterKey(b"k" * 32)).start()

        asyncio.run(start())
        verdict(side, False)


@both
def test_h11_a_snapshot_with_a_hole_replaces_nothing(side: str, tmp_path: Path) -> None:
    parts = [bytes([n]) * 1000 for n in range(5)]
    if side == "stock":
        (tmp_path / "d").write_bytes(b"good")
        stock = Serializer(str(tmp_path / "d"), 1000, False, None, None, None)
        for number, part in enumerate([*parts, b""]):
            if number != 2:  # lost, as in a reconnect
                stock.setTransmissionData((part, number == 0, part == b""))
        verdict(side, (tmp_path / "d").read_bytes() == b"".join(parts[:2] + parts[3:]))
        return
    installed, sent = _received(tmp_path, parts, lost=2)
    assert sent[-1].offset == 2000, "what is missing is asked for"
    verdict(side, installed != [])
    installed, sent = _received(tmp_path, parts, damaged=3)
    assert sent[-1].offset == 3000, "and what was damaged on the way"
    verdict(side, installed != [])


@both
def test_h11_an_older_snapshot_does_not_replace_a_newer_state(side: str, tmp_path: Path) -> None:
    if side == "stock":
        (tmp_path / "d").write_bytes(b"state after 900")
        stock = Serializer(str(tmp_path / "d"), 1000, False, None, None, None)
        for part, first, last in ((b"state after 10", True, False), (b"", False, True)):
            stock.setTransmissionData((part, first, last))
        verdict(side, (tmp_path / "d").read_bytes() == b"state after 10")
    else:
        installed, sent = _received(tmp_path, [b"x" * 1000], index=10, applied=900)
        assert sent[-1].offset == -1, "not wanted"
        verdict(side, installed != [])


def _received(
    folder: Path, parts: list[bytes], *, lost: int = -1, damaged: int = -1, index: int = 100,
    applied: int = 7,
) -> tuple[list[Any], list[SnapshotNext]]:  # fmt: skip
    """What a receiver makes of these pieces: what it installed and what it answered."""
    installed: list[Any] = []
    sent: list[SnapshotNext] = []

    async def install(path: Path, index: int, term: int) -> None:
        installed.append((index, term))

    async def story() -> None:
        receiver = snapshot.SnapshotReceiver(
            folder, lambda: applied, install, lambda node, m: not sent.append(m)
        )
        total = sum(map(len, parts))
        for number, part in enumerate(parts):
            data = part[:-1] + b"?" if number == damaged else part
            at = sum(map(len, parts[:number]))
            if number != lost:
                receiver.piece(B, SnapshotPiece(1, 5, index, 1, at, total, crc32(part), data))
        if receiver._task is not None:
            await receiver._task

    asyncio.run(story())
    return installed, sent


@both
def test_h12_a_damaged_vote_is_not_taken_for_none(side: str, tmp_path: Path) -> None:
    if side == "stock":
        j = FileJournal(str(tmp_path / "j"))
        j.setCurrentTerm(7, "b")
        path = Path(j._FileJournal__metaStorer.getPath())
        path.write_bytes(path.read_bytes()[:-5])
        again = FileJournal(str(tmp_path / "j"))
        verdict(side, (again.getCurrentTerm(), again.getVotedForNodeId()) == (0, None))
        return
    files = FakeFiles()
    ours = journal(files)
    begin = ours._offset
    ours.setCurrentTerm(7, "b")
    end = ours._offset
    ours.add(*entry(1))
    ours.sync()
    (name,) = files.content
    taken_for_none = []
    for at in range(begin, end):
        after = files.after_kill()
        after.content[name][at] ^= 0x10
        try:
            taken_for_none.append(journal(after).getVotedForNodeId() is None)
        except UserError as e:
            assert "damaged" in str(e)
    verdict(side, taken_for_none != [])


@both
def test_h22_a_checkpoint_forks_nothing(
    side: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A child would keep the listening sockets, and outlive a parent that is killed."""
    forks: list[int] = []

    def fork() -> int:
        forks.append(1)
        return 12345

    monkeypatch.setattr(os, "fork", fork)
    if side == "stock":
        node = StockNode(fullDumpFile=str(tmp_path / "d"))
        node.append(range(2, 11), 1, 0, commit=10)
        node.doTick(0)
        node.forceLogCompaction()
        node.doTick(0)
    else:
        d = Driver(tmp_path / "state.mdb")
        d.create(b"a")
        d.checkpoint()
        d.store.copy_to(tmp_path / "copy")
        assert d.store.checkpointed == d.store.applied
    verdict(side, forks != [])


@both
def test_h23_a_snapshot_is_not_unpacked_in_the_loop(
    side: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    threads: list[threading.Thread] = []
    if side == "stock":
        node = StockNode(fullDumpFile=str(tmp_path / "d"), useFork=False)
        original = node.private("serializer").deserialize

        def deserialize() -> Any:
            threads.append(threading.current_thread())
            return original()

        monkeypatch.setattr(node.private("serializer"), "deserialize", deserialize)
        for part, first, last in ((b"x", True, False), (b"", False, True)):
            node.receive(B, "append_entries", term=1, commit_index=1,
                         serialized=(part, first, last))  # fmt: skip
    else:
        def unpack(self: Any, plain: Path) -> None:
            threads.append(threading.current_thread())

        monkeypatch.setattr(snapshot.SnapshotReceiver, "_unpack", unpack)
        installed, _ = _received(tmp_path, [b"x" * 1000])
        assert installed == [(100, 1)]
    verdict(side, threads == [threading.main_thread()])


@both
def test_h24_a_log_has_no_end_at_4_gib(side: str, tmp_path: Path) -> None:
    if side == "stock":
        j = FileJournal(str(tmp_path / "j"))
        j._FileJournal__currentOffset = 2**32 - 10
        original = j._FileJournal__journalFile.write
        j._FileJournal__journalFile.write = lambda at, data: original(min(at, 500), data)
        try:
            j.add(*entry(1))
            verdict(side, False)
        except struct.error:
            verdict(side, True)
        return
    assert 2 * max(SEGMENT_BYTES, BATCH_BYTES_MAX, CONTROL_FRAME_MAX) < 2**32, "places have 32 bits"
    files = FakeFiles()
    ours = journal(files)
    ours._segments, ours._blob_number = [2**40], 2**40  # as after many years
    files.content.clear()
    ours._begin_segment()
    for index in range(1, 31):
        ours.add(*entry(index))
        ours.sync()
    again = journal(files.after_power_cut())
    verdict(side, [e for e in again[:]] != [entry(n) for n in range(1, 31)])
    assert again._segments[0] > 2**40


def test_what_was_snapshot_is_all_that_its_sending_proves(tmp_path: Path) -> None:
    """The first form counted the whole log as matched, and the old tail that stayed behind it."""
    wire, log = Wire(), DurableJournal(FOLDER, FakeFiles())
    for number, term in ((1, 0), *((n, 1) for n in range(2, 41))):
        log.add(b"\x00", number, term)
    core = SafeSyncObj("a", ["b", "c"], log, wire, lambda *_: None, lambda node: None)
    core._SyncObj__setCurrentTerm(3, "a")
    core._SyncObj__onBecomeLeader()
    core.sent_snapshot(Node("b"), 20)
    assert core.match_index[Node("b")] == 20 and core.next_index[Node("b")] >= 21
    core.tick()
    assert core.commit_index < 20, "and what is of an older term is not committed by it"
