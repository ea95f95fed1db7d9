"""`raftfs fsck`: metadata against copies, both ways, while everything is in use.

Every chunk has as many good copies as its goal, or is listed; every copy has a chunk, or is listed
with how long it is kept; every row of the metadata agrees with the rows it refers to. It asks page
by page and changes nothing. What changes while it looks may be seen before or after the change.
"""

import argparse
from collections import Counter
from typing import NamedTuple

from raftfs.cli import asking, output, sentences
from raftfs.cli.explain import plain
from raftfs.cli.missing import wait_until_ready
from raftfs.client.meta import ToolClient
from raftfs.wire import inquiries as q

TABLES = "NEMCDLHO"
LISTED_DEFAULT = 10_000
_WORDS = {
    "missing": "without a good copy", "undergoal": "under goal",
    "unsettled": "with copies of different versions", "stale": "with stale copies",
}  # fmt: skip


class Found(NamedTuple):
    """What is wrong. `counts` counts everything, the lists end at the limit."""

    counts: Counter[str]
    problems: list[q.ChunkProblem]
    orphans: list[tuple[int, q.CopyStory]]
    findings: list[str]

    @property
    def status(self) -> int:
        """0 clean; 1 what heals or waits; 2 what is missing or broken."""
        if self.counts["missing"] or self.counts["findings"]:
            return 2
        rest = ("undergoal", "unsettled", "stale", "orphans")
        return 1 if any(self.counts[what] for what in rest) else 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="raftfs fsck",
        description="Checks metadata against the copies on the chunkservers, both ways, while the "
        "file system is in use; changes nothing. Exit status 0: clean; 1: chunks under goal, stale "
        "copies or orphans; 2: missing chunks or broken metadata, or it could not look.",
    )
    p.add_argument(
        "--limit", type=int, default=LISTED_DEFAULT, metavar="N",
        help=f"list at most N of each kind (default {LISTED_DEFAULT}); all are counted",
    )  # fmt: skip
    asking.add_options(p)
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    args = parser().parse_args(argv)

    def work(client: ToolClient) -> int:
        wait_until_ready(client)
        found = Found(Counter(), [], [], [])
        _check_rows(client, found, args.limit)
        _check_chunks(client, found, args.limit)
        _check_orphans(client, found, args.limit)
        paths = asking.owners(client, [p.owner for p in found.problems], everywhere=False)
        if args.json:
            output.print_json(_as_json(found, paths))
        else:
            print("\n".join(report(found, paths)))
        return found.status

    return asking.run("fsck", args, None, work, trouble=2)


def _check_rows(client: ToolClient, found: Found, limit: int) -> None:
    for table in TABLES:
        after = b""
        while True:
            page: q.RowsPage = client.call(q.CheckRows(table, after))
            found.counts["rows"] += page.checked
            found.counts["findings"] += len(page.findings)
            found.findings.extend(page.findings[: max(0, limit - len(found.findings))])
            after = page.after
            if not after:
                break


def _check_chunks(client: ToolClient, found: Found, limit: int) -> None:
    after = 0
    while True:
        page: q.CheckedPage = client.call(q.CheckChunks(after))
        found.counts.update(chunks=page.checked, doomed=page.doomed, writing=page.writing)
        for problem in page.problems:
            found.counts[problem.what] += 1
            if len(found.problems) < limit:
                found.problems.append(problem)
        after = page.after
        if not after:
            return


def _check_orphans(client: ToolClient, found: Found, limit: int) -> None:
    page: q.OrphansPage = client.call(q.ListOrphans())
    found.counts["orphans"] = page.total
    while page.copies and len(found.orphans) < limit:
        found.orphans.extend(page.copies[: limit - len(found.orphans)])
        chunk, copy = page.copies[-1]
        page = client.call(q.ListOrphans(chunk, copy.server))


def report(found: Found, paths: dict[int, list[str]]) -> list[str]:
    """What was found, line by line, with a summary at the end."""
    counts = found.counts
    lines = [f"metadata: {finding}" for finding in found.findings]
    for p in found.problems:
        lines.append(f"chunk {p.chunk:016X}, chunk {p.index} of {', '.join(paths[p.owner])}: "
                     f"{_WORDS[p.what]}: {p.good} of {sentences.copies_word(p.goal)}")  # fmt: skip
        lines += [f"  {sentences.copy(c)}" for c in p.copies] or ["  no copy is known"]
    for chunk, copy in found.orphans:
        lines.append(f"copy of chunk {chunk:016X} at {sentences.copy(copy)}")
    wrong = [f"{counts[what]} {text}" for what, text in _WORDS.items() if counts[what]]
    wrong += [f"{counts['orphans']} orphans"] if counts["orphans"] else []
    wrong += [f"{counts['findings']} broken rows"] if counts["findings"] else []
    looked = f"{counts['rows']} rows and {counts['chunks']} chunks looked at"
    more = [f"{counts['writing']} being written"] if counts["writing"] else []
    more += [f"{counts['doomed']} being destroyed"] if counts["doomed"] else []
    return [*lines, "; ".join([looked, *more, *(wrong or ["all is well"])])]


def _as_json(found: Found, paths: dict[int, list[str]]) -> dict[str, object]:
    return {
        "status": found.status,
        "counts": dict(found.counts),
        "metadata": found.findings,
        "chunks": [{"paths": paths[p.owner], **plain(p)} for p in found.problems],
        "orphans": [{"chunk": f"{chunk:016X}", **plain(copy)} for chunk, copy in found.orphans],
    }


if __name__ == "__main__":
    raise SystemExit(main())
