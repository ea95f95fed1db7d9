"""From a path inside a mount to the masters and the object: what every mfs* tool begins with."""

import errno
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from raftfs import log as logging_setup
from raftfs.client.meta import ToolClient, connect_tool, parse_masters
from raftfs.const import ROOT_INODE
from raftfs.errors import RaftfsError, ReplyError, UserError

INFO_NAME = ".masterinfo"
LOCAL_FOLDER = Path(".raftfs")  # where `make up` keeps a cluster


class TargetError(RaftfsError):
    """A name that the tool cannot work on; the text is what follows `NAME: `."""


class Target(NamedTuple):
    """An object of the file system. `masters` as given to `-H`."""

    masters: str
    session: int
    inode: int


def find(name: str) -> Target:
    """The object that a name means, links followed. TargetError if it is none of ours."""
    try:
        path = os.path.realpath(name, strict=True)
        inode, device = os.stat(path).st_ino, os.stat(path).st_dev
    except OSError as e:
        where = os.path.abspath(name)
        code = errno.errorcode.get(e.errno or 0, str(e.errno))
        raise TargetError(
            f"realpath error on ({where}): {code} ({os.strerror(e.errno or 0)})"
        ) from None
    root = _mount_root(path, device)
    try:
        with open(os.path.join(root, INFO_NAME), encoding="utf-8") as file:
            info = json.load(file)
        masters, session = ",".join(info["masters"]), int(info["session"])
    except (OSError, ValueError, KeyError, TypeError):
        raise TargetError("not MFS object") from None
    if inode == ROOT_INODE:
        inode = info["root"]  # the mounted subfolder shows itself to the kernel as inode 1
    return Target(masters, session, inode)


def default_masters(path: str | None) -> str:
    """The masters to ask when none were named: those of a mount, or of the cluster in ./.raftfs."""
    local = LOCAL_FOLDER / "cluster.json"
    if path is None and local.exists():
        nodes: list[dict[str, Any]] = json.loads(local.read_text())["nodes"]
        return ",".join(
            f"127.0.0.1:{n['ports']['clients']}" for n in nodes if n["role"] == "master"
        )
    try:
        return find(path or ".").masters
    except TargetError as e:
        raise UserError(f"{path or 'the current folder'}: {e}; give a path or -H") from None


def _mount_root(path: str, device: int) -> str:
    """The topmost folder above a path that is on the same device."""
    while True:
        above = os.path.dirname(path)
        if above == path or os.stat(above).st_dev != device:
            return path
        path = above


class Clients:
    """Connections to the clusters that the names belong to, made when first needed."""

    def __init__(self) -> None:
        self._clients: dict[str, ToolClient] = {}

    def of(self, target: Target) -> ToolClient:
        """The connection for a target."""
        client = self._clients.get(target.masters)
        if client is None:
            client = connect_tool(parse_masters(target.masters), target.session)
            self._clients[target.masters] = client
        return client

    def close(self) -> None:
        """Drop them all."""
        for client in self._clients.values():
            client.close()


def for_each(names: Iterable[str], work: Callable[[ToolClient, str, int], None]) -> int:
    """Run `work(client, name, inode)` for every name, going on after failures.

    A failure is one line `NAME: reason` on stdout, as the classic tools have it. Gives the exit
    status: 0, or 1 if any failed.
    """
    logging_setup.setup("mfstools", level="error")  # what goes wrong is said per name
    status = 0
    clients = Clients()
    try:
        for name in names:
            try:
                target = find(name)
                work(clients.of(target), name, target.inode)
            except TargetError as e:
                print(f"{name}: {e}")
                status = 1
            except ReplyError as e:
                text = os.strerror(e.status) if e.status < 1000 else str(e)
                print(f"{name}: {text}")
                status = 1
            except RaftfsError as e:
                print(f"{name}: {e}")
                status = 1
    except BrokenPipeError:
        # Whoever read (head, say) has seen enough. Nothing more may be written, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 1
    finally:
        clients.close()
    return status
