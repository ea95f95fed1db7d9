"""`raftfs status`: one word about a cluster's health, and why.

Asks every replica itself, so it also tells when there is no leader. Exit status as monitoring
systems want it: 0 OK, 1 WARN, 2 ERR.
"""

import argparse
import json
import sys
import time

from raftfs import log as logging_setup
from raftfs.cli.disks import scrub_line
from raftfs.cli.monitor.web import status_object
from raftfs.cli.target import default_masters
from raftfs.client.meta import connect_tool, parse_masters
from raftfs.errors import UserError
from raftfs.units import format_size
from raftfs.wire import messages as m

_EXIT = {"OK": 0, "WARN": 1, "ERR": 2}
_NEARLY_FULL = 0.95


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="raftfs status",
        description="The health of a cluster: OK, WARN or ERR, and why (exit status 0, 1, 2).",
    )
    p.add_argument("path", nargs="?", help="a path inside a mount (default: the cluster in "
                   "./.raftfs, else the current folder)")  # fmt: skip
    p.add_argument("-H", "--masters", metavar="A,B,C", help="masters as host[:client port]")
    p.add_argument("--json", action="store_true")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    args = parser().parse_args(argv)
    logging_setup.setup("raftfs-status", level="error")
    try:
        masters = args.masters or default_masters(args.path)
        with connect_tool(parse_masters(masters), timeout_s=5.0) as client:
            answers = client.ask_each(m.AskStatus())
    except UserError as e:
        print(f"raftfs status: {e}", file=sys.stderr)
        return _EXIT["ERR"]
    views = {f"{a[0]}:{a[1]}": v if isinstance(v, m.ReplicaStatus) else None
             for a, v in answers.items()}  # fmt: skip
    word, reasons = judge(views)
    if args.json:
        objects = {a: status_object(v) if v else None for a, v in views.items()}
        print(json.dumps({"health": word, "reasons": reasons, "replicas": objects}, indent=1))
    else:
        print("\n".join(_lines(views, word, reasons)))
    return _EXIT[word]


def judge(views: dict[str, m.ReplicaStatus | None]) -> tuple[str, list[str]]:
    """The word and the reasons, each beginning with a code that scripts may match."""
    errors, warnings = [], []
    there = [v for v in views.values() if v is not None]
    leaders = [v for v in there if v.role == "leader"]
    if not leaders:
        errors.append("NO_LEADER: no replica leads; the file system stands still")
    for address, view in views.items():
        if view is None:
            warnings.append(f"MASTER_DOWN: {address} does not answer")
    at: dict[int, set[bytes]] = {}
    for view in there:
        at.setdefault(view.digest_index, set()).add(view.digest)
    if any(len(digests) > 1 for digests in at.values()):
        errors.append("DIVERGED: replicas at the same index have different digests")
    if leaders:
        leader = max(leaders, key=lambda v: v.leader.term)
        if leader.missing:
            errors.append(f"MISSING: {leader.missing} chunks have no valid copy connected")
        if leader.undergoal:
            warnings.append(f"UNDERGOAL: {leader.undergoal} chunks have fewer copies than asked")
        up = [s for s in leader.servers if s.connected]
        if not up:
            errors.append("NO_CHUNKSERVER: no chunkserver is connected")
        for server in leader.servers:
            if not server.connected:
                warnings.append(f"CHUNKSERVER_DOWN: {server.host}:{server.port}")
        for server in up:
            if server.total and server.used > _NEARLY_FULL * server.total:
                warnings.append(f"NEARLY_FULL: {server.host}:{server.port}")
            warnings += _disk_warnings(server)
    word = "ERR" if errors else "WARN" if warnings else "OK"
    return word, errors + warnings


def _disk_warnings(server: m.ServerStatus) -> list[str]:
    warnings = []
    for disk in server.disks:
        where = f"{disk.path} of {server.host}:{server.port}"
        if disk.state == "damaged":
            last = disk.evidence.splitlines()[-1:]
            warnings.append(f"DISK_DAMAGED: {where}: {''.join(last)}")
        elif disk.damaged:
            warnings.append(f"COPIES_DAMAGED: {disk.damaged} on {where}")
    return warnings


def _lines(
    views: dict[str, m.ReplicaStatus | None], word: str, reasons: list[str]
) -> list[str]:
    lines = [word, *(f"  {reason}" for reason in reasons)]
    for address, view in views.items():
        if view is None:
            lines.append(f"master {address}  down")
            continue
        lines.append(
            f"master {address}  {view.role:9}  term {view.leader.term}  applied {view.applied} of "
            f"{view.committed}  digest {view.digest.hex()[:12]} at {view.digest_index}"
        )
    leader = next((v for v in views.values() if v is not None and v.role == "leader"), None)
    if leader is not None:
        lines += [
            f"chunkserver {s.host}:{s.port}  {'up' if s.connected else 'down':4}  "
            f"{s.chunks} copies  {format_size(s.used)} of {format_size(s.total)} used"
            for s in leader.servers
        ]
        lines += [
            f"  disk {d.path}  {d.state}  {scrub_line(d.scrub, time.time())}"
            for s in leader.servers for d in s.disks
        ]  # fmt: skip
        lines.append(
            f"{leader.nodes} nodes, {leader.chunks} chunks, {leader.undergoal} under goal, "
            f"{leader.missing} missing, {leader.sessions} sessions"
        )
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
