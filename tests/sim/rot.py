"""Bits that flip in the state file of a master that is down.

Only inside the values of rows: the file is opened as LMDB opens it, and one value is written back
with one bit changed. A bit of LMDB's own pages would be another matter: a page pointer that leads
beyond the file is a bus error, which ends the process without a word, and at once.
"""

import random
from pathlib import Path

import lmdb

from raftfs.meta.store import APPLIED_KEY

_MAP_SIZE = 1 << 30


def flip_row(path: Path, chance: random.Random) -> bool:
    """Flip a bit of some row. False if there is none. Nobody may have the file open."""
    if not path.exists():
        return False
    env = lmdb.open(
        str(path), subdir=False, lock=False, sync=False, metasync=False, map_size=_MAP_SIZE
    )
    try:
        with env.begin(write=True) as txn:
            rows = [(key, value) for key, value in txn.cursor() if key != APPLIED_KEY and value]
            if not rows:
                return False
            key, value = chance.choice(rows)
            rotten = bytearray(value)
            rotten[chance.randrange(len(rotten))] ^= 1 << chance.randrange(8)
            return bool(txn.put(key, bytes(rotten)))
    finally:
        env.close()
