"""One replica: the safe Raft node driven by asyncio, its checkpoints, snapshots and membership.

Life: `start` loads identity and journal, opens the links, waits until every peer was met once
(first start only), then the node runs: each message or proposal schedules one `_run` for the end of
the loop's turn (replicate, acknowledge, commit, apply), as do a timer every 10 ms and each sync of
the journal, which is a thread's work (`syncer.py`). Tasks: `_checkpoints` (freeze in the loop,
write in a thread, thaw in the loop, compact the journal).

Whatever must not be survived (journal error, bug in apply, damaged state) resolves `failed`; the
owner stops the process. Nothing is served from then on.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import structlog
from pysyncobj.node import Node

from raftfs.errors import NotLeader, RaftfsError, ReplyError, Status, UserError
from raftfs.meta.raft.checkpoints import CheckpointLimits, Checkpoints, Freezing
from raftfs.meta.raft.identity import Identity
from raftfs.meta.raft.journal import DurableJournal
from raftfs.meta.raft.links import Links
from raftfs.meta.raft.messages import PeerName, Refused, SnapshotNext, SnapshotPiece
from raftfs.meta.raft.safety import LEADER, SafeSyncObj
from raftfs.meta.raft.snapshot import SnapshotReceiver, SnapshotSender
from raftfs.meta.raft.surroundings import Surroundings
from raftfs.meta.raft.syncer import Syncer
from raftfs.meta.state.apply import Applied
from raftfs.meta.state.ops_admin import members_after
from raftfs.wire.auth import ClusterKey
from raftfs.wire.ops import (
    Batch,
    Command,
    Found,
    MembershipOp,
    Op,
    ReplaceMember,
    decode_batch,
    encode_batch,
)

log = structlog.get_logger("raftfs.raft")

_TICK_S = 0.01
_HAND_OVER_PAUSE_S = 10.0
_HAND_OVER_S = 0.5


class ReplicaConfig(NamedTuple):
    """`name` and `peers` are `host:port`; `peers` contains `name` unless this is a learner.

    Once the cluster is founded its state names the masters; `peers` is then only where to begin.
    """

    name: str
    peers: tuple[str, ...]
    data_dir: Path
    learner: bool = False
    join: bool = False  # come as a learner, in a lost master's place or as a new one; vote later
    checkpoints: CheckpointLimits = CheckpointLimits()


class Machine(Freezing, Protocol):
    """What the replica drives; `meta.store.MetaStore` is the real one."""

    def apply_entry(self, index: int, term: int, data: bytes) -> list[Applied]:
        """Apply one entry; raises only for bugs."""

    def members(self) -> dict[str, bytes]:
        """Voters' identities."""

    def copy_to(self, path: Path) -> tuple[int, int]:
        """In a thread: copy the last checkpoint."""

    def install(self, path: Path) -> None:
        """Become the state in the file."""

    def index_of(self, path: Path) -> tuple[int, int]:
        """Index and term of the state in a file. UserError if it is none."""

    def tidy(self) -> int:
        """Free some of what is not used any more; how many rows."""


class Replica:
    """A member of the cluster, or a learner."""

    def __init__(
        self,
        config: ReplicaConfig,
        machine: Machine,
        key: ClusterKey,
        around: Surroundings | None = None,
    ) -> None:
        _check_peers(config)
        self._around = around or Surroundings()
        self.config = config
        self.machine = machine
        self._key = key
        self._loop = asyncio.get_running_loop()
        self._core: SafeSyncObj | None = None
        self._links: Links | None = None
        self._syncer: Syncer | None = None
        self._scheduled = False
        self._proposed = False
        self._stopped = False
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._all_met = asyncio.Event()
        self._known_role: tuple[bool, int, str] = (False, 0, "")
        self._known_members: dict[str, bytes] = {}
        self._promoting = False
        self._handing_over = False
        self._no_hand_over_until = 0.0
        self._membership_asked = 0.0
        self.on_role: list[Callable[[], None]] = []
        self.on_applied: list[Callable[[int, bytes, list[Applied]], None]] = []
        self.failed: asyncio.Future[None] = self._loop.create_future()

    # --- life

    async def start(self) -> None:
        """Join the cluster. UserError if this replica must not or cannot."""
        folder = self.config.data_dir
        voter = not (self.config.learner or self.config.join)
        self._identity = Identity.load_or_create(
            folder / "identity.cbor", self.config.name, self._around.new_uuid, voter=voter
        )
        if self._identity.voter != voter and self.config.join:
            log.info("already a master; --replace and --join are not needed any more")
        self._journal = DurableJournal(
            folder / "journal", self._around.files, self._around.segment_bytes,
            self.machine.checkpointed[0],
        )  # fmt: skip
        self._check_journal()
        self._checkpoints = Checkpoints(
            self.config.checkpoints, self.machine, self._journal, self._fail
        )
        self._known_members = self.machine.members()
        if self._known_members.get(self.config.name) == self._identity.uuid:
            self._identity.promote()  # a stop came between the checkpoint that says so and this
        self._check_members()
        self._learn_members()  # nor may it wait for whoever came then to be met
        self._sender = SnapshotSender(
            folder, self.machine.copy_to, self._send, self._snapshot_taken, self._around.wall_ns()
        )
        self._receiver = SnapshotReceiver(
            folder, lambda: self.machine.applied[0], self._install, self._send
        )
        await self._open_links()
        await self._meet_everybody()
        self._syncer = self._around.syncer(self._journal, self._synced)
        self._make_core()
        self._tasks.append(asyncio.ensure_future(self._checkpoints.run()))
        self._on_timer()

    def _check_members(self) -> None:
        """Before the cluster is founded, --peers says who counts; a wrong one would be fatal.
        Afterwards it may be out of date, but naming strangers, or only itself, is a mistake.
        """
        if self.config.learner:
            return
        me, given = self.config.name, set(self.config.peers)
        met = {*self._identity.peers, me}
        now = set(self._known_members) or met
        wrong = not now <= given
        if self._known_members:
            wrong = not given <= now | met or (given == {me} and now != given)
        if wrong:
            raise UserError(
                f"--peers names {','.join(sorted(given))}, but this cluster's masters are "
                f"{','.join(sorted(now))}: give exactly those"
            )
        if given != now and self._known_members:
            log.info("--peers is out of date", given=sorted(given), masters=sorted(now))

    def _names(self) -> list[str]:
        """The masters to talk to, oneself included if this is one."""
        if not self._known_members:
            return list(self.config.peers)
        names = set(self._known())
        return sorted(names if self._identity.voter else names.union(self.config.peers))

    def _others(self) -> list[str]:
        return [name for name in self._names() if name != self.config.name]

    def _check_journal(self) -> None:
        """State and journal must overlap, or something acknowledged is missing."""
        journal, (index, term) = self._journal, self.machine.checkpointed
        if journal.fits(index, term):
            return
        if index == 0:
            raise UserError(
                f"{self.config.data_dir}: the journal begins at entry {journal.oldest_index}, "
                "but the metadata file is new: it was lost; replace this master"
            )
        raise UserError(
            f"{self.config.data_dir}: the metadata file is at entry {index}, the journal has "
            f"{journal.oldest_index} to {journal.last_index}: one of them was lost or "
            "replaced; replace this master"
        )

    def _me(self) -> PeerName:
        identity = self._identity
        joining = not identity.voter and not self.config.learner
        return PeerName(identity.name, identity.uuid, identity.voter, joining)

    async def _open_links(self) -> None:
        self._links = self._around.links(
            self._me(), self._names(), self._key, self._refusal, self._received,
            self._refused,
        )  # fmt: skip
        self._links.tell(sorted(self._known_members))
        await self._links.start()

    def _make_core(self) -> None:
        assert self._links is not None
        if not len(self._journal):
            self._journal.add(b"\x01", 1, 0)  # every log begins with this entry
        if self.machine.applied[0] == 0:
            self.machine.apply_entry(1, 0, b"")
        self._core = SafeSyncObj(
            self.config.name if self._identity.voter else None, self._others(), self._journal,
            self._links, self._apply, self._offer_snapshot, self.machine.applied[0],
            self._known_members, _read_change,
        )  # fmt: skip
        self._links.announce()

    async def stop(self) -> None:
        """Hand leadership over, if held, and stop. The journal has everything."""
        if self.is_leader and not self.failed.done():
            await self.hand_over()
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._links is not None:
            await self._links.stop()
            await self._sender.stop()
            await self._receiver.stop()
            if self._syncer is not None:
                await asyncio.to_thread(self._syncer.stop)
            self._journal._destroy()

    def _fail(self, error: BaseException) -> None:
        """This node must not go on."""
        if not self.failed.done():
            log.error("replica stops", reason=str(error), exc_info=error)
            self._stopped = True
            self.failed.set_exception(error)
            if self._core is not None:
                self._core.resign()  # whoever waits here is told to ask elsewhere

    # --- who may connect

    def _known(self) -> dict[str, bytes]:
        """Identities of the masters, also of one that a change in the log will make a master."""
        if not self._known_members:
            return self._identity.peers
        coming = self._core.configurations.latest if self._core is not None else {}
        return {**coming, **self._known_members}

    def _refusal(self, peer: PeerName) -> Refused | None:
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
            self._welcome(peer)
            return None
        if peer.name not in self._names():
            masters = ",".join(self._names())
            # Only who it was then: removed, it may have come again with another identity.
            if self._identity.peers.get(peer.name) == peer.uuid:
                return Refused(f"{_removed(peer.name)}: its masters are {masters}", removed=True)
            if self._may_have_missed_it():
                return None
            return Refused(f"master {peer.name} is not one of {masters}")
        known = self._known().get(peer.name)
        if known is None:
            self._identity.learn(peer.name, peer.uuid)
            known = peer.uuid
        if known != peer.uuid:
            return Refused(
                f"master {peer.name} lost its data: its old identity has votes and "
                "acknowledgements that this one forgot, so it may not take part; bring it back "
                "with `raftfs cluster replace`, or start it on an empty folder with --replace",
                stranger=True,
            )
        self._welcome(peer)
        return None

    def _welcome(self, peer: PeerName) -> None:
        if peer.name in self._names() and self._known().get(peer.name) is None:
            self._identity.learn(peer.name, peer.uuid)
        if all(p in self._identity.peers for p in self._others()):
            self._all_met.set()
        if self._core is not None:
            self._core.node_replaced(Node(peer.name))

    def _may_have_missed_it(self) -> bool:
        """Whether a stranger may be a master that was added while this replica was away, and may
        lead by now: then only its log tells that it is one. Whoever is up to date hears a leader,
        and knows every master's identity.
        """
        core = self._core
        return core is not None and bool(self._known_members) and not core.has_leader()

    def _refused(self, peer: str, refused: Refused) -> None:
        error = UserError(f"{refused.reason} (said {peer})")
        # A new voter may have met everybody before it is told that it is not whom they know.
        unfounded = self._identity.voter and not self._known_members
        strange = not self._identity.peers or not self._all_met.is_set()
        if refused.removed or unfounded or strange:
            self._fail_quietly(error)
            return
        log.warning("refused by a peer", peer=peer, reason=refused.reason)
        if refused.stranger and self.is_leader and self._loop.time() > self._no_hand_over_until:
            # The peer was away while this master took a lost one's place, and cannot know that it
            # may follow. It learns so from the log, of a leader that it knows.
            self._no_hand_over_until = self._loop.time() + _HAND_OVER_PAUSE_S
            log.info("handing over to a leader that the peer knows", peer=peer)
            self._tasks.append(asyncio.ensure_future(self._hand_over_quietly()))

    async def _hand_over_quietly(self) -> None:
        with suppress(NotLeader):  # then somebody else leads already
            await self.hand_over()

    def _fail_quietly(self, error: UserError) -> None:
        if not self.failed.done():
            self._stopped = True
            self.failed.set_exception(error)
        self._all_met.set()

    async def _meet_everybody(self) -> None:
        """A new voter takes part only when it knows the identity of every other."""
        others = self._others()
        if not self._identity.voter or all(p in self._identity.peers for p in others):
            self._all_met.set()
        while not self._all_met.is_set():
            try:
                await asyncio.wait_for(self._all_met.wait(), 5.0)
            except TimeoutError:
                missing = [p for p in others if p not in self._identity.peers]
                log.info("first start: waiting for the other masters", missing=missing)
        if self.failed.done():
            self.failed.result()

    # --- the run of the node

    def _received(self, node: Node, message: Any) -> None:
        if self._core is None or self._stopped:
            return
        try:
            if isinstance(message, SnapshotPiece):
                self._receiver.piece(node, message)
            elif isinstance(message, SnapshotNext):
                self._sender.answered(node, message)
            else:
                self._core.receive(node, message)
        except Exception as e:
            self._fail(e)
        self._kick()

    def _send(self, node: Node, message: Any) -> bool:
        return self._links is not None and self._links.send(node, message)

    def _kick(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._run)

    def _on_timer(self) -> None:
        if not self._stopped:
            self._timer = self._loop.call_later(_TICK_S, self._on_timer)
            self.machine.tidy()
            self._kick()

    def _run(self) -> None:
        self._scheduled = False
        core, syncer = self._core, self._syncer
        if self._stopped or core is None or self._links is None or syncer is None:
            return
        try:
            if self._proposed and core.state == LEADER:
                core.replicate()
                self._links.flush()  # so that followers write while this node does
            self._proposed = False
            self._sender.term = core.term
            syncer.kick()
            core.step()
            syncer.kick()  # what the step added
            self._look_around(core)
        except Exception as e:
            self._fail(e)

    def _synced(self, error: BaseException | None) -> None:
        """Something is durable now: acknowledge, commit, apply, without waiting for a turn."""
        if error is not None:
            self._fail(error)
        else:
            self._run()

    def _look_around(self, core: SafeSyncObj) -> None:
        """After a turn: news of roles, the leader's own chores."""
        if core.leads and not self._handing_over:
            self._lead(core)
        role = (core.leads, core.term, self.leader)
        if role != self._known_role:
            self._known_role = role
            for callback in self.on_role:
                callback()

    def _lead(self, core: SafeSyncObj) -> None:
        now = self._loop.time()
        if now - self._membership_asked > 1.0:
            self._membership_asked = now
            if not self._known_members:
                uuid = self._around.new_uuid()
                everybody = self._identity.peers | {self.config.name: self._identity.uuid}
                self._propose_own(Found(uuid, everybody))
            self._promote_joined(core)
        self._checkpoints.lead(self._propose_own)

    def _promote_joined(self, core: SafeSyncObj) -> None:
        for node in core.learners:
            name, _, uuid = node.id.partition("#")
            caught_up = core.match_index.get(node, 0) >= core.commit_index
            known = self._known_members.get(name)
            lost = known is not None and known.hex() != uuid
            if lost and caught_up and not core.configurations.changing:
                log.info("replacement caught up", name=name, uuid=uuid)
                _forget(self.change_members(ReplaceMember(name, bytes.fromhex(uuid))))

    def _propose_own(self, op: Op) -> None:
        _forget(self.submit(self._own_batch(op)))

    def _own_batch(self, op: Op) -> bytes:
        return encode_batch(Batch(self._around.wall_ns(), [Command(0, 0, op)]))

    def _apply(self, index: int, term: int, data: bytes) -> list[Applied]:
        applied = self.machine.apply_entry(index, term, data)
        for one in applied:
            if isinstance(one.command.op, Found | MembershipOp):
                self._loop.call_soon(self._members_changed)
            self._checkpoints.applied(one.command.op)
        for callback in self.on_applied:
            callback(index, data, applied)
        return applied

    def _members_changed(self) -> None:
        """The state names other voters: believe it, and take our own place if it names us."""
        if self._stopped:
            return
        self._known_members = self.machine.members()
        self._checkpoints.members_new = True
        if self._core is not None:
            self._core.set_members(self._known_members)
        self._learn_members()
        mine = self._known_members.get(self.config.name) == self._identity.uuid
        if mine and not self._identity.voter and not self._promoting:
            self._promoting = True
            self._tasks.append(asyncio.ensure_future(self._become_voter()))
        elif self._identity.voter and self._known_members and not mine:
            masters = ",".join(sorted(self._known_members))
            removed = _removed(self.config.name)
            self._fail_quietly(UserError(f"{removed}: its masters are {masters}"))
        elif self._links is not None:
            self._links.set_peers(self._names())
            self._links.tell(sorted(self._known_members))

    def _learn_members(self) -> None:
        for name, uuid in self._known_members.items():
            if name != self.config.name and self._identity.peers.get(name) != uuid:
                self._identity.learn(name, uuid)

    async def _become_voter(self) -> None:
        """Vote under the name from now on. Not before the change is in a checkpoint: after a
        restart the log alone could not tell whether it was committed.
        """
        index = self.machine.applied[0]
        async with self._checkpoints.lock:
            while self.machine.checkpointed[0] < index and not self._stopped:
                await self._checkpoints.make()
        if self._stopped:
            return
        log.info("this replica votes from now on", name=self.config.name)
        assert self._links is not None
        self._core = None
        await self._links.stop()
        self._identity.promote()
        self._promoting = False
        await self._open_links()
        self._make_core()

    # --- proposals and reads

    def submit(self, data: bytes) -> "asyncio.Future[list[Applied]]":
        """Commit and apply an entry. NotLeader or BUSY (leadership is being handed over) at once;
        the future may give OutcomeUnknown.
        """
        core = self._leading()
        if self._handing_over:
            raise ReplyError(Status.BUSY)
        return self._submit(core.propose, data)

    def change_members(self, op: MembershipOp) -> "asyncio.Future[list[Applied]]":
        """As `submit`, for the one operation that changes who votes. BUSY: one is under way."""
        core = self._leading()
        if core.configurations.changing or self._handing_over:
            raise ReplyError(Status.BUSY)
        return self._submit(core.change_members, self._own_batch(op))

    def _leading(self) -> SafeSyncObj:
        core = self._core
        if core is None or self._stopped or not core.leads:
            raise NotLeader
        return core

    def _submit(
        self, propose: Callable[[bytes, Callable[[Any, Exception | None], None]], None], data: bytes
    ) -> "asyncio.Future[list[Applied]]":
        future: asyncio.Future[list[Applied]] = self._loop.create_future()

        def done(result: Any, error: Exception | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        propose(data, done)
        self._proposed = True
        self._kick()
        return future

    async def read_barrier(self) -> None:
        """Return when the state is as new as everything acknowledged before the call. NotLeader."""
        core = self._core
        if core is None or self._stopped:
            raise NotLeader
        future: asyncio.Future[None] = self._loop.create_future()

        def done(error: Exception | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

        core.read_index(done)
        self._kick()
        await future

    # --- checkpoints and snapshots

    def _offer_snapshot(self, node: Node) -> None:
        if self.machine.checkpointed[0]:  # else there is nothing to copy until the first checkpoint
            self._sender.offer(node)

    def _snapshot_taken(self, node: Node, index: int) -> None:
        if self._core is not None:
            self._core.sent_snapshot(node, index)

    async def _install(self, path: Path, index: int, term: int) -> None:
        if self.machine.index_of(path) != (index, term):
            raise RaftfsError(f"snapshot is not the state at {index}")
        async with self._checkpoints.lock:
            if self.machine.freezing is not None:
                await self._checkpoints.make()
            core = self._core
            if core is None or self._stopped or index <= core.last_applied:
                return
            try:
                self._journal.expect(index, term)
                self.machine.install(path)
                core.snapshot_installed(index, term)
            except Exception as e:
                self._fail(e)  # half done: the next start finds out how far
                raise RaftfsError(f"snapshot not installed: {e}") from e
            self._members_changed()

    # --- what others ask

    @property
    def is_leader(self) -> bool:
        """Leads, and knows everything that older leaders committed."""
        return self._core is not None and not self._stopped and self._core.leads

    @property
    def term(self) -> int:
        """The current term."""
        return self._core.term if self._core is not None else 0

    @property
    def leader(self) -> str:
        """Name of the leader of the current term, "" if none is known."""
        core = self._core
        if core is None or core.leader_node is None:
            return ""
        return str(core.leader_node.id)

    @property
    def commit_index(self) -> int:
        """Up to where the log is known to be committed."""
        return self._core.commit_index if self._core is not None else 0

    @property
    def last_index(self) -> int:
        """The end of this replica's log."""
        return self._journal.last_index if self._core is not None else 0

    def peers_connected(self) -> list[tuple[str, bool]]:
        """The other voters, and which of them are connected."""
        up = set(self._links.connected()) if self._links is not None else set()
        return [(p, p in up) for p in self._others()]

    @property
    def members(self) -> dict[str, bytes]:
        """The masters that vote: name -> identity."""
        return self._known_members

    def joining(self) -> dict[str, bytes]:
        """Connected replicas that want to become masters: name -> identity."""
        return self._links.joining() if self._links is not None else {}

    def behind(self) -> dict[str, int]:
        """Leader: entries that each connected node (voters by name, others as `name#identity`) is
        not known to have on its disk.
        """
        core, links = self._core, self._links
        if core is None or links is None:
            return {}
        last = self._journal.last_index
        matched = {n.id: last - i for n, i in core.match_index.items()}
        return {name: matched[name] for name in links.connected() if name in matched}

    async def hand_over(self, to: str = "") -> str:
        """Leader: have a voter (the most advanced one, or `to`) lead instead. Gives its name when
        this one leads no more, "" if that did not come to be. NotLeader.

        Until then, at most twice _HAND_OVER_S, proposals are refused as BUSY: a voter that is
        behind would not be elected.
        """
        core = self._leading()
        heir = core.heir(to)
        if heir is None:
            return ""
        self._handing_over = True
        try:
            await self._until(lambda: core.caught_up(heir))
            if core.state == LEADER:
                core.hand_over(heir)
            await self._until(lambda: core.state != LEADER)
        finally:
            self._handing_over = False
        return str(heir.id) if core.state != LEADER else ""

    async def _until(self, true: Callable[[], bool]) -> None:
        limit = self._loop.time() + _HAND_OVER_S
        while not true() and self._loop.time() < limit:
            await asyncio.sleep(_TICK_S / 2)


def _removed(name: str) -> str:
    return f"master {name} was removed from the cluster"


def _forget(future: "asyncio.Future[Any]") -> None:
    """Nobody waits for it: the next look around sees what came of it."""
    future.add_done_callback(lambda f: f.cancelled() or f.exception())


def _read_change(command: bytes, members: dict[str, bytes]) -> dict[str, bytes]:
    """Who votes after an entry that changes it."""
    for one in decode_batch(command).commands:
        if isinstance(one.op, MembershipOp):
            members = members_after(one.op, members)
    return members


def _check_peers(config: ReplicaConfig) -> None:
    if len(config.peers) == 2:
        raise UserError(
            "--peers names two masters: with two, losing either stops both, which is worse than "
            "one; give one or at least three"
        )
    if config.name not in config.peers and not config.learner:
        raise UserError(f"{config.name} is not among --peers {','.join(config.peers)}")
