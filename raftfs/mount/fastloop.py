"""Runs pyfuse3 on asyncio without going back to the event loop for every request.

pyfuse3 takes its tasks, locks and waiting from a module global named `trio`; `install` puts an
object of ours there. Measured, a request then costs 6 us of CPU instead of 25 (fuse notes,
section 1): a worker that finds the device readable goes on at once, up to `_BURST` times.

Rules, each found by breaking it:

- An event of the loop may be stale: another worker took the request meanwhile. It is checked again
  with poll(), else the worker would block the whole loop in read().
- One worker is woken at a time; until it has run, no other one polls.
- When the device reports an error (unmounted), all workers are woken: each must see it to end.
- An exception that escapes from a worker must not silently cost a worker: it is logged and the
  worker begins anew.

Bound to pyfuse3 3.x internals; `install` checks that the global is there.
"""

import asyncio
import select
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pyfuse3
import structlog

log = structlog.get_logger("raftfs.fuse")

_BURST = 64  # requests that a worker takes in a row before it lets the loop run
_FAILURES_MAX = 1_000  # of one worker; a device that fails for good must not be read for ever
_ENDED = select.POLLERR | select.POLLHUP | select.POLLNVAL


class ClosedResourceError(Exception):
    """pyfuse3's word for: the device is being closed, end your loop."""


class _NoLock:
    """pyfuse3 serialises its readers with a lock; `_Device.wait_readable` needs none."""

    async def __aenter__(self) -> None:
        return None

    async def __aexit__(self, *_exc: object) -> None:
        return None


class _Nursery:
    """pyfuse3's workers. Ends when all of them have ended."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "_Nursery":
        return self

    def start_soon(self, worker: Callable[..., Any], *args: Any, name: str = "") -> None:
        """Run a worker; should it fail, say so and run it again (but not for ever)."""

        async def guarded() -> None:
            for _ in range(_FAILURES_MAX):
                try:
                    await worker(*args)
                    return
                except Exception:
                    log.exception("fuse worker failed", worker=name)
                    await asyncio.sleep(0.01)

        task = asyncio.get_running_loop().create_task(guarded(), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def __aexit__(self, *_exc: object) -> None:
        while self._tasks:
            await asyncio.wait(list(self._tasks))


class _Device:
    """Waiting for requests on the FUSE device."""

    def __init__(self) -> None:
        self._fd = -1
        self._poll: Callable[[int], list[tuple[int, int]]] = lambda timeout: []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiters: list[asyncio.Future[None]] = []
        self._watched = False
        self._waking = False  # a worker was woken and has not run yet
        self._taken = 0

    async def wait_readable(self, fd: int) -> None:
        """Return when the device has a request (or has ended). Called by idle workers."""
        if fd != self._fd:
            self._attach(fd)
        while True:
            events = [] if self._waking or self._taken >= _BURST else self._poll(0)
            if events:
                self._taken += 1
                if events[0][1] & _ENDED:
                    self._wake_all()
                return
            self._taken = 0
            await self._wait()

    def notify_closing(self, _fd: int) -> None:
        """pyfuse3.terminate(): send the idle workers home."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_exception(ClosedResourceError())
        self._unwatch()

    def _attach(self, fd: int) -> None:
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        self._fd, self._poll = fd, poller.poll
        self._loop = asyncio.get_running_loop()

    async def _wait(self) -> None:
        assert self._loop is not None
        waiter = self._loop.create_future()
        self._waiters.append(waiter)
        if not self._watched:
            self._watched = True
            self._loop.add_reader(self._fd, self._readable)
        try:
            await waiter
        finally:
            self._waking = False

    def _readable(self) -> None:
        if self._waking:
            return
        events = self._poll(0)
        if not events:
            return  # stale: somebody has the request already
        if events[0][1] & _ENDED:
            self._wake_all()
            return
        while self._waiters:
            waiter = self._waiters.pop()
            if not waiter.done():
                self._waking = True
                waiter.set_result(None)
                return
        self._unwatch()  # all workers are busy; the next idle one watches again

    def _wake_all(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._unwatch()

    def _unwatch(self) -> None:
        if self._watched and self._loop is not None:
            self._watched = False
            self._loop.remove_reader(self._fd)


def install() -> None:
    """Make pyfuse3 run on the current kind of loop. Call before `pyfuse3.init`."""
    if not hasattr(pyfuse3, "trio"):
        raise ImportError("this pyfuse3 cannot be driven by raftfs: version 3.x is needed")
    device = _Device()
    shim = SimpleNamespace(
        Lock=_NoLock,
        ClosedResourceError=ClosedResourceError,
        open_nursery=_Nursery,
        current_task=lambda: SimpleNamespace(name="fuse"),
        current_trio_token=lambda: None,
        wait_readable=device.wait_readable,
        notify_closing=device.notify_closing,
    )
    shim.lowlevel = shim
    shim.from_thread = shim
    pyfuse3.trio = shim
