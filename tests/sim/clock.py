"""An event loop under virtual time, and the processes that live in it.

A process is a context variable: whatever a process schedules carries it on, so the loop knows whose
each event is. Events of a killed process never run; those of a paused one wait, and run all at once
when it goes on. When nothing is ready the clock jumps to the next timer. Threads are events, too,
at a later moment that the seed decides, so that a kill can come before them.
"""

import asyncio
import heapq
import inspect
import random
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context, ContextVar, copy_context
from typing import Any

BEGINNING = 1000.0
USUAL_THREAD_S = (0.0005, 0.02)
_LAST_WORDS = 9
STORM_EVENTS = 20_000  # in a second: nodes keep each other busy for nothing


class Killed(BaseException):
    """Ends what the process is doing, and nothing in the process may catch it."""


class Process:
    """A life of a node, from start to kill."""

    def __init__(
        self, name: str, host: str, chance: random.Random, after: Callable[[], None]
    ) -> None:
        """`after` is called after each event of the process. `host`: the machine it runs on."""
        self.name, self.host, self.after, self.chance = name, host, after, chance
        self.alive = True
        self.paused = False
        self.thread_s = USUAL_THREAD_S  # how long a thread takes for its work
        self.behind_s = 0.0  # how long its clock stood still with it, as a suspended machine's
        self.backlog: list[asyncio.Handle] = []
        self.here: Context = copy_context()  # what is run in it belongs to this process
        self.here.run(PROCESS.set, self)


PROCESS: ContextVar[Process | None] = ContextVar("process", default=None)


def _close(work: Any) -> None:
    """For good, and what it would have awaited if it had ever begun."""
    if inspect.getcoroutinestate(work) == inspect.CORO_CREATED:
        for given in work.cr_frame.f_locals.values():
            if inspect.iscoroutine(given):
                _close(given)
    for _ in range(_LAST_WORDS):  # a `finally` may await something
        if inspect.getcoroutinestate(work) == inspect.CORO_CLOSED:
            return
        with suppress(BaseException):
            work.close()


class VirtualLoop(asyncio.BaseEventLoop):
    """Single-threaded, no files, no sockets; the same seed gives the same order of events."""

    def __init__(self) -> None:
        super().__init__()
        self.now = BEGINNING
        self.events = 0
        self.tcp: Any = None  # what connections are made of
        self._counted_at = 0.0
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._timer = 0
        self.error: BaseException | None = None
        self._tasks: list[asyncio.Task[Any]] = []  # a collected task would run its `finally`
        self.set_task_factory(self._make_task)
        self.set_exception_handler(self._failed)

    def time(self) -> float:
        """Virtual seconds."""
        return self.now

    def monotonic(self) -> float:
        """What the clock of whoever asks shows."""
        process = PROCESS.get()
        return self.now if process is None else self.now - process.behind_s

    def _process_events(self, event_list: Any) -> None:
        """There are no files."""

    def _write_to_self(self) -> None:
        """There is no other thread."""

    def _make_task(self, loop: Any, work: Any, **more: Any) -> "asyncio.Task[Any]":
        task = asyncio.Task(work, loop=loop, **more)
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        self._tasks.append(task)
        return task

    def _failed(self, loop: Any, context: dict[str, Any]) -> None:
        error = context.get("exception")
        never_asked = "never retrieved" in context["message"]
        if self.error is None and not isinstance(error, Killed) and not never_asked:
            self.error = error or RuntimeError(context["message"])

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:
        """A thread: all its work happens at one later moment."""
        future = self.create_future()
        process = PROCESS.get()
        assert process is not None

        def work() -> None:
            if future.cancelled():
                return
            try:
                future.set_result(func(*args))
            except Exception as e:
                future.set_exception(e)

        self.call_later(process.chance.uniform(*process.thread_s), work)
        return future

    async def create_connection(  # type: ignore[override]
        self, protocol_factory: Any, host: str, port: int
    ) -> Any:
        """As asyncio's, over the simulated network."""
        return await self.tcp.connect(protocol_factory, host, port)

    async def create_server(  # type: ignore[override]
        self, protocol_factory: Any, host: str, port: int, *, backlog: int
    ) -> Any:
        """As asyncio's, on the simulated network."""
        return self.tcp.listen(protocol_factory, port)

    # --- what runs next; written for speed, as half of a story's time passes here

    def call_soon(self, callback: Any, *args: Any, context: Context | None = None) -> Any:
        """As asyncio's."""
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)  # type: ignore[attr-defined]
        return handle

    def call_at(
        self, when: float, callback: Any, *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """As asyncio's; what is due at the same time runs in the order of asking."""
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._timer += 1
        heapq.heappush(self._timers, (when, self._timer, handle))
        return handle

    def _run_once(self) -> None:
        ready, timers = self._ready, self._timers  # type: ignore[attr-defined]
        while timers and timers[0][2]._cancelled:  # type: ignore[attr-defined]
            heapq.heappop(timers)
        if not ready and timers:
            self.now = max(self.now, timers[0][0])
        while timers and timers[0][0] <= self.now:
            ready.append(heapq.heappop(timers)[2])
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle._cancelled:
                self._run_handle(handle)
                if self.error is not None:
                    self.stop()

    def _run_handle(self, handle: Any) -> None:
        process = handle._context.get(PROCESS)
        if process is None:
            handle._run()
        elif process.alive:
            if process.paused:
                process.backlog.append(handle)
                return
            self._count()
            handle._run()
            if process.alive:
                process.after()

    def _count(self) -> None:
        self.events += 1
        if self.events % STORM_EVENTS == 0:
            if self.now - self._counted_at < 1.0 and self.error is None:
                self.error = AssertionError(f"a storm: {STORM_EVENTS} events in less than 1 s")
            self._counted_at = self.now

    def bury(self) -> None:
        """The end: what was begun and can never go on is closed here and now.

        Left to the garbage collector it would be closed wherever that happens to strike, and be
        complained about there. What it raises while it is closed belongs to the dead.
        """
        for task in self._tasks:
            _close(task.get_coro())
        self._tasks.clear()
        self.close()

    def resume(self, process: Process) -> None:
        """Everything that waited for a paused process happens now."""
        process.paused = False
        backlog, process.backlog = process.backlog, []
        self._ready.extend(backlog)  # type: ignore[attr-defined]
