"""The links between replicas: who dials whom, who is let in, and pysyncobj's transport seam.

Of two voters the one with the greater name dials; who joins or only learns dials everybody. A new
link of a peer replaces its old one, whose late messages are ignored.
"""

import asyncio
from collections.abc import Callable
from itertools import chain
from typing import Any

import structlog
from pysyncobj.node import Node
from pysyncobj.transport import Transport

from raftfs.errors import LinkError, UserError
from raftfs.meta.raft.messages import Masters, Message, PeerName, Refused
from raftfs.wire import rpc
from raftfs.wire.auth import ClusterKey
from raftfs.wire.rpc import Link

log = structlog.get_logger("raftfs.raft.links")

_DIAL_TIMEOUT_S = 1.0
_DIAL_AGAIN_S = 0.1


class Links(Transport):  # type: ignore[misc]
    """Messages to nodes by name. The owner says who may connect and takes what arrives."""

    def __init__(
        self,
        me: PeerName,
        peers: list[str],
        key: ClusterKey,
        refusal: Callable[[PeerName], Refused | None],
        receive: Callable[[Node, Any], None],
        refused: Callable[[str, Refused], None],
        wire: Any = rpc,
    ) -> None:
        """`refusal(peer)` gives why a peer must stay out, or None. `refused(peer, message)`
        is called when they keep us out. `wire` has `serve` and `connect` as `raftfs.wire.rpc` has.
        """
        super().__init__(None, None, [])
        self.me = me
        self._peers = peers
        self._key = key
        self._wire = wire
        self._refusal = refusal
        self._receive = receive
        self._refused = refused
        self._links: dict[str, Link] = {}
        self._nodes: dict[str, Node] = {}
        self._server: rpc.Server | None = None
        self._dialers: dict[str, asyncio.Task[None]] = {}
        self._told: set[tuple[str, bytes]] = set()
        self._masters: list[str] = []  # as others are told
        self._heard_of: dict[str, list[str]] = {}  # the masters as others have them

    # --- pysyncobj's seam

    @property
    def ready(self) -> bool:
        """pysyncobj asks before it works."""
        return True

    def send(self, node: Node, message: Any) -> bool:
        """Send to a node; False if it is not connected."""
        link = self._links.get(node.id)
        if link is None:
            return False
        link.notify(message)
        return True

    def flush(self) -> None:
        """Let everything that was sent leave now."""
        for link in self._links.values():
            link.flush()

    # --- life

    async def start(self) -> None:
        """Listen (voters and joining ones, to keep their port) and dial. UserError: port busy."""
        host, colon, port = self.me.name.rpartition(":")
        if colon:  # a learner's name is no address: nobody dials it
            try:
                self._server = await self._wire.serve(
                    host, int(port), incoming=Message, handler=self._message, key=self._key,
                    role="replica", name=self.me.pack(), on_open=self._opened,
                    on_close=self._closed,
                )  # fmt: skip
            except OSError as e:
                raise UserError(
                    f"cannot listen on {self.me.name} (Raft): {e.strerror}; is another master "
                    "running, or is the address not this machine's?"
                ) from None
        self.set_peers(self._peers)

    def set_peers(self, peers: list[str]) -> None:
        """These are the masters from now on: others are hung up on, new ones dialed. Also those
        whom somebody else takes for masters: this replica may have missed their coming. What one
        says of itself does not count: it may have missed that it was removed.
        """
        self._peers = peers
        heard = ((name for name in names if name != who) for who, names in self._heard_of.items())
        self._dial_all(sorted({*peers, *chain.from_iterable(heard)}))

    def tell(self, masters: list[str]) -> None:
        """Everybody who is or comes to be connected hears of these masters."""
        if masters != self._masters:
            self._masters = masters
            for link in self._links.values():
                link.notify(Masters(masters))

    def _dial_all(self, peers: list[str]) -> None:
        for peer in peers:
            mine = peer != self.me.name and (not self.me.voter or peer < self.me.name)
            if mine and peer not in self._dialers:
                self._dialers[peer] = asyncio.ensure_future(self._dial(peer))
        for peer in set(self._dialers) - set(peers):
            self._dialers.pop(peer).cancel()
        for name, link in list(self._links.items()):
            if "#" not in name and name not in peers:
                self._refuse(link, PeerName.parse(link.name))

    async def stop(self) -> None:
        """Close everything."""
        for task in self._dialers.values():
            task.cancel()
        await asyncio.gather(*self._dialers.values(), return_exceptions=True)
        self._dialers.clear()
        if self._server is not None:
            await self._server.close()
        for link in list(self._links.values()):
            link.close()

    def connected(self) -> list[str]:
        """Names of the nodes that are connected."""
        return sorted(self._links)

    def joining(self) -> dict[str, bytes]:
        """Who is connected and wants to become a voter: name -> identity."""
        peers = [PeerName.parse(link.name) for link in self._links.values()]
        return {peer.name: peer.uuid for peer in peers if peer.joining}

    def announce(self) -> None:
        """Tell a newly made core of the nodes that are connected already."""
        for name in list(self._links):
            self._up(name)

    async def _dial(self, peer: str) -> None:
        host, _, port = peer.rpartition(":")
        while True:
            try:
                link = await self._wire.connect(
                    host, int(port), incoming=Message, handler=self._message, key=self._key,
                    role="replica", name=self.me.pack(), timeout_s=_DIAL_TIMEOUT_S,
                    on_close=self._closed,
                )  # fmt: skip
            except LinkError:
                await asyncio.sleep(_DIAL_AGAIN_S)
                continue
            self._opened(link)
            await asyncio.shield(link.closed)
            await asyncio.sleep(_DIAL_AGAIN_S)

    def _opened(self, link: Link) -> None:
        try:
            peer = PeerName.parse(link.name)
        except ValueError:
            log.warning("not a replica", peer=link.peer, name=link.name)
            link.close()
            return
        if self._refuse(link, peer):
            return
        name = peer.name if peer.voter else f"{peer.name}#{peer.uuid.hex()}"
        old = self._links.get(name)
        link.context = name
        self._links[name] = link
        if old is not None:
            old.close()
        self._nodes.setdefault(name, Node(name))
        if self._masters:
            link.notify(Masters(self._masters))
        self._up(name)

    def _refuse(self, link: Link, peer: PeerName) -> bool:
        """Hang up on a peer that must stay out, and say why. False if it is welcome."""
        refused = self._refusal(peer)
        if refused is None:
            return False
        if (peer.name, peer.uuid) not in self._told:
            self._told.add((peer.name, peer.uuid))
            tell = log.info if refused.removed else log.warning
            tell("replica refused", peer=peer.name, reason=refused.reason)
        link.notify(refused)
        link.flush()
        link.close()
        return True

    def _up(self, name: str) -> None:
        if "#" in name:
            self._onReadonlyNodeConnected(self._nodes[name])
        else:
            self._onNodeConnected(self._nodes[name])

    def _closed(self, link: Link) -> None:
        name = link.context
        if name is None or self._links.get(name) is not link:
            return
        del self._links[name]
        self._heard_of.pop(name, None)
        node = self._nodes[name]
        if "#" in name:
            del self._nodes[name]
            self._onReadonlyNodeDisconnected(node)
        else:
            self._onNodeDisconnected(node)

    def _message(self, link: Link, message: Any) -> None:
        if isinstance(message, Refused):
            self._refused(link.name.partition("|")[0], message)
            return
        name = link.context
        if name is None or self._links.get(name) is not link:
            return
        if not isinstance(message, Masters):
            self._receive(self._nodes[name], message)
        elif message.names != self._heard_of.get(name):
            self._heard_of[name] = message.names
            self.set_peers(self._peers)
