"""A stop at every single step: synced bytes are there afterwards, and nobody reads wrong ones.

Random scripts of writes, zeroings, syncs, raises and rests are cut off at each call that changes
a file, by a kill (what was written is there) or by a power cut (see `crashdoor.py`); then the store
is opened again, everything is read, changed and read again.

To repeat one: RAFTFS_SEED=<seed> python -m pytest tests/chunk/test_crash.py
"""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from raftfs.chunk import disk
from raftfs.chunk.disk import Disk
from raftfs.chunk.store import ChunkStore
from raftfs.chunk.unrest import UNREST
from raftfs.const import BLOCK_SIZE
from raftfs.errors import ReplyError, Status
from raftfs.wire.frame import piece_crcs
from tests.chunk.crashdoor import SECTOR, CrashDoor, Kill

REGION = 5 * BLOCK_SIZE + 1536
SEEDS = [int(os.environ["RAFTFS_SEED"])] if "RAFTFS_SEED" in os.environ else list(range(20))
CHUNKS = (1, 2)


class Model:
    """What a chunk may hold. `states`: contents since the last sync, the newest last."""

    def __init__(self) -> None:
        self.exists = False
        self.synced = False
        self.version = 1
        self.maybe_version: int | None = None
        self.states = [bytes(REGION)]
        self.doing: bytes | None = None  # the content if the operation under way takes effect

    @property
    def now(self) -> bytes:
        return self.states[-1]


class Story:
    """A random script on a store, and what must be true of it."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self.door = CrashDoor(random.Random(seed))
        self.boot = 0
        self.store = self.open()
        self.store.join(b"c" * 16)

    def open(self) -> ChunkStore:
        disk = Disk(self.root, leave_free=0)
        return ChunkStore([disk], self.door, open_files_max=1, boot=f"boot {self.boot}")

    def power_cut(self) -> None:
        self.door.power_cut()
        self.boot += 1

    def reset(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.token = 1
        self.models = {chunk: Model() for chunk in CHUNKS}

    def reopen(self) -> None:
        self.store._disks[0].close()
        self.store = self.open()

    # --- steps

    def run(self, steps: int) -> None:
        for _ in range(steps):
            chunk = self.draw.choice(CHUNKS)
            kinds = ("write", "write", "write", "write", "zero", "sync", "sync", "raise", "rest")
            getattr(self, "_" + self.draw.choice(kinds))(chunk, self.models[chunk])

    def _range(self) -> tuple[int, int]:
        border = self.draw.randrange(0, 6) * BLOCK_SIZE + self.draw.choice((-512, -3, 0, 0, 5, 900))
        offset = min(max(0, border), REGION - 1)
        length = self.draw.choice((1, 7, 512, 3000, BLOCK_SIZE - 5, BLOCK_SIZE, 2 * BLOCK_SIZE + 9))
        return offset, min(length, REGION - offset)

    def _change(self, model: Model, offset: int, data: bytes) -> None:
        model.doing = model.now[:offset] + data + model.now[offset + len(data) :]

    def _did(self, model: Model) -> None:
        assert model.doing is not None
        model.exists = True
        model.states.append(model.doing)
        model.doing = None

    def _write(self, chunk: int, model: Model) -> None:
        offset, length = self._range()
        data = self.draw.randbytes(length)
        self._change(model, offset, data)
        if self.draw.random() < 0.2:
            self.token += 1
        self.store.write(chunk, model.version, self.token, True, offset, memoryview(data),
                         piece_crcs(offset, data))  # fmt: skip
        self._did(model)

    def _zero(self, chunk: int, model: Model) -> None:
        offset, length = self._range()
        self._change(model, offset, bytes(length))
        self.store.zero(chunk, model.version, self.token, True, offset, length)
        self._did(model)

    def _sync(self, chunk: int, model: Model) -> None:
        if model.exists:
            self.store.sync(chunk, model.version)
            model.states, model.synced = [model.now], True

    def _raise(self, chunk: int, model: Model) -> None:
        if model.exists:
            self.token += 1
            model.maybe_version = model.version + self.draw.randrange(1, 3)
            self.store.raise_version(chunk, model.maybe_version, self.token)
            model.version, model.maybe_version = model.maybe_version, None
            model.states, model.synced = [model.now], True

    def _rest(self, chunk: int, model: Model) -> None:
        self.store.rest_idle(-1.0)

    # --- after a crash

    def check(self, *, power: bool) -> None:
        for chunk, model in self.models.items():
            try:
                self._check(chunk, model, power=power)
            except ReplyError as e:
                lost = e.status in (Status.NO_CHUNK, Status.BAD_CRC)
                never = not model.exists if not power else not model.synced
                assert lost and never, f"chunk {chunk}: {e}"
                self.models[chunk] = Model()
                self.models[chunk].version = 10 + model.version
                for version in (model.version, model.maybe_version or 0):
                    self.store.set_aside(chunk, version)

    def _check(self, chunk: int, model: Model, *, power: bool) -> None:
        version = self.store.version_of(chunk)
        if version is None:
            raise ReplyError(Status.NO_CHUNK)
        assert version in (model.version, model.maybe_version)
        doubtful = self.store.is_doubtful(chunk)
        assert power or not doubtful
        if doubtful:
            with pytest.raises(ReplyError):  # nobody reads it before the leader has decided
                self._read(chunk, version)
            self.token += 1
            version += 1
            self.store.raise_version(chunk, version, self.token)
        content = self._read(chunk, version)
        allowed = list(model.states) if doubtful else [model.now]
        if model.doing is not None:
            allowed.append(model.doing)
        for at in range(0, REGION, SECTOR):
            piece = content[at : at + SECTOR]
            states = {a[at : at + SECTOR] for a in allowed}
            # A mixture of states is what a sector is after its file's size was cut inside it.
            if piece not in states:
                mixture = all(p in column for p, *column in zip(piece, *states, strict=True))
                assert doubtful and mixture, f"chunk {chunk} at {at}"
        model.version, model.maybe_version, model.doing = version, None, None
        model.exists = True
        model.states = [content] if doubtful else [*model.states, content]

    def _read(self, chunk: int, version: int) -> bytes:
        data, crcs = self.store.read(chunk, version, 0, REGION)
        assert crcs == piece_crcs(0, data)
        return bytes(data)

    def go_on(self) -> None:
        """The store works after the crash: change a little everywhere, read all."""
        for chunk, model in self.models.items():
            for block in range(5):
                offset = block * BLOCK_SIZE + 77
                self._change(model, offset, b"after")
                self.store.write(chunk, model.version, self.token, True, offset,
                                 memoryview(b"after"), piece_crcs(offset, b"after"))  # fmt: skip
                self._did(model)
            assert self._read(chunk, model.version) == model.now


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A disk with the two folders that the chunks are in: it is opened thousands of times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk, "_FOLDERS", ["01", "02"])
        yield tmp_path_factory.mktemp("disk")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("crash", ["kill", "power cut", "kill, then power cut"])
def test_a_stop_at_any_step_loses_nothing_synced(root: Path, seed: int, crash: str) -> None:
    print(f"RAFTFS_SEED={seed} python -m pytest tests/chunk/test_crash.py -k '{crash}'")
    _empty(root)
    story = Story(root, seed)
    try:
        _tell(story, root, seed, crash)
    finally:
        story.store._disks[0].close()


def _empty(root: Path) -> None:
    for path in (*root.glob("0[12]/*"), *root.glob(UNREST + "*")):
        path.unlink()


def _tell(story: Story, root: Path, seed: int, crash: str) -> None:
    die_at = 0
    while True:
        die_at += 1 if crash == "kill" else random.Random(die_at).randrange(1, 4)
        story.door.wipe()
        _empty(root)
        story.reopen()
        story.reset(seed)
        story.door.arm(die_at)
        try:
            story.run(14)
            break
        except Kill:
            pass
        if crash == "power cut":
            story.power_cut()
        else:
            story.door.revive()
        story.reopen()
        story.check(power=crash == "power cut")
        if crash == "kill, then power cut":
            story.door.arm(random.Random(die_at).randrange(1, 20))
            try:
                story.run(5)
            except Kill:
                pass
            story.power_cut()
            story.reopen()
            story.check(power=True)
        story.go_on()
    assert die_at > 20
