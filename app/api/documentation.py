"""The page /docs: Swagger UI for /openapi.json, served from local files so that it works without internet access.

Only the ``swagger-ui-dist`` files in the package ``fastapi_swagger`` are used, not its code.
"""

import json
from importlib.resources import files

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, Response

from app.api.routing import add_routes
from app.errors import UnknownRouteError

_MEDIA_TYPES = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon-32x32.png": "image/png",
}

# FastAPI starts the page with an inline script, and Swagger UI loads its icons from data: URLs.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:;"
    " frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)

# The files change only with an upgrade, and an outdated page still works for a day.
_ASSET_HEADERS = {"Cache-Control": "public, max-age=86400"}

router = APIRouter(include_in_schema=False)


@router.get("/docs")
async def page() -> HTMLResponse:
    """Return the page; its URLs are relative, so that a proxy may add a prefix."""
    html = get_swagger_ui_html(
        openapi_url="openapi.json",
        title="Deixis",
        swagger_js_url="docs/swagger-ui-bundle.js",
        swagger_css_url="docs/swagger-ui.css",
        swagger_favicon_url="docs/favicon-32x32.png",
        swagger_ui_parameters={"validatorUrl": None},  # by default it sends the description to an external validator
    )
    html.headers["Content-Security-Policy"] = _POLICY
    return html


@router.get("/docs/{asset}")
def send_asset(asset: str) -> Response:
    """Return one of the page's files."""
    if asset not in _MEDIA_TYPES:
        raise UnknownRouteError(f"unknown route /docs/{asset}; /docs lists all routes")
    content = files("fastapi_swagger.resources").joinpath(asset).read_bytes()
    return Response(content, media_type=_MEDIA_TYPES[asset], headers=_ASSET_HEADERS)


@router.get("/openapi.json")
def description(request: Request) -> Response:
    """Return the OpenAPI description; it takes a fifth of a second once, in a thread."""
    state = request.app.state
    if not hasattr(state, "openapi_json"):
        state.openapi_json = json.dumps(request.app.openapi(), ensure_ascii=False, separators=(",", ":")).encode()
    return Response(state.openapi_json, media_type="application/json")


def install(app: FastAPI) -> None:
    """Add /docs and /openapi.json to an application that was created without FastAPI's own.

    FastAPI's own pages load files from a CDN, and serialise the description for every request.
    """
    assert app.docs_url is None
    assert app.redoc_url is None
    assert app.openapi_url is None
    add_routes(app, router)
