"""A snapshot on its way: what is lost is sent again, whoever is stopped begins anew at once."""

import asyncio
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pysyncobj.node import Node

from raftfs.meta.raft.messages import SnapshotNext, SnapshotPiece
from raftfs.meta.raft.snapshot import PIECE_BYTES, SnapshotReceiver, SnapshotSender

B = Node("b")


class Wire:
    """A sender and a receiver; messages wait until they are let through."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.content = folder, os.urandom(size)
        self.pieces: list[SnapshotPiece] = []
        self.answers: list[SnapshotNext] = []
        self.done: list[int] = []
        self.installed: list[bytes] = []
        self.sender = SnapshotSender(
            folder, self._copy, lambda node, m: not self.pieces.append(m),
            lambda node, index: self.done.append(index), 1,
        )  # fmt: skip
        self.restart()

    def _copy(self, path: Path) -> tuple[int, int]:
        path.write_bytes(self.content)
        return 100, 3

    async def _install(self, path: Path, index: int, term: int) -> None:
        self.installed.append(path.read_bytes())

    def restart(self) -> None:
        """The receiver was killed: it knows nothing of before, but its files are there."""
        self.receiver = SnapshotReceiver(
            self.folder, lambda: 7, self._install, lambda node, m: not self.answers.append(m)
        )

    async def begin(self) -> None:
        """Until the first pieces are on their way."""
        self.sender.offer(B)
        while not self.pieces:
            await asyncio.sleep(0.01)

    async def carry(
        self, rounds: int, keep: Callable[[SnapshotPiece], bool] = lambda m: True
    ) -> None:
        """Let messages through, but for pieces that are lost."""
        for _ in range(rounds):
            pieces, self.pieces = self.pieces, []
            for piece in filter(keep, pieces):
                self.receiver.piece(B, piece)
            if self.receiver._task is not None:
                await self.receiver._task
            answers, self.answers = self.answers, []
            for answer in answers:
                self.sender.answered(B, answer)

    def silence(self) -> None:
        """Some time passes without an answer; then the leader offers again."""
        (transfer,) = self.sender._transfers.values()
        transfer.heard -= 3.0
        self.sender.offer(B)


def run(story: Any) -> None:
    asyncio.run(story)


def test_a_snapshot_arrives(tmp_path: Path) -> None:
    async def story() -> None:
        wire = Wire(tmp_path, 30 * PIECE_BYTES)
        await wire.begin()
        await wire.carry(40)
        assert wire.installed == [wire.content] and wire.done == [100]
        assert not [p for p in tmp_path.iterdir()], "nothing is left behind"

    run(story())


def test_whoever_is_killed_in_the_middle_begins_anew_at_once(tmp_path: Path) -> None:
    """It once waited for a minute, until the leader gave the transfer up."""

    async def story() -> None:
        wire = Wire(tmp_path, 30 * PIECE_BYTES)
        await wire.begin()
        for _ in range(3):
            await wire.carry(2)
            assert (tmp_path / "snapshot.in").stat().st_size > PIECE_BYTES
            wire.restart()
            assert not (tmp_path / "snapshot.in").exists()
            wire.pieces.clear()
            wire.silence()
        await wire.carry(40)
        assert wire.installed == [wire.content] and wire.done == [100]

    run(story())


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    """Copies of the whole state once stayed on the disk for ever."""
    left = ["snapshot-17.out", "snapshot-17.copy", "snapshot.in", "snapshot.new"]
    for name in [*left, "state.mdb"]:
        (tmp_path / name).write_bytes(b"x")

    async def story() -> None:
        Wire(tmp_path, 10)

    run(story())
    assert [path.name for path in tmp_path.iterdir()] == ["state.mdb"]


def test_lost_pieces_are_sent_again(tmp_path: Path) -> None:
    async def story() -> None:
        wire = Wire(tmp_path, 30 * PIECE_BYTES)
        await wire.begin()
        chance = random.Random(1)
        for _ in range(60):
            await wire.carry(2, lambda piece: chance.random() > 0.3)
            if wire.done:
                break
            wire.silence()
        assert wire.installed == [wire.content] and wire.done == [100]

    run(story())
