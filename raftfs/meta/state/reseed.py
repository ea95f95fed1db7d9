"""What an image's state becomes when a new cluster begins with it. Pure, row by row.

The lost masters may have gone on after the last line that the image has. Nothing that they gave out
then may be given out again, as chunkservers, mounts and changelogs may remember it: every counter
jumps far beyond what can have been used. `docs/decisions/009` has the whole argument.
"""

from msgspec.structs import replace

from raftfs.meta.state.model import ChunkRow, Counters, MemberRow, Row

# Beyond what any cluster can have used since the image: at 20,000 a second it takes 20 months.
# Small enough for 4 million bootstraps, one after another.
JUMP = 2**40
# Versions of a chunk are 32 bits on the disks, which is enough for 4,000 bootstraps; each one used
# costs a commit and a sync of every copy.
VERSION_JUMP = 2**20


def reseeded(key: bytes, row: Row) -> Row | None:
    """The row at `key` in the new cluster, None if it is not taken over."""
    if isinstance(row, MemberRow):
        return None  # founding the new cluster names its masters
    if key[:1] == b"L":
        return None  # see below
    if isinstance(row, Counters):
        return replace(
            row, next_inode=row.next_inode + JUMP, next_chunk=row.next_chunk + JUMP,
            next_session=row.next_session + JUMP, next_lock=row.next_lock + JUMP,
            version=row.version + JUMP,
        )  # fmt: skip
    if isinstance(row, ChunkRow):
        last = max(row.version, row.reserved) + VERSION_JUMP
        # A mount that lives may have given the lock back in the forgotten time, and would never
        # do so again; one that still writes is refused, and asks for a new grant.
        return replace(
            row, reserved=last, restored=last, settled=0, lock=0, lock_session=0, lock_time=0
        )
    return row
