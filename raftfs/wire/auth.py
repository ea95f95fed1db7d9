"""The cluster key: proves that both ends belong to the cluster, and seals what they say.

Handshake of a link (both ends know the key, nobody else does):

    connecting side                          listening side
      hello: role, name, nonce_c   ->
                                   <-  hello: role, name, nonce_s, mac over both hellos
      mac over both hellos         ->

Each side checks the other's MAC before it decodes anything else. From then on every frame is sealed
with AES-GCM under a key of its own direction and a counter as nonce, so frames cannot be forged,
replayed, reordered or dropped unnoticed. Nonces of 32 random bytes make every link's keys new.
"""

import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from raftfs.errors import RaftfsError, UserError
from raftfs.wire.frame import decode, encode
from raftfs.wire.ops import Record

_KEY_BYTES = 32
NONCE_BYTES = 32


class AuthError(RaftfsError):
    """The other side could not prove that it knows the cluster key, or a frame was tampered with.
    """


class Hello(Record):
    """What a side says of itself before it is believed."""

    role: str
    name: str
    nonce: bytes


class ClusterKey:
    """The secret that all masters, chunkservers and learners of one cluster share."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    @classmethod
    def load(cls, path: Path) -> "ClusterKey":
        """Read a key file. UserError if it is missing, readable by others, or no key."""
        try:
            mode = path.stat().st_mode
            text = path.read_text(encoding="ascii").strip()
            secret = bytes.fromhex(text)
        except FileNotFoundError:
            raise UserError(
                f"cluster key {path} does not exist: make one with `raftfs keygen {path}` "
                "and copy it to every master and chunkserver"
            ) from None
        except (OSError, ValueError) as e:
            raise UserError(f"cluster key {path} cannot be read: {e}") from None
        if stat.S_IMODE(mode) & 0o077:
            raise UserError(f"cluster key {path} is readable by others: run chmod 600 {path}")
        if len(secret) != _KEY_BYTES:
            raise UserError(f"cluster key {path} must be {2 * _KEY_BYTES} hexadecimal digits")
        return cls(secret)

    @staticmethod
    def generate(path: Path) -> None:
        """Write a new random key, mode 0600. UserError if the file exists or cannot be written."""
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise UserError(f"cluster key {path} exists already: it is never overwritten") from None
        except OSError as e:
            raise UserError(f"cluster key {path} cannot be written: {e.strerror}") from None
        with os.fdopen(fd, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(_KEY_BYTES) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def derive(self, *context: bytes) -> bytes:
        """32 bytes bound to `context`; different contexts give unrelated values."""
        mac = hmac.new(self._secret, digestmod=hashlib.sha256)
        for part in context:
            mac.update(len(part).to_bytes(4, "big") + part)
        return mac.digest()


class Handshake:
    """One side's run of the handshake; afterwards `peer` is believed and `sealer` seals."""

    def __init__(self, key: ClusterKey, role: str, name: str, *, connecting: bool) -> None:
        self._key = key
        self.connecting = connecting
        self._mine = encode(Hello(role, name, secrets.token_bytes(NONCE_BYTES)))
        self._theirs = b""
        self._proved = False
        self.peer: Hello | None = None
        self.sealer: Sealer | None = None

    def first(self) -> bytes:
        """The connecting side's opening message."""
        return encode([self._mine])

    def step(self, message: bytes) -> bytes | None:
        """Take the other side's message; returns the answer, None if none is due. AuthError."""
        parts = decode(list[bytes], message)
        if self.connecting:
            if len(parts) != 2:
                raise AuthError("handshake: unexpected answer")
            self._theirs = parts[0]
            self._check(parts[1], b"server")
            self._finish()
            return encode([self._mac(b"client")])
        if not self._theirs:
            if len(parts) != 1:
                raise AuthError("handshake: unexpected opening")
            self._theirs = parts[0]
            decode(Hello, self._theirs)
            return encode([self._mine, self._mac(b"server")])
        if len(parts) != 1:
            raise AuthError("handshake: unexpected proof")
        self._check(parts[0], b"client")
        self._finish()
        return None

    def _transcript(self) -> tuple[bytes, bytes]:
        pair = (self._mine, self._theirs)
        return pair if self.connecting else (pair[1], pair[0])

    def _mac(self, side: bytes) -> bytes:
        return self._key.derive(b"raftfs handshake", side, *self._transcript())

    def _check(self, mac: bytes, side: bytes) -> None:
        if not hmac.compare_digest(mac, self._mac(side)):
            raise AuthError("the other side does not know the cluster key")

    def _finish(self) -> None:
        self.peer = decode(Hello, self._theirs)
        up = self._key.derive(b"raftfs seal", b"up", *self._transcript())
        down = self._key.derive(b"raftfs seal", b"down", *self._transcript())
        self.sealer = Sealer(up, down) if self.connecting else Sealer(down, up)


class Sealer:
    """Seals frames to send and opens received ones, in order, each exactly once."""

    def __init__(self, send_key: bytes, receive_key: bytes) -> None:
        self._send, self._receive = AESGCM(send_key), AESGCM(receive_key)
        self._sent = self._received = 0

    def seal(self, content: bytes) -> bytes:
        """Ciphertext of the next frame."""
        self._sent += 1
        return self._send.encrypt(self._sent.to_bytes(12, "big"), content, None)

    def open(self, content: bytes) -> bytes:
        """Plaintext of the next frame. AuthError if it is not exactly what the other side sent."""
        self._received += 1
        try:
            return self._receive.decrypt(self._received.to_bytes(12, "big"), content, None)
        except InvalidTag:
            raise AuthError("a frame was damaged or forged") from None
