"""`python -m tests.sim --seed N` replays one run exactly; `--seeds K` runs K of them from N on."""

import argparse
import os
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

from tests.sim.world import World, story

_CHUNK = 5  # seeds that a process takes at a time


class Outcome(NamedTuple):
    """What one seed came to."""

    seed: int
    error: str
    acked: int
    reads: int
    virtual_s: float
    seen: Counter[str]
    fingerprint: str

    @property
    def reproduce(self) -> str:
        """The line that a finding ends with."""
        return _reproduce(self.seed)


def outcome(seed: int) -> Outcome:
    """Run it; a finding becomes a sentence."""
    try:
        world = story(seed)
    except KeyboardInterrupt:
        raise
    except BaseException as e:
        return Outcome(seed, f"{type(e).__name__}: {e}", 0, 0, 0.0, Counter(), "")
    return _of(world)


def _reproduce(seed: int) -> str:
    return f"reproduce: python -m tests.sim --seed {seed}"


def _of(world: World) -> Outcome:
    return Outcome(
        world.seed, "", world.acked, world.reads, world.virtual_s, world.seen, world.fingerprint
    )


def many(first: int, seeds: int, jobs: int) -> Iterator[Outcome]:
    """A range of seeds on several processes, each as soon as it and all before it are done."""
    numbers = range(first, first + seeds)
    if jobs == 1:
        yield from map(outcome, numbers)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(outcome, numbers, chunksize=_CHUNK)


def main() -> int:
    """Print what was found and what has happened; 1 if something was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--log", action="store_true", help="one seed: what the nodes log")
    args = parser.parse_args()
    if args.seeds == 1:
        return _one(args.seed, log=args.log)
    return _sum_up(args.seed, args.seeds, args.jobs)


def _one(seed: int, *, log: bool) -> int:
    try:
        found = _of(story(seed, log=log))
    except BaseException as e:
        traceback.print_exception(e)
        print(f"seed {seed}: {type(e).__name__}: {e}\n    {_reproduce(seed)}")
        return 1
    print(
        f"seed {seed}: {found.acked} operations acknowledged, {found.reads} reads in "
        f"{found.virtual_s:.1f} virtual s: good; trace {found.fingerprint}"
    )
    return 0


def _sum_up(first: int, seeds: int, jobs: int) -> int:
    began, bad, acked, reads, virtual_s = time.monotonic(), 0, 0, 0, 0.0
    seen: Counter[str] = Counter()
    for one in many(first, seeds, jobs):
        seen += one.seen
        acked, reads, virtual_s = acked + one.acked, reads + one.reads, virtual_s + one.virtual_s
        if one.error:
            bad += 1
            print(f"seed {one.seed}: {one.error}\n    {one.reproduce}", flush=True)
    print(
        f"{seeds} seeds, {bad} bad, {acked} operations acknowledged, {reads} reads, "
        f"{virtual_s:.0f} virtual s in {time.monotonic() - began:.0f} s"
    )
    print(", ".join(f"{kind} {number}" for kind, number in sorted(seen.items())))
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
