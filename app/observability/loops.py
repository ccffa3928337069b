"""Keeps the loops running that a process needs as long as it lives, such as those that take jobs."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import structlog

from app.observability.metrics import Metrics

log = structlog.get_logger()

FAILURES_IN_A_ROW = 3
"""The number of failures without progress after which a loop counts as down."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 60.0

Progressed = Callable[[], None]
"""Called by a loop whenever it has done something, or has found nothing to do."""


@dataclass(slots=True)
class _State:
    stalled_after_s: float
    progressed_at: float
    failures: int = 0
    error: str = ""


class Loops:
    """Runs loops until they are cancelled; an unexpected exception does not end them.

    The exception is logged with its traceback and counted. The loop begins again after a pause, which doubles with each
    failure until the loop reports progress.

    Args:
        metrics: counts failures by loop.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._states: dict[str, _State] = {}

    @property
    def problem(self) -> str | None:
        """Which loop keeps failing or makes no progress; None if all work."""
        now = time.monotonic()
        for name, state in self._states.items():
            if state.failures >= FAILURES_IN_A_ROW:
                return f"the loop '{name}' failed {state.failures} times in a row ({state.error}); see the log"
            if now - state.progressed_at > state.stalled_after_s:
                return f"the loop '{name}' has made no progress for {now - state.progressed_at:.0f} s; see the log"
        return None

    async def run(self, name: str, loop: Callable[[Progressed], Awaitable[None]], *, stalled_after_s: float) -> None:
        """Run a loop until it is cancelled.

        Args:
            name: in logs, metrics and ``problem``; unique in the process.
            loop: does not return; it reports its progress by calling its argument.
            stalled_after_s: the time without progress that is a problem.
        """
        with self._registered(name, stalled_after_s) as state:

            def progressed() -> None:
                state.progressed_at, state.failures = time.monotonic(), 0

            while True:
                try:
                    await loop(progressed)
                    error: Exception = RuntimeError("the loop ended, although it should run as long as the process")
                except Exception as raised:  # noqa: BLE001 - whatever it is, the loop goes on
                    error = raised
                state.failures, state.error = state.failures + 1, type(error).__name__
                self._metrics.loop_failures.labels(name).inc()
                log.error("loop_failed", loop=name, failures_in_a_row=state.failures, exc_info=error)
                await asyncio.sleep(min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(state.failures - 1, 20)))

    @contextmanager
    def _registered(self, name: str, stalled_after_s: float) -> Iterator[_State]:
        self._metrics.loop_failures.labels(name)  # exposed as 0 from the start
        self._states[name] = state = _State(stalled_after_s, time.monotonic())
        try:
            yield state
        finally:
            if self._states.get(name) is state:  # not that of a model which replaced this one
                del self._states[name]
