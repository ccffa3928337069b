"""Answers and their drafts are stored together, and a draft is decided only once."""

import asyncio

import pytest

from app.errors import ConflictError, PreconditionFailedError, TooLargeError, UnknownNameError
from app.store.drafts import Answer, DraftKind, DraftRepository
from app.types import ClassEntry, DraftStatus


@pytest.fixture
def drafts(engine):
    return DraftRepository(engine)


@pytest.fixture
async def _pets(repository):
    await repository.put(
        "pets", [ClassEntry("cat", ("A cat purrs.",), features=("whiskers",)), ClassEntry("dog")], "{}"
    )


pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("_pets")]


def answer(digest="1", **changes):
    fields = {"question": f"Question {digest}?", "model": "m-1", "texts": ("raw",), "prompt_tokens": 3}
    return Answer(digest, **{**fields, "completion_tokens": 4, **changes})


async def add(drafts, *texts, digest="1", classname="cat", kind=DraftKind.DESCRIPTION, name="pets"):
    return await drafts.add(name, answer(digest), classname, kind, texts, str.casefold)


async def texts_of(drafts, **chosen):
    return [item.text for item in await drafts.list("pets", limit=100, **chosen)]


async def test_a_draft_has_a_class_a_question_a_model_and_a_time(drafts):
    assert await add(drafts, "A cat has fur.") == 1
    (draft,) = await drafts.list("pets", limit=10)
    assert (draft.classname, draft.kind, draft.text) == ("cat", DraftKind.DESCRIPTION, "A cat has fur.")
    assert (draft.question, draft.model) == ("Question 1?", "m-1")
    assert draft.status is DraftStatus.DRAFT
    assert draft.asked_at.tzinfo is not None
    assert draft.decided_at is None


async def test_an_answer_is_stored_once_even_without_drafts(drafts):
    assert await add(drafts, digest="1") == 0
    assert await drafts.answered("pets") == {"1"}
    assert await add(drafts, "Late.", digest="1") == 0
    assert await texts_of(drafts) == []


async def test_concurrent_answers_are_stored_once_each(drafts):
    await asyncio.gather(*(add(drafts, f"Text {number % 4}.", digest=str(number % 4)) for number in range(12)))
    assert await drafts.answered("pets") == {"0", "1", "2", "3"}
    assert sorted(await texts_of(drafts)) == [f"Text {number}." for number in range(4)]


async def test_a_text_is_drafted_once_per_class_and_kind_unless_the_class_has_it(drafts):
    assert await add(drafts, "One.", "ONE.", "A CAT PURRS.", "whiskers") == 2
    assert await add(drafts, "one.", "Two.", digest="2") == 1
    assert await add(drafts, "whiskers", "One.", digest="3", kind=DraftKind.FEATURE) == 1
    assert await add(drafts, "One.", digest="4", classname="dog") == 1
    assert await texts_of(drafts) == ["One.", "whiskers", "Two.", "One.", "One."]


async def test_a_rejected_text_is_not_drafted_again(drafts):
    await add(drafts, "One.")
    assert await drafts.reject("pets", None) == 1
    assert await add(drafts, "one.", digest="2") == 0


async def test_drafts_are_listed_by_page_class_and_status(drafts):
    await add(drafts, "One.", "Two.", "Three.")
    await add(drafts, "Four.", digest="2", classname="dog")
    (first, second) = await drafts.list("pets", limit=2)
    assert await texts_of(drafts, after=second.id) == ["Three.", "Four."]
    assert await texts_of(drafts, classname="dog") == ["Four."]
    await drafts.reject("pets", [first.id])
    assert await texts_of(drafts, status=DraftStatus.REJECTED) == ["One."]
    assert await texts_of(drafts, status=DraftStatus.DRAFT, classname="cat") == ["Two.", "Three."]
    assert await drafts.count("pets", DraftStatus.DRAFT) == 3


async def test_accepting_appends_the_texts_in_one_new_version(drafts, repository):
    await add(drafts, "One.", "Two.")
    await add(drafts, "fur", digest="2", kind=DraftKind.FEATURE)
    await add(drafts, "It barks.", digest="3", classname="dog")
    label_set, accepted = await drafts.accept("pets", None, max_texts=200)
    assert (label_set.version, accepted) == (2, 4)
    assert await repository.get("pets") == label_set
    cat, dog = label_set.classes
    assert cat.descriptions == ("A cat purrs.", "One.", "Two.")
    assert cat.features == ("whiskers", "fur")
    assert dog.descriptions == ("It barks.",)
    assert {item.status for item in await drafts.list("pets", limit=10)} == {DraftStatus.ACCEPTED}
    assert all(item.decided_at for item in await drafts.list("pets", limit=10))
    assert (await repository.get("pets", 1)).classes[1].descriptions == ()


async def test_individual_drafts_can_be_accepted(drafts):
    await add(drafts, "One.", "Two.")
    _, second = await drafts.list("pets", limit=10)
    label_set, accepted = await drafts.accept("pets", [second.id], max_texts=200)
    assert (accepted, label_set.classes[0].descriptions) == (1, ("A cat purrs.", "Two."))
    assert await texts_of(drafts, status=DraftStatus.DRAFT) == ["One."]


async def test_accepting_nothing_creates_no_version(drafts, repository):
    with pytest.raises(ConflictError, match="no draft to accept"):
        await drafts.accept("pets", None, max_texts=200)
    assert (await repository.get("pets")).version == 1


async def test_drafts_of_a_removed_class_stay_and_create_no_version(drafts, repository):
    await add(drafts, "It barks.", classname="dog")
    await repository.remove_class("pets", "dog")
    with pytest.raises(ConflictError):
        await drafts.accept("pets", None, max_texts=200)
    assert await texts_of(drafts, status=DraftStatus.DRAFT) == ["It barks."]


async def test_accepting_too_many_texts_is_rejected_completely(drafts, repository):
    await add(drafts, "One.", "Two.")
    with pytest.raises(TooLargeError, match="'cat' would have 3 descriptions, at most 2"):
        await drafts.accept("pets", None, max_texts=2)
    assert (await repository.get("pets")).version == 1
    assert await drafts.count("pets", DraftStatus.DRAFT) == 2


async def test_drafts_are_accepted_only_into_the_expected_version(drafts):
    await add(drafts, "One.")
    with pytest.raises(PreconditionFailedError):
        await drafts.accept("pets", None, max_texts=200, if_match={7})
    assert await drafts.count("pets", DraftStatus.DRAFT) == 1


async def test_ids_of_other_label_sets_and_of_decided_drafts_are_unknown(drafts, repository):
    await repository.put("cars", [ClassEntry("van")], "{}")
    await add(drafts, "It has doors.", name="cars", classname="van")
    await add(drafts, "One.")
    (foreign,) = await drafts.list("cars", limit=1)
    (mine,) = await drafts.list("pets", limit=1)
    for decide in (drafts.reject, lambda name, ids: drafts.accept(name, ids, max_texts=200)):
        with pytest.raises(UnknownNameError, match=f"unknown draft '{foreign.id}'"):
            await decide("pets", [mine.id, foreign.id])
    await drafts.reject("pets", [mine.id])
    with pytest.raises(UnknownNameError, match=f"unknown draft '{mine.id}'"):
        await drafts.reject("pets", [mine.id])


@pytest.mark.parametrize("name", ["cars", "\ud800", "\x00"])
async def test_an_unknown_label_set_is_an_error(drafts, name):
    for call in (
        drafts.list(name, limit=1),
        drafts.accept(name, None, max_texts=200),
        drafts.reject(name, None),
        add(drafts, "One.", name=name),
    ):
        with pytest.raises(UnknownNameError, match="label set"):
            await call


async def test_deleting_a_label_set_deletes_its_answers_and_drafts(drafts, repository):
    await add(drafts, "One.")
    await repository.delete("pets")
    assert await drafts.answered("pets") == frozenset()
    await repository.put("pets", [ClassEntry("cat")], "{}")
    assert await texts_of(drafts) == []
