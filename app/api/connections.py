"""What a connection may do around its requests: how many there may be, how slow, and how long a request's head.

uvicorn bounds neither the time nor the size of a head, nor how slowly an answer is read. Bodies, which come after the
head, are bounded in ``middleware.py``.
"""

import asyncio
from dataclasses import dataclass
from typing import Any

import structlog
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.api.errors import kind_of, problem_response
from app.errors import DeixisError, HeadTooLargeError, MalformedRequestError, OverloadedError, RequestTimeoutError

MAX_HEAD_BYTES = 64 * 1024
"""Of a request's line and headers."""

# What was refused is told, and what the client still sends is thrown away: closed at once, the connection would be
# reset, and the client might never see why.
_LINGER_S = 2.0

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """What connections may do.

    Args:
        connections: at once; more are refused.
        head_timeout_s: from the connection, or the first byte of a further request, to the end of the headers.
        read_timeout_s: for the client to read on, where an answer waits for that.
    """

    connections: int
    head_timeout_s: float
    read_timeout_s: float


class _RefusedError(Exception):
    """Leaves a callback of the parser, which tells it as an error of the request."""


class BoundedConnection(HttpToolsProtocol):
    """A connection whose client may not keep it waiting; made by what ``bounded`` returns."""

    limits: ConnectionLimits

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._in_head = False
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._read_timer: asyncio.TimerHandle | None = None
        self._refusal: DeixisError | None = None
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a request, or refuse the connection."""
        super().connection_made(transport)
        most = self.limits.connections
        if len(self.connections) > 2 * most:  # those that were refused a moment ago among them
            transport.abort()
        elif len(self.connections) > most:
            self._refuse(OverloadedError(f"{most:,} connections are open, and no more are taken", retry_after_s=1))
        else:
            self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_waiting()
        if self._read_timer is not None:
            self._read_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on."""
        if self._refused or self.transport.is_closing():
            return
        began_before = self._in_head
        super().data_received(data)
        if self._refused or self.transport.is_closing():
            return
        if began_before and self._in_head:
            # The parser keeps a header until it is whole, however long it gets.
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(_head_too_large())
                return
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if not is_answering and self._head_timer is None and self.timeout_keep_alive_task is None:
            # The first bytes of a further request, or the rest of a body that nobody wants.
            self._wait_for_head()

    def on_message_begin(self) -> None:
        """Begin a request."""
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Have the request answered."""
        self._in_head = False
        self._stop_waiting()
        # Each header with its colon, blank and end of line: very many short ones are many bytes too.
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > MAX_HEAD_BYTES:
            self._refusal = _head_too_large()
            raise _RefusedError
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what the parser refused, in the form of every other error."""
        del msg  # one text for everything
        self._refuse(self._refusal or MalformedRequestError("the head or the framing of the request is no HTTP/1.1"))

    def pause_writing(self) -> None:
        """Wait until the client reads."""
        super().pause_writing()
        self._read_timer = self.loop.call_later(self.limits.read_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Write on."""
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None
        super().resume_writing()

    def on_response_complete(self) -> None:
        """Wait for the next request; or, where the connection ends, for the client to read, and not for ever."""
        super().on_response_complete()
        if self.transport.is_closing():
            self.loop.call_later(self.limits.read_timeout_s, self.transport.abort)

    def timeout_keep_alive_handler(self) -> None:
        """End a connection that is not used any more, also where its last answer was never read."""
        self.transport.abort()

    def _wait_for_head(self) -> None:
        self._head_timer = self.loop.call_later(self.limits.head_timeout_s, self._head_is_late)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        timeout_s = self.limits.head_timeout_s
        self._refuse(
            RequestTimeoutError(f"no whole head of a request arrived within {timeout_s:g} s; send it in one piece")
        )

    def _refuse(self, error: DeixisError) -> None:
        """Answer without asking the application, and end the connection."""
        self._stop_waiting()
        self._refused = True
        if self.cycle is not None and not self.cycle.response_complete:
            if not self.cycle.more_body:
                self.cycle.keep_alive = False  # what came before is answered first, and then the connection ends
                return
            self.cycle.disconnected = True  # the rest of the body will not come
            self.cycle.message_event.set()
            if self.cycle.response_started:
                self.transport.abort()
                return
        answer = problem_response(error, {"Connection": "close"})
        log.info("connection_refused", problem=kind_of(error).slug, client=self.client[0] if self.client else None)
        lines = [f"HTTP/1.1 {answer.status_code} {kind_of(error).title}".encode()]
        lines += [name + b": " + value for name, value in answer.raw_headers]
        self.transport.write(b"\r\n".join([*lines, b"", bytes(answer.body)]))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(_LINGER_S, self.transport.abort)


def bounded(limits: ConnectionLimits) -> type[asyncio.Protocol]:
    """Return what uvicorn makes for each connection."""
    return type("Connection", (BoundedConnection,), {"limits": limits})


def _head_too_large() -> HeadTooLargeError:
    return HeadTooLargeError(
        f"the request's line and headers have more than {MAX_HEAD_BYTES:,} bytes; send long fields as a form or JSON"
    )
