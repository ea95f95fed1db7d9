"""The file of one chunk copy: opening, settling, marks, durability. Rules: see `copyfile.py`.

All methods are called with `lock` held, and raise `DamageError` or OSError.
"""

import errno
import threading
from pathlib import Path

import structlog

from raftfs.chunk import layout
from raftfs.chunk.disk import Disk
from raftfs.chunk.door import FileDoor
from raftfs.chunk.layout import DATA_OFFSET, HEADER_SIZE, TABLE_OFFSET, CrcTable, Header
from raftfs.const import BLOCK_SIZE, MIB
from raftfs.errors import RaftfsError
from raftfs.wire.frame import crc32

log = structlog.get_logger("raftfs.copy")

ZEROS = memoryview(bytes(MIB))
# A synced block costs an fdatasync of the header before its first change. Whoever changes many in
# a row or at random pays that not for each: with the n-th such sync of a hot copy so many blocks
# around it are marked, too. Not more, because rot in a marked block is not found after a stop.
_MARK_AROUND = (1, 32, 128)


class DamageError(RaftfsError):
    """Bytes on the disk are not what was written; the message says where. As in `wire.Damage`."""

    def __init__(
        self, part: str, text: str, block: int = -1, expected: str = "", found: str = ""
    ) -> None:
        self.part, self.block, self.expected, self.found = part, block, expected, found
        super().__init__(text)


class UnfinishedError(RaftfsError):
    """The file is empty: a stop between making it and writing its header. Nothing was in it."""


class ChunkFile:
    """A copy that is in use: its file may be open, or closed for a while to save descriptors."""

    def __init__(self, disk: Disk, door: FileDoor, chunk: int, version: int) -> None:
        self.disk, self.chunk, self.version = disk, chunk, version
        self.lock = threading.RLock()
        self.users = 0  # guarded by the store's lock, as is used_at
        self.used_at = 0.0
        self.gone = False  # no longer in the store: whoever waited for the lock must look again
        self._door = door
        self._fd = -1
        self._header: Header | None = None  # None: not read yet, or abandoned
        self._table = CrcTable()
        self._new_name = False  # the name may not be durable yet
        self._unsynced = False
        # What an earlier process (or we, before an error) wrote may not be on the disk yet: the
        # first sync is done even if nothing changes.
        self._doubt = True
        # An fdatasync failed: the kernel may have dropped what was written, and the next fdatasync
        # would not say so. Only the copy's loss is honest; see `ChunkStore`.
        self.lost_sync = False
        self._synced = 0  # blocks that may hold synced bytes
        self._durable_marks = 0  # dirty bits that are on the disk for sure
        self._mark_syncs = 0
        self._garbage_end = 0  # unwritten blocks below may have old bytes in the file

    @property
    def path(self) -> Path:
        """Where the file is."""
        return self.disk.path / layout.file_name(self.chunk, self.version)

    @property
    def is_open(self) -> bool:
        """Holds a descriptor."""
        return self._fd >= 0

    @property
    def at_rest(self) -> bool:
        """On the disk, nothing marked."""
        header = self._header
        return header is None or not (header.dirty or self._unsynced or self._new_name)

    @property
    def header(self) -> Header:
        """What the header in the file says (or will, with the next write of it)."""
        assert self._header is not None, "the copy is not open"
        return self._header

    # --- opening and closing

    def create(self, cluster: bytes) -> None:
        """Make the file, with nothing written."""
        self._fd = self._door.create(self.path)
        self._header = Header(self.chunk, self.version, cluster)
        self._new_name = self._unsynced = True
        self._door.pwrite(self._fd, [self._header.pack_page(), self._table.page()], 0)

    def open(self, cluster: bytes, path: Path | None = None) -> None:
        """Have the file open; settle what an unclean stop left. Damage if it is not what it was.

        `path`: where it is just now, if not under its own name.
        """
        if self._fd < 0:
            self._fd = self._door.open(path or self.path)
        if self._header is None:
            try:
                self._load(cluster)
            except BaseException:
                self.abandon()
                raise

    def _load(self, cluster: bytes) -> None:
        header, self._table = self._read_head()
        self._check_name(header)
        if cluster and header.cluster not in (cluster, bytes(16)):
            raise DamageError("header", f"the file belongs to cluster {header.cluster.hex()}", -1,
                              cluster.hex(), header.cluster.hex())  # fmt: skip
        data_bytes = max(0, self._door.size(self._fd) - DATA_OFFSET)
        self._garbage_end = -(-data_bytes // BLOCK_SIZE)
        self._synced, self._durable_marks, self._mark_syncs = header.written, 0, 0
        self._header = header
        if header.version != self.version:
            # Stopped between a raise's header and its rename: it was never confirmed, and the name
            # tells what this copy is.
            log.info("unfinished raise taken back", chunk=f"{self.chunk:016X}",
                     version=self.version, unfinished=header.version)  # fmt: skip
            header.version = self.version
            self._end_raise()
        elif header.raised_from:  # stopped after the rename
            self._door.sync_folder(self.path.parent)
            self._end_raise()
        if header.dirty:
            self._settle()

    def check_name(self) -> None:
        """The file, which is not open yet, is of the chunk that its name says. DamageError."""
        self._fd = self._door.open(self.path)
        try:
            self._check_name(self._read_head()[0])
        finally:
            self.close()

    def _read_head(self) -> tuple[Header, CrcTable]:
        """Header and table as they lie on the disk."""
        page = memoryview(bytearray(DATA_OFFSET))
        got = self._door.pread(self._fd, page, 0)
        if not got:
            raise UnfinishedError
        try:
            header = Header.unpack(page[: min(got, HEADER_SIZE)])
        except layout.LayoutError as e:
            raise DamageError("header", str(e)) from None
        try:
            return header, CrcTable(page[TABLE_OFFSET:got])
        except layout.LayoutError as e:
            raise DamageError("table", str(e)) from None

    def _end_raise(self) -> None:
        """The name is durable: from now on another version in it is damage."""
        self.header.raised_from = 0
        self._write_header()

    def _check_name(self, header: Header) -> None:
        """A name may lag behind the header only by a raise that was not finished."""
        lags = header.version > self.version == header.raised_from
        if header.chunk != self.chunk or (header.version != self.version and not lags):
            holds = f"{header.chunk:016X}_{header.version:08X}"
            raise DamageError("name", f"the file holds {holds}", -1,
                              f"{self.chunk:016X}_{self.version:08X}", holds)  # fmt: skip

    def _settle(self) -> None:
        """Blocks that were being changed at an unclean stop: their bytes are what was written."""
        header = self.header
        torn = 0
        block_view = memoryview(bytearray(BLOCK_SIZE))
        for block in layout.blocks_of(header.dirty & header.written):
            self._fill(block_view, block)
            crc = crc32(block_view)
            if crc != self._table.get(block, 1)[0]:
                torn += 1
                self._put_crcs(block, [crc])
        self._unsynced = True
        if not self.lost_sync:
            self.retire()
        if torn:
            log.warning("blocks torn by the stop settled", chunk=f"{self.chunk:016X}",
                        version=self.version, blocks=torn)  # fmt: skip

    def retire(self) -> None:
        """Nobody changes it now: have it on the disk, then clear the marks."""
        header = self._header
        if header is None or self.at_rest:
            return
        if self._fd < 0:
            self._fd = self._door.open(self.path)
        self.sync()
        if header.dirty:
            header.dirty = 0
            self._durable_marks = self._mark_syncs = 0
            self._write_header()

    def close(self) -> None:
        """Give the descriptor back; what is in memory stays."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            self._door.close(fd)

    def abandon(self) -> None:
        """Forget what is in memory, as a stop would: the next use reads the file and settles it.

        That a sync is due, or failed, is not forgotten.
        """
        self._header = None
        self._doubt = True
        self.close()

    # --- blocks, marks, durability

    def _fill(self, view: memoryview, first: int) -> None:
        """Read blocks as they lie on the disk, missing bytes as zeros."""
        got = self._door.pread(self._fd, view, DATA_OFFSET + first * BLOCK_SIZE)
        while got < len(view):
            some = min(len(view) - got, len(ZEROS))
            view[got : got + some] = ZEROS[:some]
            got += some

    def _put_crcs(self, first: int, crcs: list[int]) -> None:
        raw, place = self._table.put(first, crcs)
        self._door.pwrite(self._fd, [raw], place)

    def _write_header(self) -> None:
        self._door.pwrite(self._fd, [self.header.pack()], 0)

    def _mark(self, changing: int) -> None:
        """Set the dirty bits of written blocks that are about to change.

        Durably, where synced bytes could be torn by a power cut: the mark must be there for sure
        before the first byte of such a block is.
        """
        header = self.header
        unmarked = changing & ~header.dirty
        endangered = changing & self._synced & ~self._durable_marks
        if endangered:
            around = _MARK_AROUND[min(self._mark_syncs, len(_MARK_AROUND) - 1)]
            first = (endangered & -endangered).bit_length() - 1
            first -= first % around
            more = layout.bits(first, max(first + around, endangered.bit_length()) - 1)
            unmarked |= more & header.written & ~header.dirty
            self._mark_syncs += 1
        if unmarked:
            header.dirty |= unmarked
            self._write_header()
        if endangered:
            self._sync_file()

    def _sync_file(self) -> None:
        header = self.header
        if self.lost_sync:
            raise OSError(errno.EIO, "an earlier fdatasync of this copy failed")
        try:
            self._door.sync(self._fd)
        except OSError:
            self.lost_sync = True
            raise
        self._unsynced = False
        self._synced, self._durable_marks = header.written, header.dirty

    def sync(self) -> None:
        """Everything so far is on the disk when this returns, and so is the name."""
        if self._unsynced or self._doubt:
            self._sync_file()
        if self._new_name or self._doubt:
            self._door.sync_folder(self.path.parent)
        self._new_name = self._doubt = False
