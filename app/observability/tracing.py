"""Spans of the stages of a request, for whoever set up OpenTelemetry; for others they cost a few microseconds.

A span is told what kind of work it was and how much, and never a label, a caption or anything of an image.
"""

import time
from contextlib import AbstractContextManager

from opentelemetry import trace
from opentelemetry.trace import Span

_tracer = trace.get_tracer("deixis")


def stage(name: str, **attributes: str | int | float) -> AbstractContextManager[Span]:
    """Return the span of a stage that is entered now; what is raised in it is noted."""
    return _tracer.start_as_current_span(name, attributes=attributes)


def past_stage(name: str, began: float, ended: float, **attributes: str | int | float) -> None:
    """Tell of a stage that is over, by ``time.perf_counter``."""
    offset_ns = time.time_ns() - time.perf_counter_ns()
    span = _tracer.start_span(name, start_time=offset_ns + int(began * 1e9), attributes=attributes)
    span.end(offset_ns + int(ended * 1e9))


def trace_id() -> str | None:
    """Return the id of the trace that the caller is in, as 32 hexadecimal digits; None outside of one."""
    context = trace.get_current_span().get_span_context()
    return f"{context.trace_id:032x}" if context.is_valid else None
