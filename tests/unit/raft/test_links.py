"""Whom a replica dials and whom it hangs up on, by what it and others take for the masters."""

import asyncio
from typing import Any

from raftfs.meta.raft.links import Links
from raftfs.meta.raft.messages import Masters, PeerName, Refused
from raftfs.wire.auth import ClusterKey

KEY = ClusterKey(b"k" * 32)


class FakeLink:
    """A link that somebody has opened."""

    def __init__(self, name: str) -> None:
        self.name = PeerName(name, name.encode() * 4, True, False).pack()
        self.peer, self.context = ("127.0.0.1", 1), None
        self.sent: list[Any] = []
        self.open = True

    def notify(self, message: Any) -> None:
        """Remember it."""
        self.sent.append(message)

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """The end."""
        self.open = False


def test_a_removed_master_is_told_so_although_it_takes_itself_for_one() -> None:
    """It once was kept for as long as it said that it was a master, and never heard that it is
    none any more.
    """

    async def story() -> None:
        masters = ["b:1", "c:1", "d:1"]
        gone = Refused("master b:1 was removed", removed=True)
        links = Links(
            PeerName("a:1", b"a" * 16, True, False), masters, KEY,
            lambda peer: None if peer.name in masters else gone, lambda *_: None, lambda *_: None,
        )  # fmt: skip
        removed, other = FakeLink("b:1"), FakeLink("c:1")
        for link in (removed, other):
            links._opened(link)  # type: ignore[arg-type]
            links._message(link, Masters(list(masters)))  # type: ignore[arg-type]
        del masters[0]
        links.set_peers(masters)
        assert removed.open, "somebody else still takes it for a master"
        links._message(other, Masters(masters))  # type: ignore[arg-type]
        assert removed.sent[-1] is gone and not removed.open
        assert other.open
        await links.stop()

    asyncio.run(story())
