"""The store of copies: fencing by version and token, orders, disks that do not fit together."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import raftfs.chunk.store as store_module
from raftfs.chunk.disk import Disk, FileDoor
from raftfs.chunk.store import ChunkStore
from raftfs.const import BLOCK_SIZE
from raftfs.errors import ReplyError, Status, UserError
from raftfs.wire.frame import piece_crcs
from raftfs.wire.messages import CopyId

DATA = b"data" * 300


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ChunkStore]:
    """A store on one disk, `tmp_path/d`."""
    made = ChunkStore([Disk(tmp_path / "d")])
    made.join(b"c" * 16)
    yield made
    made.close()


def _put(
    store: ChunkStore, chunk: int, version: int = 1, token: int = 1, *, create: bool = True
) -> None:
    store.write(chunk, version, token, create, 0, DATA, piece_crcs(0, DATA))


def _get(store: ChunkStore, chunk: int, version: int = 1) -> bytes:
    return bytes(store.read(chunk, version, 0, len(DATA))[0])


def _status(call: Any, *args: Any) -> int:
    with pytest.raises(ReplyError) as e:
        call(*args)
    return e.value.status


def test_versions_are_fenced(store: ChunkStore) -> None:
    assert _status(lambda: _put(store, 5, create=False)) == Status.NO_CHUNK
    _put(store, 5, 3)
    for version in (1, 2, 4):
        assert _status(lambda v=version: _put(store, 5, v)) == Status.WRONG_VERSION
        assert _status(store.read, 5, version, 0, 1) == Status.WRONG_VERSION
        assert _status(store.sync, 5, version) == Status.WRONG_VERSION
        assert _status(store.blocks, 5, version) == Status.WRONG_VERSION
        assert _status(store.zero, 5, version, 1, True, 0, 1) == Status.WRONG_VERSION
    assert _get(store, 5, 3) == DATA


def test_tokens_are_fenced(store: ChunkStore) -> None:
    _put(store, 5, 1, 10)
    _put(store, 5, 1, 10)
    assert _status(lambda: _put(store, 5, 1, 9)) == Status.WRONG_VERSION
    store.raise_version(5, 2, 20)
    assert _status(lambda: _put(store, 5, 2, 19)) == Status.WRONG_VERSION
    assert _status(store.zero, 5, 2, 19, False, 0, 1) == Status.WRONG_VERSION
    _put(store, 5, 2, 20)


def test_create_twice_is_one_copy(store: ChunkStore) -> None:
    reports: list[Any] = []
    store.report = lambda *r: reports.append(r)
    _put(store, 5)
    _put(store, 5)
    assert reports == [([CopyId(5, 1)], [], [])] and len(store) == 1


def test_destroy_only_at_its_version(store: ChunkStore, tmp_path: Path) -> None:
    _put(store, 5, 2)
    store.destroy(5, 1)
    assert _get(store, 5, 2) == DATA
    store.destroy(5, 2)
    store.destroy(5, 2)
    assert not list(tmp_path.glob("d/??/*")) and len(store) == 0
    _put(store, 6, 9)
    store.destroy(6, 0)
    assert len(store) == 0


def test_raise_may_be_repeated_but_not_lowered(store: ChunkStore) -> None:
    reports: list[Any] = []
    _put(store, 5)
    store.report = lambda *r: reports.append(r)
    store.raise_version(5, 4, 7)
    store.raise_version(5, 4, 7)
    assert reports == [([CopyId(5, 4)], [CopyId(5, 1)], [])]
    assert _status(store.raise_version, 5, 3, 8) == Status.WRONG_VERSION
    assert _status(store.raise_version, 6, 3, 8) == Status.NO_CHUNK
    assert _get(store, 5, 4) == DATA


def test_adopt(store: ChunkStore, tmp_path: Path) -> None:
    store.adopt(5, 3, [(BLOCK_SIZE, DATA)])
    assert bytes(store.read(5, 3, BLOCK_SIZE, len(DATA))[0]) == DATA
    assert _status(store.adopt, 5, 4, []) == Status.WRONG_VERSION

    def breaks() -> Iterator[tuple[int, bytes]]:
        yield 0, DATA
        raise OSError("source gone")

    with pytest.raises(OSError):
        store.adopt(6, 1, breaks())
    assert [p.name for p in tmp_path.glob("d/??/*")] == ["chunk_0000000000000005_00000003.mfs"]


def test_restart_finds_copies_and_removes_leftovers(store: ChunkStore, tmp_path: Path) -> None:
    for chunk in range(1, 600, 7):
        _put(store, chunk, chunk % 5 + 1)
    (tmp_path / "d/01/chunk_0000000000000001_00000009.part").write_bytes(b"half")
    (tmp_path / "d/01/README").write_bytes(b"not ours")
    known, server = store.copies(), store.server
    store.close()
    again = ChunkStore([Disk(tmp_path / "d")])
    assert sorted(again.copies(), key=repr) == sorted(known, key=repr)
    assert (again.server, again.cluster) == (server, b"c" * 16)
    assert not list(tmp_path.glob("d/??/*.part")) and (tmp_path / "d/01/README").exists()
    assert _get(again, 8, 8 % 5 + 1) == DATA
    store._disks = again._disks  # for the fixture's close


def test_an_empty_file_is_no_damage_and_a_cut_one_is(store: ChunkStore, tmp_path: Path) -> None:
    _put(store, 5)
    _put(store, 6)
    store.close()
    os.truncate(tmp_path / "d/05/chunk_0000000000000005_00000001.mfs", 0)
    os.truncate(tmp_path / "d/06/chunk_0000000000000006_00000001.mfs", 4200)
    again = ChunkStore([Disk(tmp_path / "d")])
    damaged: list[CopyId] = []
    again.report = lambda made, gone, bad: damaged.extend(bad)
    assert _status(_get, again, 5) == Status.NO_CHUNK
    assert _status(_get, again, 6) == Status.BAD_CRC
    assert damaged == [CopyId(6, 1)]
    store._disks = again._disks


def test_a_full_disk_takes_nothing_new(store: ChunkStore, monkeypatch: pytest.MonkeyPatch) -> None:
    _put(store, 5)
    monkeypatch.setattr(Disk, "full", lambda self: True)
    assert _status(_put, store, 6) == errno.ENOSPC
    assert _status(store.adopt, 7, 1, []) == errno.ENOSPC
    _put(store, 5)
    assert _get(store, 5) == DATA and len(store) == 1


def test_a_copy_that_could_not_be_made_can_be_made_later(tmp_path: Path) -> None:
    class FullDoor(FileDoor):
        """Has no room while `full`."""

        full = True

        def pwrite(self, fd: int, data: Any, offset: int) -> None:
            """ENOSPC, or as the real one."""
            if self.full:
                raise OSError(errno.ENOSPC, "no space")
            super().pwrite(fd, data, offset)

    door = FullDoor()
    store = ChunkStore([Disk(tmp_path / "d")], door)
    with pytest.raises(OSError) as e:
        _put(store, 5)
    assert e.value.errno == errno.ENOSPC and len(store) == 0
    door.full = False
    _put(store, 5)
    assert _get(store, 5) == DATA
    store.close()


def test_open_files_are_bounded(
    store: ChunkStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "OPEN_FILES_MAX", 10)

    def open_chunks() -> int:
        names = (os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
                 if os.path.exists(f"/proc/self/fd/{n}"))  # fmt: skip
        return sum(f"{tmp_path}/d/" in n and "chunk_" in n for n in names)

    for chunk in range(1, 41):
        _put(store, chunk)
    assert open_chunks() == 40
    store.retire_idle()
    assert open_chunks() == 10
    monkeypatch.setattr(store_module, "IDLE_S", -1.0)
    store.retire_idle()
    assert open_chunks() == 0
    assert all(_get(store, chunk) == DATA for chunk in range(1, 41))


def test_a_busy_copy_is_retired_another_time(
    store: ChunkStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "IDLE_S", -1.0)
    _put(store, 5)
    copy = store._copies[5]

    class Busy:
        """A lock that somebody else has."""

        def acquire(self, blocking: bool = True) -> bool:
            """Never."""
            return False

    lock, copy.lock = copy.lock, Busy()  # type: ignore[assignment]
    store.retire_idle()
    copy.lock = lock
    assert copy._fd >= 0
    store.retire_idle()
    assert copy._fd < 0


def _refusal(paths: list[Path]) -> str:
    with pytest.raises(UserError) as e:
        ChunkStore([Disk(p) for p in paths])
    text = str(e.value)
    assert "\n" not in text and str(paths[0].parent) in text
    return text


def _made(path: Path, cluster: bytes) -> None:
    store = ChunkStore([Disk(path)])
    store.join(cluster)
    store.close()


def test_disks_that_do_not_fit_are_refused_in_one_sentence(tmp_path: Path) -> None:
    a, b, c, d = (tmp_path / n for n in "abcd")
    _made(a, b"1" * 16)
    _made(b, b"1" * 16)
    assert "different servers" in _refusal([a, b])
    held = Disk(c)
    assert "in use by another chunkserver" in _refusal([c])
    held.close()
    for label in (b"", b"\xff\xff", b"\x01", b"hello", b"\xa1\x66format\x01", b"\x9f" * 5000):
        d.mkdir(exist_ok=True)
        (d / ".raftfs-disk").write_bytes(label)
        assert "damaged" in _refusal([d]), label
    (d / ".raftfs-disk").unlink()
    (d / "05").mkdir()
    (d / "05/chunk_0000000000000005_00000001.mfs").write_bytes(b"")
    assert "has chunks but no" in _refusal([d])
    (tmp_path / "file").write_bytes(b"")
    assert "cannot be used" in _refusal([tmp_path / "file"])


def test_disks_of_one_server_and_two_clusters_are_refused(tmp_path: Path) -> None:
    for name, cluster in (("a", b"1" * 16), ("b", b"2" * 16)):
        disk = Disk(tmp_path / name)
        disk.claim(b"s" * 16, cluster)
        disk.close()
    assert "different clusters" in _refusal([tmp_path / "a", tmp_path / "b"])


def test_a_new_disk_joins_the_server(tmp_path: Path) -> None:
    _made(tmp_path / "a", b"1" * 16)
    store = ChunkStore([Disk(tmp_path / "a"), Disk(tmp_path / "b")])
    server = store.server
    store.close()
    other = ChunkStore([Disk(tmp_path / "b")])
    assert (other.server, other.cluster) == (server, b"1" * 16)
    other.close()


def test_after_a_failed_sync_a_copy_is_never_counted_on_again(tmp_path: Path) -> None:
    class BadDoor(FileDoor):
        fail = False

        def sync(self, fd: int) -> None:
            if self.fail:
                raise OSError(5, "injected")
            super().sync(fd)

    door = BadDoor()
    store = ChunkStore([Disk(tmp_path / "hdd")], door)
    store.join(b"c" * 16)
    damaged: list[CopyId] = []
    store.report = lambda made, gone, bad: damaged.extend(bad)
    data = b"x" * 100
    store.write(1, 1, 1, True, 0, data, piece_crcs(0, data))
    door.fail = True
    with pytest.raises(OSError, match="injected"):
        store.sync(1, 1)
    assert damaged == [CopyId(1, 1)]
    door.fail = False
    with pytest.raises(ReplyError) as error:
        store.sync(1, 1)
    assert error.value.status == Status.DISK_ERROR
