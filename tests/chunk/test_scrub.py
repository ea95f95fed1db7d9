"""Rot: wherever a bit flips, no wrong byte is given away, and the next read or scrub finds it.

To repeat a case: SEED=<seed> python -m pytest tests/chunk/test_scrub.py -k bit
"""

import errno
import os
import random
import shutil
import threading
import time
from pathlib import Path

import pytest

from raftfs.chunk import scrub, strangers
from raftfs.chunk.door import FileDoor
from raftfs.chunk.scrub import DiskScrub, Pace, Scrubber
from raftfs.chunk.scrubstate import MARKS_MAX, ScrubState
from raftfs.chunk.store import ChunkStore
from raftfs.const import BLOCK_SIZE, MIB
from raftfs.errors import ReplyError, Status
from raftfs.wire.messages import CopyId, Damage
from tests.chunk.parts import aside, chunk_file, ids, make_store, noise, read, write

FLIPS = 200
SEED = int(os.environ.get("SEED", "1"))
CHUNKS = {0x101: 3 * BLOCK_SIZE + 700, 0x102: 900, 0x203: BLOCK_SIZE, 0x30A: 2 * BLOCK_SIZE + 1}


def sweep(store: ChunkStore, number: int = 0) -> DiskScrub:
    """One whole cycle, at once, in this thread."""
    work = DiskScrub(store, number, 1e5)
    work._look_around()
    assert work._cycle()
    return work


def listen(store: ChunkStore) -> list[Damage]:
    """What the masters are told from now on."""
    told: list[Damage] = []
    store.report = lambda made, gone, damaged: told.extend(damaged)
    return told


class Flip:
    """A bit of one copy, drawn by the part of the file that it is in."""

    def __init__(self, draw: random.Random, root: Path, part: str) -> None:
        self.chunk = draw.choice(sorted(CHUNKS))
        self.part = part
        self.path = chunk_file(root, self.chunk)
        size = self.path.stat().st_size
        blocks = -(-CHUNKS[self.chunk] // BLOCK_SIZE)
        name = self.path.name
        first, last = {
            "data": (8192, size), "table": (4096, 4096 + 4 * blocks), "header": (0, 4096),
            "name": (0, len(name)),
        }[part]  # fmt: skip
        self.at, self.bit = draw.randrange(first, last), draw.randrange(7 if part == "name" else 8)

    def do(self) -> None:
        """Flip it."""
        if self.part == "name":
            name = bytearray(self.path.name.encode())
            name[self.at] ^= 1 << self.bit
            if b"/" in name:  # the dot: no file system can do that to a name
                name[self.at] ^= 1 << self.bit | 2
            self.path.rename(self.path.with_name(name.decode()))
            return
        with open(self.path, "r+b") as file:
            file.seek(self.at)
            (byte,) = file.read(1)
            file.seek(self.at)
            file.write(bytes([byte ^ 1 << self.bit]))


def wrong_reads(store: ChunkStore, content: dict[int, bytes]) -> int:
    """Every block of every copy is read as clients do; gives how many reads gave other bytes."""
    wrong = 0
    for chunk, version in sorted((c.chunk, c.version) for c in store.copies()):
        truth = content.get(chunk, b"")
        for offset in range(0, max(1, len(truth)), BLOCK_SIZE):
            expect = truth[offset : offset + BLOCK_SIZE] or b"?"
            try:
                wrong += read(store, chunk, offset, len(expect), version=version) != expect
            except ReplyError as e:
                assert e.status in (Status.BAD_CRC, Status.NO_CHUNK)
    return wrong


@pytest.mark.parametrize("found_by", ["read", "scrub", "scrub, in memory"])
def test_each_of_many_flipped_bits_is_found_and_no_wrong_byte_is_read(
    tmp_path: Path, found_by: str
) -> None:
    """A third of `FLIPS` in each way: by the next read after a restart, by the scrub after one, or
    by the scrub while the copy is in use.
    """
    print(f"SEED={SEED} python -m pytest tests/chunk/test_scrub.py -k bit")
    draw = random.Random(f"{SEED} {found_by}")
    content = {chunk: draw.randbytes(size) for chunk, size in CHUNKS.items()}
    store = make_store(tmp_path)
    for chunk, data in content.items():
        write(store, chunk, 0, data, version=2)
        store.raise_version(chunk, 6, 6)
    store.close()
    saved = {path: path.read_bytes() for path in map(lambda c: chunk_file(tmp_path, c), CHUNKS)}
    flips = FLIPS // 3 + 1
    detected = wrong = 0
    for number in range(flips):
        store = make_store(tmp_path)
        flip = Flip(draw, tmp_path, ("data", "table", "header", "name")[number % 4])
        if found_by == "scrub, in memory":
            read(store, flip.chunk, 0, 1, version=6)
        else:
            store.close()
        flip.do()
        if found_by != "scrub, in memory":
            store = make_store(tmp_path)
        told = listen(store)
        if found_by == "read":
            wrong += wrong_reads(store, content)
        else:
            sweep(store)
        detected += is_detected(store, flip, told)
        wrong += wrong_reads(store, content)
        store.close()
        shutil.rmtree(tmp_path / "quarantine", ignore_errors=True)
        for path in tmp_path.glob("??/*"):
            path.unlink()
        for path, raw in saved.items():
            path.write_bytes(raw)
    assert (detected, wrong) == (flips, 0)


def is_detected(store: ChunkStore, flip: Flip, told: list[Damage]) -> bool:
    """It was told and does not count; or it has its name back. (A copy that cannot be read under
    its name after a restart has never been counted.)
    """
    counts = CopyId(flip.chunk, 6) in store.copies()
    if flip.part != "name":
        (story,) = told
        parts = {"data": ("data", "table"), "table": ("table", "data"), "header": ("header",)}
        assert story.part in parts[flip.part] and story.chunk == flip.chunk
        return not counts and flip.path.exists() and ids(store.damages()) == ids(told)
    sweep(store)
    mended = CopyId(flip.chunk, 6) in store.copies() and flip.path.exists()
    return mended and told[-1].part == "name" and (told[-1].expected == flip.path.name)


def rot(path: Path, at: int) -> None:
    """Flip one bit."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def test_the_last_copy_stays_and_gives_its_good_blocks_away(tmp_path: Path) -> None:
    content = noise(1, 3 * BLOCK_SIZE)
    store = make_store(tmp_path)
    write(store, 1, 0, content)
    store.close()
    path = chunk_file(tmp_path, 1)
    rot(path, 8192 + BLOCK_SIZE + 5)
    for _ in range(2):  # also after a restart, which would tell the masters of a good copy
        store = make_store(tmp_path)
        told = listen(store)
        for block in (0, 2, 1):
            at = block * BLOCK_SIZE
            if block != 1:
                assert read(store, 1, at, BLOCK_SIZE) == content[at : at + BLOCK_SIZE]
                continue
            with pytest.raises(ReplyError) as e:
                read(store, 1, at, BLOCK_SIZE)
            assert e.value.status == Status.BAD_CRC
        assert store.copies() == [] and store.version_of(1) is None and len(store) == 1
        (story,) = store.damages()
        assert (story.block, story.found_by, story.part) == (1, "read", "data")
        assert story.disk == str(tmp_path) and story.expected != story.found
        for refused in (
            lambda s: write(s, 1, 0, b"new"), lambda s: s.sync(1, 1), lambda s: s.block_list(1, 1),
            lambda s: s.raise_version(1, 2, 2), lambda s: s.confirm(1, 1),
        ):  # fmt: skip
            with pytest.raises(ReplyError) as e:
                refused(store)
            assert e.value.status == Status.BAD_CRC
        store.close()
    assert told == []  # it had been told before
    store = make_store(tmp_path)
    store.set_aside(1, 2)
    assert path.exists()
    store.set_aside(1, 1)
    assert not path.exists() and len(store) == 0
    (kept,) = store.quarantines()[0].kept()
    assert kept.story == story and kept.path.stat().st_size == 8192 + len(content)
    store.close()
    store = make_store(tmp_path)
    assert store.damages() == [] and len(store) == 0
    store.close()


def test_a_good_copy_is_never_set_aside_and_an_adopted_one_takes_the_damaged_ones_place(
    tmp_path: Path,
) -> None:
    content = noise(2, 1000)
    store = make_store(tmp_path)
    write(store, 1, 0, content)
    store.rest_idle(-1.0)
    store.set_aside(1, 1)
    assert store.copies() == [CopyId(1, 1)]
    path = chunk_file(tmp_path, 1)
    part = path.with_suffix(".mfs.part")
    part.write_bytes(path.read_bytes())
    rot(path, 8192)
    sweep(store)
    assert store.copies() == []
    store.adopt(1, 1, store.disks()[0], part)
    assert store.copies() == [CopyId(1, 1)] and read(store, 1, 0, 1000) == content
    assert len(aside(tmp_path)) == 1
    store.close()


def test_the_quarantine_is_bounded_in_age_and_size(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    for chunk in (1, 2, 3):
        write(store, chunk, 0, noise(chunk, 5000))
    store.rest_idle(-1.0)
    for chunk in (1, 2, 3):
        rot(chunk_file(tmp_path, chunk), 8200)
    sweep(store)
    for chunk in (1, 2, 3):
        store.set_aside(chunk, 1)
        time.sleep(0.002)  # their age is told in milliseconds
    (quarantine,) = store.quarantines()
    oldest, *_, newest = quarantine.kept()
    assert quarantine.drop_old(now=oldest.since + 7 * 86_400 - 1, disk_bytes=1 << 40) == 0
    assert quarantine.drop_old(now=oldest.since + 7 * 86_400, disk_bytes=1 << 40) == 1
    assert quarantine.drop_old(now=newest.since, disk_bytes=10 * newest.size) == 1
    (quarantine.folder / "stranger.mfs").touch()
    assert [k.path for k in quarantine.kept()] == [newest.path]
    (quarantine.folder / "stranger.mfs").unlink()
    assert len(list(quarantine.folder.iterdir())) == 2
    old = newest.path.with_name(newest.path.name.replace(newest.path.name.split(".")[1], "1000"))
    newest.path.rename(old)
    Scrubber(store, 0.0).clean()  # whether there is a scrub or not
    assert not old.exists()
    store.close()


def test_a_name_that_rotted_into_that_of_another_chunk_does_not_oust_its_copy(
    tmp_path: Path,
) -> None:
    store = make_store(tmp_path / "a", tmp_path / "b", draw=iter([0.0, 0.99, 0.0, 0.99]).__next__)
    right, wrong = noise(1, 100), noise(2, 100)
    write(store, 0x101, 0, right)
    write(store, 0x201, 0, wrong, version=3)
    store.close()
    path = chunk_file(tmp_path / "b", 0x201)
    path.rename(path.with_name("chunk_0000000000000101_00000003.mfs"))
    store = make_store(tmp_path / "a", tmp_path / "b")
    assert store.copies() == [CopyId(0x101, 1)]
    assert read(store, 0x101, 0, 100) == right
    sweep(store, 1)
    assert sorted(c.chunk for c in store.copies()) == [0x101, 0x201] and path.exists()
    assert read(store, 0x201, 0, 100, version=3) == wrong
    store.close()


def test_what_is_no_copy_goes_to_the_quarantine_and_comes_back_by_hand(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    write(store, 1, 0, b"x")
    store.close()
    path = chunk_file(tmp_path, 1)
    (tmp_path / "02" / "letter").write_text("dear")
    twin = path.with_name("chunk_00000000000000f1_00000001.mfs")
    twin.write_bytes(path.read_bytes())
    store = make_store(tmp_path)
    told = listen(store)
    sweep(store)
    assert store.copies() == [CopyId(1, 1)] and read(store, 1, 0, 1) == b"x"
    assert {d.found for d in told} == {"letter", twin.name} and set(ids(told)) == {CopyId(0, 0)}
    assert {k.story.found for k in store.quarantines()[0].kept() if k.story} == {
        "letter", twin.name,
    }  # fmt: skip
    store.destroy(1, 1)
    kept = next(k.path for k in store.quarantines()[0].kept() if k.size > 4096)
    kept.rename(path)
    sweep(store)
    assert store.copies() == [CopyId(1, 1)] and read(store, 1, 0, 1) == b"x"
    store.close()


def test_a_scrub_goes_on_where_a_restart_found_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    visited: list[int] = []
    store = make_store(tmp_path)
    for chunk in range(1, 21):
        write(store, chunk, 0, b"x")
    real = ChunkStore.verify

    def verify(self: ChunkStore, chunk: int, first: int, into: memoryview) -> tuple[int, int]:
        visited.append(chunk)
        if len(visited) == 8:
            work.pace.end()
        return real(self, chunk, first, into)

    monkeypatch.setattr(ChunkStore, "verify", verify)
    work = DiskScrub(store, 0, 1e5)
    work.run()
    store.close()
    store = make_store(tmp_path)
    work = DiskScrub(store, 0, 1e5)
    began = work.state.began
    assert began and work.state.position == 7
    assert work._cycle()
    assert visited == [*range(1, 9), *range(8, 21)]
    assert work.state.last_began == began and work.status().last_ended >= int(began)
    assert all(began <= work.state.checked_at(c) <= work.state.last_ended for c in range(1, 21))
    (tmp_path / ".raftfs-scrub").write_bytes(b"junk")
    assert ScrubState(tmp_path).began == 0.0
    store.close()


def test_marks_tell_of_each_copy_when_it_was_visited_and_stay_few(tmp_path: Path) -> None:
    state = ScrubState(tmp_path)
    state.begin(1000.0)
    for chunk in range(1, 50_001):
        state.passed(chunk, 1000.0 + chunk)
    assert len(state._marks) <= MARKS_MAX
    for chunk in (1, 77, 25_000, 49_000):
        assert 0 <= state.checked_at(chunk) - (1000.0 + chunk) <= 50_000 / MARKS_MAX * 2
    assert state.checked_at(50_001) == 0.0
    state.end(60_000.0)
    state.begin(70_000.0)
    state.passed(10, 70_010.0)
    assert state.checked_at(10) == 70_010.0 and 1000 < state.checked_at(40_000) <= 60_000
    state.save()
    again = ScrubState(tmp_path)
    assert (again.position, again.last_ended) == (10, 60_000.0)
    assert again.checked_at(40_000) == state.checked_at(40_000)


def test_the_rate_can_be_changed_while_a_scrub_waits(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    for at in range(3):
        write(store, 1, at * MIB, noise(at, MIB))
    store.rest_idle(-1.0)
    scrubber = Scrubber(store, 0.0)
    scrubber.start()
    assert scrubber.disk_statuses()[0].scrub.began == 0  # a rate of nothing
    scrubber.set_rate(1000.0)
    until = time.monotonic() + 60
    while not scrubber.disk_statuses()[0].scrub.last_ended:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert scrubber.checked_at(1) > 0
    status = scrubber.disk_statuses()[0]
    assert (status.copies, status.state, status.damaged, status.scrub.mib_s) == (1, "good", 0, 1e3)
    scrubber.stop()
    assert all(not thread.is_alive() for thread in scrubber._threads)
    store.close()


def test_a_pace_waits_as_long_as_the_rate_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    pace = Pace(4.0)

    def wait(seconds: float | None = None) -> bool:
        nonlocal now
        assert seconds is not None
        now += seconds
        return False

    monkeypatch.setattr(scrub.time, "monotonic", lambda: now)
    monkeypatch.setattr(pace._changed, "wait", wait)
    pace.set(4.0)
    for _ in range(40):
        pace.spend(MIB)
    assert now == pytest.approx(110.0)


def test_clients_come_first_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path)
    write(store, 1, 0, b"x")
    work = DiskScrub(store, 0, 1e5)
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        now[0] += seconds
        if busy[0]:
            read(store, 1, 0, 1)

    now, busy = [time.monotonic()], [False]
    monkeypatch.setattr(scrub.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(work.pace, "sleep", sleep)
    for busy[0], waits in ((True, scrub.YIELD_MAX_S), (False, scrub.QUIET_S)):
        pauses.clear()
        read(store, 1, 0, 1)
        work._stand_back()
        assert sum(pauses) == pytest.approx(waits, abs=scrub.QUIET_S)
    pauses.clear()
    work._check(1)  # nobody has used the disk since
    assert pauses == []
    store.close()


class BadSectors(FileDoor):
    """Some files cannot be read."""

    def __init__(self) -> None:
        self.bad: set[str] = set()
        self._names: dict[int, str] = {}

    def open(self, path: Path) -> int:
        fd = super().open(path)
        self._names[fd] = path.name
        return fd

    def pread(self, fd: int, into: memoryview, offset: int) -> int:
        if self._names.get(fd) in self.bad and offset:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().pread(fd, into, offset)


def test_a_scrub_passes_over_what_a_disk_cannot_read(tmp_path: Path) -> None:
    door = BadSectors()
    store = make_store(tmp_path, door=door)
    for chunk in (1, 2, 3):
        write(store, chunk, 0, noise(chunk, 100))
    store.rest_idle(-1.0)
    door.bad.add(chunk_file(tmp_path, 2).name)
    told = listen(store)
    work = sweep(store)
    assert [(d.chunk, d.part, d.found, d.found_by) for d in told] == [(2, "io", "EIO", "scrub")]
    assert work.damaged == 1 and sorted(c.chunk for c in store.copies()) == [1, 3]
    store.close()


def test_a_copy_that_is_raised_while_strangers_are_looked_for_stays(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    write(store, 1, 0, b"x")
    renamed, go_on = threading.Event(), threading.Event()
    real = store.door.sync_folder

    def slow(path: Path) -> None:
        if not renamed.is_set() and path.name == "01":
            renamed.set()
            assert go_on.wait(30)
        real(path)

    store.sync(1, 1)
    store.door.sync_folder = slow  # type: ignore[method-assign]
    raising = threading.Thread(target=store.raise_version, args=(1, 5, 5))
    raising.start()
    assert renamed.wait(30)  # the file has its new name, the table does not know it
    looking = threading.Thread(target=strangers.take_in_strangers, args=(store, 0))
    looking.start()
    go_on.set()
    raising.join(30)
    looking.join(30)
    assert store.copies() == [CopyId(1, 5)] and aside(tmp_path) == []
    assert read(store, 1, 0, 1, version=5) == b"x"
    store.close()
