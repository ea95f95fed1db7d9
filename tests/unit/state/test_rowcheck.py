"""Each kind of broken row is found by looking at it and its neighbours, page by page."""

import pytest
from msgspec.structs import replace

from raftfs.meta.state import model, read
from raftfs.meta.state.model import MARK, ChunkRow, Edge, MapEntry, Node
from raftfs.meta.state.rowcheck import CHECKED, check_some
from raftfs.wire import ops
from raftfs.wire.inquiries import FindNames
from tests.cli.faketools import FakeTree


def findings(tree: FakeTree, limit: int = 2) -> list[str]:
    """Everything that is wrong, asked in small pages."""
    found = []
    for table in CHECKED:
        after, more = b"", True
        while more:
            page = check_some(tree.rows, table, after, limit)
            found += page.findings
            after = page.after
            more = after != b""
    return found


@pytest.fixture
def tree() -> FakeTree:
    made = FakeTree()
    made.write("file", 1000, (0, 1))
    made.write("dir/big", 70 * 2**20, (0, 1))
    made.apply(ops.Acquire(made.inodes["file2"]), 1)
    made.apply(ops.GrantWrite(made.inodes["file2"], 0, False), 1)
    return made


def test_a_good_state_has_no_findings_and_every_row_is_looked_at(tree: FakeTree) -> None:
    assert findings(tree) == []
    pages = [check_some(tree.rows, table, b"", 1_000) for table in CHECKED]
    tables = "".join(CHECKED).encode()
    rows = sum(1 for table in tables for _ in tree.rows.scan(bytes([table])))
    assert sum(page.checked for page in pages) == rows > 15


CASES = {
    "leads to no node": lambda t: t.rows.delete(model.node_key(t.inodes["fifo"])),
    "thinks that it is below": lambda t: t.rows.put(
        model.edge_key(t.inodes["dir"], b"loop"), Edge(t.inodes["dir"])),
    "there is no such directory": lambda t: t.rows.put(model.edge_key(777, b"x"), Edge(1)),
    "no directory above it": lambda t: change(t, model.node_key(t.inodes["dir"]), parent=777),
    "nobody holds it open": lambda t: change(t, model.node_key(t.inodes["fifo"]), nlink=0),
    "names a chunk that does not exist": lambda t: t.rows.delete(model.chunk_key(1)),
    "belongs to another file": lambda t: change(t, model.chunk_key(1), owner=777),
    "has goal": lambda t: change(t, model.chunk_key(1), goal=1),
    "is the highest given": lambda t: change(t, model.chunk_key(1), version=9),
    "is not where it should be": lambda t: t.rows.put(
        model.map_key(t.inodes["file"], 0), MapEntry(2)),
    "its doom does not agree": lambda t: t.rows.put(model.doomed_key(1), MARK),
    "doomed, but does not exist": lambda t: t.rows.put(model.doomed_key(777), MARK),
    "which does not know it": lambda t: t.rows.delete(model.lock_key(1, 4)),
    "thinks that it has locked": lambda t: t.rows.put(model.lock_key(1, 1), MARK),
    "thinks that it holds": lambda t: t.rows.put(model.held_key(1, 5), MARK),
    "which does not exist": lambda t: t.rows.delete(model.session_key(1)),
}  # fmt: skip


def change(tree: FakeTree, key: bytes, **fields: int) -> None:
    row = tree.rows.get(key)
    assert isinstance(row, Node | ChunkRow)
    tree.rows.put(key, replace(row, **fields))


@pytest.mark.parametrize("sentence", CASES)
def test_a_broken_row_is_found(tree: FakeTree, sentence: str) -> None:
    CASES[sentence](tree)
    assert any(sentence in finding for finding in findings(tree)), findings(tree)


def test_names_are_found_page_by_page(tree: FakeTree) -> None:
    inode = tree.inodes["dir/big"]
    tree.apply(ops.Link(inode, 1, b"zz"))
    found, after, pages = [], b"", 0
    while pages == 0 or after:
        page = read.find_names(tree.rows, FindNames([inode], 0, after), 2)
        found, after, pages = found + page.names, page.after, pages + 1
    assert found == [(inode, 1, b"zz"), (inode, tree.inodes["dir"], b"big")] and pages > 3
    one = read.find_names(tree.rows, FindNames([inode], tree.inodes["dir"]), 100)
    assert one.names == [(inode, tree.inodes["dir"], b"big")] and one.after == b""
    places = read.places(tree.rows, [inode, 777, tree.inodes["dir/sub"]])
    assert [(p.inode, p.nlink, p.parent) for p in places] == [
        (inode, 2, 1), (tree.inodes["dir/sub"], 2, tree.inodes["dir"])
    ]  # fmt: skip
