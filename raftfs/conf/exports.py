"""mfsexports.cfg: who may mount what, and how. The grammar and the choice are the classic ones.

    ADDRESS DIRECTORY [OPTION{,OPTION}]

ADDRESS: `*`, `A.B.C.D`, `A.B.C.D/BITS`, `A.B.C.D/MASK`, `A.B.C.D-E.F.G.H`. DIRECTORY: `/path`, or
`.` for the meta file system. All lines that match are candidates; the most generous one applies.
"""

import grp
import hashlib
import hmac
import ipaddress
import pwd
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from raftfs.const import GOAL_MAX, GOAL_MIN
from raftfs.errors import ConfigError

_DURATION = re.compile(r"^(?:(\d+)w)?(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?$", re.I)
_NOBODY = (999, 999)


class ExportLine(NamedTuple):
    """One line. Addresses as integers, both ends included; digests are MD5 of passwords."""

    number: int
    first: int
    last: int
    path: str
    readonly: bool = True
    alldirs: bool = False
    dynamicip: bool = False
    ignoregid: bool = False
    maproot: tuple[int, int] = _NOBODY
    mapall: tuple[int, int] | None = None
    password: bytes | None = None
    minversion: tuple[int, int, int] = (0, 0, 0)
    mingoal: int = GOAL_MIN
    maxgoal: int = GOAL_MAX
    mintrashtime: int = 0
    maxtrashtime: int = 2**32 - 1


def default_lines() -> list[ExportLine]:
    """What applies without a file: everybody may mount everything, read-write, as root."""
    return [ExportLine(0, 0, 2**32 - 1, "/", readonly=False, alldirs=True, maproot=(0, 0))]


def parse_file(path: Path) -> list[ExportLine]:
    """The lines of a file. ConfigError names the file and the first bad line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} cannot be read: {e}") from None
    return parse(text, str(path))


def parse(text: str, file: str = "mfsexports.cfg") -> list[ExportLine]:
    """The lines of a text. One bad line refuses the whole."""
    lines = []
    for number, raw in enumerate(text.splitlines(), 1):
        content = raw.partition("#")[0].strip()
        if not content:
            continue
        try:
            lines.append(_parse_line(number, content.split()))
        except ValueError as e:
            raise ConfigError(f"{file}:{number}: {e}") from None
    return lines


def _parse_line(number: int, words: list[str]) -> ExportLine:
    if len(words) not in (2, 3):
        raise ValueError("a line is ADDRESS DIRECTORY [OPTION,OPTION...]")
    first, last = _addresses(words[0])
    path = words[1]
    if path != "." and not path.startswith("/"):
        raise ValueError(f"directory {path!r} must begin with / (or be . for the meta mount)")
    line = ExportLine(number, first, last, path if path == "." else "/" + path.strip("/"))
    for option in filter(None, words[2].split(",") if len(words) == 3 else []):
        line = _with_option(line, *option.partition("=")[::2])
    return line


def _addresses(text: str) -> tuple[int, int]:
    if text == "*":
        return 0, 2**32 - 1
    try:
        if "-" in text:
            low, high = (int(ipaddress.IPv4Address(a)) for a in text.split("-", 1))
            if low > high:
                raise ValueError
            return low, high
        net = ipaddress.IPv4Network(text, strict=False)
    except ValueError:
        raise ValueError(
            f"address {text!r} must be *, A.B.C.D, A.B.C.D/BITS, A.B.C.D/MASK or a range"
        ) from None
    return int(net.network_address), int(net.broadcast_address)


def _with_option(line: ExportLine, name: str, value: str) -> ExportLine:
    flags: dict[str, dict[str, Any]] = {
        "ro": {"readonly": True}, "readonly": {"readonly": True}, "rw": {"readonly": False},
        "readwrite": {"readonly": False}, "alldirs": {"alldirs": True},
        "dynamicip": {"dynamicip": True}, "ignoregid": {"ignoregid": True},
    }  # fmt: skip
    name = name.lower()
    if name in flags and not value:
        return line._replace(**flags[name])
    parsers: dict[str, Callable[[str], Any]] = {
        "maproot": _identity, "mapall": _identity, "minversion": _version, "mingoal": _goal,
        "maxgoal": _goal, "mintrashtime": _duration, "maxtrashtime": _duration,
    }  # fmt: skip
    if name == "password" and value:
        return line._replace(password=hashlib.md5(value.encode()).digest())
    if name == "md5pass" and re.fullmatch(r"[0-9a-fA-F]{32}", value):
        return line._replace(password=bytes.fromhex(value))
    if name not in parsers or not value:
        raise ValueError(f"option {name + ('=' + value if value else '')!r} is not known")
    return line._replace(**{name: parsers[name](value)})


def _identity(value: str) -> tuple[int, int]:
    user, colon, group = value.partition(":")
    try:
        entry = None if user.isdigit() else pwd.getpwnam(user)
        uid = int(user) if entry is None else entry.pw_uid
        if colon:
            gid = int(group) if group.isdigit() else grp.getgrnam(group).gr_gid
        else:
            gid = entry.pw_gid if entry is not None else pwd.getpwuid(uid).pw_gid
    except KeyError:
        raise ValueError(f"user or group in {value!r} is not known here") from None
    return uid, gid


def _version(value: str) -> tuple[int, int, int]:
    parts = value.split(".")
    if not 1 <= len(parts) <= 3 or not all(p.isdigit() for p in parts):
        raise ValueError(f"version {value!r} must be X, X.Y or X.Y.Z")
    numbers = [int(p) for p in parts] + [0, 0]
    return numbers[0], numbers[1], numbers[2]


def _goal(value: str) -> int:
    if not value.isdigit() or not GOAL_MIN <= int(value) <= GOAL_MAX:
        raise ValueError(f"goal {value!r} must be {GOAL_MIN} to {GOAL_MAX}")
    return int(value)


def _duration(value: str) -> int:
    match = _DURATION.match(value)
    if not value or match is None:
        raise ValueError(f"time {value!r} must be seconds or like 1w2d3h4m5s")
    units = (604_800, 86_400, 3_600, 60, 1)
    return sum(int(n) * u for n, u in zip(match.groups(), units, strict=True) if n)


def choose(
    lines: Sequence[ExportLine],
    address: str,
    version: str,
    path: str,
    proof: bytes,
    challenge: bytes,
) -> ExportLine | str:
    """The line that applies to a client, or why none does (a sentence)."""
    try:
        number = int(ipaddress.IPv4Address(address))
    except ValueError:
        number = -1
    wanted = "/" + path.strip("/")
    best: ExportLine | None = None
    needs_password = False
    for line in lines:
        anybody = (line.first, line.last) == (0, 2**32 - 1)
        if not (anybody or line.first <= number <= line.last):
            continue
        below = wanted == line.path or (
            line.alldirs and (line.path == "/" or wanted.startswith(line.path + "/"))
        )
        if not below or _version_of(version) < line.minversion:
            continue
        if line.password is not None and not _proves(line.password, proof, challenge):
            needs_password = True
            continue
        if best is None or _generosity(line) > _generosity(best):
            best = line
    if best is not None:
        return best
    if needs_password:
        return "wrong password" if proof else "password needed"
    return f"no export for {address} and {wanted}"


def _proves(password: bytes, proof: bytes, challenge: bytes) -> bool:
    wanted = hashlib.md5(challenge[:16] + password + challenge[16:]).digest()
    return len(challenge) == 32 and hmac.compare_digest(wanted, proof)


def _version_of(text: str) -> tuple[int, int, int]:
    numbers = [int(p) for p in re.findall(r"\d+", text)[:3]] + [0, 0, 0]
    return numbers[0], numbers[1], numbers[2]


def _generosity(line: ExportLine) -> tuple[bool, bool, bool, int]:
    """Classic order: rw over ro, root as root, with password over without, the longer path."""
    return (
        not line.readonly, line.maproot[0] == 0, line.password is not None, len(line.path)
    )  # fmt: skip
