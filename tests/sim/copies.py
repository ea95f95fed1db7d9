"""What a simulated chunkserver has on its disk: copies as sets of numbered writes, not bytes.

A write is in the page cache until the copy is synced; a power cut keeps any of those that were not.
Has what `raftfs.chunk.masterlink` uses of the real `ChunkStore`, and obeys the same rules.
"""

import random
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from raftfs.const import CHUNK_SIZE, DISK_LEAVE_FREE
from raftfs.errors import ReplyError, Status
from raftfs.wire.messages import CopyId, Damage

if TYPE_CHECKING:
    from tests.sim.promises import Promises

_ROOM = 40 * CHUNK_SIZE + DISK_LEAVE_FREE
Report = Callable[[list[CopyId], list[CopyId], list[Damage]], None]


class Copy:
    """One copy. `lost`: writes that a power cut took, here or where it was replicated from."""

    def __init__(self, version: int, token: int) -> None:
        self.version, self.token = version, token
        self.named = False  # its name would outlast a power cut
        self.synced: set[int] = set()
        self.cached: set[int] = set()
        self.lost: set[int] = set()

    @property
    def writes(self) -> set[int]:
        """What a reader sees."""
        return self.synced | self.cached

    def sync(self) -> None:
        """Everything is on the disk."""
        self.synced |= self.cached
        self.cached, self.named = set(), True

    def twin(self, version: int) -> "Copy":
        """As another server fetches it: whole and durable."""
        copy = Copy(version, self.token)
        copy.cached, copy.lost = self.writes, set(self.lost)
        copy.sync()
        return copy


class CopyDisk:
    """Outlives the process."""

    def __init__(self, server: bytes, chance: random.Random) -> None:
        self.server, self._chance = server, chance
        self.cluster = b""
        self.term = 0
        self.copies: dict[int, Copy] = {}
        self.full = False

    def power_cut(self) -> int:
        """Gives how many writes are gone."""
        gone = 0
        for chunk, copy in list(self.copies.items()):
            if not copy.named and self._chance.random() < 0.5:
                del self.copies[chunk]
                continue
            kept = {w for w in sorted(copy.cached) if self._chance.random() < 0.5}
            gone += len(copy.cached - kept)
            copy.lost |= copy.cached - kept
            copy.cached = kept
            copy.sync()
        return gone


class CopyStore:
    """The real store's interface; every change is seen by the promises."""

    def __init__(self, disk: CopyDisk, law: "Promises") -> None:
        self._disk, self._law = disk, law
        self.server, self.cluster = disk.server, disk.cluster
        self.report: Report = lambda made, gone, damaged: None
        self.report_leaving: Callable[[list[int], bool], None] = lambda chunks, leaving: None
        self.acting = 0  # the term whose order is carried out just now

    # --- as `ChunkStore`

    @property
    def term(self) -> int:
        """The highest that was remembered."""
        return self._disk.term

    def remember_term(self, term: int) -> None:
        """Durable."""
        self._disk.term = max(self._disk.term, term)

    def join(self, cluster: bytes) -> None:
        """Belong to it."""
        self._disk.cluster = self.cluster = cluster

    def copies(self) -> list[CopyId]:
        """All."""
        return [CopyId(chunk, copy.version) for chunk, copy in self._disk.copies.items()]

    def version_of(self, chunk: int) -> int | None:
        """Of the copy, if there is one."""
        copy = self._disk.copies.get(chunk)
        return None if copy is None else copy.version

    def __len__(self) -> int:
        return len(self._disk.copies)

    def space(self) -> tuple[int, int]:
        """Bytes in all and used."""
        return _ROOM, _ROOM if self._disk.full else len(self) * CHUNK_SIZE

    def room(self) -> int:
        """Bytes that new copies may take."""
        return 0 if self._disk.full else max(0, _ROOM - DISK_LEAVE_FREE - len(self) * CHUNK_SIZE)

    def raise_version(self, chunk: int, version: int, token: int) -> None:
        """Durably."""
        copy = self._held(chunk, None)
        old = copy.version
        if old > version:
            raise ReplyError(Status.WRONG_VERSION)
        self._effect()
        copy.version, copy.token = version, max(copy.token, token)
        copy.sync()
        if old != version:
            self._law.seen["version raised"] += 1
            self.report([CopyId(chunk, version)], [CopyId(chunk, old)], [])
        self._law.copy_changed(self.server, chunk, copy)

    def confirm(self, chunk: int, version: int) -> None:
        """There is one at exactly this version."""
        self._held(chunk, version)

    def leaving(self) -> list[int]:
        """No disk is ever marked for removal here."""
        return []

    def damages(self) -> list[Damage]:
        """None is ever found damaged here."""
        return []

    def destroy(self, chunk: int, version: int) -> None:
        """At exactly this version, 0: any."""
        copy = self._disk.copies.get(chunk)
        if copy is None or version not in (0, copy.version):
            return
        self._effect()
        self._law.destroyed(self.server, chunk, copy)
        del self._disk.copies[chunk]
        self.report([], [CopyId(chunk, copy.version)], [])

    def adopt(self, chunk: int, version: int, fetched: Copy, _path: Any) -> None:
        """A copy that was fetched counts from now on."""
        old = self._disk.copies.get(chunk)
        if old is not None and old.version >= version:
            raise ReplyError(Status.WRONG_VERSION)
        self._effect()
        self._law.seen["copy replicated"] += 1
        self._disk.copies[chunk] = fetched
        gone = [] if old is None else [CopyId(chunk, old.version)]
        self.report([CopyId(chunk, version)], gone, [])
        self._law.copy_changed(self.server, chunk, fetched)

    def _effect(self) -> None:
        self._law.order_takes_effect(self.server, self.acting)

    # --- data

    def write(self, chunk: int, version: int, token: int, create: bool, write: int) -> None:
        """Into the page cache."""
        copies = self._disk.copies
        if create and chunk not in copies:
            if self._disk.full:
                raise ReplyError(28)
            copies[chunk] = Copy(version, token)
            self.report([CopyId(chunk, version)], [], [])
        copy = self._held(chunk, version)
        if token < copy.token:
            raise ReplyError(Status.WRONG_VERSION)
        copy.token = token
        copy.cached.add(write)

    def sync(self, chunk: int, version: int) -> None:
        """Onto the disk."""
        self._held(chunk, version).sync()

    def read(self, chunk: int, version: int) -> list[int]:
        """The writes that it has."""
        return sorted(self._held(chunk, version).writes)

    def twin(self, chunk: int, version: int) -> Copy:
        """For replication."""
        return self._held(chunk, version).twin(version)

    def _held(self, chunk: int, version: int | None) -> Copy:
        copy = self._disk.copies.get(chunk)
        if copy is None:
            raise ReplyError(Status.NO_CHUNK)
        if version not in (None, copy.version):
            raise ReplyError(Status.WRONG_VERSION)
        return copy


def good(copies: Iterable[tuple[bytes, Copy]], committed: int, reserved: int) -> list[bytes]:
    """The servers whose copies have every acknowledged byte, by the rule of decision 005."""
    newest = max(committed, reserved)
    return [server for server, copy in copies if committed <= copy.version <= newest]
