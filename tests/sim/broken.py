"""How an observer ends a story."""

import asyncio
from contextlib import suppress
from typing import Any


class Broken(BaseException):
    """A promise was not kept. No `except Exception` of a node may catch it; nor may a task keep it
    to itself until somebody asks for its result, so the loop is told at once.
    """

    def __init__(self, what: str) -> None:
        super().__init__(what)
        with suppress(RuntimeError):  # found outside of a loop
            loop: Any = asyncio.get_running_loop()
            if getattr(loop, "error", self) is None:
                loop.error = self


def must(holds: bool, what: str) -> None:
    """Broken unless it holds."""
    if not holds:
        raise Broken(what)
