"""What must hold of data: acknowledged writes are in every copy that counts, deposed leaders are
not obeyed, and copies go only by committed order.
"""

from collections import Counter
from collections.abc import Callable

from raftfs.meta.state import model, read
from raftfs.meta.state.apply import Applied
from raftfs.meta.state.dictrows import DictRows
from raftfs.meta.state.model import ChunkRow
from raftfs.wire.ops import DropCopy
from tests.sim.broken import must
from tests.sim.copies import Copy, CopyDisk, good


class Promises:
    """An observer of all chunkservers and writers. `truth`: the committed state."""

    def __init__(self, truth: DictRows, disks: Callable[[], list[CopyDisk]]) -> None:
        self._truth, self._disks = truth, disks
        self.written: dict[int, set[int]] = {}  # acknowledged by all copies
        self.synced: dict[int, set[int]] = {}  # of those, by an fsync
        self._places: dict[tuple[int, int], int] = {}
        self._fenced: dict[bytes, int] = {}
        self._dropped: set[tuple[int, int, bytes]] = set()
        self.seen: Counter[str] = Counter()

    # --- writers and readers

    def acknowledged(self, chunk: int, write: int) -> None:
        """Every copy of the grant has it."""
        self.written.setdefault(chunk, set()).add(write)
        self.check(chunk)

    def fsynced(self, chunk: int, write: int) -> None:
        """Every copy of the grant has it on its disk."""
        self.synced.setdefault(chunk, set()).add(write)
        self.check(chunk)

    def committed(self, inode: int, index: int, chunk: int) -> None:
        """A client was told that the file has this chunk there."""
        self.located(inode, index, chunk)
        self._places[inode, index] = chunk

    def located(self, inode: int, index: int, chunk: int) -> None:
        """A reader was told so. Nobody truncates here, so a chunk goes only with its file."""
        known = self._places.get((inode, index))
        there = known in (None, chunk) or self._truth.get(model.node_key(inode)) is None
        must(there, f"file {inode} has chunk {chunk} at {index} in place of {known}")

    def expected(self, chunk: int) -> tuple[set[int], set[int]]:
        """What a read that begins now must see: for sure, and unless a power cut took it."""
        return set(self.synced.get(chunk, ())), set(self.written.get(chunk, ()))

    def read(self, chunk: int, seen: set[int], expected: tuple[set[int], set[int]]) -> None:
        """A reader got these writes of a copy that the leader named."""
        if self._row(chunk) is not None:
            missing = expected[0] - seen
            must(not missing, f"a reader of chunk {chunk} misses writes {sorted(missing)}")

    # --- copies

    def applied(self, applied: list[Applied]) -> None:
        """An entry was committed."""
        for one in applied:
            if isinstance(one.command.op, DropCopy) and not one.result.status:
                op = one.command.op
                self._dropped.add((op.chunk, op.version, op.server))

    def copy_changed(self, server: bytes, chunk: int, copy: Copy) -> None:
        """An order changed a copy."""
        row = self._row(chunk)
        if row is not None:
            self._has_all(row, server, copy)

    def check(self, chunk: int) -> None:
        """Every good copy, on a living or a dead server, has every acknowledged write."""
        row = self._row(chunk)
        if row is None:
            return
        for disk in self._disks():
            copy = disk.copies.get(chunk)
            if copy is not None:
                self._has_all(row, disk.server, copy)

    def check_all(self) -> None:
        """Of every chunk; and every file has the chunks that it had."""
        for chunk in self.written:
            self.check(chunk)
        for inode, index in self._places:
            entry = self._truth.get(model.map_key(inode, index))
            self.located(inode, index, entry.chunk if isinstance(entry, model.MapEntry) else 0)

    def _row(self, chunk: int) -> ChunkRow | None:
        row = read.chunk(self._truth, chunk)
        return row if row is not None and row.refs else None

    def _has_all(self, row: ChunkRow, server: bytes, copy: Copy) -> None:
        if not good([(server, copy)], row.version, row.reserved):
            return
        name, writes = f"{server.hex()[:4]}'s copy of chunk {row.id} at {copy.version}", copy.writes
        missing = self.synced.get(row.id, set()) - writes
        must(not missing, f"{name} lacks the fsynced writes {sorted(missing)}")
        missing = self.written.get(row.id, set()) - writes - copy.lost
        must(not missing, f"{name} lacks the acknowledged writes {sorted(missing)}")

    # --- orders

    def fenced_at(self, server: bytes) -> int:
        """The highest term that it has acknowledged."""
        return self._fenced.get(server, 0)

    def condemned(self, chunk: int) -> list[bytes]:
        """The servers whose copies a committed entry has given up."""
        return sorted(server for at, _, server in self._dropped if at == chunk)

    def fenced(self, server: bytes, term: int) -> None:
        """The server has acknowledged this term to its leader."""
        self._fenced[server] = max(self._fenced.get(server, 0), term)

    def order_takes_effect(self, server: bytes, term: int) -> None:
        """An order of this term is carried out."""
        known = self._fenced.get(server, 0)
        must(term >= known, f"{server.hex()[:4]} obeys term {term} after it acknowledged {known}")

    def destroyed(self, server: bytes, chunk: int, copy: Copy) -> None:
        """A copy is about to go: the committed state must have condemned it."""
        self.seen["copy destroyed"] += 1
        row = self._row(chunk)
        if row is None or copy.version < row.version:
            return
        what = f"{server.hex()[:4]}'s copy of chunk {chunk} at {copy.version}"
        must((chunk, copy.version, server) in self._dropped, f"{what} goes without being condemned")
        copies = [(d.server, d.copies[chunk]) for d in self._disks() if chunk in d.copies]
        others = [s for s in good(copies, row.version, row.reserved) if s != server]
        # What nobody synced may have gone from the others by a power cut since it was condemned.
        must(bool(others) or not self.synced.get(chunk), f"{what} goes, and was the last")
