"""A bit flips on a chunkserver's disk: it is found, told, healed and kept, and nobody reads it."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import cbor2
import pytest

from tests.scenario.cluster import ScenarioCluster
from tests.scenario.test_stories import write_synced


class Reader(threading.Thread):
    """Reads a file again and again, past the page cache of the mount; counts what was not equal."""

    def __init__(self, path: Path, data: bytes) -> None:
        super().__init__(daemon=True)
        self._path, self._data = path, data
        self._ended = threading.Event()
        self.equal = self.wrong = 0
        self.errors: list[OSError] = []

    def run(self) -> None:
        while not self._ended.is_set():
            try:
                fd = os.open(self._path, os.O_RDONLY)
                try:
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                    found = os.pread(fd, len(self._data) + 1, 0)
                finally:
                    os.close(fd)
                self.equal += found == self._data
                self.wrong += found != self._data
            except OSError as e:
                self.errors.append(e)

    def stop(self) -> None:
        self._ended.set()
        self.join(30)


def copies(cluster: ScenarioCluster) -> list[Path]:
    """All chunk files in their places."""
    return sorted(cluster.dir.glob("cs*/hdd1/??/chunk_*.mfs"))


def stories(cluster: ScenarioCluster) -> list[dict[str, Any]]:
    """Of the files that were set aside."""
    kept = cluster.dir.glob("cs*/hdd1/quarantine/*.mfs")
    return [cbor2.loads(p.with_suffix(".story").read_bytes()) for p in kept]


def damage(path: Path, part: str) -> None:
    """Flip one bit of a copy, in one of its parts."""
    if part == "name":
        path.rename(path.with_name(path.name.replace("chunk_", "cxunk_")))
        return
    with open(path, "r+b") as file:
        file.seek({"data": 8192 + 70_000, "table": 4096 + 6, "header": 60}[part])
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))


@pytest.mark.parametrize("part", ["data", "table", "header", "name"])
def test_a_flipped_copy_is_found_told_healed_and_kept(
    cluster: ScenarioCluster, part: str
) -> None:
    cluster.expect("copy damaged", "copy not readable", "name of a copy mended")
    data = os.urandom(3 * 2**20)
    write_synced(cluster.mnt / "file", data)
    cluster.wait("two copies at rest", lambda: len(copies(cluster)) == 2)
    victim = copies(cluster)[0]
    server = victim.relative_to(cluster.dir).parts[0]
    # The scrub's next look is a minute away: a start brings it at once.
    cluster.raftfs("cluster", "kill", server, "--signal", "TERM")
    cluster.wait("the end of its process", lambda: _state(cluster, server) == "stopped")
    damage(victim, part)
    reader = Reader(cluster.mnt / "file", data)
    reader.start()
    cluster.raftfs("cluster", "start", server)

    def healed() -> bool:
        info = cluster.raftfs("fileinfo", str(cluster.mnt / "file"))
        whole = info.count("(status:VALID)") == 2 and len(copies(cluster)) == 2
        return whole and (part == "name" or len(stories(cluster)) == 1)

    cluster.wait("a good copy in its place, the damaged one in quarantine", healed)
    cluster.wait("more reads", lambda: reader.equal > 2)
    reader.stop()
    assert (reader.wrong, reader.errors) == (0, [])
    told = [
        json.loads(line) for log in (cluster.dir / "log").glob("m*.log")
        for line in log.read_text().splitlines() if '"copy damaged"' in line
    ]  # fmt: skip
    assert len(told) == 3, "every master hears the story"
    for record in told:
        assert record["disk"] == str(victim.parent.parent)
        assert (record["part"], record["block"]) == {
            "data": ("data", 1), "table": ("data", 1), "header": ("header", -1),
            "name": ("name", -1),
        }[part] or record["part"] == "table"  # fmt: skip
    if part != "name":
        (story,) = stories(cluster)
        assert story["text"] and f"{story['chunk']:016X}" in victim.name
    cluster.remount()
    assert (cluster.mnt / "file").read_bytes() == data


def _state(cluster: ScenarioCluster, name: str) -> str:
    return next(str(p["state"]) for p in cluster.status()["processes"] if p["name"] == name)


@pytest.mark.parametrize("cluster", [("--chunkservers", "1")], indirect=True)
def test_the_last_copy_is_kept_and_its_good_blocks_can_be_read(cluster: ScenarioCluster) -> None:
    cluster.expect("copy damaged", "copy not readable", "cannot read")
    data = os.urandom(2**20)
    write_synced(cluster.mnt / "file", data)
    (victim,) = copies(cluster)
    cluster.raftfs("cluster", "kill", "cs1", "--signal", "TERM")
    cluster.wait("the end of its process", lambda: _state(cluster, "cs1") == "stopped")
    damage(victim, "data")
    cluster.raftfs("cluster", "start", "cs1")
    found = cluster.dir / "cs1/hdd1/quarantine" / (victim.stem + ".story")
    cluster.wait("the scrub's story", found.exists)
    cluster.remount()
    fd = os.open(cluster.mnt / "file", os.O_RDONLY)
    try:
        for offset in (0, *range(2**17, 2**20, 2**16)):
            assert os.pread(fd, 2**16, offset) == data[offset : offset + 2**16]
        with pytest.raises(OSError, match="Input/output error"):
            os.pread(fd, 2**16, 2**16)
    finally:
        os.close(fd)
    assert copies(cluster) == [victim]
