"""The digest of a state: a sum of keyed hashes of its rows.

A sum does not depend on order, so it can be kept up to date row by row: subtract the old row's
hash, add the new one's.
"""

import hashlib

from raftfs.errors import StateDiffers
from raftfs.meta.state.model import Row
from raftfs.wire.frame import encode

_KEY = b"raftfs state row 1"
_MASK = 2**128 - 1
EMPTY = 0


def encode_row(row: Row) -> bytes:
    """The bytes of a row, as stored and as hashed."""
    return encode(row)


def row_hash(key: bytes, value: bytes) -> int:
    """128 bits for one row."""
    state = hashlib.blake2b(len(key).to_bytes(2, "big") + key, digest_size=16, key=_KEY)
    state.update(value)
    return int.from_bytes(state.digest(), "big")


def change(total: int, key: bytes, old: bytes | None, new: bytes | None) -> int:
    """The digest after the row at `key` went from `old` to `new` (None: no row)."""
    if old is not None:
        total -= row_hash(key, old)
    if new is not None:
        total += row_hash(key, new)
    return total & _MASK


def to_bytes(total: int) -> bytes:
    """A digest as 16 bytes."""
    return total.to_bytes(16, "big")


def compare(mine: bytes | None, index: int, leaders: bytes) -> None:
    """StateDiffers if this replica's checkpoint after entry `index` is not the leader's."""
    if mine not in (None, leaders):
        raise StateDiffers(f"the state after entry {index} differs from the leader's")


class Audit:
    """Hashes the rows of a file one after the other while checkpoints go on changing it; what it
    has in the end must be the digest. A row that rotted is so found before anybody asks for it.
    """

    def __init__(self) -> None:
        self.total = EMPTY
        self.at = b""  # every key up to this one is counted
        self.rows = 0

    def count(self, key: bytes, value: bytes) -> None:
        """The next row."""
        self.total = change(self.total, key, None, value)
        self.at = key
        self.rows += 1

    def changed(self, key: bytes, old: bytes | None, new: bytes | None) -> None:
        """A checkpoint changes a row, which may be counted already."""
        if key <= self.at:
            self.total = change(self.total, key, old, new)
