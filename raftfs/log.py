"""How all programs log: human-readable on a terminal, one JSON object a line otherwise.

Event names are short, values go as key=value (session, chunk, server, ...). While a request is
being served, every line names it: `request` is the caller's address and its number of the request,
the same number under which the caller knows it.
"""

import logging
import sys
from collections.abc import MutableMapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import structlog

# The request that is being served: (host, port) of the caller, and its number. Set by wire/rpc.
SERVED: ContextVar[tuple[tuple[str, int], int] | None] = ContextVar("served", default=None)


def _name_request(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    request = SERVED.get()
    if request is not None:
        (host, port), number = request
        event.setdefault("request", f"{host}:{port}/{number}")
    return event


def setup(program: str, level: str = "info", file: Path | None = None) -> None:
    """Configure structlog and the standard library's loggers to write to stderr, or to `file`."""
    stream = open(file, "a", buffering=1, encoding="utf-8") if file else sys.stderr  # noqa: SIM115
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        _name_request,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        cache_logger_on_first_use=True,
    )
    last: list[structlog.typing.Processor] = [
        structlog.stdlib.ProcessorFormatter.remove_processors_meta
    ]
    if stream.isatty():
        last.append(structlog.dev.ConsoleRenderer())
    else:
        last += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=last)
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # pysyncobj logs election trivia of its own; what matters is logged by our layer.
    logging.getLogger("pysyncobj").setLevel(logging.ERROR)
    structlog.contextvars.bind_contextvars(program=program)
