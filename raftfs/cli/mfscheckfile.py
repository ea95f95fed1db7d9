"""mfscheckfile: how many chunks of a file have how many copies."""

from raftfs.cli import output
from raftfs.cli.chunkinfo import copies_table
from raftfs.cli.target import for_each
from raftfs.client.meta import ToolClient

USAGE = """count the copies of files' chunks

usage: mfscheckfile [-nhHkmg] [--json] name [name ...]"""


def main(argv: list[str] | None = None) -> int:
    """Run the tool. Returns the exit status."""
    try:
        found, names = output.options("mfscheckfile", argv, output.NUMBER_OPTIONS)
        if not names:
            raise output.Usage
    except output.Usage:
        return output.usage(USAGE)
    style = output.number_format(found)
    answers: dict[str, dict[int, int]] = {}

    def show(client: ToolClient, name: str, inode: int) -> None:
        counts = copies_table(client, inode)
        if "--json" in found:
            answers[name] = counts
        else:
            print("\n".join([f"{name}:", *output.counts_by_copies(counts, style)]))

    status = for_each(names, show)
    if "--json" in found:
        output.print_json(answers)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
