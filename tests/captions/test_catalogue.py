"""Caption databases in use: replaced, damaged, deleted, searched concurrently, built and cancelled."""

import asyncio
import os
import shutil
import threading
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import app.captions.background_builder
import app.captions.catalogue
import app.captions.served_database
from app.captions.build import BuildOptions
from app.captions.build_plan import EVERYDAY, BuildPlan
from app.captions.cased.lexicon import OTHER
from app.captions.catalogue import CaptionCatalogue
from app.captions.database import CaptionDatabase, merge_parts
from app.captions.generations import CURRENT, building_folder, prune
from app.captions.index import Part
from app.captions.manifest import DATA_FILES, FEATURES, MANIFEST
from app.captions.texts import OFFSETS, TEXTS
from app.encoders.fake import FakeEncoder
from app.errors import (
    ConflictError,
    DeixisError,
    ForbiddenError,
    InvalidFieldError,
    NotConfiguredError,
    NotReadyError,
    OverloadedError,
    StoreError,
    UnknownNameError,
)
from app.names.namespaces import OPEN_NAMESPACE, Namespace
from app.observability.metrics import Metrics
from tests.captions_made import CAPTIONS, MANY, CaptionEncoder, made, place_of, put_in_place

pytestmark = pytest.mark.anyio

ENCODER = CaptionEncoder()
MODEL = ENCODER.text_fingerprint()
RED, GREEN, BLUE = ([caption for caption in CAPTIONS if colour in caption] for colour in ("red", "green", "blue"))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "captions"


@pytest.fixture
async def make_databases(folder, lexicon_folder):
    """Return a function that opens the databases of the folder; keyword arguments change their options."""
    opened = []

    def make(**changes):
        given = {
            "default": "everyday",
            "wordnet": lexicon_folder,
            "metrics": Metrics(),
            "max_queued": 512,
            "stalled_after_s": 60.0,
        }
        opened.append(CaptionCatalogue(folder, **(given | changes)))
        return opened[-1]

    yield make
    for item in opened:
        await item.close()


@pytest.fixture
def databases(make_databases):
    return make_databases()


@pytest.fixture
def always_refresh(monkeypatch):
    """Check before every search whether a database has been replaced."""
    monkeypatch.setattr(app.captions.served_database, "_REFRESH_INTERVAL_S", -1.0)


@pytest.fixture
def gate(monkeypatch):
    """Searches wait at this gate while it is closed, and report their arrival."""
    held = Gate()
    search = CaptionDatabase.search

    def wait(self, *arguments):
        held.pass_through()
        return search(self, *arguments)

    monkeypatch.setattr(CaptionDatabase, "search", wait)
    yield held
    held.open.set()


class Gate:
    """Threads wait here unless it is open."""

    def __init__(self):
        self.open = threading.Event()
        self.open.set()
        self.arrived = threading.Semaphore(0)

    def pass_through(self):
        self.arrived.release()
        assert self.open.wait(20)

    async def someone_arrives(self):
        assert await asyncio.to_thread(self.arrived.acquire, timeout=20)


def encoded(*texts):
    return ENCODER.encode_texts(texts)


async def nearest(databases, name, *texts, k=3, **options):
    return await databases.search(name, MODEL, encoded(*texts), k, **options)


async def until(is_so):
    """Wait until a condition is true."""
    async with asyncio.timeout(20):
        while not is_so():  # noqa: ASYNC110 - conditions of threads, which do not set events of the loop
            await asyncio.sleep(0)


async def encode(texts):
    return await asyncio.to_thread(CaptionEncoder().encode_texts, texts)


async def ignore(done, total):
    pass


async def built(databases, name="things", captions=CAPTIONS, *, encode=encode, advance=ignore, **plan):
    return await databases.build(
        name,
        BuildPlan(model="fake", captions=tuple(captions), **plan),
        (),
        encode=encode,
        fingerprint=MODEL,
        advance=advance,
    )


# --- listing -------------------------------------------------------------------------------------------------------


async def test_a_missing_folder_has_no_databases(databases):
    assert await databases.states() == []
    with pytest.raises(UnknownNameError, match="unknown caption database 'things'; known: none"):
        await databases.state("things")
    with pytest.raises(UnknownNameError, match="known: none"):
        await nearest(databases, "things", "red")
    with pytest.raises(NotConfiguredError, match="deixis captions build"):
        await databases.choose("fake", MODEL)
    await databases.open_all()
    assert databases.problem is None


@pytest.mark.parametrize("name", ["Things", "", "a b", "../things", "x" * 65, "things.building"])
async def test_an_invalid_name_is_a_field_error_and_opens_no_folder(databases, name):
    for field in ("name", "database"):
        with pytest.raises(InvalidFieldError) as caught:
            databases.qualified_name(name, OPEN_NAMESPACE, field)
        assert [problem.field for problem in caught.value.problems] == [field]
    for work in (databases.state(name), databases.check_model(name, MODEL), databases.delete(name)):
        with pytest.raises(InvalidFieldError, match="is not a valid name of a caption database"):
            await work


async def test_a_namespace_reads_its_own_databases_and_the_default_one(databases, folder):
    acme = Namespace("acme")
    for name in ("everyday", "things", "acme#toys", "acmes#tools"):
        await asyncio.to_thread(made, folder / name)
    assert [state.name for state in await databases.states(acme)] == ["acme#toys", "everyday"]
    assert [state.name for state in await databases.states(OPEN_NAMESPACE)] == ["everyday", "things"]
    assert len(await databases.states()) == 4
    assert [databases.qualified_name(name, acme) for name in ("toys", "everyday", "things")] == [
        "acme#toys",
        "everyday",
        "acme#things",
    ]
    with pytest.raises(UnknownNameError, match="unknown caption database 'things'; known: everyday, toys"):
        await databases.state(databases.qualified_name("things", acme))
    assert databases.writable_name("toys", acme) == "acme#toys"
    assert databases.writable_name("everyday", OPEN_NAMESPACE) == "everyday"
    with pytest.raises(ForbiddenError, match="belongs to the operator"):
        databases.writable_name("everyday", acme)


async def test_if_the_default_does_not_match_only_databases_of_the_namespace_are_chosen(databases, folder):
    made(folder / "things")
    with pytest.raises(NotConfiguredError):
        await databases.choose("fake", MODEL, Namespace("acme"))
    made(folder / "acme#toys")
    assert await databases.choose("fake", MODEL, Namespace("acme")) == "acme#toys"
    assert await databases.choose("fake", MODEL) == "things"


async def test_other_folders_and_files_are_ignored(databases, folder):
    made(folder / "things")
    (folder / "empty").mkdir()
    (folder / "Capital").mkdir()
    (folder / "Capital" / CURRENT).write_text("0123456789abcdef")
    (folder / "file").write_text("x")
    shutil.copytree(folder / "things", folder / "things.building")

    assert [state.name for state in await databases.states()] == ["things"]


@pytest.mark.parametrize("damage", [MANIFEST, TEXTS])
async def test_a_damaged_database_is_listed_with_its_problem(databases, folder, damage):
    made(folder / "broken")
    manifest = made(folder / "things")
    (place_of(folder / "broken") / damage).write_bytes(b"?")

    broken, things = await databases.states()

    assert "build the database again" in broken.problem
    assert (things.problem, things.manifest, things.generation) == (None, manifest, manifest.generation)
    assert things.nbytes == sum(file["bytes"] for file in manifest.files.values())
    await databases.open_all()  # logs the problem and continues
    assert len(await nearest(databases, "things", "red")) == 1
    with pytest.raises(StoreError, match="build the database again"):
        await nearest(databases, "broken", "red")


@pytest.mark.parametrize("locked", ["lost+found", "locked"])
async def test_an_inaccessible_folder_does_not_hide_other_databases(databases, folder, monkeypatch, locked):
    """Such as lost+found, which only root can read."""
    made(folder / "things")
    (folder / locked).mkdir()
    is_file = Path.is_file

    def refused(self):
        if self.parent.name == locked:
            raise PermissionError(13, "Permission denied", str(self))
        return is_file(self)

    monkeypatch.setattr(Path, "is_file", refused)
    assert "things" in [state.name for state in await databases.states()]
    await databases.open_all()
    assert await databases.choose("fake", MODEL) == "things"
    assert len(await nearest(databases, "things", "red")) == 1
    with pytest.raises(DeixisError):
        await nearest(databases, "locked", "red")


@pytest.mark.parametrize("file", [FEATURES, OFFSETS])
async def test_damage_without_a_change_of_size_is_reported_as_damage(databases, folder, file):
    made(folder / "things")
    place = place_of(folder / "things") / file
    place.write_bytes(place.read_bytes().replace(b")", b"(", 1))
    with pytest.raises(StoreError, match="things"):
        await nearest(databases, "things", "red")
    with pytest.raises(StoreError, match="things"):
        await databases.choose("fake", MODEL)


async def test_a_database_of_another_model_is_a_field_error(databases, folder):
    made(folder / "things")
    await databases.check_model("things", MODEL)
    with pytest.raises(InvalidFieldError, match="was built with another model, 'fake'") as caught:
        await databases.check_model("things", "other", field="model")
    assert caught.value.problems[0].field == "model"
    with pytest.raises(InvalidFieldError, match="was built with another model"):
        await databases.search("things", "other", encoded("red"), 3)


# --- choosing ------------------------------------------------------------------------------------------------------


async def test_the_default_is_preferred_to_others_of_the_model(databases, folder):
    for name in ("things", "everyday", "zebras"):
        made(folder / name)
    assert await databases.choose("fake", MODEL) == "everyday"


async def test_without_a_default_of_the_model_the_only_other_one_is_chosen(databases, folder):
    made(folder / "everyday", encoder=FakeEncoder("other"))
    made(folder / "things")
    assert await databases.choose("fake", MODEL) == "things"
    assert await databases.choose("other", "other") == "everyday"
    made(folder / "more")
    with pytest.raises(InvalidFieldError, match="the model 'fake' has more, things"):
        await databases.choose("fake", MODEL)
    with pytest.raises(NotConfiguredError, match="'third'"):
        await databases.choose("third", "third")


async def test_a_damaged_database_is_an_error_only_if_no_other_matches(databases, folder):
    made(folder / "broken")
    (place_of(folder / "broken") / TEXTS).write_bytes(b"?")
    with pytest.raises(StoreError, match="build the database again"):
        await databases.choose("fake", MODEL)
    made(folder / "things")
    assert await databases.choose("fake", MODEL) == "things"


async def test_an_announced_default_is_reported_until_another_database_matches(databases, folder):
    databases.announce_build("everyday")
    with pytest.raises(NotReadyError, match="'everyday' will be built soon; try again later, or give labels"):
        await databases.choose("fake", MODEL)
    made(folder / "things")
    assert await databases.choose("fake", MODEL) == "things"


async def test_during_the_repair_of_the_default_requests_are_rejected_with_a_reason(databases, folder):
    made(folder / "everyday")
    (place_of(folder / "everyday") / TEXTS).write_bytes(b"?")
    databases.announce_build("everyday")
    with pytest.raises(NotReadyError, match="will be built soon"):
        await databases.choose("fake", MODEL)


async def test_requests_get_the_progress_of_the_build_and_then_results(databases, monkeypatch):
    monkeypatch.setattr(app.captions.background_builder, "BuildOptions", partial(BuildOptions, shard_size=10))
    monkeypatch.setattr(app.captions.background_builder, "_TEXTS_PER_BATCH", 10)
    reported = []

    async def note(done, total):
        with pytest.raises(NotReadyError) as error:
            await databases.choose("fake", MODEL)
        reported.append((done, total, error.value.message))

    await built(databases, "everyday", advance=note)

    assert [done for done, _, _ in reported] == sorted(done for done, _, _ in reported)
    assert {total for _, total, _ in reported} == {len(CAPTIONS)}
    assert reported[-1][0] == len(CAPTIONS)
    for done, total, message in reported:
        assert f"is being built, {done:,} of {total:,} captions are encoded" in message
    assert await databases.choose("fake", MODEL) == "everyday"


async def test_after_a_failed_build_it_is_no_longer_announced(databases):
    databases.announce_build("everyday")
    with pytest.raises(InvalidFieldError, match="no captions are left"):
        await built(databases, "everyday", ["a"])
    with pytest.raises(NotConfiguredError):
        await databases.choose("fake", MODEL)


# --- searching -----------------------------------------------------------------------------------------------------


async def test_concurrent_searches_find_the_same_as_sequential_ones(databases, folder, gate):
    await asyncio.to_thread(made, folder / "things", MANY)
    made(folder / "others")
    questions = [
        (("things", "others")[number % 2], text, k, number % 3 == 0)
        for number, (text, k) in enumerate((text, k) for text in (*CAPTIONS[:12], "dusk") for k in (1, 2, 5, 40, 2000))
    ]

    async def ask(name, text, k, features):
        (found,) = await nearest(databases, name, text, k=k, features=features)
        return found

    alone = [await ask(*question) for question in questions]
    gate.open.clear()
    running = [asyncio.create_task(ask(*question)) for question in questions]
    await gate.someone_arrives()
    gate.open.set()
    together = await asyncio.gather(*running)

    for (_, _, k, features), one, other in zip(questions, alone, together, strict=True):
        assert one.captions == other.captions
        assert one.generation == other.generation
        assert len(one.captions) <= k
        np.testing.assert_allclose(one.cosines, other.cosines, atol=1e-6)
        assert (one.features is None) is (other.features is None) is (not features)
        if features:
            np.testing.assert_array_equal(one.features, other.features)
            assert len(one.features) == len(one.captions)


async def test_more_queries_than_the_queue_limit_are_all_searched_in_order(make_databases, folder):
    databases = make_databases(max_queued=1)
    await asyncio.to_thread(made, folder / "things", MANY)
    texts = MANY[:300]

    found = await nearest(databases, "things", *texts, k=1)

    assert len(found) == 300
    np.testing.assert_allclose([item.cosines[0] for item in found], 1, atol=2e-3)
    alone = [(await nearest(databases, "things", text, k=1))[0].captions for text in texts[::37]]
    assert [found[number].captions for number in range(0, 300, 37)] == alone


async def test_searches_above_the_queue_limit_are_rejected_and_the_others_succeed(make_databases, folder, gate):
    databases = make_databases(max_queued=1)
    made(folder / "things")
    await nearest(databases, "things", "red")
    await gate.someone_arrives()
    gate.open.clear()
    first = asyncio.create_task(nearest(databases, "things", *["red"] * 64))
    await gate.someone_arrives()
    with pytest.raises(OverloadedError, match="the caption database 'things'"):
        await nearest(databases, "things", "blue")
    gate.open.set()
    assert len(await first) == 64


async def test_no_queries_give_no_results(databases, folder):
    made(folder / "things")
    assert await databases.search("things", MODEL, np.zeros((0, 16), np.float32), 3) == []


async def test_a_failing_search_does_not_affect_others(databases, folder, monkeypatch):
    made(folder / "things")
    search = CaptionDatabase.search

    def fail(self, queries, k, *more):
        if k == 7:
            raise OSError(5, "Input/output error")
        return search(self, queries, k, *more)

    monkeypatch.setattr(CaptionDatabase, "search", fail)
    answers = await asyncio.gather(
        *(nearest(databases, "things", "red", k=k) for k in (3, 7, 4)), return_exceptions=True
    )
    assert [isinstance(answer, Exception) for answer in answers] == [False, True, False]
    assert len((await nearest(databases, "things", "red"))[0].captions) == 3


# --- replacing -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("always_refresh")
async def test_new_searches_use_a_replaced_database_and_running_ones_the_old_one(databases, folder, gate):
    old = made(folder / "things", RED)
    await nearest(databases, "things", "red")
    await gate.someone_arrives()
    gate.open.clear()
    running = asyncio.create_task(nearest(databases, "things", "red"))
    await gate.someone_arrives()
    waiting = asyncio.create_task(nearest(databases, "things", "red"))
    await until(lambda: databases._served["things"].queue.admitted == 2)
    new = made(folder / "things", BLUE)
    prune(folder / "things")
    later = asyncio.create_task(nearest(databases, "things", "red"))
    await until(lambda: databases._served["things"].queue.admitted == 3)
    gate.open.set()

    for task, manifest, captions in ((running, old, RED), (waiting, old, RED), (later, new, BLUE)):
        (found,) = await task
        assert found.generation == manifest.generation
        assert set(found.captions) <= set(captions)
    assert (await databases.manifest("things")).generation == new.generation


async def test_shards_search_the_generation_that_the_edge_requests(make_databases, folder):
    parts = [make_databases() for _ in range(2)]

    async def search(generation):
        found = [
            (
                await item.search_generation(
                    "things", generation, encoded("red"), 3, features=True, within_s=None, part=Part(number, 2)
                )
            )[0]
            for number, item in enumerate(parts)
        ]
        return merge_parts(found, 3, None)

    old = made(folder / "things", RED)
    assert set((await search(old.generation)).captions) <= set(RED)
    new = made(folder / "things", BLUE)
    # One edge has not noticed the new generation yet, and neither has a shard; then another edge has.
    assert set((await search(old.generation)).captions) <= set(RED)
    result = await search(new.generation)
    assert (result.generation, set(result.captions) <= set(BLUE)) == (new.generation, True)
    assert (await search(old.generation)).generation == old.generation
    made(folder / "things", GREEN)
    prune(folder / "things")
    with pytest.raises(StoreError):
        await search(old.generation)


async def test_a_remote_search_is_checked_locally_first(make_databases, folder):
    asked_for = []

    async def elsewhere(name, generation, queries, k, **more):
        asked_for.append((name, generation, len(queries), k, more))
        return ["found there"]

    databases = make_databases(remote_search=elsewhere)
    manifest = made(folder / "things", RED)
    assert await nearest(databases, "things", "red", k=7, features=True, within_s=2.0) == ["found there"]
    assert asked_for == [("things", manifest.generation, 1, 7, {"features": True, "within_s": 2.0})]
    with pytest.raises(InvalidFieldError, match="another model"):
        await databases.search("things", "of another model", encoded("red"), 3)
    with pytest.raises(UnknownNameError):
        await nearest(databases, "nothing", "red")
    assert len(asked_for) == 1


async def test_databases_are_refreshed_at_most_once_per_interval(databases, folder, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("app.captions.served_database.time.monotonic", lambda: now[0])
    old = made(folder / "things", RED)
    await nearest(databases, "things", "red")
    new = made(folder / "things", BLUE)
    now[0] += 0.5
    assert (await nearest(databases, "things", "red"))[0].generation == old.generation
    now[0] += 0.6
    assert (await nearest(databases, "things", "red"))[0].generation == new.generation


@pytest.mark.usefixtures("always_refresh")
@pytest.mark.parametrize("damage", [MANIFEST, TEXTS, CURRENT, FEATURES])
async def test_if_a_new_generation_is_damaged_the_old_one_is_used_until_a_valid_one_exists(
    databases, folder, tmp_path, damage
):
    old = made(folder / "things", RED)
    await nearest(databases, "things", "red")
    made(tmp_path / "prepared", BLUE)
    if damage == CURRENT:
        (folder / "things" / CURRENT).write_text("nonsense")
    elif damage == FEATURES:  # of the correct size
        file = place_of(tmp_path / "prepared") / FEATURES
        file.write_bytes(file.read_bytes().replace(b")", b"(", 1))
        put_in_place(tmp_path / "prepared", folder / "things")
    else:
        (place_of(tmp_path / "prepared") / damage).write_bytes(b"?")
        put_in_place(tmp_path / "prepared", folder / "things")

    for _ in range(3):
        (found,) = await nearest(databases, "things", "red")
        assert found.generation == old.generation
        assert set(found.captions) <= set(RED)
    assert await databases.manifest("things") == old
    assert await databases.choose("fake", MODEL) == "things"
    assert (await databases.state("things")).problem is not None or damage == FEATURES  # which the size does not show

    good = made(folder / "things", GREEN)
    assert (await nearest(databases, "things", "red"))[0].generation == good.generation


@pytest.mark.usefixtures("always_refresh")
@pytest.mark.parametrize("options", [{}, {"exact_up_to": 500}], ids=["flat", "ivf-pq"])
@pytest.mark.parametrize("name", DATA_FILES)
async def test_a_file_truncated_in_use_is_an_error_until_a_build_repairs_it(databases, folder, name, options):
    await asyncio.to_thread(made, folder / "things", MANY, **options)
    await nearest(databases, "things", "red")
    os.truncate(place_of(folder / "things") / name, 10)
    for _ in range(2):
        with pytest.raises(StoreError, match=rf"{name}' was truncated from \d+ to 10 bytes; build the database again"):
            await nearest(databases, "things", "red")
    await asyncio.to_thread(made, folder / "things", MANY, **options)
    assert len(await nearest(databases, "things", "red")) == 1


@pytest.mark.usefixtures("always_refresh")
async def test_a_database_replaced_by_one_of_another_model_is_not_searched(databases, folder):
    made(folder / "things")
    await databases.check_model("things", MODEL)
    made(folder / "things", encoder=FakeEncoder("other"))
    with pytest.raises(InvalidFieldError, match="another model, 'other'"):
        await nearest(databases, "things", "red")


# --- deleting ------------------------------------------------------------------------------------------------------


async def test_running_and_waiting_searches_succeed_while_their_database_is_deleted(databases, folder, gate):
    made(folder / "things")
    await nearest(databases, "things", "red")
    await gate.someone_arrives()
    gate.open.clear()
    running = asyncio.create_task(nearest(databases, "things", "red", features=True))
    await gate.someone_arrives()
    waiting = asyncio.create_task(nearest(databases, "things", "blue", k=5))
    await until(lambda: databases._served["things"].queue.admitted == 2)

    await databases.delete("things")
    gate.open.set()

    (one,), (other,) = await running, await waiting
    assert set(one.captions) <= set(RED)
    assert len(one.features) == 3
    assert set(other.captions) <= set(BLUE)
    assert not (folder / "things").exists()
    for work in (
        databases.manifest("things"),
        databases.check_model("things", MODEL),
        databases.state("things"),
        databases.delete("things"),
    ):
        with pytest.raises(UnknownNameError, match="unknown caption database 'things'; known: none"):
            await work


@pytest.mark.usefixtures("always_refresh")
async def test_if_current_names_a_missing_generation_the_old_one_is_used(databases, folder):
    old = made(folder / "things")
    await nearest(databases, "things", "red")
    (folder / "things" / CURRENT).write_text("0123456789abcdef\n")
    assert (await nearest(databases, "things", "red"))[0].generation == old.generation
    assert "0123456789abcdef" in (await databases.state("things")).problem
    await databases.delete("things")
    assert await databases.states() == []


async def test_a_linked_database_is_deleted_or_stays_intact(databases, folder, tmp_path):
    made(tmp_path / "elsewhere" / "things")
    folder.mkdir()
    (folder / "things").symlink_to(tmp_path / "elsewhere" / "things")
    assert len(await nearest(databases, "things", "red")) == 1
    (outcome,) = await asyncio.gather(databases.delete("things"), return_exceptions=True)
    left = [state.problem for state in await databases.states()]
    if outcome is None:
        assert left == []
    else:
        assert isinstance(outcome, StoreError)
        assert "cannot be built" not in outcome.message
        assert left == [None]


async def test_a_name_can_be_reused_immediately(databases, folder):
    made(folder / "things", RED)
    await nearest(databases, "things", "red")
    await databases.delete("things")
    await built(databases, captions=BLUE)
    (found,) = await nearest(databases, "things", "red")
    assert set(found.captions) <= set(BLUE)


async def test_a_deleted_database_is_closed_after_a_delay(databases, folder, monkeypatch):
    monkeypatch.setattr(app.captions.catalogue, "_CLOSE_DELAY_S", 0.0)
    made(folder / "things")
    await nearest(databases, "things", "red")
    queue = databases._served["things"].queue
    await databases.delete("things")
    await until(lambda: not queue._threads[0].is_alive())
    assert databases.problem is None
    with pytest.raises(UnknownNameError):
        await nearest(databases, "things", "red")
    made(folder / "things")
    assert len(await nearest(databases, "things", "red")) == 1


@pytest.mark.usefixtures("always_refresh")
async def test_a_search_during_the_closing_of_a_database_gets_a_result_or_an_error(databases, folder, monkeypatch):
    made(folder / "things")
    await nearest(databases, "things", "red")
    served = databases._served["things"]
    look_up, arrived, go_on = served.refresh, threading.Event(), threading.Event()

    def wait():
        arrived.set()
        assert go_on.wait(20)
        look_up()

    monkeypatch.setattr(app.captions.catalogue, "_CLOSE_DELAY_S", 0.0)
    served.refresh = wait
    searching = asyncio.create_task(nearest(databases, "things", "red"))
    assert await asyncio.to_thread(arrived.wait, 20)
    served.refresh = look_up
    await databases.delete("things")
    await until(lambda: "things" not in databases._served)
    go_on.set()
    with suppress(DeixisError):
        assert len(await searching) == 1


# --- building ------------------------------------------------------------------------------------------------------


async def test_a_new_database_can_be_searched_immediately(databases, folder):
    manifest = await built(databases, source_notes="made up", licence="CC0-1.0")
    assert (manifest.captions, manifest.source_notes, manifest.licence) == (len(CAPTIONS), "made up", "CC0-1.0")
    assert manifest.counts["read"] == len(CAPTIONS)
    assert not building_folder(folder / "things").exists()
    (found,) = await nearest(databases, "things", "red", k=1)
    assert found.generation == manifest.generation


async def test_building_over_a_damaged_database_repairs_it(databases, folder):
    made(folder / "things")
    (place_of(folder / "things") / TEXTS).write_bytes(b"?")
    await built(databases)
    assert (await databases.state("things")).problem is None
    assert len(await nearest(databases, "things", "red")) == 1


async def test_a_file_in_an_inaccessible_folder_is_an_error_of_the_build(databases, tmp_path, monkeypatch):
    file = tmp_path / "captions.txt"
    file.write_text("a red ball", "utf-8")

    def refusing(original):
        def called(self, *arguments, **options):
            if self == file:
                raise PermissionError(13, "Permission denied", str(self))
            return original(self, *arguments, **options)

        return called

    for name in ("is_file", "open", "stat"):
        monkeypatch.setattr(Path, name, refusing(getattr(Path, name)))
    with pytest.raises(InvalidFieldError, match="cannot be read"):
        await databases.build(
            "things",
            BuildPlan("fake", files=(str(file),)),
            [file],
            encode=encode,
            fingerprint=MODEL,
            advance=ignore,
        )


async def test_an_error_of_the_encoder_fails_the_build_and_keeps_the_old_database(databases, folder):
    old = made(folder / "things", RED)

    async def fail(texts):
        raise NotReadyError("the queue is closed")

    with pytest.raises(NotReadyError, match="the queue is closed"):
        await built(databases, encode=fail)
    assert await databases.manifest("things") == old


@asynccontextmanager
async def under_way(databases, name="things", captions=CAPTIONS, first=0):
    """Start a build that waits after ``first`` batches; yield its task and the number of encoded batches."""
    reached, go_on, encoded = asyncio.Event(), asyncio.Event(), []

    async def encode_and_wait(texts):
        if len(encoded) >= first:
            reached.set()
            await go_on.wait()
        encoded.append(list(texts))
        return await encode(texts)

    task = asyncio.create_task(built(databases, name, captions, encode=encode_and_wait))
    await asyncio.wait_for(reached.wait(), 20)
    try:
        yield task, encoded, go_on
    finally:
        go_on.set()
        await asyncio.wait([task])


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(app.captions.background_builder, "BuildOptions", partial(BuildOptions, shard_size=10))
    monkeypatch.setattr(app.captions.background_builder, "_TEXTS_PER_BATCH", 10)


@pytest.mark.usefixtures("small_shards")
async def test_a_cancelled_build_stops_and_the_next_one_encodes_only_missing_captions(databases, folder):
    old = made(folder / "things", BLUE)
    async with under_way(databases, first=2) as (task, encoded, go_on):
        task.cancel()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert len(encoded) == 3
    assert await databases.manifest("things") == old
    assert len(list((building_folder(folder / "things") / "shards").glob("*.npz"))) >= 2

    again, reported = [], []

    async def note(texts):
        again.extend(texts)
        return await encode(texts)

    async def advance(done, total):
        reported.append(done)

    manifest = await built(databases, encode=note, advance=advance)

    assert manifest.captions == len(CAPTIONS)
    assert len(again) + 10 * len(encoded) >= len(CAPTIONS)
    assert not set(again) & {text for batch in encoded[:2] for text in batch}
    assert reported[0] >= 10
    assert reported == sorted(reported)
    assert reported[-1] == len(CAPTIONS)
    (found,) = await nearest(databases, "things", "red", k=1)
    assert found.generation == manifest.generation


async def test_names_that_were_interrupted_after_the_first_are_completed_without_encoding_these_again(databases):
    encoded, reached = [], asyncio.Event()

    async def encode_some(texts):
        if len(encoded) >= 512:
            reached.set()
            await asyncio.Event().wait()
        encoded.extend(texts)
        return await encode(texts)

    task = asyncio.create_task(built(databases, "everyday", (), source=EVERYDAY, encode=encode_some))
    await asyncio.wait_for(reached.wait(), 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    (found,) = await nearest(databases, "everyday", "red", k=1)
    assert found.missing.endswith("is still being built: 256 of its 2,316 captions can be found so far")

    async def encode_rest(texts):
        encoded.extend(texts)
        return await encode(texts)

    manifest = await built(databases, "everyday", (), source=EVERYDAY, encode=encode_rest)
    assert (manifest.captions, manifest.warning) == (2316, None)
    assert len(encoded) == len(set(encoded)) == 2316
    (found,) = await nearest(databases, "everyday", "red", k=1)
    assert (found.generation, found.missing) == (manifest.generation, None)


async def test_a_build_that_waits_for_the_encoder_can_be_cancelled(databases):
    async with under_way(databases) as (task, _, _):
        task.cancel()
        await asyncio.wait([task], timeout=5)
        assert task.cancelled()


async def test_after_a_cancelled_build_it_is_no_longer_announced(databases):
    async with under_way(databases, "everyday") as (task, _, go_on):
        with pytest.raises(NotReadyError, match="caption database 'everyday'"):
            await databases.choose("fake", MODEL)
        task.cancel()
        go_on.set()
    with pytest.raises(NotConfiguredError):
        await databases.choose("fake", MODEL)


async def test_two_builds_of_one_name_both_succeed_and_the_later_one_stays(databases):
    async with under_way(databases, captions=RED) as (first, _, go_on):
        second = asyncio.create_task(built(databases, captions=BLUE))
        await asyncio.sleep(0)
        go_on.set()
        one, other = await first, await second
    assert (one.captions, other.captions) == (len(RED), len(BLUE))
    assert (await databases.manifest("things")).generation == other.generation


async def test_a_database_that_is_being_built_cannot_be_deleted(databases, folder):
    made(folder / "things", RED)
    async with under_way(databases) as (task, _, go_on):
        with pytest.raises(ConflictError, match="another build for 'things' is running"):
            await databases.delete("things")
        go_on.set()
        await task
    await databases.delete("things")


async def test_searches_continue_while_the_database_is_rebuilt(databases, folder):
    old = made(folder / "things", RED)
    async with under_way(databases, captions=BLUE) as (task, _, go_on):
        for _ in range(5):
            assert (await nearest(databases, "things", "red"))[0].generation == old.generation
        go_on.set()
        new = await task
    assert (await nearest(databases, "things", "red"))[0].generation == new.generation


# --- closing -------------------------------------------------------------------------------------------------------


async def test_closing_ends_every_thread_and_rejects_later_searches(make_databases, folder):
    databases = make_databases()
    made(folder / "things")
    await built(databases, "others")
    await nearest(databases, "things", "red")
    workers = [item.queue._threads[0] for item in databases._served.values()]
    assert len(workers) == 2
    await databases.close()
    assert not any(worker.is_alive() for worker in workers)
    with pytest.raises(NotReadyError, match="the service is stopping"):
        await nearest(databases, "things", "red")
    await databases.close()


async def test_without_wordnet_the_packaged_names_are_the_lexicon(make_databases, tmp_path, lexicon_folder):
    bare = make_databases(wordnet=tmp_path / "nowhere").lexicon()
    assert bare.tag(["shirt", "unknown", "the"]) == ["NN", "NN", OTHER]
    for lexicon in (bare, make_databases(wordnet=lexicon_folder).lexicon()):
        words = ["shorts", "sunglasses", "dogs", "retrievers", "thermos"]
        assert [lexicon.singular(word) for word in words] == ["shorts", "sunglasses", "dog", "retriever", "thermos"]


@pytest.mark.parametrize("content", ["nonsense\n", "\n"])
async def test_an_invalid_lexicon_is_an_error_and_does_not_fail_builds(databases, folder, lexicon_folder, content):
    (lexicon_folder / "index.noun").write_text(content)
    with pytest.raises(NotConfiguredError, match=r"index\.noun"):
        databases.lexicon()
    made(folder / "others")
    await databases.open_all()
    assert (await built(databases)).captions == len(CAPTIONS)


async def test_the_lexicon_is_read_once(databases):
    first, *others = await asyncio.gather(*(asyncio.to_thread(databases.lexicon) for _ in range(8)))
    assert all(other is first for other in others)
    assert "dog" in first.nouns
