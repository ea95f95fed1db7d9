"""mfsmetarestore and mfsmetadump: every option, every misuse."""

import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from raftfs.cli import metadump, metarestore, raftfs
from raftfs.errors import UserError
from raftfs.meta import image
from raftfs.meta.restore import Until
from tests.unit.restore.history import SECOND, START, History
from tests.unit.restore.test_mend import unsound


class Tool:
    """Runs the tool in a folder as a metalogger leaves it; remembers what it said."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder, capsys
        self.history = History(folder, 3, "live.mdb")
        self.history.reach(38)
        self.history.write_file(b"\xff%,()")
        assert self.history.version == 40
        self.history.image(folder / "metadata_ml.mfs.back")
        self.history.reach(80)
        self.history.write(folder / "changelog_ml.1.mfs", 1, 60)
        self.history.write(folder / "changelog_ml.0.mfs", 61, 80)
        self.out, self.err = "", ""

    def __call__(self, *words: str | Path, status: int = 0) -> str:
        assert metarestore.main([str(w) for w in words]) == status
        self.out, self.err = self._capsys.readouterr()
        return self.out

    def auto(self, *words: str, status: int = 0) -> str:
        """With -a in the folder."""
        return self("-a", "-d", self.folder, *words, status=status)

    def version(self, name: str) -> int:
        """Up to which line an image reaches; its digest is the live state's there."""
        head = image.read_head(self.folder / name)
        assert head.digest == self.history.digests[head.version]
        return head.version


@pytest.fixture
def tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Tool:
    return Tool(tmp_path, capsys)


def test_automatic(tool: Tool) -> None:
    said = tool.auto()
    assert re.fullmatch(
        r"stored in .*/metadata\.mfs: line 80, \d+ nodes, \d+ chunks, 2 sessions; 40 lines "
        r"replayed, 0 digests compared; digest [0-9a-f]{32}\n", said
    )  # fmt: skip
    assert tool.version("metadata.mfs") == 80 and tool.err == ""
    assert tool.history.digests[80].hex() in said


def test_automatic_without_an_image_begins_with_line_1(tool: Tool) -> None:
    (tool.folder / "metadata_ml.mfs.back").unlink()
    assert "80 lines replayed" in tool.auto("-x")
    assert "beginning with line 1" in tool.out
    (tool.folder / "changelog_ml.1.mfs").unlink()
    tool.auto(status=1)
    assert "no usable image" in tool.err and "begins with line 1" in tool.err


def test_automatic_takes_the_newest_usable_image(tool: Tool) -> None:
    newer = image.read_head(tool.folder / "metadata_ml.mfs.back").version + 25
    tool("-m", tool.folder / "metadata_ml.mfs.back", "-o", tool.folder / "metadata.mfs.back",
         "--until", str(newer), tool.folder / "changelog_ml.0.mfs",
         tool.folder / "changelog_ml.1.mfs")  # fmt: skip
    assert "15 lines replayed" in tool.auto()
    assert "10 lines replayed" in tool.auto("--until", "50")
    assert tool.version("metadata.mfs") == 50
    raw = bytearray((tool.folder / "metadata.mfs.back").read_bytes())
    raw[-60] ^= 1
    (tool.folder / "metadata.mfs.back").write_bytes(raw)
    assert "40 lines replayed" in tool.auto()
    assert "metadata.mfs.back is damaged" in tool.err
    (tool.folder / "metadata.mfs.back").write_bytes(b"")
    assert "40 lines replayed" in tool.auto()
    assert "is no raftfs metadata image" in tool.err


def test_by_name(tool: Tool) -> None:
    logs = [tool.folder / "changelog_ml.1.mfs", tool.folder / "changelog_ml.0.mfs"]
    said = tool("-m", tool.folder / "metadata_ml.mfs.back", "-o", tool.folder / "out", *logs)
    assert said.startswith(f"stored in {tool.folder / 'out'}: line 80, ")
    assert tool.version("out") == 80
    tool("-o", tool.folder / "copy", "-m", tool.folder / "out")
    assert tool.version("copy") == 80


def test_until(tool: Tool) -> None:
    tool.auto("--until", "66")
    assert tool.version("metadata.mfs") == 66
    moment = int(tool.history.lines[50].split(": ")[1].split("|")[0])
    tool.auto("--until", f"@{moment}")
    assert tool.version("metadata.mfs") == 51
    tool.auto("--until", datetime.fromtimestamp(moment, UTC).isoformat())
    assert tool.version("metadata.mfs") == 51
    tool.auto("--until", "12")  # older than the image: begins with line 1
    assert tool.version("metadata.mfs") == 12
    tool.auto("--until", "81", status=1)
    assert "end with line 80, before --until 81" in tool.err


def test_moments() -> None:
    assert metarestore.parse_until("17") == Until(version=17)
    assert metarestore.parse_until("@17") == Until(time=17 * SECOND)
    assert metarestore.parse_until("@17.25") == Until(time=17 * SECOND + SECOND // 4)
    assert metarestore.parse_until("1970-01-01T00:01:00.000007Z") == Until(time=60 * SECOND + 7000)
    assert metarestore.parse_until("2027-01-15T08:00:00+00:00") == Until(time=START)
    for bad in ("", "yesterday", "-1", "@", "@1.", "1 2", "9" * 20):
        with pytest.raises(UserError, match="give a changelog line"):
            metarestore.parse_until(bad)


def test_verify_writes_nothing(tool: Tool) -> None:
    before = {p.name: p.read_bytes() for p in tool.folder.iterdir() if "mdb" not in p.name}
    assert tool.auto("--verify").startswith("verified: line 80, ")
    logs = sorted(tool.folder.glob("changelog*"))
    assert "line 80" in tool("--verify", "-m", tool.folder / "metadata_ml.mfs.back", *logs)
    assert "line 40" in tool("--verify", "-m", tool.folder / "metadata_ml.mfs.back")
    after = {p.name: p.read_bytes() for p in tool.folder.iterdir() if "mdb" not in p.name}
    assert before == after
    tool.history.write(tool.folder / "changelog_ml.0.mfs", 62, 80)
    tool.auto("--verify", status=1)
    assert "lines 61 to 61 are missing" in tool.err and tool.err.count("\n") == 1


def test_best_effort(tool: Tool) -> None:
    log = tool.folder / "changelog_ml.0.mfs"
    log.write_text(log.read_text()[:-9])
    tool.auto(status=1)
    assert "everything up to line 79 is good (-b saves that)" in tool.err
    assert not (tool.folder / "metadata.mfs").exists()
    assert "line 79," in tool.auto("-b")
    assert tool.err.startswith("mfsmetarestore: saved what could be had: ")
    assert tool.version("metadata.mfs") == 79


def test_force_and_verbose(tool: Tool) -> None:
    log = tool.history.write(tool.folder / "changelog_ml.2.mfs", 1, 30)
    log.write_text(log.read_text().replace("|", "}", 1))
    said = tool.auto("-x")
    assert f"{log}: lines 1 to 30: not needed" in said
    assert f"{tool.folder / 'changelog_ml.1.mfs'}: lines 1 to 60\n" in said
    tool.auto("-f", status=1)
    assert f"{log}, line 1: " in tool.err


def test_mending_is_told(tool: Tool) -> None:
    tool.history.write_file(b"orphan to be")
    bad = unsound(tool.history, tool.folder)
    tool("-m", bad, "-o", tool.folder / "out", status=1)
    assert "is not sound" in tool.err and "(-i mends it)" in tool.err
    assert "structure mended: " in tool("-i", "-m", bad, "-o", tool.folder / "out")
    assert "mended: " not in tool.out.replace("structure mended: ", "")
    assert "as orphan-" in tool("-i", "-x", "-x", "-m", bad, "-o", tool.folder / "out")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give -m META -o OUT, or -a"),
        (["-a", "-m", "x"], "-a finds the files itself"),
        (["-a", "changelog"], "-a finds the files itself"),
        (["-m", "x", "-d", "y"], "give -m META -o OUT, or -a"),
        (["-m", "x", "changelog"], "where should the result go?"),
        (["-m", "x", "-o", "y", "--verify"], "--verify writes nothing"),
        (["-m", "x", "-b"], "alone prints the image"),
        (["-q"], "option -q not recognized"),
        (["-m"], "option -m requires argument"),
    ],
)
def test_misuse(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert metarestore.main(words) == 1
    err = capsys.readouterr().err
    assert err.startswith("mfsmetarestore: ") and said in err.splitlines()[0]
    assert "usage: mfsmetarestore" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-m", "{}/none", "-o", "{}/out"], "none cannot be read: No such file"),
        (["-m", "{}/junk", "-o", "{}/out"], "junk is no raftfs metadata image"),
        (["-m", "{}/metadata_ml.mfs.back", "-o", "{}/out", "{}/none"], "none cannot be read"),
        (["-m", "{}/metadata_ml.mfs.back", "-o", "{}/none/out"], "no scratch files can be made"),
        (["-m", "{}/metadata_ml.mfs.back", "-o", "{}/out", "--until", "soon"], "--until soon"),
        (["-m", "{}/junk"], "junk is no raftfs metadata image"),
        (["-a", "-d", "{}/none"], "none cannot be read: No such file"),
        (["-a", "-d", "{}/junk"], "junk cannot be read: Not a directory"),
    ],
)
def test_bad_input(words: list[str], said: str, tool: Tool) -> None:
    (tool.folder / "junk").write_bytes(b"RAFTFS")
    tool(*(w.format(tool.folder) for w in words), status=1)
    assert said in tool.err and tool.err.count("\n") == 1
    assert not (tool.folder / "out").exists()


def test_help(tool: Tool, capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("-h", "--help"):
        assert "usage: mfsmetarestore" in tool(word) and tool.err == ""
    assert metadump.main(["--help"]) == 0
    assert "usage: mfsmetadump" in capsys.readouterr().out


def test_version(tool: Tool) -> None:
    assert re.fullmatch(r"version: \d+\.\d+\.\d+\n", tool("-v"))


# --- the dump


def test_dump(tool: Tool) -> None:
    printed = tool("-m", tool.folder / "metadata_ml.mfs.back")
    head = image.read_head(tool.folder / "metadata_ml.mfs.back")
    lines = printed.splitlines()
    assert lines[1].startswith(f"format:1|cluster:{b'c'.hex() * 16}|line:40|")
    titles = [x for x in lines if x.startswith("[")]
    assert len(lines) - len(titles) - 1 == sum(head.counts.values())
    assert "[NODE] tree nodes (inodes): " + str(head.counts["NODE"]) in lines
    root = next(x for x in lines if x.startswith("inode:1|type:2|"))
    assert re.search(r"\|mode:0[0-7]{3}\|.*\|nlink:\d\|.*\|entries:\d$", root)
    assert any("|name:%FF%25%2C%28%29|inode:" in x for x in lines)
    assert "secret:(6 bytes)" in printed and b"secret".hex() not in printed
    assert "name:a:1|uuid:" + b"1".hex() * 16 in printed


def test_dump_of_one_section_with_dots(
    tool: Tool, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tool.folder / "metadata_ml.mfs.back")
    assert metadump.main(["-d", "-s", "EDGE", path]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("[EDGE] ") and "[NODE]" not in printed
    assert "|name:.%,()|" in printed
    assert metadump.main(["-s", "HEAD", path]) == 0
    assert capsys.readouterr().out.count("\n") == 2
    assert raftfs.main(["metadump", "-s", "SESS", path]) == 0
    assert capsys.readouterr().out.count("\n") == 3


def test_a_reader_that_has_seen_enough(tool: Tool) -> None:
    path = tool.folder / "metadata_ml.mfs.back"
    for words in (["metadump", str(path)], ["metarestore", "-m", str(path)]):
        done = subprocess.run(
            f"{sys.executable} -m raftfs.cli.{words[0]} {' '.join(words[1:])} | head -c 1",
            shell=True, capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        assert (done.stdout, done.stderr) == ("[", "")


def test_misuse_of_the_dump(tool: Tool, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["a", "b"], ["-h"], ["-s"]):
        assert metadump.main(words) == 1
        assert "usage: mfsmetadump [-d] [-s SECTION] FILE" in capsys.readouterr().err
    path = tool.folder / "metadata_ml.mfs.back"
    assert metadump.main(["-s", "QUOT", str(path)]) == 1
    assert "there is no section QUOT" in capsys.readouterr().err
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert metadump.main([str(path)]) == 1
    assert "is damaged" in capsys.readouterr().err
