"""Structured logs: one event per line on standard error, with the request's id."""

import logging
import sys
from typing import Literal

import structlog
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import EventDict, WrappedLogger


def _escaped(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Make what would steer a terminal, or turn its writing round, visible: callers choose paths and names."""
    for name, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            event[name] = "".join(
                each if each.isprintable() else each.encode("unicode_escape").decode() for each in value
            )
    return event


def configure_logs(log_format: Literal["json", "console"], level: str) -> None:
    """Send structlog's and the standard library's events through one format."""
    shared: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # Tracebacks without local variables: those hold callers' pictures and headers, and printing them takes seconds.
    renderer: list[structlog.types.Processor] = (
        [
            structlog.processors.ExceptionRenderer(ExceptionDictTransformer(show_locals=False)),
            structlog.processors.JSONRenderer(ensure_ascii=True),
        ]
        if log_format == "json"
        else [
            _escaped,
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            ),
        ]
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
        )
    )
    # open_clip tells each step of loading on the root logger itself, which cannot be quietened by a name.
    handler.addFilter(lambda record: record.name != "root" or record.levelno >= logging.WARNING)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Each of these tells on its own what this service tells once, or speaks to its own developers.
    for chatty in (
        "uvicorn.access",
        "httpx",
        "httpcore",
        "httpcore2",
        "httpx2",
        "alembic",
        "PIL",
        "aiosqlite",
        "faiss",
        "urllib3",
    ):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    for server in ("uvicorn", "uvicorn.error"):
        logger = logging.getLogger(server)
        logger.handlers[:] = []
        logger.propagate = True
