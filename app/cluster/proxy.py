"""Turns error responses of Ray's proxies into problem details.

To use it, set ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=app.cluster.proxy:middlewares`` on every node.
"""

import json
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_PROBLEM = json.dumps(
    {
        "type": "urn:deixis:problem:not-ready",
        "title": "The service is not ready",
        "status": 503,
        "detail": "the process that handled this request stopped, or no process is available; try again",
    }
).encode()
_RETRY_AFTER_S = b"1"


def middlewares() -> list[Middleware]:
    """Return the middleware of Ray's proxies; called by Ray."""
    return [Middleware(_ProxyErrors)]


class _ProxyErrors:
    """Responds with 503 and problem details if the proxy fails or sends its own 500 or 503.

    Errors of an edge are problem details and pass unchanged. All other errors come from the proxy: the edge crashed
    during the request, or there is no edge.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_started = is_replaced = False

        async def refuse() -> None:
            await send(_start())
            await send({"type": "http.response.body", "body": _PROBLEM})

        async def send_or_replace(message: Message) -> None:
            nonlocal is_started, is_replaced
            if message["type"] == "http.response.start":
                is_started = True
                is_replaced = message["status"] in {500, 503} and not _is_problem(message["headers"])
                if is_replaced:
                    await refuse()
            if not is_replaced:
                await send(message)

        try:
            await self._app(scope, receive, send_or_replace)
        except Exception:
            if is_started:
                raise  # a response in progress can only be aborted
        if not is_started:
            await refuse()


def _is_problem(headers: Any) -> bool:
    return any(name.lower() == b"content-type" and b"problem+json" in value for name, value in headers)


def _start() -> Message:
    return {
        "type": "http.response.start",
        "status": 503,
        "headers": [
            (b"content-type", b"application/problem+json"),
            (b"content-length", str(len(_PROBLEM)).encode()),
            (b"retry-after", _RETRY_AFTER_S),
        ],
    }
