"""Probes that make directories without a pause, and tell how long they had to wait."""

import itertools
import multiprocessing
import os
import time
from multiprocessing.synchronize import Event
from pathlib import Path

_PER_DIR = 500


def probe(root: Path, number: int, record: Path, stop: Event) -> None:
    """Make directories until told to stop; a line with the time for each that was acknowledged."""
    count = 0
    with open(record, "a", buffering=1, encoding="ascii") as lines:
        while not stop.is_set():
            name = f"p{number}/d{count // _PER_DIR}/{count}"
            try:
                (root / name).mkdir(parents=count % _PER_DIR == 0)
            except OSError as e:
                lines.write(f"{time.monotonic()} ERROR {name} {e.strerror}\n")
                return
            lines.write(f"{time.monotonic()} {name}\n")
            count += 1


class Probes:
    """All probes, and what they have written down."""

    def __init__(self, root: Path, records: Path, number: int) -> None:
        self.root = root
        self._records = [records / f"probe{n}" for n in range(number)]
        self._stop = multiprocessing.Event()
        self._processes = [
            multiprocessing.Process(target=probe, args=(root, n, record, self._stop))
            for n, record in enumerate(self._records)
        ]

    def start(self) -> None:
        """Begin."""
        for process in self._processes:
            process.start()

    def stop(self) -> None:
        """End; whoever hangs is killed, which `problems` will show."""
        self._stop.set()
        for process in self._processes:
            process.join(90)
            if process.is_alive():
                process.kill()

    def _lines(self) -> list[list[tuple[float, str]]]:
        found = []
        for record in self._records:
            parts = (line.split(" ", 1) for line in record.read_text("ascii").splitlines())
            found.append([(float(at), name) for at, name in parts])
        return found

    def stall_s(self, since: float, until: float) -> float:
        """The longest pause of a probe that begins or ends in this time."""
        longest = 0.0
        for lines in self._lines():
            times = [since, *(at for at, _ in lines if since <= at <= until)]
            longest = max(longest, *(b - a for a, b in zip(times, [*times[1:], until], strict=True)
                                     if b != until or b - a > 0.5))  # fmt: skip
        return longest

    def took_s(self, since: float, until: float) -> list[float]:
        """How long each operation took that ended in this time: probes make no pause."""
        return [
            b - a
            for lines in self._lines()
            for (a, _), (b, _) in itertools.pairwise(lines)
            if since <= b <= until
        ]

    def done_between(self, since: float, until: float) -> int:
        """Operations of all probes."""
        return sum(since <= at <= until for lines in self._lines() for at, _ in lines)

    def problems(self) -> list[str]:
        """What was acknowledged and is not there, and errors that a probe saw."""
        found = []
        there: dict[Path, set[str]] = {}
        for name in (name for lines in self._lines() for _, name in lines):
            if name.startswith("ERROR"):
                found.append(f"a probe saw an error: {name}")
                continue
            folder = (self.root / name).parent
            if folder not in there:
                there[folder] = _directories(folder)
            if Path(name).name not in there[folder]:
                found.append(f"lost: {name}")
        return found


def _directories(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_dir(follow_symlinks=False)}
    except FileNotFoundError:
        return set()
