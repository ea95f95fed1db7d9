"""`raftfs metadump`, `mfsmetadump`: what is in a metadata image, as text, a row a line."""

import getopt
import sys
from pathlib import Path
from typing import Any

from raftfs.cli import output
from raftfs.errors import UserError
from raftfs.meta import image
from raftfs.meta.image import SECTIONS, ImageHead
from raftfs.meta.state.changelog import escape

PROGRAM = "mfsmetadump"
_MEANING = {
    "CHNK": "chunks", "DOOM": "chunks that no file has any more", "EDGE": "tree edges (file names)",
    "OPEN": "open files", "LOCK": "chunks that are being written, by session",
    "FMAP": "which chunks files consist of", "NODE": "tree nodes (inodes)",
    "HELD": "open files, by session", "MEMB": "masters",
    "RSLT": "answers kept for retries", "SESS": "client sessions", "SYML": "symbolic links",
    "CNTR": "counters",
}  # fmt: skip
USAGE = "\n".join((
    "print a metadata image as text", "",
    f"usage: {PROGRAM} [-d] [-s SECTION] FILE",
    " -d - a dot instead of each byte of a name that is not printable",
    " -s SECTION - only this section:",
    "      HEAD - what the image says of itself",
    *(f"      {name} - {text}" for name, text in _MEANING.items()),
))  # fmt: skip
# Names of files and masters are text; other bytes are shown as numbers, and secrets not at all.
_TEXT_FIELDS, _SECRET_FIELDS = ("name", "path"), ("secret",)


def main(argv: list[str] | None = None) -> int:
    """Run the tool. Returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    try:
        found, files = getopt.gnu_getopt(words, "ds:", ["help"])
    except getopt.GetoptError as e:
        print(f"{PROGRAM}: {e.msg}", file=sys.stderr)
        return output.usage(USAGE)
    options = dict(found)
    if "--help" in options:
        print(USAGE)
        return 0
    if len(files) != 1:
        return output.usage(USAGE)
    section = options.get("-s", "")
    if section and section not in ("HEAD", *_MEANING):
        print(f"{PROGRAM}: there is no section {section}; see {PROGRAM} without arguments",
              file=sys.stderr)  # fmt: skip
        return 1
    try:
        return output.piped(lambda: dump(Path(files[0]), section, dots="-d" in options))
    except UserError as e:
        print(f"{PROGRAM}: {e}", file=sys.stderr)
        return e.exit_status


def dump(path: Path, only: str = "", *, dots: bool = False) -> int:
    """Print an image, or one section of it; gives the exit status. ImageError, at the latest at the
    end, if it is damaged.
    """
    head = image.read_head(path)
    if only in ("", "HEAD"):
        _print_head(head)
    labels = {section.name: section.fields for section in SECTIONS}
    last = ""
    for section, values in image.read_sections(path):
        if only not in ("", section.name):
            continue
        if section.name != last:
            print(f"[{section.name}] {_MEANING[section.name]}: {head.counts[section.name]}")
            last = section.name
        shown = (
            f"{label}:{_show(label, value, dots)}"
            for label, value in zip(labels[section.name], values, strict=False)
            if label != "group"
        )
        print("|".join(shown))
    return 0


def _print_head(head: ImageHead) -> None:
    print("[HEAD] what the image says of itself")
    print(f"format:{head.format}|cluster:{head.cluster.hex()}|line:{head.version}|"
          f"entry:{head.index}|term:{head.term}|time:{head.time}|digest:{head.digest.hex()}")


def _show(label: str, value: Any, dots: bool) -> str:
    if label in _SECRET_FIELDS:
        return f"({len(value)} bytes)"
    if label == "mode":
        return f"{value:04o}"
    if isinstance(value, str):
        value, label = value.encode(), "name"
    if not isinstance(value, bytes):
        return str(int(value))
    if label not in _TEXT_FIELDS:
        return value.hex()
    if dots:
        return "".join(chr(c) if 32 <= c < 127 else "." for c in value)
    return escape(value)


if __name__ == "__main__":
    raise SystemExit(main())
