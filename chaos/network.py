"""Machines of one's own: network namespaces on a bridge, and rules that lose packets between them.

Every member gets a namespace with one interface; their other ends hang on a bridge in a namespace
of its own, the *hub*, which the story's process enters. So everything stays away from this
machine's network, and disappears with the namespaces. Their names carry the story's pid: what a
story that was killed left behind is removed when the next one begins (`sweep`).

A packet is lost where it arrives: the member's nftables has a set of addresses from which it takes
nothing. That makes each way of a connection separate; nobody is told anything.
"""

import ctypes
import json
import os
import signal
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

PREFIX = "raftfs"
_NET = "10.77.0"
_HUB = f"{_NET}.254"
_CLONE_NEWNET = 0x4000_0000
_TIMEOUT_S = 30.0

_RULES = """
table inet faults {
    set deaf { type ipv4_addr; }
    chain arriving {
        type filter hook input priority 0;
        ip saddr @deaf counter drop;
    }
    chain leaving {
        type filter hook output priority 0;
    }
}
table ip detours {
    chain leaving {
        type nat hook output priority -100;
    }
}
"""


class NetworkError(Exception):
    """This machine does not let us; the sentence says why."""


def missing() -> str:
    """Why there can be no namespaces here, or "" if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool, package in (("ip", "iproute2"), ("nft", "nftables"), ("nsenter", "util-linux")):
        if not any(os.access(f"{d}/{tool}", os.X_OK) for d in os.get_exec_path()):
            return f"{tool} is missing: apt-get install {package}"
    name = f"{PREFIX}-{os.getpid()}-try"
    try:
        _run("ip", "netns", "add", name)
        try:
            _run("ip", "-n", name, "link", "add", "bridge0", "type", "bridge")
            _run("ip", "-n", name, "link", "add", "one", "type", "veth", "peer", "name", "other")
            _run("nsenter", f"--net=/run/netns/{name}", "nft", "-f", "-", given=_RULES)
        finally:
            _run("ip", "netns", "delete", name)
    except NetworkError as e:
        return str(e)
    return ""


def _run(*words: str, given: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        words, input=given, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )
    if check and done.returncode:
        raise NetworkError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done


class Network:
    """Use as a context, once per process: afterwards everything in it is ended and removed."""

    def __init__(self, members: list[str]) -> None:
        self.members = members
        self._prefix = f"{PREFIX}-{os.getpid()}"
        self._outside = open("/proc/self/ns/net", "rb")  # noqa: SIM115

    def address(self, member: str) -> str:
        """Its address; "hub" is where this process is."""
        return _HUB if member == "hub" else f"{_NET}.{1 + self.members.index(member)}"

    def inside(self, member: str, words: list[str]) -> list[str]:
        """The command line that runs `words` on the member. Mounts are seen everywhere."""
        return ["nsenter", f"--net={self._path(member)}", *words]

    def __enter__(self) -> "Network":
        sweep()
        os.environ["no_proxy"] = "*"  # whatever fetches pages in there reaches them directly
        try:
            self._make()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.remove()

    def remove(self) -> None:
        """End whatever runs there and remove the namespaces, and with them links and rules."""
        _enter(self._outside)
        for name in _names():
            if name.startswith(f"{self._prefix}-"):
                _remove(name)

    def _make(self) -> None:
        hub = self._name("hub")
        _run("ip", "netns", "add", hub)
        _run("ip", "-n", hub, "link", "add", "bridge0", "type", "bridge")
        _run("ip", "-n", hub, "address", "add", f"{_HUB}/24", "dev", "bridge0")
        for link in ("lo", "bridge0"):
            _run("ip", "-n", hub, "link", "set", link, "up")
        for member in self.members:
            name = self._name(member)
            _run("ip", "netns", "add", name)
            _run("ip", "link", "add", "eth0", "netns", name, "type", "veth", "peer", "name",
                 member, "netns", hub)  # fmt: skip
            _run("ip", "-n", hub, "link", "set", "dev", member, "master", "bridge0", "up")
            _run("ip", "-n", name, "address", "add", f"{self.address(member)}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                _run("ip", "-n", name, "link", "set", link, "up")
            self._nft(member, _RULES)
        with open(self._path("hub"), "rb") as hub_network:
            _enter(hub_network)

    def _name(self, member: str) -> str:
        return f"{self._prefix}-{member}"

    def _path(self, member: str) -> str:
        return f"/run/netns/{self._name(member)}"

    def _nft(self, member: str, rules: str) -> str:
        return _run(*self.inside(member, ["nft", "-f", "-"]), given=rules).stdout

    # --- faults

    def cut(self, sender: str, receiver: str) -> None:
        """Lose what the one sends to the other; the way back is as it was."""
        self._nft(receiver, f"add element inet faults deaf {{ {self.address(sender)} }}")

    def mend(self) -> None:
        """Every packet arrives again."""
        for member in self.members:
            self._nft(member, "flush set inet faults deaf")

    def lost(self) -> int:
        """Packets that cuts have swallowed so far."""
        return sum(
            self._counters(member, "arriving")[0]["packets"] for member in self.members
        )

    def detour(self, member: str, target: str, port: int, by_port: int) -> None:
        """From now on the member's connections to target:port go to the hub's `by_port`."""
        self._nft(
            member,
            f"add rule ip detours leaving ip daddr {self.address(target)} tcp dport {port} "
            f"dnat to {_HUB}:{by_port}\n"
            f"add rule inet faults leaving ip daddr {_HUB} tcp dport {by_port} counter",
        )

    def detoured(self, member: str) -> list[int]:
        """Bytes that the member has sent on each of its detours, in the order of their making."""
        return [counter["bytes"] for counter in self._counters(member, "leaving")]

    def _counters(self, member: str, chain: str) -> list[dict[str, int]]:
        words = ["nft", "-j", "list", "chain", "inet", "faults", chain]
        listed = json.loads(_run(*self.inside(member, words)).stdout)["nftables"]
        return [
            part["counter"] for item in listed for part in item.get("rule", {}).get("expr", [])
            if "counter" in part
        ]  # fmt: skip


def _enter(namespace: BinaryIO) -> None:
    """This process, and what it starts, is in that network from now on."""
    libc: Any = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace.fileno(), _CLONE_NEWNET):
        raise NetworkError(f"cannot enter a network: {os.strerror(ctypes.get_errno())}")


def _names() -> list[str]:
    return [line.split()[0] for line in _run("ip", "netns", "list").stdout.splitlines() if line]


def sweep() -> None:
    """Remove what stories that no longer run have left: processes, mounts, namespaces."""
    for name in _names():
        prefix, _, rest = name.partition("-")
        pid = rest.partition("-")[0]
        if prefix == PREFIX and pid.isdigit() and not Path(f"/proc/{pid}").exists():
            print(f"removing {name}, left by a story that was killed")
            _remove(name)


def _remove(name: str) -> None:
    pids = [int(pid) for pid in _run("ip", "netns", "pids", name).stdout.split()]
    mounts = [path for pid in pids for path in [_mountpoint(pid)] if path]
    for pid in pids:
        if pid != os.getpid():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
    for path in mounts:
        _run("umount", "-l", path, check=False)
    _run("ip", "netns", "delete", name)


def _mountpoint(pid: int) -> str:
    """Where a process serves a mount, by its command line."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return ""
    return words[words.index("raftfs.mount.main") + 1] if "raftfs.mount.main" in words else ""
