"""Structured logs: one event per line on standard error, with the id of the request."""

import logging
import sys
from typing import Literal, TextIO

import structlog
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import EventDict, WrappedLogger


def _escape_control_characters(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Escape characters that would control a terminal or change the text direction; clients choose paths and names."""
    for name, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            event[name] = "".join(
                character if character.isprintable() else character.encode("unicode_escape").decode()
                for character in value
            )
    return event


def _shorten_pool_errors(record: logging.LogRecord) -> bool:
    """Log in one line that a connection of the database pool could not be reset or closed; it is replaced."""
    if record.name.startswith("sqlalchemy.pool") and record.exc_info and record.exc_info[1] is not None:
        error = record.exc_info[1]
        reason = str(error).partition("\n")[0]
        record.msg, record.args = f"{record.getMessage()}: {type(error).__name__}: {reason}", ()
        record.exc_info = record.exc_text = None
    return True


class _StandardError(logging.StreamHandler[TextIO]):
    """Writes to what is standard error at the time of the event; a program may replace and close it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        """The current standard error."""
        return sys.stderr


def configure_logs(log_format: Literal["json", "console"], level: str) -> None:
    """Format the events of structlog and of the standard library in the same way."""
    shared: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # Tracebacks without local variables, which contain images and headers of clients and take seconds to print.
    renderer: list[structlog.types.Processor] = (
        [
            structlog.processors.ExceptionRenderer(ExceptionDictTransformer(show_locals=False)),
            structlog.processors.JSONRenderer(ensure_ascii=True),
        ]
        if log_format == "json"
        else [
            _escape_control_characters,
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            ),
        ]
    )
    structlog.configure(
        # First, so that an event below the level costs almost nothing.
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = _StandardError()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
        )
    )
    # open_clip logs each step of loading on the root logger, so its level cannot be set by the name of a logger.
    handler.addFilter(lambda record: record.name != "root" or record.levelno >= logging.WARNING)
    handler.addFilter(_shorten_pool_errors)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # These loggers repeat events of this service, or log details for their own developers.
    for name in (
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
        logging.getLogger(name).setLevel(logging.WARNING)
    # These have handlers of their own, which would write each event twice or in another format.
    for library in ("uvicorn", "uvicorn.error", "huggingface_hub", "transformers"):
        logger = logging.getLogger(library)
        logger.handlers[:] = []
        logger.propagate = True
