"""Caption databases and discovered labels: both backends return the same answers and the same errors."""

from contextlib import asynccontextmanager

import httpx
import numpy as np
import pytest

from app.captions.build_plan import BuildPlan
from app.captions.query import CaptionQuery
from app.classification.request import ClassifyRequest
from app.cli.backends.in_process import InProcessBackend
from app.cli.backends.over_http import HttpBackend
from app.cli.common import message_of
from app.encoders.fake import FakeEncoder
from app.errors import DeixisError
from app.main import create_app
from deixis import AsyncClient
from deixis import ClientError as RemoteError
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
    return settings.model_copy(update={"wordnet_dir": place, "default_database": "wordnet"})


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
        client = AsyncClient("http://localhost", transport=httpx.ASGITransport(app))
        async with app.router.lifespan_context(app), client:
            yield InProcessBackend(app.state.service), HttpBackend(client)

    return open_backends


async def alike(backends, work):
    """Return the answer of both backends, which must be equal."""
    one, other = [await work(backend) for backend in backends]
    assert one == other
    return one


async def refused_alike(backends, work):
    """Return the message of the errors of both backends, which must be equal."""
    messages = []
    for backend in backends:
        with pytest.raises((DeixisError, RemoteError)) as raised:
            await work(backend)
        messages.append(message_of(raised.value))
    assert messages[0] == messages[1]
    return messages[0]


async def ignore(done, total):
    pass


async def test_databases_are_listed_and_shown(both, databases):
    made(databases / "things")
    made(databases / "others", encoder=FakeEncoder("other"))
    async with both() as backends:
        listed = await alike(backends, lambda backend: backend.databases())
        assert [each.name for each in listed] == ["others", "things"]
        assert "which is not in service" in listed[0].problem
        assert listed[1].problem is None
        assert listed[1].models == ["fake"]
        for each in listed:
            assert await alike(backends, lambda backend, name=each.name: backend.database(name)) == each
        message = await refused_alike(backends, lambda backend: backend.database("none"))
        assert message == "unknown caption database 'none'; known: others, things"


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
async def test_captions_are_found_by_text_and_by_image(both, databases, fields):
    made(databases / "things", MANY)
    async with both() as backends:
        by_text = CaptionQuery("things", text="red", **fields)
        found = await alike(backends, lambda backend: backend.search_captions(by_text))
        assert len(found.results) <= by_text.limit
        by_image = CaptionQuery("things", image=picture("red"), **fields)
        again = await alike(backends, lambda backend: backend.search_captions(by_image))
        assert again.searched == found.searched == 1000


async def test_invalid_searches_are_refused(both, databases):
    made(databases / "things")
    made(databases / "others", encoder=FakeEncoder("other"))
    async with both() as backends:
        for name, fields, image, part in [
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
            query = CaptionQuery(name, image=image, **fields)
            message = await refused_alike(backends, lambda backend, query=query: backend.search_captions(query))
            assert part in message


async def test_a_database_is_deleted(both, databases):
    made(databases / "one")
    made(databases / "two")
    async with both() as (here, there):
        await here.delete_database("one")
        await there.delete_database("two")
        assert await here.databases() == await there.databases() == []
        message = await refused_alike((here, there), lambda backend: backend.delete_database("one"))
        assert message == "unknown caption database 'one'; known: none"


async def together(backend, files, request, on_progress=ignore):
    """Return the results and the names, without warnings, which another test compares, and without request ids."""
    results, names = await backend.classify_together(files, request, on_progress)
    for each in results:
        each.warnings = []
        if each.error is not None:
            each.error.request_id = None
    return results, names


@pytest.mark.parametrize("min_images", [0, 1, 2, 6])
async def test_a_group_of_images_shares_labels(both, databases, files, min_images):
    made(databases / "things")
    request = ClassifyRequest(group=True, top_k=50, explain=True, options={"min_images": min_images})
    async with both() as backends:
        results, names = await alike(backends, lambda backend: together(backend, files, request))
    assert len(results) == len(files)
    best = [each.predictions[0].label for each in results]
    assert {each.label: each.images for each in names} == {name: best.count(name) for name in best}
    assert min(each.images for each in names) >= max(min_images, 1)
    assert all(each.explanation.captions for each in results)


async def test_a_group_of_images_has_warnings(both, databases, files):
    made(databases / "things")
    async with both() as backends:
        for given in (files, files[:1]):
            here, there = [
                (await backend.classify_together(given, ClassifyRequest(group=True), ignore))[0] for backend in backends
            ]
            assert [result.warnings for result in here] == [result.warnings for result in there]


async def test_unreadable_files_of_a_group_have_their_errors(both, databases, files, tmp_path):
    made(databases / "things")
    (tmp_path / "bad.png").write_bytes(b"nothing")
    given = [tmp_path / "nowhere.png", files[0], tmp_path / "bad.png", files[1]]
    steps = []

    async def on_progress(done, total):
        steps.append((done, total))

    async with both() as backends:
        results, _ = await alike(
            backends,
            lambda backend: together(backend, given, ClassifyRequest(group=True), on_progress),
        )
    assert [each.error is None for each in results] == [False, True, False, True]
    assert [len(each.predictions) > 0 for each in results] == [False, True, False, True]
    assert steps[0] == steps[-1] == (4, 4)


@pytest.mark.parametrize("contents", [[None], [b"nothing"], [None, b"nothing", b""]], ids=["gone", "bad", "several"])
async def test_a_group_of_unreadable_files_has_their_errors(both, databases, tmp_path, contents):
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


async def test_invalid_requests_for_a_group_are_refused(both, databases, files):
    async with both() as backends:
        for request, part in [
            (ClassifyRequest(group=True), "the model 'fake' has no caption database"),
            (ClassifyRequest(group=True, database="none"), "unknown caption database 'none'; known: none"),
            (ClassifyRequest(group=True, coverage=0.9), "coverage"),
            (ClassifyRequest(group=True, options={"alpha": 7}), "alpha"),
            (ClassifyRequest(group=True, labels=["red"]), "group"),
        ]:
            message = await refused_alike(
                backends,
                lambda backend, request=request: backend.classify_together(files, request, ignore),
            )
            assert part in message


async def test_labels_are_discovered_for_each_image_independently(both, databases, files):
    made(databases / "things")
    images = [file.read_bytes() for file in files]
    async with both() as backends:
        results = await alike(backends, lambda backend: backend.classify(images, ClassifyRequest(top_k=3)))
        for image, result in zip(images, results, strict=True):
            assert await alike(
                backends, lambda backend, image=image: backend.classify([image], ClassifyRequest(top_k=3))
            ) == [result]


async def test_a_database_built_in_process_is_listed_by_the_server(both, tmp_path):
    file = tmp_path / "captions.txt"
    file.write_text("\n".join(CAPTIONS), "utf-8")
    steps = []

    async def advance(done, total):
        steps.append((done, total))

    async with both() as (here, there):
        await here.build_database(" things ", BuildPlan("fake", files=(str(file),)), [file], advance)
        assert (await there.database("things")).captions == len(CAPTIONS)
        with pytest.raises(DeixisError, match="unknown model 'nope'"):
            await here.build_database("things", BuildPlan("nope", files=(str(file),)), [file], ignore)
        with pytest.raises(DeixisError, match="is not a valid name of a caption database"):
            await here.build_database("Things", BuildPlan("fake", files=(str(file),)), [file], ignore)
    assert steps[-1] == (len(CAPTIONS), len(CAPTIONS))


async def test_text_features_are_those_of_the_model(both):
    async with both() as (here, _):
        rows = await here.text_features(None, ["red", "a dog"])
        assert here.default_model == "fake"
        np.testing.assert_allclose(rows, CaptionEncoder().encode_texts(["red", "a dog"]), atol=1e-6)
        np.testing.assert_array_equal(await here.text_features("fake", ["red", "a dog"]), rows)


async def test_the_default_database_is_built_only_if_it_is_used(settings, databases):
    app = create_app(settings, lambda _: [CaptionEncoder()])
    async with app.router.lifespan_context(app):
        here = InProcessBackend(app.state.service)
        await here.prepare_database(ClassifyRequest(), ignore)  # not wanted by the settings
        assert await here.databases() == []
        app.state.service.caption_search._build_default = True
        made(databases / "things")
        await here.prepare_database(ClassifyRequest(database="things"), ignore)
        assert [each.name for each in await here.databases()] == ["things"]
        for request, part in [
            (ClassifyRequest(database="none"), "unknown caption database 'none'"),
            (ClassifyRequest(options={"alpha": 7}), "alpha"),
            (ClassifyRequest(method="zero-shot"), "give labels"),
            (ClassifyRequest(template="nope"), "unknown template set 'nope'"),
        ]:
            with pytest.raises(DeixisError, match=part):
                await here.prepare_database(request, ignore)
        assert [each.name for each in await here.databases()] == ["things"]
        steps = []

        async def advance(done, total):
            steps.append((done, total))

        await here.prepare_database(ClassifyRequest(), advance)
        _, made_of_words = await here.databases()
        assert (made_of_words.name, made_of_words.captions, steps[-1]) == ("wordnet", 4, (4, 4))
        await here.prepare_database(ClassifyRequest(database="wordnet"), lambda *_: pytest.fail("it is there"))


async def test_the_default_database_is_built_if_it_is_named(settings, databases):
    made(databases / "one")
    made(databases / "two")
    app = create_app(settings, lambda _: [CaptionEncoder()])
    async with app.router.lifespan_context(app):
        app.state.service.caption_search._build_default = True
        here = InProcessBackend(app.state.service)
        await here.prepare_database(ClassifyRequest(database="wordnet"), ignore)
        assert [each.name for each in await here.databases()] == ["one", "two", "wordnet"]
