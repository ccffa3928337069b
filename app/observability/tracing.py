"""OpenTelemetry spans for the stages of a request; without an exporter of traces they cost nothing.

The attributes of a span are the kind and the amount of work, never labels, captions or image data.
"""

import time
from contextlib import AbstractContextManager, nullcontext

from opentelemetry import trace

_tracer = trace.get_tracer("deixis")
_NO_SPAN = nullcontext()
_is_enabled = False


def enable_stages() -> None:
    """Start spans from now on; called where traces are exported."""
    global _is_enabled  # noqa: PLW0603 - as the provider, which is that of the process
    _is_enabled = True


def stage(name: str, **attributes: str | int | float) -> AbstractContextManager[object]:
    """Return a context manager that starts the span of a stage and records exceptions."""
    return _tracer.start_as_current_span(name, attributes=attributes) if _is_enabled else _NO_SPAN


def past_stage(name: str, began: float, ended: float, **attributes: str | int | float) -> None:
    """Record the span of a stage that has ended, with times of ``time.perf_counter``."""
    if not _is_enabled:
        return
    offset_ns = time.time_ns() - time.perf_counter_ns()
    span = _tracer.start_span(name, start_time=offset_ns + int(began * 1e9), attributes=attributes)
    span.end(offset_ns + int(ended * 1e9))


def trace_id() -> str | None:
    """Return the id of the current trace as 32 hexadecimal digits; None without a trace."""
    if not _is_enabled:
        return None
    context = trace.get_current_span().get_span_context()
    return f"{context.trace_id:032x}" if context.is_valid else None
