"""Processes of a cluster on this machine: started, recognised, signalled, ended. By pid, never by
name.

A pid alone can be recycled; with the process's start time it cannot be mistaken.
"""

import contextlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import raftfs
from raftfs.errors import UserError

_UMOUNT_TIMEOUT_S = 15.0


def start_time(pid: int) -> int:
    """Clock ticks after boot at which the process began; 0 if it is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    fields = text.rpartition(")")[2].split()
    return 0 if fields[0] in "ZX" else int(fields[19])


def state_of(pid: int, started: int) -> str:
    """`running`, `paused` (SIGSTOP) or `stopped` (no such process any more)."""
    if not pid or start_time(pid) != started:
        return "stopped"
    text = Path(f"/proc/{pid}/stat").read_text()
    return "paused" if text.rpartition(")")[2].split()[0] == "T" else "running"


def launch(argv: list[str], log: Path) -> tuple[int, int]:
    """Start a daemon with its output appended to a file; gives pid and start time.

    It runs the same raftfs as this command, also from a source tree that is not installed.
    """
    source = str(Path(raftfs.__file__).parent.parent)
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    with open(log, "ab") as out:
        child = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
            cwd="/", env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
    return child.pid, start_time(child.pid)


def send(pid: int, started: int, number: signal.Signals) -> bool:
    """Signal exactly this process; False if it is gone."""
    if not pid or start_time(pid) != started:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False


def wait_gone(pid: int, started: int, timeout_s: float) -> bool:
    """Whether the process ended within the time."""
    until = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)  # it may be our own child
        if not pid or start_time(pid) != started:
            return True
        if time.monotonic() > until:
            return False
        time.sleep(0.02)


def end(pid: int, started: int, timeout_s: float = 5.0) -> None:
    """TERM, then KILL. UserError if even that does not end it (it hangs in the kernel)."""
    send(pid, started, signal.SIGCONT)
    send(pid, started, signal.SIGTERM)
    if wait_gone(pid, started, timeout_s):
        return
    send(pid, started, signal.SIGKILL)
    if not wait_gone(pid, started, timeout_s):
        raise UserError(f"process {pid} does not end: it is stuck in the kernel")


def mounted_at(path: Path) -> str:
    """The FUSE connection's number of what is mounted exactly there, "" if nothing is.

    Reads only /proc: looking at the mountpoint itself could wait for a dead daemon for ever.
    """
    wanted = str(path)
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields = line.split()
        if re.sub(r"\\([0-7]{3})", lambda o: chr(int(o[1], 8)), fields[4]) == wanted:
            return fields[2].partition(":")[2]
    return ""


def unmount(path: Path) -> None:
    """Unmount, at once if nothing uses it, else detached (the daemon still serves what is open).

    A daemon that does not answer keeps umount waiting in the kernel: then the connection is
    aborted, which fails whatever waits for it. UserError if it is mounted even then.
    """
    root = os.geteuid() == 0
    for lazily in ([], ["-l"]):
        connection = mounted_at(path)
        if not connection:
            return
        tool = ["umount", "-c"] if root else ["fusermount3", "-u"]
        if lazily and not root:
            lazily = ["-z"]
        child = subprocess.Popen(
            [*tool, *lazily, str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            child.wait(_UMOUNT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            abort(connection)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_UMOUNT_TIMEOUT_S)
    if mounted_at(path):
        raise UserError(f"{path} cannot be unmounted: something still uses it (see fuser -m)")


def abort(connection: str) -> None:
    """Fail everything that waits for a FUSE daemon which does not answer any more."""
    with contextlib.suppress(OSError):
        Path(f"/sys/fs/fuse/connections/{connection}/abort").write_text("1")
