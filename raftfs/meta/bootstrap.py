"""`raftfs-master --bootstrap IMAGE`: the first folder of a master of a new cluster, from an image.

All masters of the cluster do this with the same image, each on an empty folder, and then start as
for the first time: they meet, elect, and the founding entry names them. What makes them one:

    state.mdb       the image's rows as `state/reseed.py` has them, at entry `index` of term `term`
    journal/        a log that begins with that entry, and a current term that no lost master had
    identity.cbor   a new identity, with the *origin*: a hash of all this, which masters compare
                    before they ever take part in anything together

Whoever has an empty log gets a snapshot, because the log does not begin with entry 1.
"""

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import structlog

from raftfs.errors import UserError
from raftfs.meta import image, statefile
from raftfs.meta.image import ImageHead
from raftfs.meta.raft.identity import Identity, random_uuid
from raftfs.meta.raft.journal import DurableJournal
from raftfs.meta.state.digest import encode_row
from raftfs.meta.state.model import TABLES
from raftfs.meta.state.reseed import JUMP, reseeded

log = structlog.get_logger("raftfs.bootstrap")

_CHANGING = b"CLPZ"  # tables whose rows change; all others are taken over as they are stored


def bootstrap(path: Path, folder: Path, name: str) -> bytes:
    """Fill the empty data folder of master `name` from an image; gives the origin.

    UserError if the folder is not empty or cannot be written, or the image is damaged, of a newer
    format, or of no cluster; then the folder is as empty as before.
    """
    there = sorted(p.name for p in folder.iterdir() if p.name != ".lock")
    if there:
        raise UserError(
            f"data folder {folder} is not empty (it has {there[0]}): --bootstrap begins a new "
            "cluster on empty folders of all masters; leave the option away if this master has "
            "been bootstrapped, else move the folder away"
        )
    head = image.read_head(path)
    if not head.cluster:
        raise UserError(f"image {path} holds no cluster: it is of the time before the founding")
    try:
        origin = _fill(path, folder, name, head)
    except BaseException:
        _empty(folder)
        raise
    log.info("bootstrapped", image=str(path), cluster=head.cluster.hex(), line=head.version,
             origin=origin.hex())  # fmt: skip
    return origin


def _fill(path: Path, folder: Path, name: str, head: ImageHead) -> bytes:
    index, term = head.index + JUMP, head.term + JUMP
    journal = DurableJournal(folder / "journal")
    try:
        journal.setCurrentTerm(term, None)
        journal.reset_to(index, term)
    finally:
        journal._destroy()
    digest = statefile.build(folder / "state.mdb", _rows(path), index, term)
    # Different images may hold the same rows and differ in the rest.
    numbers = index.to_bytes(8, "big") + term.to_bytes(8, "big")
    origin = hashlib.blake2b(digest + numbers, digest_size=16, person=b"raftfs origin 1").digest()
    Identity(folder / "identity.cbor", name, random_uuid(), True, {}, origin).save()
    return origin


def _rows(path: Path) -> Iterator[tuple[bytes, bytes]]:
    for key, raw in image.read_rows(path):
        if key[0] not in _CHANGING:
            yield key, raw
            continue
        row = reseeded(key, msgspec.msgpack.decode(raw, type=TABLES[key[0]]))
        if row is not None:
            yield key, encode_row(row)


def _empty(folder: Path) -> None:
    for left in folder.iterdir():
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        elif left.name != ".lock":
            left.unlink(missing_ok=True)
