"""A client's session with the cluster: registering on a master's link, resuming after a failover.

A session survives its connections: the same number and secret are shown to every new leader, which
finds the session in the replicated state. The password never travels; a proof of it does.
"""

import errno
import grp
import hashlib
import os
import pwd

import raftfs
from raftfs.errors import ReplyError, Status, UserError
from raftfs.wire import messages as m
from raftfs.wire.rpc import Link, decode

REGISTER_TIMEOUT_S = 3.0  # a new session is a Raft commit; a silent master is left earlier by news

# Errnos with which Register is refused for good: no other master and no waiting changes them.
_FINAL = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EINVAL, errno.EPROTO)


def password_proof(challenge: bytes, password: str) -> bytes:
    """What `Register.proof` must be for this challenge of 32 bytes."""
    digest = hashlib.md5(password.encode(), usedforsecurity=False).digest()
    whole = challenge[:16] + digest + challenge[16:]
    return hashlib.md5(whole, usedforsecurity=False).digest()


class Session:
    """Who this client is. `number` is 0 until a master gave one; it then stays for life.

    `tool`: a command line tool; it gets no session of its own but may act under that of a mount.
    """

    def __init__(
        self,
        *,
        path: bytes = b"/",
        info: str = "",
        password: str = "",
        tool: bool = False,
        number: int = 0,
    ) -> None:
        self.path = path
        self.info = info
        self.number = number
        self.tool = tool
        self.registered: m.Registered | None = None
        self._password = password
        self._secret = b"" if tool else os.urandom(16)

    async def register(self, link: Link) -> m.Registered:
        """Begin or resume the session on this link. ReplyError as the master says; LinkError."""
        proof = b""
        if self._password:
            raw = await link.call(m.Challenge(), REGISTER_TIMEOUT_S)
            proof = password_proof(decode(bytes, raw), self._password)
        ask = m.Register(
            m.PROTOCOL, raftfs.__version__, self.number, self._secret, self.path, self.info, proof,
            self.tool,
        )  # fmt: skip
        registered = decode(m.Registered, await link.call(ask, REGISTER_TIMEOUT_S))
        if not self.tool:
            self.number = registered.session
        self.registered = registered
        return registered

    def forget_number(self) -> None:
        """The cluster no longer knows this session: the next `register` begins a new one."""
        self.number = 0
        self._secret = os.urandom(16)

    def refusal(self, error: ReplyError) -> UserError | None:
        """The sentence for a final refusal, None if trying again may help."""
        if error.status == Status.BAD_PASSWORD:
            return UserError("mfsmaster register error: wrong or missing password (mfspassword=)")
        where = os.fsdecode(self.path)
        if error.status == Status.NO_EXPORT:
            return UserError(
                f"mfsmaster register error: no line of mfsexports.cfg lets this host mount {where}"
            )
        if error.status in _FINAL:
            return UserError(
                f"mfsmaster register error: cannot mount subfolder {where}: "
                f"{os.strerror(error.status)}"
            )
        return None


def banner(registered: m.Registered) -> str:
    """The line that the classic mfsmount prints after it registered."""
    words = ["read-only" if registered.readonly else "read-write"]
    if registered.restricted_ip:
        words.append("restricted_ip")
    if registered.map_all:
        words.append("map_all")
    line = (
        f"mfsmaster accepted connection with parameters: {','.join(words)} ; "
        f"root mapped to {_owner(registered.root_uid, registered.root_gid)}"
    )
    if registered.map_all:
        line += f" ; users mapped to {_owner(registered.all_uid, registered.all_gid)}"
    return line


def _owner(uid: int, gid: int) -> str:
    try:
        user = pwd.getpwuid(uid).pw_name
    except KeyError:
        user = str(uid)
    try:
        group = grp.getgrgid(gid).gr_name
    except KeyError:
        group = str(gid)
    return f"{user}:{group}"
