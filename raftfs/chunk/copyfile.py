"""One chunk copy on a disk: every read and write of its file, and the rules that keep it whole.

Order of a write, so that a stop at any point is told from rot:

    1. the pieces' CRCs are checked                       nothing was touched yet
    2. partial blocks: the old block is checked            damage is reported, not overwritten
    3. dirty bits of the blocks are set in the header      and made durable, if a block has synced
    data 4. the data, exactly the changed bytes                 neighbours are not rewritten 5. CRC
    table, written bits ... sync: fdatasync; dirty bits are cleared when the copy is retired (idle
    or closed)

Methods are called under the copy's lock (`lock`), from the store's threads.
"""

import threading
from pathlib import Path

import structlog

from raftfs.chunk import layout
from raftfs.chunk.disk import Disk, FileDoor
from raftfs.chunk.layout import DATA_OFFSET, HEADER_SIZE, TABLE_OFFSET, Header
from raftfs.const import BLOCK_SIZE, BLOCKS_PER_CHUNK, CHUNK_SIZE
from raftfs.errors import ReplyError, Status
from raftfs.wire.frame import ZERO_BLOCK_CRC, Buffer, crc32, piece_crcs

log = structlog.get_logger("raftfs.copy")

_ZEROS = bytes(BLOCK_SIZE)


class CopyFile:
    """An open chunk file."""

    def __init__(self, disk: Disk, door: FileDoor, chunk: int, version: int) -> None:
        self.disk, self.chunk, self.version = disk, chunk, version
        self.lock = threading.RLock()
        self.token = 0  # the highest grant that wrote or raised this copy since it was opened
        self.used_at = 0.0
        self.broken = False  # a sync has failed: nobody may count on this copy any more
        self._door = door
        self._fd = -1
        self._header = Header(chunk, version, b"")
        self._crcs: list[int] = []
        self._new_name = False  # the name is not durable yet
        self._unsynced = False
        self._synced_blocks = 0  # blocks that hold synced data
        self._durable_dirty = 0  # dirty bits that are on the disk for sure

    @property
    def path(self) -> Path:
        """Where the file is."""
        return self.disk.path / layout.file_name(self.chunk, self.version)

    # --- opening and closing

    def create(self, cluster: bytes) -> None:
        """Make the file: no block written."""
        self._fd = self._door.open(self.path, create=True)
        self._header = Header(self.chunk, self.version, cluster)
        self._crcs = [0] * BLOCKS_PER_CHUNK
        self._new_name = self._unsynced = True
        self._door.pwrite(
            self._fd, self._header.pack() + layout.pack_table(self._crcs), 0
        )

    def open(self) -> None:
        """Open the file; settle what an unclean stop left. LayoutError if it is damaged."""
        if self._fd >= 0:
            return
        fd = self._door.open(self.path, create=False)
        try:
            page = self._door.pread(fd, HEADER_SIZE, 0)
            if not page:
                raise layout.UnfinishedError(str(self.path))
            header = Header.unpack(page)
            if header.chunk != self.chunk:
                raise layout.LayoutError(f"the file holds chunk {header.chunk:016X}")
            table = self._door.pread(fd, HEADER_SIZE, TABLE_OFFSET)
            if len(table) != HEADER_SIZE:
                raise layout.LayoutError("the chunk's CRC table is cut off")
            self._crcs = layout.unpack_table(table)
        except Exception:
            self._door.close(fd)
            raise
        self._fd, self._header = fd, header
        self._synced_blocks = header.written
        self._durable_dirty = header.dirty
        if header.version != self.version:
            # Stopped between the header's write and the rename of a raise, which therefore was
            # never confirmed: the name tells what this copy is.
            header.version = self.version
            self._door.pwrite(fd, header.pack(), 0)
        if header.dirty:
            self._settle()

    def _settle(self) -> None:
        """Blocks that were being written at an unclean stop: their bytes are what was written."""
        settled = 0
        for block in range(BLOCKS_PER_CHUNK):
            if not self._header.dirty >> block & 1:
                continue
            data = self._block(block)
            if any(data) or self._header.written >> block & 1:
                crc = crc32(data)
                settled += crc != self._crcs[block]
                self._crcs[block] = crc
                self._header.written |= 1 << block
        self._door.pwrite(self._fd, layout.pack_table(self._crcs), TABLE_OFFSET)
        self._unsynced = True
        self.retire(keep_open=True)
        log.info("blocks torn by the stop settled", chunk=f"{self.chunk:016X}", blocks=settled)

    def retire(self, *, keep_open: bool = False) -> None:
        """Nobody writes now: sync, clear the dirty bits, give the descriptor back."""
        if self._fd < 0:
            return
        if self._header.dirty or self._unsynced:
            self.sync()
            self._header.dirty = self._durable_dirty = 0
            self._write_header()
        if not keep_open:
            self._door.close(self._fd)
            self._fd = -1

    def discard(self) -> bool:
        """The file is about to go: close without care. Whether it was open."""
        if self._fd < 0:
            return False
        self._door.close(self._fd)
        self._fd = -1
        return True

    def _write_header(self) -> None:
        self._door.pwrite(self._fd, self._header.pack(), 0)

    # --- blocks

    def _block(self, block: int) -> bytes:
        """A block as it lies on the disk, padded with zeros."""
        data = self._door.pread(self._fd, BLOCK_SIZE, DATA_OFFSET + block * BLOCK_SIZE)
        return data if len(data) == BLOCK_SIZE else data + _ZEROS[len(data) :]

    def _checked_block(self, block: int) -> bytes:
        """A block's content. BAD_CRC if it is not what was written."""
        if not self._header.written >> block & 1:
            return _ZEROS
        data = self._block(block)
        if crc32(data) != self._crcs[block]:
            raise ReplyError(Status.BAD_CRC)
        return data

    def read(self, offset: int, length: int) -> tuple[Buffer, list[int]]:
        """Bytes of a range, and the CRCs of its pieces; every block touched was checked."""
        first, last = offset // BLOCK_SIZE, (offset + length - 1) // BLOCK_SIZE
        if length == 0:
            return b"", []
        want = (last - first + 1) * BLOCK_SIZE
        out: bytes | bytearray = self._door.pread(
            self._fd, want, DATA_OFFSET + first * BLOCK_SIZE
        )
        touched = layout.bits(offset, length)
        if len(out) < want or touched & ~self._header.written:
            out = bytearray(out).ljust(want, b"\0")
        view = memoryview(out)
        for block in range(first, last + 1):
            part = view[(block - first) * BLOCK_SIZE : (block - first + 1) * BLOCK_SIZE]
            if not self._header.written >> block & 1:
                part[:] = _ZEROS
            elif crc32(part) != self._crcs[block]:
                raise ReplyError(Status.BAD_CRC)
        start = offset - first * BLOCK_SIZE
        if start == 0 and length == want:
            crcs = [
                self._crcs[b] if self._header.written >> b & 1 else ZERO_BLOCK_CRC
                for b in range(first, last + 1)
            ]
            return out, crcs
        piece = view[start : start + length]
        return piece, piece_crcs(offset, piece)

    def write(self, offset: int, data: Buffer, crcs: list[int]) -> None:
        """Write a range whose pieces have these CRCs. BAD_CRC: nothing was changed."""
        view = memoryview(data)
        if not view or offset < 0 or offset + len(view) > CHUNK_SIZE:
            raise ReplyError(Status.BAD_CRC)
        if piece_crcs(offset, view) != crcs:
            raise ReplyError(Status.BAD_CRC)
        new = self._new_crcs(offset, view, crcs)
        touched = layout.bits(offset, len(view))
        self._mark_dirty(touched)
        self._door.pwrite(self._fd, view, DATA_OFFSET + offset)
        self._put_crcs(new)
        self._set_written(touched)

    def _new_crcs(self, offset: int, view: memoryview, crcs: list[int]) -> dict[int, int]:
        """CRCs of the touched blocks after the write; checks the old ones where they matter."""
        new: dict[int, int] = {}
        at = 0
        for crc in crcs:
            block, start = divmod(offset + at, BLOCK_SIZE)
            size = min(len(view) - at, BLOCK_SIZE - start)
            if size == BLOCK_SIZE:
                new[block] = crc
            else:
                old = self._checked_block(block)
                merged = crc32(view[at : at + size], crc32(memoryview(old)[:start]))
                new[block] = crc32(memoryview(old)[start + size :], merged)
                if not self._header.written >> block & 1:
                    self._clear_garbage(block)
            at += size
        return new

    def _clear_garbage(self, block: int) -> None:
        """A block that was zeroed or never written may have old bytes in the file: they go."""
        if any(self._block(block)):
            self._mark_dirty(1 << block)
            self._door.pwrite(self._fd, _ZEROS, DATA_OFFSET + block * BLOCK_SIZE)

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeros; whole blocks become never-written."""
        if length <= 0 or offset < 0 or offset + length > CHUNK_SIZE:
            raise ReplyError(Status.BAD_CRC)
        end, at = offset + length, offset
        while at < end:
            block, start = divmod(at, BLOCK_SIZE)
            size = min(end - at, BLOCK_SIZE - start)
            if self._header.written >> block & 1:
                if size == BLOCK_SIZE:
                    # The bytes go too: after a stop, what is not zero counts as written.
                    self._mark_dirty(1 << block)
                    self._door.pwrite(self._fd, _ZEROS, DATA_OFFSET + block * BLOCK_SIZE)
                    self._header.written &= ~(1 << block)
                    self._write_header()
                else:
                    zeros = _ZEROS[:size]
                    self.write(at, zeros, piece_crcs(at, zeros))
            at += size

    def _mark_dirty(self, touched: int) -> None:
        """Set dirty bits before a change; durably, where synced bytes could be torn."""
        self._unsynced = True
        if touched & ~self._header.dirty:
            self._header.dirty |= touched
            self._write_header()
        endangered = touched & self._synced_blocks & ~self._durable_dirty
        if endangered:
            self._fdatasync()
            self._durable_dirty = self._header.dirty

    def _put_crcs(self, new: dict[int, int]) -> None:
        for block, crc in new.items():
            self._crcs[block] = crc
        first, last = min(new), max(new)
        data = b"".join(self._crcs[b].to_bytes(4, "big") for b in range(first, last + 1))
        self._door.pwrite(self._fd, data, TABLE_OFFSET + 4 * first)

    def _set_written(self, touched: int) -> None:
        if touched & ~self._header.written:
            self._header.written |= touched
            self._write_header()

    def sync(self) -> None:
        """Everything so far is on the disk when this returns."""
        if self._unsynced:
            self._fdatasync()
            self._unsynced = False
            self._synced_blocks = self._header.written
            self._durable_dirty = self._header.dirty
        if self._new_name:
            self._door.sync_folder(self.path.parent)
            self._new_name = False

    def _fdatasync(self) -> None:
        """fdatasync. After a failure never again: the kernel may have dropped what was not written,
        and a later success would promise bytes that are not on the disk.
        """
        if self.broken:
            raise ReplyError(Status.DISK_ERROR)
        try:
            self._door.sync(self._fd)
        except OSError:
            self.broken = True
            raise

    def raise_version(self, version: int) -> None:
        """Become a higher version, durably: header, then name."""
        self.sync()
        old = self.path
        self._header.version = version
        self._write_header()
        self._fdatasync()
        new = self.disk.path / layout.file_name(self.chunk, version)
        self._door.rename(old, new)
        self.version = version
        self._door.sync_folder(self.path.parent)

    def blocks(self) -> bytes:
        """CRC table and written bitmap, as `ListBlocks` asks."""
        crcs = [
            crc if self._header.written >> b & 1 else ZERO_BLOCK_CRC
            for b, crc in enumerate(self._crcs)
        ]
        return layout.pack_table(crcs) + self._header.written.to_bytes(
            layout.BITMAP_BYTES, "little"
        )


class PartialCopy(CopyFile):
    """A copy that is being replicated: under another name until it is whole."""

    @property
    def path(self) -> Path:
        """Where the unfinished file is."""
        return super().path.with_suffix(".part")

    def create(self, cluster: bytes) -> None:
        """Begin; an older unfinished attempt goes."""
        self._door.unlink(self.path)
        super().create(cluster)

    def finish(self) -> None:
        """Durable under its real name when this returns."""
        self.retire()
        self._door.rename(self.path, super().path)
        self._door.sync_folder(self.path.parent)
