"""`python -m tests.sim.whole --seed N` replays one run; `--seeds K` runs K of them from N on."""

import argparse
import os
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

from tests.sim.whole.world import story


class Outcome(NamedTuple):
    """What one seed came to."""

    seed: int
    error: str
    acked: int
    reads: int
    seen: Counter[str]
    fingerprint: str


def outcome(seed: int) -> Outcome:
    """Run it; a finding becomes a sentence."""
    try:
        world = story(seed)
    except BaseException as e:
        if isinstance(e, KeyboardInterrupt):
            raise
        return Outcome(seed, f"{type(e).__name__}: {e}", 0, 0, Counter(), "")
    return Outcome(seed, "", world.acked, world.reads, world.seen, world.fingerprint)


def many(first: int, seeds: int, jobs: int) -> list[Outcome]:
    """A range of seeds on several processes."""
    numbers = range(first, first + seeds)
    if jobs == 1:
        return [outcome(seed) for seed in numbers]
    with ProcessPoolExecutor(jobs) as pool:
        return list(pool.map(outcome, numbers, chunksize=5))


def main() -> int:
    """Print what was found and what has happened; 1 if something was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim.whole", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args()
    if args.seeds == 1:
        world = story(args.seed)
        print(f"seed {args.seed}: {world.acked} acknowledged, trace {world.fingerprint}")
        return 0
    began = time.monotonic()
    found = many(args.seed, args.seeds, args.jobs)
    seen: Counter[str] = Counter()
    for one in found:
        seen += one.seen
        if one.error:
            print(f"seed {one.seed}: {one.error}")
            print(f"    reproduce: python -m tests.sim.whole --seed {one.seed}")
    bad = sum(bool(one.error) for one in found)
    print(
        f"{args.seeds} seeds, {bad} bad, {sum(o.acked for o in found)} operations acknowledged, "
        f"{sum(o.reads for o in found)} reads, {time.monotonic() - began:.0f} s"
    )
    print(", ".join(f"{kind} {number}" for kind, number in sorted(seen.items())))
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
