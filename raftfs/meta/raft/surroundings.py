"""The world around a replica: its links, disk, thread, wall clock and chance.

Everything else comes from the event loop (`loop.time`, `to_thread`), so with another loop and other
surroundings a whole cluster runs in one process under virtual time (`tests/sim`).
"""

import time
from collections.abc import Callable
from typing import NamedTuple

from raftfs.meta.raft.identity import random_uuid
from raftfs.meta.raft.journal import SEGMENT_BYTES
from raftfs.meta.raft.links import Links
from raftfs.meta.raft.segments import Files
from raftfs.meta.raft.syncer import Syncer


class Surroundings(NamedTuple):
    """The real ones, if nothing else is said."""

    links: Callable[..., Links] = Links
    syncer: Callable[..., Syncer] = Syncer
    files: Files | None = None  # of the journal
    segment_bytes: int = SEGMENT_BYTES
    wall_ns: Callable[[], int] = time.time_ns
    new_uuid: Callable[[], bytes] = random_uuid
