"""A loop goes on after an unexpected exception, which is logged, counted and shown."""

import asyncio
from contextlib import asynccontextmanager, suppress
from functools import partial

import pytest
from structlog.testing import capture_logs

from app.errors import NotReadyError
from app.observability.health import Health
from app.observability.loops import FAILURES_IN_A_ROW, Loops
from app.observability.metrics import Metrics

pytestmark = pytest.mark.anyio


@pytest.fixture
def metrics():
    return Metrics("")


@asynccontextmanager
async def running(loops, loop, *, stalled_after_s=60.0):
    task = asyncio.create_task(loops.run("a loop", loop, stalled_after_s=stalled_after_s))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def failures(metrics):
    return metrics.registry.get_sample_value("deixis_loop_failures_total", {"loop": "a loop"})


async def fails(times, recovered, progressed):
    """Raise `times` times, then report progress and wait."""
    if times:
        raise times.pop()
    progressed()
    recovered.set()
    await asyncio.Event().wait()


async def test_a_loop_begins_again_after_an_exception_which_is_logged_and_counted(metrics):
    recovered = asyncio.Event()
    with capture_logs() as logs:
        async with running(Loops(metrics), partial(fails, [ZeroDivisionError("x")], recovered)), asyncio.timeout(10):
            await recovered.wait()
    (event,) = logs
    assert (event["event"], event["loop"], type(event["exc_info"])) == ("loop_failed", "a loop", ZeroDivisionError)
    assert failures(metrics) == 1


async def test_a_loop_that_ends_begins_again(metrics):
    begun = 0
    begun_twice = asyncio.Event()

    async def ends(_):
        nonlocal begun
        begun += 1
        if begun == 2:
            begun_twice.set()

    async with running(Loops(metrics), ends), asyncio.timeout(10):
        await begun_twice.wait()
    assert failures(metrics) >= 1


async def test_a_loop_that_keeps_failing_is_a_problem_until_it_makes_progress(metrics):
    loops, recovered, problems = Loops(metrics), asyncio.Event(), []

    async def observed(progressed):
        problems.append(loops.problem)
        await fails(errors, recovered, progressed)

    errors: list[Exception] = [ValueError("x") for _ in range(FAILURES_IN_A_ROW)]
    async with running(loops, observed), asyncio.timeout(10):
        await recovered.wait()
        assert loops.problem is None
    assert problems[:-1] == [None] * FAILURES_IN_A_ROW
    assert "'a loop' failed 3 times in a row (ValueError)" in problems[-1]


async def test_a_loop_without_progress_is_a_problem_and_makes_the_process_not_ready(metrics):
    loops, started = Loops(metrics), asyncio.Event()

    async def hangs(_):
        started.set()
        await asyncio.Event().wait()

    async def ping():
        pass

    health = Health((), lambda: loops.problem, ping)
    async with running(loops, hangs, stalled_after_s=-1):
        await started.wait()
        assert "'a loop' has made no progress" in loops.problem
        with pytest.raises(NotReadyError, match="a loop"):
            await health.check_ready()
        health.check_alive()
    assert loops.problem is None
    await health.check_ready()
