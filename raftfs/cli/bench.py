"""`raftfs bench PATH`: what the articles measured, on any mounted tree and beside it on the local
disk.

The dd series writes zeros in blocks of 10K, 50K, 100K and 1M, once with the time of close, once
with fsync too; reading is cold where the kernel's caches may be dropped (as root). The small-file
run writes, reads and removes files of 10 KiB in directories of 50. Every figure is measured here
and now.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from raftfs.const import KIB, MIB
from raftfs.errors import UserError
from raftfs.units import format_size

_DD_BLOCKS = (("10K", 10 * KIB), ("50K", 50 * KIB), ("100K", 100 * KIB), ("1M", MIB))
_SMALL_BYTES = 10 * KIB
_PER_DIR = 50

Figures = dict[str, tuple[float, str]]  # name -> value, unit


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="raftfs bench", description="Measure a mounted tree beside the local disk."
    )
    p.add_argument("path", type=Path, help="a folder on the file system to measure")
    p.add_argument("--local", type=Path, metavar="DIR",
                   help="a folder on a local disk to compare with (default: the temporary folder)")
    p.add_argument("--count", type=int, default=5000, metavar="N",
                   help="blocks of each dd of the series (default: %(default)s; 1M: N/5)")
    p.add_argument("--files", type=int, default=1000, metavar="N",
                   help="small files (default: %(default)s)")
    p.add_argument("--quick", action="store_true", help="a tenth of both")
    p.add_argument("--json", action="store_true")
    return p  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    args = parser().parse_args(argv)
    if args.quick:
        args.count, args.files = max(10, args.count // 10), max(10, args.files // 10)
    try:
        local = args.local or Path(tempfile.gettempdir())
        here = measure(args.path, args.count, args.files)
        there = measure(local, args.count, args.files)
    except UserError as e:
        print(f"raftfs bench: {e}", file=sys.stderr)
        return e.exit_status
    if args.json:
        print(json.dumps({"path": here, "local": there}, indent=1))
        return 0
    print(f"{'':34}{str(args.path)[-18:]:>18}{'local disk':>18}{'ratio':>8}")
    for name, (value, unit) in here.items():
        other = there[name][0]
        print(f"{name:34}{value:11.1f} {unit:6}{other:11.1f} {unit:6}{value / other:8.2f}")
    return 0


def measure(path: Path, count: int, files: int) -> Figures:
    """All figures of one place, in a folder made for it and removed again. UserError."""
    figures: Figures = {}
    with _workplace(path, 2 * count * MIB // 5) as folder:
        for label, size in _DD_BLOCKS:
            number = count // 5 if size == MIB else count
            for sync in (False, True):
                name = f"dd {label} x {number}{' fsync' if sync else ''}"
                took = _timed(partial(_dd, folder / "dd", size, number, sync=sync))
                figures[f"write {name}"] = (size * number / MIB / took, "MB/s")
        drop_caches()
        size = (folder / "dd").stat().st_size
        took = _timed(lambda: _read(folder / "dd"))
        figures["read 1M cold"] = (size / MIB / took, "MB/s")
        (folder / "dd").unlink()
        figures |= _small_files(folder, files)
    return figures


def _small_files(folder: Path, files: int) -> Figures:
    data = os.urandom(_SMALL_BYTES)
    places = [folder / f"d{n // _PER_DIR}" / f"f{n}" for n in range(files)]
    for place in {p.parent for p in places}:
        place.mkdir()

    def write() -> None:
        for place in places:
            place.write_bytes(data)

    def read() -> None:
        for place in places:
            if place.read_bytes() != data:
                raise UserError(f"{place} does not hold what was written")

    def stat() -> None:
        for place in {p.parent for p in places}:
            for entry in os.scandir(place):
                entry.stat()

    def unlink() -> None:
        for place in places:
            place.unlink()

    figures: Figures = {}
    for what, work in (("create 10K", write), ("ls -l cold", stat), ("read 10K cold", read),
                       ("unlink", unlink)):  # fmt: skip
        if "cold" in what:
            drop_caches()
        figures[f"small files: {what}"] = (files / _timed(work), "/s")
    return figures


@contextmanager
def _workplace(path: Path, need_bytes: int) -> Iterator[Path]:
    try:
        free = shutil.disk_usage(path).free
        if free < need_bytes:
            raise UserError(
                f"{path} has {format_size(free)} free, the run needs {format_size(need_bytes)}: "
                "free some, or give --count"
            )
        folder = Path(tempfile.mkdtemp(prefix="raftfs-bench-", dir=path))
    except OSError as e:
        raise UserError(f"{path} cannot be measured: {e.strerror}") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _dd(path: Path, size: int, number: int, *, sync: bool) -> None:
    block = bytes(size)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        for _ in range(number):
            os.write(fd, block)
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)


def _read(path: Path) -> None:
    with open(path, "rb", buffering=0) as file:
        while file.read(MIB):
            pass


def drop_caches() -> None:
    """Have the kernel forget clean pages and entries, where we may."""
    os.sync()
    with suppress(PermissionError):
        Path("/proc/sys/vm/drop_caches").write_text("3")


if __name__ == "__main__":
    raise SystemExit(main())
