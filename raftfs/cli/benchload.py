"""`raftfs bench-load`: fill a cluster with empty files, through the masters alone.

No mount and no chunkserver takes part: what is measured is how fast the masters agree, and what is
left behind is a file system with many files to measure other things on.
"""

import argparse
import asyncio
import json
import sys
import time
from collections import deque

import uvloop

from raftfs import log
from raftfs.cli.target import default_masters
from raftfs.client.meta import MetaClient, parse_masters
from raftfs.client.session import Session
from raftfs.const import ROOT_INODE
from raftfs.errors import RaftfsError, ReplyError, UserError
from raftfs.wire import ops

PER_DIR = 1_000
_CONNECT_S = 20.0
_OPERATION_S = 60.0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="raftfs bench-load", description="Fill a cluster with empty files."
    )
    p.add_argument("--files", type=int, default=100_000, metavar="N")
    p.add_argument("--name", default="bench-load", help="of the folder to make (%(default)s)")
    p.add_argument("--outstanding", type=int, default=500, metavar="N",
                   help="files that are being made at a time (default: %(default)s)")
    p.add_argument("-H", "--masters", metavar="A,B,C",
                   help="the masters' client addresses (default: of the cluster in ./.raftfs)")
    p.add_argument("--json", action="store_true")
    return p  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    args = parser().parse_args(argv)
    log.setup("raftfs-bench-load", "warning")
    try:
        masters = args.masters or default_masters(None)
        if args.files < 1 or args.outstanding < 1:
            raise UserError("--files and --outstanding must be 1 or more")
        report = uvloop.run(load(masters, args.name, args.files, args.outstanding))
    except UserError as e:
        print(f"raftfs bench-load: {e}", file=sys.stderr)
        return e.exit_status
    except RaftfsError as e:
        print(f"raftfs bench-load: {args.name}: {e}", file=sys.stderr)
        return e.exit_status
    if args.json:
        print(json.dumps(report))
    else:
        print("\n".join(f"{key:24} {value:14,.2f}".rstrip("0").rstrip(".")
                        for key, value in report.items()))  # fmt: skip
    return 0


async def load(masters: str, name: str, files: int, outstanding: int) -> dict[str, float]:
    """Make the files; gives what was measured."""
    client = MetaClient(
        parse_masters(masters), Session(info="bench-load"), timeout_s=_OPERATION_S
    )
    await client.start(_CONNECT_S)
    took: list[float] = []
    try:
        top = await _make_folder(client, ROOT_INODE, name)
        todo: deque[tuple[int, int]] = deque()  # parent, number

        async def work() -> None:
            while todo:
                parent, number = todo.popleft()
                began = time.perf_counter()
                await client.mutate(_create(parent, f"file{number}", ops.NodeType.FILE))
                took.append(time.perf_counter() - began)

        began = time.perf_counter()
        for at in range(0, files, PER_DIR):
            parent = await _make_folder(client, top, f"d{at // PER_DIR}")
            todo.extend((parent, n) for n in range(min(PER_DIR, files - at)))
            await asyncio.gather(*(work() for _ in range(outstanding)))
        seconds = time.perf_counter() - began
    finally:
        await client.close()
    took.sort()
    return {
        "files": files, "seconds": seconds, "files a second": files / seconds,
        "p50, ms": 1e3 * took[len(took) // 2], "p99, ms": 1e3 * took[len(took) * 99 // 100],
    }  # fmt: skip


def _create(parent: int, name: str, kind: int) -> ops.Create:
    return ops.Create(parent, name.encode(), kind, 0o755, 0, 0, 0)


async def _make_folder(client: MetaClient, parent: int, name: str) -> int:
    try:
        made: ops.Attr = await client.mutate(_create(parent, name, ops.NodeType.DIR))
    except ReplyError as e:
        raise UserError(f"folder {name} cannot be made: {e}; give another --name") from None
    return made.inode


if __name__ == "__main__":
    raise SystemExit(main())
