"""Both backends return the same answers and the same errors."""

from contextlib import asynccontextmanager

import httpx
import pytest

from app.classification.request import ClassifyRequest
from app.cli.backends import LabelSetInput
from app.cli.backends.in_process import InProcessBackend
from app.cli.backends.over_http import HttpBackend, open_http_backend
from app.errors import ConfigurationError, DeixisError
from app.main import create_app
from app.types import ClassEntry
from deixis import AsyncClient, ProblemError, UnreachableError
from deixis import ClientError as RemoteError
from tests.api.test_examples import CLASSES, shade
from tests.conftest import picture

pytestmark = pytest.mark.anyio

ERRORS = (DeixisError, RemoteError)
COLOURS = ClassifyRequest(labels=["red", "green", "blue"], top_k=1)


@pytest.fixture(params=["in process", "over HTTP"])
def opened(request, settings, encoder):
    """A function that opens one of the two backends on the application; keyword arguments are settings."""

    @asynccontextmanager
    async def open_backend(**changes):
        app = create_app(settings.model_copy(update=changes), lambda _: [encoder])
        async with app.router.lifespan_context(app):
            if request.param == "in process":
                yield InProcessBackend(app.state.service)
            else:
                async with AsyncClient("http://localhost", transport=httpx.ASGITransport(app)) as client:
                    yield HttpBackend(client)

    return open_backend


def label_set(*names, **fields) -> LabelSetInput:
    return LabelSetInput([ClassEntry(name) for name in names], **fields)


async def test_results_are_in_the_order_of_the_images(opened):
    async with opened() as backend:
        results = await backend.classify([picture("green"), picture("red"), picture("blue")], COLOURS)

    assert [result.predictions[0].label for result in results] == ["green", "red", "blue"]


async def test_a_pinned_request_names_the_current_model_and_version(opened):
    async with opened() as backend:
        model = (await backend.pin(COLOURS)).model
        assert model
        for version, classes in ((1, ["red"]), (2, ["red", "green"])):
            await backend.put_label_set("colours", label_set(*classes))
            pinned = await backend.pin(ClassifyRequest(label_set="colours", top_k=1))
            assert (pinned.label_set, pinned.model, pinned.top_k) == (f"colours@{version}", model, 1)
        assert (await backend.pin(ClassifyRequest(label_set="colours@1"))).label_set == "colours@1"


async def test_a_bad_image_has_an_error_in_its_result(opened):
    async with opened() as backend:
        results = await backend.classify([picture("green"), b"no picture"], COLOURS)

    assert results[0].error is None
    assert results[1].error.type == "urn:deixis:problem:not-an-image"


@pytest.mark.parametrize("count", [1, 3])
async def test_a_request_with_bad_images_only_does_not_fail(opened, count):
    async with opened() as backend:
        results = await backend.classify([b"no picture"] * count, COLOURS)

    assert [result.error.type for result in results] == ["urn:deixis:problem:not-an-image"] * count


async def test_images_with_different_errors_have_each_their_own(opened, settings):
    async with opened() as backend:
        results = await backend.classify([b"no picture", picture() + bytes(settings.max_image_bytes)], COLOURS)

    kinds = [result.error.type.rpartition(":")[2] for result in results]
    assert kinds == ["not-an-image", "image-too-large"]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ClassifyRequest(), "give labels"),
        (ClassifyRequest(label_set="nope"), "unknown label set 'nope'"),
        (ClassifyRequest(labels=["a"], model="nope"), "unknown model 'nope'; known: fake"),
        (ClassifyRequest(labels=["a"], template="nope"), "unknown template set 'nope'"),
    ],
)
async def test_an_invalid_request_is_an_error(opened, request_, message):
    async with opened() as backend:
        with pytest.raises(ERRORS, match=message):
            await backend.classify([picture(), picture()], request_)


async def test_too_many_labels_are_an_error_of_the_request_and_not_of_its_images(opened, settings):
    labels = [f"label {number}" for number in range(settings.max_labels + 1)]
    async with opened() as backend:
        for count in (1, 2):
            with pytest.raises(ERRORS, match="DEIXIS_MAX_LABELS"):
                await backend.classify([picture()] * count, ClassifyRequest(labels=labels))


async def test_label_sets_are_written_listed_and_read(opened):
    async with opened() as backend:
        await backend.put_label_set("two", label_set("a", "b"))
        await backend.put_label_set("two", label_set("a", "b", "c", templates="ensemble"))
        await backend.put_label_set("grün 🌿", label_set("leaf"))
        listed = await backend.label_sets()
        latest, first = await backend.label_set("two"), await backend.label_set("two@1")

    assert [(each.name, each.version, each.classes) for each in listed] == [("grün 🌿", 1, 1), ("two", 2, 3)]
    assert (latest.version, latest.templates, first.version) == (2, "ensemble", 1)
    assert [each.name for each in first.classes] == ["a", "b"]


# --- example images ------------------------------------------------------------------------------------------------

THINGS = label_set(*CLASSES)


async def ignore(done, total):
    pass


async def add_examples(backend, per_class=4):
    """Add labelled examples, compare the methods, and return the result of the upload."""
    pairs = [(shade(kind, number), name) for number in range(per_class) for kind, name in enumerate(CLASSES)]
    added = await backend.add_examples("things", [image for image, _ in pairs], [(name,) for _, name in pairs])
    await backend.select_methods("things", added.job, ignore)
    return added


async def test_examples_are_added_counted_and_deleted(opened):
    async with opened() as backend:
        await backend.put_label_set("things", THINGS)
        images = [shade(kind, 0) for kind in range(3)]
        added = await backend.add_examples("things", [*images, b"no picture"], [("tomato",), (), (" sky ",), ("leaf",)])
        assert (added.added, added.relabelled, added.duplicates) == (3, 0, 0)
        assert [each.image for each in added.skipped] == [3]
        assert added.counts == await backend.example_counts("things")
        assert (added.counts.labelled, added.counts.unlabelled) == ({"sky": 1, "tomato": 1}, 1)
        again = await backend.add_examples("things", images, [(), ("leaf",), ("tomato",)])
        assert (again.added, again.relabelled, again.duplicates) == (0, 2, 1)
        gone = await backend.delete_examples("things", classname="tomato", unlabelled=False, everything=False)
        assert (gone.deleted, gone.counts.labelled) == (2, {"leaf": 1})
        none = await backend.delete_examples("things", classname=None, unlabelled=True, everything=False)
        assert none.deleted == 0
        rest = await backend.delete_examples("things", classname=None, unlabelled=False, everything=True)
        assert (rest.deleted, rest.counts.labelled, rest.counts.unlabelled) == (1, {}, 0)


@pytest.mark.parametrize("classes", [(), ("tomato",), ("tomato", " sky")])
async def test_images_of_one_class_of_several_or_of_none_are_added_alone_or_together(opened, classes):
    async with opened() as backend:
        await backend.put_label_set("things", THINGS)
        for numbers in ([0], [1, 2]):
            images = [shade(0, number) for number in numbers]
            assert (await backend.add_examples("things", images, [classes] * len(images))).added == len(images)
        counts = await backend.example_counts("things")
        assert counts.labelled == {classname.strip(): 3 for classname in classes}
        assert counts.unlabelled == (0 if classes else 3)


@pytest.mark.parametrize("labelled", [True, False])
async def test_an_upload_of_bad_images_only_skips_each_of_them(opened, settings, labelled):
    async with opened() as backend:
        await backend.put_label_set("things", THINGS)
        images = [b"no picture", picture() + bytes(settings.max_image_bytes), b""]
        for count in (1, 3):
            added = await backend.add_examples("things", images[:count], [("leaf",) if labelled else ()] * count)
            assert (added.added, added.job) == (0, None)
            assert [each.image for each in added.skipped] == list(range(count))
        assert "DEIXIS_MAX_IMAGE_BYTES" in added.skipped[1].problem
        assert added.counts.revision == 0


async def test_invalid_examples_are_an_error(opened):
    async with opened() as backend:
        await backend.put_label_set("things", THINGS)
        with pytest.raises(ERRORS, match="unknown class 'puma'; known: leaf, sky, tomato"):
            await backend.add_examples("things", [shade(0, 0)], [("puma",)])
        for work in (
            backend.add_examples("none", [shade(0, 0)], [()]),
            backend.example_counts("none"),
            backend.delete_examples("none", classname=None, unlabelled=False, everything=True),
            backend.selection("none", None),
        ):
            with pytest.raises(ERRORS, match="unknown label set 'none'; known: things"):
                await work
        with pytest.raises(ERRORS, match="wait until the methods have been compared"):
            await backend.selection("things", None)
        with pytest.raises(ERRORS, match="unknown model 'nope'; known: fake"):
            await backend.selection("things", "nope")


async def test_methods_are_compared_and_the_selected_one_is_used(opened):
    async with opened() as backend:
        await backend.put_label_set("things", THINGS)
        added = await add_examples(backend)
        assert added.added == 12
        selection = await backend.selection("things", None)
        assert (selection.current, selection.labelled, selection.method in {"gda", "tip-adapter"}) == (True, 12, True)
        named = await backend.selection("things", "fake")
        assert (named.method, named.examples_revision) == (selection.method, selection.examples_revision)
        (result,) = await backend.classify(
            [shade(2, 70)], ClassifyRequest(label_set="things", coverage=0.9, reject_below=0.1)
        )
        assert result.predictions[0].label == "sky"
        assert result.prediction_set[0] == "sky"
        assert result.rejected is False


@pytest.mark.parametrize(
    ("changes", "images", "classes"),
    [
        ({"max_request_bytes": 1500}, [shade(kind, number) for number in range(3) for kind in range(3)], ("leaf",)),
        ({"max_evaluation_images": 4}, [shade(0, number) for number in range(9)], ()),
    ],
    ids=["bytes", "number"],
)
async def test_examples_that_exceed_a_limit_of_one_request_are_all_added(opened, changes, images, classes):
    async with opened(**changes) as backend:
        await backend.put_label_set("things", THINGS)
        added = await backend.add_examples("things", images, [classes] * 9)
        assert (added.added, added.skipped) == (9, [])
        assert added.counts.labelled == dict.fromkeys(classes, 9)


# --- servers that refuse or do not respond ---------------------------------------------------------------------------


@pytest.fixture
def waits(monkeypatch):
    """The seconds that were waited."""
    seconds: list[float] = []

    async def note(duration: float) -> None:
        seconds.append(duration)

    monkeypatch.setattr("asyncio.sleep", note)
    return seconds


@asynccontextmanager
async def served_by(handler, monkeypatch):
    """Open the backend as commands do, on a server that ``handler`` simulates."""
    monkeypatch.setattr(
        "httpx.AsyncHTTPTransport.handle_async_request", httpx.MockTransport(handler).handle_async_request
    )
    async with open_http_backend("http://test") as backend:
        yield backend


async def test_numbers_are_sent_without_rounding(monkeypatch):
    sent = []

    def note(request):
        sent.append(request.content)
        return httpx.Response(400)

    request = ClassifyRequest(labels=["a"], coverage=1 - 1e-7, false_rejection_rate=1e-5, reject_below=1 / 3)
    async with served_by(note, monkeypatch) as backend:
        with pytest.raises(ProblemError):
            await backend.classify([picture()], request)
    for number in (b"0.9999999", b"1e-05", b"0.3333333333333333"):
        assert number in sent[0]


async def test_a_busy_server_is_retried_for_a_while(monkeypatch, waits):
    problem = {
        "type": "urn:deixis:problem:not-ready",
        "title": "Not ready",
        "status": 503,
        "detail": "the caption database 'everyday' is being built, 7 of 9 captions are encoded",
    }

    def busy(_):
        return httpx.Response(503, json=problem, headers={"Retry-After": "2"})

    async with served_by(busy, monkeypatch) as backend:
        with pytest.raises(ProblemError, match="7 of 9 captions are encoded"):
            await backend.classify([picture()], ClassifyRequest())
    assert len(waits) == 7
    assert all(2 <= seconds <= 2.5 for seconds in waits)


async def test_a_server_that_does_not_respond_is_an_error_at_once(monkeypatch, waits):
    def refuse(request):
        raise httpx.ConnectError("refused", request=request)

    async with served_by(refuse, monkeypatch) as backend:
        with pytest.raises(UnreachableError, match="is the server running"):
            await backend.label_set("x")
    assert waits == []


async def test_a_server_builds_the_default_database_itself(monkeypatch):
    async with served_by(lambda request: pytest.fail(f"{request.url} was requested"), monkeypatch) as backend:
        await backend.prepare_database(ClassifyRequest(), ignore)


async def test_a_key_that_is_not_ascii_is_an_error_that_names_the_variable(monkeypatch):
    monkeypatch.setenv("DEIXIS_API_KEY", "schlüssel")
    with pytest.raises(ConfigurationError, match=r"DEIXIS_API_KEY.*ASCII"):
        async with open_http_backend("http://test"):
            pass


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://test", ""])
async def test_a_server_that_is_not_a_url_is_an_error_that_says_how_to_write_it(url):
    with pytest.raises(ConfigurationError, match=r"is not a URL; write it as http://"):
        async with open_http_backend(url):
            pass
