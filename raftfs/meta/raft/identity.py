"""Who this replica is, and whom it knows: kept in `identity.cbor` of its data folder.

A voter that lost its disk has forgotten its votes and acknowledgements, and must never take part
again as if it had not. Therefore every replica has a random identity beside its name, learns those
of all peers before it takes part in anything, and refuses a known name with another identity.
`docs/decisions/003` tells why this is safe and how a replica is replaced.
"""

import os
import uuid as uuid_module
from collections.abc import Callable
from pathlib import Path

import cbor2

from raftfs.errors import UserError
from raftfs.wire.frame import crc32

_FORMAT = 1


def random_uuid() -> bytes:
    """16 random bytes."""
    return uuid_module.uuid4().bytes


class Identity:
    """This replica's identity file. Every change is durable when the method returns."""

    def __init__(
        self, path: Path, name: str, uuid: bytes, voter: bool, peers: dict[str, bytes],
        origin: bytes = b"",
    ) -> None:  # fmt: skip
        """`origin`: which image this replica was bootstrapped from, b"" if from none."""
        self._path = path
        self.name = name
        self.uuid = uuid
        self.voter = voter
        self.peers = peers
        self.origin = origin

    @classmethod
    def load_or_create(
        cls,
        path: Path,
        name: str,
        new_uuid: Callable[[], bytes] = random_uuid,
        *,
        voter: bool,
    ) -> "Identity":
        """The identity in the file, or a new one. UserError if the file is damaged or foreign."""
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            identity = cls(path, name, new_uuid(), voter, {})
            identity.save()
            return identity
        except OSError as e:
            raise UserError(f"{path} cannot be read: {e.strerror}") from None
        if len(raw) < 4 or crc32(raw[:-4]) != int.from_bytes(raw[-4:], "big"):
            raise UserError(
                f"{path} is damaged: this replica no longer knows who it is; "
                "replace it (raftfs cluster replace)"
            )
        kept = cbor2.loads(raw[:-4])
        if kept["format"] != _FORMAT:
            raise UserError(f"{path} has format {kept['format']}, this program reads {_FORMAT}")
        if kept["name"] != name:
            raise UserError(
                f"{path.parent} is the data folder of master {kept['name']}, not of {name}: "
                "give the right --data or --name"
            )
        return cls(
            path, name, kept["uuid"], kept["voter"], dict(kept["peers"]), kept.get("origin", b"")
        )

    def learn(self, name: str, uuid: bytes) -> None:
        """Remember the identity of a peer."""
        self.peers[name] = uuid
        self.save()

    def promote(self) -> None:
        """From now on this replica votes."""
        self.voter = True
        self.save()

    def save(self) -> None:
        """Write, sync, rename into place."""
        body = cbor2.dumps(
            {
                "format": _FORMAT, "name": self.name, "uuid": self.uuid, "voter": self.voter,
                "peers": self.peers, "origin": self.origin,
            },
            canonical=True,
        )  # fmt: skip
        new = self._path.with_suffix(".new")
        try:
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(body + crc32(body).to_bytes(4, "big"))
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, self._path)
            folder = os.open(self._path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as e:
            raise UserError(f"{self._path} cannot be written: {e.strerror}") from None
