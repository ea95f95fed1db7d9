"""Changelog lines: classic ones that lose nothing.

    VERSION: TIMESTAMP|OP(args):result;ns=..,s=..,q=..,...,c=CHECKSUM
    43933: 1795305082|CREATE(7706,d1,2,511,18,0,0,0):7707;ns=5,s=1,q=9,r=7707.2.493....,c=1f0e55aa

What stands before `;` is the family's format: the operations and their arguments have its names and
order, names are escaped as there (%XX). What it cannot say stands in the tail:

    ns  nanoseconds of the timestamp's second      op  which operation, where two share a name
    s   session (0 left out)                       r   the whole result, its fields joined by dots
    q   sequence number (0 left out)               c   CRC32 of everything before it
    and every field of the operation that the arguments lack, by name, unless it has its default.

So `parse(render(...))` gives back exactly what went in, and a replay of lines can check results.
Only operations of raftfs have classic names of their own: SETVERSION, DROPCOPY, CHUNKDEL, SESDEL,
FOUND, MEMBER, DIGEST. A NewSession's secret stands in its line: changelogs are not for everybody.
"""

import re
import types
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import msgspec

from raftfs.errors import UserError, invariant
from raftfs.wire import ops
from raftfs.wire.ops import Command, Record, Result, Written

_SECOND = 1_000_000_000


class ChangelogError(UserError):
    """A line is damaged or was not written by raftfs; the message says what is wrong."""


class Line(NamedTuple):
    """A line's content. `version` numbers the lines; `time` is the entry's, in nanoseconds."""

    version: int
    time: int
    command: Command
    result: Result


# --- which operation looks how ----------------------------------------------------------------

# An argument is the name of a field of the operation (and parsed), or only shown: computed from
# command and decoded result, for readers that know the classic form.
_Shown = Callable[[Command, Any], object]
_Argument = str | _Shown


class _Form(NamedTuple):
    """How an operation is written. `result` is the type of its value."""

    op: type[ops.Tagged]
    name: str
    arguments: tuple[_Argument, ...]
    result: Any = None
    shown_result: _Shown | None = None


def _session(command: Command, value: Any) -> object:
    return command.session


def _inode(command: Command, value: Any) -> object:
    return value.inode


def _zero(command: Command, value: Any) -> object:
    return 0


def _one(command: Command, value: Any) -> object:
    return 1


def _attr(field: str, unit: int = 1) -> _Shown:
    return lambda command, value: getattr(value, field) // unit


def _chunk_changed(command: Command, value: Any) -> object:
    return int(value.fresh or value.reserved > 0)


def _goal_counts(command: Command, value: Any) -> object:
    return f"{value.changed},{value.unchanged},{value.denied}"


_FORMS = (
    _Form(ops.Create, "CREATE",
          ("parent", "name", "type", "mode", "umask", "uid", "gid", "rdev"), ops.Attr, _inode),
    _Form(ops.Symlink, "SYMLINK", ("parent", "name", "target", "uid", "gid"), ops.Attr, _inode),
    _Form(ops.Link, "LINK", ("inode", "parent", "name"), ops.Attr),
    _Form(ops.Unlink, "UNLINK", ("parent", "name"), ops.Removed, _inode),
    _Form(ops.Rmdir, "UNLINK", ("parent", "name"), ops.Removed, _inode),
    _Form(ops.Rename, "MOVE",
          ("src_parent", "src_name", "dst_parent", "dst_name"), ops.Removed, _inode),
    _Form(ops.SetAttr, "ATTR",
          ("inode", _attr("mode"), _attr("uid"), _attr("gid"), _attr("atime", _SECOND),
           _attr("mtime", _SECOND), _zero, _zero), ops.Attr),
    _Form(ops.Length, "LENGTH", ("inode", "length", _one), ops.Attr),
    _Form(ops.CommitWrite, "LENGTH", ("inode", _attr("length"), _zero), ops.Attr),
    _Form(ops.Acquire, "ACQUIRE", (_session, "inode"), ops.Attr),
    _Form(ops.Release, "RELEASE", (_session, "inode"), bool),
    _Form(ops.GrantWrite, "WRITE", ("inode", "index", _chunk_changed, _zero), ops.Granted,
          lambda command, value: value.chunk),
    _Form(ops.SetVersion, "SETVERSION", ("chunk", "version")),
    _Form(ops.Unlock, "UNLOCK", ("chunk",)),
    _Form(ops.DropCopy, "DROPCOPY", ("chunk", "version", "server")),
    _Form(ops.ForgetChunk, "CHUNKDEL", ("chunk",)),
    _Form(ops.SetGoal, "SETGOAL", ("inode", "uid", "goal", "mode"), ops.GoalCounts, _goal_counts),
    _Form(ops.NewSession, "SESSION", (), int, lambda command, value: value),
    _Form(ops.EndSession, "SESDEL", ("session",)),
    _Form(ops.Found, "FOUND", ("cluster",)),
    _Form(ops.ReplaceMember, "MEMBER", ("name", "uuid")),
    _Form(ops.AddMember, "MEMBERADD", ("name", "uuid")),
    _Form(ops.RemoveMember, "MEMBERDEL", ("name",)),
    _Form(ops.Digest, "DIGEST", ("index", "value")),
    _Form(ops.Checkpoint, "CHECKPOINT", ()),
)  # fmt: skip

_BY_OP = {form.op: form for form in _FORMS}
# The first of several operations that share a classic name needs no `op` in its tail.
_BY_NAME = {form.name: form for form in reversed(_FORMS)}
_BY_OP_NAME = {form.op.__name__: form for form in _FORMS}

# Bytes that are numbers rather than names.
_HEX_FIELDS = frozenset(("cluster", "uuid", "server", "secret", "value"))


class _Field(NamedTuple):
    """A field of an operation, how it is written, and how it is read."""

    name: str
    default: Any  # msgspec.NODEFAULT if there is none
    write: Callable[[Any], str]
    read: Callable[[str], Any]


# --- values as text -----------------------------------------------------------------------------

_ESCAPED = tuple(
    f"%{c:02X}" if c < 32 or c >= 127 or c in b",%()" else chr(c) for c in range(256)
)
_BAD_ESCAPE = re.compile(r"%(?![0-9A-F]{2})")
_NEEDS_ESCAPE = re.compile(rb"[^ -~]|[,%()]")


def escape(name: bytes) -> str:
    """A name as the classic changelog writes it: %XX for control, non-ASCII and `,%()`."""
    if _NEEDS_ESCAPE.search(name) is None:
        return name.decode("ascii")
    return "".join([_ESCAPED[c] for c in name])


def unescape(text: str) -> bytes:
    """Inverse of `escape`. ValueError for anything that it does not write."""
    data = text.encode("ascii")
    if b"%" not in data:
        return data
    if _BAD_ESCAPE.search(text):
        raise ValueError("bad escape")
    first, *rest = data.split(b"%")
    return first + b"".join(bytes.fromhex(part[:2].decode()) + part[2:] for part in rest)


def _read_bool(text: str) -> bool:
    return {"0": False, "1": True}[text]


def _write_written(chunks: list[Written]) -> str:
    return "+".join(_write_record(w) for w in chunks)


def _read_written(text: str) -> list[Written]:
    return [_read_record(Written, part) for part in text.split("+")] if text else []


# Members' names: everything that could be taken for a separator is escaped.
def _write_members(members: dict[str, bytes]) -> str:
    return "+".join(
        f"{escape(k.encode()).replace('+', '%2B').replace('/', '%2F')}/{v.hex()}"
        for k, v in members.items()
    )


def _read_members(text: str) -> dict[str, bytes]:
    items = [part.split("/") for part in text.split("+")] if text else []
    return {unescape(name).decode(): bytes.fromhex(uuid) for name, uuid in items}


def _write_optional(value: int | None) -> str:
    return "-" if value is None else str(value)


def _read_optional(text: str) -> int | None:
    return None if text == "-" else int(text)


def _converters(name: str, kind: Any) -> tuple[Callable[[Any], str], Callable[[str], Any]]:
    if kind is int:
        return str, int
    if kind is bool:
        return (lambda v: "1" if v else "0"), _read_bool
    if kind is bytes:
        return (bytes.hex, bytes.fromhex) if name in _HEX_FIELDS else (escape, unescape)
    if kind is str:
        return (lambda v: escape(v.encode())), (lambda t: unescape(t).decode())
    if isinstance(kind, types.UnionType) and set(get_args(kind)) == {int, type(None)}:
        return _write_optional, _read_optional
    if kind == list[Written]:
        return _write_written, _read_written
    invariant(kind == dict[str, bytes], f"changelog: no text form for field {name}: {kind}")
    return _write_members, _read_members


def _fields_of(op: type[ops.Tagged]) -> dict[str, _Field]:
    return {
        f.name: _Field(f.name, f.default, *_converters(f.name, f.type))
        for f in msgspec.structs.fields(op)
    }


_FIELDS = {form.op: _fields_of(form.op) for form in _FORMS}
# The fields that go into the tail, for each operation.
_TAIL = {
    form.op: [f for n, f in _FIELDS[form.op].items() if n not in form.arguments]
    for form in _FORMS
}
_DECODERS = {
    form.op: msgspec.msgpack.Decoder(type(None) if form.result is None else form.result)
    for form in _FORMS
}


def _write_record(record: Record) -> str:
    """Ints and bools, joined by dots."""
    return ".".join([str(int(v)) for v in msgspec.structs.astuple(record)])


def _read_record(kind: type[Any], text: str) -> Any:
    """Inverse of `_write_record`. ValueError."""
    values = [int(part) for part in text.split(".")]
    fields = msgspec.structs.fields(kind)
    if len(values) != len(fields):
        raise ValueError(f"{kind.__name__} has {len(fields)} fields, not {len(values)}")
    return kind(*(bool(v) if f.type is bool else v for v, f in zip(values, fields, strict=True)))


# --- lines --------------------------------------------------------------------------------------


def render(version: int, time_ns: int, command: Command, result: Result) -> str:
    """The line of one successful command, without a newline."""
    invariant(result.status == 0, "a refused command has no changelog line")
    op = command.op
    kind = type(op)
    form, fields = _BY_OP[kind], _FIELDS[kind]
    value = _DECODERS[kind].decode(result.value)
    arguments = [
        fields[a].write(getattr(op, a)) if isinstance(a, str) else str(a(command, value))
        for a in form.arguments
    ]
    seconds, ns = divmod(time_ns, _SECOND)
    shown = "" if form.shown_result is None else f":{form.shown_result(command, value)}"
    tail = [f"ns={ns}"]
    if command.session:
        tail.append(f"s={command.session}")
    if command.seq:
        tail.append(f"q={command.seq}")
    if _BY_NAME[form.name] is not form:
        tail.append(f"op={kind.__name__}")
    for field in _TAIL[kind]:
        content = getattr(op, field.name)
        if content != field.default:
            tail.append(f"{field.name}={field.write(content)}")
    if isinstance(value, Record):
        tail.append(f"r={_write_record(value)}")
    elif form.result is bool:
        tail.append(f"r={int(value)}")
    elif value is not None:
        tail.append(f"r={value}")
    line = f"{version}: {seconds}|{form.name}({','.join(arguments)}){shown};{','.join(tail)}"
    return f"{line},c={zlib.crc32(line.encode('ascii')):08x}"


_LINE = re.compile(r"(\d+): (-?\d+)\|([A-Z]+)\(([^()]*)\)(?::([-\d,]*))?;([ -~]*)")
_CHECKSUM = re.compile(r",c=([0-9a-f]{8})\n?\Z")


def parse(line: str) -> Line:
    """Inverse of `render`; a newline at the end is allowed. ChangelogError."""
    start = line.split(":", 1)[0][:20]
    checksum = _CHECKSUM.search(line)
    if checksum is None:
        raise ChangelogError(
            f"changelog line {start!r}: its end (,c=checksum) is missing: "
            "the line is cut, or it was not written by raftfs"
        )
    body = line[: checksum.start()]
    if zlib.crc32(body.encode("utf-8", "surrogateescape")) != int(checksum[1], 16):
        raise ChangelogError(f"changelog line {start!r}: checksum mismatch: the line is damaged")
    match = _LINE.fullmatch(body)
    if match is None:
        raise ChangelogError(
            f"changelog line {start!r}: not of the form VERSION: TIMESTAMP|OP(args):result;tail"
        )
    try:
        return _build(match)
    except (ValueError, KeyError, TypeError) as e:
        raise ChangelogError(f"changelog line {start!r}: {match[3]}: bad field: {e}") from e


def _build(match: re.Match[str]) -> Line:
    """The line behind a match of _LINE. ValueError, KeyError, TypeError if its fields are not
    those of the operation."""
    tail = dict(part.split("=", 1) for part in match[6].split(","))
    form = _BY_OP_NAME[tail.pop("op")] if "op" in tail else _BY_NAME[match[3]]
    if form.name != match[3]:
        raise ValueError(f"op={form.op.__name__} does not belong here")
    arguments = match[4].split(",") if form.arguments else []
    if len(arguments) != len(form.arguments):
        raise ValueError(f"{len(form.arguments)} arguments expected, {len(arguments)} found")
    fields = _FIELDS[form.op]
    content = {
        a: fields[a].read(text)
        for a, text in zip(form.arguments, arguments, strict=True)
        if isinstance(a, str)
    }
    time = int(match[2]) * _SECOND + int(tail.pop("ns"))
    session, seq = int(tail.pop("s", "0")), int(tail.pop("q", "0"))
    value = _read_result(form.result, tail.pop("r", ""))
    for name, text in tail.items():
        content[name] = fields[name].read(text)
    command = Command(session, seq, form.op(**content))  # type: ignore[arg-type]
    return Line(int(match[1]), time, command, Result(0, msgspec.msgpack.encode(value)))


def _read_result(kind: Any, text: str) -> Any:
    if kind is None:
        return None
    if kind is bool:
        return _read_bool(text)
    return int(text) if kind is int else _read_record(kind, text)
