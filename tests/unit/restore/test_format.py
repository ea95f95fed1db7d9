"""docs/format.md is true: a reader that knows only what it says reads an image of today's program,
and today's program reads an image of format 1 that was kept.
"""

import hashlib
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import cbor2
import msgspec

from raftfs.meta import image
from raftfs.meta.image import read_head, read_rows
from raftfs.meta.state import invariants, model, read
from raftfs.meta.state.dictrows import DictRows
from tests.unit.restore.history import History

KEPT = Path(__file__).parent / "format-1.image"
FORMAT = Path(__file__).parents[3] / "docs" / "format.md"
_LETTERS = {
    "CHNK": "C", "DOOM": "D", "EDGE": "E", "OPEN": "H", "LOCK": "L", "FMAP": "M", "NODE": "N",
    "HELD": "O", "MEMB": "P", "RSLT": "R", "SESS": "S", "SYML": "T", "CNTR": "Z",
}  # fmt: skip
_KEYS = {"EDGE": 2, "OPEN": 2, "LOCK": 2, "FMAP": 2, "HELD": 2, "MEMB": 2, "RSLT": 2}


def _pieces(data: bytes) -> list[tuple[str, Any]]:
    """By the page alone."""
    file = io.BytesIO(data)
    assert file.read(16) == bytes.fromhex("52414654465320494d4147450d0a1a0a")
    pieces = []
    while start := file.read(12):
        name, length, crc = struct.unpack(">4sII", start)
        payload = file.read(length)
        assert zlib.crc32(start[:8] + payload) == crc
        pieces.append((name.decode(), cbor2.loads(payload)))
    return pieces


def _digest(pieces: list[tuple[str, Any]]) -> bytes:
    total = 0
    for name, rows in pieces[1:-1]:
        for row in rows:
            split = _KEYS.get(name, 1)
            key = _LETTERS[name].encode()
            for part, field in zip(row[:split], pieces[0][1]["fields"][name], strict=False):
                size = 2 if field == "slot" else 8
                key += part if isinstance(part, bytes) else part.to_bytes(size, "big")
            value = msgspec.msgpack.encode(row[split:])
            state = hashlib.blake2b(digest_size=16, key=b"raftfs state row 1")
            state.update(len(key).to_bytes(2, "big") + key + value)
            total += int.from_bytes(state.digest(), "big")
    return (total % 2**128).to_bytes(16, "big")


def test_a_reader_made_from_the_page_alone(tmp_path: Path) -> None:
    history = History(tmp_path, 5)
    history.go_on(300)
    history.write_file(b"kept")
    history.image(tmp_path / "i")
    pieces = _pieces((tmp_path / "i").read_bytes())
    (first, head), (last, end) = pieces[0], pieces[-1]
    assert (first, last) == ("HEAD", "END ")
    assert end == {"pieces": len(pieces) - 1, "digest": head["digest"]}
    assert _digest(pieces) == head["digest"] == history.digests[-1]
    counted = {name: 0 for name in head["fields"]}
    for name, rows in pieces[1:-1]:
        counted[name] += len(rows)
        assert all(len(row) == len(head["fields"][name]) for row in rows)
    assert counted == head["counts"] and set(counted) == set(_LETTERS)


def test_the_page_names_every_field() -> None:
    page = FORMAT.read_text()
    for section in image.SECTIONS:
        row = next(x for x in page.splitlines() if x.startswith(f"| `{section.name}` |"))
        cells = [cell.strip() for cell in row.split("|")[2:5]]
        assert cells[0] == section.table.decode()
        keys = cells[1].replace(" (always 0)", "").split(", ")
        fields = cells[2].split(", ") if cells[2] else []
        assert (*keys, *fields) == section.fields


def test_an_image_of_format_1_is_read_for_ever() -> None:
    """It is of the version that first wrote images. Never make it anew: a change of the rows must
    go on reading what is in it.
    """
    head, rows = read_head(KEPT), DictRows()
    for key, raw in read_rows(KEPT):
        rows.put(key, msgspec.msgpack.decode(raw, type=model.TABLES[key[0]]))
    invariants.check_all(rows)
    assert (head.format, head.version, head.cluster) == (1, 62, b"c" * 16)
    assert head.digest.hex() == "2d4a7affdbf01a72f16e3a8ec6348125"
    assert read.lookup(rows, 1, b"kept").nlink == 1
    assert len(list(read.walk(rows, 1))) == read.totals(rows).nodes == 4
