"""What Ray's proxies answer by themselves, in the form of all other errors.

``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=app.cluster.proxy:middlewares`` on every node has them use it.
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
        "detail": "the process that had this request went away, or none is there; try again",
    }
).encode()
_RETRY_AFTER_S = b"1"


def middlewares() -> list[Middleware]:
    """Return what Ray's proxies put before the edges; called by Ray."""
    return [Middleware(_PlainErrors)]


class _PlainErrors:
    """Answers 503 with a problem where the proxy would answer 500 or 503 in words of its own, or fails, or is silent.

    An edge tells errors as problems, whose content type passes; what comes otherwise is the proxy's: the edge died with
    the request, or there is none.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = replaced = False

        async def refuse() -> None:
            await send(_start())
            await send({"type": "http.response.body", "body": _PROBLEM})

        async def told(message: Message) -> None:
            nonlocal begun, replaced
            if message["type"] == "http.response.start":
                begun = True
                replaced = message["status"] in {500, 503} and not _is_ours(message["headers"])
                if replaced:
                    await refuse()
            if not replaced:
                await send(message)

        try:
            await self._app(scope, receive, told)
        except Exception:
            if begun:
                raise  # in the middle of an answer nothing can be told but its end
        if not begun:
            await refuse()


def _is_ours(headers: Any) -> bool:
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
