"""`raftfs-metarestore`, `mfsmetarestore`: the metadata from an image and changelogs.

The classic options, and `--until` and `--verify`. Exit status 0, or 1 with a sentence on stderr.
"""

import getopt
import re
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import NoReturn

from raftfs import __version__
from raftfs.cli import metadump, output
from raftfs.errors import UserError
from raftfs.meta import changelogfiles, image
from raftfs.meta.image import ImageError
from raftfs.meta.restore import Restored, Until, restore

PROGRAM = "mfsmetarestore"
DATA = Path("/var/lib/raftfs/metalogger")
RESULT = "metadata.mfs"
_SECOND = 10**9

USAGE = f"""restore metadata from an image and changelogs

usage: mfsmetarestore [-f] [-b] [-i] [-x [-x]] [--until WHEN] -m META -o OUT [CHANGELOG ...]
       mfsmetarestore [-f] [-b] [-i] [-x [-x]] [--until WHEN] -a [-d DIR]
       mfsmetarestore [...] --verify -m META [CHANGELOG ...]
       mfsmetarestore [...] --verify -a [-d DIR]
       mfsmetarestore -m META
       mfsmetarestore -v

 -m META - begin with this image; without -o and changelogs: print what is in it
 -o OUT - write the restored image there
 -a - find image and changelogs of a metalogger (or master) and write {RESULT} beside them
 -d DIR - their folder, for -a (default: {DATA})
 -b - if a line is missing or bad: save what can be had before it
 -i - ignore errors of the structure: what hangs in the air is linked to the root directory
 -f - read and check everything: also changelogs that the image makes needless, and the structure
      of more than a million files and chunks (which takes much memory)
 -x - tell what is being done; twice: tell more
 -v - print the version
 --until WHEN - not beyond a changelog line (123456), or a moment
                (@1795305082 in seconds since 1970, or 2026-11-22T10:30:00, local time unless
                it says otherwise)
 --verify - only check that a restore would succeed; write nothing"""


def parse_until(text: str) -> Until:
    """A line number, `@` and seconds since the epoch, or ISO 8601. UserError for anything else."""
    if re.fullmatch(r"\d{1,19}", text):
        return Until(version=int(text))
    if match := re.fullmatch(r"@(\d{1,11})(\.\d{1,9})?", text):
        fraction = (match[2] or ".0")[1:].ljust(9, "0")
        return Until(time=int(match[1]) * _SECOND + int(fraction))
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(
            f"--until {text}: give a changelog line (123456), seconds since 1970 (@1795305082) or "
            "a date (2026-11-22T10:30:00)"
        ) from None
    # Whole microseconds: a float of seconds could not tell them apart.
    return Until(time=int(moment.timestamp()) * _SECOND + moment.microsecond * 1000)


class _Options:
    """What the command line asks for. `output.Usage` if it does not fit together."""

    def __init__(self, argv: list[str] | None) -> None:
        found, self.changelogs = _words(argv)
        given = {name for name, _ in found}
        values = dict(found)
        self.version, self.help = "-v" in given, bool(given & {"-h", "--help"})
        self.auto, self.verify = "-a" in given, "--verify" in given
        self.force, self.best_effort, self.ignore = ("-f" in given, "-b" in given, "-i" in given)
        self.verbose = sum(name == "-x" for name, _ in found)
        self.meta = Path(values["-m"]) if "-m" in given else None
        self.out = Path(values["-o"]) if "-o" in given else None
        self.folder = Path(values.get("-d", DATA))
        self.until = parse_until(values["--until"]) if "--until" in given else Until()
        if self.version or self.help:
            return
        if self.auto and (given & {"-m", "-o"} or self.changelogs):
            _wrong("-a finds the files itself: it goes without -m, -o and changelogs")
        if not self.auto and (self.meta is None or "-d" in given):
            _wrong("give -m META -o OUT, or -a [-d DIR]")
        if self.verify and self.out is not None:
            _wrong("--verify writes nothing: it goes without -o")
        self.dump = not (self.auto or self.verify or self.out or self.changelogs)
        if self.dump and given - {"-m", "-i"}:
            _wrong("-m META alone prints the image; to restore, give -o OUT as well")
        if not (self.dump or self.auto or self.verify or self.out):
            _wrong("where should the result go? give -o OUT")


def _words(argv: list[str] | None) -> tuple[list[tuple[str, str]], list[str]]:
    try:
        return getopt.gnu_getopt(
            sys.argv[1:] if argv is None else argv, "vfbixam:o:d:h", ["until=", "verify", "help"]
        )
    except getopt.GetoptError as e:
        _wrong(e.msg)


def _wrong(what: str) -> NoReturn:
    print(f"{PROGRAM}: {what}", file=sys.stderr)
    raise output.Usage


def main(argv: list[str] | None = None) -> int:
    """Run the tool. Returns the exit status."""
    try:
        options = _Options(argv)
    except output.Usage:
        return output.usage(USAGE)
    except UserError as e:
        return _failed(e)
    if options.help:
        print(USAGE)
        return 0
    if options.version:
        print(f"version: {__version__}")
        return 0
    try:
        if options.dump:
            image_file = options.meta or Path()
            return output.piped(lambda: metadump.dump(image_file))
        done = _auto(options) if options.auto else _given(options)
    except UserError as e:
        return _failed(e)
    _tell(options, done)
    return 0


def _failed(error: UserError) -> int:
    print(f"{PROGRAM}: {error}", file=sys.stderr)
    return 1


def _report(options: _Options) -> Callable[[str], None]:
    return print if options.verbose else lambda text: None


def _given(options: _Options) -> Restored:
    return _restore(options, options.meta, list(map(Path, options.changelogs)), options.out)


def _restore(
    options: _Options, start: Path | None, changelogs: list[Path], target: Path | None
) -> Restored:
    return restore(
        start, changelogs, target, until=options.until, best_effort=options.best_effort,
        ignore_structure=options.ignore, force=options.force, report=_report(options),
    )  # fmt: skip


def _auto(options: _Options) -> Restored:
    """The newest image that can be used, and all changelogs behind it."""
    folder = options.folder
    try:
        changelogs, images = changelogfiles.changelogs_in(folder), _images(options)
    except OSError as e:
        raise UserError(f"folder {folder} cannot be read: {e.strerror}; give -d DIR") from None
    target = None if options.verify else folder / RESULT
    for path in images:
        try:
            return _restore(options, path, changelogs, target)
        except ImageError as e:
            print(f"{PROGRAM}: {e}", file=sys.stderr)
    if not any(changelogfiles.survey(path).first == 1 for path in changelogs):
        raise UserError(
            f"no usable image in {folder} (metadata.mfs.back or metadata_ml.mfs.back), and no "
            "changelog that begins with line 1"
        )
    _report(options)("no image: beginning with line 1 of the changelogs")
    return _restore(options, None, changelogs, target)


def _images(options: _Options) -> list[Path]:
    """Those that are not beyond --until, newest first."""
    found = []
    for path in image.images_in(options.folder):
        try:
            head = image.read_head(path)
        except ImageError as e:
            print(f"{PROGRAM}: {e}", file=sys.stderr)
            continue
        until = options.until
        if (until.version is not None and head.version > until.version) or (
            until.time is not None and head.time > until.time
        ):
            _report(options)(f"{path}: the state after line {head.version}: beyond --until")
        else:
            found.append((head.version, path))
    return [path for _, path in sorted(found, reverse=True)]


def _tell(options: _Options, done: Restored) -> None:
    if done.problem:
        print(f"{PROGRAM}: saved what could be had: {done.problem}", file=sys.stderr)
    for edit in done.mended if options.verbose > 1 else ():
        print(f"mended: {edit}")
    if not done.structure_checked:
        print("structure not checked: so many files take much memory (-f checks any number)")
    if done.mended:
        print(f"structure mended: {len(done.mended)} edits")
    if options.verify:
        where = "verified"
    else:
        where = f"stored in {options.folder / RESULT if options.auto else options.out}"
    print(f"{where}: line {done.version}, {done.nodes} nodes, {done.chunks} chunks, "
          f"{done.sessions} sessions; {done.lines} lines replayed, {done.digests} digests "
          f"compared; digest {done.digest.hex()}")  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
