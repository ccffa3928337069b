"""Threads that work for coroutines."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

Result = TypeVar("Result")

_Job = tuple[asyncio.AbstractEventLoop, "asyncio.Future[Any]", Callable[[], Any]]


class WorkerThreads:
    """Runs functions in threads, like an executor, with less work for the event loop.

    ``run_in_executor`` passes each result through two futures with a lock each, which took a tenth of the time that the
    event loop spends on a classification.

    Args:
        count: number of threads; they start with the first function.
        name: of the threads, for logs and debuggers.
    """

    def __init__(self, count: int, name: str) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        # Daemons, so that a thread that hangs in a library does not keep the process from ending.
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}_{number}", daemon=True) for number in range(count)
        ]
        self._started = self._closed = False

    async def run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Return what the function returns, or raise what it raises; cancelling has an effect until it has started.

        Raises:
            RuntimeError: the threads are closed.
        """
        if self._closed:
            msg = "the threads are closed"
            raise RuntimeError(msg)
        if not self._started:
            self._started = True
            for thread in self._threads:
                thread.start()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        self._jobs.put((loop, future, partial(function, *arguments)))
        if self._closed:  # meanwhile, so that no thread may be left for it
            future.cancel()
        try:
            return await future
        finally:
            del future  # the traceback of an error refers to this frame, and the future to the error

    def close(self) -> None:
        """Cancel what has not started, and wait for the rest."""
        self._closed = True
        with suppress(Empty):
            while (job := self._jobs.get_nowait()) is not None:
                loop, future, _ = job
                _call_soon(loop, future.cancel)
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            _run(*job)
            del job  # an idle thread must not keep an image in memory


def _run(loop: asyncio.AbstractEventLoop, future: "asyncio.Future[Any]", function: Callable[[], Any]) -> None:
    if future.cancelled():
        return
    try:
        result = function()
    except BaseException as error:  # noqa: BLE001 - it belongs to the coroutine that waits
        if isinstance(error, StopIteration):  # futures refuse it
            error = RuntimeError("the function raised StopIteration")
        _call_soon(loop, partial(_settle, future, None, error))
        # The traceback of the error refers to this frame.
        del future, function
    else:
        _call_soon(loop, partial(_settle, future, result, None))


def _settle(future: "asyncio.Future[Any]", result: object, error: BaseException | None) -> None:
    if future.done():  # cancelled meanwhile
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
    with suppress(RuntimeError):  # the loop is closed, and so is every coroutine that waited
        loop.call_soon_threadsafe(callback)
