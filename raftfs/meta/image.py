"""Metadata images: the whole state after one line of the changelog, in one file for many years.

`docs/format.md` is the specification. In short:

    magic | piece HEAD | pieces of rows, table by table | piece END
    piece = name (4) | length (4) | CRC32 of name, length and payload (4) | payload (CBOR)

HEAD names every field of every table, so that the file explains itself. Rows are written exactly
as they are stored, whatever fields they have, so the digest of an image is that of the state.
Reading checks everything: each piece, order, counts, and at the end the digest.
"""

import os
import re
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import cbor2
import msgspec

from raftfs import __version__
from raftfs.errors import UserError
from raftfs.meta import statefile
from raftfs.meta.state import digest as digests
from raftfs.meta.state import model
from raftfs.meta.store import file_applied
from raftfs.wire.frame import crc32

FORMAT = 1
MAGIC = b"RAFTFS IMAGE\r\n\x1a\n"  # a copy that changed line ends is noticed at once
_NAME = re.compile(r"metadata(_ml)?\.mfs\.back(\.\d+)?")
_PIECE = struct.Struct(">4sII")
_ROWS_IN_PIECE = 1_000
_PIECE_MAX = 64 << 20  # a thousand of the longest rows are far below it


class ImageError(UserError):
    """The file is no image, is damaged, or of a newer format; the message says which."""


class ImageHead(msgspec.Struct, frozen=True):
    """What an image holds.

    `version`: of the last changelog line in it. `index`, `term`: the last entry of the Raft log
    that is known to be in it. `time` (ns): nothing in it happened later. `counts`: rows by section.
    """

    format: int
    cluster: bytes
    version: int
    index: int
    term: int
    time: int
    digest: bytes
    counts: dict[str, int]


class Section(NamedTuple):
    """A table of the state: its letter, and how its keys are written: numbers of so many bytes,
    0 for a name that takes the rest.
    """

    name: str
    table: bytes
    key_fields: tuple[tuple[str, int], ...]

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of all that a row of this section consists of."""
        row = msgspec.structs.fields(model.TABLES[self.table[0]])
        return (*(name for name, _ in self.key_fields), *(f.name for f in row))


_INODE, _CHUNK, _SESSION = ("inode", 8), ("chunk", 8), ("session", 8)
# By letter, which is the order of the rows in the state.
SECTIONS = (
    Section("CHNK", b"C", (_CHUNK,)),
    Section("DOOM", b"D", (_CHUNK,)),
    Section("EDGE", b"E", (("parent", 8), ("name", 0))),
    Section("OPEN", b"H", (_INODE, _SESSION)),
    Section("LOCK", b"L", (_SESSION, _CHUNK)),
    Section("FMAP", b"M", (_INODE, ("chunk_index", 8))),
    Section("NODE", b"N", (_INODE,)),
    Section("HELD", b"O", (_SESSION, _INODE)),
    Section("MEMB", b"P", (("group", 8), ("name", 0))),
    Section("RSLT", b"R", (_SESSION, ("slot", 2))),
    Section("SESS", b"S", (_SESSION,)),
    Section("SYML", b"T", (_INODE,)),
    Section("CNTR", b"Z", (("group", 8),)),
)
_BY_NAME = {section.name: section for section in SECTIONS}
_encoder, _plain = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder()
_ROWS: dict[int, Any] = {t: msgspec.msgpack.Decoder(kind) for t, kind in model.TABLES.items()}
_BY_TABLE = {section.table[0]: section for section in SECTIONS}


# --- rows as lists of plain values -----------------------------------------------------------


def to_values(section: Section, key: bytes, raw: bytes) -> list[Any]:
    """A stored row as what its key says, then its fields, as many as it has."""
    values: list[Any] = []
    at = 1
    for _, width in section.key_fields:
        values.append(int.from_bytes(key[at : at + width], "big") if width else key[at:])
        at += width
    values += _plain.decode(raw)
    return values


def from_values(section: Section, values: list[Any]) -> tuple[bytes, bytes]:
    """Inverse of `to_values`. ValueError, TypeError, OverflowError for anything else."""
    parts = [section.table]
    for (name, width), value in zip(section.key_fields, values, strict=False):
        if isinstance(value, bytes) != (width == 0):
            raise ValueError(name)
        parts.append(value if width == 0 else value.to_bytes(width, "big"))
    rest = values[len(section.key_fields) :]
    raw = _encoder.encode(rest)
    _ROWS[section.table[0]].decode(raw)
    return b"".join(parts), raw


# --- writing -------------------------------------------------------------------------------------


def write_image(
    store_file: Path,
    target: Path,
    *,
    time_ns: int | None = None,
    at: tuple[int, int] | None = None,
) -> ImageHead:
    """Write the state in a closed state file as an image; `target` appears whole, durably.

    `time_ns` (default: now) is the head's time, `at` its index and term (default: the file's).
    Needs no memory to speak of. UserError if the state cannot be read or the image not written.
    """
    applied = file_applied(store_file)
    counts = dict.fromkeys(_BY_NAME, 0)
    counters = model.NO_COUNTERS
    for key, raw in statefile.stored_rows(store_file):
        counts[_BY_TABLE[key[0]].name] += 1
        if key == model.COUNTERS_KEY:
            counters = msgspec.msgpack.decode(raw, type=model.Counters)
    index, term = at or (applied.index, applied.term)
    head = ImageHead(
        FORMAT, counters.cluster, counters.version, index, term,
        time.time_ns() if time_ns is None else time_ns, applied.digest, counts,
    )  # fmt: skip
    new = target.with_name(target.name + ".new")
    try:
        with open(new, "wb") as file:
            _write(file, head, statefile.stored_rows(store_file))
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, target)
        statefile.sync_folder(target.parent)
    except OSError as e:
        new.unlink(missing_ok=True)
        raise UserError(f"image {target} cannot be written: {e.strerror}") from None
    return head


def _write(file: IO[bytes], head: ImageHead, rows: Iterator[tuple[bytes, bytes]]) -> None:
    file.write(MAGIC)
    fields = {section.name: section.fields for section in SECTIONS}
    about = {**msgspec.structs.asdict(head), "program": f"raftfs {__version__}", "fields": fields}
    _write_piece(file, "HEAD", about)
    pieces, part, section = 1, list[list[Any]](), SECTIONS[0]
    for key, raw in rows:
        if part and (key[0] != section.table[0] or len(part) == _ROWS_IN_PIECE):
            _write_piece(file, section.name, part)
            pieces, part = pieces + 1, []
        section = _BY_TABLE[key[0]]
        part.append(to_values(section, key, raw))
    if part:
        _write_piece(file, section.name, part)
        pieces += 1
    _write_piece(file, "END ", {"pieces": pieces, "digest": head.digest})


def _write_piece(file: IO[bytes], name: str, content: Any) -> None:
    payload = cbor2.dumps(content, canonical=True)
    start = name.encode() + len(payload).to_bytes(4, "big")
    file.write(start + crc32(payload, crc32(start)).to_bytes(4, "big") + payload)


def images_in(folder: Path) -> list[Path]:
    """The images of a folder, by the names that masters and metaloggers give them."""
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


# --- reading -------------------------------------------------------------------------------------


def read_head(path: Path) -> ImageHead:
    """What an image says of itself; only its head is read and checked. ImageError."""
    with _open(path) as file:
        return _read_head(path, file)


def read_rows(path: Path) -> Iterator[tuple[bytes, bytes]]:
    """Every row of an image, key and bytes, by key. ImageError, at the latest behind the last row,
    if anything is not as it was written.
    """
    for section, values in read_sections(path):
        yield from_values(section, values)


def read_sections(path: Path) -> Iterator[tuple[Section, list[Any]]]:
    """As `read_rows`, each row with its section, as a list of values."""
    with _open(path) as file:
        head = _read_head(path, file)
        counts, total, pieces, last = dict.fromkeys(_BY_NAME, 0), digests.EMPTY, 1, b""
        while True:
            at = file.tell()
            name, content = _read_piece(path, file)
            if name == "END ":
                break
            section = _BY_NAME.get(name)
            if section is None:
                raise ImageError(f"image {path}: section {name!r} at byte {at} is not known")
            pieces += 1
            if not isinstance(content, list):
                raise _damaged(path, f"the piece at byte {at} holds no rows")
            for values in content:
                try:
                    key, raw = from_values(section, values)
                except (ValueError, TypeError, OverflowError, msgspec.MsgspecError):
                    raise _damaged(path, f"a row of {name} at byte {at} has other fields") from None
                if key <= last:
                    raise _damaged(path, f"a row of {name} at byte {at} is out of order")
                last = key
                counts[name] += 1
                total = digests.change(total, key, None, raw)
                yield section, values
        end = {"pieces": pieces, "digest": digests.to_bytes(total)}
        if content != end or end["digest"] != head.digest or counts != head.counts:
            raise _damaged(path, "its rows are not those that its head promises")
        if file.read(1):
            raise _damaged(path, "something follows its end")


def _open(path: Path) -> IO[bytes]:
    try:
        return open(path, "rb")
    except OSError as e:
        raise ImageError(f"image {path} cannot be read: {e.strerror}") from None


def _damaged(path: Path, what: str) -> ImageError:
    return ImageError(f"image {path} is damaged: {what}; use another image")


def _read(path: Path, file: IO[bytes], size: int) -> bytes:
    try:
        data = file.read(size)
    except OSError as e:
        raise ImageError(f"image {path} cannot be read: {e.strerror}") from None
    if len(data) < size:
        raise _damaged(path, "its end is missing")
    return data


def _read_piece(path: Path, file: IO[bytes]) -> tuple[str, Any]:
    at = file.tell()
    start = _read(path, file, _PIECE.size)
    name, length, crc = _PIECE.unpack(start)
    if length > _PIECE_MAX:
        raise _damaged(path, f"the piece at byte {at} cannot be so long")
    payload = _read(path, file, length)
    if crc32(payload, crc32(start[:8])) != crc:
        raise _damaged(path, f"checksum of the piece at byte {at}")
    try:
        return name.decode("ascii"), cbor2.loads(payload)
    except (ValueError, cbor2.CBORDecodeError) as e:
        raise _damaged(path, f"the piece at byte {at}: {e}") from None


def _read_head(path: Path, file: IO[bytes]) -> ImageHead:
    try:
        magic = file.read(len(MAGIC))
    except OSError as e:
        raise ImageError(f"image {path} cannot be read: {e.strerror}") from None
    if magic != MAGIC:
        raise ImageError(f"{path} is no raftfs metadata image")
    name, content = _read_piece(path, file)
    fields = ImageHead.__struct_fields__
    missing = {*fields} - {*content} if isinstance(content, dict) else {*fields}
    if name != "HEAD" or "format" in missing:
        raise _damaged(path, "it does not begin with its head")
    if content["format"] != FORMAT:
        raise ImageError(
            f"image {path} has format {content['format']}, this program reads {FORMAT}: "
            "use the raftfs that wrote it, or a newer one"
        )
    if missing:
        raise _damaged(path, f"its head lacks {', '.join(sorted(missing))}")
    return ImageHead(**{field: content[field] for field in fields})
