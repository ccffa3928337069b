"""Caption databases and served models: selection, pages of captions, and builds."""

import asyncio
from contextlib import asynccontextmanager

import numpy as np
import pytest

from app.captions.build_plan import EVERYDAY, WORDNET, BuildPlan
from app.captions.query import MAX_OFFSET, CaptionQuery
from app.encoders.fake import FakeEncoder
from app.errors import (
    InvalidFieldError,
    NotAnImageError,
    NotConfiguredError,
    StoreError,
    TooLargeError,
    UnknownNameError,
)
from app.main import open_service
from app.names.namespaces import OPEN_NAMESPACE
from tests.captions.cased.test_lexicon import LICENCE
from tests.captions_made import CAPTIONS, MANY, CaptionEncoder, made, place_of
from tests.conftest import picture

pytestmark = pytest.mark.anyio


class Twin(CaptionEncoder):
    """Another model with the text tower of the first one."""

    def __init__(self):
        super().__init__("twin")

    def text_fingerprint(self):
        return "fake"


@pytest.fixture
def folder(settings):
    return settings.data_dir / "captions"


@pytest.fixture
def open_with(settings, lexicon_folder):
    """Return a function that opens a service with encoders; keyword arguments change settings."""

    @asynccontextmanager
    async def opened(*encoders, **changes):
        changed = settings.model_copy(update={"wordnet_dir": lexicon_folder} | changes)
        async with open_service(changed, encoders or (CaptionEncoder(),)) as service:
            yield service

    return opened


@pytest.fixture
async def library(open_with, anyio_backend):
    async with open_with() as service:
        yield service.caption_search


async def ignore(done, total):
    pass


async def captions_near(library, **query):
    page = await library.search(CaptionQuery("things", **query))
    return [caption for caption, _ in page.captions]


# --- selection -----------------------------------------------------------------------------------------------------


async def test_a_database_is_requested_by_name_or_chosen_by_the_model(open_with, folder):
    async with open_with(CaptionEncoder(), FakeEncoder("other")) as service:
        library = service.caption_search
        made(folder / "things")
        made(folder / "strange", encoder=FakeEncoder("other"))
        for name in (None, "things", " things "):
            assert await library.choose(name, "fake", OPEN_NAMESPACE) == "things"
        assert await library.choose(None, "other", OPEN_NAMESPACE) == "strange"
        with pytest.raises(InvalidFieldError, match="'strange' was built with another model, 'other'") as caught:
            await library.choose("strange", "fake", OPEN_NAMESPACE)
        assert caught.value.problems[0].field == "database"
        with pytest.raises(UnknownNameError, match="unknown caption database 'none'; known: strange, things"):
            await library.choose("none", "fake", OPEN_NAMESPACE)


async def test_a_database_can_be_searched_with_every_model_of_its_text_tower(open_with, folder):
    manifest = made(folder / "things")
    async with open_with(FakeEncoder("other"), Twin(), CaptionEncoder()) as service:
        library = service.caption_search
        assert await library.models_of(manifest) == ["twin", "fake"]
        assert (await library.search(CaptionQuery("things", text="red"))).model == "twin"
        assert (await library.search(CaptionQuery("things", text="red", model="fake"))).model == "fake"
        with pytest.raises(InvalidFieldError, match="was built with another model, 'fake'") as caught:
            await library.search(CaptionQuery("things", text="red", model="other"))
        assert caught.value.problems[0].field == "model"


async def test_a_database_without_a_served_model_cannot_be_searched(open_with, folder):
    made(folder / "things")
    async with open_with(FakeEncoder("other")) as service:
        with pytest.raises(InvalidFieldError, match="was built with 'fake', which is not in service") as caught:
            await service.caption_search.search(CaptionQuery("things", text="red"))
        assert caught.value.problems[0].field == "model"
        with pytest.raises(NotConfiguredError, match="the model 'other' has no caption database"):
            await service.caption_search.choose(None, "other", OPEN_NAMESPACE)


# --- pages of captions ---------------------------------------------------------------------------------------------


async def test_captions_are_ordered_by_cosine_with_a_text_or_an_image(library, folder):
    manifest = made(folder / "things")
    encoder = CaptionEncoder()
    rows = encoder.encode_texts(CAPTIONS)
    red = encoder.encode_images([np.full((8, 8, 3), (255, 0, 0), np.uint8)])[0]
    for query, row in (({"text": "an umbrella"}, encoder.encode_texts(["an umbrella"])[0]), ({"image": None}, red)):
        given = {"image": picture("red")} if "image" in query else query
        page = await library.search(CaptionQuery("things", limit=100, **given))
        result = dict(page.captions)
        assert (page.database, page.model) == (f"things@{manifest.generation}", "fake")
        assert (page.searched, page.next_offset) == (len(CAPTIONS), None)
        assert result.keys() == set(CAPTIONS)
        assert list(result.values()) == sorted(result.values(), reverse=True)
        for caption, cosine in zip(CAPTIONS, rows @ row, strict=True):
            assert result[caption] == pytest.approx(float(cosine), abs=2e-3)


async def test_a_score_is_a_cosine_despite_half_precision(library, folder):
    made(folder / "things", MANY)
    for caption in MANY[:60]:
        page = await library.search(CaptionQuery("things", text=caption, limit=1))
        assert -1 <= page.captions[0][1] <= 1


async def test_pages_are_consecutive_up_to_the_last_allowed_offset(library, folder):
    made(folder / "things", MANY)
    found, offset, pages = [], 0, 0
    while offset is not None:
        assert offset <= MAX_OFFSET
        page = await library.search(CaptionQuery("things", text="red", limit=100, offset=offset))
        found += page.captions
        offset, pages = page.next_offset, pages + 1
        assert page.searched == 1000
    assert pages == 10
    assert len({caption for caption, _ in found}) == len(found) == 1000
    scores = [score for _, score in found]
    assert scores == sorted(scores, reverse=True)


async def test_filters_apply_to_the_nearest_captions_and_offsets_count_matches(library, folder):
    made(folder / "things", MANY)
    every = await captions_near(library, text="red", limit=1000)
    umbrellas = [caption for caption in every if "umbrella" in caption]
    assert await captions_near(library, text="red", contains="UMBRella", limit=1000) == umbrellas
    page = await library.search(CaptionQuery("things", text="red", contains="umbrella", limit=7, offset=5))
    assert [caption for caption, _ in page.captions] == umbrellas[5:12]
    assert (page.next_offset, page.searched) == (12, 1000)
    at = len(umbrellas) - 3
    last = await library.search(CaptionQuery("things", text="red", contains="umbrella", limit=7, offset=at))
    assert ([caption for caption, _ in last.captions], last.next_offset) == (umbrellas[at:], None)
    near = await library.search(CaptionQuery("things", text="red", min_score=0.7, limit=1000))
    assert near.captions
    assert all(score >= 0.7 for _, score in near.captions)
    assert await captions_near(library, text="red", min_score=1.0) == []
    assert await captions_near(library, text="red", contains="unicorn") == []
    assert await captions_near(library, text="red", offset=10**9) == []


@pytest.mark.parametrize("wanted", ["caf\u00e9", "CAF\u00c9", "cafe\u0301", "STRASSE", "stra\u00dfe"], ids=ascii)
async def test_a_filter_matches_all_unicode_forms_of_a_text(library, folder, wanted):
    """Captions are stored in composed Unicode; some keyboards and file systems use another form."""
    plan = BuildPlan("fake", captions=("un caf\u00e9 noir", "die Stra\u00dfe im Regen"))
    await library.build("things", plan, (), ignore)
    (found,) = await captions_near(library, text="x", contains=wanted)
    assert found.casefold().startswith("un" if wanted.casefold().startswith("caf") else "die")


async def test_either_a_text_or_an_image_is_required(library, folder):
    made(folder / "things")
    for query in ({}, {"text": "red", "image": picture()}):
        with pytest.raises(InvalidFieldError, match="either a text or an image"):
            await library.search(CaptionQuery("things", **query))


@pytest.mark.parametrize(
    "text", ["", " \t\n", "x" * 1001, "a\x00b", "\u202ered", "\ud800", "\u200b"], ids=lambda text: ascii(text)[:9]
)
async def test_an_unreadable_text_is_rejected(library, folder, text):
    made(folder / "things")
    with pytest.raises(InvalidFieldError) as caught:
        await library.search(CaptionQuery("things", text=text))
    assert caught.value.problems[0].field == "text"


async def test_an_unreadable_image_has_its_own_error(library, folder):
    made(folder / "things")
    too_large = TooLargeError("too large")
    with pytest.raises(NotAnImageError):
        await library.search(CaptionQuery("things", image=b"nothing"))
    with pytest.raises(TooLargeError) as caught:
        await library.search(CaptionQuery("things", image=too_large))
    assert caught.value is too_large


async def test_unknown_names_are_errors_before_encoding(open_with, folder):
    encoder = CaptionEncoder()
    made(folder / "things")
    async with open_with(encoder) as service:
        for query, error, message in [
            (CaptionQuery("none", text="red"), UnknownNameError, "unknown caption database 'none'; known: things"),
            (CaptionQuery("things", text="red", model="nope"), UnknownNameError, "unknown model 'nope'; known: fake"),
            (
                CaptionQuery("Things", text="red"),
                InvalidFieldError,
                "'Things' is not a valid name of a caption database",
            ),
            (
                CaptionQuery("things.building", text="red"),
                InvalidFieldError,
                "is not a valid name of a caption database",
            ),
            (CaptionQuery("../things", text="red"), InvalidFieldError, "is not a valid name of a caption database"),
            (CaptionQuery("things\x00", text="red"), InvalidFieldError, "is not a valid name of a caption database"),
            (CaptionQuery("..#things", text="red"), InvalidFieldError, "is not a valid name of a caption database"),
            (CaptionQuery("/#things", text="red"), InvalidFieldError, "is not a valid name of a caption database"),
            (CaptionQuery("a#b#things", text="red"), InvalidFieldError, "is not a valid name of a caption database"),
        ]:
            with pytest.raises(error, match=message):
                await service.caption_search.search(query)
        assert encoder.encoded_texts == []


# --- building ------------------------------------------------------------------------------------------------------


async def test_a_database_is_built_with_the_model_of_the_plan(open_with):
    first, second = FakeEncoder("other"), CaptionEncoder()
    reported = []

    async def advance(done, total):
        reported.append((done, total))

    async with open_with(first, second) as service:
        manifest = await service.caption_search.build("things", BuildPlan("fake", captions=CAPTIONS), (), advance)
        assert (manifest.model, manifest.fingerprint, manifest.captions) == ("fake", "fake", len(CAPTIONS))
        assert await service.caption_search.models_of(manifest) == ["fake"]
        with pytest.raises(UnknownNameError, match="unknown model 'nope'; known: fake, other"):
            await service.caption_search.build("things", BuildPlan("nope", captions=CAPTIONS), (), advance)
    assert first.encoded_texts == []
    assert set(second.encoded_texts) == set(CAPTIONS)
    assert reported[-1] == (len(CAPTIONS), len(CAPTIONS))


async def test_an_invalid_plan_is_rejected_before_the_build(library, lexicon_folder):
    library.check_plan(BuildPlan("fake", captions=("a dog",)))
    library.check_plan(BuildPlan("fake", source=WORDNET))
    with pytest.raises(UnknownNameError, match="unknown model 'nope'"):
        library.check_plan(BuildPlan("nope", captions=("a dog",)))
    with pytest.raises(InvalidFieldError, match="min_chars"):
        library.check_plan(BuildPlan("fake", captions=("a dog",), min_chars=9, max_chars=8))
    (lexicon_folder / "data.noun").unlink()
    with pytest.raises(NotConfiguredError, match="install Debian's package wordnet-base"):
        library.check_plan(BuildPlan("fake", source=WORDNET))


@pytest.mark.parametrize("content", ["", LICENCE, "nonsense\n"], ids=["empty", "no nouns", "nonsense"])
async def test_an_empty_lexicon_is_rejected_without_blocking(open_with, lexicon_folder, content):
    """A StopIteration would leave a future that waits for a thread without a result."""
    (lexicon_folder / "data.noun").write_text(content)
    wanted = {"build_default_database": True, "default_database": WORDNET}
    async with open_with(**wanted) as service, asyncio.timeout(5):
        assert await service.caption_search.plan_default() is None
        with pytest.raises(NotConfiguredError):
            await asyncio.to_thread(service.caption_search.check_plan, BuildPlan("fake", source=WORDNET))


@pytest.mark.parametrize("source", [EVERYDAY, WORDNET])
async def test_the_build_of_the_default_database_is_planned_if_enabled_and_missing(open_with, folder, source):
    planned = BuildPlan("fake", source=source)
    wanted = {"build_default_database": True, "default_database": source}
    async with open_with() as service:
        assert await service.caption_search.plan_default() is None  # not enabled
    async with open_with(build_default_database=True, default_database="things") as service:
        assert await service.caption_search.plan_default() is None
    async with open_with(**wanted) as service:
        made(folder / "things")
        assert await service.caption_search.plan_default() == planned
        made(folder / source)
        assert await service.caption_search.plan_default() is None
        (place_of(folder / source) / "texts.bin").write_bytes(b"?")
        assert await service.caption_search.plan_default() == planned
        made(folder / source, to_come=7)
        assert await service.caption_search.plan_default() == planned
        made(folder / source, encoder=FakeEncoder("other"))
        assert await service.caption_search.plan_default() == planned
    async with open_with(FakeEncoder("third"), FakeEncoder("other"), **wanted) as service:
        assert await service.caption_search.plan_default() is None


async def test_a_missing_lexicon_does_not_prevent_the_start(open_with, tmp_path):
    wanted = {"build_default_database": True, "default_database": WORDNET, "wordnet_dir": tmp_path / "nowhere"}
    async with open_with(**wanted) as service:
        assert await service.caption_search.plan_default() is None
        with pytest.raises(NotConfiguredError, match="deixis captions build"):
            await service.caption_search.choose(None, "fake", OPEN_NAMESPACE)


async def test_requests_do_not_wait_for_a_cancelled_build_of_the_default_database(open_with):
    async with open_with(build_default_database=True) as service:
        await service.jobs.build_captions.add_default()
        (job,) = await service.jobs.queue.repository.list(9)
        await service.jobs.queue.cancel(job.id)
        with pytest.raises(NotConfiguredError):
            await service.caption_search.choose(None, "fake", OPEN_NAMESPACE)


async def test_an_unreadable_folder_does_not_prevent_the_start(open_with, folder):
    folder.write_text("no folder")
    async with open_with(build_default_database=True) as service:
        await service.jobs.build_captions.add_default()
        with pytest.raises(StoreError, match="cannot be read"):
            await service.caption_search.choose(None, "fake", OPEN_NAMESPACE)
