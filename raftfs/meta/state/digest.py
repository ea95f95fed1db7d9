"""The digest of a state: a sum of keyed hashes of its rows.

A sum does not depend on order, so it can be kept up to date row by row: subtract the old row's
hash, add the new one's.
"""

import hashlib

from raftfs.errors import invariant
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
    """InvariantError if this replica's checkpoint after entry `index` is not the leader's."""
    if mine is not None:
        invariant(
            mine == leaders,
            f"this replica's state after entry {index} differs from the leader's: {mine.hex()} is "
            f"not {leaders.hex()}; replace this master (raftfs cluster replace)",
        )
