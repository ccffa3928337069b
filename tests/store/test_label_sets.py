import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import func, select, text

from app.errors import ConflictError, InvalidFieldError, PreconditionFailedError, TooLargeError, UnknownNameError
from app.store.database import migrate, reading
from app.store.label_sets import ANY, LabelSetRepository, LabelSetSummary
from app.store.tables import LabelSetRow, LabelSetVersionRow
from app.types import ClassEntry, LabelSet

pytestmark = pytest.mark.anyio

LYNX = ClassEntry("lynx", ("a cat with tufted ears", "оцелот 🐆"), ("bobcat",))
PUMA = ClassEntry("puma")
OCELOT = ClassEntry("ocelot", (), ("tigrillo",))


async def number_of(engine, row):
    async with reading(engine) as session:
        return await session.scalar(select(func.count()).select_from(row))


async def test_a_stored_label_set_is_returned_unchanged(repository):
    put, created = await repository.put("кошки 🐈", [LYNX, PUMA], "a photo of a {}.")
    assert created
    assert put.reference == "кошки 🐈@1"
    assert put.classes == (LYNX, PUMA)
    assert put.templates == "a photo of a {}."
    assert await repository.get("кошки 🐈") == put


async def test_every_version_has_a_creation_time_in_utc(repository):
    put, _ = await repository.put("pets", [LYNX], "photo")
    for made in (put, await repository.get("pets")):
        assert made.created_at.utcoffset() == timedelta(0)
        assert abs(datetime.now(UTC) - made.created_at) < timedelta(minutes=1)


async def test_creation_times_do_not_depend_on_the_time_zone_of_the_session(engine, repository):
    put, _ = await repository.put("pets", [LYNX], "photo")
    if engine.dialect.name == "postgresql":
        async with engine.begin() as connection:
            await connection.execute(text("SET TIME ZONE 'Asia/Tokyo'"))
    again = await repository.get("pets")
    assert (again.created_at, again.created_at.tzinfo) == (put.created_at, UTC)


async def test_putting_again_creates_a_version_and_keeps_the_old_one(repository):
    first, _ = await repository.put("pets", [LYNX], "photo")
    second, created = await repository.put("pets", [PUMA], "sketch")
    assert not created
    assert second.reference == "pets@2"
    assert await repository.get("pets") == second
    assert await repository.get("pets", 2) == second
    assert await repository.get("pets", 1) == first


async def test_the_error_for_an_unknown_label_set_lists_the_known_ones(repository):
    for name in ("zoo", "pets", "gone", "acme#zoos"):
        await repository.put(name, [LYNX], "photo")
    await repository.delete("gone")
    with pytest.raises(UnknownNameError) as caught:
        await repository.get("pet")
    assert caught.value.message == "unknown label set 'pet'; known: pets, zoo; did you mean 'pets'?"
    with pytest.raises(UnknownNameError, match=r"^unknown label set 'zoo'; known: zoos; did you mean 'zoos'\?$"):
        await repository.get("acme#zoo")


async def test_the_error_for_an_unknown_version_lists_the_known_ones(repository):
    await repository.put("pets", [LYNX], "photo")
    with pytest.raises(UnknownNameError, match=r"^unknown label set version 'pets@2'; known: 1$"):
        await repository.get("pets", 2)
    await repository.put("pets", [LYNX], "photo")
    for version in (3, 0, -1, 2**31, 10**30):
        with pytest.raises(UnknownNameError, match=rf"^unknown label set version 'pets@{version}'; known: 1 to 2$"):
            await repository.get("pets", version)


@pytest.mark.parametrize(
    "name", ["\0", "pets\0", "\ud800", "'; DROP TABLE label_sets; --", "%", "pe_s", "", "x" * 10_000]
)
async def test_an_invalid_name_is_unknown(repository, name):
    await repository.put("pets", [LYNX], "photo")
    for call in (
        repository.get(name),
        repository.get(name, 1),
        repository.add_classes(name, [PUMA]),
        repository.remove_class(name, "lynx"),
        repository.delete(name),
    ):
        with pytest.raises(UnknownNameError) as caught:
            await call
        assert "known: pets" in caught.value.message
        caught.value.message.encode()
    assert (await repository.get("pets")).version == 1


async def test_sql_in_values_is_stored_as_text(repository):
    hostile = "'); DROP TABLE label_sets; -- \" %s :name ? \\"
    await repository.put("pets", [ClassEntry(hostile, (hostile,), (hostile,))], hostile)
    again = await repository.get("pets")
    assert again.classes == (ClassEntry(hostile, (hostile,), (hostile,)),)
    assert again.templates == hostile


async def test_the_list_is_sorted_by_code_point_and_paged_by_name(repository):
    names = ["Zebra", "apple", "zoo", "éclair", "動物", "🐶"]
    for name in reversed(names):
        await repository.put(name, [LYNX], "photo")
    assert [summary.name for summary in await repository.list(10)] == names
    assert [summary.name for summary in await repository.list(2)] == names[:2]
    assert [summary.name for summary in await repository.list(3, after="apple")] == names[2:5]
    assert [summary.name for summary in await repository.list(3, after="b")] == names[2:5]
    assert await repository.list(3, after="🐶") == []


async def test_the_list_has_the_current_version_and_its_number_of_classes(repository):
    await repository.put("pets", [LYNX], "photo")
    current, _ = await repository.put("pets", [LYNX, PUMA, OCELOT], "photo", multi_label=True)
    assert await repository.list(10) == [LabelSetSummary("pets", 2, 3, current.created_at, multi_label=True)]


async def test_the_list_excludes_deleted_label_sets(repository):
    await repository.put("pets", [LYNX], "photo")
    await repository.delete("pets")
    assert await repository.list(10) == []


@pytest.mark.parametrize("after", ["\0", "\ud800"])
async def test_the_list_rejects_an_invalid_name_to_continue_after(repository, after):
    with pytest.raises(InvalidFieldError, match=r"^after: ") as caught:
        await repository.list(10, after=after)
    caught.value.message.encode()


async def test_putting_succeeds_if_the_current_version_is_expected(repository):
    await repository.put("pets", [LYNX], "photo")
    second, _ = await repository.put("pets", [LYNX], "photo", if_match={7, 1})
    third, _ = await repository.put("pets", [LYNX], "photo", if_match=ANY)
    assert (second.version, third.version) == (2, 3)


@pytest.mark.parametrize(("expected", "named"), [({1}, "1"), ({9, 3, 1}, "1, 3, 9"), (frozenset(), "none")])
async def test_a_change_with_another_expected_version_is_rejected_with_the_current_one(repository, expected, named):
    await repository.put("pets", [LYNX], "photo")
    await repository.put("pets", [LYNX, PUMA], "photo")
    for call in (
        repository.put("pets", [OCELOT], "photo", if_match=expected),
        repository.add_classes("pets", [OCELOT], if_match=expected),
        repository.remove_class("pets", "lynx", if_match=expected),
        repository.delete("pets", if_match=expected),
    ):
        with pytest.raises(PreconditionFailedError, match=f"'pets' is at version 2, but If-Match names {named};"):
            await call
    current = await repository.get("pets")
    assert (current.version, current.classes) == (2, (LYNX, PUMA))


@pytest.mark.parametrize("expected", [ANY, {1}])
async def test_updating_a_missing_label_set_is_rejected(engine, repository, expected):
    with pytest.raises(PreconditionFailedError, match="there is no label set 'pets'"):
        await repository.put("pets", [LYNX], "photo", if_match=expected)
    assert await number_of(engine, LabelSetRow) == 0


async def test_creating_a_label_set_succeeds_once(repository):
    await repository.put("pets", [LYNX], "photo", if_none_match_any=True)
    with pytest.raises(PreconditionFailedError, match="'pets' exists already, at version 1"):
        await repository.put("pets", [PUMA], "photo", if_none_match_any=True)
    assert (await repository.get("pets")).classes == (LYNX,)


async def test_a_deletion_removes_all_rows_and_version_numbers_continue(engine, repository):
    for _ in range(3):
        await repository.put("pets", [LYNX], "photo")
    await repository.delete("pets", if_match={3})
    assert await number_of(engine, LabelSetVersionRow) == 0
    for version in (None, 3):
        with pytest.raises(UnknownNameError, match="unknown label set 'pets'; known: none"):
            await repository.get("pets", version)

    again, created = await repository.put("pets", [PUMA], "photo", if_none_match_any=True)
    assert created
    assert again.reference == "pets@4"
    with pytest.raises(UnknownNameError, match="'pets@3'; known: 4"):
        await repository.get("pets", 3)


async def test_writes_of_another_process_are_visible_immediately_despite_the_cache(url, opened, repository):
    other = LabelSetRepository(opened(url))
    await repository.put("pets", [ClassEntry("cat")], "photo")
    first = await repository.get("pets")
    assert await repository.get("pets", 1) is first
    await other.put("pets", [ClassEntry("dog")], "photo")
    assert (await repository.get("pets")).classnames == ("dog",)
    assert await repository.get("pets", 1) is first
    await other.delete("pets")
    for version in (None, 1, 2):
        with pytest.raises(UnknownNameError):
            await repository.get("pets", version)
    await other.put("pets", [ClassEntry("owl")], "photo")
    assert (await repository.get("pets")).reference == "pets@3"
    with pytest.raises(UnknownNameError):
        await repository.get("pets", 1)


async def test_deleting_twice_is_an_unknown_label_set(repository):
    await repository.put("pets", [LYNX], "photo")
    await repository.delete("pets")
    with pytest.raises(UnknownNameError):
        await repository.delete("pets")


async def test_added_classes_are_appended_in_a_new_version(repository):
    first, _ = await repository.put("pets", [LYNX], "photo")
    second = await repository.add_classes("pets", [PUMA, OCELOT], if_match={1})
    assert (second.version, second.classes, second.templates) == (2, (LYNX, PUMA, OCELOT), "photo")
    assert await repository.get("pets") == second
    assert await repository.get("pets", 1) == first


async def test_adding_existing_classes_is_rejected_with_their_names(repository):
    await repository.put("pets", [LYNX, PUMA], "photo")
    with pytest.raises(ConflictError, match="'pets' has these classes already: 'puma', 'lynx';"):
        await repository.add_classes("pets", [ClassEntry("Puma"), OCELOT, ClassEntry("lynx")])
    assert (await repository.get("pets")).version == 1


async def test_adding_more_classes_than_the_limit_is_rejected_with_the_setting(repository):
    await repository.put("pets", [LYNX], "photo")
    with pytest.raises(TooLargeError, match=r"would have 3 classes, at most 2 are allowed.*DEIXIS_MAX_CLASSES"):
        await repository.add_classes("pets", [PUMA, OCELOT], max_classes=2)
    assert (await repository.add_classes("pets", [PUMA], max_classes=2)).version == 2


async def test_removing_a_class_changes_the_new_version_only(repository):
    await repository.put("pets", [LYNX, PUMA], "photo")
    second = await repository.remove_class("pets", "lynx", if_match={1})
    assert (second.version, second.classes) == (2, (PUMA,))
    assert (await repository.get("pets", 1)).classes == (LYNX, PUMA)


@pytest.mark.parametrize("classname", ["Lynx", "cat", "\0", "\ud800"])
async def test_the_error_for_removing_an_unknown_class_lists_the_classes(repository, classname):
    await repository.put("pets", [LYNX, PUMA], "photo")
    with pytest.raises(UnknownNameError, match=r"unknown class '.*'; known: lynx, puma") as caught:
        await repository.remove_class("pets", classname)
    caught.value.message.encode()


async def test_the_last_class_cannot_be_removed(repository):
    await repository.put("pets", [LYNX], "photo")
    with pytest.raises(ConflictError, match=r"'lynx' is the only class .* add another first, or delete the label set"):
        await repository.remove_class("pets", "lynx")
    assert (await repository.get("pets")).version == 1


async def test_a_large_label_set_is_returned_completely(repository):
    entries = tuple(
        ClassEntry(f"class {n} 動物", tuple(f"description {n}.{m}" for m in range(20))) for n in range(2000)
    )
    await repository.put("large", entries, "photo")
    assert (await repository.get("large")).classes == entries
    assert [summary.class_count for summary in await repository.list(1)] == [2000]


async def test_fifty_concurrent_additions_are_all_kept(repository):
    await repository.put("pets", [LYNX], "photo")
    added = await asyncio.gather(*(repository.add_classes("pets", [ClassEntry(f"class {n}")]) for n in range(50)))
    assert sorted(label_set.version for label_set in added) == list(range(2, 52))
    current = await repository.get("pets")
    assert current.version == 51
    assert set(current.classnames) == {"lynx", *(f"class {n}" for n in range(50))}
    for label_set in added:
        assert await repository.get("pets", label_set.version) == label_set


async def test_concurrent_additions_by_several_engines_are_all_kept(url, engine, opened):
    repositories = [LabelSetRepository(engine), *(LabelSetRepository(opened(url)) for _ in range(3))]
    await repositories[0].put("pets", [LYNX], "photo")
    await asyncio.gather(*(repositories[n % 4].add_classes("pets", [ClassEntry(f"class {n}")]) for n in range(40)))
    assert len((await repositories[0].get("pets")).classes) == 41


async def test_concurrent_first_puts_get_different_versions_and_one_creates(repository):
    done = await asyncio.gather(*(repository.put("pets", [ClassEntry(f"class {n}")], "photo") for n in range(20)))
    assert sorted(label_set.version for label_set, _ in done) == list(range(1, 21))
    assert [label_set.version for label_set, created in done if created] == [1]
    for label_set, _ in done:
        assert await repository.get("pets", label_set.version) == label_set


async def test_one_of_concurrent_creations_succeeds(repository):
    puts = (repository.put("pets", [ClassEntry(f"class {n}")], "photo", if_none_match_any=True) for n in range(20))
    done = await asyncio.gather(*puts, return_exceptions=True)
    assert sum(isinstance(outcome, PreconditionFailedError) for outcome in done) == 19
    assert (await repository.get("pets")).version == 1


async def test_one_of_concurrent_changes_to_a_version_succeeds(repository):
    await repository.put("pets", [LYNX], "photo")
    changes = (repository.add_classes("pets", [ClassEntry(f"class {n}")], if_match={1}) for n in range(20))
    done = await asyncio.gather(*changes, return_exceptions=True)
    assert sum(isinstance(outcome, PreconditionFailedError) for outcome in done) == 19
    assert len((await repository.get("pets")).classes) == 2


async def test_concurrent_deletions_and_puts_never_reuse_a_version_number(repository):
    async def delete():
        try:
            await repository.delete("pets")
        except UnknownNameError:
            return

    await repository.put("pets", [LYNX], "photo")
    calls = [repository.put("pets", [LYNX], "photo") if n % 3 else delete() for n in range(30)]
    done = [outcome for outcome in await asyncio.gather(*calls) if outcome is not None]
    versions = [label_set.version for label_set, _ in done]
    assert sorted(versions) == list(range(2, 2 + len(versions)))


async def test_writers_of_different_label_sets_do_not_conflict(repository):
    await asyncio.gather(*(repository.put(f"set {n}", [LYNX], "photo") for n in range(30)))
    assert [summary.version for summary in await repository.list(100)] == [1] * 30


async def test_cancelled_writers_leave_no_lock_and_no_partial_version(engine, repository):
    await repository.put("pets", [LYNX], "photo")
    outcomes = []  # stored, because the traceback of a cancellation keeps a reference to its statement
    for n in range(60):
        entries = [ClassEntry(f"class {n}.{m}") for m in range(3)]
        tasks = [asyncio.create_task(repository.add_classes("pets", [entry])) for entry in entries]
        await asyncio.sleep(n * 0.0003)  # each round is cancelled at another point
        for task in tasks[1:]:
            task.cancel()
        outcomes += await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {LabelSet, asyncio.CancelledError}
    current = await repository.add_classes("pets", [PUMA])
    assert current.version == len(current.classes)
    assert await number_of(engine, LabelSetVersionRow) == current.version


async def test_stored_label_sets_survive_a_restart(url, engine, repository, opened):
    put, _ = await repository.put("pets", [LYNX], "photo")
    await engine.dispose()
    again = opened(url)
    await migrate(again)
    assert await LabelSetRepository(again).get("pets") == put
