"""A stop at every single call of a workload: what was synced is there, nothing else is made up."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from raftfs.chunk.disk import Disk
from raftfs.chunk.store import ChunkStore
from raftfs.const import BLOCK_SIZE
from raftfs.errors import ReplyError
from raftfs.wire.frame import piece_crcs
from tests.chunk.faults import CrashDoor, Stopped

CHUNK = 0x77
SPAN = 4 * BLOCK_SIZE

Step = tuple[str, int, int]  # write | zero: offset, length; raise: version; sync, retire
WORK: list[Step] = [
    ("write", 0, BLOCK_SIZE), ("write", BLOCK_SIZE, 1000), ("sync", 0, 0),
    ("write", BLOCK_SIZE + 1000, 700), ("write", BLOCK_SIZE + 1700, 300), ("write", 100, 50),
    ("sync", 0, 0),
    ("write", BLOCK_SIZE + 2000, BLOCK_SIZE), ("write", 600, 3000), ("zero", 0, BLOCK_SIZE),
    ("write", 10, 10), ("sync", 0, 0),
    ("raise", 2, 0), ("write", 5000, 5000), ("write", 3 * BLOCK_SIZE, 9), ("zero", 700, 5000),
    ("sync", 0, 0), ("retire", 0, 0),
    ("write", 2 * BLOCK_SIZE, BLOCK_SIZE), ("write", 3 * BLOCK_SIZE + 9, 9),
    ("write", 300, 100), ("raise", 3, 0), ("zero", BLOCK_SIZE, 2 * BLOCK_SIZE),
    ("retire", 0, 0), ("write", BLOCK_SIZE + 9, 99), ("write", 2 * BLOCK_SIZE, BLOCK_SIZE),
    ("sync", 0, 0), ("write", 2 * BLOCK_SIZE + 50, 1000),
]  # fmt: skip


class Promise:
    """What a reader may find: the synced content, and every content since."""

    def __init__(self) -> None:
        self.states = [bytes(SPAN)]  # the first is durable
        self.target = bytes(SPAN)  # differs from the last state while a step is under way
        self.ever_synced = False
        self.version, self.next_version = 1, 1

    def settle(self) -> None:
        """A sync has succeeded."""
        self.states, self.ever_synced = self.states[-1:], True

    def check(self, got: bytes, states: list[bytes]) -> None:
        """Every byte is that of one of the states."""
        for at in range(0, SPAN, 512):
            piece = got[at : at + 512]
            choices = [s[at : at + 512] for s in states]
            if piece not in choices:
                for i, byte in enumerate(piece):
                    assert byte in {c[i] for c in choices}, f"byte {at + i} was never {byte}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One disk's folder for all tests here: making its 256 folders takes longer than a test."""
    return tmp_path_factory.mktemp("disk")


def _run(store: ChunkStore, promise: Promise, work: list[Step], seed: int) -> None:
    rng = random.Random(seed)
    for what, offset, length in work:
        if what in ("write", "zero"):
            data = rng.randbytes(length) if what == "write" else bytes(length)
            last = promise.states[-1]
            promise.target = last[:offset] + data + last[offset + length :]
            if what == "write":
                store.write(CHUNK, promise.version, 1, True, offset, data,
                            piece_crcs(offset, data))  # fmt: skip
            else:
                store.zero(CHUNK, promise.version, 1, True, offset, length)
            promise.states.append(promise.target)
        elif what == "raise":
            promise.next_version = offset
            store.raise_version(CHUNK, offset, 1)
            promise.version = offset
            promise.settle()
        elif what == "sync":
            store.sync(CHUNK, promise.version)
            promise.settle()
        else:
            store._copies[CHUNK].retire()
            promise.settle()


def _kill(door: CrashDoor) -> None:
    door.kill()


def _cut(door: CrashDoor) -> None:
    door.power_cut(torn=False)


def _torn(door: CrashDoor) -> None:
    door.power_cut(torn=True)


def _look(store: ChunkStore, promise: Promise, killed: bool) -> None:
    copies = store.copies()
    if not copies:
        assert not promise.ever_synced
        return
    assert [c.chunk for c in copies] == [CHUNK]
    version = copies[0].version
    assert version in (promise.version, promise.next_version)
    try:
        got = bytes(store.read(CHUNK, version, 0, SPAN)[0])
    except ReplyError:
        if promise.ever_synced:
            raise
        return  # it was being made, and nobody was told that it is
    states = promise.states[-1:] if killed else promise.states
    promise.check(got, [*states, promise.target])


def _one_stop(
    path: Path, stop_at: int, after: Callable[[CrashDoor], None], work: list[Step], seed: int
) -> bool:
    """Run, stop, look, work on, look again. True when the work was not stopped any more."""
    rng = random.Random(seed * 10_007 + stop_at)
    door, promise = CrashDoor(rng, stop_at), Promise()
    for old in path.glob("77/*"):
        old.unlink()
    disk = Disk(path)
    store = ChunkStore([disk], door)
    done = True
    try:
        _run(store, promise, work, seed)
    except Stopped:
        done = False
    disk.close()
    after(door)
    disk = Disk(path)
    store = ChunkStore([disk])
    _look(store, promise, after is _kill)
    if store.copies() and promise.ever_synced:
        # What was settled stays: the copy takes work and keeps what nobody touches.
        version = store.copies()[0].version
        before = bytes(store.read(CHUNK, version, 0, SPAN)[0])
        store.write(CHUNK, version, 1, False, 77, b"again", piece_crcs(77, b"again"))
        store.close()
        disk = Disk(path)
        store = ChunkStore([disk])
        got = bytes(store.read(CHUNK, version, 0, SPAN)[0])
        assert got == before[:77] + b"again" + before[82:]
    store.close()
    return done


@pytest.mark.parametrize("after", [_kill, _cut, _torn])
def test_a_stop_at_every_call(folder: Path, after: Callable[[CrashDoor], None]) -> None:
    seed, stop_at, done = 1, 0, False
    while not done:
        stop_at += 1
        print("seed", seed, "stop", stop_at)
        done = _one_stop(folder, stop_at, after, WORK, seed)
    assert stop_at > 60


def _random_work(rng: random.Random) -> list[Step]:
    work: list[Step] = [("write", 0, 2 * BLOCK_SIZE), ("sync", 0, 0)]
    version = 1
    for _ in range(16):
        offset = rng.randrange(4) * BLOCK_SIZE + rng.choice([0, 0, 100, 65_000])
        length = min(rng.choice([10, 600, 5000, BLOCK_SIZE, BLOCK_SIZE + 99]), SPAN - offset)
        what = rng.choice(["write", "write", "write", "zero", "sync", "retire", "raise"])
        version += what == "raise"
        work.append((what, version if what == "raise" else offset, length))
    return work


@pytest.mark.parametrize("seed", range(30))
def test_random_work_stopped_somewhere(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    work = _random_work(rng)
    for after in (_kill, _cut, _torn, _torn):
        stop_at = rng.randrange(1, 60)
        print("seed", seed, "stop", stop_at, after.__name__)
        _one_stop(folder, stop_at, after, work, seed)
