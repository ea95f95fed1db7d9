"""A cluster of the story's own, driven by `raftfs cluster` as an administrator would."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RAFTFS = [sys.executable, "-m", "raftfs.cli.raftfs"]
TIMEOUT_S = 120
_LEADER_S = 30.0


class Cluster:
    """Use as a context: up on entry, down (and wiped, unless kept) on exit."""

    def __init__(self, folder: Path, port_base: int, *, keep: bool = False) -> None:
        self.folder = folder
        self.mountpoint = folder / "mnt"
        self._port_base = port_base
        self._keep = keep

    def run(self, verb: str, *words: str) -> str:
        """Run one verb; CalledProcessError, with its words shown, if it fails."""
        command = [*RAFTFS, "cluster", verb, "--dir", str(self.folder / "cluster"), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        if done.returncode:
            print(done.stdout + done.stderr, file=sys.stderr)
            done.check_returncode()
        return done.stdout

    def __enter__(self) -> "Cluster":
        self.run("up", "--port-base", str(self._port_base), "--mount", str(self.mountpoint))
        return self

    def __exit__(self, *exc: object) -> None:
        self.run("down", *([] if self._keep else ["--wipe"]))

    def status(self) -> dict[str, Any]:
        """What `raftfs cluster status --json` says."""
        status: dict[str, Any] = json.loads(self.run("status", "--json"))
        return status

    def leader(self) -> tuple[str, int]:
        """Who leads, and the term. Waits until somebody does; TimeoutError."""
        until = time.monotonic() + _LEADER_S
        while time.monotonic() < until:
            status = self.status()
            if status["leader"]:
                return status["leader"], status["term"]
            time.sleep(0.1)
        raise TimeoutError(f"no leader within {_LEADER_S:g} s")

    def remount(self) -> None:
        """A new mount daemon with empty caches."""
        subprocess.run(["umount", str(self.mountpoint)], check=True, timeout=60)
        Path("/proc/sys/vm/drop_caches").write_text("3")
        self.run("mount", str(self.mountpoint))

    def tool(self, *words: str) -> str:
        """Run another raftfs command."""
        done = subprocess.run(
            [*RAFTFS, *words], capture_output=True, text=True, timeout=TIMEOUT_S, check=True
        )
        return done.stdout
