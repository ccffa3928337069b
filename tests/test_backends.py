"""In process and over HTTP give the same bodies, and a server's refusals come back as they were told."""

from contextlib import asynccontextmanager

import httpx
import pytest

from app.api.schemas import LabelSetBody
from app.backends import InProcess, OverHttp, RefusedError
from app.errors import DeixisError, NotReadyError
from app.main import create_app
from app.service import Question
from tests.conftest import picture

pytestmark = pytest.mark.anyio

COLOURS = Question(labels=["red", "green", "blue"], top_k=1)


@pytest.fixture(params=["in process", "over HTTP"])
def opened(request, settings, encoder):
    """Open the application and return one of the two backends on it."""

    @asynccontextmanager
    async def open_backend():
        app = create_app(settings, lambda _: [encoder])
        async with app.router.lifespan_context(app):
            if request.param == "in process":
                yield InProcess(app.state.service)
            else:
                transport = httpx.ASGITransport(app, raise_app_exceptions=False)
                async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                    yield OverHttp(client)

    return open_backend


def over_handler(handler) -> OverHttp:
    return OverHttp(httpx.AsyncClient(transport=httpx.MockTransport(handler), base_url="http://test"))


async def test_images_are_answered_in_order(opened):
    async with opened() as backend:
        results = await backend.classify([picture("green"), picture("red"), picture("blue")], COLOURS)

    assert [result.predictions[0].label for result in results] == ["green", "red", "blue"]


async def test_a_bad_image_has_its_error_in_its_own_result(opened):
    async with opened() as backend:
        results = await backend.classify([picture("green"), b"no picture"], COLOURS)

    assert results[0].error is None
    assert results[1].error.type == "urn:deixis:problem:not-an-image"


@pytest.mark.parametrize("count", [1, 3])
async def test_bad_images_alone_are_results_and_no_failure(opened, count):
    async with opened() as backend:
        results = await backend.classify([b"no picture"] * count, COLOURS)

    assert [result.error.type for result in results] == ["urn:deixis:problem:not-an-image"] * count


async def test_images_that_are_bad_in_different_ways_are_each_told(opened, settings):
    async with opened() as backend:
        results = await backend.classify([b"no picture", picture() + bytes(settings.max_image_bytes)], COLOURS)

    kinds = [result.error.type.rpartition(":")[2] for result in results]
    assert kinds == ["not-an-image", "image-too-large"]


@pytest.mark.parametrize(
    ("question", "told"),
    [
        (Question(), "give labels"),
        (Question(label_set="nope"), "unknown label set 'nope'"),
        (Question(labels=["a"], model="nope"), "unknown model 'nope'; known: fake"),
        (Question(labels=["a"], template="nope"), "unknown template set 'nope'"),
    ],
)
async def test_a_wrong_question_is_an_error_whatever_the_images(opened, question, told):
    async with opened() as backend:
        with pytest.raises(DeixisError, match=told):
            await backend.classify([picture(), picture()], question)


async def test_too_many_labels_are_one_error_and_no_fault_of_the_images(opened, settings):
    labels = [f"label {number}" for number in range(settings.max_labels + 1)]
    async with opened() as backend:
        for count in (1, 2):
            with pytest.raises(DeixisError, match="DEIXIS_MAX_LABELS"):
                await backend.classify([picture()] * count, Question(labels=labels))


async def test_label_sets_are_written_listed_and_read(opened):
    async with opened() as backend:
        await backend.put_label_set("two", LabelSetBody(classes=["a", "b"]))
        await backend.put_label_set("two", LabelSetBody(classes=["a", "b", "c"], templates="ensemble"))
        await backend.put_label_set("grün 🌿", LabelSetBody(classes=["leaf"]))
        listed = await backend.label_sets()
        latest, first = await backend.label_set("two"), await backend.label_set("two@1")

    assert [(each.name, each.version, each.classes) for each in listed] == [("grün 🌿", 1, 1), ("two", 2, 3)]
    assert (latest.version, latest.templates, first.version) == (2, "ensemble", 1)
    assert [each.name for each in first.classes] == ["a", "b"]


async def test_a_full_server_is_waited_for_as_it_asks(monkeypatch):
    waits: list[float] = []

    async def note(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr("app.backends.asyncio.sleep", note)
    answers = iter([httpx.Response(503, headers={"Retry-After": "7"}), httpx.Response(200, json={"models": []})])

    found = await over_handler(lambda _: next(answers)).models()

    assert found.models == []
    assert len(waits) == 1
    assert 7 <= waits[0] <= 7 * 1.5


@pytest.mark.parametrize("told", ["Wed, 21 Oct 2026 07:28:00 GMT", "", "soon", "-5"])
async def test_a_time_to_wait_that_is_no_number_of_seconds_is_taken_for_one_second(monkeypatch, told):
    """A proxy in front may write a date."""
    waits: list[float] = []

    async def note(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr("app.backends.asyncio.sleep", note)
    answers = iter([httpx.Response(503, headers={"Retry-After": told}), httpx.Response(200, json={"models": []})])

    await over_handler(lambda _: next(answers)).models()

    assert len(waits) == 1
    assert 1 <= waits[0] <= 1.5


async def test_a_server_that_stays_full_is_given_up(monkeypatch):
    async def at_once(_: float) -> None:
        pass

    monkeypatch.setattr("app.backends.asyncio.sleep", at_once)

    with pytest.raises(RefusedError, match="answered 503"):
        await over_handler(lambda _: httpx.Response(503)).models()


async def test_something_else_at_that_address_is_told_as_such():
    with pytest.raises(RefusedError, match="is it one"):
        await over_handler(lambda _: httpx.Response(404, text="<html>")).models()


async def test_no_server_at_all_is_told_as_such():
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    with pytest.raises(NotReadyError, match="is the server running"):
        await over_handler(refuse).label_set("x")
