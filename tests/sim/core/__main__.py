"""`python -m tests.sim.core --seed N` replays one run; `--seeds K` runs K of them from N on."""

import argparse
import logging
import time
from collections import Counter

from tests.sim.core.world import story


def main() -> int:
    """Run; the first failure stops, with its seed."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim.core", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    began, acked, reads = time.monotonic(), 0, 0
    seen: Counter[str] = Counter()
    for seed in range(args.seed, args.seed + args.seeds):
        try:
            world = story(seed)
        except Exception:
            print(f"seed {seed} failed; reproduce: python -m tests.sim.core --seed {seed}")
            raise
        acked += len(world.acked)
        reads += world.reads
        seen += world.seen
    took = time.monotonic() - began
    print(f"{args.seeds} seeds, {acked} commands acknowledged, {reads} reads, {took:.0f} s: good")
    print(", ".join(f"{kind} {number}" for kind, number in sorted(seen.items())))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
