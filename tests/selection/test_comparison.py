import json

import numpy as np
import pytest

from app.adapters._base import Examples
from app.adapters._examples import Need
from app.classification.methods import METHODS
from app.classification.request import ClassifyRequest
from app.encoders.fake import FakeEncoder
from app.errors import InvalidFieldError
from app.main import open_service
from app.selection.comparison import Comparison, TrainingData
from app.types import ClassEntry
from tests.shades import rows_about

pytestmark = pytest.mark.anyio

COLOURS = ("red", "green", "blue")


@pytest.fixture
async def service(settings):
    async with open_service(settings, [FakeEncoder()]) as opened:
        yield opened


def features_of(colours, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    rows = np.zeros((len(colours), 16), np.float32)
    for row, colour in zip(rows, colours, strict=True):
        row[COLOURS.index(colour)] = 1
    rows[:, :3] += noise * rng.standard_normal((len(rows), 3)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def things(*, described):
    """Return classes whose names mean nothing to the encoder and whose descriptions name the colour."""
    return [
        ClassEntry(name, (f"It is {colour}.", f"All {colour}."), features=(f"{colour} skin",))
        if described
        else ClassEntry(name)
        for name, colour in zip(("tomato", "leaf", "sky"), COLOURS, strict=True)
    ]


async def task_of(service, name="things"):
    return await service.resolver.resolve(ClassifyRequest(label_set=name))


async def compared(service, classes, *, images=60, noise=0.1):
    await service.label_sets.put("things", classes, "photo")
    truth = [number % 3 for number in range(images)]
    features = features_of([COLOURS[item] for item in truth], noise)
    return await service.comparer.compare(await task_of(service, "things"), features, truth)


def report_of(comparison, method):
    return next(item for item in comparison.methods if item.method == method)


async def test_helpful_descriptions_are_significantly_better(service):
    comparison = await compared(service, things(described=True))
    cupl = report_of(comparison, "cupl")
    assert cupl.evaluation.top1 == 1
    assert cupl.to_baseline.mean > 0.2
    assert cupl.to_control.mean > 0.2
    assert cupl.to_baseline.p < 0.05
    assert "The content of the descriptions helps: use " in comparison.verdict[1]


async def test_the_control_has_as_many_prompts_as_each_method_with_descriptions(service):
    comparison = await compared(service, things(described=True))
    sizes = {
        round(method.prompts_per_class)
        for method in comparison.methods
        if METHODS.get(method.method, METHODS["waffle"]).uses_descriptions
    }
    assert {method.prompts_per_class for method in comparison.methods if "waffle" in method.method} == {
        max(2, size) for size in sizes
    }


async def test_every_method_except_the_control_is_in_the_table_with_its_interval(service):
    comparison = await compared(service, things(described=True))
    assert [item.method for item in comparison.methods if "waffle" not in item.method] == [
        name for name, method in METHODS.items() if not (method.is_control or method.learns or method.stateful)
    ]
    assert comparison.not_run == ()
    for item in comparison.methods:
        low, high = item.interval
        assert low <= item.evaluation.top1 <= high
    assert report_of(comparison, "zero-shot").to_baseline is None


async def test_without_descriptions_the_verdict_says_so_and_no_control_runs(service):
    comparison = await compared(service, things(described=False))
    assert all("waffle" not in method.method for method in comparison.methods)
    assert "No class of this label set has descriptions" in comparison.verdict[0]


async def test_descriptions_that_repeat_the_names_are_not_significantly_better(service):
    classes = [ClassEntry(colour, (f"It is {colour}.",)) for colour in COLOURS]
    comparison = await compared(service, classes, noise=0.8)
    assert "may be due to chance" in comparison.verdict[1]


async def test_misleading_descriptions_are_significantly_worse(service):
    wrong = {"red": "green", "green": "blue", "blue": "red"}
    classes = [ClassEntry(name, (f"{other}. " * 3,), features=(f"{other} {other}",)) for name, other in wrong.items()]
    comparison = await compared(service, classes)
    assert report_of(comparison, "cupl").to_baseline.mean < 0
    result = comparison.verdict[1]
    assert "Descriptions lower the accuracy" in result or "may be due to chance" in result


async def test_no_images_are_rejected(service):
    await service.label_sets.put("things", things(described=True), "photo")
    with pytest.raises((InvalidFieldError, ValueError)):
        await service.comparer.compare(await task_of(service, "things"), np.zeros((0, 16), np.float32), [])


async def test_a_method_that_exceeds_the_memory_is_named_and_the_others_run(settings):
    small = settings.model_copy(update={"cache_mib": 2})
    async with open_service(small, [FakeEncoder()]) as service:
        classes = [ClassEntry(f"thing {number}") for number in range(200)]
        await service.label_sets.put("many", classes, "imagenet")
        features = features_of(["red", "green"])
        comparison = await service.comparer.compare(await task_of(service, "many"), features, [0, 1])
    assert [item.split(":")[0] for item in comparison.not_run] == ["autoclip"]
    assert "zero-shot" in [method.method for method in comparison.methods]


# --- with examples -------------------------------------------------------------------------------------------------

TRUTH = np.arange(60) % 3
POOL = rows_about(np.arange(60) % 3, 5)
NO_POOL = np.zeros((0, 16), np.float32)
NAMES_ALONE = tuple(ClassEntry(name) for name in ("tomato", "leaf", "sky"))


async def compared_with(service, training, *, classes=NAMES_ALONE, features=None, truth=TRUTH, advance=None):
    await service.label_sets.put("things", classes, "photo")
    rows = rows_about(TRUTH, 1) if features is None else features
    more = {} if advance is None else {"advance": advance}
    return await service.comparer.compare(await task_of(service, "things"), rows, truth, training=training, **more)


def held_out(*, pool=NO_POOL, labels=TRUTH):
    return TrainingData.held_out(rows_about(TRUTH, 1), labels, pool)


async def test_with_labelled_and_unlabelled_examples_all_comparable_methods_are_in_the_table(service):
    """TDA, which adapts to the images it classifies, cannot be compared."""
    comparison = await compared_with(service, held_out(pool=POOL))
    assert [item.method for item in comparison.methods] == [
        name for name, method in METHODS.items() if not (method.is_control or method.stateful)
    ]
    assert (comparison.labelled, comparison.unlabelled, comparison.folds) == (60, 60, 5)
    assert comparison.not_run == ()


@pytest.mark.parametrize(
    ("training", "need"),
    [(held_out(), Need.POOL), (TrainingData(Examples(pool_features=POOL)), Need.SUPPORT)],
    ids=["labelled", "unlabelled"],
)
async def test_methods_without_their_training_data_are_named(service, training, need):
    comparison = await compared_with(service, training)
    lacking = {name for name, method in METHODS.items() if need in method.learns}
    assert {item.partition(":")[0] for item in comparison.not_run} == lacking
    assert all(item.endswith(f"there are no {need}") for item in comparison.not_run)
    assert not lacking & {item.method for item in comparison.methods}


async def test_other_images_are_classified_with_fits_on_all_examples(service):
    labels = np.arange(30) % 3
    comparison = await compared_with(service, TrainingData(Examples(rows_about(labels, 7), labels, POOL)))
    assert (comparison.images, comparison.labelled, comparison.unlabelled, comparison.folds) == (60, 30, 60, 0)
    assert report_of(comparison, "gda").evaluation.top1 > 0.9


async def test_held_out_images_are_not_used_for_fitting(service):
    """The labels are random: only a method that had seen an image would know its label."""
    labels = np.random.default_rng(0).integers(0, 3, 60)
    comparison = await compared_with(service, held_out(labels=labels), truth=labels)
    for name in ("gda", "tip-adapter"):
        assert report_of(comparison, name).evaluation.top1 < 0.6


async def test_predictions_do_not_depend_on_the_true_classes(service):
    """Predictions for other images than the examples must not depend on their true classes."""
    training = TrainingData(Examples(rows_about(TRUTH, 7), TRUTH, POOL))
    right = await compared_with(service, training)
    wrong = await compared_with(service, training, truth=(TRUTH + 1) % 3)
    for one, other in zip(right.methods, wrong.methods, strict=True):
        taken = [{row.name: row.predicted for row in item.evaluation.classes if row.predicted} for item in (one, other)]
        assert taken[0] == taken[1]


async def test_helpful_examples_are_reported_as_better(service):
    comparison = await compared_with(service, held_out())
    result = comparison.verdict[-1]
    best = max(("gda", "tip-adapter"), key=lambda name: report_of(comparison, name).evaluation.top1)
    assert f"The best method with examples is {best}" in result
    assert "no difference" not in result
    assert "hurt" not in result


async def test_examples_without_an_effect_are_reported(service):
    classes = [ClassEntry(colour) for colour in COLOURS]
    comparison = await compared_with(service, held_out(), classes=classes)
    assert report_of(comparison, "zero-shot").evaluation.top1 == 1
    assert comparison.verdict[-1].endswith("The difference may be due to chance on these images.")


async def test_misleading_examples_are_reported_as_worse(service):
    training = TrainingData(Examples(rows_about(TRUTH, 7), (TRUTH + 1) % 3))
    comparison = await compared_with(service, training, classes=[ClassEntry(colour) for colour in COLOURS])
    assert report_of(comparison, "gda").to_baseline.mean < 0
    assert comparison.verdict[-1].endswith("The examples lower the accuracy on these images.")


async def test_without_examples_the_verdict_does_not_mention_them(service):
    comparison = await compared(service, things(described=False))
    assert not any("examples" in item for item in comparison.verdict)
    assert (comparison.labelled, comparison.unlabelled, comparison.folds) == (0, 0, 0)


async def test_a_cached_fit_on_a_pool_gives_the_same_results(service):
    of_pool = {}
    first = await compared_with(service, TrainingData(Examples(pool_features=POOL), fitted_to_pool=of_pool))
    learned = dict(of_pool)
    assert set(learned) == {name for name, method in METHODS.items() if method.learns == {Need.POOL}}
    second = await compared_with(
        service, TrainingData.held_out(rows_about(TRUTH, 1), TRUTH, POOL, of_pool), truth=TRUTH
    )
    assert all(of_pool[name] is item for name, item in learned.items())
    for name in learned:
        assert report_of(first, name).evaluation == report_of(second, name).evaluation


async def test_each_method_has_its_warnings_and_its_time_per_image(service):
    uneven = rows_about(np.zeros(40, np.int64), 3)
    comparison = await compared_with(service, held_out(pool=uneven), classes=[ClassEntry(colour) for colour in COLOURS])
    assert "only 1.0 of 3 classes" in report_of(comparison, "zlap").warnings[0]
    assert report_of(comparison, "zero-shot").warnings == ()
    assert all(method.ms_per_image > 0 for method in comparison.methods)


async def test_progress_is_reported_per_method(service):
    reported = []

    async def advance(done, total):
        reported.append((done, total))

    await compared_with(service, held_out(pool=POOL), advance=advance)
    assert reported == sorted(reported)
    assert all(done <= total for done, total in reported)


async def test_a_comparison_can_be_stored_as_json(service):
    comparison = await compared_with(service, held_out(pool=POOL), classes=things(described=True))
    assert Comparison.from_json(json.loads(json.dumps(comparison.to_json(), allow_nan=False))) == comparison


async def test_scores_of_fitted_methods_sum_to_one_with_a_sigmoid_encoder(settings):
    async with open_service(settings, [FakeEncoder(logit_bias=-3.0)]) as service:
        comparison = await compared_with(service, held_out(pool=POOL))
    plain = TrainingData.held_out(rows_about(TRUTH, 1), TRUTH, POOL)
    async with open_service(settings, [FakeEncoder()]) as service:
        without = await compared_with(service, plain)
    for name in ("gda", "tip-adapter", "stata"):
        sigmoid, softmax = report_of(comparison, name).evaluation, report_of(without, name).evaluation
        assert sigmoid.top1 == softmax.top1
        assert sigmoid.nll == pytest.approx(softmax.nll, abs=1e-4)
