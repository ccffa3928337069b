"""The deadline of a request: one limit on everything that the service does for it."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

import structlog
from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.errors import problem_response
from app.errors import DeadlineExceededError

_Result = TypeVar("_Result")
_SCOPE_KEY = "deixis.deadline"

log = structlog.get_logger()


class _Clock:
    """Counts the time of a request, without the time in which the service waits for the client."""

    def __init__(self, timeout_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._timeout_s = timeout_s
        self._waits = 0
        self.restart()

    def restart(self) -> None:
        self._left_s, self._counts_from = self._timeout_s, self._loop.time()

    def left_s(self) -> float:
        """Return the time that is left; while the service waits for the client, the whole time that is left then."""
        return self._left_s if self._waits else self._left_s - (self._loop.time() - self._counts_from)

    def is_over(self) -> bool:
        return not self._waits and self.left_s() <= 0

    async def without(self, waiting: Awaitable[_Result]) -> _Result:
        """Wait for the client; this time does not count."""
        if not self._waits:
            self._left_s = self.left_s()
        self._waits += 1
        try:
            return await waiting
        finally:
            self._waits -= 1
            self._counts_from = self._loop.time()


class Deadline:
    """Answers a request with 504 at its deadline, wherever the application waits.

    The time in which the client sends its body or reads the response does not count; it has limits of its own. The
    application is cancelled, but not waited for: a driver may need seconds until it gives up its connection.

    Args:
        app: the wrapped application.
        timeout_s: seconds for each request; None for no limit.
    """

    def __init__(self, app: ASGIApp, *, timeout_s: float | None) -> None:
        self._app = app
        self._timeout_s = timeout_s
        self._cancelled: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle the request with the wrapped application."""
        if scope["type"] != "http" or self._timeout_s is None:
            await self._app(scope, receive, send)
            return
        clock = scope[_SCOPE_KEY] = _Clock(self._timeout_s)
        has_body = response_started = is_over = False

        async def timed_receive() -> Message:
            nonlocal has_body
            message = await (receive() if has_body else clock.without(receive()))
            has_body = not message.get("more_body", False)
            return message

        async def timed_send(message: Message) -> None:
            nonlocal response_started
            if not is_over:
                response_started = True
                await clock.without(send(message))

        task = asyncio.create_task(self._run(scope, timed_receive, timed_send))
        try:
            while not task.done() and not clock.is_over():
                await asyncio.wait({task}, timeout=max(0.001, clock.left_s()))
        finally:
            if not task.done():
                is_over = True
                self._cancel(task)
        if not is_over:
            try:
                await task
            finally:
                del task  # the traceback of an error refers to this frame, which must not refer to the error
            return
        error = DeadlineExceededError(
            f"the request took longer than {self._timeout_s:g} s; send fewer images or labels, or raise"
            " DEIXIS_REQUEST_TIMEOUT_S; texts that have been encoded are kept for the next request; GET /readyz shows"
            " whether the database responds"
        )
        log.warning("request_failed", error=type(error).__name__, detail=error.message)
        if response_started:
            raise error  # the server closes the connection
        await problem_response(error, {"Connection": "close"})(scope, receive, send)

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    def _cancel(self, task: asyncio.Task[None]) -> None:
        self._cancelled.add(task)
        task.add_done_callback(self._forget)
        task.cancel()

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._cancelled.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.info("failed_after_deadline", error=type(error).__name__)


def restart_deadline(request: Request) -> None:
    """Give a request its whole time again: for one with thousands of images, of which some are done."""
    clock: _Clock | None = request.scope.get(_SCOPE_KEY)
    if clock is not None:
        clock.restart()
