"""Writers whose every acknowledged byte can be checked afterwards.

A file's content follows from its name, so the record of what was acknowledged needs only the name
and how far. Records are appended, before and after each operation, to a journal outside the file
system under test.
"""

import hashlib
import itertools
import json
import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

PIECE = 128 * 1024
SIZES = (1_000, 4_096, 10_240, 65_536, 70_000, 300_000, 2_097_152)


def content(name: str, size: int) -> bytes:
    """The bytes of a file, from its name alone."""
    block = hashlib.sha512(name.encode()).digest() * 1024
    turns = -(-size // len(block))
    return b"".join(
        hashlib.sha256(f"{name}/{i}".encode()).digest() + block[32:] for i in range(turns)
    )[:size]


class Journal:
    """One writer's record: a line per operation with its time."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115

    def done(self, what: str, **more: Any) -> None:
        """An operation has returned successfully."""
        self._file.write(json.dumps({"what": what, "at": time.monotonic(), **more}) + "\n")

    def close(self) -> None:
        """No more."""
        self._file.close()


def write_files(root: Path, number: int, seed: int, record: Path, stop: Event) -> None:
    """Write files until told to stop: create, write, fsync or not, close, sometimes rename."""
    chance = random.Random(seed * 1000 + number)
    journal = Journal(record)
    count = 0
    try:
        while not stop.is_set():
            folder = root / f"w{number}" / f"d{count // 50}"
            if count % 50 == 0:
                os.makedirs(folder, exist_ok=True)
                journal.done("mkdir")
            _write_file(folder, f"w{number}-{count}", chance, journal)
            count += 1
    except OSError as e:
        journal.done("error", error=f"{e.strerror}: {e.filename}")
    finally:
        journal.close()


def _write_file(folder: Path, name: str, chance: random.Random, journal: Journal) -> None:
    size = chance.choice(SIZES)
    data = content(name, size)
    path = folder / name
    synced = chance.random() < 0.7
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        journal.done("create")
        for start in range(0, size, PIECE):
            view = memoryview(data)[start : start + PIECE]
            while view:
                view = view[os.write(fd, view) :]
            journal.done("write")
        if synced:
            os.fsync(fd)
            journal.done("fsync", path=str(path), name=name, size=size)
    finally:
        os.close(fd)
    journal.done("close", path=str(path), name=name, size=size)
    if chance.random() < 0.2:
        new = path.with_name(name + ".renamed")
        journal.done("renaming", path=str(path), to=str(new))
        os.rename(path, new)
        journal.done("rename", path=str(path), to=str(new), name=name, size=size)


class Writers:
    """Several writers in processes of their own."""

    def __init__(self, root: Path, records: Path, number: int, seed: int) -> None:
        records.mkdir(parents=True, exist_ok=True)
        self.records = [records / f"writer{n}.jsonl" for n in range(number)]
        self._stop = multiprocessing.Event()
        self._processes = [
            multiprocessing.Process(
                target=write_files, args=(root, n, seed, record, self._stop), daemon=True
            )
            for n, record in enumerate(self.records)
        ]

    def start(self) -> None:
        """Begin to write."""
        for process in self._processes:
            process.start()

    def stop(self, timeout_s: float = 90.0) -> None:
        """Let each finish its file."""
        self._stop.set()
        self.wait(timeout_s)

    def kill(self) -> None:
        """kill -9. One that waits for an answer of the file system ends when that answer comes."""
        for process in self._processes:
            process.kill()

    def wait(self, timeout_s: float = 60.0) -> None:
        """Until all have ended; RuntimeError if one hangs."""
        for process in self._processes:
            process.join(timeout_s)
            if process.is_alive():
                raise RuntimeError(f"writer {process.pid} hangs")

    def crashes(self) -> list[str]:
        """Writers that ended by themselves in another way than told to, one sentence each."""
        return [f"writer {n} crashed with status {p.exitcode}"
                for n, p in enumerate(self._processes) if p.exitcode]  # fmt: skip

    def lines(self) -> Iterator[list[dict[str, Any]]]:
        """Each writer's record."""
        for record in self.records:
            lines = record.read_text().splitlines() if record.exists() else []
            yield [json.loads(line) for line in lines if line.endswith("}")]


def acknowledged(lines: list[dict[str, Any]]) -> dict[str, tuple[list[str], str, int]]:
    """name -> (paths where it may be now, name, size) of every file fsynced or closed."""
    found: dict[str, tuple[list[str], str, int]] = {}
    for line in lines:
        if line["what"] in ("fsync", "close"):
            found[line["name"]] = ([line["path"]], line["name"], line["size"])
        elif line["what"] == "rename":
            found[line["name"]] = ([line["to"]], line["name"], line["size"])
        elif line["what"] == "renaming":
            name = Path(line["path"]).name
            if name in found:
                found[name][0].append(line["to"])
    return found


def verify(lines: list[dict[str, Any]]) -> list[str]:
    """What is lost or differs, one sentence each."""
    problems = []
    for paths, name, size in acknowledged(lines).values():
        present = [p for p in paths if os.path.exists(p)]
        if len(present) != 1:
            problems.append(f"{name}: found at {present} of {paths}")
            continue
        try:
            data = Path(present[0]).read_bytes()
        except OSError as e:
            problems.append(f"{present[0]}: {e.strerror}")
            continue
        if data != content(name, size):
            problems.append(f"{present[0]}: {len(data)} bytes differ from the {size} written")
    return problems


def errors(lines: list[dict[str, Any]]) -> list[str]:
    """Errors that the writer saw."""
    return [line["error"] for line in lines if line["what"] == "error"]


def longest_pause_s(lines: list[dict[str, Any]], after: float, before: float) -> float:
    """The longest time without a completed operation that touches the window."""
    times = [line["at"] for line in lines]
    pauses = [b - a for a, b in itertools.pairwise(times) if b > after and a < before]
    return max(pauses, default=0.0)


def count_between(lines: list[dict[str, Any]], after: float, before: float) -> int:
    """Completed operations in a window."""
    return sum(after <= line["at"] < before for line in lines)
