"""mfshdd.cfg, line by line."""

from pathlib import Path

import pytest

from raftfs.conf import hdd
from raftfs.const import DISK_LEAVE_FREE, MIB
from raftfs.errors import ConfigError


def test_the_classic_grammar() -> None:
    lines = hdd.parse(
        "# my disks\n\n/mnt/hd1\n*/mnt/hd2\n  <~/mnt/hd3 -5GiB\n/mnt/hd 4 1.5TiB\n/mnt/hd5 .5k\n"
        "*/mnt/hd6 100MB\n/mnt/hd8 -0\n"
    )
    assert lines == [
        hdd.HddLine(3, Path("/mnt/hd1"), "", DISK_LEAVE_FREE, 0),
        hdd.HddLine(4, Path("/mnt/hd2"), "anywhere"),
        hdd.HddLine(5, Path("/mnt/hd3"), "local", 5 * 1024 * MIB),
        hdd.HddLine(6, Path("/mnt/hd 4"), limit=1536 * 1024 * MIB),
        hdd.HddLine(7, Path("/mnt/hd5"), limit=500),
        hdd.HddLine(8, Path("/mnt/hd6"), "anywhere", limit=100_000_000),
        hdd.HddLine(9, Path("/mnt/hd8"), leave_free=0),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("/a\nmnt/b\n", ":2: 'mnt/b' is no absolute path"),
        ("*\n", r":1: '\*' is no absolute path"),
        ("/a 12 parsecs\n/b 5Q\n", ":2: '5Q' is no size"),
        ("/a\n/b\n/a 5GiB\n", ":3: /a is in line 1 already"),
        (">/a\n", ":1: the mark > "),
        ("/a 0\n", ":1: a limit of nothing"),
        ("# only a remark\n", "names no disk"),
    ],
)
def test_a_bad_line_refuses_the_file_and_is_named(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        hdd.parse(text, "my.cfg")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        hdd.parse_file(tmp_path / "none")
    (tmp_path / "some").write_text("/a -1GiB\n")
    assert hdd.parse_file(tmp_path / "some")[0].leave_free == 1024 * MIB
