"""The page /docs: Swagger UI over /openapi.json, from files of our own, so that it works without a network.

``fastapi_swagger`` is taken for the files of ``swagger-ui-dist`` that it carries; its code is not used.
"""

import json
from functools import lru_cache
from importlib.resources import files

from fastapi import APIRouter, FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, Response

from app.errors import UnknownRouteError

_MEDIA_TYPES = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon-32x32.png": "image/png",
}

# FastAPI starts the page by an inline script, and Swagger UI draws its icons from data: URLs.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:;"
    " frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)

# The files change with an upgrade only, and a day-old page of documentation still works.
_ASSET_HEADERS = {"Cache-Control": "public, max-age=86400"}

router = APIRouter(include_in_schema=False)


@router.get("/docs")
async def page() -> HTMLResponse:
    """Show the API and let its readers try it; addresses are relative, so that a proxy may add a prefix."""
    html = get_swagger_ui_html(
        openapi_url="openapi.json",
        title="Deixis",
        swagger_js_url="docs/swagger-ui-bundle.js",
        swagger_css_url="docs/swagger-ui.css",
        swagger_favicon_url="docs/favicon-32x32.png",
        swagger_ui_parameters={"validatorUrl": None},  # by default it shows the description to a validator elsewhere
    )
    html.headers["Content-Security-Policy"] = _POLICY
    return html


@router.get("/docs/{asset}")
def send_asset(asset: str) -> Response:
    """Send one of the files that the page consists of."""
    if asset not in _MEDIA_TYPES:
        raise UnknownRouteError(f"there is no route /docs/{asset}; /docs lists them")
    content = files("fastapi_swagger.resources").joinpath(asset).read_bytes()
    return Response(content, media_type=_MEDIA_TYPES[asset], headers=_ASSET_HEADERS)


def install(app: FastAPI) -> None:
    """Add the page and the description to an application that was made without FastAPI's own.

    Its pages load theirs from elsewhere, and it writes the description anew for every request.
    """
    assert app.docs_url is None
    assert app.redoc_url is None
    assert app.openapi_url is None
    app.include_router(router)

    @lru_cache(maxsize=1)
    def written() -> bytes:
        return json.dumps(app.openapi(), ensure_ascii=False, separators=(",", ":")).encode()

    @app.get("/openapi.json", include_in_schema=False)
    async def description() -> Response:
        """Describe the API for programs."""
        return Response(written(), media_type="application/json")
