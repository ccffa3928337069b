"""The playground at /: a page to try the service in a browser. It loads nothing from other hosts."""

import re
from importlib.resources import files
from pathlib import PurePosixPath

from fastapi import APIRouter, FastAPI
from fastapi.responses import Response

from app.api.routing import add_routes
from app.errors import UnknownRouteError

_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".jpg": "image/jpeg",
}
# Lower-case names in subfolders: no dot segments, and no Python, Markdown or hidden files.
_ASSET = re.compile(r"([a-z-]+/)*[a-z_-]+\.(css|js|svg|jpg)", re.ASCII)

# No inline code and nothing from other hosts; images are shown from blob: URLs.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob: data:;"
    " frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)

router = APIRouter(include_in_schema=False)


@router.get("/")
def page() -> Response:
    """Return the page; its URLs are relative, so that a proxy may add a prefix."""
    return _file("page.html")


@router.get("/playground/{asset:path}")
def asset(asset: str) -> Response:
    """Return one of the page's files."""
    if not _ASSET.fullmatch(asset) or not files(__name__).joinpath(asset).is_file():
        raise UnknownRouteError(f"unknown route /playground/{asset}; the page is at /")
    return _file(asset)


def _file(name: str) -> Response:
    content = files(__name__).joinpath(name).read_bytes()
    # Revalidated at every load, so that an upgrade takes effect; the files are small.
    headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"}
    return Response(content, media_type=_MEDIA_TYPES[PurePosixPath(name).suffix], headers=headers)


def install(app: FastAPI) -> None:
    """Add the page to the application."""
    add_routes(app, router)
