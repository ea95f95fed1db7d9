"""`raftfs-metalogger`: a read-only learner that writes the classic changelog files.

It follows the Raft log without a vote, applies it to a state file of its own, and appends every
line to `changelog_ml.0.mfs`, which is rotated each hour (`changelog_ml.N.mfs`, the oldest beyond
--back-logs go). Where it received a snapshot instead of the entries, the lines in between are
missing: it says so in the file, loudly.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import structlog

from raftfs import daemon
from raftfs.errors import UserError
from raftfs.meta.master import parse_peer
from raftfs.meta.raft.replica import Replica, ReplicaConfig
from raftfs.meta.state import changelog
from raftfs.meta.state.apply import Applied
from raftfs.meta.store import MetaStore
from raftfs.wire.auth import ClusterKey
from raftfs.wire.ops import decode_batch

log = structlog.get_logger("raftfs.metalogger")

_ROTATE_S = 3_600


def parser() -> argparse.ArgumentParser:
    """The command line of `raftfs-metalogger`."""
    p = argparse.ArgumentParser(
        prog="raftfs-metalogger", description="A read-only learner that writes changelog files."
    )
    p.add_argument("--peers", required=True, metavar="A,B,C", help="all masters, as host[:port]")
    p.add_argument("--data", type=Path, default=Path("/var/lib/raftfs/metalogger"), metavar="DIR")
    p.add_argument("--key", type=Path, default=Path("/etc/raftfs/cluster.key"), metavar="FILE")
    p.add_argument("--back-logs", type=int, default=50, metavar="N",
                   help="rotated changelogs to keep (default: %(default)s)")
    p.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    return p  # fmt: skip


class ChangelogWriter:
    """Appends lines, rotates hourly, marks holes."""

    def __init__(self, folder: Path, back_logs: int) -> None:
        self._folder = folder
        self._back_logs = back_logs
        self._path = folder / "changelog_ml.0.mfs"
        self._file = open(self._path, "a", encoding="ascii")  # noqa: SIM115
        self._hour = int(time.time()) // _ROTATE_S
        self._last = self._last_version()

    def _last_version(self) -> int:
        lines = [x for x in self._path.read_text("ascii").splitlines() if x[:1].isdigit()]
        return int(lines[-1].partition(":")[0]) if lines else 0

    def write(self, data: bytes, applied: list[Applied]) -> None:
        """The lines of one entry of the log; those written before are not written twice."""
        if not data:
            return
        time_ns = decode_batch(data).time
        for one in applied:
            if one.version <= self._last:
                continue
            if self._last and one.version != self._last + 1:
                log.error("hole in the changelog", first=self._last + 1, last=one.version - 1)
                self._file.write(f"# HOLE: lines {self._last + 1} to {one.version - 1} missing\n")
            line = changelog.render(one.version, time_ns, one.command, one.result)
            self._file.write(line.rstrip("\n") + "\n")
            self._last = one.version
        self._file.flush()
        if int(time.time()) // _ROTATE_S != self._hour:
            self._rotate()

    def _rotate(self) -> None:
        self._file.close()
        self._hour = int(time.time()) // _ROTATE_S
        for number in range(self._back_logs, -1, -1):
            old = self._folder / f"changelog_ml.{number}.mfs"
            if old.exists() and number >= self._back_logs:
                old.unlink()
            elif old.exists():
                old.rename(self._folder / f"changelog_ml.{number + 1}.mfs")
        self._file = open(self._path, "a", encoding="ascii")  # noqa: SIM115

    def close(self) -> None:
        """Nothing more will come."""
        self._file.close()


async def serve(args: argparse.Namespace, stop: daemon.Stop) -> None:
    """Follow until `stop` is set."""
    peers = tuple(parse_peer(item) for item in args.peers.split(",") if item.strip())
    if not peers:
        raise UserError("--peers names no master: give host[:port] of each, separated by commas")
    key = ClusterKey.load(args.key)
    with daemon.data_folder(args.data):
        store = MetaStore(args.data / "state.mdb")
        writer = ChangelogWriter(args.data, args.back_logs)
        config = ReplicaConfig("metalogger", peers, args.data, learner=True)
        replica = Replica(config, store, key)

        def applied(index: int, data: bytes, results: list[Any]) -> None:
            writer.write(data, results)

        replica.on_applied.append(applied)
        try:
            await replica.start()
            log.info("metalogger follows", peers=list(peers))
            await daemon.until(stop, replica.failed)
        finally:
            await replica.stop()
            writer.close()
            store.close()


def main(argv: list[str] | None = None) -> int:
    """Run a metalogger until it is stopped. Returns the exit status."""
    args = parser().parse_args(argv)
    return daemon.run("raftfs-metalogger", lambda stop: serve(args, stop), level=args.log_level)


if __name__ == "__main__":
    raise SystemExit(main())
