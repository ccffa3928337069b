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

from app.classification.method_names import AUTO, DEFAULT_METHOD
from app.classification.methods import METHODS
from app.classification.request import ClassifyRequest
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
from app.selection.selection import PREFERRED
from app.selection.selection_reader import SELECT_METHOD, SelectionReader
from app.settings import Settings
from app.store.jobs import JobRepository
from app.types import ClassEntry, MergeSynonyms, RejectBy, Task
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
    """Wait until no label set is being prewarmed."""
    await service.prewarmer.idle()


# --- looking up names ----------------------------------------------------------------------------------------------


async def test_missing_fields_have_defaults(service):
    task = await service.resolver.resolve(ClassifyRequest(labels=["cat", "dog"]))
    assert (task.model, task.method, task.label_set_reference) == ("fake", DEFAULT_METHOD, None)
    assert task.classnames == ("cat", "dog")
    assert task.templates == service.templates.resolve(DEFAULT_TEMPLATES)
    assert task.top_k == 2


@pytest.mark.parametrize(("requested", "expected"), [(None, 5), (1, 1), (3, 3), (6, 6), (100, 6)])
async def test_top_k_is_limited_to_the_number_of_classes(service, requested, expected):
    await service.label_sets.put("six", entries(*"abcdef"), "photo")
    assert (await service.resolver.resolve(ClassifyRequest(label_set="six", top_k=requested))).top_k == expected


async def test_labels_are_cleaned_like_the_classes_of_a_label_set(service):
    task = await service.resolver.resolve(ClassifyRequest(labels=["  polar   bear ", "cafe\u0301"]))
    assert task.classnames == ("polar bear", "caf\u00e9")


@pytest.mark.parametrize("templates", ["photo", "a sketch of a {}."])
async def test_a_label_set_has_its_own_templates_which_a_request_can_override(service, templates):
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
async def test_an_invalid_version_number_is_a_field_error(service, version):
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
async def test_the_error_for_an_unknown_name_lists_the_known_ones(service, question, kind, known):
    await service.label_sets.put("pets", entries("cat"), "photo")
    with pytest.raises(UnknownNameError, match=f"unknown {kind} '.*'; known: .*{known}"):
        await service.resolver.resolve(question)


async def test_either_labels_or_a_label_set_are_required_unless_the_method_needs_neither(service):
    for question in (ClassifyRequest(method="zero-shot"), ClassifyRequest(labels=["a"], label_set="pets")):
        with pytest.raises(InvalidFieldError) as caught:
            await service.resolver.resolve(question)
        assert [problem.field for problem in caught.value.problems] == ["labels"]


async def test_errors_of_limits_name_their_setting(service):
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


async def test_an_unknown_template_set_is_rejected_before_writing(service):
    for templates, error in [("phto", UnknownNameError), ("{} {x}", InvalidFieldError)]:
        with pytest.raises(error):
            await service.label_sets.put("pets", entries("cat"), templates)
    with pytest.raises(UnknownNameError):
        await service.label_sets.find("pets")


async def test_an_invalid_template_of_a_label_set_is_an_error_of_its_field(service):
    with pytest.raises(InvalidFieldError) as caught:
        await service.label_sets.put("pets", entries("cat"), "{} {x}")
    assert [problem.field for problem in caught.value.problems] == ["templates"]


async def test_the_second_writer_of_the_same_version_gets_a_conflict(service):
    await service.label_sets.put("pets", entries("cat"), "photo")
    outcomes = await asyncio.gather(
        service.label_sets.put("pets", entries("dog"), "photo", if_match=frozenset({1})),
        service.label_sets.put("pets", entries("owl"), "photo", if_match=frozenset({1})),
        return_exceptions=True,
    )
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["PreconditionFailedError", "tuple"]
    assert isinstance(next(outcome for outcome in outcomes if not isinstance(outcome, tuple)), PreconditionFailedError)
    assert (await service.label_sets.find("pets")).version == 2


# --- example images ------------------------------------------------------------------------------------------------

QUERIES = shades(6, 900)
"""Two images of each colour that are not examples."""

LEARN_FROM_LABELS = [name for name, method in METHODS.items() if "labelled images" in method.learns]
LEARN_FROM_POOL = [name for name, method in METHODS.items() if "unlabelled images" in method.learns]
INDUCTIVE = [name for name, method in METHODS.items() if not method.transductive]


@pytest.fixture(scope="module")
def databases(tmp_path_factory, empty_database):
    """Return databases of a service with examples before and after a selection; tests copy them."""
    folder = tmp_path_factory.mktemp("examples")
    file, with_examples, calibrated = folder / "deixis.sqlite3", folder / "taught", folder / "calibrated"
    shutil.copy(empty_database, file)
    settings = Settings(data_dir=folder, models=("embedded",), database_url=f"sqlite:///{file}")

    async def make():
        async with open_service(settings, [FakeEncoder()]) as service:
            await stock(service, "things", pool=4)
            await stock(service, "colours", COLOURS, pool=8)
        shutil.copy(file, with_examples)
        async with open_service(settings, [FakeEncoder()]) as service:
            for name in ("things", "colours"):
                await service.method_selector.select_for_every_model(name)
        shutil.copy(file, calibrated)

    asyncio.run(make())
    return {"taught": with_examples, "calibrated": calibrated}


@pytest.fixture
async def with_examples(settings, encoder, databases, anyio_backend):
    """Return a service with examples for two label sets: colours, and things, whose names the encoder does not know."""
    shutil.copy(databases["taught"], settings.data_dir / "deixis.sqlite3")
    async with open_service(settings, [encoder]) as service:
        yield service


@pytest.fixture
async def calibrated(settings, encoder, databases, anyio_backend):
    """Return the same service after methods were selected on the examples."""
    shutil.copy(databases["calibrated"], settings.data_dir / "deixis.sqlite3")
    async with open_service(settings, [encoder]) as service:
        yield service


async def classify(service, images=QUERIES, **fields):
    return await service.pipeline.classify(images, await service.resolver.resolve(ClassifyRequest(**fields)))


def labels_of(classification):
    return [result.predictions[0].label for result in classification.results]


def scores_of(classification):
    """Return the scores of every image by label."""
    return [
        {prediction.label: prediction.score for prediction in result.predictions} for result in classification.results
    ]


def assert_same(one, other, tolerance=1e-4):
    for first, second in zip(one.results, other.results, strict=True):
        assert first.predictions[0].label == second.predictions[0].label
    for first, second in zip(scores_of(one), scores_of(other), strict=True):
        assert first == pytest.approx(second, abs=tolerance)


async def test_without_examples_zero_shot_is_used_without_a_reason(service):
    await service.label_sets.put("pets", entries("cat", "dog"), "photo")
    for question in (ClassifyRequest(labels=["cat"]), ClassifyRequest(label_set="pets")):
        task = await service.resolver.resolve(question)
        assert (task.method, task.reason) == (DEFAULT_METHOD, None)
    for fields in ({"labels": ["cat"]}, {"label_set": "pets"}):
        task = await service.resolver.resolve(ClassifyRequest(**fields, method=AUTO))
        assert task.method == DEFAULT_METHOD
        assert "there are none" in task.reason


async def test_before_a_selection_zero_shot_is_used_and_one_selection_is_requested(with_examples):
    await settled(with_examples)
    with_examples.selection_reader._jobs = repository = JobRepository(with_examples.engine)
    for method in (None, AUTO, None):
        task = await with_examples.resolver.resolve(ClassifyRequest(label_set="things", method=method))
        assert task.method == DEFAULT_METHOD
        assert "have not been compared" in task.reason
    await asyncio.gather(*with_examples.selection_reader._requests)
    assert [(job.kind, job.subject) for job in await repository.list(9)] == [(SELECT_METHOD, "things")]


async def test_after_a_selection_the_method_with_the_lower_loss_is_used_with_a_reason(calibrated):
    for method in (None, AUTO):
        task = await calibrated.resolver.resolve(ClassifyRequest(label_set="things", method=method))
        assert task.method in LEARN_FROM_LABELS
        assert task.method in task.reason
        assert "that of zero-shot 33.3 %" in task.reason
    classification = await classify(calibrated, label_set="things")
    assert labels_of(classification) == list(THINGS) * 2
    assert labels_of(await classify(calibrated, label_set="things", method="zero-shot")) == ["tomato"] * 6
    task = await calibrated.resolver.resolve(ClassifyRequest(label_set="colours"))
    assert task.method == PREFERRED
    assert "that of zero-shot 100.0 %" in task.reason


@pytest.mark.parametrize("change", ["examples", "classes"])
async def test_an_outdated_selection_is_used_with_a_remark(calibrated, change):
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


async def test_a_requested_method_has_no_reason(calibrated):
    for method in METHODS:
        task = await calibrated.resolver.resolve(ClassifyRequest(label_set="things", method=method))
        assert (task.method, task.reason) == (method, None)


async def test_options_without_a_method_are_rejected_with_automatic_selection(calibrated):
    for fields in ({"label_set": "things"}, {"label_set": "things", "method": AUTO}, {"labels": ["a"], "method": AUTO}):
        with pytest.raises(InvalidFieldError, match="name the method in the field method") as caught:
            await calibrated.resolver.resolve(ClassifyRequest(**fields, options={"alpha": 1.0}))
        assert [problem.field for problem in caught.value.problems] == ["options"]
    task = await calibrated.resolver.resolve(ClassifyRequest(label_set="things", method="gda", options={"alpha": 2.0}))
    assert task.options == (("alpha", 2.0),)


@pytest.mark.parametrize("method", [*LEARN_FROM_LABELS, "tda"])
async def test_methods_that_need_a_label_set_reject_inline_labels_with_advice(service, method):
    with pytest.raises(InvalidFieldError, match="give label_set, or name another method") as caught:
        await service.resolver.resolve(ClassifyRequest(labels=["a", "b"], method=method))
    assert [problem.field for problem in caught.value.problems] == ["method"]


# Which images a result is based on


@pytest.mark.parametrize("method", LEARN_FROM_POOL)
async def test_several_images_with_inline_labels_are_used_as_the_pool_with_a_warning(service, method):
    classification = await classify(service, labels=list(COLOURS), method=method)
    assert classification.transductive
    assert classification.examples is None
    assert any("classified together" in warning for warning in classification.warnings)
    assert labels_of(classification) == list(COLOURS) * 2


async def test_a_single_image_gives_zero_shot_with_a_warning(service):
    alone = await classify(service, QUERIES[:1], labels=list(COLOURS), method="zlap")
    zero_shot = await classify(service, QUERIES[:1], labels=list(COLOURS))
    assert_same(alone, zero_shot)
    assert any("zero-shot" in warning for warning in alone.warnings)


async def test_a_stored_pool_is_used_and_counted(with_examples):
    for method in LEARN_FROM_POOL:
        classification = await classify(with_examples, label_set="colours", method=method)
        assert not classification.transductive
        assert classification.examples.unlabelled == 24
        assert classification.examples.revision == (await with_examples.label_sets.find("colours")).examples_revision
        assert not any("together" in warning for warning in classification.warnings)


async def test_an_option_uses_the_images_of_the_request_instead_of_the_stored_pool(with_examples):
    for method in LEARN_FROM_POOL:
        together = await classify(with_examples, label_set="colours", method=method, options={"transductive": 1.0})
        inline = await classify(with_examples, labels=list(COLOURS), template="{}", method=method)
        assert together.transductive
        assert together.examples is None
        assert scores_of(together) == scores_of(inline)
        apart = await classify(with_examples, label_set="colours", method=method, options={"transductive": 0.0})
        assert not apart.transductive


@pytest.mark.parametrize("classes", [THINGS, COLOURS], ids=["things", "colours"])
async def test_without_a_stored_pool_the_images_of_the_request_are_used(settings, classes):
    async with open_service(settings, [FakeEncoder()]) as service:
        await stock(service, "some", classes, labelled=2)
        classification = await classify(service, label_set="some", method="zlap")
        assert classification.transductive
        assert scores_of(classification) == scores_of(
            await classify(service, labels=list(classes), template="{}", method="zlap")
        )


async def test_only_examples_that_a_method_uses_are_counted(with_examples):
    for method in LEARN_FROM_LABELS:
        examples = (await classify(with_examples, label_set="things", method=method)).examples
        assert (examples.labelled, examples.unlabelled) == (24, 0)
    for method in LEARN_FROM_POOL:
        examples = (await classify(with_examples, label_set="things", method=method)).examples
        assert (examples.labelled, examples.unlabelled) == (0, 12)
    for method in set(METHODS) - {*LEARN_FROM_LABELS, *LEARN_FROM_POOL}:
        assert (await classify(with_examples, label_set="things", method=method)).examples is None


@pytest.mark.parametrize("name", ["things", "colours"])
async def test_an_image_has_the_same_result_alone_and_in_a_batch_for_every_inductive_method(with_examples, name):
    for method in INDUCTIVE:
        together = await classify(with_examples, label_set=name, method=method)
        for number, image in enumerate(QUERIES):
            alone = await classify(with_examples, [image], label_set=name, method=method)
            assert alone.results[0].predictions[0].label == together.results[number].predictions[0].label
            assert scores_of(alone)[0] == pytest.approx(scores_of(together)[number], abs=1e-4)


async def test_other_requests_change_results_only_of_the_method_with_a_cache(with_examples):
    """The images are of colours between two classes, which this method is uncertain about and stores."""
    doubtful = [picture(colour) for colour in ((200, 180, 20), (20, 190, 200), (190, 20, 170))]
    fields = {"label_set": "colours", "template": "{}"}
    before = {method: await classify(with_examples, doubtful[:1], **fields, method=method) for method in METHODS}
    for method in METHODS:
        await classify(with_examples, [*doubtful[1:], *QUERIES], **fields, method=method)
    after = {method: await classify(with_examples, doubtful[:1], **fields, method=method) for method in METHODS}
    for method in METHODS:
        changed = scores_of(after[method]) != scores_of(before[method])
        assert changed == (method == "tda"), method


async def test_concurrent_requests_get_the_results_of_sequential_ones(with_examples):
    for method in INDUCTIVE:
        alone = [await classify(with_examples, [image], label_set="colours", method=method) for image in QUERIES]
        at_once = await asyncio.gather(
            *(classify(with_examples, [image], label_set="colours", method=method) for image in QUERIES)
        )
        for one, other in zip(alone, at_once, strict=True):
            assert_same(one, other)


async def test_the_images_of_a_request_do_not_affect_the_next_one(with_examples):
    first = await classify(with_examples, labels=list(COLOURS), method="zlap")
    await classify(with_examples, [shade(0, number) for number in range(8)], labels=list(COLOURS), method="zlap")
    assert scores_of(await classify(with_examples, labels=list(COLOURS), method="zlap")) == scores_of(first)


# Changes of the classes


async def test_a_new_class_without_images_is_predicted_by_its_name(with_examples):
    await with_examples.label_sets.put("things", entries(*THINGS, "green"), "{}")
    classification = await classify(with_examples, [shade(0, 900), shade(2, 900)], label_set="things", method="gda")
    assert labels_of(classification) == ["tomato", "sky"]
    assert classification.task.label_set_reference == "things@2"
    assert classification.examples.labelled == 24
    assert any("classes without a labelled image: 1;" in warning for warning in classification.warnings)
    assert set(scores_of(classification)[0]) == {*THINGS, "green"}


async def test_the_images_of_a_removed_class_are_not_used(with_examples):
    await with_examples.label_sets.remove_class("things", "leaf")
    await with_examples.label_sets.put("never", entries("tomato", "sky"), "{}")
    numbers = [number for number in range(24) if number % 3 != 1]
    await keep(
        with_examples,
        "never",
        [shade(number % 3, number) for number in numbers],
        [THINGS[number % 3] for number in numbers],
    )
    for method in LEARN_FROM_LABELS:
        removed = await classify(with_examples, label_set="things", method=method)
        assert removed.examples.labelled == 16
        assert_same(removed, await classify(with_examples, label_set="never", method=method))
    await with_examples.label_sets.add_classes("things", entries("leaf"))
    assert (await classify(with_examples, label_set="things", method="gda")).examples.labelled == 24


async def test_an_older_version_uses_the_images_of_its_own_classes(with_examples):
    await with_examples.label_sets.remove_class("things", "leaf")
    assert labels_of(await classify(with_examples, label_set="things@1", method="gda")) == list(THINGS) * 2
    assert set(labels_of(await classify(with_examples, label_set="things@2", method="gda"))) == {"tomato", "sky"}


async def test_added_images_are_fitted_in_the_background(with_examples):
    await classify(with_examples, label_set="things", method="gda")
    revision = (await keep(with_examples, "things", [shade(0, 99)], ["tomato"])).revision
    await classify(with_examples, label_set="things", method="gda")
    await with_examples.fits.idle()
    after = await classify(with_examples, label_set="things", method="gda")
    assert (after.examples.labelled, after.examples.revision) == (25, revision)


@pytest.mark.parametrize("merge", list(MergeSynonyms))
async def test_the_prompts_of_an_explanation_add_up_to_the_similarity_of_a_fitted_method(with_examples, merge):
    """Also for a class with several names."""
    classes = [ClassEntry("tomato", synonyms=("red fruit",)), ClassEntry("leaf", synonyms=("green", "foliage"))]
    await with_examples.label_sets.put("synonyms", classes, "{}", merge_synonyms=merge)
    await keep(with_examples, "synonyms", shades(4), ["tomato", "leaf", "tomato", "leaf"])
    for method in ("zero-shot", "gda"):
        for result in (await classify(with_examples, label_set="synonyms", method=method, explain=True)).results:
            for item in result.explanation:
                total = sum(prompt.weight * prompt.cosine for prompt in (*item.supporting, *item.opposing))
                assert total == pytest.approx(item.similarity, abs=1e-5), method


# Scores


async def test_scores_of_a_sigmoid_encoder_sum_to_one_after_fitting_or_calibration(settings):
    """Otherwise each score is independent."""
    async with open_service(settings, [FakeEncoder(logit_bias=-3.0)]) as service:
        await stock(service, "colours", COLOURS, pool=8)
        for trial in (False, True):
            if trial:
                await service.method_selector.select_for_every_model("colours")
            for method in (*LEARN_FROM_LABELS, *LEARN_FROM_POOL, "tda"):
                for scores in scores_of(await classify(service, label_set="colours", method=method)):
                    assert sum(scores.values()) == pytest.approx(1, abs=1e-5)
            by_themselves = [{"labels": list(COLOURS)}, {"label_set": "colours", "template": "the {}."}]
            shares = []
            (shares if trial else by_themselves).append({"label_set": "colours", "method": "zero-shot"})
            for fields in by_themselves:
                for result in (await classify(service, **{"method": "zero-shot", **fields})).results:
                    for prediction in result.predictions:
                        assert prediction.score == pytest.approx(
                            1 / (1 + np.exp(3 - 10 * prediction.similarity)), abs=1e-5
                        )
            for fields in shares:
                for scores in scores_of(await classify(service, **fields)):
                    assert sum(scores.values()) == pytest.approx(1, abs=1e-5)


async def test_scores_use_the_temperature_calibrated_on_held_out_images(calibrated):
    named = await classify(calibrated, label_set="things", method="gda")
    with_options = await classify(calibrated, label_set="things", method="gda", options={"alpha": 0.0})
    scoring = named.task.scoring
    assert scoring.calibrated_on == 24
    assert with_options.task.scoring.temperature == 1
    for raw, scaled in zip(scores_of(with_options), scores_of(named), strict=True):
        logits = {label: np.log(score) / scoring.temperature for label, score in raw.items()}
        total = sum(np.exp(logit) for logit in logits.values())
        assert scaled == pytest.approx({label: np.exp(item) / total for label, item in logits.items()}, abs=1e-4)


async def test_without_examples_a_score_threshold_works_and_calibrated_options_are_rejected(service):
    await service.label_sets.put("pets", entries("cat", "dog"), "photo")
    for fields in ({"labels": ["cat", "dog"]}, {"label_set": "pets"}):
        for field, value in (("false_rejection_rate", 0.1), ("coverage", 0.9)):
            with pytest.raises(InvalidFieldError, match="needs labelled example images") as caught:
                await service.resolver.resolve(ClassifyRequest(**fields, **{field: value}))
            assert [problem.field for problem in caught.value.problems] == [field]
        scoring = (await service.resolver.resolve(ClassifyRequest(**fields, reject_below=0.5))).scoring
        assert (scoring.reject_below, scoring.temperature, scoring.calibrated_on) == (0.5, 1, 0)


async def test_a_threshold_and_a_rate_together_are_rejected(calibrated):
    for fields in ({"labels": ["a"]}, {"label_set": "things"}):
        with pytest.raises(InvalidFieldError, match="not both"):
            await calibrated.resolver.resolve(ClassifyRequest(**fields, reject_below=0.5, false_rejection_rate=0.1))


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"method": "gda", "options": {"alpha": 1.0}}, "leave out options"),
        ({"template": "the {} here."}, "leave out template"),
        ({"method": "tda"}, "was compared on the example images, which 'tda' was not; compared: .*, gda, .*"),
    ],
    ids=["options", "template", "method that was not compared"],
)
async def test_a_calibration_does_not_apply_to_other_options_or_templates(calibrated, more, problem):
    """They change the scores, which were not calibrated."""
    for promise in ({"coverage": 0.9}, {"false_rejection_rate": 0.1}):
        with pytest.raises(InvalidFieldError, match=problem):
            await calibrated.resolver.resolve(ClassifyRequest(label_set="things", **more, **promise))
    assert (await calibrated.resolver.resolve(ClassifyRequest(label_set="things", **more))).scoring.calibrated_on == 0


async def test_a_calibration_does_not_apply_to_other_classes(calibrated):
    await calibrated.label_sets.add_classes("things", entries("snow"))
    with pytest.raises(InvalidFieldError, match="needs the methods to be compared on the current classes"):
        await calibrated.resolver.resolve(ClassifyRequest(label_set="things", coverage=0.9))
    assert (
        await calibrated.resolver.resolve(ClassifyRequest(label_set="things@1", coverage=0.9))
    ).scoring.calibrated_on == 24
    await calibrated.method_selector.select_for_every_model("things")
    assert (
        await calibrated.resolver.resolve(ClassifyRequest(label_set="things", coverage=0.9))
    ).scoring.calibrated_on == 24
    with pytest.raises(InvalidFieldError, match="needs the newest version of the label set, which is 2"):
        await calibrated.resolver.resolve(ClassifyRequest(label_set="things@1", coverage=0.9))


async def test_a_service_that_will_compare_the_methods_is_not_ready_until_then(calibrated, monkeypatch):
    """So that clients wait and try again."""
    await calibrated.examples.delete("things", classname="sky")
    monkeypatch.setattr(SelectionReader, "is_kept_current", True)
    for promise in ({"coverage": 0.9}, {"false_rejection_rate": 0.1}):
        with pytest.raises(NotReadyError, match=r"current classes and example images, .*; try again in some seconds"):
            await calibrated.resolver.resolve(ClassifyRequest(label_set="things", **promise))
    await calibrated.method_selector.select_for_every_model("things")
    resolved = await calibrated.resolver.resolve(ClassifyRequest(label_set="things", coverage=0.9))
    assert resolved.scoring.calibrated_on == 16


async def test_examples_that_cannot_be_held_out_are_named_as_the_cause(with_examples):
    await stock(with_examples, "single", labelled=1)
    await stock(with_examples, "pool", labelled=0, pool=4)
    for name, problem in (("single", "no class has two labelled images"), ("pool", "unlabelled images are too few")):
        await with_examples.method_selector.select_for_every_model(name)
        with pytest.raises(InvalidFieldError, match=f"that can be held out: .*{problem}"):
            await with_examples.resolver.resolve(ClassifyRequest(label_set=name, false_rejection_rate=0.1))


async def test_a_rate_that_needs_more_images_has_a_warning(calibrated):
    for rate, warned in ((0.04, False), (0.039, True)):
        classification = await classify(calibrated, label_set="colours", method="gda", false_rejection_rate=rate)
        warnings = [each for each in classification.warnings if "false rejection rate" in each]
        assert bool(warnings) == warned
        if warned:
            assert "needs at least 25 labelled images, and there are 24; no image is rejected" in warnings[0]
            assert not any(result.rejected for result in classification.results)


@pytest.mark.parametrize("method", [None, "zero-shot", "gda", "zlap", "stata"])
@pytest.mark.parametrize("name", ["things", "colours"])
async def test_sets_contain_the_best_label_and_grow_with_the_coverage(calibrated, name, method):
    held = []
    for coverage in (0.5, 0.9, 0.95, 1.0):
        classification = await classify(calibrated, label_set=name, method=method, coverage=coverage)
        sets = [item.prediction_set for item in classification.results]
        for result, labels in zip(classification.results, sets, strict=True):
            assert labels == tuple(prediction.label for prediction in result.predictions[: len(labels)])
            assert len(labels) >= 1
        held.append(sets)
    for smaller, larger in pairwise(held):
        assert all(set(one) <= set(other) for one, other in zip(smaller, larger, strict=True))
    # 24 images do not determine a threshold that covers all.
    assert all(len(item) == 3 for item in held[-1])


async def test_sets_are_complete_for_every_top_k(calibrated):
    classification = await classify(calibrated, label_set="things", method="zero-shot", coverage=0.9, top_k=1)
    assert {len(result.predictions) for result in classification.results} == {1}
    assert {len(result.prediction_set) for result in classification.results} == {3}


@pytest.mark.parametrize("fields", [{"labels": list(COLOURS)}, {"label_set": "colours", "method": "gda"}])
async def test_higher_thresholds_reject_more_images(calibrated, fields):
    images = [*QUERIES[:4], picture((120, 118, 117)), picture((200, 190, 20))]
    before = [False] * len(images)
    for threshold in (0.0, 0.3, 0.5, 0.8, 0.99, 1.0):
        classification = await classify(calibrated, images, **fields, reject_below=threshold)
        rejected = [result.rejected for result in classification.results]
        assert all(now or not earlier for now, earlier in zip(rejected, before, strict=True))
        assert rejected == [result.predictions[0].score < threshold for result in classification.results]
        before = rejected
    assert any(before)
    assert {result.rejected for result in (await classify(calibrated, images, **fields)).results} == {None}


async def test_the_threshold_is_compared_with_the_returned_score_of_a_sigmoid_encoder(settings):
    """With and without a selection on examples."""
    between = [picture((200, 190, 20)), picture((20, 200, 190)), *QUERIES[:2]]
    async with open_service(settings, [FakeEncoder(logit_bias=-3.0)]) as service:
        await stock(service, "colours", COLOURS)
        for trial in (False, True):
            if trial:
                await service.method_selector.select_for_every_model("colours")
            for method in ("zero-shot", "gda"):
                classification = await classify(service, between, label_set="colours", method=method, reject_below=0.9)
                assert [result.rejected for result in classification.results] == [
                    result.predictions[0].score < 0.9 for result in classification.results
                ], (trial, method)


async def test_a_rate_becomes_a_threshold_with_at_most_this_rate_of_rejections(calibrated):
    for name, method in [("things", "gda"), ("colours", "zero-shot"), ("colours", "stata")]:
        thresholds = []
        for rate in (0.01, 0.05, 0.2, 0.5):
            question = ClassifyRequest(label_set=name, method=method, false_rejection_rate=rate)
            scoring = (await calibrated.resolver.resolve(question)).scoring
            assert scoring.false_rejection_rate <= rate
            thresholds.append(scoring.reject_below)
        assert thresholds == sorted(thresholds)
        assert scoring.reject_by is RejectBy.CLASS_MEAN
        assert thresholds[0] == -1  # a rate of 1 % requires a hundred images
        assert thresholds[-1] > 0


async def test_images_far_from_the_examples_are_rejected_and_others_are_not(calibrated):
    """Whatever the method: the score is the largest cosine with a class mean."""
    strange = picture((120, 119, 118))
    scores = {}
    for method in ("zero-shot", "gda"):
        classification = await classify(
            calibrated, [strange, *QUERIES], label_set="colours", method=method, false_rejection_rate=0.1
        )
        assert classification.task.scoring.reject_by is RejectBy.CLASS_MEAN
        assert [result.rejected for result in classification.results] == [True, *[False] * len(QUERIES)]
        scores[method] = [result.rejection_score for result in classification.results]
        threshold = classification.task.scoring.reject_below
        assert scores[method][0] < threshold <= min(scores[method][1:])
    assert scores["zero-shot"] == scores["gda"]


async def test_a_threshold_of_the_request_is_compared_with_the_best_score(calibrated):
    classification = await classify(calibrated, label_set="colours", method="gda", reject_below=0.9)
    assert classification.task.scoring.reject_by is RejectBy.SCORE
    for result in classification.results:
        assert result.rejection_score == pytest.approx(result.predictions[0].score, abs=1e-6)
        assert result.rejected == (result.rejection_score < 0.9)


async def test_a_calibrated_threshold_is_returned_with_its_rate(calibrated):
    for threshold, rate in [(0.0, 0.0), (1.0, 1.0)]:
        scoring = (
            await calibrated.resolver.resolve(ClassifyRequest(label_set="things", method="gda", reject_below=threshold))
        ).scoring
        assert scoring.false_rejection_rate == pytest.approx(rate, abs=0.01)
    assert (
        await calibrated.resolver.resolve(ClassifyRequest(label_set="things", method="gda"))
    ).scoring.false_rejection_rate is None


async def test_grey_images_have_a_higher_unknown_class_score_than_those_of_a_class(with_examples):
    grey = picture((120, 119, 118))
    classification = await classify(with_examples, [grey, *QUERIES[:3]], label_set="colours", method="zero-shot")
    strange, *known = [result.out_of_vocabulary for result in classification.results]
    assert all(strange.mcm > item.mcm for item in known)
    assert all(strange.energy > item.energy for item in known)


# Selections


async def test_a_selection_is_returned_and_without_one_the_error_says_what_to_do(calibrated):
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


async def test_a_selected_method_is_fitted_before_the_first_request(calibrated):
    await calibrated.label_sets.put("things", entries(*THINGS), "a {}.")
    await settled(calibrated)
    await calibrated.fits.idle()
    reads = []
    features = calibrated.examples.repository.features

    async def recorded(*arguments, **options):
        reads.append(arguments)
        return await features(*arguments, **options)

    calibrated.examples.repository.features = recorded
    assert labels_of(await classify(calibrated, label_set="things")) == list(THINGS) * 2
    assert not reads


# --- prewarming ----------------------------------------------------------------------------------------------------


async def test_a_label_set_is_encoded_before_the_first_request(service, encoder):
    await service.label_sets.put("pets", entries("cat"), "a {}.")
    await settled(service)
    await service.label_sets.add_classes("pets", entries("dog"))
    await settled(service)
    assert encoder.encoded_texts == ["a cat.", "a dog."]
    task = await service.resolver.resolve(ClassifyRequest(label_set="pets"))
    await service.classifiers.get(task)
    assert encoder.encoded_texts == ["a cat.", "a dog."]


async def test_after_a_restart_with_another_model_the_latest_versions_are_encoded(settings):
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


async def test_a_label_set_that_cannot_be_encoded_is_logged_and_does_not_block_others(settings):
    """For every kind of exception: an error in the background has no request to go to."""
    async with open_service(settings, [FakeEncoder("before")]) as service:
        await service.label_sets.put("a", entries("poison"), "{}")
        await service.label_sets.put("b", entries("cat"), "{}")
    encoder = Broken()
    async with open_service(settings, [encoder]) as service:
        with structlog.testing.capture_logs() as logs:
            await service.prewarmer.add_all(service.label_sets)
    assert encoder.encoded_texts == ["cat"]
    (event,) = [log for log in logs if log["event"] == "label_set_not_prewarmed"]
    assert (event["label_set"], event["reason"]) == ("a@1", "the text tower broke")


async def test_writing_a_label_set_that_cannot_be_encoded_succeeds_and_is_logged(settings):
    async with open_service(settings, [Broken()]) as service:
        with structlog.testing.capture_logs() as logs:
            _, created = await service.label_sets.put("a", entries("poison"), "{}")
            await settled(service)
    assert created
    assert [log["event"] for log in logs] == ["item_failed", "label_set_not_prewarmed"]


@pytest.fixture
async def gated(anyio_backend):
    encoder = GatedEncoder()
    yield encoder
    encoder.open()


async def embeddings_of(service, *names):
    return await service.classifiers.get(Task("fake", "zero-shot", tuple(entries(*names)), ("{}",), 1))


async def test_label_sets_are_encoded_one_at_a_time_in_their_latest_version(settings, gated, monkeypatch):
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


async def test_new_labels_wait_for_at_most_one_label_set(settings, gated, monkeypatch):
    async with open_service(settings, [gated]) as service:
        gated.texts_open.clear()
        for number in range(20):
            await service.label_sets.put(f"set {number}", entries(f"class {number}"), "{}")
        assert await asyncio.to_thread(gated.texts_entered.acquire, timeout=10)
        texts, submitted = service.models.get("fake").encode_texts, asyncio.Event()
        run = texts._encode

        async def recorded(prompts):
            submitted.set()
            return await run(prompts)

        monkeypatch.setattr(texts, "_encode", recorded)
        request = asyncio.create_task(embeddings_of(service, "new"))
        await submitted.wait()
        gated.open()
        await request
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


async def test_a_new_version_cancels_the_encoding_of_the_old_one_and_keeps_its_results(settings):
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
        for _ in range(10):  # alternating with the rest of the old version
            await service.models.get("fake").texts.run(["turn"])
    assert encoder.encoded_texts.count("old 0") == encoder.encoded_texts.count("old 255") == 1
    assert "old 599" not in encoder.encoded_texts


async def test_a_label_set_after_one_that_cannot_be_encoded_is_prewarmed(settings):
    encoder = Broken()
    async with open_service(settings, [encoder]) as service:
        with structlog.testing.capture_logs() as logs:
            for name, classname in [("a", "poison"), ("b", "cat"), ("c", "more poison"), ("d", "dog")]:
                await service.label_sets.put(name, entries(classname), "{}")
            await settled(service)
            await service.label_sets.put("e", entries("owl"), "{}")
            await settled(service)
    assert encoder.encoded_texts == ["cat", "dog", "owl"]
    assert [log["label_set"] for log in logs if log["event"] == "label_set_not_prewarmed"] == ["a@1", "c@1"]


async def test_a_database_failure_during_prewarming_ends_it_and_is_logged(service, monkeypatch):
    async def fail(**_):
        raise StoreError("the database is gone")

    monkeypatch.setattr(service.label_sets, "list", fail)
    with structlog.testing.capture_logs() as logs:
        await service.prewarmer.add_all(service.label_sets)
    assert [(log["event"], log["reason"]) for log in logs] == [("prewarming_stopped", "the database is gone")]


async def test_a_label_set_deleted_during_prewarming_is_skipped(service, encoder, monkeypatch):
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


async def test_closing_does_not_wait_for_label_sets_that_are_not_encoded(settings):
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
        with pytest.raises(NotReadyError):  # which shows that the queue is closed
            await service.models.get("fake").texts.run(["third"])
        encoder.may_go_on.set()
        await closing
    assert encoder.encoded_texts == ["first"]


# --- labels in one string ------------------------------------------------------------------------------------------


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_a_json_array_of_strings_is_parsed(labels):
    assert split_labels(json.dumps(labels)) == labels
    assert split_labels(" \n" + json.dumps(labels, ensure_ascii=False)) == labels


@given(st.lists(st.text(st.characters(exclude_characters=",[\r\n"), min_size=1).filter(str.strip), min_size=2))
def test_other_text_is_split_at_commas(labels):
    assert split_labels(",".join(labels)) == labels


@pytest.mark.parametrize("start", ["", "[", '["a"'])
def test_too_many_commas_are_rejected_before_splitting(monkeypatch, start):
    monkeypatch.setattr(json, "loads", lambda _: pytest.fail("it was parsed"))
    with pytest.raises(TooLargeError, match="100,000"):
        split_labels(start + "," * 100_001)


@given(st.text(st.one_of(st.sampled_from('[]{}",\\ \0'), st.characters())))
def test_any_text_raises_only_client_errors(text):
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
    ids=lambda value: value[:12] if isinstance(value, str) else value.__name__,
)
def test_an_invalid_json_array_is_rejected(text, error):
    with pytest.raises(error):
        split_labels(text)
