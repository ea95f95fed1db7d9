"""mfshdd.cfg: a chunkserver's disks. The grammar is the classic one.

    [*|<|~]PATH [SPACE]

`*`: marked for removal, its copies go elsewhere and nothing new comes. `<`: the same, but only to
the server's other disks. `~` is taken and means nothing here. SPACE: at most so much is used, or,
with `-` before it, so much is left free; a number with k M G T P E or Ki Mi Gi Ti Pi Ei and a B.
"""

import re
from pathlib import Path
from typing import NamedTuple

from raftfs.const import DISK_LEAVE_FREE
from raftfs.errors import ConfigError

_SPACE = re.compile(r"(-?)(\d+(?:\.\d*)?|\.\d+)([kMGTPE]|[KMGTPE]i)?B?")
_DECIMAL = {mark: 1000**power for power, mark in enumerate("kMGTPE", 1)}
_BINARY = {f"{mark}i": 1024**power for power, mark in enumerate("KMGTPE", 1)}
_UNITS = {"": 1, **_DECIMAL, **_BINARY}
_MARKS = "*<>~"
DISKS_MAX = 1_000


class HddLine(NamedTuple):
    """One disk. `limit`: bytes that may be used, 0: all. `leaving`: "" | "local" | "anywhere"."""

    number: int
    path: Path
    leaving: str = ""
    leave_free: int = DISK_LEAVE_FREE
    limit: int = 0


def parse_file(path: Path) -> list[HddLine]:
    """The lines of a file. ConfigError names the file and the first bad line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} cannot be read: {e}") from None
    return parse(text, str(path))


def parse(text: str, file: str = "mfshdd.cfg") -> list[HddLine]:
    """The lines of a text. One bad line refuses the whole."""
    lines: list[HddLine] = []
    for number, raw in enumerate(text.splitlines(), 1):
        content = raw.strip()
        if not content or content.startswith("#"):
            continue
        try:
            line = _parse_line(number, content)
            twin = next((x.number for x in lines if x.path == line.path), 0)
            if twin:
                raise ValueError(f"{line.path} is in line {twin} already")
            if len(lines) >= DISKS_MAX:
                raise ValueError(f"more than {DISKS_MAX} disks")
        except ValueError as e:
            raise ConfigError(f"{file}:{number}: {e}") from None
        lines.append(line)
    if not lines:
        raise ConfigError(f"{file} names no disk: give a folder on each, one a line")
    return lines


def _parse_line(number: int, content: str) -> HddLine:
    body = content.lstrip(_MARKS)
    marks = set(content[: len(content) - len(body)])
    if ">" in marks:
        raise ValueError("the mark > (move copies here from the other disks) is not known here")
    words = body.split()
    # A path may have spaces: only a last word that is a size is one.
    spaced = len(words) > 1 and _SPACE.fullmatch(words[-1]) is not None
    path = body[: -len(words[-1])].strip() if spaced else body
    if not path.startswith("/"):
        raise ValueError(f"{path or content!r} is no absolute path; a line is [*]PATH [SPACE]")
    if len(words) > 1 and not spaced and re.match(r"-?\.?\d", words[-1]):
        raise ValueError(f"{words[-1]!r} is no size: write 500GiB, 1.5TiB or -5GiB")
    leaving = "anywhere" if "*" in marks else "local" if "<" in marks else ""
    line = HddLine(number, Path(path), leaving)
    return _with_space(line, words[-1]) if spaced else line


def _with_space(line: HddLine, text: str) -> HddLine:
    match = _SPACE.fullmatch(text)
    assert match is not None
    size = int(float(match[2]) * _UNITS[match[3] or ""])
    if match[1]:
        return line._replace(leave_free=size)
    if not size:
        raise ValueError("a limit of nothing: mark the disk for removal with * instead")
    return line._replace(limit=size)
