"""One simulated master: its disk, its checkpoint, and while it runs its core and its state."""

import copy
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pysyncobj.node import Node
from pysyncobj.transport import Transport

from raftfs.meta.raft.configurations import Members
from raftfs.meta.raft.journal import DurableJournal, JournalError
from raftfs.meta.raft.messages import VoteGiven
from raftfs.meta.raft.safety import SafeSyncObj
from tests.unit.raft.disks import FakeFiles

if TYPE_CHECKING:
    from tests.sim.core.world import World

FOLDER = Path("journal")
SEGMENT = 20_000
CHECKPOINT_EVERY, CHECKPOINT_S = 30, 3.0  # entries, seconds
KEEP_ENTRIES = 20  # behind it: small, so that snapshots are needed all the time


class Checkpoint(NamedTuple):
    """A durable state: what LMDB holds in the real thing."""

    index: int
    term: int
    commands: list[bytes]
    members: Members


class OldDisk(NamedTuple):
    """A disk that was taken out, and who its machine was with it."""

    uuid: bytes
    voter: bool
    files: FakeFiles
    checkpoint: Checkpoint


class Snapshot(NamedTuple):
    """A checkpoint on its way to another master."""

    state: Checkpoint


class SnapshotTaken(NamedTuple):
    """It was installed."""

    index: int


def read_change(command: bytes, members: Members) -> Members:
    """`+name identity`, `-name`, `=name identity`: who votes after it."""
    name, _, identity = command[1:].decode().partition(" ")
    if command[:1] == b"-":
        return {n: i for n, i in members.items() if n != name}
    if (command[:1] == b"=") != (name in members):
        return members
    return {**members, name: bytes.fromhex(identity)}


class Wire(Transport):  # type: ignore[misc]
    """One node's side of the network; nodes are called as the real links call them."""

    def __init__(self, member: "Member") -> None:
        super().__init__(None, None, [])
        self._member = member

    @property
    def ready(self) -> bool:
        """pysyncobj asks."""
        return True

    def send(self, node: Node, message: Any) -> bool:
        """Hand over to the network, if the node is connected under this very name."""
        member = self._member
        if member.peers.get(node.id.partition("#")[0]) != node.id:
            return False
        if isinstance(message, VoteGiven):
            member.world.check_vote(message.term, member.name, node.id)
        member.world.send(member, node.id.partition("#")[0], message)
        return True


class Member:
    """A machine by this name; it may lose its disk and come back as another identity."""

    def __init__(self, world: "World", name: str, members: Members, chance: random.Random) -> None:
        self.world, self.name = world, name
        self._chance = chance
        self.initial = members
        self.core: SafeSyncObj | None = None
        self.peers: dict[str, str] = {}  # machine -> what it is called now
        self.paused_until = 0.0
        self.slow_until = 0.0
        self._identities = 0
        self.new_disk(voter=name in members)

    def new_disk(self, *, voter: bool) -> None:
        """Nothing is known any more, not even who this is."""
        self._identities += 1
        self.uuid = self.name.encode() * 2 + bytes([self._identities])
        if voter:
            self.uuid = self.initial[self.name]
        self.voter = voter
        self.files = FakeFiles()
        self.checkpoint = Checkpoint(0, 0, [], self.initial)

    def take_disk(self) -> OldDisk:
        """Out of the stopped machine, which needs another one now."""
        return OldDisk(self.uuid, self.voter, self.files, self.checkpoint)

    def put_disk(self, disk: OldDisk) -> None:
        """Into the stopped machine, which is then whoever it was with this disk."""
        self.uuid, self.voter, self.files, self.checkpoint = disk

    @property
    def ident(self) -> str:
        """What the others call it."""
        return self.name if self.voter else f"{self.name}#{self.uuid.hex()}"

    # --- life

    def start(self) -> None:
        """Start, or start again."""
        state = self.checkpoint
        self.journal = DurableJournal(FOLDER, self.files, SEGMENT, checkpointed=state.index)
        assert self.journal.fits(state.index, state.term), "state and journal must overlap"
        if not len(self.journal):
            self.journal.add(b"\x01", 1, 0)
        self.commands, self.members = list(state.commands), dict(state.members)
        self._members_applied = self._members_new = False
        self._saved_at = self.world.now
        self._write_at: float | None = None
        self._snapshot_at: dict[str, float] = {}
        self._make_core(max(1, state.index))
        self.world.connect(self)

    def _make_core(self, applied: int) -> None:
        names = set(self.members)
        self.wire = Wire(self)
        self.core = SafeSyncObj(
            self.name if self.voter else None, sorted(names - {self.name}), self.journal, self.wire,
            self._apply, self._send_snapshot, applied, self.members, read_change,
        )  # fmt: skip

    def stop(self, *, power: bool) -> None:
        """kill -9, or a power cut."""
        self.core = None
        self.world.disconnect(self)
        self.files = self.files.after_power_cut() if power else self.files.after_kill()

    # --- links

    def up(self, name: str, ident: str) -> None:
        """Another machine is connected under this name."""
        assert self.core is not None
        self.down(name)
        self.peers[name] = ident
        if "#" in ident:
            self.wire._onReadonlyNodeConnected(Node(ident))
        else:
            self.wire._onNodeConnected(Node(ident))
            self.core.node_replaced(Node(ident))

    def down(self, name: str) -> None:
        """It is connected no more."""
        ident = self.peers.pop(name, None)
        if ident is None or self.core is None:
            return
        if "#" in ident:
            self.wire._onReadonlyNodeDisconnected(Node(ident))
        else:
            self.wire._onNodeDisconnected(Node(ident))

    # --- work

    def turn(self, now: float) -> None:
        """What the event loop would do now, and the thread that syncs the journal."""
        assert self.core is not None
        try:
            if self._write_at is not None and self._write_at <= now:
                self.journal.write_taken()
                self._write_at = None
            self.core.step()
            self._after_step()
            if self._write_at is None and self.journal.take():
                longest = 0.8 if self.slow_until > now else self.world.sync_s
                self._write_at = now + self._chance.uniform(0, longest)
        except JournalError:
            self.world.seen["disk stops a node"] += 1
            self.stop(power=False)

    def _after_step(self) -> None:
        core = self.core
        assert core is not None
        if self._members_applied:
            self._members_applied = False
            core.set_members(self.members)
            self._members_new = True
        # Who votes must be in a checkpoint at once: a restart could not tell whether a change that
        # is only in the log is committed, and would ask for majorities of those that are gone.
        if self._members_new:
            self._save(core.last_applied)
        if not self.voter and self.checkpoint.members.get(self.name) == self.uuid:
            self.voter = True
            self.world.seen["learner votes"] += 1
            self.world.disconnect(self)
            self._make_core(core.last_applied)
            self.world.connect(self)
            return
        new = core.last_applied - self.checkpoint.index
        if new >= CHECKPOINT_EVERY or (new and self.world.now - self._saved_at > CHECKPOINT_S):
            self._save(core.last_applied)

    def _save(self, index: int) -> None:
        """A checkpoint; never ahead of what is durable."""
        if self.journal.durable_index < index:
            return
        self._saved_at = self.world.now
        self._members_new = False
        term = self.journal.term_at(index)
        self.checkpoint = Checkpoint(index, term, list(self.commands), dict(self.members))
        self.journal.unlink_before(self.journal.compact(index, KEEP_ENTRIES, 100_000))
        self.world.seen["checkpoint"] += 1

    def _apply(self, index: int, term: int, data: bytes) -> int:
        self.world.check_applied(index, term, data)
        if data[:1] in (b"+", b"-", b"="):
            self.members = read_change(data, self.members)
            self._members_applied = True
        elif data:
            self.commands.append(data)
        return index

    # --- snapshots

    def _send_snapshot(self, node: Node) -> None:
        now = self.world.now
        if self.checkpoint.index and now >= self._snapshot_at.get(node.id, 0.0):
            self._snapshot_at[node.id] = now + 0.2
            self.wire.send(node, Snapshot(copy.deepcopy(self.checkpoint)))

    def _install(self, core: SafeSyncObj, state: Checkpoint) -> None:
        self.journal.expect(state.index, state.term)
        self.checkpoint = state
        self.commands, self.members = list(state.commands), dict(state.members)
        core.snapshot_installed(state.index, state.term)
        core.set_members(self.members)
        self.world.seen["snapshot"] += 1

    def receive(self, source: str, message: Any) -> None:
        """A message of another machine."""
        try:
            self._receive(source, message)
        except JournalError:
            kind = "an installation" if isinstance(message, Snapshot) else "a node"
            self.world.seen[f"disk stops {kind}"] += 1
            self.stop(power=self._chance.random() < 0.5)

    def _receive(self, source: str, message: Any) -> None:
        core = self.core
        assert core is not None
        node = Node(self.peers[source])
        if isinstance(message, Snapshot):
            state = message.state
            if state.index > core.last_applied:
                self._install(core, state)
            self.wire.send(node, SnapshotTaken(state.index))
        elif isinstance(message, SnapshotTaken):
            core.sent_snapshot(node, message.index)
        else:
            core.receive(node, message)
