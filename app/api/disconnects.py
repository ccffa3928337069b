"""Cancels work for clients that have disconnected, which the framework does not do."""

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

Result = TypeVar("Result")

# Most requests are done by then, and need no task that watches the connection.
_WATCHED_AFTER_S = 0.2


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Return the result of the work; if the client disconnects, cancel work that takes long.

    Call it after the body has been read.

    Raises:
        ClientDisconnect: the client disconnected.
    """
    watching: list[asyncio.Task[None]] = []
    try:
        async with asyncio.timeout(None) as until_disconnected:
            start = asyncio.get_running_loop().call_later
            timer = start(_WATCHED_AFTER_S, _start_watching, request, until_disconnected, watching)
            try:
                return await work
            finally:
                timer.cancel()
                while watching:
                    watching.pop().cancel()
    except TimeoutError:
        if until_disconnected.expired():
            raise ClientDisconnect from None
        raise
    finally:
        # The traceback of an error refers to this frame, which must not refer to the task that will hold the error: the
        # cycle would keep the images of the request in memory.
        del until_disconnected, timer


def _start_watching(request: Request, until: asyncio.Timeout, watching: list[asyncio.Task[None]]) -> None:
    watching.append(asyncio.create_task(_watch(request, until)))


async def _watch(request: Request, until_disconnected: asyncio.Timeout) -> None:
    with suppress(Exception):  # a connection that cannot be read is as good as closed
        while (await request.receive())["type"] != "http.disconnect":
            pass
    until_disconnected.reschedule(0)  # a time in the past
