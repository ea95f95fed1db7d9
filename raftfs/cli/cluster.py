"""`raftfs cluster`: a whole cluster on this machine, for trying things out, tests and chaos."""

import argparse
import json
import shutil
import signal
import sys
import time
from pathlib import Path

from raftfs.cli import processes
from raftfs.cli.localcluster import LocalCluster, Node, locked
from raftfs.const import KEPT_LOG_BYTES, MIB, PORT_RAFT
from raftfs.errors import UserError

DEFAULT_DIR = Path(".raftfs")
_SIGNALS = ("KILL", "STOP", "CONT", "TERM", "HUP")
_REPLACE_TIMEOUT_S = 60.0


def parser() -> argparse.ArgumentParser:
    """The command line of `raftfs cluster`."""
    p = argparse.ArgumentParser(
        prog="raftfs cluster", description="A whole cluster on this machine, all on loopback."
    )
    verbs = p.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.add_argument("--dir", type=Path, default=DEFAULT_DIR, metavar="D",
                         help="the cluster's folder (default: %(default)s)")  # fmt: skip
        return sub

    up = verb("up", "start the cluster, making it first if it is new; harmless when it runs")
    for option, number, text in (
        ("--masters", 3, "master replicas"),
        ("--chunkservers", 3, "chunkservers"),
        ("--hdds", 1, "disks of each chunkserver"),
        ("--metaloggers", 0, "metaloggers"),
        ("--port-base", PORT_RAFT, "first port"),
        ("--keep-log-mib", KEPT_LOG_BYTES // MIB, "MiB of log that masters keep for metaloggers"),
    ):
        up.add_argument(option, type=int, metavar="N", help=f"{text} (of a new cluster: {number})")
    up.add_argument("--mount", type=Path, metavar="PATH", help="and mount it there")
    status = verb("status", "who leads, what runs, where to connect")
    status.add_argument("--json", action="store_true")
    kill = verb("kill", "send a signal to a process")
    kill.add_argument("what", metavar="ROLE|NAME",
                      help="leader, follower, chunkserver, metalogger, mount, or a "
                      "name")  # fmt: skip
    kill.add_argument("--signal", choices=_SIGNALS, default="KILL")
    start = verb("start", "start a process again")
    start.add_argument("name")
    mount = verb("mount", "mount the file system; after --: options for raftfs-mount")
    mount.add_argument("path", type=Path)
    logs = verb("logs", "print what a process wrote")
    logs.add_argument("name")
    replace = verb("replace", "bring back a master that lost its data, by a snapshot")
    replace.add_argument("name")
    bootstrap = verb("bootstrap", "all masters lost their data: begin them anew from an image of "
                     "the metadata, with the chunkservers that are left")  # fmt: skip
    bootstrap.add_argument("image", type=Path, metavar="IMAGE",
                           help="of mfsmetarestore or a metalogger")  # fmt: skip
    down = verb("down", "unmount and stop everything")
    down.add_argument("--wipe", action="store_true", help="and remove the cluster's folder")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    # What stands after `--` is for raftfs-mount; argparse would only take it next to PATH.
    split = words.index("--") if "--" in words else len(words)
    args = parser().parse_args(words[:split])
    args.options = words[split + 1 :]
    args.dir = args.dir.absolute()
    try:
        if args.options and args.verb != "mount":
            raise UserError(f"options after -- are for mount: {' '.join(args.options)}")
        if args.verb in _CHANGES and (args.verb == "up" or args.dir.exists()):
            with locked(args.dir):
                return int(_VERBS[args.verb](args) or 0)
        return int(_VERBS[args.verb](args) or 0)
    except UserError as e:
        print(f"raftfs cluster {args.verb}: {e}", file=sys.stderr)
        return e.exit_status


def _up(args: argparse.Namespace) -> None:
    new = not (args.dir / "cluster.json").exists()
    if new:
        cluster = LocalCluster.create(
            args.dir, _given(args.masters, 3), _given(args.chunkservers, 3),
            _given(args.hdds, 1), _given(args.port_base, PORT_RAFT),
            _given(args.metaloggers, 0), _given(args.keep_log_mib, KEPT_LOG_BYTES // MIB),
        )  # fmt: skip
    else:
        cluster = LocalCluster.load(args.dir)
        _check_same(cluster, args)
    try:
        for node in cluster.nodes:
            if node.role != "mount":
                cluster.start(node)
        cluster.wait_up()
    except UserError:
        if new:
            cluster.forget()
        raise
    if args.mount is not None and not cluster.is_mounted(args.mount):
        cluster.mount(args.mount, [])
    _print_status(cluster)


def _given(number: int | None, default: int) -> int:
    return default if number is None else number


def _check_same(cluster: LocalCluster, args: argparse.Namespace) -> None:
    """A cluster that exists keeps its shape: UserError if other numbers are asked for."""
    servers = cluster.by_role("chunkserver")
    for option, asked, there in (
        ("--masters", args.masters, len(cluster.by_role("master"))),
        ("--chunkservers", args.chunkservers, len(servers)),
        ("--hdds", args.hdds, servers[0].argv.count("--hdd")),
        ("--metaloggers", args.metaloggers, len(cluster.by_role("metalogger"))),
        ("--port-base", args.port_base, cluster.port_base),
        ("--keep-log-mib", args.keep_log_mib, cluster.keep_log_mib()),
    ):
        if asked is not None and asked != there:
            raise UserError(
                f"the cluster in {cluster.folder} was made with {option} {there}, not {asked}: "
                "give another --dir, or remove it with `raftfs cluster down --wipe`"
            )


def _status(args: argparse.Namespace) -> int:
    cluster = LocalCluster.load(args.dir)
    if args.json:
        print(json.dumps(cluster.status(), indent=1))
    else:
        _print_status(cluster)
    return 0


def _print_status(cluster: LocalCluster) -> None:
    status = cluster.status()
    print(f"leader   {status['leader'] or 'none'}, term {status['term']}")
    print(f"masters  {','.join(status['masters'])}")
    print(f"web      {' '.join(status['web'])}")
    width = max(len(p["name"]) for p in status["processes"])
    for p in status["processes"]:
        ports = " ".join(f"{use}:{port}" for use, port in p["ports"].items())
        role = "leader" if p["name"] == status["leader"] else p["role"]
        print(f"  {p['name']:{width}}  {role:11}  {p['state']:8} pid {p['pid']:<8}"
              f"{ports}{p.get('path', '')}")  # fmt: skip


def _kill(args: argparse.Namespace) -> None:
    cluster = LocalCluster.load(args.dir)
    node = cluster.find(args.what)
    number = signal.Signals[f"SIG{args.signal}"]
    if not processes.send(node.pid, node.started, number):
        raise UserError(f"{node.name} is not running")
    if args.signal == "KILL" and not processes.wait_gone(node.pid, node.started, 5.0):
        raise UserError(f"{node.name} does not end")
    if args.signal == "KILL" and node.role == "mount":
        processes.unmount(Path(node.path))
    print(f"{node.name} (pid {node.pid}): {args.signal}")


def _named(cluster: LocalCluster, name: str) -> Node:
    for node in cluster.nodes:
        if node.name == name:
            return node
    raise UserError(f"no process {name}; there are {', '.join(n.name for n in cluster.nodes)}")


def _start(args: argparse.Namespace) -> None:
    cluster = LocalCluster.load(args.dir)
    node = _named(cluster, args.name)
    since = time.time() if node.state == "stopped" else 0.0
    cluster.start(node)

    def ready() -> bool:
        if node.role == "master":
            view = cluster.view(node)
            return view is not None and bool(view["cluster"])
        if node.role == "metalogger":
            return cluster.learns(node, since)
        if node.role == "mount":
            return bool(processes.mounted_at(Path(node.path)))
        views = [cluster.view(n) for n in cluster.by_role("master") if n.state == "running"]
        address = f"127.0.0.1:{node.ports['data']}"
        return any(
            s["address"] == address and s["connected"] for v in views if v for s in v["servers"]
        )

    cluster.wait(f"waiting for {node.name}", ready, [node])
    print(f"{node.name}: pid {node.pid}")


def _mount(args: argparse.Namespace) -> None:
    cluster = LocalCluster.load(args.dir)
    node = cluster.mount(args.path, args.options)
    print(f"{node.name}: {node.path}")


def _logs(args: argparse.Namespace) -> None:
    cluster = LocalCluster.load(args.dir)
    path = cluster.log(_named(cluster, args.name))
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            shutil.copyfileobj(file, sys.stdout)
    except FileNotFoundError:
        raise UserError(f"{args.name} has written nothing yet") from None


def _replace(args: argparse.Namespace) -> None:
    cluster = LocalCluster.load(args.dir)
    node = _named(cluster, args.name)
    if node.role != "master":
        raise UserError(f"{node.name} is a {node.role}: only masters are replaced")
    others = [n for n in cluster.by_role("master") if n is not node]
    if not any(v and v["role"] == "leader" for v in map(cluster.view, others)):
        raise UserError(
            f"{node.name} is not replaced while no other master leads: its data may still be needed"
        )
    processes.end(node.pid, node.started)
    data = cluster.folder / node.name
    if data.exists():
        kept = data.with_name(f"{data.name}.replaced-{int(time.time())}")
        data.rename(kept)
        print(f"old data kept in {kept}")
    cluster.start(node, "--replace")
    cluster.wait(f"replacing {node.name}", lambda: cluster.votes(node), [node], _REPLACE_TIMEOUT_S)
    print(f"{node.name} is back and votes (pid {node.pid})")


def _bootstrap(args: argparse.Namespace) -> None:
    cluster = LocalCluster.load(args.dir)
    masters = cluster.by_role("master")
    for node in masters:
        if node.state != "stopped":
            raise UserError(
                f"{node.name} is {node.state}: --bootstrap is for masters that lost their data; "
                f"end it first (raftfs cluster kill {node.name})"
            )
        data = cluster.folder / node.name
        if data.exists() and any(path.name != ".lock" for path in data.iterdir()):
            raise UserError(f"{node.name} has data in {data}: move it away first")
    try:
        for node in masters:
            cluster.start(node, "--bootstrap", str(args.image.absolute()))
        for node in cluster.by_role("chunkserver"):
            cluster.start(node)
        cluster.wait_up()
    except UserError:
        for node in masters:  # none goes on alone
            processes.end(node.pid, node.started)
        raise
    _print_status(cluster)


def _down(args: argparse.Namespace) -> None:
    if not (args.dir / "cluster.json").exists():
        print(f"no cluster in {args.dir}")
        return
    cluster = LocalCluster.load(args.dir)
    cluster.down()
    if args.wipe:
        cluster.wipe()
    print("down" + (", wiped" if args.wipe else ""))


_VERBS = {
    "up": _up, "status": _status, "kill": _kill, "start": _start, "mount": _mount, "logs": _logs,
    "replace": _replace, "bootstrap": _bootstrap, "down": _down,
}  # fmt: skip
_CHANGES = ("up", "start", "mount", "replace", "bootstrap", "down")
