"""One copy of a chunk: every read and write of its file, and the rules that keep it whole.

Order of a write, so that a stop at any point can be told from rot:

    1. partial blocks: the old block is checked        damage is reported, never overwritten
    2. written blocks that change get their dirty bit  durably, if the block holds synced bytes
    3. the data, exactly the changed bytes             neighbours are not rewritten
    4. CRC table
    5. new blocks get their written and dirty bits     until then they read as zeros
    ...
    sync     fdatasync; dirty bits stay ("hot")
    retire   fdatasync, then the dirty bits are cleared: the copy is at rest

A stop between 2 and 4 leaves a marked block whose CRC does not match: `open` takes its bytes for
what was being written and computes the CRC anew. A block that mismatches without a mark is damage.

Any failed system call is treated like a stop: what is in memory is dropped, and the next use opens
the file and settles it (`abandon`).

All methods are called with `lock` held. They raise `DamageError`, ReplyError or OSError.
"""

from pathlib import Path
from typing import NamedTuple

from raftfs.chunk import layout
from raftfs.chunk.chunkfile import ZEROS, ChunkFile, DamageError
from raftfs.chunk.layout import DATA_OFFSET
from raftfs.const import BLOCK_SIZE
from raftfs.errors import ReplyError, Status
from raftfs.wire.frame import ZERO_BLOCK_CRC, crc32, piece_crcs


class Resting(NamedTuple):
    """A copy at rest, as it lies on the disk."""

    path: Path
    version: int
    token: int
    header: layout.Header
    table: layout.CrcTable

    def is_still(self, other: "Resting | None") -> bool:
        """Whether nothing has changed."""
        return (
            other is not None and self[:3] == other[:3]
            and self.header.pack() == other.header.pack()
            and self.table.page() == other.table.page()
        )  # fmt: skip


class Copy(ChunkFile):
    """A copy of a chunk, as the store uses it."""

    # --- reading

    def read(self, offset: int, length: int, into: memoryview) -> tuple[memoryview, list[int]]:
        """Bytes of a range (not empty) and the CRCs of its pieces; every block touched was checked.

        `into` is room for the blocks touched; the bytes lie somewhere in it.
        """
        written = self.header.written
        first, last = layout.block_span(offset, length)
        count = last - first + 1
        view = into[: count * BLOCK_SIZE]
        touched = written >> first & ((1 << count) - 1)
        if touched:
            self._fill(view, first)
        crcs = list(self._table.get(first, count))
        for at in range(count):
            block = view[at * BLOCK_SIZE : (at + 1) * BLOCK_SIZE]
            if not touched >> at & 1:
                block[:] = ZEROS[:BLOCK_SIZE]
                crcs[at] = ZERO_BLOCK_CRC
            elif (found := crc32(block)) != crcs[at]:
                raise _mismatch(first + at, crcs[at], found)
        start = offset - first * BLOCK_SIZE
        data = view[start : start + length]
        head_bytes = min(length, BLOCK_SIZE - start)
        if head_bytes < BLOCK_SIZE:
            crcs[0] = crc32(data[:head_bytes])
        tail_bytes = (start + length) % BLOCK_SIZE
        if tail_bytes and count > 1:
            crcs[-1] = crc32(data[-tail_bytes:])
        return data, crcs

    def resting(self) -> "Resting | None":
        """What it is, if nothing of it is being changed."""
        if not self.at_rest:
            return None
        return Resting(self.path, self.version, self.header.lock, *self._read_head())

    def check_head(self) -> None:
        """Header and table on the disk are what we go by. DamageError."""
        header, table = self._read_head()
        ours = self.header
        if table.full_page(ours.written) != self._table.full_page(ours.written):
            raise DamageError("table", "the table on the disk is not the one in memory")
        for field in ("chunk", "version", "cluster", "written", "dirty"):
            expected, found = getattr(ours, field), getattr(header, field)
            if expected != found:
                raise DamageError("header", f"the header's {field} is not the one in memory", -1,
                                  str(expected), str(found))  # fmt: skip

    def check_blocks(self, first: int, into: memoryview, *, cold: bool) -> tuple[int, int]:
        """Blocks from `first` on, as many as `into` has room for, match their checksums: gives the
        block to go on with (0: that was all) and the bytes read. DamageError.

        `cold`: the page cache is not asked, and not filled.
        """
        runs = layout.runs_of(self.header.written >> first << first, len(into) // BLOCK_SIZE)
        if not runs:
            return 0, 0
        start, count = runs[0]
        offset, length = DATA_OFFSET + start * BLOCK_SIZE, count * BLOCK_SIZE
        if cold:
            self._door.forget_cached(self._fd, offset, length)
        view = into[:length]
        self._fill(view, start)
        if cold:
            self._door.forget_cached(self._fd, offset, length)
        for at, crc in enumerate(self._table.get(start, count)):
            found = crc32(view[at * BLOCK_SIZE : (at + 1) * BLOCK_SIZE])
            if found != crc:
                raise _mismatch(start + at, crc, found)
        return (start + count if len(runs) > 1 else 0), length

    def block_list(self) -> bytes:
        """CRC table and written bitmap, as `ListBlocks` asks."""
        written = self.header.written
        return self._table.full_page(written) + written.to_bytes(layout.BITMAP_BYTES, "little")

    # --- writing

    def write(self, offset: int, data: memoryview, crcs: list[int], token: int) -> None:
        """Write `data`, whose pieces' CRCs the caller has verified, under a grant's token."""
        header = self.header
        new_token = self._check_token(token)
        first, last = layout.block_span(offset, len(data))
        new = self._merged_crcs(offset, data, crcs)
        touched = layout.bits(first, last)
        fresh = touched & ~header.written
        if fresh:
            self._clear_garbage(fresh)
        self._mark(touched & header.written)
        self._unsynced = True
        self._door.pwrite(self._fd, [data], DATA_OFFSET + offset)
        self._put_crcs(first, new)
        if fresh or new_token:
            header.written |= touched
            header.dirty |= fresh
            self._write_header()

    def _check_token(self, token: int) -> bool:
        header = self.header
        if token < header.lock:
            raise ReplyError(Status.WRONG_VERSION)
        newer = token > header.lock
        header.lock = token  # goes to the file with the next write of the header
        return newer

    def _merged_crcs(self, offset: int, data: memoryview, crcs: list[int]) -> list[int]:
        """CRCs of the touched blocks after the write. The old bytes that stay are checked."""
        new = list(crcs)
        first, start = divmod(offset, BLOCK_SIZE)
        head_bytes = min(len(data), BLOCK_SIZE - start)
        if head_bytes < BLOCK_SIZE:
            new[0] = self._merged(first, start, data[:head_bytes], crcs[0])
        tail_bytes = (start + len(data)) % BLOCK_SIZE
        if tail_bytes and len(crcs) > 1:
            new[-1] = self._merged(first + len(crcs) - 1, 0, data[-tail_bytes:], crcs[-1])
        return new

    def _merged(self, block: int, start: int, piece: memoryview, piece_crc: int) -> int:
        if self.header.written >> block & 1:
            old = memoryview(bytearray(BLOCK_SIZE))
            self._fill(old, block)
            found, expected = crc32(old), self._table.get(block, 1)[0]
            if found != expected:
                raise _mismatch(block, expected, found)
        else:
            old = ZEROS[:BLOCK_SIZE]
        crc = crc32(piece, crc32(old[:start])) if start else piece_crc
        return crc32(old[start + len(piece) :], crc)

    def _clear_garbage(self, blocks: int) -> None:
        """Blocks that read as zeros, but have old bytes in the file since a stop: they go.

        Durably, before the written bit can be: else a power cut could bring them to light.
        """
        suspects = layout.blocks_of(blocks & ((1 << self._garbage_end) - 1))
        view = memoryview(bytearray(BLOCK_SIZE)) if suspects else ZEROS
        cleared = False
        for block in suspects:
            self._fill(view, block)
            if view.tobytes() != ZEROS[:BLOCK_SIZE].tobytes():
                place = DATA_OFFSET + block * BLOCK_SIZE
                self._door.pwrite(self._fd, [ZEROS[:BLOCK_SIZE]], place)
                cleared = True
        if cleared:
            self._sync_file()

    def zero(self, offset: int, length: int, token: int) -> None:
        """Make a range (not empty) read as zeros; whole blocks become never-written."""
        header = self.header
        new_token = self._check_token(token)
        end = offset + length
        first_whole, end_whole = -(-offset // BLOCK_SIZE), end // BLOCK_SIZE
        if first_whole > end_whole:  # inside one block
            self._zero_part(offset, length, token)
        else:
            self._zero_part(offset, first_whole * BLOCK_SIZE - offset, token)
            self._zero_part(end_whole * BLOCK_SIZE, end - end_whole * BLOCK_SIZE, token)
        whole = layout.bits(first_whole, end_whole - 1) if first_whole < end_whole else 0
        whole &= header.written
        if whole:
            # The bytes go, too, so that nothing is there to be cleared when they are written again.
            self._mark(whole)
            self._unsynced = True
            for first, count in layout.runs_of(whole):
                self._erase(first, count)
            header.written &= ~whole
        if whole or new_token:
            self._write_header()

    def _zero_part(self, offset: int, length: int, token: int) -> None:
        if length and self.header.written >> offset // BLOCK_SIZE & 1:
            zeros = ZEROS[:length]
            self.write(offset, zeros, piece_crcs(offset, zeros), token)

    def _erase(self, first: int, count: int) -> None:
        begin, end = DATA_OFFSET + first * BLOCK_SIZE, DATA_OFFSET + (first + count) * BLOCK_SIZE
        size = self._door.size(self._fd)
        if end >= size:
            if begin < size:
                self._door.truncate(self._fd, begin)
            return
        while begin < end:
            some = min(end - begin, len(ZEROS))
            self._door.pwrite(self._fd, [ZEROS[:some]], begin)
            begin += some

    # --- versions

    def raise_version(self, version: int, token: int) -> None:
        """Become a higher version, durably: header, then name. `version` follows the name."""
        header = self.header
        old = self.path
        header.raised_from = self.version
        header.version, header.lock = version, max(header.lock, token)
        self._write_header()
        self._sync_file()
        new = self.disk.path / layout.file_name(self.chunk, version)
        self._door.rename(old, new)
        self.version, self._new_name = version, True
        self._door.sync_folder(new.parent)
        self._new_name = False
        self._end_raise()

    def fence(self, token: int) -> None:
        """Refuse writes under lower tokens from now on; durably."""
        if token > self.header.lock:
            self._check_token(token)
            self._write_header()
            self._sync_file()


def _mismatch(block: int, expected: int, found: int) -> DamageError:
    # A flipped bit of data changes about half of the checksum's bits; one of the table just one.
    part = "table" if (expected ^ found).bit_count() == 1 else "data"
    return DamageError(part, f"block {block} does not match its checksum", block,
                       f"crc {expected:08x}", f"crc {found:08x}")  # fmt: skip
