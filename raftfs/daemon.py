"""How every daemon starts and stops: one loop, signals, the lock of its folder, its last words.

Ground floor. A `UserError` becomes one sentence on stderr and exit status 1; anything else that
escapes is a bug and keeps its traceback. SIGTERM and SIGINT set the stop event.
"""

import asyncio
import contextlib
import fcntl
import gc
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import structlog
import uvloop

from raftfs import log as logging_setup
from raftfs.errors import UserError

log = structlog.get_logger("raftfs.daemon")

Stop = asyncio.Event
# A large heap of long-lived rows makes full collections long: rarer ones keep the loop's stalls
# short (measured on the prototypes: tens of milliseconds for a million objects).
_GC_THRESHOLDS = (50_000, 50, 1_000)


def run(program: str, serve: Callable[[Stop], Awaitable[None]], *, level: str = "info") -> int:
    """Run `serve(stop)` under uvloop until it returns. Gives the exit status."""
    logging_setup.setup(program, level=level)
    collect_rarely()

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await serve(stop)
        log.info("stopped")

    try:
        uvloop.run(main())
    except UserError as e:
        say(program, e)
        return e.exit_status
    return 0


def collect_rarely() -> None:
    """Have the garbage collector run as it does in every daemon."""
    gc.set_threshold(*_GC_THRESHOLDS)


async def until(stop: Stop, failed: "asyncio.Future[None]") -> None:
    """Return when `stop` is set; raise what `failed` resolves with, if that comes first."""
    stopping = asyncio.ensure_future(stop.wait())
    try:
        either: set[asyncio.Future[Any]] = {stopping, failed}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if failed.done():
            failed.result()
    finally:
        stopping.cancel()


def say(program: str, error: UserError) -> None:
    """The one sentence that a user gets to see."""
    print(f"{program}: {error}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def data_folder(path: Path) -> Iterator[Path]:
    """Make the folder if needed and hold its lock, so that two daemons never share it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        fd = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as e:
        raise UserError(f"data folder {path} cannot be used: {e.strerror}") from None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
            raise UserError(
                f"data folder {path} is in use by another daemon (pid {holder or 'unknown'})"
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield path
    finally:
        os.close(fd)
