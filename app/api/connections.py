"""Limits on connections: their number, the time and size of a request head, and how slowly a client reads.

uvicorn limits none of these. The request head is the request line and the headers; ``middleware.py`` limits bodies.
"""

import asyncio
from dataclasses import dataclass
from typing import Any

import structlog
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.api.errors import problem_response
from app.api.problems import kind_of
from app.errors import DeixisError, HeadTooLargeError, MalformedRequestError, OverloadedError, RequestTimeoutError

MAX_HEAD_BYTES = 64 * 1024
"""Limit on the request line and headers."""

# After a refusal, the connection stays open for this time and discards what the client still sends. Closing it
# immediately would reset it, and the client might not receive the response.
_LINGER_S = 2.0

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Limits on connections.

    Args:
        connections: maximum number of open connections; further ones are refused.
        head_timeout_s: from the start of the connection, or the first byte of a further request, to the end of the
            headers.
        read_timeout_s: how long a response may wait for the client to read.
    """

    connections: int
    head_timeout_s: float
    read_timeout_s: float


class _RefusedError(Exception):
    """Raised in a parser callback; the parser reports it as an error of the request."""


class BoundedConnection(HttpToolsProtocol):
    """A connection with limits; ``bounded`` returns a subclass with its limits set."""

    limits: ConnectionLimits

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = False
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._read_timer: asyncio.TimerHandle | None = None
        self._refusal: DeixisError | None = None
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timeout of the first head, or refuse the connection."""
        super().connection_made(transport)
        limit = self.limits.connections
        if len(self.connections) > 2 * limit:  # this count includes connections refused within the last seconds
            transport.abort()
        elif len(self.connections) > limit:
            self._refuse(
                OverloadedError(f"{limit:,} connections are open, which is the limit; try again later", retry_after_s=1)
            )
        else:
            self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timers."""
        self._cancel_head_timer()
        if self._read_timer is not None:
            self._read_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse received bytes, and enforce the size limit of an unfinished head."""
        if self._refused or self.transport.is_closing():
            return
        was_in_head = self._in_head
        super().data_received(data)
        if self._refused or self.transport.is_closing():
            return
        if was_in_head and self._in_head:
            # The parser buffers a header until it is complete, without a limit on its size.
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(_head_too_large())
                return
        is_responding = self.cycle is not None and not self.cycle.response_complete
        if not is_responding and self._head_timer is None and self.timeout_keep_alive_task is None:
            # The first bytes of a further request, or the rest of a body that was not read.
            self._start_head_timer()

    def on_message_begin(self) -> None:
        """Start a request."""
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Check the size of the head, and pass the request to the application."""
        self._in_head = False
        self._cancel_head_timer()
        # Four more bytes per header, for the colon, the space and the line end.
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > MAX_HEAD_BYTES:
            self._refusal = _head_too_large()
            raise _RefusedError
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse a request that the parser rejected, with a problem response."""
        del msg  # always the same text
        self._refuse(
            self._refusal or MalformedRequestError("the head or the framing of the request is not valid HTTP/1.1")
        )

    def pause_writing(self) -> None:
        """Start the timeout for the client to read."""
        super().pause_writing()
        self._read_timer = self.loop.call_later(self.limits.read_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Cancel the timeout for the client to read."""
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None
        super().resume_writing()

    def on_response_complete(self) -> None:
        """Wait for the next request; if the connection is closing, limit the time for the client to read the rest."""
        super().on_response_complete()
        if self.transport.is_closing():
            self.loop.call_later(self.limits.read_timeout_s, self.transport.abort)

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, even if the client has not read the last response."""
        self.transport.abort()

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(self.limits.head_timeout_s, self._on_head_timeout)

    def _cancel_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _on_head_timeout(self) -> None:
        timeout_s = self.limits.head_timeout_s
        self._refuse(
            RequestTimeoutError(
                f"the request line and headers did not arrive within {timeout_s:g} s; send them at once"
            )
        )

    def _refuse(self, error: DeixisError) -> None:
        """Send a problem response without calling the application, and close the connection."""
        self._cancel_head_timer()
        self._refused = True
        if self.cycle is not None and not self.cycle.response_complete:
            if not self.cycle.more_body:
                self.cycle.keep_alive = False  # close after the response to the previous request
                return
            self.cycle.disconnected = True  # the rest of the body is not read
            self.cycle.message_event.set()
            if self.cycle.response_started:
                self.transport.abort()
                return
        response = problem_response(error, {"Connection": "close"})
        log.info("connection_refused", problem=kind_of(error).slug, client=self.client[0] if self.client else None)
        lines = [f"HTTP/1.1 {response.status_code} {kind_of(error).title}".encode()]
        lines += [name + b": " + value for name, value in response.raw_headers]
        self.transport.write(b"\r\n".join([*lines, b"", bytes(response.body)]))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(_LINGER_S, self.transport.abort)


def bounded(limits: ConnectionLimits) -> type[asyncio.Protocol]:
    """Return the protocol class that uvicorn creates for each connection."""
    return type("Connection", (BoundedConnection,), {"limits": limits})


def _head_too_large() -> HeadTooLargeError:
    return HeadTooLargeError(
        f"the request line and headers have more than {MAX_HEAD_BYTES:,} bytes; send long fields in a form or in JSON"
    )
