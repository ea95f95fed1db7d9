"""Changelog lines: classic text, nothing lost, damage noticed."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raftfs.errors import RaftfsError
from raftfs.meta.state.apply import apply_batch
from raftfs.meta.state.changelog import Line, escape, parse, render, unescape
from raftfs.wire import ops
from raftfs.wire.ops import Command, Result, Written
from tests.unit.state.cluster import Cluster

_number = st.integers(0, 2**63 - 1)
_names = st.binary(max_size=40)
_by_type = {
    int: st.integers(-(2**63), 2**63 - 1), bool: st.booleans(), bytes: _names,
    int | None: st.none() | st.integers(-(2**63), 2**63 - 1), str: st.text(max_size=20),
    list[Written]: st.lists(st.builds(Written, _number, _number, st.booleans()), max_size=3),
    dict[str, bytes]: st.dictionaries(st.text(max_size=9), _names, max_size=3),
}  # fmt: skip


def _records(kind):  # type: ignore[no-untyped-def]
    return st.builds(kind, *(_by_type[f.type] for f in msgspec.structs.fields(kind)))


_results = {
    ops.Create: ops.Attr, ops.Symlink: ops.Attr, ops.Link: ops.Attr, ops.SetAttr: ops.Attr,
    ops.Length: ops.Attr, ops.CommitWrite: ops.Attr, ops.Acquire: ops.Attr,
    ops.Unlink: ops.Removed, ops.Rmdir: ops.Removed, ops.Rename: ops.Removed,
    ops.GrantWrite: ops.Granted, ops.SetGoal: ops.GoalCounts,
}  # fmt: skip
OPERATIONS = ops.Op.__args__


def _values(kind):  # type: ignore[no-untyped-def]
    if kind in _results:
        return _records(_results[kind])
    return {ops.Release: st.booleans(), ops.NewSession: _number}.get(kind, st.none())


_lines = st.one_of(
    [st.tuples(_number, st.integers(-(2**62), 2**62), _number, _number, _records(k), _values(k))
     for k in OPERATIONS]
)  # fmt: skip


@pytest.mark.parametrize("kind", OPERATIONS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_every_operation_has_a_line(kind: type, data: st.DataObject) -> None:
    op, value = data.draw(_records(kind)), data.draw(_values(kind))
    command, result = Command(1, 2, op), Result(0, msgspec.msgpack.encode(value))
    assert parse(render(7, 10**18, command, result)) == Line(7, 10**18, command, result)


@settings(max_examples=600, deadline=None)
@given(_lines)
def test_parse_gives_back_what_was_rendered(case) -> None:  # type: ignore[no-untyped-def]
    version, time, session, seq, op, value = case
    command, result = Command(session, seq, op), Result(0, msgspec.msgpack.encode(value))
    line = render(version, time, command, result)
    assert line.isprintable() and line.isascii()
    assert parse(line) == parse(line + "\n") == Line(version, time, command, result)


@given(_names)
def test_escaping(name: bytes) -> None:
    assert unescape(escape(name)) == name


def test_classic_escapes() -> None:
    assert escape(b"a,b%(c)\n\xff d;=") == "a%2Cb%25%28c%29%0A%FF d;="


T = 1795305082 * 10**9 + 5
ATTR = ops.Attr(7707, 2, 384, 0, 0, 1795305093 * 10**9, 1795305092 * 10**9, 0, 1, 6, 0, 2)


@pytest.mark.parametrize(
    ("op", "value", "classic"),
    [
        (ops.Create(7706, b"d1", 2, 511, 18, 0, 0, 0), ATTR, "CREATE(7706,d1,2,511,18,0,0,0):7707"),
        (ops.Symlink(7707, b"sym", b"w", 0, 0), ATTR, "SYMLINK(7707,sym,w,0,0):7707"),
        (ops.Link(7709, 7707, b"hard"), ATTR, "LINK(7709,7707,hard)"),
        (ops.Unlink(7, b"hard"), ops.Removed(8, True), "UNLINK(7,hard):8"),
        (ops.Rmdir(7, b"d1"), ops.Removed(8, True), "UNLINK(7,d1):8"),
        (ops.Rename(7, b"w", 7, b"w2"), ops.Removed(9, False), "MOVE(7,w,7,w2):9"),
        (ops.SetAttr(7707, mode=384), ATTR, "ATTR(7707,384,0,0,1795305093,1795305092,0,0)"),
        (ops.Length(7709, 10), ATTR, "LENGTH(7709,10,1)"),
        (ops.CommitWrite(7709, 6, -1, []), ATTR, "LENGTH(7709,6,0)"),
        (ops.Acquire(7708), ATTR, "ACQUIRE(1,7708)"),
        (ops.Release(4725), True, "RELEASE(1,4725)"),
        (ops.GrantWrite(7709, 0, False), ops.Granted(3325, 1, 0, 4, True, 0),
         "WRITE(7709,0,1,0):3325"),
        (ops.GrantWrite(7709, 0, False), ops.Granted(3325, 1, 0, 4, False, 0),
         "WRITE(7709,0,0,0):3325"),
        (ops.Unlock(3325, 4), None, "UNLOCK(3325)"),
        (ops.SetGoal(8, 0, 3), ops.GoalCounts(1, 2, 0), "SETGOAL(8,0,3,0):1,2,0"),
        (ops.NewSession(b"s", "x"), 5, "SESSION():5"),
    ],
)
def test_classic_text(op: ops.Op, value: object, classic: str) -> None:
    line = render(43933, T, Command(1, 2, op), Result(0, msgspec.msgpack.encode(value)))
    assert line.split(";")[0] == f"43933: 1795305082|{classic}"


def test_any_damage_is_noticed() -> None:
    result = Result(0, msgspec.msgpack.encode(ATTR))
    line = render(1, T, Command(3, 4, ops.Create(1, b"name", 1, 2, 3, 4, 5)), result)
    for at in range(len(line)):
        for bad in (line[:at], line[:at] + "~" + line[at + 1 :], line[:at] + line[at + 1 :]):
            if bad != line:
                with pytest.raises(RaftfsError, match="changelog line"):
                    parse(bad)
    with pytest.raises(RaftfsError, match="missing"):
        parse("43933: 1795305082|CREATE(7706,d1,2,511,18,0,0,0):7707")


def test_a_replay_of_the_lines_gives_the_same_state() -> None:
    c = Cluster()
    file = c.do(ops.Create(1, b"a,b", 1, 0o644, 0, 0, 0, 0, True), seq=1).inode
    g = c.do(ops.GrantWrite(file, 0, False))
    c.do(ops.CommitWrite(file, 9, -1, [Written(g.chunk, g.lock, True)]), seq=2)
    c.do(ops.Rename(1, b"a,b", 1, b"\xff"), seq=3)
    c.do(ops.Unlink(1, b"\xff"), seq=4)
    again = Cluster.__new__(Cluster)
    again.rows, again.index = type(c.rows)(), 0
    for time, applied in c.lines:
        line = parse(render(applied.version, time, applied.command, applied.result))
        batch = ops.Batch(line.time, [line.command])
        assert apply_batch(again.rows, 1, batch)[0] == (line.version, line.command, line.result)
    assert again.rows.digest() == c.rows.digest()
