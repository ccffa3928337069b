"""Error responses of Ray's proxies."""

import httpx
import pytest
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse

from app.cluster.proxy import middlewares

pytestmark = pytest.mark.anyio


async def broken(scope, receive, send):
    raise ConnectionError("the edge crashed")


async def silent(scope, receive, send):
    pass


async def half(scope, receive, send):
    async def pieces():
        yield b"half"
        raise ConnectionError("the edge crashed")

    await StreamingResponse(pieces())(scope, receive, send)


async def response_of(app):
    (middleware,) = middlewares()
    wrapped = middleware.cls(app)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(wrapped), base_url="http://test") as client:
        return await client.get("/")


@pytest.mark.parametrize("app", [broken, silent, PlainTextResponse("died", 500), PlainTextResponse("no replica", 503)])
async def test_errors_of_the_proxy_become_problem_details_with_a_retry_after(app):
    response = await response_of(app)
    assert response.status_code == 503
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["retry-after"] == "1"
    assert response.json()["type"] == "urn:deixis:problem:not-ready"
    assert response.json()["status"] == 503


@pytest.mark.parametrize(
    "app",
    [
        PlainTextResponse("fine"),
        PlainTextResponse("no route", 404),
        JSONResponse({"status": 500}, 500, media_type="application/problem+json"),
        JSONResponse({"status": 503}, 503, media_type="application/problem+json"),
    ],
)
async def test_responses_of_an_edge_pass_unchanged(app):
    response = await response_of(app)
    assert (response.status_code, response.content) == (app.status_code, app.body)


async def test_a_response_that_is_aborted_stays_aborted():
    with pytest.raises(ConnectionError):
        await response_of(half)
