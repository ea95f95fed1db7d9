"""Sentences about chunks, paths found for nodes: pure parts of explain, whois, missing, fsck."""

from collections import Counter
from typing import Any

import pytest

from raftfs.cli import fsck, sentences
from raftfs.cli.asking import parse_chunk
from raftfs.cli.names import Names, shown
from raftfs.errors import UserError
from raftfs.meta.plan.healing import judge
from raftfs.meta.plan.outlook import DISCONNECTED, Facts, outlook
from raftfs.meta.state import read
from raftfs.wire import inquiries as q
from raftfs.wire import ops
from tests.cli.faketools import FakeTree

A, B, C = b"a", b"b", b"c"
CALM = Facts(-1.0, False, 0, True, False, False, False, True, 0.0, "", 0.0)


@pytest.mark.parametrize(
    ("copies", "facts", "said"),
    [
        ({A: 1, B: 1}, {}, "nothing: it has as many good copies as its goal asks for"),
        ({A: 1}, {}, "1 copy will be made now"),
        ({A: 1}, {"delay": DISCONNECTED, "delay_s": 300.0, "short_for_s": 100.0},
         "1 copy will be made in 3 min 20 s: a server is away and may come back with its copy, so "
         "5 min are waited"),
        ({A: 1}, {"delay": DISCONNECTED, "delay_s": 300.0, "short_for_s": 400.0},
         "1 copy will be made now"),
        ({A: 1}, {"can_add": False}, "1 copy wanted, but no other connected server can take one"),
        ({A: 1, B: 1, C: 1}, {}, "1 copy beyond the goal will be destroyed"),
        ({A: 2, B: 2}, {}, "the good copies are brought to one new version"),
        ({A: 1, B: 1}, {"unfinished": True}, "the good copies are brought to one new version"),
        ({A: 1, B: 1, C: 0}, {}, "copies that no longer count are destroyed"),
        ({}, {}, "nothing can be done: no connected server has a good copy; bring one back that "
         "had"),
        ({}, {"born": False}, "nothing: nothing was ever committed to it"),
        ({A: 1}, {"awaits": True}, "waits for servers that may have better copies"),
        ({A: 1}, {"session": 7}, "nothing: a session writes it and looks after its copies"),
        ({A: 1}, {"repairing": True}, "a repair is under way"),
        ({}, {"starts_in_s": 4.0}, "nothing for another 4 s: the leader is new, chunkservers are "
         "still announcing themselves"),
    ],
)  # fmt: skip
def test_what_comes_next_is_a_sentence(
    copies: dict[bytes, int], facts: dict[str, Any], said: str
) -> None:
    verdict = judge(1, 2, 2, copies)
    o = outlook(verdict, CALM._replace(**facts))
    plan = q.Plan(o.step, verdict.wanted, verdict.surplus, o.delay, o.delay_s, o.wait_s)
    assert sentences.plan(plan) == said


def test_what_failed_last_is_told_with_the_plan() -> None:
    failed = q.Plan("add", 1, wait_s=0.0, error="h:1: Replicate: BAD_CRC", error_at=10**18)
    assert "1 copy will be made now (what failed last, 2001-" in sentences.plan(failed)
    assert "h:1: Replicate: BAD_CRC)" in sentences.plan(failed)


def test_spans() -> None:
    spans = [0.2, 1, 61, 3_600, 7 * 86_400 - 1, -5]
    assert [sentences.span(s) for s in spans] == [
        "0 s", "1 s", "1 min 1 s", "1 h", "6 d 23 h", "0 s"
    ]  # fmt: skip


def test_copies_tell_where_and_what_they_are_worth() -> None:
    good = q.CopyStory(b"\xab" * 16, "h:1", 3, "good", True, True)
    assert sentences.copy(good) == "h:1 (server abababab): version 3, good"
    unfenced = q.CopyStory(b"\xab" * 16, "h:1", 3, "stale", True, False)
    assert sentences.copy(unfenced).endswith(
        "stale: it missed a write; the server has not yet acknowledged this leader"
    )
    orphan = q.CopyStory(b"\xab" * 16, "h:1", 3, "orphan", True, True, kept_s=3_600.0)
    assert sentences.copy(orphan).endswith("know no such chunk; kept for another 1 h")
    left = q.CopyStory(b"\xab" * 16, "h:1", 3, "left", True, True, 10**18, "damaged")
    assert sentences.copy(left).startswith("h:1 (server abababab): had version 3 until 2001-")
    assert sentences.copy(left).endswith(": it was found damaged")
    assert "last read through 2001-" in sentences.copy(
        q.CopyStory(b"\xab" * 16, "h:1", 3, "good", True, True, scrubbed=10**9)
    )


@pytest.mark.parametrize("text", [
    "17", "0x11", "0000000000000011", "0000000000000011_00000001",
    "chunk_0000000000000011_00000001.mfs",
])  # fmt: skip
def test_chunks_are_named_as_logs_and_files_name_them(text: str) -> None:
    assert parse_chunk(text) == 17


@pytest.mark.parametrize("text", ["", "0", "-1", "xyz", "1.5", "0x", "11111111111111111111111"])
def test_what_is_no_chunk_is_said(text: str) -> None:
    with pytest.raises(UserError, match="is no chunk: give"):
        parse_chunk(text)


class Masters:
    """Answers the questions of `Names` from a tree, two entries a page."""

    def __init__(self, tree: FakeTree) -> None:
        self.tree = tree
        self.asked: Counter[int] = Counter()

    def call(self, ask: Any) -> Any:
        if isinstance(ask, q.WhereNodes):
            return read.places(self.tree.rows, ask.inodes)
        self.asked[ask.parent] += 1
        return read.find_names(self.tree.rows, ask, 2)


def test_paths_are_found_for_files_with_one_name_many_names_and_none() -> None:
    tree = FakeTree()
    deep, linked, gone = (tree.inodes[name] for name in ("dir/sub/b", "file", "file2"))
    tree.apply(ops.Link(linked, tree.inodes["dir/sub"], b"also\n"))
    tree.apply(ops.Acquire(gone), 1)
    tree.apply(ops.Unlink(1, b"file2"))
    masters: Any = Masters(tree)
    few = Names(masters).paths([deep, linked, gone, 777], everywhere=False)
    assert few == {deep: ["/dir/sub/b"], linked: ["/dir/sub/also\\n"], gone: [], 777: []}
    assert masters.asked[0] == 0, "no look at all directories"
    every = Names(masters).paths([deep, linked, gone], everywhere=True)
    assert every[linked] == ["/dir/sub/also\\n", "/file"] and every[deep] == ["/dir/sub/b"]
    assert masters.asked[0] > 1


def test_names_are_shown_on_one_line() -> None:
    assert shown("añ b".encode()) == "añ b" and shown(b"a\nb\xff") == "a\\nb\\xff"


@pytest.mark.parametrize(
    ("counts", "status"),
    [({}, 0), ({"chunks": 5, "rows": 9, "writing": 1, "doomed": 2}, 0), ({"stale": 1}, 1),
     ({"undergoal": 1}, 1), ({"orphans": 1}, 1), ({"unsettled": 1}, 1), ({"missing": 1}, 2),
     ({"findings": 1, "orphans": 1}, 2)],
)  # fmt: skip
def test_the_exit_status_of_fsck(counts: dict[str, int], status: int) -> None:
    found = fsck.Found(Counter(counts), [], [], [])
    assert found.status == status
    assert ("all is well" in fsck.report(found, {})[-1]) is (status == 0)


def test_options_are_the_same_everywhere() -> None:
    args = fsck.parser().parse_args(["-H", "a,b", "--json"])
    assert args.masters == "a,b" and args.json and args.limit == fsck.LISTED_DEFAULT
