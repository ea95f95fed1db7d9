"""The changelog files of a learner: appended to, rotated, compressed, dropped, repaired.

    changelog_ml.0.mfs                  lines are appended here
    changelog_ml.N.mfs, .N.mfs.zst      older ones, the greater N the older; with zstd if wanted

Lines are written as they come and made durable (`sync`) before the checkpoint of the state that
contains them. So after a crash the lines up to the state's are there, and behind them stands what
the kernel happened to write: the whole lines that follow one another are kept, the rest is cut off.
Everything after the state is applied once more, and lines that are there already are passed over.

Lines that will never come, because a snapshot came in their place, are a hole: it is marked by a
comment and told loudly. Comments have the forms of `changelogfiles.py`. If the masters have gone
back in time (old disks were put back), everything here is set aside, and history begins anew.
"""

import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import structlog
import zstandard

from raftfs.errors import UserError
from raftfs.meta.changelogfiles import hole_comment, read_lines
from raftfs.meta.state import changelog
from raftfs.meta.state.changelog import ChangelogError

log = structlog.get_logger("raftfs.learner.files")

_NAME = re.compile(r"changelog_ml\.(\d+)\.mfs(\.zst)?")
_NUMBER = re.compile(rb"(\d{1,20}): ")
_COMMENT = re.compile(rb"# [ -~]*")
_HOLE = re.compile(rb"# HOLE: lines \d+ to (\d+) missing")
_WINDOW = 1 << 20  # read from the end of a file at a time


class Hole(NamedTuple):
    """Lines that this learner never got."""

    first: int
    last: int


def changelogs(folder: Path) -> dict[int, Path]:
    """The changelog files of a folder by number."""
    found = {}
    for path in folder.iterdir():
        if match := _NAME.fullmatch(path.name):
            found[int(match[1])] = path
    return found


class ChangelogFiles:
    """The files of one folder. Belongs to the event loop, but for what says `thread`."""

    def __init__(
        self, folder: Path, settled: int, on_hole: Callable[[Hole], None] = lambda hole: None
    ) -> None:
        """Open and repair. `settled`: the last line whose effect is in the state. UserError."""
        self._folder = folder
        self._on_hole = on_hole
        self._lock = threading.Lock()  # the thread of a checkpoint syncs while the loop writes
        self._unsynced = False
        self._path = folder / "changelog_ml.0.mfs"
        try:
            self.last = self._repair(settled)
            self._fd = self._open()
        except OSError as e:
            raise _failed(self._path, e) from None
        self.jump(settled)

    # --- opening

    def _open(self) -> int:
        # Lines contain the sessions' secrets: they are not for everybody.
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        _sync_folder(self._folder)
        return fd

    def _repair(self, settled: int) -> int:
        """Cut the newest file behind its last good line; gives that line's number."""
        for path in self._folder.glob("changelog_ml.*.new"):
            path.unlink()  # a compression that was not finished
        for path in self._folder.glob("changelog_ml.*.mfs.zst"):
            if path.with_suffix("").exists():
                path.unlink()  # one that was not yet trusted
        last = 0
        if self._path.exists():
            with open(self._path, "r+b") as file:
                good, last = good_end(file.fileno(), settled)
                size = file.seek(0, os.SEEK_END)
                if good < size:
                    log.info("torn end of the changelog cut off", bytes=size - good)
                    file.truncate(good)
                    os.fsync(file.fileno())
        older = [path for number, path in sorted(changelogs(self._folder).items()) if number]
        while not last and older:
            last = last_line(older.pop(0))
        return last

    # --- writing

    def append(self, lines: list[tuple[int, str]]) -> None:
        """Write lines with their numbers; those that are there already are passed over."""
        text: list[str] = []
        for version, line in lines:
            if version <= self.last:
                continue
            if version > self.last + 1:
                self._write("".join(text))
                text = []
                self.jump(version - 1)
            text.append(line + "\n")
            self.last = version
        self._write("".join(text))

    def comment(self, text: str) -> None:
        """Write a comment."""
        self._write(text + "\n")

    def jump(self, version: int) -> None:
        """The state is that after this line: whatever is missing up to there never comes. Durable
        on return.
        """
        if version <= self.last:
            return
        hole = Hole(self.last + 1, version)
        self.comment(hole_comment(*hole))
        self.last = version
        self.sync()
        self._on_hole(hole)

    def _write(self, text: str) -> None:
        data = memoryview(text.encode("ascii"))
        if not data:
            return
        try:
            with self._lock:
                self._unsynced = True
                while data:
                    data = data[os.write(self._fd, data) :]
        except OSError as e:
            raise _failed(self._path, e) from None

    def sync(self) -> None:
        """Thread or loop: everything written so far is durable on return. UserError."""
        with self._lock:
            if self._unsynced:
                try:
                    os.fsync(self._fd)
                except OSError as e:
                    raise _failed(self._path, e) from None
                self._unsynced = False

    def close(self) -> None:
        """Nothing more will come."""
        self.sync()
        os.close(self._fd)

    def set_aside(self, version: int) -> Path:
        """The masters went back to an older state: lines behind `version` have another content from
        now on. What is here moves into a folder of its own, images as well, and history begins
        anew. Gives the folder.
        """
        aside = self._folder / f"before-{int(time.time())}-line-{version}"
        self.sync()
        try:
            with self._lock:
                os.close(self._fd)
                aside.mkdir()
                for path in self._folder.glob("*_ml.*"):
                    path.rename(aside / path.name)
                self._fd = self._open()
        except OSError as e:
            raise UserError(f"{self._folder}: files cannot be set aside: {e.strerror}") from None
        self.last = 0
        return aside

    # --- rotation

    def written_at(self) -> float | None:
        """When the newest file was last written to; None if nothing is in it."""
        status = os.fstat(self._fd)
        return status.st_mtime if status.st_size else None

    def rotate(self) -> None:
        """Begin a new file; the others move up by one. A crash leaves a gap in the numbers at
        worst, which the next rotation fills.
        """
        self.sync()
        try:
            with self._lock:
                os.close(self._fd)
                there = changelogs(self._folder)
                free = next(n for n in range(len(there) + 1) if n not in there)
                for number in range(free - 1, -1, -1):
                    end = there[number].name.partition(".mfs")[2]
                    there[number].rename(self._folder / f"changelog_ml.{number + 1}.mfs{end}")
                self._fd = self._open()
        except OSError as e:
            raise _failed(self._path, e) from None

    def compress_old(self) -> None:
        """Thread; not while `rotate` runs: zstd for every file but the newest. UserError."""
        for number, path in sorted(changelogs(self._folder).items()):
            if number and path.suffix != ".zst":
                try:
                    _compress(path)
                except OSError as e:
                    raise _failed(path, e) from None

    def drop_old(self, back_logs: int, covered: int) -> list[Path]:
        """Thread; not while `rotate` runs: remove files beyond `back_logs` whose lines all have
        their effect in an image that covers up to line `covered`. Gives what was removed.
        """
        there = changelogs(self._folder)
        dropped = []
        for number in sorted(there, reverse=True):
            if number <= back_logs or last_line(there[number]) > covered:
                break
            there[number].unlink()
            dropped.append(there[number])
        return dropped


def _failed(path: Path, error: OSError) -> UserError:
    return UserError(f"changelog {path} cannot be written: {error.strerror}")


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _compress(path: Path) -> None:
    target = path.with_name(path.name + ".zst")
    new = target.with_name(target.name + ".new")
    packer = zstandard.ZstdCompressor(level=3, write_checksum=True)
    with open(path, "rb") as source, open(new, "wb", opener=_private) as file:
        packer.copy_stream(source, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, target)
    _sync_folder(path.parent)
    path.unlink()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


# --- what is in a file --------------------------------------------------------------------------


def good_end(fd: int, settled: int) -> tuple[int, int]:
    """Where the good part of a file ends, and the number of its last line (0: it has none).

    Lines up to `settled` were durable: whatever has become of them, they are not torn. Behind them
    only whole lines that follow one another, and comments, are good.
    """
    start, data = _tail_with(fd, settled)
    at, last = 0, 0
    for end, line in _lines(data):
        number = _NUMBER.match(line)
        if number and int(number[1]) <= settled:
            at, last = end, int(number[1])
    for end, line in _lines(data[at:]):
        following = _follows(line, last)
        if following is None:
            return start + at + end - len(line) - 1, last
        last = following
    return start + data.rfind(b"\n") + 1, last


def _tail_with(fd: int, settled: int) -> tuple[int, bytes]:
    """So much of a file's end that a line up to `settled` is in it, or all of it; and where that
    begins.
    """
    size, window = os.fstat(fd).st_size, _WINDOW
    while True:
        start = max(0, size - window)
        data = os.pread(fd, size - start, start)
        if not start:
            return 0, data
        skipped = data.find(b"\n") + 1
        start, data = start + skipped, data[skipped:]
        numbers = (_NUMBER.match(line) for _, line in _lines(data))
        if any(n and int(n[1]) <= settled for n in numbers):
            return start, data
        window *= 2


def _lines(data: bytes) -> "list[tuple[int, bytes]]":
    """The whole lines, each with the place where it ends."""
    found, at = [], 0
    for line in data.split(b"\n")[:-1]:
        at += len(line) + 1
        found.append((at, line))
    return found


def _follows(line: bytes, last: int) -> int | None:
    """The last number after this line; None if it is no good line behind number `last`."""
    if line.startswith(b"#"):
        hole = _HOLE.fullmatch(line)
        return int(hole[1]) if hole else last if _COMMENT.fullmatch(line) else None
    try:
        version = changelog.parse(line.decode("ascii")).version
    except (ChangelogError, UnicodeDecodeError):
        return None
    return version if not last or version == last + 1 else None


def last_line(path: Path) -> int:
    """The number of the last line of a file that is not written to any more; 0 if it has none."""
    last = 0
    for _, text in read_lines(path):
        if match := _NUMBER.match(text.encode("utf-8", "surrogateescape")):
            last = int(match[1])
    return last
