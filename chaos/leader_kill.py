"""The leader dies, again and again, while four writers write; nobody loses a byte or sees an error.

    python -m chaos.leader_kill [--kills 5] [--seed N]

Four writers fill a tree under goal 2 with fsync. The leader gets kill -9 `--kills` times, each time
restarted two seconds later; a chunkserver once, and it is restarted too. Then the file system is
mounted anew, and every file that was acknowledged as fsynced or closed must be there and equal.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from chaos.cluster import Cluster
from chaos.writers import Writers, acknowledged, count_between, errors, longest_pause_s, verify

WINDOW_S = 5.0


def parser() -> argparse.ArgumentParser:
    """Options of the story."""
    p = argparse.ArgumentParser(prog="leader_kill", description=__doc__.splitlines()[0])
    p.add_argument("--dir", type=Path, help="where to work (default: a new temporary folder)")
    p.add_argument("--kills", type=int, default=5)
    p.add_argument("--seconds", type=float, default=2.0,
                   help="of writing after each restart (default: %(default)s)")
    p.add_argument("--writers", type=int, default=4)
    p.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "big"))
    p.add_argument("--port-base", type=int, default=29400)
    p.add_argument("--keep", action="store_true", help="keep data and logs")
    return p  # fmt: skip


def kill_leader(cluster: Cluster) -> tuple[float, str, int]:
    """kill -9 of the leader; gives when, who and its term."""
    status = cluster.status()
    cluster.run("kill", status["leader"])
    return time.monotonic(), status["leader"], status["term"]


def story(args: argparse.Namespace, folder: Path) -> int:
    """Tell it; gives the exit status."""
    print(f"seed {args.seed}; reproduce: python -m chaos.leader_kill --seed {args.seed} "
          f"--kills {args.kills}")  # fmt: skip
    with Cluster(folder, args.port_base, keep=args.keep) as cluster:
        root = cluster.mountpoint / "tree"
        root.mkdir()
        cluster.tool("setgoal", "2", str(root))
        writers = Writers(root, folder / "records", args.writers, args.seed)
        writers.start()
        kills: list[tuple[float, str, int]] = []
        time.sleep(3.0)
        for number in range(args.kills):
            kills.append(kill_leader(cluster))
            time.sleep(2.0)
            cluster.run("start", kills[-1][1])
            if number == args.kills // 2:
                cluster.run("kill", "cs1")
                time.sleep(2.0)
                cluster.run("start", "cs1")
            time.sleep(args.seconds)
        last_term = cluster.status()["term"]
        writers.stop()
        cluster.remount()
        return judge(list(writers.lines()), kills, last_term, writers.crashes())


def judge(
    lines: list[list[dict]], kills: list[tuple[float, str, int]], last_term: int,
    crashes: list[str],
) -> int:
    """Print what happened; 0 only if nothing was lost, nobody saw an error, and the kills hit."""
    problems = [*crashes, *(p for one in lines for p in verify(one))]
    seen = [e for one in lines for e in errors(one)]
    stalls_ms = []
    for number, (at, name, term) in enumerate(kills, 1):
        before = sum(count_between(one, at - 1.0, at) for one in lines)
        stall = max(longest_pause_s(one, at, at + WINDOW_S) for one in lines)
        stalls_ms.append(stall * 1000)
        print(f"kill {number}: {name}, leader of term {term}; {before} operations in the second "
              f"before; longest stall {stall * 1000:.0f} ms")  # fmt: skip
        if not before:
            problems.append(f"kill {number} hit while nobody was writing: it proves nothing")
    if len({term for _, _, term in kills}) != len(kills):
        problems.append("two kills hit the same term: one of them hit no leader")
    files = sum(len(acknowledged(one)) for one in lines)
    print(f"{files} files acknowledged, {sum(map(len, lines))} operations, "
          f"terms {kills[0][2]} to {last_term} ({last_term - kills[0][2]} elections)")  # fmt: skip
    print(f"stalls: p50 {statistics.median(stalls_ms):.0f} ms, max {max(stalls_ms):.0f} ms")
    for line in (*seen[:20], *problems[:20]):
        print(f"PROBLEM {line}", file=sys.stderr)
    print("LOST OR WRONG" if problems or seen else "nothing lost, no error seen")
    return 1 if problems or seen else 0


def main() -> int:
    """Run the story in a folder of its own."""
    args = parser().parse_args()
    if args.dir is not None:
        args.dir.mkdir(parents=True, exist_ok=True)
        return story(args, args.dir.absolute())
    with tempfile.TemporaryDirectory(prefix="raftfs-leader-kill-") as folder:
        return story(args, Path(folder))


if __name__ == "__main__":
    raise SystemExit(main())
