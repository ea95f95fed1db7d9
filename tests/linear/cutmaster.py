"""`raftfs-master` with two doors for the tests.

--cut FILE    while the file is there, no message passes between this master and the others, and
              nothing tells either side (a partition; its clients still reach it)
--planted     the fault that the tests must find: reads are answered without a round of heartbeats,
              and a leader that hears of nobody goes on
"""

import argparse
import os
from typing import Any

from raftfs.cli import master
from raftfs.meta.raft.links import Links
from raftfs.meta.raft.safety import Timings
from raftfs.meta.service import ClientService


def cut_by(path: str) -> None:
    """Drop the replicas' messages while the file is there."""
    send, receive = Links.send, Links._message

    def cut_send(self: Links, node: Any, message: Any) -> bool:
        return os.path.exists(path) or send(self, node, message)

    def cut_receive(self: Links, link: Any, message: Any) -> None:
        if not os.path.exists(path):
            receive(self, link, message)

    Links.send = cut_send  # type: ignore[method-assign]
    Links._message = cut_receive  # type: ignore[method-assign]


def plant() -> None:
    """Take the proof of leadership away."""

    async def unproved(self: ClientService, link: Any, ask: Any) -> Any:
        return self._reads[type(ask)](link, ask)

    ClientService._read = unproved  # type: ignore[method-assign]
    Timings.fallback_s = 3600.0


def main() -> int:
    """Run a master until it is stopped."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cut")
    parser.add_argument("--planted", action="store_true")
    args, rest = parser.parse_known_args()
    if args.cut:
        cut_by(args.cut)
    if args.planted:
        plant()
    return master.main(rest)


if __name__ == "__main__":
    raise SystemExit(main())
