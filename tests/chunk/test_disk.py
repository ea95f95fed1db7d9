"""Disk folders: to whom they belong, and the sentences when they cannot be used."""

import os
from pathlib import Path

import cbor2
import pytest

from raftfs.chunk.disk import LABEL, Disk
from raftfs.chunk.main import main, open_disks, parse_masters
from raftfs.chunk.store import ChunkStore
from raftfs.conf.hdd import HddLine
from raftfs.errors import UserError
from tests.chunk.parts import CLUSTER, make_store, write


def test_server_and_cluster_live_on_the_disks(tmp_path: Path) -> None:
    store = make_store(tmp_path / "a")
    server = store.server
    store.close()
    store = make_store(tmp_path / "a", tmp_path / "b")  # a new disk joins the old one
    assert store.server == server
    store.close()
    store = ChunkStore([Disk(tmp_path / "b")])
    assert (store.server, store.cluster) == (server, CLUSTER)
    label = cbor2.loads((tmp_path / "b" / LABEL).read_bytes())
    assert label["server"] == server and len(label["disk"]) == 16 and label["cluster"] == CLUSTER
    store.close()


def test_two_servers_never_share_a_disk(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    with pytest.raises(UserError, match=rf"{tmp_path} is in use .*process {os.getpid()}"):
        Disk(tmp_path)
    disk.close()
    Disk(tmp_path).close()


def test_disks_of_different_servers_or_clusters_are_refused(tmp_path: Path) -> None:
    make_store(tmp_path / "a").close()
    make_store(tmp_path / "b").close()
    with pytest.raises(UserError, match="different servers"):
        ChunkStore([Disk(tmp_path / "a"), Disk(tmp_path / "b")])
    other = ChunkStore([Disk(tmp_path / "c")])
    other.join(b"x" * 16)
    with pytest.raises(UserError, match="belong to cluster 7878"):
        other.join(CLUSTER)
    other.close()


def test_a_disk_without_or_with_a_damaged_label_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    write(store, 1, 0, b"x")
    store.close()
    label = tmp_path / LABEL
    good = label.read_bytes()
    for bad in (b"", b"junk", good[:-1], cbor2.dumps({"format": 2})):
        label.write_bytes(bad)
        with pytest.raises(UserError, match="damaged"):
            Disk(tmp_path)
    label.write_bytes(cbor2.dumps({"format": 1}))
    with pytest.raises(UserError, match="format 1"):
        Disk(tmp_path)
    label.unlink()
    with pytest.raises(UserError, match="has chunks but no"):
        Disk(tmp_path)
    label.write_bytes(good)
    Disk(tmp_path).close()  # a refusal leaves no lock behind


def test_unusable_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be used"):
        Disk(tmp_path / "file")
    with pytest.raises(UserError, match="cannot be used"):
        Disk(Path("/proc/raftfs"))
    with pytest.raises(UserError, match="given twice"):
        open_disks([HddLine(1, tmp_path / "a"), HddLine(2, tmp_path / "b" / ".." / "a")])
    Disk(tmp_path / "a").close()


def test_a_folder_with_other_things_is_refused_but_a_half_made_disk_is_not(tmp_path: Path) -> None:
    (tmp_path / "00").mkdir()
    (tmp_path / (LABEL + ".new")).write_text("half")
    make_store(tmp_path).close()
    (tmp_path / LABEL).unlink()
    (tmp_path / "letter").write_text("dear")
    with pytest.raises(UserError, match=r"is not empty \(letter, ...\)"):
        Disk(tmp_path)


def test_the_highest_term_is_kept(tmp_path: Path) -> None:
    store = make_store(tmp_path / "a", tmp_path / "b")
    store.remember_term(7)
    store.remember_term(5)
    store.close()
    store = make_store(tmp_path / "b")
    assert store.term == 7
    store.close()


def test_leftovers_of_replication_go(tmp_path: Path) -> None:
    make_store(tmp_path).close()
    part = tmp_path / "01" / "chunk_0000000000000001_00000001.mfs.part"
    part.write_text("half")
    store = make_store(tmp_path)
    assert len(store) == 0 and not part.exists()
    store.close()


def test_masters_of_the_command_line() -> None:
    assert parse_masters("a, b:17") == [("a", 9420), ("b", 17)]
    for bad in ("", "a:x", ":3", "a:0", "a:70000"):
        with pytest.raises(UserError, match="-H"):
            parse_masters(bad)


def test_what_the_user_did_wrong_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = tmp_path / "key"
    key.write_text("ab" * 32)
    key.chmod(0o600)
    common = ["--key", str(key), "-H", "127.0.0.1:1", "--listen", "127.0.0.1"]
    blocker = Disk(tmp_path / "locked")
    for arguments, sentence in (
        (["--hdd", str(tmp_path / "locked"), *common], "is in use by another chunkserver"),
        (["--hdd", "/proc/x", *common], "cannot be used"),
        (["--hdd", str(tmp_path / "d"), *common[2:], "--key", "/nonexistent"], "does not exist"),
    ):
        assert main(arguments) == 1
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1 and sentence in said[0] and said[0].startswith("raftfs-chunk: ")
    blocker.close()
