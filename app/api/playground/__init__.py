"""The page / : classify in a browser, from files of our own, without a build step and without other hosts."""

import re
from importlib.resources import files
from pathlib import PurePosixPath

from fastapi import APIRouter, FastAPI
from fastapi.responses import Response

from app.errors import UnknownRouteError

_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}
_ASSET = re.compile(r"[a-z_]+\.(css|js)")  # no path, and none of the files of Python beside them

# Nothing inline, nothing from elsewhere; pictures are shown from the browser's own memory.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob: data:;"
    " frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)

router = APIRouter(include_in_schema=False)


@router.get("/")
def page() -> Response:
    """Show the page; addresses in it are relative, so that a proxy may add a prefix."""
    return _file("page.html")


@router.get("/playground/{asset}")
def asset(asset: str) -> Response:
    """Send one of the files that the page consists of."""
    if not _ASSET.fullmatch(asset) or not files(__name__).joinpath(asset).is_file():
        raise UnknownRouteError(f"there is no route /playground/{asset}; / is the page")
    return _file(asset)


def _file(name: str) -> Response:
    content = files(__name__).joinpath(name).read_bytes()
    # Asked for again each time, so that an upgrade is seen; they are small.
    headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"}
    return Response(content, media_type=_MEDIA_TYPES[PurePosixPath(name).suffix], headers=headers)


def install(app: FastAPI) -> None:
    """Add the page to an application."""
    app.include_router(router)
