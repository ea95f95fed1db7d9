"""Clients' sessions as the leader watches them: which are connected, which have vanished.

The sessions themselves (and what they hold) are replicated rows. That a client is *connected* is
soft state of the leader; a new leader gives every session the full grace anew.
"""

import hashlib
import hmac
import time
from typing import NamedTuple

from raftfs.wire import messages as m
from raftfs.wire.rpc import Link


class ClientContext(NamedTuple):
    """What a link's client may do: the session (0 for tools) and its identity mapping."""

    session: int
    registered: m.Registered


class Presence:
    """Remembers since when each session has had no link."""

    def __init__(self) -> None:
        self._links: dict[int, set[Link]] = {}
        self._absent_since: dict[int, float] = {}

    def came(self, session: int, link: Link) -> None:
        """A link registered for the session."""
        self._links.setdefault(session, set()).add(link)
        self._absent_since.pop(session, None)

    def left(self, session: int, link: Link) -> None:
        """A link of the session is gone."""
        links = self._links.get(session)
        if links is not None:
            links.discard(link)
            if not links:
                del self._links[session]
                self._absent_since[session] = time.monotonic()

    def absent_s(self, session: int) -> float:
        """Seconds since the session was last connected here; counted from the first question."""
        if session in self._links:
            return 0.0
        return time.monotonic() - self._absent_since.setdefault(session, time.monotonic())

    def forget(self, session: int) -> None:
        """The session has ended."""
        self._absent_since.pop(session, None)

    def reset(self) -> None:
        """A new leadership: everybody's grace begins anew."""
        self._absent_since.clear()


def password_proof(challenge: bytes, password: str) -> bytes:
    """What a client answers to a challenge; the password itself never travels."""
    digest = hashlib.md5(password.encode()).digest()
    return hashlib.md5(challenge[:16] + digest + challenge[16:]).digest()


def same_secret(given: bytes, kept: bytes) -> bool:
    """Compare secrets in constant time."""
    return hmac.compare_digest(given, kept)
