"""What only who knows the cluster key may have done: proving it to the leader, and its errors."""

import argparse
import errno
import time
from pathlib import Path

from raftfs.cli.target import LOCAL_FOLDER
from raftfs.client.meta import ToolClient
from raftfs.errors import ReplyError
from raftfs.wire import messages as m
from raftfs.wire.auth import ClusterKey
from raftfs.wire.frame import FrameError, encode
from raftfs.wire.rpc import decode

DEFAULT_KEY = Path("/etc/raftfs/cluster.key")
TIMEOUT_S = 90.0  # longer than a master waits for a new one to catch up


def add_options(p: argparse.ArgumentParser) -> None:
    """Which cluster, and its key."""
    p.add_argument("-H", "--masters", metavar="A,B,C", help="masters as host[:client port] "
                   "(default: the cluster in ./.raftfs, or the mount of this folder)")  # fmt: skip
    p.add_argument("--key", type=Path, metavar="FILE", help="the cluster key (default: that of "
                   f"./.raftfs, else {DEFAULT_KEY})")  # fmt: skip
    p.add_argument("--json", action="store_true")


def sentence(error: ReplyError) -> str:
    """What the leader said against it."""
    try:
        return decode(str, error.value)
    except FrameError:
        return str(error)


def _key(path: Path | None) -> ClusterKey:
    local = LOCAL_FOLDER / "cluster.key"
    return ClusterKey.load(path or (local if local.exists() else DEFAULT_KEY))


def act(client: ToolClient, args: argparse.Namespace, action: m.AdminAction) -> str:
    """Prove the key to the leader, anew if another one leads when it is asked."""
    key = _key(args.key)
    until = time.monotonic() + TIMEOUT_S
    while True:
        challenge = client.call(m.Challenge())
        proof = key.derive(b"admin", challenge, encode(action))
        try:
            said: str = client.call(m.Admin(proof, action))
        except ReplyError as e:
            if e.status != errno.EAGAIN or time.monotonic() > until:
                raise
        else:
            return said
