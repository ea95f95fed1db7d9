"""`raftfs whois`: which files a chunk belongs to."""

import argparse

from raftfs.cli import asking, output
from raftfs.client.meta import ToolClient


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="raftfs whois", description="The paths of the file that owns a chunk."
    )
    p.add_argument("chunk", metavar="CHUNK", help="16 hexadecimal digits, or decimal")
    asking.add_options(p)
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit status: 1 if no file owns the chunk."""
    args = parser().parse_args(argv)

    def work(client: ToolClient) -> int:
        story = asking.ask_chunk(client, asking.parse_chunk(args.chunk))
        paths = []
        if story.refs:
            paths = asking.owners(client, [story.owner], everywhere=True)[story.owner]
        if args.json:
            output.print_json({"id": f"{story.chunk:016X}", "inode": story.owner,
                               "index": story.index, "paths": paths})  # fmt: skip
        elif paths:
            print("\n".join(f"{path} (chunk {story.index} of it)" for path in paths))
        else:
            print(f"no file owns chunk {story.chunk:016X}")
        return 0 if paths else 1

    return asking.run("whois", args, None, work)


if __name__ == "__main__":
    raise SystemExit(main())
