"""A cluster whose masters, chunkservers and mounts are machines of their own (`chaos.network`).

The daemons are started by their own commands, as on real machines, each with the default ports.
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

from chaos.network import Network

MASTERS = ("m1", "m2", "m3")
CHUNKSERVERS = ("cs1", "cs2")
MOUNTS = ("a", "b", "r")
RAFT, CLIENTS, WEB = 9418, 9421, 9425
_START_S, _END_S = 40.0, 20.0
# The kernel may keep attributes for a moment, but asks the mount for every name.
_MOUNT_OPTIONS = "mfsentrycacheto=0,mfsdirentrycacheto=0,mfsattrcacheto=1"


class NetCluster:
    """Use as a context: up on entry, down on exit, whatever happens in between.

    `master`: what Python runs as a master; it gets the options of `raftfs-master`.
    """

    def __init__(
        self, folder: Path, network: Network, master: list[str] | None = None,
        mounts: tuple[str, ...] = MOUNTS,
    ) -> None:  # fmt: skip
        self.folder = folder
        self._mounts = mounts
        self.network = network
        self._master = [sys.executable, *(master or ["-m", "raftfs.cli.master"])]
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "NetCluster":
        (self.folder / "log").mkdir(parents=True, exist_ok=True)
        key = self.folder / "cluster.key"
        if not key.exists():
            subprocess.run([sys.executable, "-m", "raftfs.cli.raftfs", "keygen", str(key)],
                           check=True, timeout=_START_S, stdout=subprocess.DEVNULL)  # fmt: skip
        try:
            for name in (*MASTERS, *CHUNKSERVERS):
                self.start(name)
            self.wait("a leader with both chunkservers", self._ready)
            for name in self._mounts:
                self.mount(name)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        for name in self._mounts:
            self._unmount(name)
        for process in self._running.values():
            process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in self._running.values():
            _gone(process)
        self._running.clear()

    # --- processes

    def start(self, name: str) -> None:
        """Start a master or a chunkserver, with the data that it has."""
        self._launch(name, self._words(name))

    def _launch(self, name: str, words: list[str]) -> None:
        source = str(Path(__file__).parent.parent)
        path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
        with open(self.folder / "log" / f"{name}.log", "ab") as log:
            self._running[name] = subprocess.Popen(
                self.network.inside(name, words), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                cwd="/", env={**os.environ, "PYTHONPATH": path}, start_new_session=True,
            )  # fmt: skip

    def _words(self, name: str) -> list[str]:
        address, key = self.network.address(name), str(self.folder / "cluster.key")
        hosts = ",".join(self.network.address(m) for m in MASTERS)
        if name in MASTERS:
            return [*self._master, "--peers", hosts, "--name", address, "--data",
                    str(self.folder / name), "--key", key]  # fmt: skip
        return [sys.executable, "-m", "raftfs.chunk.main", "-H", hosts, "--announce", address,
                "--key", key, "--hdd", str(self.folder / name)]  # fmt: skip

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal; one that ends the process is waited for."""
        process = self._running[name]
        process.send_signal(number)
        if number in (signal.SIGKILL, signal.SIGTERM):
            del self._running[name]
            _gone(process)

    def ended(self) -> list[str]:
        """Processes that ended by themselves, one sentence each."""
        return [f"{name} ended with status {p.returncode}" for name, p in self._running.items()
                if p.poll() is not None]  # fmt: skip

    # --- mounts

    def root(self, mount: str) -> Path:
        """Where it is mounted."""
        return self.folder / f"mnt-{mount}"

    def mount(self, name: str) -> None:
        """Mount the file system; gives when it is there."""
        root = self.root(name)
        root.mkdir(exist_ok=True)
        hosts = ",".join(self.network.address(m) for m in MASTERS)
        self._launch(name, [sys.executable, "-m", "raftfs.mount.main", str(root), "-H", hosts, "-f",
                            "-o", _MOUNT_OPTIONS])  # fmt: skip
        self.wait(f"mount {name}", lambda: _mounted(root) and not self.ended())

    def remount(self, name: str) -> None:
        """A new mount daemon with empty caches."""
        self._unmount(name)
        Path("/proc/sys/vm/drop_caches").write_text("3")
        self.mount(name)

    def _unmount(self, name: str) -> None:
        root = self.root(name)
        if _mounted(root):
            done = subprocess.run(["timeout", "-s", "KILL", str(_END_S), "umount", str(root)],
                                  check=False, capture_output=True)  # fmt: skip
            if done.returncode:
                subprocess.run(["umount", "-l", str(root)], check=False, timeout=_END_S)
        process = self._running.pop(name, None)
        if process is not None:
            process.terminate()
            _gone(process)

    # --- what it says of itself

    def view(self, master: str) -> dict[str, Any] | None:
        """A master's own status, None if it does not answer."""
        url = f"http://{self.network.address(master)}:{WEB}/api/status"
        try:
            with urllib.request.urlopen(url, timeout=1.0) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except (OSError, ValueError):
            return None

    def leader(self) -> tuple[str, int]:
        """Who leads in the newest term, and the term. Waits until there is one."""
        found: list[tuple[int, str]] = []

        def known() -> bool:
            views = {name: self.view(name) for name in MASTERS}
            found[:] = [(v["leader"]["term"], name) for name, v in views.items()
                        if v and v["role"] == "leader"]  # fmt: skip
            return bool(found)

        self.wait("a leader", known)
        term, name = max(found)
        return name, term

    def _ready(self) -> bool:
        views = [self.view(name) for name in MASTERS]
        return any(v and v["role"] == "leader" for v in views) and all(
            v and sum(s["connected"] for s in v["servers"]) == len(CHUNKSERVERS) for v in views
        )

    def wait(self, what: str, ready: Any) -> None:
        """Until `ready()`; RuntimeError if it takes too long or a process has ended."""
        until = time.monotonic() + _START_S
        while not ready():
            ended = self.ended()
            if ended or time.monotonic() > until:
                why = "; ".join(ended) or f"not within {_START_S:g} s"
                raise RuntimeError(f"waiting for {what}: {why}; see {self.folder / 'log'}")
            time.sleep(0.05)


def _gone(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(_END_S)


def _mounted(path: Path) -> bool:
    return f" {path} " in Path("/proc/self/mountinfo").read_text()
