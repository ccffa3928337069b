"""Caption databases and names without labels: in process and over HTTP give the same bodies."""

from contextlib import asynccontextmanager

import httpx
import numpy as np
import pytest

from app.api.schemas.databases import SearchFields
from app.captions.plan import BuildPlan
from app.classification.resolve import ClassifyRequest
from app.cli.backends import InProcess, OverHttp, RefusedError
from app.encoders.fake import FakeEncoder
from app.errors import DeixisError, NotReadyError
from app.main import create_app
from tests.captions.cased.test_lexicon import LICENCE, SAMPLE
from tests.captions_made import CAPTIONS, MANY, CaptionEncoder, made
from tests.conftest import picture

pytestmark = pytest.mark.anyio

COLOURS = ("red", "blue", "green", "#c04020", "red", "blue")


@pytest.fixture
def settings(settings, tmp_path):
    """With a small lexicon: what is in none of its files is taken for a noun."""
    place = tmp_path / "lexicon"
    place.mkdir()
    for name, text in SAMPLE.items():
        (place / name).write_text(text if name.endswith(".exc") else LICENCE + text)
    return settings.model_copy(update={"wordnet_dir": place})


@pytest.fixture
def databases(settings):
    return settings.data_dir / "captions"


@pytest.fixture
def files(tmp_path):
    """Pictures, one of them none."""
    found = []
    for number, colour in enumerate(COLOURS):
        found.append(tmp_path / f"{number}.png")
        found[-1].write_bytes(picture(colour, (8 + number, 8)))
    return found


@pytest.fixture
def both(settings):
    """Open the application and return both backends on it."""

    @asynccontextmanager
    async def open_backends(**changes):
        app = create_app(settings.model_copy(update=changes), lambda _: [CaptionEncoder()])
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                yield InProcess(app.state.service), OverHttp(client)

    return open_backends


async def alike(backends, work):
    """Return what both answer, which must be the same."""
    one, other = [await work(backend) for backend in backends]
    assert one == other
    return one


async def refused_alike(backends, work):
    """Return the message of both refusals, which must be the same."""
    messages = []
    for backend in backends:
        with pytest.raises(DeixisError) as told:
            await work(backend)
        messages.append(told.value.message)
    assert messages[0] == messages[1]
    return messages[0]


async def ignore(done, total):
    pass


async def test_databases_are_listed_and_told_alike(both, databases):
    made(databases / "things")
    made(databases / "others", encoder=FakeEncoder("other"))
    async with both() as backends:
        listed = await alike(backends, lambda backend: backend.databases())
        assert [each.name for each in listed] == ["others", "things"]
        assert "which is not served" in listed[0].problem
        assert listed[1].problem is None
        assert listed[1].models == ["fake"]
        for each in listed:
            assert await alike(backends, lambda backend, name=each.name: backend.database(name)) == each
        told = await refused_alike(backends, lambda backend: backend.database("none"))
        assert told == "unknown caption database 'none'; known: others, things"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"limit": 100},
        {"limit": 7, "offset": 900},
        {"contains": "UMBRELLA", "limit": 5},
        {"min_score": 0.3, "offset": 3},
        {"model": "fake"},
    ],
)
async def test_captions_are_found_alike_by_a_text_and_by_an_image(both, databases, fields):
    made(databases / "things", MANY)
    async with both() as backends:
        by_text = SearchFields(text="red", **fields)
        found = await alike(backends, lambda backend: backend.search_captions("things", by_text, None))
        assert len(found.results) <= by_text.limit
        by_image = SearchFields(**fields)
        image = picture("red")
        again = await alike(backends, lambda backend: backend.search_captions("things", by_image, image))
        assert again.searched == found.searched == 1000


async def test_searches_that_cannot_be_are_refused_alike(both, databases):
    made(databases / "things")
    made(databases / "others", encoder=FakeEncoder("other"))
    async with both() as backends:
        for name, fields, image, told in [
            ("none", {"text": "red"}, None, "unknown caption database 'none'"),
            ("NONE", {"text": "red"}, None, "is not a valid name of a caption database"),
            ("things", {}, None, "give either a text or an image"),
            ("things", {"text": "red"}, picture(), "give either a text or an image"),
            ("things", {"text": " "}, None, "text"),
            ("things", {"text": "x" * 1001}, None, "text"),
            ("things", {"text": "red", "model": "nope"}, None, "unknown model 'nope'; known: fake"),
            ("others", {"text": "red"}, None, "was built with 'other', which is not in service"),
            ("others", {"text": "red", "model": "fake"}, None, "another model, 'other'"),
            ("things", {}, b"nothing", "accepted formats"),
        ]:
            message = await refused_alike(
                backends,
                lambda backend, name=name, fields=fields, image=image: backend.search_captions(
                    name, SearchFields(**fields), image
                ),
            )
            assert told in message


async def test_a_database_is_deleted_by_either(both, databases):
    made(databases / "one")
    made(databases / "two")
    async with both() as (here, there):
        await here.delete_database("one")
        await there.delete_database("two")
        assert await here.databases() == await there.databases() == []
        told = await refused_alike((here, there), lambda backend: backend.delete_database("one"))
        assert told == "unknown caption database 'one'; known: none"


async def together(backend, files, question, advance=lambda: None):
    """Return the results and the names, without warnings, which have a test of their own, and ids of requests."""
    results, names = await backend.name_together(files, question, advance)
    for each in results:
        each.warnings = []
        if each.error is not None:
            each.error.request_id = None
    return results, names


@pytest.mark.parametrize("min_images", [0, 1, 2, 6])
async def test_images_are_named_together_alike(both, databases, files, min_images):
    made(databases / "things")
    question = ClassifyRequest(group=True, top_k=50, explain=True, options={"min_images": min_images})
    async with both() as backends:
        results, names = await alike(backends, lambda backend: together(backend, files, question))
    assert len(results) == len(files)
    best = [each.predictions[0].label for each in results]
    assert {each.label: each.images for each in names} == {name: best.count(name) for name in best}
    assert min(each.images for each in names) >= max(min_images, 1)
    assert all(each.explanation.captions for each in results)


async def test_images_that_are_named_together_have_the_same_warnings(both, databases, files):
    made(databases / "things")
    async with both() as backends:
        for given in (files, files[:1]):
            told = [
                (await backend.name_together(given, ClassifyRequest(group=True), lambda: None))[0]
                for backend in backends
            ]
            assert [each.warnings for each in told[0]] == [each.warnings for each in told[1]]


async def test_files_that_cannot_be_read_have_their_errors_in_their_places_alike(both, databases, files, tmp_path):
    made(databases / "things")
    (tmp_path / "bad.png").write_bytes(b"nothing")
    given = [tmp_path / "nowhere.png", files[0], tmp_path / "bad.png", files[1]]
    steps = []
    async with both() as backends:
        results, _ = await alike(
            backends,
            lambda backend: together(backend, given, ClassifyRequest(group=True), lambda: steps.append(1)),
        )
    assert [each.error is None for each in results] == [False, True, False, True]
    assert [len(each.predictions) > 0 for each in results] == [False, True, False, True]
    assert len(steps) == 2 * len(given)


@pytest.mark.parametrize("contents", [[None], [b"nothing"], [None, b"nothing", b""]], ids=["gone", "bad", "several"])
async def test_files_of_which_none_can_be_read_have_their_errors_alike(both, databases, tmp_path, contents):
    made(databases / "things")
    given = [tmp_path / f"{number}.png" for number in range(len(contents))]
    for file, content in zip(given, contents, strict=True):
        if content is not None:
            file.write_bytes(content)
    async with both() as backends:
        results, names = await alike(backends, lambda backend: together(backend, given, ClassifyRequest(group=True)))
    assert names == []
    assert [each.predictions for each in results] == [[] for _ in given]
    assert all(each.error.detail for each in results)


async def test_names_that_cannot_be_found_are_refused_alike(both, databases, files):
    async with both() as backends:
        for question, told in [
            (ClassifyRequest(group=True), "the model 'fake' has no caption database"),
            (ClassifyRequest(group=True, database="none"), "unknown caption database 'none'; known: none"),
            (ClassifyRequest(group=True, coverage=0.9), "coverage"),
            (ClassifyRequest(group=True, options={"alpha": 7}), "alpha"),
            (ClassifyRequest(group=True, labels=["red"]), "group"),
        ]:
            message = await refused_alike(
                backends,
                lambda backend, question=question: backend.name_together(files, question, lambda: None),
            )
            assert told in message


async def test_images_are_named_each_by_itself_alike_and_as_they_are_alone(both, databases, files):
    made(databases / "things")
    images = [file.read_bytes() for file in files]
    async with both() as backends:
        results = await alike(backends, lambda backend: backend.classify(images, ClassifyRequest(top_k=3)))
        for image, result in zip(images, results, strict=True):
            assert await alike(
                backends, lambda backend, image=image: backend.classify([image], ClassifyRequest(top_k=3))
            ) == [result]


async def test_a_build_here_is_seen_there(both, tmp_path):
    file = tmp_path / "captions.txt"
    file.write_text("\n".join(CAPTIONS), "utf-8")
    told = []

    async def advance(done, total):
        told.append((done, total))

    async with both() as (here, there):
        await here.build_database(" things ", BuildPlan("fake", files=(str(file),)), [file], advance)
        assert (await there.database("things")).captions == len(CAPTIONS)
        with pytest.raises(DeixisError, match="unknown model 'nope'"):
            await here.build_database("things", BuildPlan("nope", files=(str(file),)), [file], ignore)
        with pytest.raises(DeixisError, match="is not a valid name of a caption database"):
            await here.build_database("Things", BuildPlan("fake", files=(str(file),)), [file], ignore)
    assert told[-1] == (len(CAPTIONS), len(CAPTIONS))


async def test_texts_have_the_features_that_the_model_gives_them(both):
    async with both() as (here, _):
        rows = await here.text_features(None, ["red", "a dog"])
        assert here.default_model == "fake"
        np.testing.assert_allclose(rows, CaptionEncoder().encode_texts(["red", "a dog"]), atol=1e-6)
        np.testing.assert_array_equal(await here.text_features("fake", ["red", "a dog"]), rows)


async def test_words_are_prepared_only_where_they_will_be_asked(settings, databases):
    app = create_app(settings, lambda _: [CaptionEncoder()])
    async with app.router.lifespan_context(app):
        here = InProcess(app.state.service)
        await here.prepare_names(ClassifyRequest(), ignore)  # not wanted by the settings
        assert await here.databases() == []
        app.state.service.captions._build_wordnet = True
        made(databases / "things")
        await here.prepare_names(ClassifyRequest(database="things"), ignore)
        assert [each.name for each in await here.databases()] == ["things"]
        for question, told in [
            (ClassifyRequest(database="none"), "unknown caption database 'none'"),
            (ClassifyRequest(options={"alpha": 7}), "alpha"),
            (ClassifyRequest(method="zero-shot"), "give labels"),
            (ClassifyRequest(template="nope"), "unknown template set 'nope'"),
        ]:
            with pytest.raises(DeixisError, match=told):
                await here.prepare_names(question, ignore)
        assert [each.name for each in await here.databases()] == ["things"]
        told = []

        async def advance(done, total):
            told.append((done, total))

        await here.prepare_names(ClassifyRequest(), advance)
        _, made_of_words = await here.databases()
        assert (made_of_words.name, made_of_words.captions, told[-1]) == ("wordnet", 4, (4, 4))
        await here.prepare_names(ClassifyRequest(database="wordnet"), lambda *_: pytest.fail("it is there"))


async def test_words_that_are_asked_for_by_name_are_prepared_whatever_else_there_is(settings, databases):
    made(databases / "one")
    made(databases / "two")
    app = create_app(settings, lambda _: [CaptionEncoder()])
    async with app.router.lifespan_context(app):
        app.state.service.captions._build_wordnet = True
        here = InProcess(app.state.service)
        await here.prepare_names(ClassifyRequest(database="wordnet"), ignore)
        assert [each.name for each in await here.databases()] == ["one", "two", "wordnet"]


async def test_a_server_prepares_its_words_itself():
    def refuse(request):
        pytest.fail(f"{request.url} was asked")

    client = httpx.AsyncClient(transport=httpx.MockTransport(refuse), base_url="http://test")
    await OverHttp(client).prepare_names(ClassifyRequest(), ignore)


async def test_a_server_that_still_builds_its_words_is_waited_for_a_few_times(monkeypatch):
    waits = []

    async def note(seconds):
        waits.append(seconds)

    monkeypatch.setattr("asyncio.sleep", note)
    problem = {
        "type": "urn:deixis:problem:not-ready",
        "title": "Not ready",
        "status": 503,
        "detail": "the caption database 'wordnet' is being built, 7 of 9 captions are encoded",
    }
    transport = httpx.MockTransport(lambda _: httpx.Response(503, json=problem, headers={"Retry-After": "2"}))
    backend = OverHttp(httpx.AsyncClient(transport=transport, base_url="http://test"))

    with pytest.raises((RefusedError, NotReadyError), match="7 of 9 captions are encoded"):
        await backend.classify([picture()], ClassifyRequest())
    assert waits
    assert all(2 <= each <= 3 for each in waits)
