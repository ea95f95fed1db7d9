"""A cluster for one scenario, driven by the commands that a user would type."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What stopping, starting and founding may say on the way; anything else must be announced.
_ALWAYS = ("chunkserver lost",)
# What killing a master or a chunkserver has made the others say, depending on the moment: writers
# and orders meet the dead, readers meet copies that have just been destroyed as surplus.
KILLED = (
    "chain broken", "write refused", "write connection lost", "order failed", "copy not readable",
)  # fmt: skip


class ScenarioCluster:
    """Verbs of `raftfs` and the mfs* tools, with time limits."""

    def __init__(self, folder: Path, port_base: int) -> None:
        self.dir = folder / "cluster"
        self.mnt = folder / "mnt"
        self.port_base = port_base
        self._expected: list[str] = list(_ALWAYS)

    def raftfs(self, *words: str, ok: bool = True, timeout_s: float = 90) -> str:
        """Run `raftfs ...`; gives stdout and stderr. Checks the exit status."""
        if words[0] == "cluster":
            words = (*words[:2], "--dir", str(self.dir), *words[2:])
        done = subprocess.run(
            ["timeout", "-s", "KILL", str(timeout_s), sys.executable, "-m", "raftfs.cli.raftfs",
             *words],
            capture_output=True, text=True, cwd=self.mnt.parent,
        )  # fmt: skip
        said = done.stdout + done.stderr
        assert (done.returncode == 0) is ok, f"raftfs {words}: {done.returncode}\n{said}"
        assert "Traceback" not in said, said
        return said

    def status(self) -> dict[str, Any]:
        """`raftfs cluster status --json`."""
        status: dict[str, Any] = json.loads(self.raftfs("cluster", "status", "--json"))
        return status

    def remount(self) -> None:
        """A new mount daemon: nothing is cached."""
        subprocess.run(["timeout", "-s", "KILL", "60", "umount", str(self.mnt)], check=True)
        Path("/proc/sys/vm/drop_caches").write_text("3")
        self.raftfs("cluster", "mount", str(self.mnt))

    def expect(self, *events: str) -> None:
        """These log events are part of the story."""
        self._expected += events

    def unexpected_log_lines(self) -> list[str]:
        """Warnings and errors that nobody announced, and every traceback."""
        found = []
        for path in sorted((self.dir / "log").glob("*.log")):
            for line in path.read_text(errors="replace").splitlines():
                if line.startswith("Traceback"):
                    found.append(f"{path.name}: {line}")
                if not line.startswith("{"):
                    continue
                record = json.loads(line)
                loud = record.get("level") in ("warning", "error", "critical")
                if loud and record["event"] not in self._expected:
                    found.append(f"{path.name}: {line}")
        return found

    def wait(self, what: str, ready: Callable[[], bool], timeout_s: float = 60) -> None:
        """Until `ready()`; fails the test after `timeout_s`."""
        until = time.monotonic() + timeout_s
        while not ready():
            assert time.monotonic() < until, f"{what}: not within {timeout_s} s"
            time.sleep(0.1)
