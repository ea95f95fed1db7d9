"""When checkpoints are made, and how: frozen in the loop, written in a thread, all at one entry.

The leader asks for one by an entry of the log; every replica freezes exactly there, so that their
digests can be compared. The voters tell the leader theirs; the one that a majority has goes into
the log, and whoever has another stops, even if it leads. A replica that has not been asked for long
(nobody leads, or the log brings nothing) makes one of its own, which is compared with nobody's.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from raftfs.errors import StateDiffers, UserError
from raftfs.meta.raft.journal import DurableJournal
from raftfs.meta.raft.loopwatch import LoopWatch, Times
from raftfs.wire.ops import Checkpoint, Digest, Op

_LOOK_S = 0.2
_TICK_S = 0.01
_OVERDUE = 3  # times over any limit: do not wait for the leader
_CROWDED = 4  # times over the limit of rows: take nothing more until a checkpoint is done
_UNDECIDED_S = 5.0  # voters that differ wait so long for another one's word


class CheckpointLimits(NamedTuple):
    """What makes one due, and what is kept of the log behind it."""

    rows: int = 50_000  # changed since the last one
    every_s: float = 10.0
    quiet_s: float = 1.0  # nothing new for so long makes one due, too
    memory_bytes: int = 64 << 20  # of entries that are in memory until a checkpoint has them
    tail_entries: int = 100_000  # kept on the disk for followers that lag
    tail_bytes: int = 64 << 20
    kept_bytes: int = 0  # kept behind that, for learners that were away


class Freezing(Protocol):
    """The part of the state machine that checkpoints need; see `replica.Machine`."""

    applied: tuple[int, int]  # index and term of the state now
    checkpointed: tuple[int, int]  # of the last checkpoint
    freezing: tuple[int, int] | None  # of the one that is under way
    digests: Sequence[tuple[int, bytes]]  # index and digest of the last ones

    def dirty(self) -> int:
        """Rows changed since the last checkpoint."""

    def freeze(self) -> bool:
        """Begin one."""

    def write_frozen(self) -> None:
        """In a thread: write it."""

    def thaw(self) -> None:
        """It is durable."""


class Checkpoints:
    """Of one replica. Made and used in the event loop; whoever replaces the state holds `lock`."""

    def __init__(
        self,
        limits: CheckpointLimits,
        machine: Freezing,
        journal: DurableJournal,
        fail: Callable[[BaseException], None],
        tell: Callable[[int, bytes], None] = lambda index, digest: None,
    ) -> None:
        """`fail(error)`: this replica must not go on. `tell(index, digest)` a leader elsewhere."""
        self._limits = limits
        self._machine = machine
        self._journal = journal
        self._fail = fail
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self.watch = LoopWatch()
        self.times = Times()  # from freezing to durable
        self.last_rows = 0
        self._frozen_at = 0.0
        self._frozen = asyncio.Event()  # one has begun and must be written
        self._made_at = self._loop.time()
        self._applied_at = 0.0
        self._asked = 0  # where the log ended when this leader asked for one
        self._told = 0  # up to where this leader has put a digest into the log
        self._undecided_since: float | None = None
        self._heard: dict[str, tuple[int, bytes]] = {}  # each voter's last checkpoint
        self.members_new = False  # who votes is not in one yet: the next start would not know
        self.lock = asyncio.Lock()

    # --- when

    def applied(self, op: Op) -> None:
        """An operation was just applied; nothing after its entry was."""
        self._applied_at = self._loop.time()
        if isinstance(op, Checkpoint) and self._freeze():
            self._frozen.set()

    def _freeze(self) -> bool:
        rows = self._machine.dirty()
        if not self._machine.freeze():
            return False
        self.last_rows, self._frozen_at = rows, self._loop.time()
        self.watch.checkpoint(begins=True)
        return True

    def heard(self, name: str, index: int, digest: bytes) -> None:
        """Leader: a voter has made a checkpoint."""
        self._heard[name] = (index, digest)

    def lead(
        self, propose: Callable[[Op], None], me: str, agree: Callable[[set[str]], bool]
    ) -> None:
        """Leader, each turn: ask everybody for a checkpoint, and tell the digest that a majority
        (`agree`) of the voters has for the last.
        """
        # One that was asked for may have met another one under way: then it is asked for again.
        idle = self._machine.freezing is None and self._asked <= self._machine.applied[0]
        if idle and self._due():
            self._asked = self._journal.last_index + 1
            propose(Checkpoint())
        index, digest = self._machine.digests[-1]
        if index == self._asked > self._told:
            self._heard[me] = (index, digest)
            self._compare(index, digest, propose, agree)

    def _compare(
        self, index: int, mine: bytes, propose: Callable[[Op], None],
        agree: Callable[[set[str]], bool],
    ) -> None:  # fmt: skip
        there = {name: digest for name, (at, digest) in self._heard.items() if at == index}
        for digest in sorted(set(there.values())):
            if agree({name for name in there if there[name] == digest}):
                self._told, self._undecided_since = index, None
                if digest == mine:
                    propose(Digest(index, digest))
                else:
                    self._fail(StateDiffers(
                        f"the state after entry {index} differs from that of the other masters"
                    ))  # fmt: skip
                return
        if not agree(set(there)):
            return
        now = self._loop.time()
        if self._undecided_since is None:
            self._undecided_since = now
        if now - self._undecided_since > _UNDECIDED_S:
            # Whoever is right: what is served from here may be wrong.
            said = ", ".join(f"{name} has {there[name].hex()}" for name in sorted(there))
            self._fail(UserError(
                f"the masters differ after entry {index}, and no state has a majority: {said}; "
                "nothing is served until another master, started beside these, decides"
            ))  # fmt: skip

    def _due(self, factor: int = 1) -> bool:
        """With a factor: is one overdue, so that this node makes its own?"""
        if self.members_new:
            return True
        limits, rows = self._limits, self._machine.dirty()
        large = self._journal.bytes_kept > factor * limits.memory_bytes
        if not rows:
            return large
        now = self._loop.time()
        return (
            large
            or rows >= factor * limits.rows
            or now - self._made_at > factor * limits.every_s
            or (factor == 1 and now - self._applied_at > limits.quiet_s)
        )

    @property
    def crowded(self) -> bool:
        """So much has changed since the last checkpoint began that memory would not be bounded if
        changes came on: the disk is too slow for them.
        """
        return self._machine.dirty() >= _CROWDED * self._limits.rows

    # --- how

    async def run(self) -> None:
        """Write what was frozen, for ever."""
        while True:
            try:
                async with asyncio.timeout(_LOOK_S):
                    await self._frozen.wait()
            except TimeoutError:
                if not self._due(_OVERDUE):
                    continue
            async with self.lock:
                self._frozen.clear()
                await self.make()

    async def make(self) -> None:
        """Write what is frozen, or freeze now. The lock is held."""
        try:
            self._freeze()
            if self._machine.freezing is None:
                return
            self.members_new = False
            await self._until_durable(self._machine.freezing[0])
            await asyncio.to_thread(self._machine.write_frozen)
            self._machine.thaw()
            self._made_at = self._loop.time()
            self.times.add(self._made_at - self._frozen_at)
            self._tell(*self._machine.digests[-1])
            needed = self._journal.compact(
                self._machine.checkpointed[0], self._limits.tail_entries, self._limits.tail_bytes,
                self._limits.kept_bytes,
            )
            await asyncio.to_thread(self._journal.unlink_before, needed)
            self.watch.checkpoint(begins=False)
        except asyncio.CancelledError:
            raise
        except Exception as e:
            self._fail(e)

    async def _until_durable(self, index: int) -> None:
        """A checkpoint must not be ahead of the journal: entries may be committed by the others'
        disks, and applied, before they are on this one.
        """
        while self._journal.durable_index < index:
            await asyncio.sleep(_TICK_S)
