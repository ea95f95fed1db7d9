"""The command line: classic options, and one sentence for each mistake."""

from pathlib import Path

import pytest

from raftfs.const import MIB
from raftfs.errors import UserError
from raftfs.mount import main
from raftfs.mount.options import parse


def test_defaults_are_the_classic_ones() -> None:
    options = parse(["/mnt/mfs"])
    assert options.masters == [("mfsmaster", 9421)]
    assert (options.attr_s, options.entry_s, options.dir_entry_s) == (1.0, 0.0, 1.0)
    assert options.subfolder == "/"
    assert options.fsname == "mfs#mfsmaster:9421"
    assert not options.foreground


def test_masters_port_and_subfolder_come_from_the_command_line_or_from_options() -> None:
    options = parse(["/mnt", "-H", "a,b:7", "-P", "99", "-S", "x/y/"])
    assert options.masters == [("a", 99), ("b", 7)]
    assert options.subfolder == "/x/y"
    options = parse(["/mnt", "-o", "mfsmaster=a,b:7,mfsport=99,mfssubfolder=/x,mfspassword=p=q"])
    assert options.masters == [("a", 99), ("b", 7)]
    assert (options.subfolder, options.password) == ("/x", "p=q")
    assert parse(["/mnt", "-H", "a", "-o", "mfsmaster=b"]).masters == [("a", 9421)]


def test_tuning_and_kernel_options() -> None:
    words = "mfsattrcacheto=2.5,mfsentrycacheto=1,mfsdirentrycacheto=3,mfswritecachesize=64"
    options = parse(["/mnt", "-o", words, "-o", "allow_other,noatime,_netdev,mfstimeout=5,x-a.b=1"])
    assert (options.attr_s, options.entry_s, options.dir_entry_s) == (2.5, 1.0, 3.0)
    assert options.write_cache_bytes == 64 * MIB
    assert options.timeout_s == 5.0
    assert options.kernel_flags == {"allow_other", "noatime"}


@pytest.mark.parametrize(
    "words",
    [
        ["/mnt", "-o", "mfsnonsense=1"],
        ["/mnt", "-o", "nonsense"],
        ["/mnt", "-o", "mfsattrcacheto=soon"],
        ["/mnt", "-o", "mfswritecachesize=1"],
        ["/mnt", "-o", "mfstimeout=0"],
        ["/mnt", "-P", "x"],
        ["/mnt", "-P", "70000"],
        ["/mnt", "--nonsense"],
        ["/mnt", "-H", ","],
        [],
    ],
)
def test_mistakes_are_user_errors(words: list[str]) -> None:
    with pytest.raises(UserError):
        parse(words)


def test_wrong_mountpoints_are_one_sentence_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    for path, word in ((tmp_path / "none", "does not exist"), (file, "not a directory")):
        assert main.main([str(path)]) == 1
        said = capsys.readouterr().err
        assert word in said
        assert said.count("\n") == 1
