"""The state of a simulated replica: the real operations over rows in memory, checkpoints that are
atomic and durable as LMDB's are.
"""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from raftfs.errors import UserError, invariant
from raftfs.meta.state import digest, read
from raftfs.meta.state.apply import Applied, apply_batch
from raftfs.meta.state.dictrows import DictRows
from raftfs.meta.state.model import TABLES, Row
from raftfs.wire.ops import decode_batch

if TYPE_CHECKING:
    from tests.sim.invariants import Invariants


class Checkpoint(NamedTuple):
    """A durable state."""

    index: int
    term: int
    rows: dict[bytes, Row]
    digest: bytes


NOTHING = Checkpoint(0, 0, {}, digest.to_bytes(digest.EMPTY))


class Vault:
    """Where a machine keeps its last checkpoint."""

    def __init__(self) -> None:
        self.kept = NOTHING


class SimStore(DictRows):
    """What `MetaStore` is to the real replica."""

    def __init__(self, vault: Vault, law: "Invariants", who: str) -> None:
        super().__init__()
        self._vault, self._law, self._who = vault, law, who
        self._take(vault.kept)

    def _take(self, kept: Checkpoint) -> None:
        self.rows.clear()
        self.rows.update(kept.rows)
        self.applied = self.checkpointed = (kept.index, kept.term)
        self.freezing: tuple[int, int] | None = None
        self._frozen = NOTHING
        self._claimed: tuple[int, bytes] | None = None
        self._changed = 0
        self.checkpoints = {kept.index: kept.digest}
        self.digests = [(kept.index, kept.digest)]

    def put(self, key: bytes, row: Row) -> None:
        """As `Rows.put`."""
        self._changed += 1
        super().put(key, row)

    def delete(self, key: bytes) -> None:
        """As `Rows.delete`."""
        self._changed += 1
        super().delete(key)

    def compare_digest(self, index: int, digest: bytes) -> None:
        """As `Rows.compare_digest`."""
        if self.freezing is not None and self.freezing[0] == index:
            self._claimed = (index, digest)
        else:
            super().compare_digest(index, digest)

    # --- Machine

    def apply_entry(self, index: int, term: int, data: bytes) -> list[Applied]:
        """Apply one entry, and let it be compared with what others applied."""
        invariant(index == self.applied[0] + 1, f"entry {index} after {self.applied[0]}")
        applied = apply_batch(self, index, decode_batch(data)) if data else []
        self.applied = (index, term)
        self._law.applied(self._who, index, term, data, applied)
        return applied

    def members(self) -> dict[str, bytes]:
        """The masters that vote."""
        return read.members(self)

    def dirty(self) -> int:
        """Changes since the last checkpoint."""
        return self._changed

    def freeze(self) -> bool:
        """Begin a checkpoint."""
        if self.freezing is not None or self.applied == self.checkpointed:
            return False
        self.freezing = self.applied
        self._frozen = Checkpoint(*self.applied, dict(self.rows), b"")
        self._changed = 0
        return True

    def write_frozen(self) -> None:
        """All or nothing."""
        rows = DictRows()
        rows.rows.update(self._frozen.rows)
        self._frozen = self._frozen._replace(digest=rows.digest())
        self._law.checkpoint(self._who, self._frozen.index, self._frozen.digest)
        self._vault.kept = self._frozen

    def thaw(self) -> None:
        """It is durable."""
        self.checkpointed, self.freezing = self._frozen[:2], None
        self.checkpoints = {self._frozen.index: self._frozen.digest}
        self.digests = [*self.digests[-7:], (self._frozen.index, self._frozen.digest)]
        claimed, self._claimed = self._claimed, None
        if claimed is not None:
            super().compare_digest(*claimed)

    def copy_to(self, path: Path) -> tuple[int, int]:
        """A copy of the last checkpoint as a file."""
        kept = self._vault.kept
        rows = [(key, digest.encode_row(row)) for key, row in kept.rows.items()]
        path.write_bytes(msgspec.msgpack.encode((kept.index, kept.term, kept.digest, rows)))
        return kept.index, kept.term

    def index_of(self, path: Path) -> tuple[int, int]:
        """Index and term of the state in a file."""
        kept = _load(path)
        return kept.index, kept.term

    def install(self, path: Path) -> None:
        """Become the state in the file."""
        invariant(self.freezing is None, "a snapshot came during a checkpoint")
        self._vault.kept = _load(path)
        self._take(self._vault.kept)
        self._law.installed(self._who, self._vault.kept.index, self.digest())

    def tidy(self) -> int:
        """Nothing to free."""
        return 0


def _load(path: Path) -> Checkpoint:
    try:
        index, term, kept, rows = msgspec.msgpack.decode(
            path.read_bytes(), type=tuple[int, int, bytes, list[tuple[bytes, bytes]]]
        )
        read_rows = {k: msgspec.msgpack.decode(raw, type=TABLES[k[0]]) for k, raw in rows}
    except (OSError, msgspec.MsgspecError, KeyError) as e:
        raise UserError(f"{path} is no metadata file: {e}") from None
    return Checkpoint(index, term, read_rows, kept)
