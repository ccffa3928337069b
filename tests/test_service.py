import asyncio
import json
import threading

import numpy as np
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from app.encoders.fake import FakeEncoder
from app.errors import (
    ClientError,
    InvalidFieldError,
    MalformedRequestError,
    NotReadyError,
    PreconditionFailedError,
    StoreError,
    TooLargeError,
    UnknownNameError,
)
from app.main import open_service
from app.service import DEFAULT_METHOD, DEFAULT_TEMPLATES, Question, split_labels
from app.task import ClassEntry, Task
from tests.gated import GatedEncoder

pytestmark = pytest.mark.anyio


@pytest.fixture
async def service(settings, encoder, anyio_backend):
    small = settings.model_copy(update={"max_labels": 5, "max_classes": 6, "max_label_chars": 10})
    async with open_service(small, [encoder, FakeEncoder("second")]) as service:
        yield service


def entries(*names):
    return [ClassEntry(name) for name in names]


async def settled(service):
    """Wait until no label set is being warmed."""
    await service._warmer.idle()


# --- looking up names ----------------------------------------------------------------------------------------------


async def test_what_is_not_said_is_filled_in(service):
    task = await service.plan(Question(labels=["cat", "dog"]))
    assert (task.model, task.method, task.label_set) == ("fake", DEFAULT_METHOD, None)
    assert task.classnames == ("cat", "dog")
    assert task.templates == service.templates.resolve(DEFAULT_TEMPLATES)
    assert task.top_k == 2


@pytest.mark.parametrize(("asked", "told"), [(None, 5), (1, 1), (3, 3), (6, 6), (100, 6)])
async def test_no_more_predictions_are_planned_than_there_are_classes(service, asked, told):
    await service.put_label_set("six", entries(*"abcdef"), "photo")
    assert (await service.plan(Question(label_set="six", top_k=asked))).top_k == told


async def test_labels_are_cleaned_as_the_classes_of_a_label_set_are(service):
    task = await service.plan(Question(labels=["  polar   bear ", "cafe\u0301"]))
    assert task.classnames == ("polar bear", "caf\u00e9")


@pytest.mark.parametrize("templates", ["photo", "a sketch of a {}."])
async def test_a_label_set_brings_its_own_templates_which_a_request_may_replace(service, templates):
    await service.put_label_set("pets", entries("cat", "dog"), templates)
    own = await service.plan(Question(label_set="pets"))
    assert own.templates == service.templates.resolve(templates)
    replaced = await service.plan(Question(label_set="pets", template="the {}."))
    assert replaced.templates == ("the {}.",)
    assert own.label_set == replaced.label_set == "pets@1"


async def test_a_label_set_is_found_by_name_and_by_version(service):
    await service.put_label_set("pets", entries("cat"), "photo")
    await service.put_label_set("pets", entries("dog"), "photo")
    for reference, version, name in [
        ("pets", 2, "dog"),
        ("pets@1", 1, "cat"),
        (" pets ", 2, "dog"),
        ("pets@02", 2, "dog"),
    ]:
        task = await service.plan(Question(label_set=reference))
        assert (task.label_set, task.classnames) == (f"pets@{version}", (name,))


@pytest.mark.parametrize("version", ["", "x", "-1", "1.0", "1@2", "٣", "1" * 10, " 1"])
async def test_what_is_no_version_number_is_told_as_a_field(service, version):
    with pytest.raises(InvalidFieldError, match="write name or name@3"):
        await service.plan(Question(label_set=f"pets@{version}"))


@pytest.mark.parametrize(
    ("question", "kind", "known"),
    [
        (Question(labels=["a"], model="clap"), "model", "fake, second"),
        (Question(labels=["a"], method="zlp"), "method", "zero-shot"),
        (Question(labels=["a"], template="phto"), "template set", "photo"),
        (Question(label_set="pest"), "label set", "pets"),
        (Question(label_set="pets@9"), "label set version", "1"),
        (Question(label_set="pets@0"), "label set version", "1"),
    ],
)
async def test_an_unknown_name_is_told_with_the_known_ones(service, question, kind, known):
    await service.put_label_set("pets", entries("cat"), "photo")
    with pytest.raises(UnknownNameError, match=f"unknown {kind} '.*'; known: .*{known}"):
        await service.plan(question)


async def test_labels_or_a_label_set_must_be_given_and_not_both(service):
    for question in (Question(), Question(labels=["a"], label_set="pets")):
        with pytest.raises(InvalidFieldError) as caught:
            await service.plan(question)
        assert [each.field for each in caught.value.problems] == ["labels"]


async def test_limits_name_the_setting_that_raises_them(service):
    with pytest.raises(TooLargeError, match="DEIXIS_MAX_LABELS"):
        await service.plan(Question(labels=list("abcdef")))
    with pytest.raises(TooLargeError, match="DEIXIS_MAX_CLASSES"):
        await service.put_label_set("pets", entries(*"abcdefg"), "photo")
    await service.put_label_set("pets", entries(*"abcdef"), "photo")
    with pytest.raises(TooLargeError, match="DEIXIS_MAX_CLASSES"):
        await service.add_classes("pets", entries("g"))
    with pytest.raises(InvalidFieldError, match="at most 10"):
        await service.plan(Question(labels=["a long name"]))


# --- label sets ----------------------------------------------------------------------------------------------------


async def test_an_unknown_template_set_is_refused_before_anything_is_written(service):
    for templates, error in [("phto", UnknownNameError), ("{} {x}", InvalidFieldError)]:
        with pytest.raises(error):
            await service.put_label_set("pets", entries("cat"), templates)
    with pytest.raises(UnknownNameError):
        await service.find_label_set("pets")


async def test_a_bad_template_of_a_label_set_is_told_under_its_field(service):
    with pytest.raises(InvalidFieldError) as caught:
        await service.put_label_set("pets", entries("cat"), "{} {x}")
    assert [each.field for each in caught.value.problems] == ["templates"]


async def test_one_of_two_writers_who_read_the_same_version_is_told(service):
    await service.put_label_set("pets", entries("cat"), "photo")
    outcomes = await asyncio.gather(
        service.put_label_set("pets", entries("dog"), "photo", if_match=frozenset({1})),
        service.put_label_set("pets", entries("owl"), "photo", if_match=frozenset({1})),
        return_exceptions=True,
    )
    assert sorted(type(each).__name__ for each in outcomes) == ["PreconditionFailedError", "tuple"]
    assert isinstance(next(each for each in outcomes if not isinstance(each, tuple)), PreconditionFailedError)
    assert (await service.find_label_set("pets")).version == 2


# --- warming -------------------------------------------------------------------------------------------------------


async def test_a_label_set_is_encoded_before_it_is_asked_for(service, encoder):
    await service.put_label_set("pets", entries("cat"), "a {}.")
    await settled(service)
    await service.add_classes("pets", entries("dog"))
    await settled(service)
    assert encoder.encoded_texts == ["a cat.", "a dog."]
    task = await service.plan(Question(label_set="pets"))
    await service.pipeline.classifier(task)
    assert encoder.encoded_texts == ["a cat.", "a dog."]


async def test_after_a_restart_with_another_model_the_latest_version_of_every_label_set_is_encoded(settings):
    async with open_service(settings, [FakeEncoder("before")]) as service:
        for number in range(3):
            await service.put_label_set(f"set {number}", entries(f"old {number}"), "{}")
            await service.put_label_set(f"set {number}", entries(f"new {number}"), "{}")
    encoder = FakeEncoder()
    async with open_service(settings, [encoder]) as service:
        await service.warm_all()
    assert encoder.encoded_texts == ["new 0", "new 1", "new 2"]


async def test_after_a_restart_with_the_same_model_nothing_is_encoded(settings):
    async with open_service(settings, [FakeEncoder()]) as service:
        await service.put_label_set("pets", entries("cat", "dog"), "ensemble")
        await settled(service)
        before = await service.pipeline.classifier(await service.plan(Question(label_set="pets")))
    encoder = FakeEncoder()
    async with open_service(settings, [encoder]) as service:
        await service.warm_all()
        after = await service.pipeline.classifier(await service.plan(Question(label_set="pets")))
    assert encoder.encoded_texts == []
    np.testing.assert_array_equal(after.adapter.text_, before.adapter.text_)


class Broken(FakeEncoder):
    def encode_texts(self, texts):
        if any("poison" in text for text in texts):
            raise RuntimeError("the text tower broke")
        return super().encode_texts(texts)


async def test_a_label_set_that_cannot_be_encoded_keeps_no_other_from_it_and_is_logged(settings):
    """Whatever the encoder raises: an error of the background has no caller to go to."""
    async with open_service(settings, [FakeEncoder("before")]) as service:
        await service.put_label_set("a", entries("poison"), "{}")
        await service.put_label_set("b", entries("cat"), "{}")
    encoder = Broken()
    async with open_service(settings, [encoder]) as service:
        with structlog.testing.capture_logs() as logs:
            await service.warm_all()
    assert encoder.encoded_texts == ["cat"]
    (told,) = [each for each in logs if each["event"] == "label_set_not_warmed"]
    assert (told["label_set"], told["reason"]) == ("a@1", "the text tower broke")


async def test_writing_a_label_set_that_cannot_be_encoded_succeeds_and_is_logged(settings):
    async with open_service(settings, [Broken()]) as service:
        with structlog.testing.capture_logs() as logs:
            _, created = await service.put_label_set("a", entries("poison"), "{}")
            await settled(service)
    assert created
    assert [each["event"] for each in logs] == ["label_set_not_warmed"]


@pytest.fixture
async def gated(anyio_backend):
    encoder = GatedEncoder()
    yield encoder
    encoder.open()


async def embeddings_of(service, *names):
    return await service.pipeline.classifier(Task("fake", "zero-shot", tuple(entries(*names)), ("{}",), 1))


async def test_of_many_writes_one_label_set_at_a_time_is_encoded_in_its_last_version(settings, gated, monkeypatch):
    async with open_service(settings, [gated]) as service:
        get, running, most = service.pipeline.classifier, 0, 0

        async def counted(*arguments):
            nonlocal running, most
            running += 1
            most = max(most, running)
            try:
                return await get(*arguments)
            finally:
                running -= 1

        monkeypatch.setattr(service.pipeline, "classifier", counted)
        gated.texts_open.clear()
        await service.put_label_set("busy", entries("first"), "{}")
        assert await asyncio.to_thread(gated.texts_entered.acquire, timeout=10)
        for version in range(1, 6):
            for name in "abcd":
                await service.put_label_set(name, entries(f"{name}{version}"), "{}")
        gated.open()
        await settled(service)
        assert most == 1
        assert gated.encoded_texts == ["first", "a5", "b5", "c5", "d5"]
        await asyncio.gather(*(embeddings_of(service, f"{name}5") for name in "abcd"))
        assert len(gated.encoded_texts) == 5


async def test_new_words_wait_for_one_label_set_and_not_for_all_that_were_written(settings, gated, monkeypatch):
    async with open_service(settings, [gated]) as service:
        gated.texts_open.clear()
        for number in range(20):
            await service.put_label_set(f"set {number}", entries(f"class {number}"), "{}")
        assert await asyncio.to_thread(gated.texts_entered.acquire, timeout=10)
        texts, submitted = service.pipeline.models["fake"].encode_texts, asyncio.Event()
        run = texts._encode

        async def noted(prompts):
            submitted.set()
            return await run(prompts)

        monkeypatch.setattr(texts, "_encode", noted)
        asked = asyncio.create_task(embeddings_of(service, "new"))
        await submitted.wait()
        gated.open()
        await asked
        await settled(service)
        assert gated.encoded_texts.index("new") == 1
        assert len(gated.encoded_texts) == 21


class StopsAt(FakeEncoder):
    """Waits before it encodes the text ``stop``."""

    def __init__(self, stop):
        super().__init__()
        self.stop = stop
        self.entered, self.may_go_on = threading.Event(), threading.Event()

    def encode_texts(self, texts):
        if self.stop in texts:
            self.entered.set()
            assert self.may_go_on.wait(10)
        return super().encode_texts(texts)


async def test_a_new_version_ends_the_encoding_of_the_one_before_and_keeps_what_is_done(settings):
    encoder = StopsAt("old 300")
    async with open_service(settings, [encoder]) as service:
        try:
            await service.put_label_set("a", entries(*(f"old {number}" for number in range(600))), "{}")
            assert await asyncio.to_thread(encoder.entered.wait, 10)
            await service.put_label_set("a", entries("new"), "{}")
        finally:
            encoder.may_go_on.set()
        await settled(service)
        assert "new" in encoder.encoded_texts
        await embeddings_of(service, "old 0", "old 255")
        for _ in range(10):  # in turns with what would be left of the old version
            await service.pipeline.models["fake"].texts.run(["turn"])
    assert encoder.encoded_texts.count("old 0") == encoder.encoded_texts.count("old 255") == 1
    assert "old 599" not in encoder.encoded_texts


async def test_after_a_label_set_that_cannot_be_encoded_the_next_one_written_is(settings):
    encoder = Broken()
    async with open_service(settings, [encoder]) as service:
        with structlog.testing.capture_logs() as logs:
            for name, classname in [("a", "poison"), ("b", "cat"), ("c", "more poison"), ("d", "dog")]:
                await service.put_label_set(name, entries(classname), "{}")
            await settled(service)
            await service.put_label_set("e", entries("owl"), "{}")
            await settled(service)
    assert encoder.encoded_texts == ["cat", "dog", "owl"]
    assert [each["label_set"] for each in logs if each["event"] == "label_set_not_warmed"] == ["a@1", "c@1"]


async def test_a_database_that_fails_while_warming_ends_the_warming_and_is_logged(service, monkeypatch):
    async def fail(**_):
        raise StoreError("the database is gone")

    monkeypatch.setattr(service.label_sets, "list", fail)
    with structlog.testing.capture_logs() as logs:
        await service.warm_all()
    assert [(each["event"], each["reason"]) for each in logs] == [("warming_stopped", "the database is gone")]


async def test_a_label_set_deleted_while_others_are_warmed_is_passed_over(service, encoder, monkeypatch):
    await service.put_label_set("a", entries("cat"), "{}")
    await service.put_label_set("b", entries("dog"), "{}")
    await settled(service)
    listed = await service.label_sets.list(limit=100)
    await service.label_sets.delete("a")

    async def list_as_before(limit, after=None):
        return listed if after is None else []

    monkeypatch.setattr(service.label_sets, "list", list_as_before)
    await service.warm_all()
    assert "dog" in encoder.encoded_texts


async def test_closing_does_not_wait_for_label_sets_that_are_still_to_be_encoded(settings):
    class Slow(FakeEncoder):
        entered, may_go_on = threading.Event(), threading.Event()

        def encode_texts(self, texts):
            self.entered.set()
            assert self.may_go_on.wait(10)
            return super().encode_texts(texts)

    encoder = Slow()
    async with open_service(settings, [encoder]) as service:
        await service.put_label_set("a", entries("first"), "{}")
        assert await asyncio.to_thread(encoder.entered.wait, 10)
        await service.put_label_set("b", entries("second"), "{}")
        closing = asyncio.create_task(service.close())
        with pytest.raises(NotReadyError):  # which tells that the queue is closed
            await service.pipeline.models["fake"].texts.run(["third"])
        encoder.may_go_on.set()
        await closing
    assert encoder.encoded_texts == ["first"]


# --- labels in one string ------------------------------------------------------------------------------------------


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_a_json_array_of_strings_is_read_as_it_is(labels):
    assert split_labels(json.dumps(labels)) == labels
    assert split_labels(" \n" + json.dumps(labels, ensure_ascii=False)) == labels


@given(st.lists(st.text(st.characters(exclude_characters=",["), min_size=1), min_size=1))
def test_anything_else_is_split_at_its_commas(labels):
    assert split_labels(",".join(labels)) == labels


@pytest.mark.parametrize("start", ["", "[", '["a"'])
def test_more_commas_than_any_list_of_labels_has_are_refused_before_anything_is_split(monkeypatch, start):
    monkeypatch.setattr(json, "loads", lambda _: pytest.fail("it was parsed"))
    with pytest.raises(TooLargeError, match="100,000"):
        split_labels(start + "," * 100_001)


@given(st.text(st.one_of(st.sampled_from('[]{}",\\ \0'), st.characters())))
def test_no_text_raises_anything_but_the_callers_error(text):
    try:
        labels = split_labels(text)
    except ClientError:
        return
    assert all(isinstance(label, str) for label in labels)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[", MalformedRequestError),
        ('["a"', MalformedRequestError),
        ('["a"] b', MalformedRequestError),
        ("[" * 100_000, MalformedRequestError),
        ("[" * 100_000 + "]" * 100_000, MalformedRequestError),
        ("[" + "1" * 5000 + "]", MalformedRequestError),
        ("[1]", InvalidFieldError),
        ("[NaN]", InvalidFieldError),
        ('["a", null]', InvalidFieldError),
        ('["a", ["b"]]', InvalidFieldError),
    ],
    ids=lambda each: each[:12] if isinstance(each, str) else each.__name__,
)
def test_what_begins_as_an_array_and_is_none_of_strings_is_refused(text, error):
    with pytest.raises(error):
        split_labels(text)
