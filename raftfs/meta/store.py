"""The rows in LMDB: what is durable, what is new since the last checkpoint, what is cached.

A row is looked for in the *overlay* (changed since the last checkpoint), then in the *frozen*
overlay (a checkpoint is writing it), then in a bounded cache of decoded rows, then in LMDB.

A checkpoint is one LMDB transaction with all changed rows, the applied index and term, and the
digest; so the file is at every moment exactly the state after one entry of the log:

    loop    freeze(): overlay becomes frozen, a new one begins        (a few microseconds)
    thread  write_frozen(): encode, digest, put, commit (fdatasync)   (the loop goes on)
    loop    thaw(): frozen rows are in the file now, and become a generation of the cache

The digest of a checkpoint is made by its thread: the rows' old bytes are in the file, the new ones
are written anyway. The thread works in slices, so that it never holds the interpreter for long.
"""

import contextlib
import heapq
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lmdb
import msgspec
import structlog
from lmdb.verify import VerifyError, verify

from raftfs.errors import DiskFailed, StateDiffers, UserError, invariant
from raftfs.meta.rowcache import MISSING, Overlay, RowCache, Trash
from raftfs.meta.state import digest, read
from raftfs.meta.state.apply import Applied, apply_batch
from raftfs.meta.state.digest import Audit, compare
from raftfs.meta.state.model import TABLES, Row
from raftfs.wire.ops import Record, decode_batch

log = structlog.get_logger("raftfs.store")

FORMAT = 1
APPLIED_KEY = b"\0applied"  # sorts before every table; no row of the state, no part of the digest
# Address space, not disk or memory: the file grows as it needs, and the map need never be moved
# (which LMDB allows only while no reader looks at it).
_MAP_SIZE = 1 << 40
_DELETED: Any = None
_SCAN_READ = 256  # rows taken from LMDB at a time
_SORT_SLICE = 4_096  # keys sorted at a time: sorting all of them would hold the interpreter
_DIGESTS_KEPT = 8  # of the last checkpoints
_TIDY_ROWS = 2_000  # freed in one turn of the event loop
_AUDIT_ROWS = 500  # hashed at a time: about a millisecond without the interpreter for the loop


class AppliedRow(Record):
    """Up to where the file has the log, and the digest of exactly that state."""

    format: int
    index: int
    term: int
    digest: bytes


class MetaStore:
    """The state of one replica: implements `Rows` and what the replica drives (`Machine`)."""

    def __init__(
        self, path: Path, *, cache_rows: int = 200_000, durable: bool = True
    ) -> None:
        """`durable` False: checkpoints are not synced; for a state that nobody will miss."""
        self._path = path
        self._cache_rows = cache_rows
        self._durable = durable
        self._trash = Trash()
        self._cache = RowCache(cache_rows, self._trash)
        # Held by threads that work with the file, so that it is not closed under their hands.
        # Copying has one of its own: it is long, and checkpoints go on meanwhile.
        self._in_use, self._copying = threading.Lock(), threading.Lock()
        self._decoders: dict[int, Any] = {t: msgspec.msgpack.Decoder(c) for t, c in TABLES.items()}
        self._open()

    def _open(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                check_whole(self._path)
            # The reader table (lock=True) is what keeps a checkpoint from reusing pages that a
            # copy for a follower, which may outlast several checkpoints, has still to read.
            self._env = lmdb.open(
                str(self._path), subdir=False, map_size=_MAP_SIZE, readahead=False, lock=True,
                metasync=self._durable, sync=self._durable, max_readers=16, mode=0o600,
            )  # fmt: skip
        except (lmdb.Error, OSError) as e:
            raise UserError(f"metadata file {self._path} cannot be opened: {e}") from None
        self._overlay, self._frozen = Overlay(), Overlay()
        self.freezing: tuple[int, int] | None = None
        self._frozen_digest = 0
        self._claimed: tuple[int, bytes] | None = None  # the leader's digest of what is frozen
        self._audit = Audit()
        self.damage: StateDiffers | None = None  # found in the file: this replica must stop
        self._failed = False  # an entry was applied half: nothing of it may become durable
        self._reader: Any = None
        self._snapshot()
        reader: Any = self._reader
        try:
            raw = reader.get(APPLIED_KEY)
            row = msgspec.msgpack.decode(raw, type=AppliedRow) if raw else _new_applied()
        except (lmdb.Error, msgspec.MsgspecError) as e:
            raise UserError(f"metadata file {self._path} is damaged: {e}") from None
        if row.format != FORMAT:
            raise UserError(
                f"metadata file {self._path} has format {row.format}, this program reads {FORMAT}"
            )
        if not raw and self._env.stat()["entries"]:
            raise UserError(f"metadata file {self._path} is damaged: it does not say its index")
        self.applied = self.checkpointed = (row.index, row.term)
        self._digest = int.from_bytes(row.digest, "big")
        self.digests: Sequence[tuple[int, bytes]] = [(row.index, row.digest)]

    def _snapshot(self) -> None:
        """Look at LMDB as it is now."""
        if self._reader is not None:
            self._reader.abort()
        self._reader = self._env.begin(buffers=False)

    # --- Rows

    def get(self, key: bytes) -> Row | None:
        """As `Rows.get`."""
        if key in self._overlay.rows:
            return self._overlay.rows[key]
        if key in self._frozen.rows:
            return self._frozen.rows[key]
        row: Row | None = self._cache.get(key)
        if row is MISSING:
            try:
                raw = self._reader.get(key)
            except lmdb.Error as e:
                raise self._damaged(e) from None
            row = None if raw is None else self._decoded(key, raw)
            self._cache.put(key, row)
        return row

    def _decoded(self, key: bytes, raw: bytes) -> Row:
        try:
            row: Row = self._decoders[key[0]].decode(raw)
        except msgspec.MsgspecError as e:
            raise self._damaged(e) from None
        return row

    def _damaged(self, what: object) -> StateDiffers:
        self.damage = StateDiffers(f"metadata file {self._path} is damaged: {what}")
        return self.damage

    def put(self, key: bytes, row: Row) -> None:
        """As `Rows.put`."""
        self._cache.forget(key)
        self._overlay.put(key, row)

    def delete(self, key: bytes) -> None:
        """As `Rows.delete`."""
        self._cache.forget(key)
        self._overlay.put(key, _DELETED)

    def scan(self, prefix: bytes, after: bytes = b"") -> Iterator[tuple[bytes, Row]]:
        """As `Rows.scan`: the overlays' keys merged into what LMDB has."""
        changed = sorted(
            {*self._overlay.matching(prefix, after), *self._frozen.matching(prefix, after)}
        )
        at = 0
        for key, raw in self._stored(prefix, after):
            while at < len(changed) and changed[at] < key:
                row = self.get(changed[at])
                if row is not None:
                    yield changed[at], row
                at += 1
            if at < len(changed) and changed[at] == key:
                row = self.get(key)
                at += 1
            else:
                row = self._decoded(key, raw)
            if row is not None:
                yield key, row
        for key in changed[at:]:
            row = self.get(key)
            if row is not None:
                yield key, row

    def _stored(self, prefix: bytes, after: bytes) -> Iterator[tuple[bytes, bytes]]:
        """LMDB's part of a scan, in slices, so that a checkpoint between two may change readers."""
        start, include = prefix + after, not after
        while True:
            part: list[tuple[bytes, bytes]] = []
            try:
                with self._reader.cursor() as cursor:
                    found = cursor.set_range(start)
                    while found and len(part) < _SCAN_READ:
                        key = cursor.key()
                        if not key.startswith(prefix):
                            break
                        if key > start or include:
                            part.append((key, cursor.value()))
                        found = cursor.next()
            except lmdb.Error as e:
                raise self._damaged(e) from None
            yield from part
            if len(part) < _SCAN_READ:
                return
            start, include = part[-1][0], False

    def compare_digest(self, index: int, digest: bytes) -> None:
        """As `Rows.compare_digest`."""
        if self.freezing is not None and self.freezing[0] == index:
            self._claimed = (index, digest)
        else:
            compare(dict(self.digests).get(index), index, digest)

    # --- Machine

    def apply_entry(self, index: int, term: int, data: bytes) -> list[Applied]:
        """Apply one entry of the log; b"" is one of Raft's own. Raises only for bugs."""
        invariant(index == self.applied[0] + 1, f"entry {index} after {self.applied[0]}")
        self._failed = True
        applied = apply_batch(self, index, decode_batch(data)) if data else []
        self._failed = False
        self.applied = (index, term)
        return applied

    def members(self) -> dict[str, bytes]:
        """The masters that vote: name -> identity. Empty before the cluster was founded."""
        return read.members(self)

    def dirty(self) -> int:
        """Rows that the next checkpoint will write."""
        return len(self._overlay.rows)

    def digest(self) -> bytes:
        """16 bytes that are equal on replicas with equal states, of the state now. Slow with many
        changed rows: for tools and tests; `digests` has those of the last checkpoints.
        """
        total = self._digest
        for key in {**self._frozen.rows, **self._overlay.rows}:
            row = self.get(key)
            new = None if row is None else digest.encode_row(row)
            total = digest.change(total, key, self._reader.get(key), new)
        return digest.to_bytes(total)

    def freeze(self) -> bool:
        """Event loop: begin a checkpoint. False if nothing is new or one is under way."""
        invariant(not self._failed, "a checkpoint after an entry that failed")
        if self.freezing is not None or self.applied == self.checkpointed:
            return False
        self.freezing = self.applied
        self._frozen, self._overlay = self._overlay, Overlay()
        return True

    def write_frozen(self) -> None:
        """Thread: put the frozen rows into LMDB, durably. DiskFailed if it cannot."""
        invariant(self.freezing is not None, "no checkpoint has begun")
        assert self.freezing is not None
        try:
            with self._in_use, self._env.begin(write=True) as txn:
                self._frozen_digest = self._put_frozen(txn)
        except (lmdb.Error, OSError) as e:
            raise DiskFailed(f"metadata file {self._path}", e) from None

    def _put_frozen(self, txn: Any) -> int:
        """Gives the new digest."""
        assert self.freezing is not None
        rows, total = self._frozen.rows, self._digest
        for key in _sorted_in_slices(list(rows)):
            row, old = rows[key], txn.get(key)
            new = None if row is None else digest.encode_row(row)
            if new is not None and new != old:
                txn.put(key, new)
            elif new is None and old is not None:
                txn.delete(key)
            if new != old:
                total = digest.change(total, key, old, new)
                self._audit.changed(key, old, new)
        applied = AppliedRow(FORMAT, *self.freezing, digest.to_bytes(total))
        txn.put(APPLIED_KEY, msgspec.msgpack.encode(applied))
        return total

    def thaw(self) -> None:
        """Event loop: the checkpoint is durable; its rows are read from the file from now on.
        StateDiffers if the leader had another digest for it.
        """
        assert self.freezing is not None
        self.checkpointed, self.freezing = self.freezing, None
        self._digest = self._frozen_digest
        made = digest.to_bytes(self._digest)
        self.digests = [*self.digests[1 - _DIGESTS_KEPT :], (self.checkpointed[0], made)]
        self._snapshot()
        frozen, self._frozen = self._frozen, Overlay()
        # What has changed since is in the overlay, which is looked at first, so it may stay here.
        self._cache.adopt(frozen.rows)
        self._trash.throw(frozen.groups, *frozen.tables.values())
        claimed, self._claimed = self._claimed, None
        if claimed is not None:
            compare(made, *claimed)

    def tidy(self) -> int:
        """Event loop, now and then: free some of what is not used any more; gives how many rows."""
        return self._trash.empty_some(_TIDY_ROWS)

    def copy_to(self, path: Path) -> tuple[int, int]:
        """Thread: a compacted copy of the last checkpoint; gives its index and term."""
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        with self._copying:
            self._env.copy(str(path), compact=True)
        return file_index(path)

    def audit_some(self) -> int:
        """Thread: hash some more of the file's rows. Gives how many there are when all are done,
        else 0; the next call begins anew. StateDiffers if they are not what the checkpoints wrote.
        """
        try:
            with self._in_use, self._env.begin() as txn:
                audit, more = self._audit, self._audit_rows(txn)
                raw = txn.get(APPLIED_KEY)
                if more or raw is None:  # None: no checkpoint yet
                    return 0
                self._audit = Audit()
            kept = msgspec.msgpack.decode(raw, type=AppliedRow)
        except (lmdb.Error, msgspec.MsgspecError) as e:
            raise self._damaged(e) from None
        if digest.to_bytes(audit.total) != kept.digest:
            raise self._damaged(f"its rows are not what was written up to entry {kept.index}")
        return audit.rows

    def _audit_rows(self, txn: Any) -> bool:
        """Whether there are more than these."""
        with txn.cursor() as cursor:
            found = cursor.set_range(self._audit.at + b"\0")
            for _ in range(_AUDIT_ROWS):
                if not found:
                    return False
                if cursor.key() != APPLIED_KEY:
                    self._audit.count(cursor.key(), cursor.value())
                found = cursor.next()
        return bool(found)

    def index_of(self, path: Path) -> tuple[int, int]:
        """Index and term of the state in a file. UserError if it is none."""
        return file_index(path)

    def install(self, path: Path) -> None:
        """Event loop: become the state in this (verified) file, which is renamed into place."""
        invariant(self.freezing is None, "a snapshot came during a checkpoint")
        file_index(path)  # refuse it while the state that it would replace is still there
        self._close_file()
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        os.replace(path, self._path)
        fd = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        self._cache = RowCache(self._cache_rows, self._trash)
        self._open()

    def close(self) -> None:
        """Give the file back. What was not checkpointed is in the journal."""
        if self._reader is not None:
            self._close_file()

    def _close_file(self) -> None:
        with self._in_use, self._copying:
            self._reader.abort()
            self._reader = None
            self._env.close()


def _sorted_in_slices(keys: list[bytes]) -> Iterator[bytes]:
    """All of them in order, without a long call into the interpreter's own code."""
    parts = (keys[at : at + _SORT_SLICE] for at in range(0, len(keys), _SORT_SLICE))
    return heapq.merge(*(sorted(part) for part in parts))


def _new_applied() -> AppliedRow:
    return AppliedRow(FORMAT, 0, 0, digest.to_bytes(digest.EMPTY))


def check_whole(path: Path) -> None:
    """UserError for a file that lost its content or its end.

    LMDB takes an empty file for a new one, and reading beyond the end of a cut one is a bus error.
    A file may rightly lack its last, unused pages; only then is its structure walked (slow).
    """
    if path.stat().st_size == 0:
        raise UserError(
            f"metadata file {path} is empty: it is damaged; move it away and rejoin as a learner"
        )
    env = lmdb.open(str(path), subdir=False, readonly=True, lock=False, create=False)
    try:
        pages, page_size = env.info()["last_pgno"] + 1, env.stat()["psize"]
    finally:
        env.close()
    if path.stat().st_size < pages * page_size:
        try:
            problems = list(verify(str(path), subdir=False))  # type: ignore[no-untyped-call]
        except VerifyError as e:
            problems = [e]
        if problems:
            raise UserError(f"metadata file {path} is damaged: {problems[0]}")


def file_index(path: Path) -> tuple[int, int]:
    """Index and term of a state file. UserError if it is none."""
    row = file_applied(path)
    return row.index, row.term


def file_applied(path: Path) -> AppliedRow:
    """Up to where a state file has the log. UserError if it is none."""
    try:
        check_whole(path)
        env = lmdb.open(str(path), subdir=False, readonly=True, lock=False, create=False)
        try:
            with env.begin() as txn:
                raw = txn.get(APPLIED_KEY)
        finally:
            env.close()
        return msgspec.msgpack.decode(raw or b"", type=AppliedRow)
    except (lmdb.Error, msgspec.MsgspecError, OSError) as e:
        raise UserError(f"{path} is no metadata file: {e}") from None
