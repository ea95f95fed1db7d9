"""Admits requests on the data port: each must carry a ticket that the leader signed for it.

A ticket is verified once and then found among those that were; what is compared with each request
is chunk, right, grant and time. The time is that of the master that signed, which every master
announces on its link; one that was never heard of here cannot have signed anything that lasts.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable

import structlog

from raftfs.errors import ReplyError, Status
from raftfs.wire.auth import AuthError, ClusterKey
from raftfs.wire.messages import (
    DataRequest,
    ListBlocks,
    MasterClock,
    ReadData,
    SyncData,
    WriteData,
    ZeroData,
)
from raftfs.wire.ticket import Right, Ticket, ticket_key, unseal

log = structlog.get_logger("raftfs.tickets")

VERIFIED_MAX = 4_096  # tickets; to verify one again costs microseconds
CLOCKS_MAX = 64  # masters' processes; more than any cluster has had within a ticket's life
_LOG_EVERY_S = 1.0
# Who may write may make durable; so may readers, because an fsync often follows the grant's end.
_RIGHTS: dict[type, int] = {
    WriteData: Right.WRITE, ZeroData: Right.WRITE, SyncData: Right.READ, ReadData: Right.READ,
    ListBlocks: Right.LIST,
}  # fmt: skip


class TicketGate:
    """One chunkserver's. `check` is called by all data threads, `heard` by the event loop.

    `refused` counts by reason: none, forged, expired, chunk, right, grant.
    """

    def __init__(self, key: ClusterKey, cluster: Callable[[], bytes]) -> None:
        self._key = key
        self._cluster = cluster
        self._derived = (b"", b"")
        self._verified: dict[bytes, Ticket] = {}
        self._ahead_ms: dict[bytes, int] = {}  # of each master's clock, against ours
        self._lock = threading.Lock()
        self._logged_at = float("-inf")
        self.refused: Counter[str] = Counter()

    def heard(self, clock: MasterClock) -> None:
        """A master told what its clock shows."""
        known = self._ahead_ms.copy()  # replaced as a whole: threads look at it
        known.pop(clock.clock, None)
        known[clock.clock] = clock.now_ms - _now_ms()
        while len(known) > CLOCKS_MAX:
            del known[next(iter(known))]
        self._ahead_ms = known

    def check(self, head: DataRequest, peer: str) -> None:
        """Return if the request may be carried out, else count it and raise the ReplyError."""
        ticket = self._verified.get(head.ticket) or self._verify(head.ticket)
        reason = ticket if isinstance(ticket, str) else self._mismatch(ticket, head)
        if reason:
            self._count(reason, head, peer)
            expired = reason == "expired"
            raise ReplyError(Status.TICKET_EXPIRED if expired else Status.NO_TICKET)

    def _verify(self, raw: bytes) -> Ticket | str:
        cluster = self._cluster()
        if not raw or not cluster:
            return "none"
        if self._derived[0] != cluster:
            self._derived = (cluster, ticket_key(self._key, cluster))
        try:
            ticket = unseal(self._derived[1], raw)
        except AuthError:
            return "forged"
        if len(self._verified) >= VERIFIED_MAX:
            self._verified = {}
        self._verified[raw] = ticket
        return ticket

    def _mismatch(self, ticket: Ticket, head: DataRequest) -> str:
        """Why the ticket does not admit the request; "" if it does."""
        if ticket.chunk != head.chunk:
            return "chunk"
        if not ticket.rights & _RIGHTS[type(head)]:
            return "right"
        if isinstance(head, WriteData | ZeroData):
            if head.create and not ticket.rights & Right.CREATE:
                return "right"
            if (ticket.lock, ticket.version) != (head.lock, head.version):
                return "grant"
        ahead_ms = self._ahead_ms.get(ticket.clock)
        if ahead_ms is None or _now_ms() + ahead_ms >= ticket.expires_ms:
            return "expired"
        return ""

    def _count(self, reason: str, head: DataRequest, peer: str) -> None:
        now = time.monotonic()
        with self._lock:
            self.refused[reason] += 1
            quiet = now - self._logged_at < _LOG_EVERY_S
            if not quiet:
                self._logged_at = now
            refused = dict(self.refused)
        if not quiet:
            # Clients that slept meet expired tickets, and ask for new ones: nothing is wrong then.
            say = log.info if reason == "expired" else log.warning
            say("request without a valid ticket", peer=peer, reason=reason, refused=refused,
                request=type(head).__name__, chunk=f"{head.chunk:016X}")  # fmt: skip


def _now_ms() -> int:
    return round(1000 * time.monotonic())
