"""Who the masters are, as far as one replica knows, and who may connect to it.

Before the cluster is founded that is what --peers says and whom this replica has met; afterwards
the applied state names the masters, and a change that is in the log may name one more.
"""

import asyncio
from collections.abc import Callable

import structlog

from raftfs.errors import UserError
from raftfs.meta.raft.configurations import Members
from raftfs.meta.raft.identity import Identity
from raftfs.meta.raft.messages import PeerName, Refused
from raftfs.meta.raft.safety import SafeSyncObj

log = structlog.get_logger("raftfs.raft")

_TELL_WAITING_S = 5.0


class Roster:
    """`members`: the voters of the applied state (name -> identity), empty before the founding.

    `all_met`: every other master's identity is known; a voter takes part only then.
    """

    def __init__(
        self,
        peers: tuple[str, ...],
        learner: bool,
        identity: Identity,
        members: Members,
        core: Callable[[], SafeSyncObj | None],
    ) -> None:
        """`peers`: what --peers said. `learner`: never to become a voter. `core()`: the Raft node,
        once there is one, which knows of changes on their way.
        """
        self._peers = peers
        self._learner = learner
        self._identity = identity
        self._core = core
        self.members = members
        self.all_met = asyncio.Event()

    # --- who the masters are

    def check_peers(self) -> None:
        """Before the cluster is founded, --peers says who counts; a wrong one would be fatal.
        Afterwards it may be out of date, but naming strangers, or only itself, is a mistake.
        """
        if self._learner:
            return
        me, given = self._identity.name, set(self._peers)
        met = {*self._identity.peers, me}
        now = set(self.members) or met
        wrong = not now <= given
        if self.members:
            wrong = not given <= now | met or (given == {me} and now != given)
        if wrong:
            raise UserError(
                f"--peers names {','.join(sorted(given))}, but this cluster's masters are "
                f"{','.join(sorted(now))}: give exactly those"
            )
        if given != now and self.members:
            log.info("--peers is out of date", given=sorted(given), masters=sorted(now))

    def names(self) -> list[str]:
        """The masters to talk to, oneself included if this is one."""
        if not self.members:
            return list(self._peers)
        names = set(self._known())
        return sorted(names if self._identity.voter else names.union(self._peers))

    def others(self) -> list[str]:
        """`names` without this one."""
        return [name for name in self.names() if name != self._identity.name]

    def changed(self, members: Members) -> None:
        """The applied state names these voters from now on."""
        self.members = members
        for name, uuid in members.items():
            if name != self._identity.name and self._identity.peers.get(name) != uuid:
                self._identity.learn(name, uuid)

    @property
    def names_me(self) -> bool:
        """Whether the state has this replica, with the identity that it has, as a voter."""
        return self.members.get(self._identity.name) == self._identity.uuid

    def _known(self) -> Members:
        """Identities of the masters, also of one that a change in the log will make a master."""
        if not self.members:
            return self._identity.peers
        core = self._core()
        coming = core.configurations.latest if core is not None else {}
        return {**coming, **self.members}

    # --- who may connect

    def refusal(self, peer: PeerName) -> Refused | None:
        """Why a peer must stay out; learns the identities of peers that it meets first."""
        if not peer.voter and not peer.joining:
            return None
        if peer.joining:
            if self._known():
                return None
            return Refused("the cluster is not founded: nobody can join it yet")
        if not self._identity.voter:
            # It counts for nothing, so nobody can misuse it; and it may have missed who came, went
            # or was replaced, which only the master that has the log may be able to tell.
            self._meet(peer)
            return None
        if peer.name not in self.names():
            return self._refusal_of_stranger(peer)
        known = self._known().get(peer.name)
        # Of those who found a cluster together; whoever joins later gets a snapshot.
        if known is None and not self.members and peer.origin != self._identity.origin:
            return Refused(_other_origin(peer, self._identity))
        if known not in (None, peer.uuid):
            return Refused(
                f"master {peer.name} lost its data: its old identity has votes and "
                "acknowledgements that this one forgot, so it may not take part; bring it back "
                "with `raftfs cluster replace`, or start it on an empty folder with --replace",
                stranger=True,
            )
        self._meet(peer)
        return None

    def _refusal_of_stranger(self, peer: PeerName) -> Refused | None:
        masters = ",".join(self.names())
        # Only who it was then: removed, it may have come again with another identity.
        if self._identity.peers.get(peer.name) == peer.uuid:
            return Refused(f"{removed(peer.name)}: its masters are {masters}", removed=True)
        if self._may_have_missed_it():
            return None
        return Refused(f"master {peer.name} is not one of {masters}")

    def _may_have_missed_it(self) -> bool:
        """Whether a stranger may be a master that was added while this replica was away, and may
        lead by now: then only its log tells that it is one. Whoever is up to date hears a leader,
        and knows every master's identity.
        """
        core = self._core()
        return core is not None and bool(self.members) and not core.has_leader()

    def _meet(self, peer: PeerName) -> None:
        if peer.name in self.names() and self._known().get(peer.name) is None:
            self._identity.learn(peer.name, peer.uuid)
        if all(name in self._identity.peers for name in self.others()):
            self.all_met.set()

    def refused_for_good(self, refused: Refused) -> bool:
        """Whether a peer's refusal means that this replica must not go on."""
        # A new voter may have met everybody before it is told that it is not whom they know.
        unfounded = self._identity.voter and not self.members
        strange = not self._identity.peers or not self.all_met.is_set()
        return refused.removed or unfounded or strange

    async def meet_everybody(self) -> None:
        """A new voter takes part only when it knows the identity of every other."""
        others = self.others()
        if not self._identity.voter or all(name in self._identity.peers for name in others):
            self.all_met.set()
        while not self.all_met.is_set():
            try:
                async with asyncio.timeout(_TELL_WAITING_S):
                    await self.all_met.wait()
            except TimeoutError:
                missing = [name for name in others if name not in self._identity.peers]
                log.info("first start: waiting for the other masters", missing=missing)


def removed(name: str) -> str:
    """What to say of a master that counts no more."""
    return f"master {name} was removed from the cluster"


def _other_origin(peer: PeerName, mine: Identity) -> str:
    def begun(origin: bytes) -> str:
        return f"from image {origin.hex()}" if origin else "without an image"

    return (
        f"master {peer.name} was begun {begun(peer.origin)}, {mine.name} {begun(mine.origin)}: "
        "begin all masters on empty folders, with --bootstrap and the same image"
    )
