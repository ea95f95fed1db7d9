"""`raftfs missing`: chunks without a good copy, whose they are, and who had a copy last."""

import argparse
import time

from raftfs.cli import asking, output, sentences
from raftfs.cli.explain import plain
from raftfs.client.meta import ToolClient
from raftfs.errors import UserError
from raftfs.wire import inquiries as q

READY_TIMEOUT_S = 120.0
_AGAIN_S = 0.5


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="raftfs missing",
        description="Chunks that no connected chunkserver has a good copy of: with the files' "
        "paths, the servers that had copies, and why those went. Exit status 0: none, 2: some.",
    )
    asking.add_options(p)
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    args = parser().parse_args(argv)

    def work(client: ToolClient) -> int:
        wait_until_ready(client)
        problems, total, watching = list[q.ChunkProblem](), 0, 0
        page: q.MissingPage = client.call(q.ListMissing(0))
        while page.chunks:
            problems += page.chunks
            total, watching = page.total, page.watching
            page = client.call(q.ListMissing(problems[-1].chunk))
        paths = asking.owners(client, [p.owner for p in problems], everywhere=False)
        if args.json:
            output.print_json({"missing": max(total, len(problems)), "chunks": [
                {"paths": paths[p.owner], **plain(p)} for p in problems]})  # fmt: skip
        else:
            _show(problems, max(total, len(problems)), paths, watching)
        return 2 if problems else 0

    return asking.run("missing", args, None, work, trouble=2)


def wait_until_ready(client: ToolClient) -> None:
    """Until the leader has looked at every chunk once. UserError if that takes too long."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not client.call(q.ListOrphans(2**63)).ready:
        if time.monotonic() > deadline:
            raise UserError(
                f"the leader is new and has not looked at all chunks within {READY_TIMEOUT_S:g} s: "
                "try again in a while"
            )
        time.sleep(_AGAIN_S)


def _show(
    problems: list[q.ChunkProblem], total: int, paths: dict[int, list[str]], watching: int
) -> None:
    for p in problems:
        print(f"chunk {p.chunk:016X} version {p.version}, chunk {p.index} of "
              f"{', '.join(paths[p.owner])}")  # fmt: skip
        for line in sentences.last_seen(p, watching):
            print(f"  {line}")
    if total > len(problems):
        print(f"... and {total - len(problems)} more; raftfs fsck looks at all")
    print(f"{total} missing")


if __name__ == "__main__":
    raise SystemExit(main())
