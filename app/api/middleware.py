"""What happens to every request around its route: a bound on its body, one log line, and headers for browsers."""

import contextlib
import time
from collections.abc import Callable

import structlog
from asgi_correlation_id import correlation_id
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.errors import problem_response
from app.errors import BodyTooLargeError

log = structlog.get_logger()


class _BodyTooLargeError(Exception):
    """Stops the application from reading on; never leaves this module's middleware."""


class BodyLimit:
    """Refuse large bodies, by their declared length at once and otherwise while they arrive.

    Args:
        app: what the request is passed on to.
        max_bytes: of any body.
        max_json_bytes: of bodies without images, which are parsed on the event loop.
        takes_images: tells whether a path takes images.
    """

    def __init__(
        self, app: ASGIApp, *, max_bytes: int, max_json_bytes: int, takes_images: Callable[[str], bool]
    ) -> None:
        self._app = app
        self._images = (max_bytes, "send fewer images per request, or raise DEIXIS_MAX_REQUEST_BYTES")
        self._json = (max_json_bytes, "send less at a time, or raise DEIXIS_MAX_JSON_BYTES")
        self._takes_images = takes_images

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        max_bytes, way_out = self._images if self._takes_images(scope["path"]) else self._json
        refusal = problem_response(
            BodyTooLargeError(f"the request's body has more than {max_bytes:,} bytes; {way_out}")
        )
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if declared.isdigit() and int(declared) > max_bytes:
            await refusal(scope, receive, send)
            return
        received, exceeded, answered = 0, False, False

        async def counted_receive() -> Message:
            nonlocal received, exceeded
            message = await receive()
            received += len(message.get("body", b""))
            if received > max_bytes:
                exceeded = True
                raise _BodyTooLargeError
            return message

        async def watched_send(message: Message) -> None:
            # Frameworks turn any failure to read a body into an answer of their own: ours takes its place.
            nonlocal answered
            if not exceeded:
                answered = True
                await send(message)

        with contextlib.suppress(_BodyTooLargeError):
            await self._app(scope, counted_receive, watched_send)
        if exceeded and not answered:
            await refusal(scope, receive, send)


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
        status = 500

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=correlation_id.get()):
            try:
                await self._app(scope, receive, watched_send)
            finally:
                log.info(
                    "request",
                    method=scope["method"],
                    path=scope["path"],
                    status=status,
                    duration_ms=round((time.perf_counter() - began) * 1000, 3),
                    **scope.get("deixis.log", {}),
                )
