"""The one family of errors. A class's docstring is its sentence; it carries errno and exit status.

Errors that a user can cause are `UserError`s: printed as one sentence, no traceback, non-zero exit.
Anything else that escapes is a bug and is loud. `Status` are the numbers that travel in replies:
0, an errno, or one of the protocol's own from 1000 up.
"""

import errno
import os


class Status:
    """Numbers a reply may carry besides 0 (success) and errno values (below 1000)."""

    NOT_LEADER = 1001  # value: Leader | None; ask the one named there
    NO_SESSION = 1002  # the session is unknown: it was ended, or never existed
    LOCKED = 1003  # the chunk is being written by another session: try again shortly
    NO_COPIES = 1004  # no valid copy of the chunk is connected now
    NO_SERVERS = 1005  # no chunkserver can take a new chunk now
    UNKNOWN = 1006  # the outcome is not known (leader lost while committing): retry with same seq
    STALE_SEQ = 1007  # the sequence number is older than the window: a client bug
    BAD_PASSWORD = 1008
    NO_EXPORT = 1009
    BUSY = 1010  # too much in flight: try again
    # chunkserver data port
    WRONG_VERSION = 1020  # the copy has another version, or the token is older than one seen
    NO_CHUNK = 1021
    BAD_CRC = 1022
    CHAIN_BROKEN = 1023  # a server further down the chain failed; the reply names it
    OLD_TERM = 1024  # the order came from a deposed leader
    DISK_ERROR = 1025
    NO_TICKET = 1040  # none, or one that does not admit the request: ask for map or grant again
    TICKET_EXPIRED = 1041  # as NO_TICKET, and nothing is wrong with it but its age


class RaftfsError(Exception):
    """Something failed."""

    exit_status = 1
    errno: int = errno.EIO


class UserError(RaftfsError):
    """A sentence for the user: what, where, what to do. Printed without a traceback."""


class ConfigError(UserError):
    """A configuration file is refused; the message names file and line."""


class StateDiffers(UserError):
    """This replica's state is not what the log says: its disk or its program is at fault."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}: this master must not go on with its data, the others do without it; replace "
            "it with `raftfs cluster replace NAME`, or start it on an empty folder with --replace"
        )


class DiskFailed(UserError):
    """A file cannot be written: nothing of what it should have got may count as durable."""

    def __init__(self, what: str, error: object) -> None:
        super().__init__(
            f"{what} cannot be written: {error}: make room, or replace the disk, and start this "
            "master again; the others go on without it"
        )


class InvariantError(AssertionError):
    """A bug: something that must always hold did not. Never caught, never stripped by -O."""


class ReplyError(RaftfsError):
    """The other side answered with a status other than 0.

    `status` is an errno or a `Status` number, `value` the raw (MessagePack) rest of the reply.
    """

    def __init__(self, status: int, value: bytes = b"") -> None:
        self.status = status
        self.value = value
        self.errno = status if status < 1000 else errno.EIO
        super().__init__(status_text(status))


class LinkError(RaftfsError):
    """The connection broke or could not be made, or the deadline passed: the outcome is unknown."""


class NotLeader(RaftfsError):
    """This replica does not lead, so nothing was proposed."""


class OutcomeUnknown(RaftfsError):
    """The command was proposed, but leadership was lost before its outcome was known."""


_NAMES = {v: k for k, v in vars(Status).items() if isinstance(v, int)}


def status_text(status: int) -> str:
    """A status as words: `ENOENT (No such file or directory)` or `NOT_LEADER`."""
    if status in _NAMES:
        return _NAMES[status]
    return f"{errno.errorcode.get(status, status)} ({os.strerror(status)})"


def invariant(condition: object, message: str) -> None:
    """Raise `InvariantError` unless `condition` holds. For guards of data, also in production."""
    if not condition:
        raise InvariantError(message)
