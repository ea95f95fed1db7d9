"""`raftfs disks`: the chunkservers' disks, how far their scrubs are, and what was set aside.

Whoever changes something proves the cluster key; looking needs none. `quarantine` reads folders of
this machine, whether their chunkserver runs or not.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from raftfs import log as logging_setup
from raftfs.chunk.door import FileDoor
from raftfs.chunk.quarantine import Kept, Quarantine
from raftfs.cli.admin import TIMEOUT_S, act, add_options, sentence
from raftfs.cli.target import default_masters
from raftfs.client.meta import connect_tool, parse_masters
from raftfs.errors import RaftfsError, ReplyError, UserError
from raftfs.units import format_size
from raftfs.wire import messages as m


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="raftfs disks", description="The chunkservers' disks: list, scrub-rate, retest, "
        "quarantine.",
    )  # fmt: skip
    actions = p.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser("list", help="every disk: state, space, copies, scrub, quarantine")
    rate = actions.add_parser("scrub-rate", help="how fast scrubs read, from now on")
    rate.add_argument("mib_s", type=float, help="MiB a second of each disk; 0: no scrub")
    rate.add_argument("server", nargs="?", default="", help="chunkserver as host:port "
                      "(default: all)")  # fmt: skip
    retest = actions.add_parser("retest", help="count a damaged disk again, if it works now")
    retest.add_argument("server", help="chunkserver as host:port")
    retest.add_argument("disk", help="the disk's path there")
    kept = actions.add_parser("quarantine", help="what was set aside on disks of this machine")
    kept.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a disk's folder")
    kept.add_argument("--json", action="store_true")
    for sub in (show, rate, retest):
        add_options(sub)
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    args = parser().parse_args(argv)
    logging_setup.setup("raftfs-disks", level="error")
    try:
        print(quarantined(args) if args.action == "quarantine" else _ask(args))
    except ReplyError as e:
        print(f"raftfs disks: {sentence(e)}", file=sys.stderr)
        return 1
    except RaftfsError as e:
        print(f"raftfs disks: {e}", file=sys.stderr)
        return 1
    return 0


def _ask(args: argparse.Namespace) -> str:
    masters = parse_masters(args.masters or default_masters(None))
    with connect_tool(masters, timeout_s=TIMEOUT_S) as client:
        if args.action == "scrub-rate":
            tune = m.TuneDisks(args.server, "scrub-rate", f"{args.mib_s:g}")
            return act(client, args, tune)
        if args.action == "retest":
            return act(client, args, m.TuneDisks(args.server, "retest", args.disk))
        views = client.ask_each(m.AskStatus()).values()
    leader = next(
        (v for v in views if isinstance(v, m.ReplicaStatus) and v.role == "leader"), None
    )
    if leader is None:
        raise UserError("no master leads: nobody knows the disks now; try again")
    return listed(leader.servers, as_json=args.json, now=time.time())


# --- the list


def disk_object(disk: m.DiskStatus) -> dict[str, Any]:
    """A disk as plain JSON values."""
    scrub = disk.scrub
    return {
        "path": disk.path, "uuid": disk.uuid.hex(), "state": disk.state, "total": disk.total,
        "used": disk.used, "copies": disk.copies, "damaged": disk.damaged,
        "quarantined": disk.quarantined, "quarantined_bytes": disk.quarantined_bytes,
        "evidence": disk.evidence.splitlines(), "scrub": {
            "mib_s": scrub.mib_s, "began": scrub.began, "progress": round(scrub.progress, 4),
            "last_began": scrub.last_began, "last_ended": scrub.last_ended,
            "damaged": scrub.damaged,
        },
    }  # fmt: skip


def listed(servers: list[m.ServerStatus], *, as_json: bool, now: float) -> str:
    """All disks, server by server."""
    if as_json:
        return json.dumps([{
            "server": s.server.hex(), "address": f"{s.host}:{s.port}", "connected": s.connected,
            "disks": [disk_object(d) for d in s.disks],
        } for s in servers], indent=1)  # fmt: skip
    lines = []
    for server in servers:
        lines.append(f"chunkserver {server.host}:{server.port}"
                     + ("" if server.connected else "  down"))  # fmt: skip
        for disk in server.disks:
            lines += _disk_lines(disk, now)
    return "\n".join(lines) if lines else "no chunkserver has ever been connected"


def _disk_lines(disk: m.DiskStatus, now: float) -> list[str]:
    advice = {"removable": "  (nothing on it is needed: it may be pulled)"}.get(disk.state, "")
    lines = [
        f"  {disk.path}  {disk.state}{advice}",
        f"    {format_size(disk.used)} of {format_size(disk.total)} used, {disk.copies} copies, "
        f"{disk.damaged} damaged, {disk.quarantined} in quarantine "
        f"({format_size(disk.quarantined_bytes)})",
        f"    {scrub_line(disk.scrub, now)}",
    ]
    return lines + [f"    {line}" for line in disk.evidence.splitlines()]


def scrub_line(scrub: m.ScrubStatus, now: float) -> str:
    """How far a scrub is, in words."""
    if not scrub.mib_s:
        doing = "scrub stopped"
    elif scrub.began:
        doing = f"scrub at {100 * scrub.progress:.0f} %, {scrub.mib_s:g} MiB/s"
    else:
        doing = f"scrub pauses, {scrub.mib_s:g} MiB/s"
    if not scrub.last_ended:
        return f"{doing}, no whole cycle yet"
    took, ago = scrub.last_ended - scrub.last_began, int(now) - scrub.last_ended
    return f"{doing}, last cycle took {_span(took)} and ended {_span(ago)} ago"


def _span(seconds: int) -> str:
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{max(0, seconds)} s"


# --- the quarantine


def quarantined(args: argparse.Namespace) -> str:
    """What the folders' quarantines hold. UserError if a folder is none."""
    found: list[Kept] = []
    for folder in args.folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder: give the folder of a chunkserver's disk")
        found += Quarantine(folder, FileDoor()).kept()
    if args.json:
        return json.dumps([{
            "file": str(k.path), "size": k.size, "since": k.since,
            "story": None if k.story is None else {
                field: getattr(k.story, field) for field in k.story.__struct_fields__
            },
        } for k in found], indent=1)  # fmt: skip
    return "\n".join(map(_kept_line, found)) if found else "nothing is in quarantine"


def _kept_line(kept: Kept) -> str:
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(kept.since))
    story = kept.story
    if story is None:
        return f"{stamp}  {kept.path}  its story is lost"
    difference = f", expected {story.expected}, found {story.found}" if story.found else ""
    return (
        f"{stamp}  {kept.path}  chunk {story.chunk:016X} version {story.version}: {story.text} "
        f"({story.part}, found by {story.found_by}{difference})"
    )


if __name__ == "__main__":
    raise SystemExit(main())
