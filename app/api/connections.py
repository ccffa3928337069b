"""Limits on connections: their number, the time and size of a request head, and how slowly a client reads.

uvicorn limits none of these. The request head is the request line and the headers; ``middleware.py`` limits bodies.
"""

import asyncio
import re
from dataclasses import dataclass
from typing import Any, cast

import httptools
import structlog
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.api.errors import problem_response
from app.api.problems import kind_of
from app.errors import (
    DeixisError,
    HeadTooLargeError,
    MalformedRequestError,
    MethodNotAllowedError,
    OverloadedError,
    RequestTimeoutError,
)

MAX_HEAD_BYTES = 64 * 1024
"""Limit on the request line and headers, and on what a body contains besides its bytes."""

PROBE_CONNECTIONS = 64
"""Connections above the limit that may still send a health probe; a further one replaces the oldest of them."""

_PROBES = (b"/healthz", b"/readyz", b"/metrics")

# File descriptors that stay free for the rest of the process, and as many again for probes.
_FREE_DESCRIPTORS = 64

# After a refusal, the connection stays open for this time and discards what the client still sends. Closing it
# immediately would reset it, and the client might not receive the response.
_LINGER_S = 2.0

# Written in one iteration of the event loop, and not sent yet.
_MAX_WAITING_BYTES = 64 * 1024

_ABSOLUTE_TARGET = re.compile(rb"https?://([^/?#]*)(.*)", re.IGNORECASE | re.DOTALL)

# Of a request that offers another protocol; the offer is ignored, as RFC 9110, section 7.8 allows.
_OFFER = frozenset({b"upgrade", b"http2-settings"})

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Limits on connections.

    Args:
        connections: maximum number of open connections; ``PROBE_CONNECTIONS`` further ones may send a health probe,
            and all others are refused.
        head_timeout_s: from the start of the connection, or the first byte of a further request, to the end of the
            headers.
        read_timeout_s: how long a response may wait for the client to read.
        descriptors: file descriptors that the process may open; near this limit, connections are refused as well.
    """

    connections: int
    head_timeout_s: float
    read_timeout_s: float
    descriptors: int | None = None


class _RefusedError(Exception):
    """Raised in a parser callback; the parser reports it as an error of the request."""


class _JoinedWrites:
    """A transport that sends all that is written in one iteration of the event loop at once.

    uvicorn writes the head of a response and then its body. Each would wake the client, which is on the same cores
    where it is a proxy.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._is_lost = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send the data at the end of this iteration; much data at once, so that the caller notices a slow client."""
        if self._is_lost:
            return
        if not self._waiting:
            self._loop.call_soon(self._flush)
        self._waiting.append(data)
        self._waiting_bytes += len(data)
        if self._waiting_bytes > _MAX_WAITING_BYTES:
            self._flush()

    def write_eof(self) -> None:
        """Send the end of the data."""
        self._flush()
        self._transport.write_eof()

    def close(self) -> None:
        """Close the connection when all data have been sent."""
        self._flush()
        self._transport.close()

    def drop(self) -> None:
        """Drop what has not been sent and what is written from now on, for which uvloop would raise an error."""
        self._waiting, self._waiting_bytes = [], 0
        self._is_lost = True

    def _flush(self) -> None:
        if self._waiting:
            waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
            self._transport.writelines(waiting)


class BoundedConnection(HttpToolsProtocol):
    """A connection with limits; ``bounded`` returns a subclass with its limits set."""

    limits: ConnectionLimits
    waiting: "dict[BoundedConnection, None]"
    """The connections above the limit that have not sent a head yet, the oldest first."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = False
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._read_timer: asyncio.TimerHandle | None = None
        self._refusal: DeixisError | None = None
        self._refused = False
        self._has_body_bytes = False
        self._overload: OverloadedError | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timeout of the first head, or refuse the connection."""
        super().connection_made(transport)
        self._joined = _JoinedWrites(transport, self.loop)
        self.transport = cast("asyncio.Transport", self._joined)
        excess = len(self.connections) - self.limits.connections
        free = self._free_descriptors(transport)
        if excess > 0:
            reason = f"{self.limits.connections:,} connections are open, which is the limit"
            self._overload = OverloadedError(f"{reason}; try again later", retry_after_s=1)
        elif free < 2 * _FREE_DESCRIPTORS:
            reason = "the process has no file descriptors for more connections"
            self._overload = OverloadedError(f"{reason}; try again later", retry_after_s=1)
        if self._overload is not None:
            if free < _FREE_DESCRIPTORS:
                self.refuse(self._overload, linger_s=0)
                return
            if len(self.waiting) == PROBE_CONNECTIONS:
                oldest = next(iter(self.waiting))
                oldest.refuse(self._overload, linger_s=0)
            self.waiting[self] = None
        self._start_head_timer()

    def _free_descriptors(self, transport: asyncio.Transport) -> int:
        """Return how many file descriptors the process can still open, as far as this connection shows."""
        connection = transport.get_extra_info("socket")
        if self.limits.descriptors is None or connection is None:
            return 2 * _FREE_DESCRIPTORS
        # The system gives every new file the lowest free number.
        return self.limits.descriptors - int(connection.fileno())

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timers, and drop what can no longer be sent."""
        # uvicorn lets a pipelined request that is not the last one go on.
        self._joined.drop()
        self._cancel_head_timer()
        self.waiting.pop(self, None)
        if self._read_timer is not None:
            self._read_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse received bytes, and enforce the size limit of an unfinished head."""
        if self._refused or self.transport.is_closing():
            return
        was_in_head, self._has_body_bytes = self._in_head, False
        self._parse(data)
        if self._refused or self.transport.is_closing():
            return
        is_in_body = self.cycle is not None and self.cycle.more_body and not self._has_body_bytes
        if (was_in_head and self._in_head) or (is_in_body and not self._in_head):
            # The parser buffers a header, a chunk extension or a trailer without a limit on its size.
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.refuse(_head_too_large())
                return
        is_responding = self.cycle is not None and not self.cycle.response_complete
        if not is_responding and self._head_timer is None and self.timeout_keep_alive_task is None:
            # The first bytes of a further request, or the rest of a body that was not read.
            self._start_head_timer()

    def _parse(self, data: bytes) -> None:
        """Parse received bytes; a request that offers another protocol is parsed as if it did not."""
        self._unset_keepalive_if_required()
        while data:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                # The parser ends the request here and skips its body, which would then count as a further request.
                data = self._head_without_offer() + data[upgrade.args[0] :]
                # A parser that has seen "Connection: close" ignores all that follows.
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            except httptools.HttpParserError:
                self.send_400_response("")
                return
            else:
                return

    def _head_without_offer(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
        for name, value in self.headers:
            if name == b"connection":
                options = [option.strip() for option in value.split(b",")]
                lines.append(b"connection: " + b", ".join(each for each in options if each.lower() not in _OFFER))
            elif name not in _OFFER:
                lines.append(name + b": " + value)
        return b"\r\n".join([*lines, b"", b""])

    def on_message_begin(self) -> None:
        """Start a request."""
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Add a header; the trailers of a body are ignored, since they would look like headers."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Check the head, and pass the request to the application."""
        self._in_head, self._head_bytes = False, 0
        self._cancel_head_timer()
        if self.parser.get_method() == b"CONNECT":
            self._refusal = MethodNotAllowedError("the method CONNECT is not allowed; the service is not a proxy")
            raise _RefusedError
        if self.parser.should_upgrade():
            return  # parsed again without the offer
        # Four more bytes per header, for the colon, the space and the line end.
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > MAX_HEAD_BYTES:
            self._refusal = _head_too_large()
            raise _RefusedError
        if (target := _ABSOLUTE_TARGET.fullmatch(self.url)) is not None:
            # The host of the target replaces the header (RFC 9112, section 3.2.2).
            self.headers[:] = [(name, value) for name, value in self.headers if name != b"host"]
            self.headers.append((b"host", target[1]))
            self.url = target[2] if target[2].startswith(b"/") else b"/" + target[2]
        if self._overload is not None and self.url.partition(b"?")[0] not in _PROBES:
            self._refusal = self._overload
            raise _RefusedError
        if self.parser.get_http_version() == "1.0":
            self.expect_100_continue = False  # such a client does not understand it
        super().on_headers_complete()
        if self._overload is not None:
            self.waiting.pop(self, None)
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """Pass on a part of the body."""
        self._has_body_bytes, self._head_bytes = True, 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End the body."""
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse a request that the parser rejected, with a problem response."""
        del msg  # always the same text
        self.refuse(
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
        timeout_s = self.limits.head_timeout_s if self._overload is None else _LINGER_S
        self._head_timer = self.loop.call_later(timeout_s, self._on_head_timeout)

    def _cancel_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _on_head_timeout(self) -> None:
        timeout_s = self.limits.head_timeout_s
        self.refuse(
            self._overload
            or RequestTimeoutError(
                f"the request line and headers did not arrive within {timeout_s:g} s; send them at once"
            )
        )

    def refuse(self, error: DeixisError, *, linger_s: float = _LINGER_S) -> None:
        """Send a problem response without calling the application, and close the connection."""
        self._cancel_head_timer()
        self.waiting.pop(self, None)
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
        if not linger_s:
            self.transport.close()
            return
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(linger_s, self.transport.abort)


def bounded(limits: ConnectionLimits) -> type[asyncio.Protocol]:
    """Return the protocol class that uvicorn creates for each connection."""
    return type("Connection", (BoundedConnection,), {"limits": limits, "waiting": {}})


def _head_too_large() -> HeadTooLargeError:
    return HeadTooLargeError(
        f"the request line and headers have more than {MAX_HEAD_BYTES:,} bytes; send long fields in a form or in JSON"
    )
