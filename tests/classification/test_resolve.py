import asyncio
import json
import shutil
import threading
from contextlib import AsyncExitStack
from itertools import pairwise

import numpy as np
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from app.classification.methods import AUTO, DEFAULT_METHOD, METHODS
from app.classification.resolve import ClassifyRequest
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
from app.label_sets.service import DEFAULT_TEMPLATES
from app.main import open_service
from app.names.labels import split_labels
from app.selection.selection_reader import SELECT_METHOD
from app.settings import Settings
from app.store.jobs import JobRepository
from app.types import ClassEntry, MergeSynonyms, Task
from tests.conftest import picture
from tests.gated import GatedEncoder
from tests.shades import COLOURS, THINGS, keep, shade, shades, stock

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
    await service.prewarmer.idle()


# --- looking up names ----------------------------------------------------------------------------------------------


async def test_what_is_not_said_is_filled_in(service):
    task = await service.resolver.resolve(ClassifyRequest(labels=["cat", "dog"]))
    assert (task.model, task.method, task.label_set_reference) == ("fake", DEFAULT_METHOD, None)
    assert task.classnames == ("cat", "dog")
    assert task.templates == service.templates.resolve(DEFAULT_TEMPLATES)
    assert task.top_k == 2


@pytest.mark.parametrize(("asked", "told"), [(None, 5), (1, 1), (3, 3), (6, 6), (100, 6)])
async def test_no_more_predictions_are_planned_than_there_are_classes(service, asked, told):
    await service.label_sets.put("six", entries(*"abcdef"), "photo")
    assert (await service.resolver.resolve(ClassifyRequest(label_set="six", top_k=asked))).top_k == told


async def test_labels_are_cleaned_as_the_classes_of_a_label_set_are(service):
    task = await service.resolver.resolve(ClassifyRequest(labels=["  polar   bear ", "cafe\u0301"]))
    assert task.classnames == ("polar bear", "caf\u00e9")


@pytest.mark.parametrize("templates", ["photo", "a sketch of a {}."])
async def test_a_label_set_brings_its_own_templates_which_a_request_may_replace(service, templates):
    await service.label_sets.put("pets", entries("cat", "dog"), templates)
    own = await service.resolver.resolve(ClassifyRequest(label_set="pets"))
    assert own.templates == service.templates.resolve(templates)
    replaced = await service.resolver.resolve(ClassifyRequest(label_set="pets", template="the {}."))
    assert replaced.templates == ("the {}.",)
    assert own.label_set_reference == replaced.label_set_reference == "pets@1"


async def test_a_label_set_is_found_by_name_and_by_version(service):
    await service.label_sets.put("pets", entries("cat"), "photo")
    await service.label_sets.put("pets", entries("dog"), "photo")
    for reference, version, name in [
        ("pets", 2, "dog"),
        ("pets@1", 1, "cat"),
        (" pets ", 2, "dog"),
        ("pets@02", 2, "dog"),
    ]:
        task = await service.resolver.resolve(ClassifyRequest(label_set=reference))
        assert (task.label_set_reference, task.classnames) == (f"pets@{version}", (name,))


@pytest.mark.parametrize("version", ["", "x", "-1", "1.0", "1@2", "٣", "1" * 10, " 1"])
async def test_what_is_no_version_number_is_told_as_a_field(service, version):
    with pytest.raises(InvalidFieldError, match="write name or name@3"):
        await service.resolver.resolve(ClassifyRequest(label_set=f"pets@{version}"))


@pytest.mark.parametrize(
    ("question", "kind", "known"),
    [
        (ClassifyRequest(labels=["a"], model="clap"), "model", "fake, second"),
        (ClassifyRequest(labels=["a"], method="zlp"), "method", "zero-shot"),
        (ClassifyRequest(labels=["a"], template="phto"), "template set", "photo"),
        (ClassifyRequest(label_set="pest"), "label set", "pets"),
        (ClassifyRequest(label_set="pets@9"), "label set version", "1"),
        (ClassifyRequest(label_set="pets@0"), "label set version", "1"),
    ],
)
async def test_an_unknown_name_is_told_with_the_known_ones(service, question, kind, known):
    await service.label_sets.put("pets", entries("cat"), "photo")
    with pytest.raises(UnknownNameError, match=f"unknown {kind} '.*'; known: .*{known}"):
        await service.resolver.resolve(question)


async def test_labels_or_a_label_set_must_be_given_where_the_method_needs_some_and_never_both(service):
    for question in (ClassifyRequest(method="zero-shot"), ClassifyRequest(labels=["a"], label_set="pets")):
        with pytest.raises(InvalidFieldError) as caught:
            await service.resolver.resolve(question)
        assert [each.field for each in caught.value.problems] == ["labels"]


async def test_limits_name_the_setting_that_raises_them(service):
    with pytest.raises(TooLargeError, match="DEIXIS_MAX_LABELS"):
        await service.resolver.resolve(ClassifyRequest(labels=list("abcdef")))
    with pytest.raises(TooLargeError, match="DEIXIS_MAX_CLASSES"):
        await service.label_sets.put("pets", entries(*"abcdefg"), "photo")
    await service.label_sets.put("pets", entries(*"abcdef"), "photo")
    with pytest.raises(TooLargeError, match="DEIXIS_MAX_CLASSES"):
        await service.label_sets.add_classes("pets", entries("g"))
    with pytest.raises(InvalidFieldError, match="at most 10"):
        await service.resolver.resolve(ClassifyRequest(labels=["a long name"]))


# --- label sets ----------------------------------------------------------------------------------------------------


async def test_an_unknown_template_set_is_refused_before_anything_is_written(service):
    for templates, error in [("phto", UnknownNameError), ("{} {x}", InvalidFieldError)]:
        with pytest.raises(error):
            await service.label_sets.put("pets", entries("cat"), templates)
    with pytest.raises(UnknownNameError):
        await service.label_sets.find("pets")


async def test_a_bad_template_of_a_label_set_is_told_under_its_field(service):
    with pytest.raises(InvalidFieldError) as caught:
        await service.label_sets.put("pets", entries("cat"), "{} {x}")
    assert [each.field for each in caught.value.problems] == ["templates"]


async def test_one_of_two_writers_who_read_the_same_version_is_told(service):
    await service.label_sets.put("pets", entries("cat"), "photo")
    outcomes = await asyncio.gather(
        service.label_sets.put("pets", entries("dog"), "photo", if_match=frozenset({1})),
        service.label_sets.put("pets", entries("owl"), "photo", if_match=frozenset({1})),
        return_exceptions=True,
    )
    assert sorted(type(each).__name__ for each in outcomes) == ["PreconditionFailedError", "tuple"]
    assert isinstance(next(each for each in outcomes if not isinstance(each, tuple)), PreconditionFailedError)
    assert (await service.label_sets.find("pets")).version == 2


# --- example images ------------------------------------------------------------------------------------------------

ASKED = shades(6, 900)
"""Two pictures of each colour that are no examples."""

LEARN_FROM_LABELS = [name for name, method in METHODS.items() if "labelled images" in method.learns]
LEARN_FROM_POOL = [name for name, method in METHODS.items() if "unlabelled images" in method.learns]
INDUCTIVE = [name for name, method in METHODS.items() if not method.transductive]


@pytest.fixture(scope="module")
def databases(tmp_path_factory, empty_database):
    """Those of a service with examples before and after the methods were tried on them, to be copied as that is."""
    folder = tmp_path_factory.mktemp("examples")
    file, taught, calibrated = folder / "deixis.sqlite3", folder / "taught", folder / "calibrated"
    shutil.copy(empty_database, file)
    settings = Settings(data_dir=folder, models=("embedded",), database_url=f"sqlite:///{file}")

    async def make():
        async with open_service(settings, [FakeEncoder()]) as service:
            await stock(service, "things", pool=4)
            await stock(service, "colours", COLOURS, pool=8)
        shutil.copy(file, taught)
        async with open_service(settings, [FakeEncoder()]) as service:
            for name in ("things", "colours"):
                await service.method_selector.select_for_every_model(name)
        shutil.copy(file, calibrated)

    asyncio.run(make())
    return {"taught": taught, "calibrated": calibrated}


@pytest.fixture
async def taught(settings, encoder, databases, anyio_backend):
    """A service with label sets that have examples: things, with names that say nothing, and colours."""
    shutil.copy(databases["taught"], settings.data_dir / "deixis.sqlite3")
    async with open_service(settings, [encoder]) as service:
        yield service


@pytest.fixture
async def calibrated(settings, encoder, databases, anyio_backend):
    """The same, the methods having been tried on the examples."""
    shutil.copy(databases["calibrated"], settings.data_dir / "deixis.sqlite3")
    async with open_service(settings, [encoder]) as service:
        yield service


async def told(service, images=ASKED, **asked):
    return await service.pipeline.classify(images, await service.resolver.resolve(ClassifyRequest(**asked)))


def labels_of(classification):
    return [each.predictions[0].label for each in classification.results]


def scores_of(classification):
    """Return every image's scores by label."""
    return [{each.label: each.score for each in result.predictions} for result in classification.results]


def assert_same(one, other, tolerance=1e-4):
    for first, second in zip(one.results, other.results, strict=True):
        assert first.predictions[0].label == second.predictions[0].label
    for first, second in zip(scores_of(one), scores_of(other), strict=True):
        assert first == pytest.approx(second, abs=tolerance)


async def test_without_examples_zero_shot_answers_and_there_is_nothing_to_say_of_that(service):
    await service.label_sets.put("pets", entries("cat", "dog"), "photo")
    for question in (ClassifyRequest(labels=["cat"]), ClassifyRequest(label_set="pets")):
        task = await service.resolver.resolve(question)
        assert (task.method, task.reason) == (DEFAULT_METHOD, None)
    for asked in ({"labels": ["cat"]}, {"label_set": "pets"}):
        task = await service.resolver.resolve(ClassifyRequest(**asked, method=AUTO))
        assert task.method == DEFAULT_METHOD
        assert "there are none" in task.reason


async def test_until_methods_were_tried_zero_shot_answers_and_they_are_asked_to_be_tried_once(taught):
    await settled(taught)
    taught.selection_reader._jobs = repository = JobRepository(taught.engine)
    for method in (None, AUTO, None):
        task = await taught.resolver.resolve(ClassifyRequest(label_set="things", method=method))
        assert task.method == DEFAULT_METHOD
        assert "have not been compared" in task.reason
    await asyncio.gather(*taught.selection_reader._requests)
    assert [(job.kind, job.subject) for job in await repository.list(9)] == [(SELECT_METHOD, "things")]


async def test_after_a_trial_what_is_better_beyond_chance_answers_and_it_is_told_why(calibrated):
    for method in (None, AUTO):
        task = await calibrated.resolver.resolve(ClassifyRequest(label_set="things", method=method))
        assert task.method in LEARN_FROM_LABELS
        assert task.method in task.reason
        assert "that of zero-shot 33.3 %" in task.reason
    classification = await told(calibrated, label_set="things")
    assert labels_of(classification) == list(THINGS) * 2
    assert labels_of(await told(calibrated, label_set="things", method="zero-shot")) == ["tomato"] * 6
    task = await calibrated.resolver.resolve(ClassifyRequest(label_set="colours"))
    assert task.method == DEFAULT_METHOD
    assert "not a significant gain" in task.reason


@pytest.mark.parametrize("change", ["examples", "classes"])
async def test_a_choice_from_before_a_change_is_kept_and_it_is_said_that_there_was_one(calibrated, change):
    before = await calibrated.resolver.resolve(ClassifyRequest(label_set="things"))
    assert "changed since" not in before.reason
    if change == "examples":
        await keep(calibrated, "things", [shade(0, 99)], ["tomato"])
    else:
        await calibrated.label_sets.add_classes("things", entries("snow"))
    after = await calibrated.resolver.resolve(ClassifyRequest(label_set="things"))
    assert after.method == before.method
    assert after.reason == f"{before.reason}; the examples or classes have changed since"
    await calibrated.method_selector.select_for_every_model("things")
    assert "changed since" not in (await calibrated.resolver.resolve(ClassifyRequest(label_set="things"))).reason


async def test_a_method_that_is_named_is_taken_without_a_reason(calibrated):
    for method in METHODS:
        task = await calibrated.resolver.resolve(ClassifyRequest(label_set="things", method=method))
        assert (task.method, task.reason) == (method, None)


async def test_options_without_a_method_are_refused_where_the_evidence_chooses_it(calibrated):
    for asked in ({"label_set": "things"}, {"label_set": "things", "method": AUTO}, {"labels": ["a"], "method": AUTO}):
        with pytest.raises(InvalidFieldError, match="name the method in the field method") as caught:
            await calibrated.resolver.resolve(ClassifyRequest(**asked, options={"alpha": 1.0}))
        assert [each.field for each in caught.value.problems] == ["options"]
    task = await calibrated.resolver.resolve(ClassifyRequest(label_set="things", method="gda", options={"alpha": 2.0}))
    assert task.options == (("alpha", 2.0),)


@pytest.mark.parametrize("method", [*LEARN_FROM_LABELS, "tda"])
async def test_methods_that_need_a_label_set_refuse_inline_labels_and_say_what_to_do(service, method):
    with pytest.raises(InvalidFieldError, match="give label_set, or name another method") as caught:
        await service.resolver.resolve(ClassifyRequest(labels=["a", "b"], method=method))
    assert [each.field for each in caught.value.problems] == ["method"]


# Which images an answer rests on


@pytest.mark.parametrize("method", LEARN_FROM_POOL)
async def test_inline_labels_and_several_images_are_looked_at_together_and_it_is_said(service, method):
    classification = await told(service, labels=list(COLOURS), method=method)
    assert classification.transductive
    assert classification.examples is None
    assert any("classified together" in each for each in classification.warnings)
    assert labels_of(classification) == list(COLOURS) * 2


async def test_a_single_image_teaches_nothing_and_it_is_said_that_zero_shot_answers(service):
    alone = await told(service, ASKED[:1], labels=list(COLOURS), method="zlap")
    zero_shot = await told(service, ASKED[:1], labels=list(COLOURS))
    assert_same(alone, zero_shot)
    assert any("zero-shot" in each for each in alone.warnings)


async def test_a_pool_that_is_stored_is_learned_from_and_counted(taught):
    for method in LEARN_FROM_POOL:
        classification = await told(taught, label_set="colours", method=method)
        assert not classification.transductive
        assert classification.examples.unlabelled == 24
        assert classification.examples.revision == (await taught.label_sets.find("colours")).examples_revision
        assert not any("together" in each for each in classification.warnings)


async def test_an_option_looks_at_the_images_of_the_request_in_place_of_the_stored_ones(taught):
    for method in LEARN_FROM_POOL:
        together = await told(taught, label_set="colours", method=method, options={"transductive": 1.0})
        inline = await told(taught, labels=list(COLOURS), template="{}", method=method)
        assert together.transductive
        assert together.examples is None
        assert scores_of(together) == scores_of(inline)
        apart = await told(taught, label_set="colours", method=method, options={"transductive": 0.0})
        assert not apart.transductive


@pytest.mark.parametrize("classes", [THINGS, COLOURS], ids=["things", "colours"])
async def test_without_a_stored_pool_the_images_of_the_request_are_looked_at(settings, classes):
    async with open_service(settings, [FakeEncoder()]) as service:
        await stock(service, "some", classes, labelled=2)
        classification = await told(service, label_set="some", method="zlap")
        assert classification.transductive
        assert scores_of(classification) == scores_of(
            await told(service, labels=list(classes), template="{}", method="zlap")
        )


async def test_examples_are_counted_as_far_as_a_method_learns_from_them(taught):
    for method in LEARN_FROM_LABELS:
        examples = (await told(taught, label_set="things", method=method)).examples
        assert (examples.labelled, examples.unlabelled) == (24, 0)
    for method in LEARN_FROM_POOL:
        examples = (await told(taught, label_set="things", method=method)).examples
        assert (examples.labelled, examples.unlabelled) == (0, 12)
    for method in set(METHODS) - {*LEARN_FROM_LABELS, *LEARN_FROM_POOL}:
        assert (await told(taught, label_set="things", method=method)).examples is None


@pytest.mark.parametrize("name", ["things", "colours"])
async def test_an_image_is_answered_the_same_alone_as_among_others_by_every_inductive_method(taught, name):
    for method in INDUCTIVE:
        together = await told(taught, label_set=name, method=method)
        for number, image in enumerate(ASKED):
            alone = await told(taught, [image], label_set=name, method=method)
            assert alone.results[0].predictions[0].label == together.results[number].predictions[0].label
            assert scores_of(alone)[0] == pytest.approx(scores_of(together)[number], abs=1e-4)


async def test_what_others_ask_changes_no_answer_but_those_of_the_method_that_remembers(taught):
    """Of the colours between two, which it is in doubt about and remembers."""
    doubtful = [picture(colour) for colour in ((200, 180, 20), (20, 190, 200), (190, 20, 170))]
    asked = {"label_set": "colours", "template": "{}"}
    before = {method: await told(taught, doubtful[:1], **asked, method=method) for method in METHODS}
    for method in METHODS:
        await told(taught, [*doubtful[1:], *ASKED], **asked, method=method)
    after = {method: await told(taught, doubtful[:1], **asked, method=method) for method in METHODS}
    for method in METHODS:
        changed = scores_of(after[method]) != scores_of(before[method])
        assert changed == (method == "tda"), method


async def test_requests_at_once_get_what_each_would_get_alone(taught):
    for method in INDUCTIVE:
        alone = [await told(taught, [image], label_set="colours", method=method) for image in ASKED]
        at_once = await asyncio.gather(*(told(taught, [image], label_set="colours", method=method) for image in ASKED))
        for one, other in zip(alone, at_once, strict=True):
            assert_same(one, other)


async def test_images_that_were_looked_at_together_change_nothing_for_the_next_request(taught):
    first = await told(taught, labels=list(COLOURS), method="zlap")
    await told(taught, [shade(0, number) for number in range(8)], labels=list(COLOURS), method="zlap")
    assert scores_of(await told(taught, labels=list(COLOURS), method="zlap")) == scores_of(first)


# Changes of the classes


async def test_a_class_that_is_added_without_images_can_be_told_by_its_name(taught):
    await taught.label_sets.put("things", entries(*THINGS, "green"), "{}")
    classification = await told(taught, [shade(0, 900), shade(2, 900)], label_set="things", method="gda")
    assert labels_of(classification) == ["tomato", "sky"]
    assert classification.task.label_set_reference == "things@2"
    assert classification.examples.labelled == 24
    assert any("1 classes have no labelled image" in each for each in classification.warnings)
    assert set(scores_of(classification)[0]) == {*THINGS, "green"}


async def test_the_images_of_a_class_that_is_removed_teach_nothing(taught):
    await taught.label_sets.remove_class("things", "leaf")
    await taught.label_sets.put("never", entries("tomato", "sky"), "{}")
    numbers = [number for number in range(24) if number % 3 != 1]
    await keep(
        taught, "never", [shade(number % 3, number) for number in numbers], [THINGS[number % 3] for number in numbers]
    )
    for method in LEARN_FROM_LABELS:
        removed = await told(taught, label_set="things", method=method)
        assert removed.examples.labelled == 16
        assert_same(removed, await told(taught, label_set="never", method=method))
    await taught.label_sets.add_classes("things", entries("leaf"))
    assert (await told(taught, label_set="things", method="gda")).examples.labelled == 24


async def test_an_older_version_is_answered_with_the_images_of_its_own_classes(taught):
    await taught.label_sets.remove_class("things", "leaf")
    assert labels_of(await told(taught, label_set="things@1", method="gda")) == list(THINGS) * 2
    assert set(labels_of(await told(taught, label_set="things@2", method="gda"))) == {"tomato", "sky"}


async def test_images_that_are_added_are_learned_from_in_the_background(taught):
    await told(taught, label_set="things", method="gda")
    revision = (await keep(taught, "things", [shade(0, 99)], ["tomato"])).revision
    await told(taught, label_set="things", method="gda")
    await taught.fits.idle()
    after = await told(taught, label_set="things", method="gda")
    assert (after.examples.labelled, after.examples.revision) == (25, revision)


@pytest.mark.parametrize("merge", list(MergeSynonyms))
async def test_the_prompts_of_an_explanation_add_up_to_the_similarity_of_a_method_that_learned(taught, merge):
    """Also where a class has several names."""
    classes = [ClassEntry("tomato", synonyms=("red fruit",)), ClassEntry("leaf", synonyms=("green", "foliage"))]
    await taught.label_sets.put("synonyms", classes, "{}", merge_synonyms=merge)
    await keep(taught, "synonyms", shades(4), ["tomato", "leaf", "tomato", "leaf"])
    for method in ("zero-shot", "gda"):
        for result in (await told(taught, label_set="synonyms", method=method, explain=True)).results:
            for each in result.explanation:
                total = sum(prompt.weight * prompt.cosine for prompt in (*each.supporting, *each.opposing))
                assert total == pytest.approx(each.similarity, abs=1e-5), method


# Scores


async def test_a_sigmoid_encoders_scores_are_shares_where_examples_say_that_an_image_is_of_one_class(settings):
    """Which is so where a method learned, and where labelled images calibrated it; else each score is by itself."""
    async with open_service(settings, [FakeEncoder(logit_bias=-3.0)]) as service:
        await stock(service, "colours", COLOURS, pool=8)
        for trial in (False, True):
            if trial:
                await service.method_selector.select_for_every_model("colours")
            for method in (*LEARN_FROM_LABELS, *LEARN_FROM_POOL, "tda"):
                for scores in scores_of(await told(service, label_set="colours", method=method)):
                    assert sum(scores.values()) == pytest.approx(1, abs=1e-5)
            by_themselves = [{"labels": list(COLOURS)}, {"label_set": "colours", "template": "the {}."}]
            shares = []
            (shares if trial else by_themselves).append({"label_set": "colours", "method": "zero-shot"})
            for asked in by_themselves:
                for result in (await told(service, **{"method": "zero-shot", **asked})).results:
                    for each in result.predictions:
                        assert each.score == pytest.approx(1 / (1 + np.exp(3 - 10 * each.similarity)), abs=1e-5)
            for asked in shares:
                for scores in scores_of(await told(service, **asked)):
                    assert sum(scores.values()) == pytest.approx(1, abs=1e-5)


async def test_scores_are_divided_by_the_temperature_that_held_out_images_were_told_best_with(calibrated):
    named = await told(calibrated, label_set="things", method="gda")
    with_options = await told(calibrated, label_set="things", method="gda", options={"alpha": 0.0})
    scoring = named.task.scoring
    assert scoring.calibrated_on == 24
    assert with_options.task.scoring.temperature == 1
    for raw, scaled in zip(scores_of(with_options), scores_of(named), strict=True):
        logits = {label: np.log(score) / scoring.temperature for label, score in raw.items()}
        total = sum(np.exp(each) for each in logits.values())
        assert scaled == pytest.approx({label: np.exp(each) / total for label, each in logits.items()}, abs=1e-4)


async def test_without_examples_scores_can_be_bounded_and_nothing_that_examples_would_tell(service):
    await service.label_sets.put("pets", entries("cat", "dog"), "photo")
    for asked in ({"labels": ["cat", "dog"]}, {"label_set": "pets"}):
        for field, value in (("false_rejection_rate", 0.1), ("coverage", 0.9)):
            with pytest.raises(
                InvalidFieldError, match="use the newest version of a label set that has some"
            ) as caught:
                await service.resolver.resolve(ClassifyRequest(**asked, **{field: value}))
            assert [each.field for each in caught.value.problems] == [field]
        scoring = (await service.resolver.resolve(ClassifyRequest(**asked, reject_below=0.5))).scoring
        assert (scoring.reject_below, scoring.temperature, scoring.calibrated_on) == (0.5, 1, 0)


async def test_a_threshold_and_a_rate_together_are_refused(calibrated):
    for asked in ({"labels": ["a"]}, {"label_set": "things"}):
        with pytest.raises(InvalidFieldError, match="not both"):
            await calibrated.resolver.resolve(ClassifyRequest(**asked, reject_below=0.5, false_rejection_rate=0.1))


@pytest.mark.parametrize(
    "more",
    [{"method": "gda", "options": {"alpha": 1.0}}, {"template": "the {} here."}, {"method": "tda"}],
    ids=["options", "template", "untried method"],
)
async def test_what_was_measured_otherwise_promises_nothing(calibrated, more):
    """Scores with other options or other templates are others than those that were calibrated."""
    for promise in ({"coverage": 0.9}, {"false_rejection_rate": 0.1}):
        with pytest.raises(InvalidFieldError, match="on which this method was compared"):
            await calibrated.resolver.resolve(ClassifyRequest(label_set="things", **more, **promise))
    assert (await calibrated.resolver.resolve(ClassifyRequest(label_set="things", **more))).scoring.calibrated_on == 0


async def test_what_was_measured_with_other_classes_promises_nothing(calibrated):
    await calibrated.label_sets.add_classes("things", entries("snow"))
    with pytest.raises(InvalidFieldError, match="wait until the job"):
        await calibrated.resolver.resolve(ClassifyRequest(label_set="things", coverage=0.9))
    assert (
        await calibrated.resolver.resolve(ClassifyRequest(label_set="things@1", coverage=0.9))
    ).scoring.calibrated_on == 24


@pytest.mark.parametrize("method", [None, "zero-shot", "gda", "zlap", "stata"])
@pytest.mark.parametrize("name", ["things", "colours"])
async def test_sets_hold_the_best_label_and_grow_with_the_coverage(calibrated, name, method):
    held = []
    for coverage in (0.5, 0.9, 0.95, 1.0):
        classification = await told(calibrated, label_set=name, method=method, coverage=coverage)
        sets = [each.prediction_set for each in classification.results]
        for result, labels in zip(classification.results, sets, strict=True):
            assert labels == tuple(each.label for each in result.predictions[: len(labels)])
            assert len(labels) >= 1
        held.append(sets)
    for smaller, larger in pairwise(held):
        assert all(set(one) <= set(other) for one, other in zip(smaller, larger, strict=True))
    # Of 24 images none tells what would cover all.
    assert all(len(each) == 3 for each in held[-1])


async def test_sets_are_told_whole_whatever_number_of_predictions_is(calibrated):
    classification = await told(calibrated, label_set="things", method="zero-shot", coverage=0.9, top_k=1)
    assert {len(each.predictions) for each in classification.results} == {1}
    assert {len(each.prediction_set) for each in classification.results} == {3}


@pytest.mark.parametrize("asked", [{"labels": list(COLOURS)}, {"label_set": "colours", "method": "gda"}])
async def test_the_higher_the_threshold_the_more_images_are_rejected(calibrated, asked):
    images = [*ASKED[:4], picture((120, 118, 117)), picture((200, 190, 20))]
    before = [False] * len(images)
    for threshold in (0.0, 0.3, 0.5, 0.8, 0.99, 1.0):
        classification = await told(calibrated, images, **asked, reject_below=threshold)
        rejected = [each.rejected for each in classification.results]
        assert all(now or not earlier for now, earlier in zip(rejected, before, strict=True))
        assert rejected == [each.predictions[0].score < threshold for each in classification.results]
        before = rejected
    assert any(before)
    assert {each.rejected for each in (await told(calibrated, images, **asked)).results} == {None}


async def test_a_sigmoid_encoders_best_score_is_what_a_threshold_is_compared_with(settings):
    """As it is shown, whether the methods were tried on examples or not."""
    between = [picture((200, 190, 20)), picture((20, 200, 190)), *ASKED[:2]]
    async with open_service(settings, [FakeEncoder(logit_bias=-3.0)]) as service:
        await stock(service, "colours", COLOURS)
        for trial in (False, True):
            if trial:
                await service.method_selector.select_for_every_model("colours")
            for method in ("zero-shot", "gda"):
                classification = await told(service, between, label_set="colours", method=method, reject_below=0.9)
                assert [each.rejected for each in classification.results] == [
                    each.predictions[0].score < 0.9 for each in classification.results
                ], (trial, method)


async def test_a_rate_becomes_a_threshold_that_rejects_no_more_of_the_held_out_images(calibrated):
    for name, method in [("things", "gda"), ("colours", "zero-shot"), ("colours", "stata")]:
        thresholds = []
        for rate in (0.01, 0.05, 0.2, 0.5):
            question = ClassifyRequest(label_set=name, method=method, false_rejection_rate=rate)
            scoring = (await calibrated.resolver.resolve(question)).scoring
            assert scoring.false_rejection_rate <= rate
            thresholds.append(scoring.reject_below)
        assert thresholds == sorted(thresholds)
        assert thresholds[0] == 0  # which needs a hundred images
        assert thresholds[-1] > 0


async def test_a_threshold_that_was_measured_is_told_with_its_rate(calibrated):
    for threshold, rate in [(0.0, 0.0), (1.0, 1.0)]:
        scoring = (
            await calibrated.resolver.resolve(ClassifyRequest(label_set="things", method="gda", reject_below=threshold))
        ).scoring
        assert scoring.false_rejection_rate == pytest.approx(rate, abs=0.01)
    assert (
        await calibrated.resolver.resolve(ClassifyRequest(label_set="things", method="gda"))
    ).scoring.false_rejection_rate is None


async def test_grey_images_are_stranger_than_those_of_a_class(taught):
    grey = picture((120, 119, 118))
    classification = await told(taught, [grey, *ASKED[:3]], label_set="colours", method="zero-shot")
    strange, *known = [each.out_of_vocabulary for each in classification.results]
    assert all(strange.mcm > each.mcm for each in known)
    assert all(strange.energy > each.energy for each in known)


# What was found


async def test_what_was_found_is_told_and_where_nothing_was_what_to_do(calibrated):
    selection = await calibrated.selection_reader.stored(await calibrated.label_sets.get("things"), None)
    assert selection.is_current
    assert selection.result["method"] == (await calibrated.resolver.resolve(ClassifyRequest(label_set="things"))).method
    await calibrated.label_sets.put("pets", entries("cat"), "{}")
    for name, model, problem in [
        ("pets", None, "add example images, and wait"),
        ("pest", None, "unknown label set 'pest'"),
        ("things", "clap", "unknown model 'clap'"),
    ]:
        with pytest.raises(UnknownNameError, match=problem):
            await calibrated.selection_reader.stored(await calibrated.label_sets.get(name), model)


async def test_a_label_set_with_examples_has_its_method_learned_before_it_is_asked_for(calibrated):
    await calibrated.label_sets.put("things", entries(*THINGS), "a {}.")
    await settled(calibrated)
    await calibrated.fits.idle()
    reads = []
    features = calibrated.examples.repository.features

    async def noted(*arguments, **options):
        reads.append(arguments)
        return await features(*arguments, **options)

    calibrated.examples.repository.features = noted
    assert labels_of(await told(calibrated, label_set="things")) == list(THINGS) * 2
    assert not reads


# --- warming -------------------------------------------------------------------------------------------------------


async def test_a_label_set_is_encoded_before_it_is_asked_for(service, encoder):
    await service.label_sets.put("pets", entries("cat"), "a {}.")
    await settled(service)
    await service.label_sets.add_classes("pets", entries("dog"))
    await settled(service)
    assert encoder.encoded_texts == ["a cat.", "a dog."]
    task = await service.resolver.resolve(ClassifyRequest(label_set="pets"))
    await service.classifiers.get(task)
    assert encoder.encoded_texts == ["a cat.", "a dog."]


async def test_after_a_restart_with_another_model_the_latest_version_of_every_label_set_is_encoded(settings):
    async with open_service(settings, [FakeEncoder("before")]) as service:
        for number in range(3):
            await service.label_sets.put(f"set {number}", entries(f"old {number}"), "{}")
            await service.label_sets.put(f"set {number}", entries(f"new {number}"), "{}")
    encoder = FakeEncoder()
    async with open_service(settings, [encoder]) as service:
        await service.prewarmer.add_all(service.label_sets)
    assert encoder.encoded_texts == ["new 0", "new 1", "new 2"]


async def test_after_a_restart_with_the_same_model_nothing_is_encoded(settings):
    async with open_service(settings, [FakeEncoder()]) as service:
        await service.label_sets.put("pets", entries("cat", "dog"), "ensemble")
        await settled(service)
        before = await service.classifiers.get(await service.resolver.resolve(ClassifyRequest(label_set="pets")))
    encoder = FakeEncoder()
    async with open_service(settings, [encoder]) as service:
        await service.prewarmer.add_all(service.label_sets)
        after = await service.classifiers.get(await service.resolver.resolve(ClassifyRequest(label_set="pets")))
    assert encoder.encoded_texts == []
    np.testing.assert_array_equal(after.predict.__self__.text_, before.predict.__self__.text_)


class Broken(FakeEncoder):
    def encode_texts(self, texts):
        if any("poison" in text for text in texts):
            raise RuntimeError("the text tower broke")
        return super().encode_texts(texts)


async def test_a_label_set_that_cannot_be_encoded_keeps_no_other_from_it_and_is_logged(settings):
    """Whatever the encoder raises: an error of the background has no caller to go to."""
    async with open_service(settings, [FakeEncoder("before")]) as service:
        await service.label_sets.put("a", entries("poison"), "{}")
        await service.label_sets.put("b", entries("cat"), "{}")
    encoder = Broken()
    async with open_service(settings, [encoder]) as service:
        with structlog.testing.capture_logs() as logs:
            await service.prewarmer.add_all(service.label_sets)
    assert encoder.encoded_texts == ["cat"]
    (told,) = [each for each in logs if each["event"] == "label_set_not_prewarmed"]
    assert (told["label_set"], told["reason"]) == ("a@1", "the text tower broke")


async def test_writing_a_label_set_that_cannot_be_encoded_succeeds_and_is_logged(settings):
    async with open_service(settings, [Broken()]) as service:
        with structlog.testing.capture_logs() as logs:
            _, created = await service.label_sets.put("a", entries("poison"), "{}")
            await settled(service)
    assert created
    assert [each["event"] for each in logs] == ["label_set_not_prewarmed"]


@pytest.fixture
async def gated(anyio_backend):
    encoder = GatedEncoder()
    yield encoder
    encoder.open()


async def embeddings_of(service, *names):
    return await service.classifiers.get(Task("fake", "zero-shot", tuple(entries(*names)), ("{}",), 1))


async def test_of_many_writes_one_label_set_at_a_time_is_encoded_in_its_last_version(settings, gated, monkeypatch):
    async with open_service(settings, [gated]) as service:
        get, running, most = service.classifiers.get, 0, 0

        async def counted(*arguments):
            nonlocal running, most
            running += 1
            most = max(most, running)
            try:
                return await get(*arguments)
            finally:
                running -= 1

        monkeypatch.setattr(service.classifiers, "get", counted)
        gated.texts_open.clear()
        await service.label_sets.put("busy", entries("first"), "{}")
        assert await asyncio.to_thread(gated.texts_entered.acquire, timeout=10)
        for version in range(1, 6):
            for name in "abcd":
                await service.label_sets.put(name, entries(f"{name}{version}"), "{}")
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
            await service.label_sets.put(f"set {number}", entries(f"class {number}"), "{}")
        assert await asyncio.to_thread(gated.texts_entered.acquire, timeout=10)
        texts, submitted = service.models.get("fake").encode_texts, asyncio.Event()
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
            await service.label_sets.put("a", entries(*(f"old {number}" for number in range(600))), "{}")
            assert await asyncio.to_thread(encoder.entered.wait, 10)
            await service.label_sets.put("a", entries("new"), "{}")
        finally:
            encoder.may_go_on.set()
        await settled(service)
        assert "new" in encoder.encoded_texts
        await embeddings_of(service, "old 0", "old 255")
        for _ in range(10):  # in turns with what would be left of the old version
            await service.models.get("fake").texts.run(["turn"])
    assert encoder.encoded_texts.count("old 0") == encoder.encoded_texts.count("old 255") == 1
    assert "old 599" not in encoder.encoded_texts


async def test_after_a_label_set_that_cannot_be_encoded_the_next_one_written_is(settings):
    encoder = Broken()
    async with open_service(settings, [encoder]) as service:
        with structlog.testing.capture_logs() as logs:
            for name, classname in [("a", "poison"), ("b", "cat"), ("c", "more poison"), ("d", "dog")]:
                await service.label_sets.put(name, entries(classname), "{}")
            await settled(service)
            await service.label_sets.put("e", entries("owl"), "{}")
            await settled(service)
    assert encoder.encoded_texts == ["cat", "dog", "owl"]
    assert [each["label_set"] for each in logs if each["event"] == "label_set_not_prewarmed"] == ["a@1", "c@1"]


async def test_a_database_that_fails_while_warming_ends_the_warming_and_is_logged(service, monkeypatch):
    async def fail(**_):
        raise StoreError("the database is gone")

    monkeypatch.setattr(service.label_sets, "list", fail)
    with structlog.testing.capture_logs() as logs:
        await service.prewarmer.add_all(service.label_sets)
    assert [(each["event"], each["reason"]) for each in logs] == [("prewarming_stopped", "the database is gone")]


async def test_a_label_set_deleted_while_others_are_warmed_is_passed_over(service, encoder, monkeypatch):
    await service.label_sets.put("a", entries("cat"), "{}")
    await service.label_sets.put("b", entries("dog"), "{}")
    await settled(service)
    listed = await service.label_sets.list(limit=100)
    await service.label_sets.delete("a")

    async def list_as_before(limit, after=None):
        return listed if after is None else []

    monkeypatch.setattr(service.label_sets, "list", list_as_before)
    await service.prewarmer.add_all(service.label_sets)
    assert "dog" in encoder.encoded_texts


async def test_closing_does_not_wait_for_label_sets_that_are_still_to_be_encoded(settings):
    class Slow(FakeEncoder):
        entered, may_go_on = threading.Event(), threading.Event()

        def encode_texts(self, texts):
            self.entered.set()
            assert self.may_go_on.wait(10)
            return super().encode_texts(texts)

    encoder = Slow()
    async with AsyncExitStack() as stack:
        service = await stack.enter_async_context(open_service(settings, [encoder]))
        await service.label_sets.put("a", entries("first"), "{}")
        assert await asyncio.to_thread(encoder.entered.wait, 10)
        await service.label_sets.put("b", entries("second"), "{}")
        closing = asyncio.create_task(stack.aclose())
        with pytest.raises(NotReadyError):  # which tells that the queue is closed
            await service.models.get("fake").texts.run(["third"])
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
