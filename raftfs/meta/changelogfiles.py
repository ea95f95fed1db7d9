"""Changelog files for reading: plain or zstd-compressed, one by one or merged by line numbers.

Beside the lines (`state/changelog.py`) there are comments, which begin with `#`. Two of them mean
something:

    # HOLE: lines 17 to 20 missing             whoever wrote the file never got these
    # DIGEST: after line 16, entry 12: 0f3a..  the masters agreed on this digest of the state
"""

import heapq
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import zstandard

from raftfs.errors import UserError

_DIGEST = re.compile(r"# DIGEST: after line (\d+), entry (\d+): ([0-9a-f]{32})")
_NUMBER = re.compile(r"(\d{1,20}): ")
_CHANGELOG = re.compile(r"changelog(_ml(_back)?)?\.\d+\.mfs(\.zst)?")
_LINE_MAX = 1 << 20  # the longest command with every byte escaped is far below it


class Digest(msgspec.Struct, frozen=True):
    """The digest of the state after entry `index` of the log, whose last line is `version`."""

    version: int
    index: int
    digest: bytes


class Survey(NamedTuple):
    """What a file contains: its lines' numbers (0: none), how many, and the digests. `problem`: why
    it cannot be read to its end ("": it can).
    """

    path: Path
    first: int
    last: int
    lines: int
    digests: list[Digest]
    problem: str


class Numbered(NamedTuple):
    """A changelog line as text, unparsed: the number that it begins with, and where it stands."""

    version: int
    text: str
    path: Path
    line: int


def hole_comment(first: int, last: int) -> str:
    """Tells readers that lines are missing."""
    return f"# HOLE: lines {first} to {last} missing"


def digest_comment(version: int, index: int, digest: bytes) -> str:
    """Lets a replay check itself. May stand anywhere behind the line that it names."""
    return f"# DIGEST: after line {version}, entry {index}: {digest.hex()}"


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Every line of a file with its number in it, from 1, without its newline; comments, too.

    UserError if the file cannot be read or decompressed.
    """
    try:
        with open(path, "rb") as raw:
            source: Any = raw
            if path.suffix == ".zst":
                source = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
            # Foreign bytes must reach the line's checksum, not stop the reader.
            text = io.TextIOWrapper(source, "utf-8", "surrogateescape", newline="\n")
            number = 0
            while line := text.readline(_LINE_MAX):
                number += 1
                yield number, line.removesuffix("\n")
    except zstandard.ZstdError as e:
        raise UserError(f"changelog {path} is damaged: {e}") from None
    except OSError as e:
        raise UserError(f"changelog {path} cannot be read: {e.strerror}") from None


def _numbered(path: Path) -> Iterator[Numbered]:
    """The changelog lines of a file. What does not begin as one comes in its place, to be refused
    by whoever parses it.
    """
    version = 0
    for number, text in read_lines(path):
        if text.startswith("#") or not text:
            continue
        match = _NUMBER.match(text)
        version = int(match[1]) if match else version + 1
        yield Numbered(version, text, path, number)


def survey(path: Path) -> Survey:
    """Look through a file."""
    first = last = lines = 0
    digests, problem = [], ""
    try:
        for _, text in read_lines(path):
            if match := _DIGEST.fullmatch(text):
                digests.append(Digest(int(match[1]), int(match[2]), bytes.fromhex(match[3])))
            elif match := _NUMBER.match(text):
                last = int(match[1])
                first = first or last
                lines += 1
    except UserError as e:
        problem = str(e)
    return Survey(path, first, last, lines, digests, problem)


def changelogs_in(folder: Path) -> list[Path]:
    """The changelogs of a folder, by the names that masters and metaloggers give them."""
    found = {path.name: path for path in folder.iterdir() if _CHANGELOG.fullmatch(path.name)}
    # A compressed one beside the plain one was not finished when somebody stopped.
    return sorted(p for name, p in found.items() if name.removesuffix(".zst") not in found
                  or not name.endswith(".zst"))  # fmt: skip


def merged(surveys: Sequence[Survey]) -> Iterator[Numbered]:
    """The lines of all files by number, equal numbers behind each other. Each file is opened when
    its first line is due.
    """
    waiting = sorted((s for s in surveys if s.lines), key=lambda s: s.first, reverse=True)
    heap: list[tuple[int, int, Numbered, Iterator[Numbered]]] = []
    opened = 0
    while waiting or heap:
        if waiting and (not heap or waiting[-1].first <= heap[0][0]):
            opened += 1
            lines = _numbered(waiting.pop().path)
        else:
            _, _, line, lines = heapq.heappop(heap)
            yield line
        following = next(lines, None)
        if following is not None:
            heapq.heappush(heap, (following.version, opened, following, lines))
