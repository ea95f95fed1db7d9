"""State files at rest: their rows read as they are stored, and whole ones made from rows.

For images and restores. A file that a running master has open is never touched: its copy is
(`MetaStore.copy_to`).
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import lmdb
import msgspec

from raftfs.errors import UserError, invariant
from raftfs.meta.state import digest
from raftfs.meta.store import APPLIED_KEY, FORMAT, AppliedRow, check_whole

_MAP_SIZE = 1 << 40
_SLICE = 20_000  # rows written in one transaction


def stored_rows(path: Path) -> Iterator[tuple[bytes, bytes]]:
    """Every row of a state file, key and bytes, by key. UserError if it cannot be read."""
    try:
        check_whole(path)
        env = lmdb.open(
            str(path), subdir=False, readonly=True, lock=False, create=False, map_size=_MAP_SIZE
        )
        try:
            with env.begin() as txn, txn.cursor() as cursor:
                for key, raw in cursor:
                    if key != APPLIED_KEY:
                        yield key, raw
        finally:
            env.close()
    except (lmdb.Error, OSError) as e:
        raise UserError(f"metadata file {path} cannot be read: {e}") from None


def build(path: Path, rows: Iterable[tuple[bytes, bytes]], index: int, term: int) -> bytes:
    """Make a state file of these rows, durably; gives its digest. It must not exist yet, and
    appears whole. UserError if it cannot be written.
    """
    invariant(not path.exists(), f"{path} is there already")
    total, new = digest.EMPTY, path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    try:
        env = lmdb.open(
            str(new), subdir=False, map_size=_MAP_SIZE, lock=False, sync=False, mode=0o600
        )
        try:
            part: list[tuple[bytes, bytes]] = []
            for key, raw in rows:
                total = digest.change(total, key, None, raw)
                part.append((key, raw))
                if len(part) >= _SLICE:
                    _put(env, part)
                    part = []
            row = AppliedRow(FORMAT, index, term, digest.to_bytes(total))
            _put(env, [*part, (APPLIED_KEY, msgspec.msgpack.encode(row))])
            env.sync(True)
        finally:
            env.close()
        os.replace(new, path)
        sync_folder(path.parent)
    except (lmdb.Error, OSError) as e:
        raise UserError(f"metadata file {path} cannot be written: {e}") from None
    return digest.to_bytes(total)


def _put(env: lmdb.Environment, rows: list[tuple[bytes, bytes]]) -> None:
    with env.begin(write=True) as txn, txn.cursor() as cursor:
        cursor.putmulti(sorted(rows))


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable. OSError."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
