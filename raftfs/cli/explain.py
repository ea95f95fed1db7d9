"""`raftfs explain`: why a chunk is as it is, and what will be done about it."""

import argparse
import os

import msgspec

from raftfs.cli import asking, output, sentences
from raftfs.client.meta import ToolClient
from raftfs.wire import inquiries as q


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="raftfs explain",
        description="Whose a chunk is, where its copies are, what happened to it, what is planned "
        "and why that waits. Of a file: each of its chunks.",
    )
    p.add_argument("kind", choices=["chunk"])
    p.add_argument("what", metavar="ID|PATH", help="a chunk (16 hexadecimal digits, or decimal); "
                   "a file inside a mount, or with -H its path in the file system")  # fmt: skip
    asking.add_options(p)
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    args = parser().parse_args(argv)
    is_path = "/" in args.what or os.path.exists(args.what)

    def work(client: ToolClient) -> int:
        if is_path:
            stories = asking.chunks_of(client, args.what, inside=args.masters is not None)
        else:
            stories = [asking.ask_chunk(client, asking.parse_chunk(args.what))]
        owned = [s.owner for s in stories if s.refs]
        paths = asking.owners(client, owned, everywhere=True)
        if args.json:
            output.print_json([as_json(s, paths.get(s.owner, [])) for s in stories])
        for story in () if args.json else stories:
            print("\n".join(sentences.story(story, paths.get(story.owner, []))))
        if not stories and not args.json:
            print(f"{args.what}: no chunks - it is empty, or holes only")
        return 0

    return asking.run("explain", args, args.what if is_path else None, work)


def as_json(story: q.ChunkStory, paths: list[str]) -> dict[str, object]:
    """All that is known, and the sentence about the plan. Times in ns since the epoch."""
    found: dict[str, object] = {"id": f"{story.chunk:016X}", "paths": paths}
    found |= plain(story)
    return found | {"next": sentences.plan(story.plan)}


def plain(record: msgspec.Struct) -> dict[str, object]:
    """A record for JSON: fields by name, bytes in hexadecimal."""
    return {name: _value(getattr(record, name)) for name in record.__struct_fields__}


def _value(value: object) -> object:
    if isinstance(value, msgspec.Struct):
        return plain(value)
    if isinstance(value, bytes):
        return value.hex()
    return [_value(v) for v in value] if isinstance(value, list) else value


if __name__ == "__main__":
    raise SystemExit(main())
