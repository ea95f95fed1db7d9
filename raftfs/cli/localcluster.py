"""A whole cluster on this machine: its folder, its processes, what they say of themselves.

    D/cluster.json   what there is: every process with its command line, ports, pid and start time
    D/cluster.lock   held by a command that changes the cluster, so that two never mix
    D/cluster.key    the cluster key
    D/log/NAME.log   output
    D/NAME/          data: m1.. masters, cs1.. chunkservers, ml1.. metaloggers; mounts have none

Ports, counted from the port base B (default 9418): master i has B+10*i (Raft), +2 chunkservers, +3
clients, +7 web; chunkserver j has B+500+j. Everything listens on 127.0.0.1 only.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from raftfs.cli import processes
from raftfs.const import KEPT_LOG_BYTES, MIB
from raftfs.errors import UserError
from raftfs.meta.learner import status as learner_status
from raftfs.meta.raft.identity import Identity
from raftfs.wire.auth import ClusterKey

HOST = "127.0.0.1"
MASTER_STEP, CHUNKSERVER_OFFSET = 10, 500
START_TIMEOUT_S = 30.0
# What the port scheme and a machine can bear.
MASTERS_MAX, CHUNKSERVERS_MAX, HDDS_MAX, METALOGGERS_MAX = 9, 99, 36, 9
_LOCK_TIMEOUT_S = 60.0
_TAIL_LINES = 5


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the cluster's lock: of two commands that change it, the second waits for the first.

    UserError if the folder cannot be made or the other command does not end.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder / "cluster.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as e:
        raise UserError(f"{folder} cannot be used: {e.strerror}") from None
    try:
        until = time.monotonic() + _LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise UserError(
                        f"another raftfs cluster command is still at work in {folder}"
                    ) from None
                time.sleep(0.05)
        yield
    finally:
        os.close(fd)


class Node:
    """One process of the cluster."""

    def __init__(self, entry: dict[str, Any]) -> None:
        self.name: str = entry["name"]
        self.role: str = entry["role"]
        self.argv: list[str] = entry["argv"]
        self.ports: dict[str, int] = entry["ports"]
        self.path: str = entry.get("path", "")
        self.pid: int = entry.get("pid", 0)
        self.started: int = entry.get("started", 0)

    @property
    def state(self) -> str:
        """`running`, `paused` or `stopped`."""
        return processes.state_of(self.pid, self.started)

    def entry(self) -> dict[str, Any]:
        """As kept in cluster.json."""
        return {
            "name": self.name, "role": self.role, "argv": self.argv, "ports": self.ports,
            "path": self.path, "pid": self.pid, "started": self.started,
        }  # fmt: skip


class LocalCluster:
    """The cluster in a folder."""

    def __init__(self, folder: Path, port_base: int, nodes: list[Node]) -> None:
        self.folder = folder
        self.port_base = port_base
        self.nodes = nodes

    # --- the folder

    @classmethod
    def load(cls, folder: Path) -> "LocalCluster":
        """UserError if there is no cluster in the folder."""
        try:
            kept = json.loads((folder / "cluster.json").read_text())
        except FileNotFoundError:
            raise UserError(
                f"there is no cluster in {folder}: make one with `raftfs cluster up --dir {folder}`"
            ) from None
        except (OSError, ValueError) as e:
            raise UserError(f"{folder / 'cluster.json'} cannot be read: {e}") from None
        return cls(folder, kept["port_base"], [Node(n) for n in kept["nodes"]])

    @classmethod
    def create(
        cls, folder: Path, masters: int, chunkservers: int, hdds: int, port_base: int,
        metaloggers: int = 0, keep_log_mib: int = KEPT_LOG_BYTES // MIB,
    ) -> "LocalCluster":
        """A new cluster's folder, key and command lines; nothing runs yet."""
        _check_numbers(masters, chunkservers, hdds, port_base, metaloggers)
        cluster = cls(folder, port_base, [])
        bases = [port_base + MASTER_STEP * i for i in range(masters)]
        peers = ",".join(f"{HOST}:{b}" for b in bases)
        for number, base in enumerate(bases, 1):
            cluster._add_master(f"m{number}", base, peers, keep_log_mib)
        for number in range(1, chunkservers + 1):
            cluster._add_chunkserver(number, hdds, bases)
        for number in range(1, metaloggers + 1):
            cluster._add_metalogger(number, peers)
        cluster._check_ports()
        try:
            (folder / "log").mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"{folder} cannot be used: {e.strerror}") from None
        if not cluster.key.exists():
            ClusterKey.generate(cluster.key)
        cluster.save()
        return cluster

    def forget(self) -> None:
        """After a failed first start: stop what runs, so that another try begins anew."""
        self.down()
        (self.folder / "cluster.json").unlink(missing_ok=True)

    def _add_master(self, name: str, base: int, peers: str, keep_log_mib: int) -> None:
        argv = [
            sys.executable, "-m", "raftfs.cli.master", "--peers", peers, "--name",
            f"{HOST}:{base}", "--data", str(self.folder / name), "--key", str(self.key),
            "--listen", HOST, "--keep-log-mib", str(keep_log_mib),
        ]  # fmt: skip
        ports = {"raft": base, "chunkservers": base + 2, "clients": base + 3, "web": base + 7}
        self.nodes.append(Node({"name": name, "role": "master", "argv": argv, "ports": ports}))

    def _add_chunkserver(self, number: int, hdds: int, bases: list[int]) -> None:
        name, port = f"cs{number}", self.port_base + CHUNKSERVER_OFFSET + number
        argv = [
            sys.executable, "-m", "raftfs.chunk.main", "-H",
            ",".join(f"{HOST}:{b + 2}" for b in bases), "--listen", HOST, "--port", str(port),
            "--announce", HOST, "--key", str(self.key),
        ]  # fmt: skip
        for hdd in range(1, hdds + 1):
            argv += ["--hdd", str(self.folder / name / f"hdd{hdd}")]
        entry = {"name": name, "role": "chunkserver", "argv": argv, "ports": {"data": port}}
        self.nodes.append(Node(entry))

    def _add_metalogger(self, number: int, peers: str) -> None:
        name = f"ml{number}"
        argv = [
            sys.executable, "-m", "raftfs.cli.metalogger", "--peers", peers, "--data",
            str(self.folder / name), "--key", str(self.key),
        ]  # fmt: skip
        self.nodes.append(Node({"name": name, "role": "metalogger", "argv": argv, "ports": {}}))

    def _check_ports(self) -> None:
        for node in self.nodes:
            for use, port in node.ports.items():
                with socket.socket() as sock:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    try:
                        sock.bind((HOST, port))
                    except OSError as e:
                        raise UserError(
                            f"port {port} ({node.name}, {use}) cannot be had: {e.strerror}; "
                            "give another --port-base"
                        ) from None

    @property
    def key(self) -> Path:
        """The cluster key's file."""
        return self.folder / "cluster.key"

    def save(self) -> None:
        """Write cluster.json, atomically."""
        new = self.folder / "cluster.json.new"
        kept = {"port_base": self.port_base, "nodes": [n.entry() for n in self.nodes]}
        new.write_text(json.dumps(kept, indent=1) + "\n")
        os.replace(new, self.folder / "cluster.json")

    def wipe(self) -> None:
        """Remove the folder and everything in it."""
        shutil.rmtree(self.folder)

    # --- processes

    def log(self, node: Node) -> Path:
        """Where a process writes."""
        return self.folder / "log" / f"{node.name}.log"

    def by_role(self, role: str) -> list[Node]:
        """Nodes of a role, running or not."""
        return [n for n in self.nodes if n.role == role]

    def find(self, what: str) -> Node:
        """A node by name or by role (leader, follower, master, chunkserver, mount). UserError."""
        for node in self.nodes:
            if node.name == what:
                return node
        if what in ("leader", "follower"):
            leader = self.status()["leader"]
            masters = [n for n in self.by_role("master") if n.state == "running"]
            found = [n for n in masters if (n.name == leader) == (what == "leader")]
        else:
            found = [n for n in self.by_role(what) if n.state == "running"]
        if not found:
            names = ", ".join(n.name for n in self.nodes)
            raise UserError(f"no running {what}; there are {names}")
        return found[0]

    def start(self, node: Node, *extra: str) -> None:
        """Start a process that is not running; `extra` options only this time."""
        if node.state == "paused":
            raise UserError(
                f"{node.name} is paused: let it go on with `raftfs cluster kill {node.name} "
                f"--signal CONT --dir {self.folder}`"
            )
        if node.state == "running":
            return
        node.pid, node.started = processes.launch([*node.argv, *extra], self.log(node))
        self.save()

    def tail(self, node: Node, lines_max: int = _TAIL_LINES) -> str:
        """The last lines that a process wrote."""
        try:
            lines = self.log(node).read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return ""
        return "\n".join(lines[-lines_max:])

    def wait(
        self, what: str, ready: Callable[[], bool], nodes: list[Node],
        timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        """Wait for a condition. UserError, with the log's tail, when a process has died or time is
        up."""
        until = time.monotonic() + timeout_s
        while not ready():
            for node in nodes:
                if node.state == "stopped":
                    raise UserError(f"{node.name} ended while {what}:\n{self.tail(node)}")
            if time.monotonic() > until:
                said = "\n".join(f"{n.name}: {self.tail(n, 1)}" for n in nodes)
                raise UserError(f"gave up {what} after {timeout_s:.0f} s; last words:\n{said}")
            time.sleep(0.05)

    def wait_up(self) -> None:
        """Until a leader serves and every chunkserver is connected to every master."""
        running = [n for n in self.nodes if n.state != "stopped"]
        masters = [n for n in running if n.role == "master"]
        servers = len([n for n in running if n.role == "chunkserver"])

        def ready() -> bool:
            views = [self.view(n) for n in masters]
            return any(v and v["role"] == "leader" for v in views) and all(
                v is not None and sum(s["connected"] for s in v["servers"]) >= servers
                for v in views
            )

        self.wait("waiting for the cluster", ready, running)

    # --- mounts

    def mount(self, path: Path, options: list[str]) -> Node:
        """Mount the file system; waits until it is there."""
        path = Path(os.path.abspath(path))
        known = [n for n in self.by_role("mount") if n.path == str(path)]
        if known and known[0].state == "stopped":
            processes.unmount(path)  # what a mount that died has left there
        if processes.mounted_at(path):
            raise UserError(f"{path} is a mountpoint already")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"mountpoint {path} cannot be made: {e.strerror}") from None
        number = 1 + max((int(n.name[3:]) for n in self.by_role("mount")), default=0)
        argv = [
            sys.executable, "-m", "raftfs.mount.main", str(path), "-H", ",".join(self.masters()),
            "-f", *options,
        ]  # fmt: skip
        entry = {"name": f"mnt{number}", "role": "mount", "argv": argv, "ports": {}}
        node = known[0] if known else Node({**entry, "path": str(path)})
        node.argv = argv
        if not known:
            self.nodes.append(node)
        self.start(node)
        try:
            self.wait(f"mounting {path}", lambda: bool(processes.mounted_at(path)), [node])
        except UserError:
            processes.end(node.pid, node.started)
            self.nodes.remove(node)
            self.save()
            raise
        return node

    def is_mounted(self, path: Path) -> bool:
        """Whether a mount of this cluster is alive at the path."""
        wanted = os.path.abspath(path)
        return any(
            n.path == wanted and n.state != "stopped" and processes.mounted_at(Path(wanted))
            for n in self.by_role("mount")
        )

    def masters(self) -> list[str]:
        """The masters' client addresses, as `-H` takes them."""
        return [f"{HOST}:{n.ports['clients']}" for n in self.by_role("master")]

    def down(self) -> None:
        """Unmount and stop everything; nothing is left running."""
        for node in self.by_role("mount"):
            processes.send(node.pid, node.started, signal.SIGCONT)
            processes.unmount(Path(node.path))
            processes.end(node.pid, node.started, 20.0)
        for role in ("metalogger", "chunkserver", "master"):
            for node in self.by_role(role):
                processes.end(node.pid, node.started)
        for node in self.nodes:
            node.pid = node.started = 0
        self.nodes = [n for n in self.nodes if n.role != "mount"]
        self.save()

    # --- what it says of itself

    def votes(self, node: Node) -> bool:
        """Whether a master is a voter (so says its identity file) and in touch with a leader."""
        path = self.folder / node.name / "identity.cbor"
        view = self.view(node)
        if not path.exists() or view is None or view["role"] == "candidate":
            return False
        return Identity.load_or_create(path, f"{HOST}:{node.ports['raft']}", voter=False).voter

    def learns(self, node: Node, since: float) -> bool:
        """Whether a metalogger has said something of itself since then."""
        said = self.folder / node.name / learner_status.NAME
        return said.exists() and said.stat().st_mtime >= since

    def keep_log_mib(self) -> int:
        """What the masters were told with the option of that name."""
        argv = self.by_role("master")[0].argv
        at = argv.index("--keep-log-mib") if "--keep-log-mib" in argv else -1
        return int(argv[at + 1]) if at >= 0 else KEPT_LOG_BYTES // MIB

    def view(self, node: Node) -> dict[str, Any] | None:
        """A master's own status, None if it does not answer."""
        url = f"http://{HOST}:{node.ports['web']}/api/status"
        try:
            with urllib.request.urlopen(url, timeout=1.0) as answer:
                view: dict[str, Any] = json.load(answer)
                return view
        except (OSError, ValueError, urllib.error.URLError):
            return None

    def status(self) -> dict[str, Any]:
        """Everything that `raftfs cluster status --json` prints."""
        masters = self.by_role("master")
        views = {n.name: self.view(n) for n in masters if n.state == "running"}
        leading = [(v["leader"]["term"], name) for name, v in views.items()
                   if v and v["role"] == "leader"]  # fmt: skip
        terms = [v["leader"]["term"] for v in views.values() if v]
        return {
            "dir": str(self.folder),
            "leader": max(leading)[1] if leading else "",
            "term": max(terms, default=0),
            "masters": self.masters(),
            "web": [f"http://{HOST}:{n.ports['web']}/" for n in masters],
            "mounts": [n.path for n in self.by_role("mount") if n.state != "stopped"],
            "replicas": {name: v for name, v in views.items() if v},
            "processes": [
                {"role": n.role, "name": n.name, "pid": n.pid, "ports": n.ports, "state": n.state,
                 **({"path": n.path} if n.path else {})}
                for n in self.nodes
            ],
        }  # fmt: skip


def _check_numbers(
    masters: int, chunkservers: int, hdds: int, port_base: int, metaloggers: int
) -> None:
    """UserError unless the numbers make a cluster."""
    if masters == 2:
        raise UserError("--masters 2: with two, losing either stops both; give 1, 3 or 5")
    for option, number, low, high in (
        ("--masters", masters, 1, MASTERS_MAX),
        ("--chunkservers", chunkservers, 1, CHUNKSERVERS_MAX),
        ("--hdds", hdds, 1, HDDS_MAX),
        ("--metaloggers", metaloggers, 0, METALOGGERS_MAX),
        ("--port-base", port_base, 1024, 65_535 - CHUNKSERVER_OFFSET - CHUNKSERVERS_MAX),
    ):
        if not low <= number <= high:
            raise UserError(f"{option} {number}: must be between {low} and {high}")
