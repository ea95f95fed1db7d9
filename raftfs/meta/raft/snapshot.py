"""Bringing a replica that is too far behind up to date: a copy of the leader's state file.

Leader: a compacted copy of its last checkpoint, zstd-compressed, in numbered pieces, each with its
CRC, a few under way at a time; the follower names the offset that it wants next, so a lost piece or
link only repeats. Follower: collects, decompresses (zstd checks the whole), checks that it is a
state file of the promised index, and only then becomes it, by rename. An older state never replaces
a newer one.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import structlog
import zstandard
from pysyncobj.node import Node

from raftfs.errors import RaftfsError
from raftfs.meta.raft.messages import SnapshotNext, SnapshotPiece
from raftfs.wire.frame import crc32

log = structlog.get_logger("raftfs.raft.snapshot")

PIECE_BYTES = 256 * 1024
PIECES_AHEAD = 8
_SILENT_S = 2.0  # then the pieces since the last answer are sent again
_GIVE_UP_S = 60.0


def _now() -> float:
    return asyncio.get_running_loop().time()


class _Transfer:
    """One copy on its way to one node."""

    def __init__(self, ident: int, path: Path) -> None:
        self.ident, self.path = ident, path
        self.index = self.term = self.total = 0
        self.ready = False
        self.wanted = self.sent = 0
        self.heard = _now()


class SnapshotSender:
    """Leader's side. `offer` is called again and again while a node needs a snapshot."""

    def __init__(
        self,
        folder: Path,
        copy_to: Callable[[Path], tuple[int, int]],
        send: Callable[[Node, Any], bool],
        installed: Callable[[Node, int], None],
        first_ident: int,
    ) -> None:
        """`first_ident`: transfers are numbered from here on; no earlier process used these."""
        self._folder = folder
        self._copy_to = copy_to
        self._send = send
        self._installed = installed
        self._transfers: dict[str, _Transfer] = {}
        self._idents = first_ident
        self._tasks: set[asyncio.Task[None]] = set()
        self.term = 0
        for left in folder.glob("snapshot-*"):  # by a process that was killed
            left.unlink()

    def offer(self, node: Node) -> None:
        """Begin a transfer to the node, or push one on that has gone silent."""
        transfer = self._transfers.get(node.id)
        if transfer is None:
            self._idents += 1
            path = self._folder / f"snapshot-{self._idents}.out"
            self._transfers[node.id] = transfer = _Transfer(self._idents, path)
            task = asyncio.ensure_future(self._prepare(node, transfer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif transfer.ready and _now() - transfer.heard > _GIVE_UP_S:
            self._drop(node)
        elif transfer.ready and _now() - transfer.heard > _SILENT_S:
            transfer.sent = transfer.wanted
            self._push(node, transfer)

    async def _prepare(self, node: Node, transfer: _Transfer) -> None:
        try:
            await asyncio.to_thread(self._make, transfer)
        except (OSError, RaftfsError, zstandard.ZstdError) as e:
            log.warning("snapshot not made", node=node.id, reason=str(e))
            self._drop(node)
            return
        transfer.ready, transfer.heard = True, _now()
        log.info("snapshot begins", node=node.id, index=transfer.index, bytes=transfer.total)
        self._push(node, transfer)

    def _make(self, transfer: _Transfer) -> None:
        plain = transfer.path.with_suffix(".copy")
        try:
            transfer.index, transfer.term = self._copy_to(plain)
            packer = zstandard.ZstdCompressor(level=3, write_checksum=True)
            with open(plain, "rb") as source, open(transfer.path, "wb") as target:
                packer.copy_stream(source, target)
        finally:
            plain.unlink(missing_ok=True)
        transfer.total = transfer.path.stat().st_size

    def _push(self, node: Node, transfer: _Transfer) -> None:
        limit = min(transfer.total, transfer.wanted + PIECES_AHEAD * PIECE_BYTES)
        with open(transfer.path, "rb") as file:
            file.seek(transfer.sent)
            while transfer.sent < limit:
                data = file.read(PIECE_BYTES)
                piece = SnapshotPiece(
                    self.term, transfer.ident, transfer.index, transfer.term, transfer.sent,
                    transfer.total, crc32(data), data,
                )  # fmt: skip
                if not self._send(node, piece):
                    return
                transfer.sent += len(data)

    def answered(self, node: Node, m: SnapshotNext) -> None:
        """The node wants what begins at an offset, or is done."""
        transfer = self._transfers.get(node.id)
        if transfer is None or transfer.ident != m.ident:
            return
        transfer.heard = _now()
        if m.offset < 0:
            log.info("snapshot installed", node=node.id, index=transfer.index)
            self._installed(node, transfer.index)
            self._drop(node)
            return
        if m.offset > transfer.wanted:
            transfer.wanted = m.offset
            transfer.sent = max(transfer.sent, m.offset)
        elif m.offset < transfer.wanted:  # it began anew
            transfer.wanted = transfer.sent = m.offset
        self._push(node, transfer)

    def _drop(self, node: Node) -> None:
        transfer = self._transfers.pop(node.id, None)
        if transfer is not None:
            transfer.path.unlink(missing_ok=True)

    async def stop(self) -> None:
        """Give up all transfers."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for transfer in self._transfers.values():
            transfer.path.unlink(missing_ok=True)
        self._transfers.clear()


class SnapshotReceiver:
    """Follower's side."""

    def __init__(
        self,
        folder: Path,
        applied: Callable[[], int],
        install: Callable[[Path, int, int], Awaitable[None]],
        send: Callable[[Node, Any], bool],
    ) -> None:
        """`install(path, index, term)` checks the file and becomes it, or raises RaftfsError."""
        self._path = folder / "snapshot.in"
        self._folder = folder
        self._applied = applied
        self._install = install
        self._send = send
        self._ident = 0
        self._have = 0
        self._installing = False
        self._task: asyncio.Task[None] | None = None
        for left in (self._path, folder / "snapshot.new"):  # by a process that was killed
            left.unlink(missing_ok=True)

    def piece(self, node: Node, m: SnapshotPiece) -> None:
        """One piece arrived."""
        if self._installing:
            return
        if m.index <= self._applied():
            self._send(node, SnapshotNext(m.term, m.ident, -1))
            return
        known = m.ident == self._ident
        if not known:
            self._ident, self._have = m.ident, 0
            self._path.unlink(missing_ok=True)
        if m.offset != self._have or crc32(m.data) != m.crc:
            # Ask once for what is missing, not for every piece that came out of turn. Whoever was
            # stopped in the middle knows nothing of the beginning, and would wait for ever.
            if known and m.offset > self._have:
                return
            self._send(node, SnapshotNext(m.term, m.ident, self._have))
            return
        with open(self._path, "ab") as file:
            file.write(m.data)
        self._have += len(m.data)
        if self._have < m.total:
            self._send(node, SnapshotNext(m.term, m.ident, self._have))
            return
        self._installing = True
        self._task = asyncio.ensure_future(self._finish(node, m))

    async def _finish(self, node: Node, m: SnapshotPiece) -> None:
        plain = self._folder / "snapshot.new"
        try:
            await asyncio.to_thread(self._unpack, plain)
            await self._install(plain, m.index, m.index_term)
            self._send(node, SnapshotNext(m.term, m.ident, -1))
        except (OSError, RaftfsError, zstandard.ZstdError) as e:
            log.warning("snapshot refused", node=node.id, reason=str(e))
        finally:
            self._ident = self._have = 0
            self._installing = False
            self._path.unlink(missing_ok=True)
            plain.unlink(missing_ok=True)

    def _unpack(self, plain: Path) -> None:
        with open(self._path, "rb") as source, open(plain, "wb") as target:
            zstandard.ZstdDecompressor().copy_stream(source, target)

    async def stop(self) -> None:
        """Give up."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
