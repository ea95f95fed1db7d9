"""What `explain`, `whois`, `missing` and `fsck` have in common: whom to ask, about which chunks."""

import argparse
import sys
from collections.abc import Callable

from raftfs import log as logging_setup
from raftfs.cli.chunkinfo import chunks
from raftfs.cli.names import Names, lookup
from raftfs.cli.target import TargetError, default_masters, find
from raftfs.client.meta import ToolClient, connect_tool, parse_masters
from raftfs.errors import RaftfsError, ReplyError, UserError
from raftfs.wire import inquiries as q

_ID_DIGITS = 16


def add_options(p: argparse.ArgumentParser) -> None:
    """-H and --json."""
    p.add_argument(
        "-H", "--masters", metavar="A,B,C", help="masters as host[:client port] (default: the "
        "cluster in ./.raftfs, else that of the current folder)",
    )  # fmt: skip
    p.add_argument("--json", action="store_true", help="one JSON document")


def run(
    name: str, args: argparse.Namespace, path: str | None, work: Callable[[ToolClient], int],
    trouble: int = 1,
) -> int:  # fmt: skip
    """`work` on a connection to the masters that were named, or that `path` is of. What goes wrong
    is a sentence, and `trouble` the exit status.
    """
    logging_setup.setup(f"raftfs-{name}", level="error")
    try:
        masters = args.masters or default_masters(path)
        with connect_tool(parse_masters(masters)) as client:
            return work(client)
    except RaftfsError as e:
        print(f"raftfs {name}: {e}", file=sys.stderr)
        return trouble


def parse_chunk(text: str) -> int:
    """A chunk's number: 16 hexadecimal digits as in logs and names of files, with what may follow
    them there (`_00000001`), or 0x...; or decimal. UserError if it is none.
    """
    word = text.removeprefix("chunk_").removesuffix(".mfs").partition("_")[0]
    try:
        hexadecimal = len(word) == _ID_DIGITS or word.lower().startswith("0x")
        number = int(word, 16 if hexadecimal else 10)
    except ValueError:
        number = 0
    if not 0 < number < 2**64:
        raise UserError(
            f"{text!r} is no chunk: give its number, or its 16 hexadecimal digits as in logs and "
            "names of files"
        )
    return number


def chunks_of(client: ToolClient, path: str, *, inside: bool) -> list[q.ChunkStory]:
    """The stories of a file's chunks, holes left out. `inside`: the path is one of the file
    system's own, not of this machine.
    """
    try:
        inode = lookup(client, path) if inside else find(path).inode
        return [ask_chunk(client, c.chunk) for c in chunks(client, inode) if c.chunk]
    except TargetError as e:
        raise UserError(f"{path}: {e}; give a path inside a mount, or -H and a path in the file "
                        "system") from None  # fmt: skip
    except ReplyError as e:
        raise UserError(f"{path}: it has no chunks to explain ({e}): give a file") from None


def ask_chunk(client: ToolClient, number: int) -> q.ChunkStory:
    """All about one chunk. UserError if nobody knows it."""
    try:
        story: q.ChunkStory = client.call(q.ExplainChunk(number))
    except ReplyError:
        raise UserError(
            f"chunk {number:016X}: neither the metadata nor any connected chunkserver has it"
        ) from None
    return story


def owners(client: ToolClient, inodes: list[int], *, everywhere: bool) -> dict[int, list[str]]:
    """Inode -> what to call it: its paths, or a remark in parentheses if it has none."""
    named = Names(client).paths(sorted(set(inodes)), everywhere=everywhere)
    nameless = "no name any more" if everywhere else "no name found where it was made"
    return {i: paths or [f"(inode {i}, {nameless})"] for i, paths in named.items()}
