"""Whatever of a master's files is damaged or gone, its process ends with one sentence; it never
starts as if it were new.
"""

import asyncio
import contextlib
import json
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import lmdb
import pytest

from raftfs.client.meta import MetaClient, parse_masters
from raftfs.meta.raft import segments
from raftfs.wire import ops
from raftfs.wire.auth import ClusterKey
from tests.conftest import free_port_base
from tests.unit.planted import master

ENTRIES = 40
Damage = Callable[[Path], None]


class Lone:
    """A master that has no peers: a data folder that was filled, then killed."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port_base()
        self.data = folder / "data"
        self._log = folder / "log"
        ClusterKey.generate(folder / "key")
        self._argv = [
            *master(), "--peers", f"127.0.0.1:{self.port}", "--listen", "127.0.0.1", "--key",
            str(folder / "key"), "--data",
        ]  # fmt: skip

    @contextlib.contextmanager
    def running(self, data: Path) -> Iterator[subprocess.Popen[str]]:
        """The process; killed in the end."""
        with open(self._log, "w") as log:
            process = subprocess.Popen([*self._argv, str(data)], stderr=log, stdout=log, text=True)
        try:
            yield process
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait(20)

    def last_words(self, data: Path) -> tuple[int, list[str]]:
        """Its exit status and the lines that are no records of the log, when it ends by itself."""
        with self.running(data) as process:
            status = process.wait(40)
        lines = self._log.read_text().splitlines()
        return status, [line for line in lines if not line.startswith("{")]

    def fill(self) -> None:
        """Directories, a checkpoint, more directories."""
        with self.running(self.data):
            asyncio.run(self._fill())

    async def _fill(self) -> None:
        client = MetaClient(parse_masters(f"127.0.0.1:{self.port + 3}"))
        await client.start(20.0)
        for number in range(ENTRIES):
            if number == ENTRIES // 2:
                await self._checkpointed()
            await client.mutate(ops.Create(1, b"d%d" % number, ops.NodeType.DIR, 0o755, 0, 0, 0))
        await client.close()

    async def _checkpointed(self) -> None:
        until = time.monotonic() + 30
        while self.status()["checkpoint"] < ENTRIES // 2:
            assert time.monotonic() < until
            await asyncio.sleep(0.1)

    def status(self) -> dict[str, int]:
        """What the web page says."""
        found: dict[str, int] = json.loads(self.get("api/status"))
        return found

    def get(self, page: str) -> str:
        """Of its web pages."""
        url = f"http://127.0.0.1:{self.port + 7}/{page}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return str(answer.read(), "utf-8")


@pytest.fixture(scope="module")
def lone(tmp_path_factory: pytest.TempPathFactory) -> Lone:
    """Filled once."""
    made = Lone(tmp_path_factory.mktemp("lone"))
    made.fill()
    return made


def flip(name: str, at: float) -> Damage:
    """Change a byte, at a part of the file's length."""

    def damage(data: Path) -> None:
        raw = bytearray((data / name).read_bytes())
        raw[int(at * len(raw))] ^= 0x55
        (data / name).write_bytes(raw)

    return damage


def cut(name: str, part: float) -> Damage:
    """Keep only the first part of a file."""

    def damage(data: Path) -> None:
        raw = (data / name).read_bytes()
        (data / name).write_bytes(raw[: int(part * len(raw))])

    return damage


def garble_pages(data: Path) -> None:
    """Both head pages of the metadata file."""
    raw = bytearray((data / "state.mdb").read_bytes())
    for page in (0, 1):
        raw[page * 4096 + 16 : page * 4096 + 120] = b"?" * 104
    (data / "state.mdb").write_bytes(raw)


def rot_a_row(data: Path) -> None:
    """One row's content, in a file that is whole otherwise."""
    env = lmdb.open(str(data / "state.mdb"), subdir=False, map_size=1 << 40)
    with env.begin(write=True) as txn, txn.cursor() as cursor:
        assert cursor.set_range(b"E")
        cursor.put(cursor.key(), cursor.value()[:-1] + bytes([cursor.value()[-1] ^ 1]))
    env.close()


def in_journal(blob: int, at: int) -> Damage:
    """Change a byte of the n-th blob of the journal: of its head, or (from 24 on) its payload."""

    def damage(data: Path) -> None:
        path = min((data / "journal").iterdir())
        raw, begin = bytearray(path.read_bytes()), 0
        for _ in range(blob):
            found = segments.blob_at(bytes(raw), begin)
            assert found is not None
            begin += segments.BLOB_HEAD + len(found[1])
        assert segments.blob_at(bytes(raw), begin) is not None
        raw[begin + at] ^= 0x55
        path.write_bytes(raw)

    return damage


def remove(name: str) -> Damage:
    """A file or folder is gone."""

    def damage(data: Path) -> None:
        path = data / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


DAMAGES: dict[str, tuple[Damage, str]] = {
    "state empty": (cut("state.mdb", 0), "is empty"),
    "state cut": (cut("state.mdb", 0.5), "is damaged: "),
    "state garbled": (garble_pages, "cannot be opened"),
    "a row of the state": (rot_a_row, "its rows are not what was written"),
    "journal gone": (remove("journal"), "one of them was lost"),
    "vote of the first blob": (in_journal(0, 24 + 4), "is damaged at byte"),
    "vote of the election": (in_journal(2, 24 + 6), "is damaged at byte"),
    "magic in the journal": (in_journal(4, 2), "is damaged at byte"),
    "number in the journal": (in_journal(4, 9), "is damaged at byte"),
    "length in the journal": (in_journal(5, 16), "is damaged at byte"),
    "crc in the journal": (in_journal(5, 21), "is damaged at byte"),
    "entry in the journal": (in_journal(6, 40), "is damaged at byte"),
    "identity: format": (flip("identity.cbor", 0.1), "no longer knows who it is"),
    "identity: uuid": (flip("identity.cbor", 0.6), "no longer knows who it is"),
    "identity: crc": (flip("identity.cbor", 0.99), "no longer knows who it is"),
    "identity cut": (cut("identity.cbor", 0.5), "no longer knows who it is"),
    "identity empty": (cut("identity.cbor", 0), "no longer knows who it is"),
}


@pytest.mark.parametrize("what", list(DAMAGES))
def test_a_damaged_master_ends_with_a_sentence(lone: Lone, tmp_path: Path, what: str) -> None:
    damage, sentence = DAMAGES[what]
    data = tmp_path / "data"
    shutil.copytree(lone.data, data)
    damage(data)
    status, said = lone.last_words(data)
    assert status == 1 and len(said) == 1 and sentence in said[0], f"{status}: {said}"
    assert "raftfs-master: " in said[0]


@pytest.mark.parametrize("what", ["untouched", "state gone"])
def test_what_the_rest_can_make_whole_comes_back_whole(
    lone: Lone, tmp_path: Path, what: str
) -> None:
    """The other side of it: the same folder undamaged starts; so does one whose log has everything.
    """
    data = tmp_path / "data"
    shutil.copytree(lone.data, data)
    if what == "state gone":
        (data / "state.mdb").unlink()
    with lone.running(data) as process:
        until = time.monotonic() + 30
        nodes = 0
        while nodes != ENTRIES + 1:
            assert process.poll() is None and time.monotonic() < until, f"{nodes} nodes"
            with contextlib.suppress(OSError):
                nodes = lone.status()["nodes"]
            time.sleep(0.1)
        metrics = lone.get("metrics")
    for name in ("loop_stall_checkpoint_longest_seconds", "checkpoint_last_rows",
                 "journal_sync_p99_seconds", "elections_total"):  # fmt: skip
        assert f"\nraftfs_{name} " in metrics
