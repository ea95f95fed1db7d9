"""Images: nothing lost, every damage noticed."""

from pathlib import Path

import pytest

from raftfs.errors import UserError
from raftfs.meta import image, statefile
from raftfs.meta.image import MAGIC, ImageError, read_head, read_rows, write_image
from raftfs.meta.store import MetaStore
from tests.unit.restore.history import History


@pytest.fixture
def history(tmp_path: Path) -> History:
    """With some of everything."""
    made = History(tmp_path, seed=5)
    made.go_on(400)
    made.write_file(b"kept")
    return made


def test_rows_come_back_as_they_were(history: History, tmp_path: Path) -> None:
    head = history.image(tmp_path / "i")
    assert head == read_head(tmp_path / "i")
    assert (head.version, head.cluster) == (history.version, b"c" * 16)
    assert (head.index, head.term) == (history.store.applied[0], 1)
    assert head.digest == history.digests[-1]
    used = {name for name, count in head.counts.items() if count}
    assert used >= {"CHNK", "EDGE", "OPEN", "FMAP", "NODE", "HELD", "MEMB", "RSLT", "SESS", "SYML"}
    stored = list(statefile.stored_rows(tmp_path / "copy.mdb"))
    assert list(read_rows(tmp_path / "i")) == stored
    assert statefile.build(tmp_path / "new.mdb", read_rows(tmp_path / "i"), 7, 3) == head.digest
    again = MetaStore(tmp_path / "new.mdb")
    assert (again.applied, again.digest()) == ((7, 3), head.digest)
    again.close()


def test_equal_states_give_equal_images(history: History, tmp_path: Path) -> None:
    history.image(tmp_path / "a")
    history.image(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_empty_state_has_an_image(tmp_path: Path) -> None:
    store = MetaStore(tmp_path / "s")
    store.applied = (1, 0)
    assert store.freeze()
    store.write_frozen()
    store.thaw()
    store.close()
    head = write_image(tmp_path / "s", tmp_path / "i")
    assert (head.version, head.cluster, list(read_rows(tmp_path / "i"))) == (0, b"", [])


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path: Path) -> None:
    history = History(tmp_path)
    history.go_on(30)
    history.image(tmp_path / "i")
    good = (tmp_path / "i").read_bytes()
    bad = tmp_path / "bad"
    for at in range(len(good)):
        bad.write_bytes(good[:at] + bytes([good[at] ^ (1 << at % 8)]) + good[at + 1 :])
        with pytest.raises(ImageError):
            list(read_rows(bad))
    for end in range(0, len(good), 7):
        bad.write_bytes(good[:end])
        with pytest.raises(ImageError):
            list(read_rows(bad))
    bad.write_bytes(good + b"x")
    with pytest.raises(ImageError, match="follows its end"):
        list(read_rows(bad))


def _rewrite(path: Path, target: Path, change) -> None:  # type: ignore[no-untyped-def]
    """An image with pieces changed, and right checksums."""
    with open(path, "rb") as file, open(target, "wb") as out:
        out.write(file.read(len(MAGIC)))
        while True:
            name, content = image._read_piece(path, file)
            name, content = change(name, content)
            image._write_piece(out, name, content)
            if name == "END ":
                return


def test_what_checksums_cannot_tell_is_noticed_by_order_counts_and_digest(
    history: History, tmp_path: Path
) -> None:
    history.image(tmp_path / "i")

    def node_changed(name, content):  # type: ignore[no-untyped-def]
        if name == "NODE":
            content[0][3] = 77
        return name, content

    def row_lost(name, content):  # type: ignore[no-untyped-def]
        return name, content[1:] if name == "EDGE" else content

    def rows_swapped(name, content):  # type: ignore[no-untyped-def]
        return name, content[::-1] if name == "EDGE" else content

    def field_of_other_type(name, content):  # type: ignore[no-untyped-def]
        if name == "NODE":
            content[0][3] = "text"
        return name, content

    for change, sign in (
        (node_changed, "promises"), (row_lost, "promises"), (rows_swapped, "out of order"),
        (field_of_other_type, "other fields"),
    ):  # fmt: skip
        _rewrite(tmp_path / "i", tmp_path / "bad", change)
        with pytest.raises(ImageError, match=sign):
            list(read_rows(tmp_path / "bad"))


def test_a_newer_format_is_refused_in_one_sentence(history: History, tmp_path: Path) -> None:
    history.image(tmp_path / "i")

    def newer(name, content):  # type: ignore[no-untyped-def]
        return name, {"format": 2} if name == "HEAD" else content

    _rewrite(tmp_path / "i", tmp_path / "new", newer)
    with pytest.raises(ImageError, match="has format 2, this program reads 1: use"):
        read_head(tmp_path / "new")


def test_no_half_image_is_left_behind(history: History, tmp_path: Path) -> None:
    history.image(tmp_path / "i")
    before = (tmp_path / "i").read_bytes()
    with pytest.raises(UserError, match="cannot be written"):
        write_image(tmp_path / "copy.mdb", tmp_path / "absent" / "i")
    (tmp_path / "copy.mdb").write_bytes(b"x" * 8192)
    with pytest.raises(UserError, match="no metadata file"):
        write_image(tmp_path / "copy.mdb", tmp_path / "i")
    assert (tmp_path / "i").read_bytes() == before
    assert not list(tmp_path.glob("*.new"))


def test_a_state_file_appears_whole(history: History, tmp_path: Path) -> None:
    def breaks():  # type: ignore[no-untyped-def]
        history.image(tmp_path / "i")
        yield from list(read_rows(tmp_path / "i"))[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        statefile.build(tmp_path / "half.mdb", breaks(), 7, 3)
    assert not (tmp_path / "half.mdb").exists()
    statefile.build(tmp_path / "half.mdb", read_rows(tmp_path / "i"), 7, 3)
