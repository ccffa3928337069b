"""OpenTelemetry spans for the stages of a request; without an exporter of traces they cost nothing.

The attributes of a span are the kind and the amount of work, never labels, captions or image data.
"""

import time
from contextlib import AbstractContextManager, nullcontext

from opentelemetry import trace

_tracer = trace.get_tracer("deixis")
_NO_SPAN = nullcontext()


def _is_traced() -> bool:
    """Return whether spans go anywhere: a provider is configured only if traces are exported."""
    return not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)


def stage(name: str, **attributes: str | int | float) -> AbstractContextManager[object]:
    """Return a context manager that starts the span of a stage and records exceptions."""
    return _tracer.start_as_current_span(name, attributes=attributes) if _is_traced() else _NO_SPAN


def past_stage(name: str, began: float, ended: float, **attributes: str | int | float) -> None:
    """Record the span of a stage that has ended, with times of ``time.perf_counter``."""
    if not _is_traced():
        return
    offset_ns = time.time_ns() - time.perf_counter_ns()
    span = _tracer.start_span(name, start_time=offset_ns + int(began * 1e9), attributes=attributes)
    span.end(offset_ns + int(ended * 1e9))


def trace_id() -> str | None:
    """Return the id of the current trace as 32 hexadecimal digits; None without a trace."""
    context = trace.get_current_span().get_span_context()
    return f"{context.trace_id:032x}" if context.is_valid else None
