"""What Ray's proxies answer by themselves."""

import httpx
import pytest
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse

from app.cluster.proxy import middlewares

pytestmark = pytest.mark.anyio


async def broken(scope, receive, send):
    raise ConnectionError("the edge is gone")


async def silent(scope, receive, send):
    pass


async def half(scope, receive, send):
    async def pieces():
        yield b"half"
        raise ConnectionError("the edge is gone")

    await StreamingResponse(pieces())(scope, receive, send)


async def answered(app):
    (middleware,) = middlewares()
    wrapped = middleware.cls(app)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(wrapped), base_url="http://test") as client:
        return await client.get("/")


@pytest.mark.parametrize("app", [broken, silent, PlainTextResponse("died", 500), PlainTextResponse("no replica", 503)])
async def test_what_is_told_in_other_words_becomes_a_problem_with_a_time_to_wait(app):
    answer = await answered(app)
    assert answer.status_code == 503
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["retry-after"] == "1"
    assert answer.json()["type"] == "urn:deixis:problem:not-ready"
    assert answer.json()["status"] == 503


@pytest.mark.parametrize(
    "app",
    [
        PlainTextResponse("fine"),
        PlainTextResponse("no route", 404),
        JSONResponse({"status": 500}, 500, media_type="application/problem+json"),
        JSONResponse({"status": 503}, 503, media_type="application/problem+json"),
    ],
)
async def test_what_an_edge_answers_passes_as_it_is(app):
    answer = await answered(app)
    assert (answer.status_code, answer.content) == (app.status_code, app.body)


async def test_an_answer_that_breaks_off_breaks_off():
    with pytest.raises(ConnectionError):
        await answered(half)
