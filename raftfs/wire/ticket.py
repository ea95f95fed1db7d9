"""Tickets: what lets a client, or another chunkserver, use one chunk for a while.

The leader signs one with every map and grant that it gives out; chunkservers check it with every
request on the data port. The key is derived from the cluster key and the cluster's UUID, so nobody
else can make one. `docs/decisions/012` has the argument.

    raw = seal(key, Ticket(...))            # 16 bytes of MAC, then the MessagePack of the ticket
    ticket = unseal(key, raw)               # AuthError unless it was made with this key
"""

import hmac

from raftfs.wire.auth import AuthError, ClusterKey
from raftfs.wire.frame import FrameError, decode, encode
from raftfs.wire.ops import Record

_MAC_BYTES = 16
TICKET_BYTES_MAX = 128  # a real one has about 60


class Right:
    """Bits of `Ticket.rights`."""

    LIST = 1  # checksums of the blocks
    READ = 2  # the bytes
    WRITE = 4  # under the ticket's lock, at its version
    CREATE = 8  # and the first write makes the copy


class Ticket(Record):
    """May use `chunk` until `clock`, a master's, shows `expires_ms`.

    `session` is whose it is, for the log. `version` and `lock` are those of the grant; 0 without
    the right to write.
    """

    clock: bytes
    expires_ms: int
    chunk: int
    rights: int
    session: int
    version: int = 0
    lock: int = 0


def ticket_key(key: ClusterKey, cluster: bytes) -> bytes:
    """What signs the tickets of one cluster."""
    return key.derive(b"raftfs ticket", cluster)


def seal(key: bytes, ticket: Ticket) -> bytes:
    """The ticket as it travels."""
    body = encode(ticket)
    return _mac(key, body) + body


def unseal(key: bytes, raw: bytes) -> Ticket:
    """Inverse of `seal`. AuthError unless exactly this was sealed with `key`."""
    body = raw[_MAC_BYTES:]
    if len(raw) > TICKET_BYTES_MAX or not hmac.compare_digest(raw[:_MAC_BYTES], _mac(key, body)):
        raise AuthError("the ticket was not made by a master of this cluster")
    try:
        return decode(Ticket, body)
    except FrameError:
        raise AuthError("the ticket is of a kind that is not known here") from None


def _mac(key: bytes, body: bytes) -> bytes:
    return hmac.digest(key, body, "sha256")[:_MAC_BYTES]
