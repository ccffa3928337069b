"""What happens to every request around its route: bounds on its body, one log line, and headers for browsers."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog
from asgi_correlation_id import correlation_id
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.errors import problem_response
from app.errors import (
    BodyTooLargeError,
    DeixisError,
    OverloadedError,
    RequestTimeoutError,
    UnsupportedMediaTypeError,
)
from app.observability.tracing import trace_id

_MIB = 1024 * 1024
# Python reads no numbers of thousands of digits.
_MAX_LENGTH_DIGITS = 18
# Of a path.
_MAX_LOGGED_CHARS = 1000

log = structlog.get_logger()


class _RefusedError(Exception):
    """Stops the application from reading on; never leaves this module's middleware."""


class BodyBudget:
    """The bytes of all bodies that have arrived and whose requests are not answered yet.

    Args:
        max_bytes: of all together.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._taken = 0

    def take(self, count: int) -> bool:
        """Take bytes if there is room for them, and tell whether there was."""
        if self._taken + count > self._max_bytes:
            return False
        self._taken += count
        return True

    def give_back(self, count: int) -> None:
        """Make room."""
        self._taken -= count


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """What the body of one request may be.

    Args:
        max_bytes: of any.
        max_json_bytes: of those without images, which are parsed on the event loop.
        timeout_s: for it to arrive, and as long again for each further MiB; and for each next part of it.
        budget: of all bodies together.
        takes_images: tells whether a path takes images.
    """

    max_bytes: int
    max_json_bytes: int
    timeout_s: float
    budget: BodyBudget
    takes_images: Callable[[str], bool]

    def of(self, path: str) -> tuple[int, BodyTooLargeError]:
        """Return the most bytes for a path, and what more than that is told."""
        takes_images = self.takes_images(path)
        most = self.max_bytes if takes_images else self.max_json_bytes
        way_out = (
            "send fewer images per request, or raise DEIXIS_MAX_REQUEST_BYTES"
            if takes_images
            else "send less at a time"
        )
        return most, BodyTooLargeError(f"the request's body has more than {most:,} bytes; {way_out}")


class BoundedBody:
    """Refuse bodies that are too large, too slow, compressed, or too many at once.

    One that is too large is refused by the length it declares at once, and otherwise while it arrives.

    Args:
        app: what the request is passed on to.
        limits: what is refused.
    """

    def __init__(self, app: ASGIApp, *, limits: BodyLimits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        max_bytes, too_large = self._limits.of(scope["path"])
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and (len(declared) > _MAX_LENGTH_DIGITS or int(declared) > max_bytes):
            await problem_response(too_large)(scope, receive, send)
            return
        if (coding := headers.get("content-encoding", "identity").strip().lower()) not in {"", "identity"}:
            refusal = UnsupportedMediaTypeError(f"a body in the content encoding '{coding}' is not read; send it plain")
            await problem_response(refusal)(scope, receive, send)
            return
        budget, timeout_s = self._limits.budget, self._limits.timeout_s
        began, received, is_whole = asyncio.get_running_loop().time(), 0, False
        refused: DeixisError | None = None
        answered = False

        async def bounded_receive() -> Message:
            nonlocal received, is_whole, refused
            if is_whole:
                return await receive()  # that the client leaves
            try:
                # What arrived fast earns no pause: idle bodies would hold the budget for an hour.
                now = asyncio.get_running_loop().time()
                async with asyncio.timeout_at(min(began + timeout_s * (1 + received / _MIB), now + timeout_s)):
                    message = await receive()
            except TimeoutError:
                refused = RequestTimeoutError(
                    f"after {received:,} bytes the rest of the body did not arrive in time; there are {timeout_s:g} s,"
                    " as many more for each MiB, and as many for each pause: send faster"
                )
                raise _RefusedError from None
            count = len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if received + count > max_bytes:
                refused = too_large
                raise _RefusedError
            if not budget.take(count):
                refused = OverloadedError("too many bytes of requests are under way; try again", retry_after_s=1)
                raise _RefusedError
            received += count
            return message

        async def watched_send(message: Message) -> None:
            # Frameworks turn any failure to read a body into an answer of their own: ours takes its place.
            nonlocal answered
            if refused is None or answered:
                answered = True
                await send(message)

        try:
            with contextlib.suppress(_RefusedError):
                await self._app(scope, bounded_receive, watched_send)
        finally:
            budget.give_back(received)
        if refused is not None and not answered:
            # The rest of the body is not waited for.
            await problem_response(refused, {"Connection": "close"})(scope, receive, send)


# Nothing here is a page, but for /docs, which says by itself what it needs. Answers are never what a browser makes of
# them, belong into no frame, and are read by no page of another origin unless the operator lets it.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class SecurityHeaders:
    """Tell browsers to make nothing of an answer but what it is; a route's own headers stand.

    Args:
        app: what the request is passed on to.
        cross_origin: whether pages of other origins may read answers, as CORS allows some.
    """

    def __init__(self, app: ASGIApp, *, cross_origin: bool) -> None:
        self._app = app
        self._headers = {**_HEADERS, **({"Cross-Origin-Resource-Policy": "cross-origin"} if cross_origin else {})}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, send_with_headers)


class AccessLog:
    """Log one event per request, when its answer has been sent."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        status: int | None = None

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=correlation_id.get()):
            try:
                await self._app(scope, receive, watched_send)
            except asyncio.CancelledError:  # Ray does so when a caller hangs up
                status = 499 if status is None else status
                raise
            finally:
                trace = {} if (traced := trace_id()) is None else {"trace_id": traced}
                log.info(
                    "request",
                    method=scope["method"],
                    path=scope["path"][:_MAX_LOGGED_CHARS],
                    status=500 if status is None else status,
                    duration_ms=round((time.perf_counter() - began) * 1000, 3),
                    **trace,
                    **scope.get("deixis.log", {}),
                )
