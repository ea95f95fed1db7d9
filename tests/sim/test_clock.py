"""The virtual loop leaves nothing behind that could raise wherever it is garbage-collected."""

import asyncio
import inspect
import random
from collections.abc import Coroutine
from typing import Any

from tests.sim.clock import Process, VirtualLoop


async def _never_begun() -> None:
    raise AssertionError("its process is dead")


async def _around(work: Coroutine[Any, Any, None]) -> None:
    await work


async def _slow_to_end(said: list[str]) -> None:
    try:
        await asyncio.sleep(1e9)
    finally:
        said.append("closing")
        await asyncio.sleep(1.0)


def test_what_killed_processes_and_a_sudden_end_leave_is_closed_at_once() -> None:
    """Never begun coroutines once complained from within whatever code was collecting garbage."""
    loop, said = VirtualLoop(), list[str]()
    killed = Process("a", "a", random.Random(1), lambda: None)
    inner = _never_begun()
    left: list[Coroutine[Any, Any, None]] = [_around(inner), _slow_to_end(said), inner]

    async def story() -> None:
        loop.create_task(left[1])
        await asyncio.sleep(1.0)
        killed.here.run(loop.create_task, left[0])
        killed.alive = False
        await asyncio.sleep(1.0)

    loop.run_until_complete(story())
    assert [inspect.getcoroutinestate(c) for c in left] == [
        inspect.CORO_CREATED, inspect.CORO_SUSPENDED, inspect.CORO_CREATED,
    ]  # fmt: skip
    loop.bury()
    assert [inspect.getcoroutinestate(c) for c in left] == [inspect.CORO_CLOSED] * 3
    assert said == ["closing"] and loop.is_closed()
