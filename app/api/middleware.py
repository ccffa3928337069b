"""Middleware for every request: limits on the body, the access log, and security headers."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog
from asgi_correlation_id import correlation_id
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.errors import problem_response
from app.errors import (
    BodyTooLargeError,
    DeixisError,
    MalformedRequestError,
    OverloadedError,
    RequestTimeoutError,
    UnsupportedMediaTypeError,
)
from app.observability.metrics import Metrics
from app.observability.tracing import trace_id

_MIB = 1024 * 1024
# Python refuses to parse numbers with thousands of digits.
_MAX_LENGTH_DIGITS = 18
_MAX_LOGGED_PATH_CHARS = 1000
# Asked for every few seconds by what watches the service.
_UNCOUNTED_ROUTES = frozenset({"/metrics", "/healthz", "/readyz"})

log = structlog.get_logger()


class _RefusedError(Exception):
    """Stops the application from reading the body; caught in this module."""


class BodyBudget:
    """Limits the memory that the bodies of all unfinished requests occupy together.

    Args:
        max_bytes: limit on the sum of their sizes.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._reserved = 0

    def reserve(self, count: int) -> bool:
        """Reserve bytes; return False if the limit does not allow it."""
        if self._reserved + count > self._max_bytes:
            return False
        self._reserved += count
        return True

    def release(self, count: int) -> None:
        """Release reserved bytes."""
        self._reserved -= count


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Limits on the body of a request.

    Args:
        max_bytes: limit for routes that take images.
        max_json_bytes: limit for all other routes, whose bodies are parsed on the event loop.
        timeout_s: the body must arrive within this time, plus this time for each MiB received; each pause between two
            chunks is limited to this time too.
        budget: shared by all requests.
        takes_images: returns whether the route of a path takes images.
    """

    max_bytes: int
    max_json_bytes: int
    timeout_s: float
    budget: BodyBudget
    takes_images: Callable[[str], bool]

    def for_path(self, path: str) -> int:
        """Return the maximum size in bytes of the body of a request for a path."""
        return self.max_bytes if self.takes_images(path) else self.max_json_bytes

    def too_large(self, path: str) -> BodyTooLargeError:
        """Return the error for a larger body."""
        way_out = "send less at a time"
        if self.takes_images(path):
            way_out = "send fewer images per request, or raise DEIXIS_MAX_REQUEST_BYTES"
        return BodyTooLargeError(f"the request body has more than {self.for_path(path):,} bytes; {way_out}")


class BoundedBody:
    """Refuses bodies that are too large, too slow or compressed, or that exceed the budget of all bodies.

    A body is refused immediately if its Content-Length is too large, and otherwise as soon as it exceeds a limit.

    Args:
        app: the wrapped application.
        limits: limits on each body.
    """

    def __init__(self, app: ASGIApp, *, limits: BodyLimits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle the request with the wrapped application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        max_bytes, declared = self._limits.for_path(path), _header(scope, b"content-length", "0")
        if declared.isdecimal() and (len(declared) > _MAX_LENGTH_DIGITS or int(declared) > max_bytes):
            await problem_response(self._limits.too_large(path))(scope, receive, send)
            return
        if (coding := _header(scope, b"content-encoding", "").strip().lower()) not in {"", "identity"}:
            refusal = UnsupportedMediaTypeError(
                f"the content encoding '{coding}' is not supported; send the body uncompressed"
            )
            await problem_response(refusal)(scope, receive, send)
            return
        budget, timeout_s = self._limits.budget, self._limits.timeout_s
        started_at, received, is_complete = asyncio.get_running_loop().time(), 0, False
        refused: DeixisError | None = None
        response_started = False

        async def bounded_receive() -> Message:
            nonlocal received, is_complete, refused
            if is_complete:
                return await receive()  # the client disconnected
            try:
                # A fast start does not allow a longer pause later: an idle body could hold the budget for an hour.
                now = asyncio.get_running_loop().time()
                async with asyncio.timeout_at(min(started_at + timeout_s * (1 + received / _MIB), now + timeout_s)):
                    message = await receive()
            except TimeoutError:
                refused = RequestTimeoutError(
                    f"after {received:,} bytes the rest of the body did not arrive in time; the limit is {timeout_s:g}"
                    f" s, plus {timeout_s:g} s for each MiB received, and {timeout_s:g} s for each pause; send the body"
                    " faster"
                )
                raise _RefusedError from None
            count = len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if received + count > max_bytes:
                refused = self._limits.too_large(path)
                raise _RefusedError
            if not budget.reserve(count):
                refused = OverloadedError(
                    "the bodies of all current requests exceed the memory for them; try again", retry_after_s=1
                )
                raise _RefusedError
            received += count
            if message["type"] == "http.request" and is_complete and declared.isdecimal() and received < int(declared):
                refused = _truncated(received, int(declared))
                raise _RefusedError
            return message

        async def watched_send(message: Message) -> None:
            # The framework turns a failure to read the body into its own response, which is dropped in favour of ours.
            nonlocal response_started
            if refused is None or response_started:
                response_started = True
                await send(message)

        try:
            with contextlib.suppress(_RefusedError):
                await self._app(scope, bounded_receive, watched_send)
        finally:
            budget.release(received)
        if refused is not None and not response_started:
            # The rest of the body is not read.
            await problem_response(refused, {"Connection": "close"})(scope, receive, send)


def _header(scope: Scope, name: bytes, default: str) -> str:
    return next((value.decode("latin-1") for each, value in scope["headers"] if each == name), default)


def _truncated(received: int, declared: int) -> MalformedRequestError:
    return MalformedRequestError(
        f"the body has {received:,} bytes, and its Content-Length is {declared:,}; a server in front dropped a part of"
        " it, as some do if the request offers another protocol (Upgrade)"
    )


# Responses are not pages, except / and /docs, which set their own policy. Browsers must not guess the content type,
# show a response in a frame, or let pages of another origin read it unless the operator allows that origin.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class SecurityHeaders:
    """Adds security headers to every response, unless the route has set them.

    Args:
        app: the wrapped application.
        cross_origin: whether CORS allows pages of other origins to read responses.
    """

    def __init__(self, app: ASGIApp, *, cross_origin: bool) -> None:
        self._app = app
        headers = {**_HEADERS, **({"Cross-Origin-Resource-Policy": "cross-origin"} if cross_origin else {})}
        self._headers = [(name.lower().encode(), value.encode()) for name, value in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle the request with the wrapped application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Names are in lower case (ASGI).
                present = {name for name, _ in message["headers"]}
                missing = [header for header in self._headers if header[0] not in present]
                message["headers"] = [*message["headers"], *missing]
            await send(message)

        await self._app(scope, receive, send_with_headers)


class AccessLog:
    """Logs one event per request, after the response has been sent, and records its metrics.

    Args:
        app: the wrapped application.
        metrics: of the service.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics
        # Bound once: the logger of the module looks for its configuration at each event.
        self._log = log.bind()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle the request with the wrapped application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_at = time.perf_counter()
        status: int | None = None

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=correlation_id.get()):
            try:
                await self._app(scope, receive, watched_send)
            except asyncio.CancelledError:  # Ray cancels the request when the client disconnects
                status = 499 if status is None else status
                raise
            finally:
                seconds = time.perf_counter() - started_at
                status = 500 if status is None else status
                route = getattr(scope.get("route"), "path", "none")
                if route not in _UNCOUNTED_ROUTES:
                    self._metrics.request(route, scope["method"], status, seconds)
                trace = {} if (traced := trace_id()) is None else {"trace_id": traced}
                self._log.info(
                    "request",
                    method=scope["method"],
                    path=scope["path"][:_MAX_LOGGED_PATH_CHARS],
                    status=status,
                    duration_ms=round(seconds * 1000, 3),
                    **trace,
                    **scope.get("deixis.log", {}),
                )
