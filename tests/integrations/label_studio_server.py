"""As much of Label Studio as a backend asks: files behind its token, and addresses that it signs."""

import base64
import json
import time
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from tests.conftest import picture

LEGACY_TOKEN = "0123456789abcdef"


def web_token(**claims) -> str:
    """Return a JSON web token with a signature that nobody checks."""
    parts = [{"alg": "none"}, claims]
    encoded = [base64.urlsafe_b64encode(json.dumps(each).encode()).decode().rstrip("=") for each in parts]
    return ".".join([*encoded, "c2ln"])


PERSONAL_TOKEN = web_token(token_type="refresh", exp=4_000_000_000)


class LabelStudio:
    """Serves pictures called like a colour; ``asked`` records paths and the tokens shown for them."""

    def __init__(self, *, has_proxy: bool = True) -> None:
        self.asked: list[tuple[str, str | None]] = []
        self.refreshed = 0
        self.access = web_token(token_type="access", exp=time.time() + 3600)
        self._has_proxy = has_proxy
        self.storage: str | None = None
        self.app = Starlette(
            routes=[
                Route("/data/{rest:path}", self._file),
                Route("/storage-data/uploaded/", self._proxied),
                Route("/tasks/{task}/presign/", self._signed),
                Route("/api/token/refresh/", self._refresh, methods=["POST"]),
                Route("/user/login/", lambda _: Response("<html>log in</html>", media_type="text/html")),
            ]
        )

    def _is_let_in(self, request: Request) -> bool:
        shown = request.headers.get("authorization")
        self.asked.append((request.url.path, shown))
        return shown in {f"Token {LEGACY_TOKEN}", f"Bearer {self.access}"}

    async def _file(self, request: Request) -> Response:
        if not self._is_let_in(request):
            return RedirectResponse(f"/user/login/?next={quote(request.url.path)}", 302)
        name = request.query_params.get("d", request.path_params["rest"])
        return _picture_of(name)

    async def _proxied(self, request: Request) -> Response:
        if not self._is_let_in(request):
            return Response(status_code=401)
        return _picture_of(request.query_params["filepath"]) if self._has_proxy else Response(status_code=400)

    async def _signed(self, request: Request) -> Response:
        if not self._is_let_in(request):
            return Response(status_code=401)
        key = base64.urlsafe_b64decode(request.query_params["fileuri"]).decode()
        return RedirectResponse(
            f"{self.storage}/{request.path_params['task']}/{key.rpartition('/')[2]}?signature=x", 303
        )

    async def _refresh(self, request: Request) -> Response:
        self.refreshed += 1
        if (await request.json()) != {"refresh": PERSONAL_TOKEN}:
            return JSONResponse({"detail": "Token is invalid"}, 401)
        return JSONResponse({"access": self.access})


class Storage:
    """A storage elsewhere, for which addresses are signed."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None]] = []
        self.app = Starlette(routes=[Route("/{rest:path}", self._file)])

    async def _file(self, request: Request) -> Response:
        self.asked.append((request.url.path, request.headers.get("authorization")))
        if request.url.path.endswith("around"):
            return RedirectResponse(str(request.url), 302)
        return _picture_of(request.url.path)


def _picture_of(name: str) -> Response:
    stem = name.rpartition("/")[2].partition(".")[0]
    if stem == "none":
        return Response(status_code=404)
    if stem == "text":
        return Response(b"no picture at all")
    if stem == "huge":
        return Response(b"\xff" * 3_000_000)
    return Response(picture(stem), media_type="image/png")
