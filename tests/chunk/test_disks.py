"""Several disks: one that dies, one that is to be pulled, one that is full."""

import errno
import os
from pathlib import Path

import pytest

from raftfs.chunk import diskhealth
from raftfs.chunk.disk import Disk
from raftfs.chunk.door import FileDoor
from raftfs.chunk.moving import Mover
from raftfs.chunk.store import ChunkStore
from raftfs.chunk.unrest import UNREST
from raftfs.const import BLOCK_SIZE
from raftfs.errors import RaftfsError, ReplyError, Status
from raftfs.wire.frame import piece_crcs
from raftfs.wire.messages import CopyId, Damage
from tests.chunk.parts import CLUSTER, chunk_file, ids, make_store, noise, read, write


class DyingDisk(FileDoor):
    """Whatever touches a file below `sick` fails, while it is set."""

    def __init__(self) -> None:
        self.sick: Path | None = None
        self.failed = 0
        self._paths: dict[int, Path] = {}

    def _touch(self, path: Path) -> None:
        if self.sick is not None and path.is_relative_to(self.sick):
            self.failed += 1
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    def create(self, path: Path) -> int:
        self._touch(path)
        fd = super().create(path)
        self._paths[fd] = path
        return fd

    def open(self, path: Path) -> int:
        self._touch(path)
        fd = super().open(path)
        self._paths[fd] = path
        return fd

    def pread(self, fd: int, into: memoryview, offset: int) -> int:
        self._touch(self._paths[fd])
        return super().pread(fd, into, offset)

    def pwrite(self, fd: int, parts, offset: int) -> None:  # type: ignore[no-untyped-def]
        self._touch(self._paths[fd])
        super().pwrite(fd, parts, offset)

    def sync(self, fd: int) -> None:
        self._touch(self._paths[fd])
        super().sync(fd)


def two_disks(root: Path, door: FileDoor | None = None) -> ChunkStore:
    """Ten copies, the odd ones on disk b."""
    turn = iter(range(10**6))
    store = make_store(root / "a", root / "b", door=door, draw=lambda: next(turn) % 2 * 0.9999)
    if not len(store):
        for chunk in range(10):
            write(store, 10 + chunk, 0, noise(chunk, BLOCK_SIZE + 100))
        assert len(list((root / "b").glob("??/*.mfs"))) == 5
    return store


def test_a_dying_disk_is_told_with_evidence_and_takes_nothing_new(tmp_path: Path) -> None:
    door = DyingDisk()
    store = two_disks(tmp_path, door)
    store.rest_idle(-1.0)
    told: list[Damage] = []
    made: list[CopyId] = []

    def report(new: list[CopyId], gone: list[CopyId], damaged: list[Damage]) -> None:
        told.extend(damaged)
        made.extend(new)

    store.report = report
    door.sick = tmp_path / "b"
    for chunk in (11, 13, 15):
        assert len(told) == (chunk - 11) // 2, "one bad sector is one copy's end only"
        with pytest.raises(ReplyError) as e:
            read(store, chunk, 0, 10)
        assert e.value.status == Status.DISK_ERROR
    assert [(d.chunk, d.part, d.found) for d in told] == [
        (11, "io", "EIO"), (13, "io", "EIO"), (15, "io", "EIO"), (17, "disk", ""), (19, "disk", ""),
    ]  # fmt: skip
    evidence = store.disks()[1].health.evidence.splitlines()
    assert len(evidence) == 3 and "EIO (Input/output error) read" in evidence[0]
    assert chunk_file(tmp_path / "b", 11).name in evidence[0]
    assert sorted(c.chunk for c in store.copies()) == [10, 12, 14, 16, 18]
    for chunk in range(20, 24):
        write(store, chunk, 0, b"new")
    assert len(list((tmp_path / "b").glob("??/*.mfs"))) == 5
    with pytest.raises(RaftfsError, match=r"still fails: .*Input/output error"):
        store.retest(str(tmp_path / "b"))
    store.close()

    store = two_disks(tmp_path, door)  # a restart does not make it good
    assert sorted(c.chunk for c in store.copies()) == [10, 12, 14, 16, 18, 20, 21, 22, 23]
    with pytest.raises(ReplyError) as e:  # what a power cut took cannot be read there, either
        read(store, 17, 0, 100)
    assert e.value.status == Status.WRONG_VERSION
    store.close()
    door.sick = None

    store = two_disks(tmp_path, door)
    assert read(store, 17, 0, 100) == noise(7, BLOCK_SIZE + 100)[:100], "the last copy, perhaps"
    with pytest.raises(ReplyError):
        write(store, 17, 0, b"x")
    with pytest.raises(RaftfsError, match=r"is no disk of this server: it has .*/a, .*/b"):
        store.retest("/elsewhere")
    store.report = lambda new, gone, damaged: made.extend(new)
    made.clear()
    store.retest(str(tmp_path / "b"))
    assert sorted(c.chunk for c in made) == [11, 13, 15, 17, 19] and not store.damages()
    assert not (tmp_path / "b" / diskhealth.NAME).exists()
    write(store, 17, 0, b"x")
    store.close()


def test_errors_that_lie_far_apart_are_not_the_disks(tmp_path: Path) -> None:
    now = [1000.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diskhealth.time, "time", lambda: now[0])
        health = diskhealth.DiskHealth(tmp_path)
        found = []
        for pause in (0, 400, 400, 100, 90):
            now[0] += pause
            found.append(health.error("EIO"))
    assert found == [False, False, False, True, False]
    assert diskhealth.DiskHealth(tmp_path).evidence == health.evidence != ""


def test_a_copy_on_a_damaged_disk_is_made_anew_on_another_disk_of_the_same_server(
    tmp_path: Path,
) -> None:
    door = DyingDisk()
    store = two_disks(tmp_path, door)
    store.rest_idle(-1.0)
    kept = chunk_file(tmp_path / "b", 17).read_bytes()
    door.sick = tmp_path / "b"
    for chunk in (11, 13, 15):
        with pytest.raises(ReplyError):
            read(store, chunk, 0, 10)
    assert store.version_of(17) is None
    disk = store.place_for(17, 1)
    assert disk.path == tmp_path / "a"
    part = tmp_path / "a" / "11" / "chunk_0000000000000011_00000001.mfs.part"
    part.write_bytes(kept)
    store.adopt(17, 1, disk, part)
    assert CopyId(17, 1) in store.copies() and 17 not in [d.chunk for d in store.damages()]
    assert read(store, 17, 0, 100) == noise(7, BLOCK_SIZE + 100)[:100]
    assert chunk_file(tmp_path / "b", 17).read_bytes() == kept, "its file is left alone"
    store.close()


def test_copies_leave_a_disk_that_is_marked_and_nothing_new_comes(tmp_path: Path) -> None:
    store = two_disks(tmp_path)
    store.write(11, 1, 7, False, 5, memoryview(b"later"), piece_crcs(5, b"later"))
    store.rest_idle(-1.0)
    truth = {c.chunk: read(store, c.chunk, 0, BLOCK_SIZE + 100) for c in store.copies()}
    told: list[Damage] = []
    store.report = lambda new, gone, damaged: told.extend(damaged)
    mover = Mover(store)
    store.disks()[1].leaving = "anywhere"
    write(store, 13, 0, b"in use")  # not at rest: it has to wait
    truth[13] = b"in use" + truth[13][6:]
    used_at = store._table._active[13].used_at
    assert mover.empty(1) == 4 and store.copies_on(1) == 1
    assert store._table._active[13].used_at == used_at, "or it would never come to rest"
    assert list((tmp_path / "b").glob("??/*")) == [chunk_file(tmp_path / "b", 13)]
    write(store, 30, 0, b"new")
    store.rest_idle(-1.0)
    assert mover.empty(1) == 1 and store.copies_on(1) == 0
    assert not list((tmp_path / "b").glob("??/*")) and told == []
    for again in (False, True):
        assert all(read(store, c, 0, len(data)) == data for c, data in truth.items())
        with pytest.raises(ReplyError):
            write(store, 11, 0, b"late", token=6)  # the token was taken along
        store.close()
        if not again:
            store = make_store(tmp_path / "a")  # b has been pulled


def test_a_doubtful_copy_is_not_moved_away_from_what_says_so(tmp_path: Path) -> None:
    two_disks(tmp_path)._disks[0].close()  # no orderly stop: nothing came to rest
    (tmp_path / "b" / UNREST).unlink()
    for disk in ("a", "b"):
        (tmp_path / disk / ".raftfs-lock").unlink()
    store = make_store(tmp_path / "a", tmp_path / "b")
    assert [c.chunk for c in store.copies() if c.doubtful] == [11, 13, 15, 17, 19]
    store.disks()[1].leaving = "anywhere"
    store.raise_version(13, 2, 1)  # the leader decided
    store.rest_idle(-1.0)
    assert Mover(store).empty(1) == 1
    assert [c.chunk for c in store.copies() if c.doubtful] == [11, 15, 17, 19]
    assert store.copies_on(1) == 4
    store.close()


def test_a_damaged_copy_is_not_moved_and_a_change_in_between_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = two_disks(tmp_path)
    store.rest_idle(-1.0)
    store.disks()[1].leaving = "local"
    rotten = chunk_file(tmp_path / "b", 11)
    raw = bytearray(rotten.read_bytes())
    raw[9000] ^= 1
    rotten.write_bytes(raw)
    mover = Mover(store)
    real = mover._copy

    def slow(source: Path, part: Path, *more: object) -> None:
        real(source, part, *more)  # type: ignore[arg-type]
        if source == chunk_file(tmp_path / "b", 13):
            write(store, 13, 0, b"meanwhile")
            store.rest_idle(-1.0)

    monkeypatch.setattr(mover, "_copy", slow)
    assert mover.empty(1) == 3
    assert [p.name for p in (tmp_path / "b").glob("??/*")] != []
    assert read(store, 13, 0, 9) == b"meanwhile" and rotten.exists()
    assert mover.empty(1) == 0 or read(store, 13, 0, 9) == b"meanwhile"
    assert not list(tmp_path.glob("?/??/*.part"))
    store.close()


def test_a_disks_limits(tmp_path: Path) -> None:
    plain = Disk(tmp_path / "a", leave_free=0)
    total, used = plain.space()
    room = plain.room()
    assert abs(room - (total - used)) < 1 << 26
    for options, expect in (
        ({"leave_free": 10**9}, total - used - 10**9),
        ({"limit": used + 5 * 10**8, "leave_free": 0}, 5 * 10**8),
        ({"limit": 1}, 0),
        ({"limit": 1 << 60, "leave_free": 10**9}, total - used - 10**9),
        ({"leaving": "anywhere"}, 0),
    ):
        disk = Disk(tmp_path / f"x{expect}", **options)  # type: ignore[arg-type]
        assert abs(disk.room() - max(0, expect)) < 1 << 26, options
        disk.close()
    plain.close()


def test_full_disks_refuse_new_copies_and_nothing_of_them_stays(tmp_path: Path) -> None:
    store = ChunkStore([Disk(tmp_path / "a", leave_free=1 << 60)])
    store.join(CLUSTER)
    with pytest.raises(ReplyError) as e:
        write(store, 1, 0, b"x")
    assert e.value.status == errno.ENOSPC and len(store) == 0 and store.room() == 0
    assert not list((tmp_path / "a").glob("??/*"))
    store.close()



def test_stories_of_a_whole_disk_are_sent_in_slices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raftfs.chunk.store.REPORT_SLICE", 2)
    door = DyingDisk()
    store = two_disks(tmp_path, door)
    store.rest_idle(-1.0)
    sizes: list[int] = []
    told: list[Damage] = []

    def report(new: list[CopyId], gone: list[CopyId], damaged: list[Damage]) -> None:
        sizes.append(len(damaged))
        told.extend(damaged)

    store.report = report
    door.sick = tmp_path / "b"
    for chunk in (11, 13, 15):
        with pytest.raises(ReplyError):
            read(store, chunk, 0, 10)
    assert sizes == [1, 1, 1, 2] and len(set(ids(told))) == 5
    store.close()
