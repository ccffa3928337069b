"""Fails a test during which an event loop of this process was blocked.

Each callback of an asyncio loop is measured in processor time of its thread, so that a busy machine is not a fault, and
in wall time with a generous limit, for input and output that blocks. Processor time is stated as that of an idle
machine: the same work takes twice as long beside a busy core that shares caches and clock, so a callback that seems too
long is followed by work of known length. Time of the garbage collector is left out, because it depends on the tests
that ran before. Loops of other processes and of uvloop are not measured, nor callbacks of Playwright: its synchronous
interface runs the test itself in a callback of a loop that serves nothing else.

A test that must block its loop says why: ``@pytest.mark.blocks_event_loop("reason")``. The option
``--slowest-callbacks N`` lists the longest callbacks of all tests.
"""

import asyncio
import gc
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

MAX_CPU_S = 0.2
MAX_WALL_S = 60.0

MARK = "blocks_event_loop"
_PROPERTY = "slowest callback"
# Seconds of processor time that the work of ``_slowness`` takes on an idle machine, and its rounds.
_KNOWN_WORK_S = 0.016
_KNOWN_WORK_ROUNDS = 100_000
# Of the coroutines that wait for each other; the first ones are those of the web framework.
_MAX_NAMES = 8


@dataclass(frozen=True, order=True, slots=True)
class Callback:
    """A callback that ran: seconds of processor time and of wall time, and what it was."""

    cpu_s: float
    wall_s: float
    name: str

    @property
    def blocks(self) -> bool:
        return self.cpu_s > MAX_CPU_S or self.wall_s > MAX_WALL_S

    def __str__(self) -> str:
        return f"{1000 * self.cpu_s:.0f} ms of processor time in {1000 * self.wall_s:.0f} ms: {self.name}"


class Watchdog:
    """Measures the callbacks of all asyncio loops of this process while ``installed``."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slowest: Callback | None = None
        self._collecting = threading.local()

    def take(self) -> Callback | None:
        """Return the callback with the most processor time since the last call; one that blocks comes first."""
        with self._lock:
            slowest, self._slowest = self._slowest, None
        return slowest

    @contextmanager
    def installed(self) -> Iterator[None]:
        original = asyncio.Handle._run

        def run(handle: asyncio.Handle) -> None:
            if str(getattr(handle._callback, "__module__", "")).startswith("playwright."):
                original(handle)
                return
            cpu_s, wall_s, collected_s = time.thread_time(), time.perf_counter(), self._collected_s
            callback, context = handle._callback, handle._args  # a handle forgets them when it is cancelled
            try:
                original(handle)
            finally:
                cpu_s = time.thread_time() - cpu_s - (self._collected_s - collected_s)
                wall_s = time.perf_counter() - wall_s
                if cpu_s > MAX_CPU_S:
                    cpu_s /= _slowness()
                if cpu_s > MAX_CPU_S / 20 or wall_s > MAX_WALL_S:
                    self._record(Callback(cpu_s, wall_s, _name(callback, context)))

        asyncio.Handle._run = run
        gc.callbacks.append(self._on_collection)
        try:
            yield
        finally:
            asyncio.Handle._run = original
            gc.callbacks.remove(self._on_collection)

    def _record(self, callback: Callback) -> None:
        with self._lock:
            slowest = self._slowest
            if slowest is None or (callback.blocks, callback) > (slowest.blocks, slowest):
                self._slowest = callback

    @property
    def _collected_s(self) -> float:
        return getattr(self._collecting, "total_s", 0.0)

    def _on_collection(self, phase: str, _: dict[str, Any]) -> None:
        if phase == "start":
            self._collecting.began_s = time.thread_time()
        else:
            self._collecting.total_s = self._collected_s + time.thread_time() - self._collecting.began_s


def _slowness() -> float:
    """Return how much longer work takes in this thread now than on an idle machine; at least 1."""
    began_s = time.thread_time()
    names: dict[int, str] = {}
    for number in range(_KNOWN_WORK_ROUNDS):
        names[number % 1000] = f"{number}"
    return max(1.0, (time.thread_time() - began_s) / _KNOWN_WORK_S)


def _name(callback: Any, arguments: Any) -> str:
    task = getattr(callback, "__self__", None)
    if not isinstance(task, asyncio.Task):
        return f"{callback!r} {arguments!r}"[:500]
    coroutine = task.get_coro()
    names = [task.get_name()]
    while coroutine is not None:
        names.append(getattr(coroutine, "__qualname__", type(coroutine).__name__))
        coroutine = getattr(coroutine, "cr_await", None) or getattr(coroutine, "gi_yieldfrom", None)
    return " > ".join(names if len(names) <= _MAX_NAMES else [names[0], "...", *names[-_MAX_NAMES:]])


# --- hooks, which tests/conftest.py imports ---------------------------------------------------------------------------

WATCHDOG = pytest.StashKey[Watchdog]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slowest-callbacks", type=int, default=0, metavar="N", help="list the N slowest callbacks")


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, Any, Any]:
    session.config.stash[WATCHDOG] = Watchdog()
    with session.config.stash[WATCHDOG].installed():
        return (yield)


def _watched(item: pytest.Item) -> Generator[None, Any, Any]:
    watchdog = item.config.stash[WATCHDOG]
    watchdog.take()
    result = yield
    slowest = watchdog.take()
    if slowest is not None:
        item.user_properties.append((_PROPERTY, (slowest.cpu_s, str(slowest))))
        if slowest.blocks and item.get_closest_marker(MARK) is None:
            pytest.fail(f"the event loop was blocked for {slowest}", pytrace=False)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, Any, Any]:
    return (yield from _watched(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    return (yield from _watched(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, Any, Any]:
    return (yield from _watched(item))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    count = config.getoption("--slowest-callbacks")
    if not count:
        return
    found = {
        (cpu_s, report.nodeid, text)
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, (cpu_s, text) in (pair for pair in getattr(report, "user_properties", ()) if pair[0] == _PROPERTY)
    }
    terminalreporter.section("slowest callbacks of event loops")
    for _, test, text in sorted(found, reverse=True)[:count]:
        terminalreporter.line(f"{text}\n    {test}")
