"""In process and over HTTP give the same bodies, and a server's refusals come back as they were told."""

from contextlib import asynccontextmanager

import httpx
import pytest

from app.api.schemas.label_sets import LabelSetBody
from app.classification.resolve import ClassifyRequest
from app.cli.backends import InProcess, OverHttp, RefusedError
from app.errors import DeixisError, NotReadyError
from app.main import create_app
from tests.api.test_examples import CLASSES, shade
from tests.conftest import picture

pytestmark = pytest.mark.anyio

COLOURS = ClassifyRequest(labels=["red", "green", "blue"], top_k=1)


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


async def test_a_pinned_question_names_the_model_and_the_version_that_answer_now(opened):
    async with opened() as backend:
        model = (await backend.pinned(COLOURS)).model
        assert model
        for version, classes in ((1, ["red"]), (2, ["red", "green"])):
            await backend.put_label_set("colours", LabelSetBody(classes=classes))
            pinned = await backend.pinned(ClassifyRequest(label_set="colours", top_k=1))
            assert (pinned.label_set, pinned.model, pinned.top_k) == (f"colours@{version}", model, 1)
        assert (await backend.pinned(ClassifyRequest(label_set="colours@1"))).label_set == "colours@1"


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
        (ClassifyRequest(), "give labels"),
        (ClassifyRequest(label_set="nope"), "unknown label set 'nope'"),
        (ClassifyRequest(labels=["a"], model="nope"), "unknown model 'nope'; known: fake"),
        (ClassifyRequest(labels=["a"], template="nope"), "unknown template set 'nope'"),
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
                await backend.classify([picture()] * count, ClassifyRequest(labels=labels))


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


# --- example images ------------------------------------------------------------------------------------------------

THINGS = LabelSetBody(classes=list(CLASSES))


async def ignore(done, total):
    pass


async def teach(backend, each=4):
    """Add labelled examples, try the methods, and return what became of the images."""
    pairs = [(shade(kind, number), name) for number in range(each) for kind, name in enumerate(CLASSES)]
    told = await backend.add_examples("things", [image for image, _ in pairs], [name for _, name in pairs])
    await backend.try_methods("things", told.job, ignore)
    return told


async def test_examples_are_added_counted_and_deleted(opened):
    async with opened() as backend:
        await backend.put_label_set("things", THINGS)
        images = [shade(kind, 0) for kind in range(3)]
        told = await backend.add_examples("things", [*images, b"no picture"], ["tomato", None, " sky ", "leaf"])
        assert (told.added, told.relabelled, told.duplicates) == (3, 0, 0)
        assert [each.image for each in told.skipped] == [3]
        assert told.counts == await backend.example_counts("things")
        assert (told.counts.labelled, told.counts.unlabelled) == ({"sky": 1, "tomato": 1}, 1)
        again = await backend.add_examples("things", images, [None, "leaf", "tomato"])
        assert (again.added, again.relabelled, again.duplicates) == (0, 2, 1)
        gone = await backend.delete_examples("things", classname="tomato", unlabelled=False, everything=False)
        assert (gone.deleted, gone.counts.labelled) == (2, {"leaf": 1})
        none = await backend.delete_examples("things", classname=None, unlabelled=True, everything=False)
        assert none.deleted == 0
        rest = await backend.delete_examples("things", classname=None, unlabelled=False, everything=True)
        assert (rest.deleted, rest.counts.labelled, rest.counts.unlabelled) == (1, {}, 0)


@pytest.mark.parametrize("classname", [None, "tomato"])
async def test_images_of_one_class_or_of_none_are_added_alone_or_together(opened, classname):
    async with opened() as backend:
        await backend.put_label_set("things", THINGS)
        for numbers in ([0], [1, 2]):
            images = [shade(0, number) for number in numbers]
            assert (await backend.add_examples("things", images, [classname] * len(images))).added == len(images)
        counts = await backend.example_counts("things")
        assert counts.labelled == ({} if classname is None else {classname: 3})
        assert counts.unlabelled == (3 if classname is None else 0)


@pytest.mark.parametrize("labelled", [True, False])
async def test_bad_examples_alone_are_each_told_and_no_failure(opened, settings, labelled):
    async with opened() as backend:
        await backend.put_label_set("things", THINGS)
        images = [b"no picture", picture() + bytes(settings.max_image_bytes), b""]
        for count in (1, 3):
            told = await backend.add_examples("things", images[:count], (["leaf"] if labelled else [None]) * count)
            assert (told.added, told.job) == (0, None)
            assert [each.image for each in told.skipped] == list(range(count))
        assert "DEIXIS_MAX_IMAGE_BYTES" in told.skipped[1].problem
        assert told.counts.revision == 0


async def test_examples_that_cannot_be_are_an_error(opened):
    async with opened() as backend:
        await backend.put_label_set("things", THINGS)
        with pytest.raises(DeixisError, match="unknown class 'puma'; known: leaf, sky, tomato"):
            await backend.add_examples("things", [shade(0, 0)], ["puma"])
        for work in (
            backend.add_examples("none", [shade(0, 0)], [None]),
            backend.example_counts("none"),
            backend.delete_examples("none", classname=None, unlabelled=False, everything=True),
            backend.selection("none", None),
        ):
            with pytest.raises(DeixisError, match="unknown label set 'none'; known: things"):
                await work
        with pytest.raises(DeixisError, match="wait until the methods have been compared"):
            await backend.selection("things", None)
        with pytest.raises(DeixisError, match="unknown model 'nope'; known: fake"):
            await backend.selection("things", "nope")


async def test_methods_are_tried_and_the_choice_is_used(opened):
    async with opened() as backend:
        await backend.put_label_set("things", THINGS)
        told = await teach(backend)
        assert told.added == 12
        selection = await backend.selection("things", None)
        assert (selection.current, selection.labelled, selection.method) == (True, 12, selection.leaderboard[0].method)
        named = await backend.selection("things", "fake")
        assert (named.method, named.examples_revision) == (selection.method, selection.examples_revision)
        (result,) = await backend.classify(
            [shade(2, 70)], ClassifyRequest(label_set="things", coverage=0.9, reject_below=0.1)
        )
        assert result.predictions[0].label == "sky"
        assert result.prediction_set[0] == "sky"
        assert result.rejected is False


async def test_shares_reach_the_server_as_they_were_given():
    """Not rounded, and not in another notation that the server would not read."""
    sent = []

    def note(request):
        sent.append(request.content)
        return httpx.Response(400)

    question = ClassifyRequest(labels=["a"], coverage=1 - 1e-7, false_rejection_rate=1e-5, reject_below=1 / 3)
    with pytest.raises(DeixisError):
        await over_handler(note)._classify([picture()], question)
    for number in (b"0.9999999", b"1e-05", b"0.3333333333333333"):
        assert number in sent[0]


async def test_images_that_are_too_many_bytes_together_are_all_added_and_counted(settings, encoder):
    images = [shade(kind, number) for number in range(3) for kind in range(3)]
    app = create_app(settings.model_copy(update={"max_request_bytes": 1500}), lambda _: [encoder])
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            backend = OverHttp(client)
            await backend.put_label_set("things", THINGS)
            told = await backend.add_examples("things", images, ["leaf"] * 9)
            assert told.counts.labelled == {"leaf": 9}
            assert (told.added, told.skipped) == (9, [])


async def test_images_that_are_too_many_for_one_request_are_all_added(settings, encoder):
    app = create_app(settings.model_copy(update={"max_evaluation_images": 4}), lambda _: [encoder])
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            backend = OverHttp(client)
            await backend.put_label_set("things", THINGS)
            told = await backend.add_examples("things", [shade(0, number) for number in range(9)], [None] * 9)
            assert told.added == 9


async def test_a_full_server_is_waited_for_as_it_asks(monkeypatch):
    waits: list[float] = []

    async def note(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr("asyncio.sleep", note)
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

    monkeypatch.setattr("asyncio.sleep", note)
    answers = iter([httpx.Response(503, headers={"Retry-After": told}), httpx.Response(200, json={"models": []})])

    await over_handler(lambda _: next(answers)).models()

    assert len(waits) == 1
    assert 1 <= waits[0] <= 1.5


async def test_a_server_that_stays_full_is_given_up(monkeypatch):
    async def at_once(_: float) -> None:
        pass

    monkeypatch.setattr("asyncio.sleep", at_once)

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
