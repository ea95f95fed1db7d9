"""Which servers take new copies, and in which order copies are read. Pure: chance is passed in."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from raftfs.const import CHUNK_SIZE


class Candidate(NamedTuple):
    """A chunkserver as placement sees it; sizes in bytes."""

    server: bytes
    host: str
    free: int


def choose_servers(
    candidates: Iterable[Candidate],
    count: int,
    exclude: Iterable[bytes],
    draw: Callable[[], float],
) -> list[bytes]:
    """Up to `count` distinct servers with room for a chunk, drawn with weight of their free space.

    `draw` gives numbers in [0, 1). Servers in `exclude` are never chosen. Fewer than `count` are
    returned when no more have room; the first one heads the write chain.
    """
    barred = set(exclude)
    pool = [c for c in candidates if c.server not in barred and c.free >= CHUNK_SIZE]
    chosen: list[bytes] = []
    while pool and len(chosen) < count:
        point = draw() * sum(c.free for c in pool)
        at = 0
        while at < len(pool) - 1 and point >= pool[at].free:
            point -= pool[at].free
            at += 1
        chosen.append(pool.pop(at).server)
    return chosen


def read_order(
    copies: list[tuple[bytes, str]], reader_host: str, draw: Callable[[], float]
) -> list[bytes]:
    """Copies on the reader's own host first, the others in random order to spread the load."""
    shuffled = sorted(copies, key=lambda c: (c[1] != reader_host, draw()))
    return [server for server, _ in shuffled]
