"""Functions that threads run for coroutines: results, errors, cancellation, the end, and what stays in memory."""

import asyncio
import functools
import gc
import threading
import weakref

import pytest

from app.runtime.worker_threads import WorkerThreads


def in_event_loop(test):
    """Run an asynchronous test."""

    @functools.wraps(test)
    def run(*arguments, **named):
        asyncio.run(test(*arguments, **named))

    return run


@pytest.fixture
def threads():
    threads = WorkerThreads(2, "test")
    yield threads
    threads.close()


@in_event_loop
async def test_results_and_errors_reach_the_coroutine_that_waits(threads):
    def fail(error):
        raise error

    assert await asyncio.gather(*(threads.run(divmod, number, 3) for number in range(100))) == [
        divmod(number, 3) for number in range(100)
    ]
    with pytest.raises(KeyError):
        await threads.run(fail, KeyError("a"))
    with pytest.raises(RuntimeError, match="StopIteration"):
        await threads.run(fail, StopIteration())
    assert await threads.run(len, "still there") == 11


@in_event_loop
async def test_as_many_functions_run_at_a_time_as_there_are_threads(threads):
    both = threading.Barrier(3)
    running = [asyncio.create_task(threads.run(both.wait, 30)) for _ in range(2)]
    await asyncio.to_thread(both.wait, 30)
    assert sorted(await asyncio.gather(*running)) != []


@in_event_loop
async def test_a_cancelled_function_does_not_start(threads):
    started, go = [], threading.Event()
    blocking = [asyncio.create_task(threads.run(go.wait, 30)) for _ in range(2)]
    waiting = asyncio.create_task(threads.run(started.append, 1))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    go.set()
    await asyncio.gather(*blocking)
    await threads.run(len, "after it")
    assert started == []


@in_event_loop
async def test_the_result_of_a_function_that_was_cancelled_while_it_ran_is_dropped(threads):
    entered, go = threading.Event(), threading.Event()

    def run():
        entered.set()
        go.wait(30)

    running = asyncio.create_task(threads.run(run))
    await asyncio.to_thread(entered.wait, 30)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    go.set()
    assert await threads.run(len, "still there") == 11


@in_event_loop
async def test_closing_waits_for_what_runs_and_cancels_the_rest():
    threads = WorkerThreads(1, "test")
    entered, go = threading.Event(), threading.Event()

    def run():
        entered.set()
        return go.wait(30)

    running, waiting = asyncio.create_task(threads.run(run)), asyncio.create_task(threads.run(len, "never"))
    await asyncio.to_thread(entered.wait, 30)
    closing = asyncio.create_task(asyncio.to_thread(threads.close))
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not closing.done()
    go.set()
    await closing
    assert await running is True
    with pytest.raises(RuntimeError, match="closed"):
        await threads.run(len, "too late")


def test_threads_that_were_never_used_can_be_closed():
    before = threading.active_count()
    threads = WorkerThreads(4, "test")
    assert threading.active_count() == before
    threads.close()


@pytest.mark.parametrize("fails", [False, True])
@in_event_loop
async def test_an_idle_thread_keeps_nothing_in_memory(threads, fails):
    class Thing:
        pass

    def use(thing):
        if fails:
            raise ValueError(thing)
        return thing

    thing = Thing()
    reference = weakref.ref(thing)
    if fails:
        with pytest.raises(ValueError, match="Thing"):
            await threads.run(use, thing)
    else:
        await threads.run(use, thing)
    del thing
    gc.collect()
    await asyncio.sleep(0.05)
    assert reference() is None


@in_event_loop
async def test_a_function_that_is_added_while_the_threads_close_is_cancelled(monkeypatch):
    threads = WorkerThreads(1, "test")
    assert await threads.run(len, "first") == 5
    put = threads._jobs.put

    class Jobs:
        def put(self, job):
            monkeypatch.setattr(threads, "_jobs", queue)
            threads.close()
            put(job)

    queue = threads._jobs
    monkeypatch.setattr(threads, "_jobs", Jobs())
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(10):
            await threads.run(len, "too late")
