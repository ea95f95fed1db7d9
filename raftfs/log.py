"""How all programs log: human-readable on a terminal, one JSON object a line otherwise.

Event names are short, values go as key=value. Context (request id, session, chunk) that was bound
with `structlog.contextvars.bind_contextvars` appears in every line of that task.
"""

import logging
import sys
from pathlib import Path

import structlog


def setup(program: str, level: str = "info", file: Path | None = None) -> None:
    """Configure structlog and the standard library's loggers to write to stderr, or to `file`."""
    stream = open(file, "a", buffering=1, encoding="utf-8") if file else sys.stderr  # noqa: SIM115
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
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
