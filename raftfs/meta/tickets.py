"""Signs the tickets with which clients and chunkservers use chunks (see `wire/ticket.py`).

Their time is counted in a clock of this process, which every chunkserver is told when it connects
and with each heartbeat; so neither the clocks of the machines nor those of other masters matter.
Only a leader signs: for a reader after the read barrier, for a writer after the commit.
"""

import os
import time
from collections.abc import Callable

from msgspec.structs import replace

from raftfs.const import TICKET_LIFETIME_S
from raftfs.wire import messages as m
from raftfs.wire.auth import ClusterKey
from raftfs.wire.ticket import Right, Ticket, seal, ticket_key

_CLOCK_BYTES = 8
# The longest that an order to replicate takes, with what a source may wait for.
REPLICATION_S = 60.0


class Tickets:
    """One master's."""

    def __init__(
        self, key: ClusterKey, cluster: Callable[[], bytes], lifetime_s: float = TICKET_LIFETIME_S
    ) -> None:
        self._key = key
        self._cluster = cluster
        self._lifetime_s = lifetime_s
        self._clock = os.urandom(_CLOCK_BYTES)
        self._derived = (b"", b"")

    def clock(self) -> m.MasterClock:
        """What this master's clock shows now."""
        return m.MasterClock(self._clock, _now_ms())

    def for_reader(self, found: m.ChunkMap, session: int) -> m.ChunkMap:
        """The map with a ticket to read the chunk."""
        if not found.chunk:
            return found
        ticket = self._sign(found.chunk, Right.LIST | Right.READ, session)
        return replace(found, ticket=ticket, ticket_s=self._lifetime_s)

    def for_writer(self, granted: m.ChunkMap, session: int) -> m.ChunkMap:
        """The map with a ticket to write under the grant, and to read."""
        rights = Right.LIST | Right.READ | Right.WRITE
        if granted.fresh:
            rights |= Right.CREATE
        ticket = self._sign(
            granted.chunk, rights, session, version=granted.version, lock=granted.lock
        )
        return replace(granted, ticket=ticket, ticket_s=self._lifetime_s)

    def for_list(self, chunk: int, session: int) -> bytes:
        """To see the checksums of a chunk, not its bytes."""
        return self._sign(chunk, Right.LIST, session)

    def for_replication(self, order: m.Replicate) -> m.Replicate:
        """The order with a ticket for the source, which lasts as long as the order may take."""
        lifetime_s = max(REPLICATION_S, self._lifetime_s)
        rights = Right.LIST | Right.READ
        return replace(order, ticket=self._sign(order.chunk, rights, 0, lifetime_s=lifetime_s))

    def _sign(
        self, chunk: int, rights: int, session: int, *, version: int = 0, lock: int = 0,
        lifetime_s: float = 0.0,
    ) -> bytes:  # fmt: skip
        expires_ms = _now_ms() + round(1000 * (lifetime_s or self._lifetime_s))
        ticket = Ticket(self._clock, expires_ms, chunk, rights, session, version, lock)
        cluster = self._cluster()
        if self._derived[0] != cluster:
            self._derived = (cluster, ticket_key(self._key, cluster))
        return seal(self._derived[1], ticket)


def _now_ms() -> int:
    return round(1000 * time.monotonic())
