"""`raftfs`: every command under one name. `raftfs COMMAND --help` tells the rest."""

import importlib
import sys
from pathlib import Path

from raftfs import __version__
from raftfs.cli import output
from raftfs.errors import UserError

# command -> (module in raftfs.cli, one line)
COMMANDS = {
    "cluster": ("cluster", "a whole cluster on this machine"),
    "member": ("member", "the masters: list, add, remove, replace"),
    "leader": ("member", "who leads, and handing it over"),
    "status": ("status", "who leads, what is connected, how healthy it is"),
    "disks": ("disks", "the chunkservers' disks, their scrubs, what is in quarantine"),
    "explain": ("explain", "why a chunk is as it is, and what comes next"),
    "whois": ("whois", "which files a chunk belongs to"),
    "missing": ("missing", "chunks without a good copy, and who had one last"),
    "fsck": ("fsck", "metadata against copies, both ways, in use"),
    "bench": ("bench", "measure a mounted tree beside the local disk"),
    "bench-core": ("benchcore", "measure three replicas without anything around them"),
    "bench-store": ("benchstore", "measure a master that holds many files"),
    "metarestore": ("metarestore", "metadata from an image and changelogs (mfsmetarestore)"),
    "metadump": ("metadump", "print a metadata image as text (mfsmetadump)"),
    "bench-load": ("benchload", "fill a cluster with empty files"),
    "keygen": ("", "write a new cluster key to a file"),
    "getgoal": ("mfsgetgoal", "show goals (mfsgetgoal)"),
    "setgoal": ("mfssetgoal", "change goals (mfssetgoal)"),
    "fileinfo": ("mfsfileinfo", "show chunks and copies of files (mfsfileinfo)"),
    "checkfile": ("mfscheckfile", "count copies of files (mfscheckfile)"),
}


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: raftfs COMMAND [...]", "", *lines, f"\nversion {__version__}"])


def main(argv: list[str] | None = None) -> int:
    """Run a command. Returns its exit status; 2 for wrong usage."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if words else 2
    name, rest = words[0], words[1:]
    if name in ("-v", "--version"):
        print(f"raftfs {__version__}")
        return 0
    if name == "keygen":
        return _keygen(rest)
    if name not in COMMANDS:
        print(f"raftfs: no command {name!r}; see raftfs --help", file=sys.stderr)
        return 2
    module = importlib.import_module(f"raftfs.cli.{COMMANDS[name][0]}")
    run = module.main_leader if name == "leader" else module.main
    return output.piped(lambda: int(run(rest)))


def _keygen(words: list[str]) -> int:
    from raftfs.wire.auth import ClusterKey

    if len(words) != 1 or words[0].startswith("-"):
        print("usage: raftfs keygen FILE", file=sys.stderr)
        return 2
    try:
        ClusterKey.generate(Path(words[0]))
    except UserError as e:
        print(f"raftfs keygen: {e}", file=sys.stderr)
        return e.exit_status
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
