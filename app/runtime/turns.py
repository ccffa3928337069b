"""Background work takes turns with requests: it runs while no request needs a model, and a little of the time else."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from app.runtime.cpu import usable_cores

QUIET_S = 0.05
"""Seconds without a request after which background work runs: longer than between the requests of one caller."""

SHARE = 0.05
"""Share of the cores' time that background work gets while requests never pause, so that it ends eventually."""

TURN_S = 0.02
"""Seconds of a turn: a request that arrives during one is slowed for as long."""

RECENTLY_S = 2.0
"""Seconds after the last request in which another one is expected."""

_ASKS_WITHIN_S = 1.0
"""Seconds after which work that has not asked again loses its place in the line."""

_NEXT_IN_LINE_S = 0.01


class Turns:
    """Says when background work may take a turn. All kinds of work share the turns, in the order in which they asked.

    For use from any thread.

    A turn begins when no request has had a place in a queue for a moment, or at the latest when the turns since then
    have been ``SHARE`` of the time.

    Args:
        last_request_at: returns when the last request was in a queue, on the clock of ``time.perf_counter``; now while
            one is.
    """

    def __init__(self, last_request_at: Callable[[], float] = lambda: 0.0) -> None:
        self._last_request_at = last_request_at
        self._lock = threading.Lock()
        self._due_at = 0.0
        self._asked_at: dict[object, float] = {}  # in the order of the line

    @property
    def is_request_expected(self) -> bool:
        """Whether there was a request in the last two seconds."""
        return time.perf_counter() - self._last_request_at() < RECENTLY_S

    def begin(self, work: object) -> tuple[float, bool]:
        """Begin a turn, or return the seconds after which to ask again; 0 if it has begun.

        Also return whether the turn counts, and must be ended by ``end``: one that begins in a pause does not.

        Args:
            work: identifies the work, which keeps its place in the line.
        """
        now = time.perf_counter()
        quiet_in_s = self._last_request_at() + QUIET_S - now
        if quiet_in_s <= 0:
            return 0.0, False
        with self._lock:
            line = self._asked_at
            line[work] = now
            for other in [other for other, asked_at in line.items() if asked_at < now - _ASKS_WITHIN_S]:
                del line[other]
            due_in_s = self._due_at - now
            if due_in_s <= 0 and next(iter(line)) is work:
                del line[work]
                # Until it ends and tells how long it took, so that no other turn begins meanwhile.
                self._due_at = now + TURN_S / SHARE
                return 0.0, True
        return min(quiet_in_s, max(due_in_s, _NEXT_IN_LINE_S), QUIET_S), False

    def end(self, took_s: float) -> None:
        """End a turn that used all cores for so long; the next one waits accordingly, unless there is a pause."""
        with self._lock:
            self._due_at = max(self._due_at, time.perf_counter()) + (took_s - TURN_S) / SHARE


class _ThreadWork:
    """Work of one thread that can be stopped, and with ``turns`` in turns that ``give_way`` ends."""

    def __init__(self, turns: Turns | None, is_awaited: Callable[[], bool], is_stopped: Callable[[], bool]) -> None:
        self._turns = turns
        self._is_awaited = is_awaited
        self._is_stopped = is_stopped
        self._cores = usable_cores()
        self._began = 0.0
        self._counts = False

    def give_way(self) -> None:
        if self._turns is None:
            self._check_stopped()
        elif self._took_s() >= TURN_S:
            self.end()
            self.wait()

    def end(self) -> None:
        if self._counts:
            assert self._turns is not None
            self._counts = False
            self._turns.end(self._took_s())

    def wait(self) -> None:
        self._check_stopped()
        while self._turns is not None and not self._is_awaited():
            wait_s, self._counts = self._turns.begin(self)
            if not wait_s:
                break
            time.sleep(wait_s)
            self._check_stopped()
        self._began = time.thread_time()

    def _check_stopped(self) -> None:
        if self._is_stopped():
            raise asyncio.CancelledError

    def _took_s(self) -> float:
        # The time on the core, because requests take the core from a thread of low priority.
        return (time.thread_time() - self._began) / self._cores


_turns: ContextVar[Turns | None] = ContextVar("turns", default=None)
_thread_work: ContextVar[_ThreadWork | None] = ContextVar("thread_work", default=None)


@contextmanager
def in_background(turns: Turns | None) -> Iterator[None]:
    """Mark what runs inside, and tasks that it starts, as work that makes way for requests."""
    token = _turns.set(turns)
    try:
        yield
    finally:
        _turns.reset(token)


def is_in_background() -> bool:
    """Return whether this task, or this thread that has its context, makes way for requests."""
    return _turns.get() is not None


@contextmanager
def taking_turns(
    is_awaited: Callable[[], bool] = lambda: False, is_stopped: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Take turns in a thread, wherever it calls ``give_way``, if its context is marked as background work.

    Args:
        is_awaited: whether a request waits for this work, which then continues without turns.
        is_stopped: whether nobody needs this work any more; it then ends with ``asyncio.CancelledError``, which no step
            of it takes for an error of its own.
    """
    work = _ThreadWork(_turns.get(), is_awaited, is_stopped)
    token = _thread_work.set(work)
    try:
        work.wait()
        yield
    finally:
        _thread_work.reset(token)
        work.end()


def give_way() -> None:
    """End the turn of a thread that takes turns, if it is over, and wait for the next one; end work that is stopped.

    To be called often in work that takes long, at least every 20 ms, without a lock that others need.
    """
    work = _thread_work.get()
    if work is not None:
        work.give_way()
