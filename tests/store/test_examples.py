"""Example images are stored once, changes are counted, and deleted data is erased from the files."""

import asyncio
import hashlib
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import event, text

from app.errors import StoreError, TooLargeError, UnknownNameError
from app.store import database, examples
from app.store.database import reading
from app.store.examples import Deleted, ExampleRepository, NewExample, SelectionRepository
from app.types import ClassEntry

ROOT = Path(__file__).parents[2]

MODEL = "tower-1"


@pytest.fixture
def stored(engine):
    return ExampleRepository(engine)


@pytest.fixture
def selections(engine):
    return SelectionRepository(engine)


@pytest.fixture
async def _pets(repository):
    await repository.put("pets", [ClassEntry("cat"), ClassEntry("dog")], "{}")


pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("_pets")]


def unit(seed, d=8):
    row = np.random.default_rng(seed).standard_normal(d)
    return (row / np.linalg.norm(row)).astype(np.float32)


def image(number, *classnames, content=None, models=(MODEL,), d=8):
    """Return an image that depends only on the number; a class of None is no class."""
    digest = hashlib.sha256(b"%d" % number).digest()
    classnames = tuple(classname for classname in classnames if classname is not None)
    return NewExample(digest, classnames, {model: unit((number, len(model)), d) for model in models}, content)


async def ids_of(stored, **chosen):
    return [item.id for item in await stored.list("pets", limit=1000, **chosen)]


async def number_of(engine, table):
    async with reading(engine) as session:
        return await session.scalar(text(f"SELECT count(*) FROM {table}"))


# Several classes


async def test_an_image_of_several_classes_is_found_counted_and_deleted_by_each(stored, engine):
    added = await stored.add("pets", [image(1, "dog", "cat", "dog"), image(2, "cat"), image(3), image(4, "dog", "cat")])
    both, cat, bare, late = added.ids
    assert (await stored.get("pets", both)).classnames == ("dog", "cat")
    assert await ids_of(stored, classname="cat") == [both, cat, late]
    assert await ids_of(stored, classname="dog") == [both, late]
    assert await ids_of(stored, classname="cat", after=cat) == [late]
    assert await ids_of(stored, unlabelled=True) == [bare]
    counts = await stored.counts("pets", MODEL)
    assert (counts.labelled, counts.labelled_images, counts.several_classes) == ({"cat": 3, "dog": 2}, 3, 2)
    assert (counts.unlabelled, counts.without_features) == (1, 0)
    assert (await stored.delete("pets", ids=[late])).deleted == 1
    assert (await stored.delete("pets", classname="cat")).deleted == 2
    assert await ids_of(stored) == [bare]
    assert await number_of(engine, "example_further_classes") == 0


@pytest.mark.parametrize(
    ("before", "after", "changes"),
    [
        (("dog",), ("dog", "cat"), True),
        (("dog", "cat"), ("cat",), True),
        (("dog", "cat"), ("cat", "dog"), False),
        (("dog", "cat"), ("dog", "cat", "cat"), False),
        (("dog", "cat"), (), False),
        ((), ("dog", "cat"), True),
    ],
)
async def test_classes_that_are_given_replace_all_that_are_stored(stored, before, after, changes):
    await stored.add("pets", [image(1, *before), image(2, "cat", "dog")])
    added = await stored.add("pets", [image(1, *after)])
    assert (added.relabelled, added.duplicates, added.revision) == (int(changes), int(not changes), 1 + changes)
    first, other = await stored.list("pets", limit=9)
    assert set(first.classnames) == set(after or before)
    assert other.classnames == ("cat", "dog")


async def test_methods_of_one_class_per_image_do_not_learn_from_images_of_several(stored):
    items = [image(1, "dog", "cat"), image(2, "cat"), image(3), image(4, "dog")]
    await stored.add("pets", items)
    found = await stored.features("pets", MODEL, ["dog", "cat"])
    assert found.support_labels.tolist() == [1, 0]
    assert len(found.pool_features) == 1
    every = await stored.labelled_features("pets", MODEL, ["dog", "cat"])
    assert every.is_label.tolist() == [[True, True], [False, True], [True, False]]
    np.testing.assert_allclose(every.features, [items[n].features[MODEL] for n in (0, 1, 3)], atol=1e-3)
    of_dogs = await stored.labelled_features("pets", MODEL, ["dog"])
    assert of_dogs.is_label.tolist() == [[True], [True]]
    assert (await stored.labelled_features("pets", "tower-2", ["dog"])).is_label.shape == (0, 1)


async def test_an_unknown_class_among_several_is_refused_and_nothing_is_added(stored):
    with pytest.raises(UnknownNameError, match="unknown class 'owl'"):
        await stored.add("pets", [image(1, "cat"), image(2, "dog", "owl")])
    assert await ids_of(stored) == []


# Adding


async def test_an_image_has_a_digest_a_class_a_time_and_models(stored):
    added = await stored.add("pets", [image(1, "cat", models=("b", "a"), content=b"file"), image(2)])
    assert (added.added, added.relabelled, added.duplicates, added.revision) == (2, 0, 0, 1)
    first, second = await stored.list("pets", limit=10)
    assert (first.id, second.id) == added.ids
    assert (first.digest, first.classnames, first.models, first.kept) == (
        hashlib.sha256(b"1").hexdigest(),
        ("cat",),
        ("a", "b"),
        True,
    )
    assert (second.classnames, second.models, second.kept) == ((), (MODEL,), False)
    assert first.created_at.utcoffset().total_seconds() == 0
    assert [await stored.get("pets", item.id) for item in (first, second)] == [first, second]
    assert [await stored.content("pets", item.id) for item in (first, second)] == [b"file", None]


async def test_an_image_is_stored_once_with_its_latest_class(stored):
    ids = (await stored.add("pets", [image(1), image(2, "cat"), image(3, "cat"), image(4)])).ids
    again = await stored.add("pets", [image(1, "dog"), image(2, "dog"), image(3), image(4), image(5)])
    assert (again.added, again.relabelled, again.duplicates, again.revision) == (1, 2, 2, 2)
    assert again.ids[:4] == ids
    assert [item.classnames for item in await stored.list("pets", limit=9)] == [("dog",), ("dog",), ("cat",), (), ()]


async def test_the_first_class_counts_if_an_image_occurs_twice_in_a_call(stored):
    added = await stored.add("pets", [image(1, "cat"), image(1, "dog"), image(1), image(2), image(2, "dog")])
    assert (added.added, added.relabelled, added.duplicates) == (2, 0, 3)
    assert added.ids == (added.ids[0],) * 3 + (added.ids[3],) * 2
    assert [item.classnames for item in await stored.list("pets", limit=9)] == [("cat",), ()]


async def test_a_stored_image_gets_missing_features_and_a_missing_file_only(stored):
    (example_id,) = (await stored.add("pets", [image(1, "cat")])).ids
    other = NewExample(image(1).digest, (), {MODEL: unit(99), "tower-2": unit(7)}, b"file")
    assert (await stored.add("pets", [other])).duplicates == 1
    assert (await stored.get("pets", example_id)).models == (MODEL, "tower-2")
    kept = await stored.features("pets", MODEL, ["cat"])
    assert np.abs(kept.support_features[0] - unit((1, len(MODEL)))).max() < 1e-3
    assert await stored.content("pets", example_id) == b"file"
    await stored.add("pets", [image(1, content=b"another file of the same digest")])
    assert await stored.content("pets", example_id) == b"file"


async def test_only_changes_increase_the_revision(stored):
    calls = [
        ([image(1), image(2, "cat")], 1),
        ([image(1), image(2, "cat")], 1),
        ([], 1),
        ([image(1, "dog")], 2),
        ([image(1), image(2)], 2),
        ([image(1, models=(MODEL, "tower-2"))], 3),
        ([image(2, content=b"file")], 4),
        ([image(2, content=b"file")], 4),
    ]
    for items, revision in calls:
        assert (await stored.add("pets", items)).revision == revision
        assert await stored.revision("pets") == revision
    assert (await stored.delete("pets", ids=[10**6])).revision == 4
    assert (await stored.delete("pets", classname="dog")).revision == 5


async def test_the_error_for_an_unknown_class_lists_the_classes(stored, repository):
    for classname in ("Cat", "owl", "\0", "\ud800"):
        with pytest.raises(
            UnknownNameError, match=r"^unknown class '.*'; known: cat, dog(; did you mean 'cat'\?)?$"
        ) as caught:
            await stored.add("pets", [image(1, "cat"), image(2, classname)])
        caught.value.message.encode()
    await repository.remove_class("pets", "dog")
    with pytest.raises(UnknownNameError, match="unknown class 'dog'; known: cat"):
        await stored.add("pets", [image(1, "dog")])
    assert await stored.revision("pets") == 0


async def test_too_many_images_are_rejected_completely_with_the_setting_in_the_error(stored):
    await stored.add("pets", [image(number) for number in range(3)], max_examples=3)
    message = r"'pets' would have 5 example images, at most 4 are allowed; .*DEIXIS_MAX_EXAMPLES"
    with pytest.raises(TooLargeError, match=message):
        await stored.add("pets", [image(1, "cat"), image(8), image(9)], max_examples=4)
    assert await ids_of(stored, classname="cat") == []
    assert (await stored.add("pets", [image(0, "cat"), image(2), image(7)], max_examples=4)).added == 1
    assert (await stored.add("pets", [image(0, "dog")], max_examples=1)).relabelled == 1  # stored images do not count


@pytest.fixture
def statements(engine):
    """Return all SQL statements of the test except those that begin transactions."""
    seen = []

    def note(_connection, _cursor, statement, *_):
        if not statement.startswith("BEGIN"):
            seen.append(statement)

    event.listen(engine.sync_engine, "before_cursor_execute", note)
    return seen


async def test_the_number_of_statements_does_not_depend_on_the_number_of_images(stored, statements):
    numbers = []
    for images in (3, 600):
        statements.clear()
        await stored.add("pets", [image(images + number, "cat") for number in range(images)])
        numbers.append(len(statements))
    assert numbers[0] == numbers[1] < 12


async def test_more_images_than_sql_variables_are_added_found_and_deleted(stored, monkeypatch):
    monkeypatch.setattr(examples, "_PER_STATEMENT", 7)
    items = [image(number, "cat" if number % 2 else None) for number in range(50)]
    added = await stored.add("pets", items)
    assert (await stored.add("pets", items)).duplicates == 50
    assert await stored.known("pets", {item.digest for item in items}, [MODEL]) == {item.digest for item in items}
    assert (await stored.delete("pets", ids=added.ids[:40])).deleted == 40
    assert await ids_of(stored) == list(added.ids[40:])


async def test_concurrent_additions_lose_no_image_and_no_revision(url, engine, opened, stored):
    repositories = [stored, *(ExampleRepository(opened(url)) for _ in range(3))]
    async with asyncio.timeout(60):
        done = await asyncio.gather(
            *(
                repositories[n % 4].add("pets", [image(n), image(1000 + n), image(2000 + n % 5, "cat")])
                for n in range(40)
            )
        )
    assert sorted(item.revision for item in done) == list(range(1, 41))
    assert sum(item.added for item in done) == 85
    counts = await stored.counts("pets", MODEL)
    assert (counts.labelled, counts.unlabelled, counts.without_features) == ({"cat": 5}, 80, 0)


KILLED = """
import asyncio, hashlib, sys
import numpy as np
from app.store.database import open_engine
from app.store.examples import ExampleRepository, NewExample

async def add_for_ever(url):
    stored = ExampleRepository(open_engine(url))
    number = 0
    while True:
        digests = [hashlib.sha256(b"%d %d" % (number, n)).digest() for n in range(50)]
        features = {"tower-1": np.full(8, number % 100, np.float32)}
        added = await stored.add("pets", [NewExample(digest, (), features, b"file") for digest in digests])
        print(added.revision, flush=True)
        number += 1

asyncio.run(add_for_ever(sys.argv[1]))
"""


def add_until_killed(url):
    """Return the last revision that a writer had acknowledged before it was killed."""
    command = [sys.executable, "-c", KILLED, url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as writer:
        first = [writer.stdout.readline() for _ in range(12)]
        writer.kill()
        return int((first + [line for line in writer.stdout if line.endswith("\n")])[-1])


async def test_acknowledged_images_and_features_survive_the_kill_of_the_writer(url, opened, engine):
    await engine.dispose()
    acknowledged = add_until_killed(url)
    again = ExampleRepository(opened(url))
    counts = await again.counts("pets", MODEL)
    assert counts.revision - acknowledged in {0, 1}  # the last transaction is complete or missing
    assert (counts.unlabelled, counts.without_features) == (50 * counts.revision, 0)


# Reading


@pytest.mark.parametrize("name", ["cars", "\ud800", "\x00"])
async def test_an_unknown_label_set_is_an_error(stored, name):
    for call in (
        stored.add(name, [image(1)]),
        stored.known(name, [image(1).digest], [MODEL]),
        stored.counts(name),
        stored.revision(name),
        stored.list(name, limit=1),
        stored.get(name, 1),
        stored.content(name, 1),
        stored.delete(name, everything=True),
        stored.features(name, MODEL, ["cat"]),
        stored.missing(name, MODEL, 1),
        stored.add_features(name, MODEL, {1: unit(1)}),
    ):
        with pytest.raises(UnknownNameError, match="label set"):
            await call


async def test_an_unknown_image_or_one_of_another_label_set_is_an_error(stored, repository):
    await repository.put("cars", [ClassEntry("van")], "{}")
    (foreign,) = (await stored.add("cars", [image(1)])).ids
    for example_id in (foreign, foreign + 1, 0, -1, 2**63, 10**30):
        for call in (stored.get("pets", example_id), stored.content("pets", example_id)):
            with pytest.raises(UnknownNameError, match=f"unknown example image '{example_id}'; the label set 'pets'"):
                await call
    assert await stored.delete("pets", ids=[foreign, 0, -1, 10**30]) == Deleted(0, 0)
    assert (await stored.get("cars", foreign)).classnames == ()


async def test_an_image_is_known_if_it_has_features_of_every_model(stored):
    await stored.add("pets", [image(1, models=("a", "b")), image(2, models=("a",)), image(3, models=(), content=b"3")])
    digests = [image(number).digest for number in range(1, 5)]
    for models, known in ((["a", "b"], [0]), (["a"], [0, 1]), ([], [0, 1, 2]), (["c"], [])):
        assert await stored.known("pets", digests, models) == {digests[place] for place in known}
    assert await stored.known("pets", [], ["a"]) == frozenset()


async def test_images_are_counted_by_class_including_removed_classes(stored, repository):
    await stored.add("pets", [image(n, ("cat", "dog", None)[n % 3]) for n in range(10)])
    await stored.add("pets", [image(20, models=("tower-2",)), image(21, "cat", models=(), content=b"21")])
    await repository.remove_class("pets", "dog")
    counts = await stored.counts("pets", MODEL)
    assert (counts.labelled, counts.unlabelled, counts.without_features) == ({"cat": 5, "dog": 3}, 4, 2)
    assert counts.revision == 2
    assert (await stored.counts("pets")).without_features == 0
    assert (await stored.counts("pets", "tower-2")).without_features == 11


async def test_images_are_listed_by_page_and_class(stored):
    ids = (await stored.add("pets", [image(n, ("cat", "dog", None)[n % 3]) for n in range(12)])).ids
    assert await ids_of(stored) == sorted(ids)
    assert await ids_of(stored, classname="dog") == list(ids[1::3])
    assert await ids_of(stored, unlabelled=True) == list(ids[2::3])
    assert await ids_of(stored, classname="dog", after=ids[4]) == [ids[7], ids[10]]
    assert [item.id for item in await stored.list("pets", limit=2, after=ids[1])] == [ids[2], ids[3]]
    for nothing in ({"classname": "owl"}, {"classname": "\ud800"}, {"after": 10**30}, {"after": ids[11]}):
        assert await ids_of(stored, **nothing) == []


# Features


async def test_features_are_returned_by_class_in_half_precision(stored, monkeypatch):
    monkeypatch.setattr(examples, "_FEATURES_PER_PAGE", 7)
    names = ["cat", "dog", None]
    items = [image(n, names[n % 3], d=512) for n in range(40)]
    order = np.random.default_rng(0).permutation(40)
    await stored.add("pets", [items[n] for n in order[:25]])
    await stored.add("pets", [items[n] for n in order[25:]])
    found = await stored.features("pets", MODEL, ["dog", "cat"])
    support = [items[n] for n in order if items[n].classnames]
    assert found.support_labels.tolist() == [["dog", "cat"].index(item.classnames[0]) for item in support]
    pool = [item for item in (items[n] for n in order) if not item.classnames]
    for rows, expected in ((found.support_features, support), (found.pool_features, pool)):
        wanted = np.stack([item.features[MODEL] for item in expected])
        assert np.array_equal(rows, wanted.astype(np.float16).astype(np.float32))
        assert np.abs(rows - wanted).max() < 2**-11
    types = (found.support_features.dtype, found.support_labels.dtype, found.pool_features.dtype)
    assert types == (np.float32, np.int64, np.float32)
    assert found.revision == 2


async def test_features_of_other_models_label_sets_and_classes_are_excluded(stored, repository):
    await repository.put("cars", [ClassEntry("cat")], "{}")
    await stored.add("cars", [image(1, "cat"), image(2)])
    await stored.add("pets", [image(3, "cat"), image(4, "dog"), image(5), image(6, "cat", models=("tower-2",), d=4)])
    found = await stored.features("pets", MODEL, ["cat"])
    assert (found.support_features.shape, found.support_labels.tolist(), found.pool_features.shape) == (
        (1, 8),
        [0],
        (1, 8),
    )
    found = await stored.features("pets", "tower-2", ["dog", "cat"])
    assert (found.support_features.shape, found.support_labels.tolist(), found.pool_features.shape) == (
        (1, 4),
        [1],
        (0, 4),
    )
    for nothing in (await stored.features("pets", "tower-3", ["cat"]), await stored.features("cars", MODEL, [])):
        assert (len(nothing.support_features), len(nothing.support_labels)) == (0, 0)


@pytest.mark.parametrize("largest", [0, 1, 7, 29, 30, 31])
async def test_a_large_pool_is_sampled_evenly_and_deterministically(stored, largest):
    await stored.add("pets", [image(n, None if n % 2 else "cat") for n in range(60)])
    whole = await stored.features("pets", MODEL, ["cat"])
    some, again = [await stored.features("pets", MODEL, ["cat"], max_pool=largest) for _ in range(2)]
    assert np.array_equal(some.pool_features, again.pool_features)
    assert np.array_equal(some.support_features, whole.support_features)
    assert some.pool_features.shape == (min(largest, 30), 8)
    ranks = [np.flatnonzero((whole.pool_features == row).all(axis=1)).item() for row in some.pool_features]
    gaps = np.diff([-1, *ranks, 30])
    assert np.all(gaps[1:-1] >= 1)
    if 0 < largest <= 30:
        assert gaps[1:-1].size == 0 or np.ptp(gaps[1:-1]) <= 1
        assert abs(gaps[0] - gaps[-1]) <= 2  # includes the oldest and the newest images


async def test_features_are_a_snapshot_during_concurrent_writes(url, opened, stored, monkeypatch):
    monkeypatch.setattr(examples, "_FEATURES_PER_PAGE", 10)
    writer = ExampleRepository(opened(url))

    async def write():
        for n in range(15):
            await writer.add("pets", [image(30 * n + m, "cat" if m < 5 else None) for m in range(30)])

    writing = asyncio.create_task(write())
    while not writing.done():
        found = await stored.features("pets", MODEL, ["cat", "dog"])
        assert len(found.support_features) == 5 * found.revision
        assert len(found.pool_features) == 25 * found.revision
    await writing
    assert (await stored.features("pets", MODEL, ["cat"])).revision == 15


def delete_features(url):
    """Delete all features through a separate connection."""
    if url.startswith("sqlite"):
        connect = sqlite3.connect(url.removeprefix("sqlite:///"))
    else:
        connect = pytest.importorskip("psycopg").connect(url)
    with closing(connect) as connection:
        for statement in ("DELETE FROM example_features", "UPDATE label_sets SET examples_revision = 2"):
            connection.execute(statement)
        connection.commit()


async def test_features_match_their_revision_during_a_concurrent_deletion(url, engine, stored):
    await stored.add("pets", [image(n, "cat" if n % 3 else None) for n in range(30)])
    seen = []

    def delete_after_the_first(_connection, _cursor, statement, *_):
        if not statement.startswith("BEGIN"):
            seen.append(statement)
            if len(seen) == 1:
                delete_features(url)

    event.listen(engine.sync_engine, "after_cursor_execute", delete_after_the_first)
    found = await stored.features("pets", MODEL, ["cat"])
    assert (found.revision, len(found.support_features), len(found.pool_features)) == (1, 20, 10)
    found = await stored.features("pets", MODEL, ["cat"])
    assert (found.revision, len(found.support_features), len(found.pool_features)) == (2, 0, 0)


async def test_stored_files_without_features_of_a_model_get_features_later(stored):
    items = [image(n, models=(MODEL,) if n % 2 else (), content=b"%d" % n) for n in range(8)]
    ids = (await stored.add("pets", [*items, image(9, models=("tower-2",))])).ids
    first = await stored.missing("pets", MODEL, 3)
    assert list(first) == [(ids[0], b"0"), (ids[2], b"2"), (ids[4], b"4")]
    assert list(await stored.missing("pets", MODEL, 3, after=ids[4])) == [(ids[6], b"6")]
    assert len(await stored.missing("pets", "tower-2", 100)) == 8

    await stored.delete("pets", ids=[ids[2]])
    rows = {example_id: unit(example_id) for example_id, _ in first} | {ids[1]: unit(1), 10**6: unit(2)}
    assert await stored.add_features("pets", MODEL, rows) == 2
    assert await stored.revision("pets") == 3
    assert await stored.add_features("pets", MODEL, rows) == 0
    assert await stored.add_features("pets", MODEL, {}) == 0
    assert await stored.revision("pets") == 3
    assert list(await stored.missing("pets", MODEL, 3)) == [(ids[6], b"6")]
    pool = (await stored.features("pets", MODEL, [])).pool_features
    assert np.abs(pool[0] - unit(ids[0])).max() < 2**-11
    assert np.abs(pool[1] - items[1].features[MODEL]).max() < 2**-11  # not the later one


# Deleting


async def test_images_are_deleted_by_id_by_class_without_class_or_all(engine, stored, repository):
    await repository.put("cars", [ClassEntry("cat")], "{}")
    await stored.add("cars", [image(n, "cat" if n % 2 else None) for n in range(4)])
    ids = (await stored.add("pets", [image(n, ("cat", "dog", None)[n % 3]) for n in range(12)])).ids
    assert await stored.delete("pets", ids=[ids[0], ids[1], ids[1]]) == Deleted(2, 2)
    assert await stored.delete("pets", classname="cat") == Deleted(3, 3)
    assert await stored.delete("pets", unlabelled=True) == Deleted(4, 4)
    assert {item.classnames for item in await stored.list("pets", limit=100)} == {("dog",)}
    assert await stored.delete("pets", everything=True) == Deleted(3, 5)
    for nothing in ({"everything": True}, {"classname": "\0"}, {"unlabelled": True}, {"ids": []}):
        assert await stored.delete("pets", **nothing) == Deleted(0, 5)
    assert len(await stored.list("cars", limit=100)) == await number_of(engine, "example_features") == 4


async def test_features_are_deleted_with_their_image_on_every_path(engine, stored):
    ids = (await stored.add("pets", [image(n, models=("a", "b")) for n in range(3)])).ids
    async with engine.begin() as connection:
        await connection.execute(text(f"DELETE FROM examples WHERE id = {ids[1]}"))
    assert await number_of(engine, "example_features") == 4


async def test_ids_of_deleted_images_are_not_reused(stored, repository):
    last = (await stored.add("pets", [image(1), image(2)])).ids[-1]
    await stored.delete("pets", everything=True)
    again = (await stored.add("pets", [image(2)])).ids[0]
    assert again > last
    await repository.delete("pets")
    await repository.put("pets", [ClassEntry("cat")], "{}")
    assert (await stored.add("pets", [image(2)])).ids[0] > again


async def test_deleting_a_label_set_deletes_its_images_and_keeps_its_revision_counter(
    engine, stored, selections, repository
):
    await repository.put("cars", [ClassEntry("van")], "{}")
    await stored.add("cars", [image(1)])
    await stored.add("pets", [image(1, "cat"), image(2)])
    await selections.put("pets", MODEL, 1, 1, {"method": "gda"})
    await repository.delete("pets")
    assert [await number_of(engine, table) for table in ("examples", "example_features", "selections")] == [1, 1, 0]
    await repository.put("pets", [ClassEntry("cat")], "{}")
    counts = await stored.counts("pets", MODEL)
    assert (counts.revision, counts.labelled, counts.unlabelled) == (2, {}, 0)
    assert await selections.get("pets", MODEL) is None
    assert (await stored.add("pets", [image(1, "cat")])).revision == 3


@pytest.fixture
def sqlite_files(sqlite_url):
    """Return a function that reads the database file and the write-ahead log."""
    file = Path(sqlite_url.removeprefix("sqlite:///"))

    def read():
        return b"".join(item.read_bytes() for item in (file, Path(f"{file}-wal")) if item.exists())

    return read


def traces(item):
    """Return parts of a stored image that occur in no other image."""
    whole = [row.astype("<f2").tobytes() for row in item.features.values()] + [item.content or b""]
    return [item.digest, *(piece[at : at + 24] for piece in whole for at in range(0, len(piece) - 24, 211))]


def distinctive(number, rng):
    content = rng.bytes(int(rng.choice([300, 3000, 15_000]))) if number % 2 else None
    d = int(rng.choice([24, 128, 700]))
    return image(number, (None, "cat", "dog")[number % 3], content=content, models=(f"tower-{d}",), d=d)


async def found_of(files, items):
    data = files()
    return await asyncio.to_thread(lambda: [item for item in items if any(trace in data for trace in traces(item))])


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
async def test_deleted_images_are_erased_from_the_sqlite_files(stored, repository, sqlite_files):
    rng = np.random.default_rng(0)
    kept, number = {}, 0
    for _ in range(8):
        items = [distinctive(number + more, rng) for more in range(40)]
        number += 40
        kept |= dict(zip((await stored.add("pets", items)).ids, items, strict=True))
        assert await found_of(sqlite_files, items) == items
        gone = [int(item) for item in rng.choice(list(kept), 25, replace=False)]
        await stored.delete("pets", ids=gone)
        assert await found_of(sqlite_files, [kept.pop(item) for item in gone]) == []
    assert await found_of(sqlite_files, kept.values()) == list(kept.values())
    await repository.delete("pets")
    assert await found_of(sqlite_files, kept.values()) == []


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
async def test_a_large_database_is_not_rewritten_but_deleted_rows_are_overwritten(stored, sqlite_files, monkeypatch):
    monkeypatch.setattr(database, "VACUUMED_BYTES", 0)
    rng = np.random.default_rng(0)
    items = [distinctive(number, rng) for number in range(1, 4)]
    ids = (await stored.add("pets", items)).ids
    await stored.delete("pets", ids=[ids[1]])
    assert await found_of(sqlite_files, items) == [items[0], items[2]]


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
async def test_a_deletion_during_a_read_succeeds_and_the_next_one_truncates_the_log(
    url, request, stored, sqlite_files, monkeypatch
):
    monkeypatch.setattr(database, "SCRUB_TIMEOUT_S", 0.05)
    item = image(1, d=700, content=np.random.default_rng(0).bytes(5000))
    await stored.add("pets", [image(2), image(3)])
    with closing(sqlite3.connect(request.getfixturevalue("sqlite_url").removeprefix("sqlite:///"))) as reader:
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM examples").fetchone() == (2,)
        (example_id,) = (await stored.add("pets", [item])).ids
        async with asyncio.timeout(5):
            assert (await stored.delete("pets", ids=[example_id])).deleted == 1
        assert await found_of(sqlite_files, [item]) == [item]  # the reader may still need pages of the log
    await stored.delete("pets", everything=True)
    assert await found_of(sqlite_files, [item]) == []


# Selections


async def test_a_selection_is_returned_with_its_revision_and_the_current_one(stored, selections, repository):
    assert await selections.get("pets", MODEL) is None
    await stored.add("pets", [image(1, "cat")])
    result = {"method": "gda", "options": {"alpha": 0.5}, "accuracy": None}
    assert await selections.put("pets", MODEL, 1, 1, result)
    chosen = await selections.get("pets", MODEL)
    assert (chosen.version, chosen.revision, chosen.result, chosen.is_current) == (1, 1, result, True)
    assert chosen.created_at.utcoffset().total_seconds() == 0
    assert await selections.get("pets", "tower-2") is None

    await stored.add("pets", [image(2, "cat")])
    chosen = await selections.get("pets", MODEL)
    assert (chosen.revision, chosen.last_revision, chosen.is_current) == (1, 2, False)
    await repository.put("pets", [ClassEntry("cat")], "{}")
    assert (await selections.get("pets", MODEL)).last_version == 2


async def test_a_selection_for_an_older_revision_does_not_replace_a_newer_one(selections):
    for version, revision, taken in ((2, 5, True), (1, 9, False), (2, 4, False), (2, 5, True), (3, 1, True)):
        assert await selections.put("pets", MODEL, version, revision, {"of": [version, revision]}) is taken
        if taken:
            assert (await selections.get("pets", MODEL)).result == {"of": [version, revision]}
    assert (await selections.get("pets", MODEL)).version == 3


async def test_the_newest_of_concurrent_selections_is_kept(url, opened, selections):
    others = [selections, SelectionRepository(opened(url))]
    revisions = np.random.default_rng(0).permutation(20).tolist()
    await asyncio.gather(*(others[n % 2].put("pets", MODEL, 1, n, {"n": n}) for n in revisions))
    assert (await selections.get("pets", MODEL)).result == {"n": 19}


async def test_a_selection_counts_for_a_version_with_other_thresholds_that_was_written_meanwhile(
    stored, selections, repository
):
    await stored.add("pets", [image(1, "cat")])
    await selections.put("pets", MODEL, 1, 1, {"n": 1})
    await stored.add("pets", [image(2, "cat")])
    await repository.set_thresholds("pets", {"cat": 0.7})  # while the methods are compared on both images
    assert await selections.put("pets", MODEL, 1, 2, {"n": 2})
    found = await selections.get("pets", MODEL)
    assert (found.result, found.version, found.is_current) == ({"n": 2}, 2, True)
    await repository.put("pets", [ClassEntry("cat"), ClassEntry("dog")], "{} at home")
    assert not await selections.put("pets", MODEL, 1, 3, {"n": 3})
    assert not (await selections.get("pets", MODEL)).is_current


@pytest.mark.parametrize("name", ["cars", "gone", "\ud800", "\x00"])
async def test_a_selection_for_an_unknown_label_set_is_not_stored(engine, selections, repository, name):
    await repository.put("gone", [ClassEntry("cat")], "{}")
    await repository.delete("gone")
    assert not await selections.put(name, MODEL, 1, 1, {})
    assert await selections.get(name, MODEL) is None
    assert await number_of(engine, "selections") == 0


async def test_a_selection_is_read_with_one_statement(selections, statements):
    await selections.put("pets", MODEL, 1, 1, {})
    statements.clear()
    await selections.get("pets", MODEL)
    assert len(statements) == 1


# --- damaged features ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "feature", [b"", b"\0", bytes(14), bytes(18), bytes(14) + b"\x00\x7c", bytes(14) + b"\xff\x7e"], ids=bytes.hex
)
async def test_damaged_features_are_reported_with_their_ids_until_the_image_is_deleted(stored, engine, feature):
    """Rows that are too short or too long, infinities and values that are no numbers."""
    await stored.add("pets", [image(number, "cat") for number in range(3)], max_examples=10)
    first, *others = await ids_of(stored)
    statement = text("UPDATE example_features SET feature = :feature WHERE example_id = :id")
    async with engine.begin() as connection:
        await connection.execute(statement, {"feature": feature, "id": first})
    with pytest.raises(StoreError, match=rf"damaged \(ids: {first}\); delete each with DELETE"):
        await stored.features("pets", MODEL, ["cat"])
    await stored.delete("pets", ids=[first])
    assert len((await stored.features("pets", MODEL, ["cat"])).support_labels) == len(others)
