"""One replica: the safe Raft node driven by asyncio, its checkpoints, snapshots and membership.

Life: `start` loads identity and journal, opens the links, waits until every peer was met once
(first start only), then the node runs: each message or proposal schedules one `_run` for the end of
the loop's turn (replicate, acknowledge, commit, apply), as do a timer every 10 ms and each sync of
the journal, which is a thread's work (`syncer.py`); `docs/decisions/010` tells what the time of a
command is made of. Tasks: `_checkpoints` (freeze in the loop, write in a thread, thaw in the loop,
compact the journal).

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
from raftfs.meta.raft.keptlog import KeptDamaged
from raftfs.meta.raft.links import Links
from raftfs.meta.raft.messages import (
    CheckpointMade,
    PeerName,
    Refused,
    SnapshotNext,
    SnapshotPiece,
)
from raftfs.meta.raft.roster import Roster, removed
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

Done = Callable[[Any, Exception | None], None]

BEHIND_MAX = 100  # entries that a replica may lack when it is made a voter
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
    cluster: bytes = b""  # the UUID that the state has already, if it was bootstrapped


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
        self._pressing = False  # somebody waits for the next step
        self._stopped = False
        self._timer: asyncio.TimerHandle | None = None
        self._elections = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._loading: asyncio.Task[None] | None = None
        self._known_role: tuple[bool, int, str] = (False, 0, "")
        self._promoting = False
        self._handing_over = False
        self._no_hand_over_until = 0.0
        self._membership_asked = 0.0
        self._chores_due = 0.0
        self.on_role: list[Callable[[], None]] = []
        self.on_applied: list[Callable[[int, bytes, list[Applied]], None]] = []
        self.failed: asyncio.Future[None] = self._loop.create_future()
        self._identity = self._load_identity()
        self._roster = Roster(
            config.peers, config.learner, self._identity, machine.members(), lambda: self._core
        )

    # --- life

    def _load_identity(self) -> Identity:
        config = self.config
        voter = not (config.learner or config.join)
        identity = Identity.load_or_create(
            config.data_dir / "identity.cbor", config.name, self._around.new_uuid, voter=voter
        )
        if identity.voter and config.join:
            log.info("already a master; --replace and --join are not needed any more")
        return identity

    async def start(self) -> None:
        """Join the cluster. UserError if this replica must not or cannot."""
        folder = self.config.data_dir
        self._journal = DurableJournal(
            folder / "journal", self._around.files, self._around.segment_bytes,
            self.machine.checkpointed[0],
        )  # fmt: skip
        self._check_journal()
        self._checkpoints = Checkpoints(
            self.config.checkpoints, self.machine, self._journal, self._fail,
            self._tell_checkpoint,
        )  # fmt: skip
        if self._roster.names_me:
            self._identity.promote()  # a stop came between the checkpoint that says so and this
        self._roster.check_peers()
        self._roster.changed(self._roster.members)  # whoever came then need not be met
        self._sender = SnapshotSender(
            folder, self.machine.copy_to, self._send, self._snapshot_taken, self._around.wall_ns()
        )
        self._receiver = SnapshotReceiver(
            folder, lambda: self.machine.applied[0], self._install, self._send
        )
        await self._open_links()
        await self._roster.meet_everybody()
        if self.failed.done():
            self.failed.result()
        self._syncer = self._around.syncer(self._journal, self._synced)
        self._make_core()
        self._tasks.append(asyncio.ensure_future(self._checkpoints.run()))
        self._on_timer()

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
        return PeerName(identity.name, identity.uuid, identity.voter, joining, identity.origin)

    async def _open_links(self) -> None:
        self._links = self._around.links(
            self._me(), self._roster.names(), self._key, self._refusal, self._received,
            self._refused,
        )  # fmt: skip
        self._links.tell(sorted(self._roster.members))
        await self._links.start()

    def _make_core(self) -> None:
        assert self._links is not None
        if not len(self._journal):
            self._journal.add(b"\x01", 1, 0)  # every log begins with this entry
        if self.machine.applied[0] == 0:
            self.machine.apply_entry(1, 0, b"")
        self._core = SafeSyncObj(
            self.config.name if self._identity.voter else None, self._roster.others(),
            self._journal, self._links, self._apply, self._offer_snapshot,
            self.machine.applied[0], self._roster.members, _read_change, self._wants_history,
            lambda: self._checkpoints.crowded,
        )  # fmt: skip
        self._links.announce()

    async def stop(self) -> None:
        """Hand leadership over, if held, and stop. The journal has everything."""
        if self.is_leader and not self.failed.done():
            await self.hand_over()
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
        tasks = [*self._tasks, *([self._loading] if self._loading is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._links is not None:
            await self._links.stop()
            await self._sender.stop()
            await self._receiver.stop()
            if self._syncer is not None:
                await asyncio.to_thread(self._syncer.stop)
            self._journal._destroy()

    def must_stop(self, error: BaseException) -> None:
        """The owner found that this replica must not go on."""
        self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """This node must not go on."""
        if not self.failed.done():
            log.error("replica stops", reason=str(error), exc_info=error)
            self._stopped = True
            self.failed.set_exception(error)
            if self._core is not None:
                self._core.resign()  # whoever waits here is told to ask elsewhere

    # --- who may connect

    def _refusal(self, peer: PeerName) -> Refused | None:
        refused = self._roster.refusal(peer)
        if refused is None and peer.voter and self._core is not None:
            self._core.node_replaced(Node(peer.name))
        return refused

    def _refused(self, peer: str, refused: Refused) -> None:
        error = UserError(f"{refused.reason} (said {peer})")
        if self._roster.refused_for_good(refused):
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
        self._roster.all_met.set()

    # --- the run of the node

    def _received(self, node: Node, message: Any) -> None:
        if self._core is None or self._stopped:
            return
        try:
            if isinstance(message, SnapshotPiece):
                self._receiver.piece(node, message)
            elif isinstance(message, SnapshotNext):
                self._sender.answered(node, message)
            elif isinstance(message, CheckpointMade):
                self._checkpoints.heard(node.id, message.index, message.digest)
            else:
                self._core.receive(node, message)
        except Exception as e:
            self._fail(e)
        self._pressing |= self._core.state == LEADER
        self._kick()

    def _send(self, node: Node, message: Any) -> bool:
        return self._links is not None and self._links.send(node, message)

    def _kick(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        if self._scheduled:  # else a sync that has ended came first
            self._run()

    def _on_timer(self) -> None:
        if not self._stopped:
            if self._timer is not None:
                self._checkpoints.watch.turned(self._loop.time() - self._timer.when())
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
            # When a sync begins, its thread needs the interpreter. What a follower has to apply can
            # wait, and so can a leader that heard nothing new: for a message, the timer, the sync.
            if not syncer.kick() or self._pressing:
                self._pressing = False
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
            self._pressing = True
            self._run()

    def _look_around(self, core: SafeSyncObj) -> None:
        """After a turn: news of roles, the leader's own chores."""
        if core.leads and not self._handing_over:
            self._lead(core)
        role = (core.leads, core.term, self.leader)
        if role != self._known_role:
            self._elections += role[1] != self._known_role[1]
            self._known_role = role
            for callback in self.on_role:
                callback()

    def _lead(self, core: SafeSyncObj) -> None:
        now = self._loop.time()
        if now < self._chores_due:
            return
        self._chores_due = now + _TICK_S
        if now - self._membership_asked > 1.0:
            self._membership_asked = now
            if not self._roster.members:
                uuid = self.config.cluster or self._around.new_uuid()
                everybody = self._identity.peers | {self.config.name: self._identity.uuid}
                self._propose_own(Found(uuid, everybody))
            self._promote_joined(core)
        self._checkpoints.lead(self._propose_own, self.config.name, core.configurations.agree)
        wanted = self._journal.kept.wanted
        if wanted and (self._loading is None or self._loading.done()):
            self._loading = asyncio.ensure_future(self._load_kept(wanted))

    def _promote_joined(self, core: SafeSyncObj) -> None:
        for node in core.learners:
            name, _, uuid = node.id.partition("#")
            # Under load it is never quite there; it has the rest before the entry that names it.
            matched = core.match_index.get(node, 0)
            caught_up = matched and core.commit_index - matched <= BEHIND_MAX
            known = self._roster.members.get(name)
            lost = known is not None and known.hex() != uuid
            if lost and caught_up and not core.configurations.changing:
                log.info("replacement caught up", name=name, uuid=uuid)
                _forget(self.change_members(ReplaceMember(name, bytes.fromhex(uuid))))

    def _propose_own(self, op: Op) -> None:
        _forget(self._submit(self._leading().propose, self._own_batch(op)))

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
        roster, members = self._roster, self.machine.members()
        roster.changed(members)
        self._checkpoints.members_new = True
        if self._core is not None:
            self._core.set_members(members)
        if roster.names_me and not self._identity.voter and not self._promoting:
            self._promoting = True
            self._tasks.append(asyncio.ensure_future(self._become_voter()))
        elif self._identity.voter and members and not roster.names_me:
            masters = ",".join(sorted(members))
            gone = removed(self.config.name)
            self._fail_quietly(UserError(f"{gone}: its masters are {masters}"))
        elif self._links is not None:
            self._links.set_peers(roster.names())
            self._links.tell(sorted(members))

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

    def propose(self, data: bytes, done: Done) -> None:
        """Commit and apply an entry. NotLeader or BUSY (leadership is being handed over, or
        checkpoints lag behind) at once; else `done(applied, error)` is called once, in the turn in
        which it was applied, or with OutcomeUnknown. It must not raise.
        """
        core = self._leading()
        if self._handing_over or self._checkpoints.crowded:
            raise ReplyError(Status.BUSY)
        core.propose(data, done)
        self._proposed = True
        self._kick()

    def submit(self, data: bytes) -> "asyncio.Future[list[Applied]]":
        """As `propose`, for who would rather wait."""
        return self._submit(self.propose, data)

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
        self, propose: Callable[[bytes, Done], None], data: bytes
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
        self._pressing = True
        self._kick()
        await future

    # --- checkpoints, snapshots and the kept log

    def _wants_history(self, node: Node) -> bool:
        """A learner that only learns writes down what happened: a snapshot would be a hole."""
        name, learner, _ = node.id.partition("#")
        return bool(learner) and self._links is not None and name not in self._links.joining()

    async def _load_kept(self, number: int) -> None:
        """Bring what a learner lacks into memory, in a thread. Damage there costs the history, and
        only this master's: its own state has all of it.
        """
        journal = self._journal
        try:
            loaded = await asyncio.to_thread(journal.load_kept, number)
        except KeptDamaged as e:
            log.error("old log damaged: learners that need it will have a hole", reason=str(e))
            journal.forget_kept(number)
            return
        if loaded is None:
            journal.kept.wanted = 0
        else:
            journal.kept.adopt(loaded)
        if self._core is not None:
            self._core.heartbeat_due = 0.0
        self._kick()

    def _tell_checkpoint(self, index: int, digest: bytes) -> None:
        core = self._core
        if core is not None and core.leader_node is not None and self._identity.voter:
            self._send(core.leader_node, CheckpointMade(index, digest))

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
        return [(p, p in up) for p in self._roster.others()]

    @property
    def members(self) -> dict[str, bytes]:
        """The masters that vote: name -> identity."""
        return self._roster.members

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

    def figures(self) -> dict[str, float]:
        """Numbers for whoever watches, by Prometheus' names; none before it has started."""
        if self._core is None or self._syncer is None:
            return {}
        made, syncs = self._checkpoints, self._syncer.times
        return {
            "raftfs_elections_total": self._elections,
            "raftfs_loop_stall_longest_seconds": made.watch.longest_s,
            "raftfs_loop_stall_checkpoint_longest_seconds": made.watch.checkpoint_longest_s,
            "raftfs_loop_stall_last_checkpoint_seconds": made.watch.last_checkpoint_s,
            "raftfs_checkpoints_total": made.times.count,
            "raftfs_checkpoint_p99_seconds": made.times.percentile(99),
            "raftfs_checkpoint_last_rows": made.last_rows,
            "raftfs_journal_syncs_total": syncs.count,
            "raftfs_journal_sync_p50_seconds": syncs.percentile(50),
            "raftfs_journal_sync_p99_seconds": syncs.percentile(99),
            "raftfs_journal_bytes_in_memory": self._journal.bytes_kept,
        }

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
