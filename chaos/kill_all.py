"""Every master and every chunkserver dies at the same moment, in the middle of writes.

    python -m chaos.kill_all [--seed N]

Four writers write under goal 2; then kill -9 hits all masters and chunkservers at once (the mount
stays). The writers are ended, everything is started again, the file system mounted anew, and every
file that was acknowledged as fsynced or closed must be there and equal.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from chaos.cluster import Cluster
from chaos.writers import Writers, acknowledged, count_between, verify


def parser() -> argparse.ArgumentParser:
    """Options of the story."""
    p = argparse.ArgumentParser(prog="kill_all", description=__doc__.splitlines()[0])
    p.add_argument("--dir", type=Path, help="where to work (default: a new temporary folder)")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--seconds", type=float, default=4.0, help="of writing before each kill")
    p.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "big"))
    p.add_argument("--port-base", type=int, default=30400)
    p.add_argument("--keep", action="store_true", help="keep data and logs")
    return p


def kill_everything(cluster: Cluster) -> float:
    """kill -9 of all daemons but the mount, within a millisecond or so; gives when."""
    servers = [p for p in cluster.status()["processes"] if p["role"] != "mount"]
    at = time.monotonic()
    for process in servers:
        os.kill(process["pid"], signal.SIGKILL)
    return at


def story(args: argparse.Namespace, folder: Path) -> int:
    """Tell it; gives the exit status."""
    print(f"seed {args.seed}; reproduce: python -m chaos.kill_all --seed {args.seed}")
    problems: list[str] = []
    records = []
    with Cluster(folder, args.port_base, keep=args.keep) as cluster:
        root = cluster.mountpoint / "tree"
        root.mkdir()
        cluster.tool("setgoal", "2", str(root))
        for number in range(args.rounds):
            here = root / f"round{number}"
            here.mkdir()
            writers = Writers(here, folder / f"records{number}", 4, args.seed + number)
            writers.start()
            time.sleep(args.seconds)
            at = kill_everything(cluster)
            time.sleep(0.5)
            writers.kill()
            cluster.run("up")
            writers.wait()
            cluster.remount()
            records.append(writers)
            before = sum(count_between(one, at - 1.0, at) for one in writers.lines())
            if not before:
                problems.append(f"round {number}: nobody was writing when everything died")
            print(f"round {number}: {before} operations in the second before everything died")
            for earlier in records:
                problems += [p for one in earlier.lines() for p in verify(one)]
    files = sum(len(acknowledged(one)) for writers in records for one in writers.lines())
    print(f"{files} files acknowledged in {args.rounds} rounds")
    for line in problems[:20]:
        print(f"PROBLEM {line}", file=sys.stderr)
    print("LOST OR WRONG" if problems else "nothing lost")
    return 1 if problems else 0


def main() -> int:
    """Run the story in a folder of its own."""
    args = parser().parse_args()
    if args.dir is not None:
        args.dir.mkdir(parents=True, exist_ok=True)
        return story(args, args.dir.absolute())
    with tempfile.TemporaryDirectory(prefix="raftfs-kill-all-") as folder:
        return story(args, Path(folder))


if __name__ == "__main__":
    raise SystemExit(main())
