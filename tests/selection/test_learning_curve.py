"""Learning curves: the accuracy of methods, and of automatic selection, by number of labelled images."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from app.adapters._base import Examples
from app.adapters.gda import GDA
from app.classification.method_names import AUTO, DEFAULT_METHOD
from app.classification.methods import METHODS
from app.classification.request import ClassifyRequest
from app.encoders.fake import FakeEncoder
from app.errors import InvalidFieldError
from app.fewshot import fitting
from app.main import open_service
from app.scoring.measures import bootstrap_interval
from app.selection.learning_curve import CurvePoint, learning_curve
from app.selection.selection import PREFERRED
from app.types import ClassEntry
from tests.shades import COLOURS, THINGS, rows_about

pytestmark = pytest.mark.anyio

NOTHING = np.zeros((0, 16), np.float32)
WITHOUT_LABELS = {
    name
    for name, method in METHODS.items()
    if "labelled images" not in method.learns and not (method.is_control or method.stateful)
}
TRUTH = np.arange(60) % 3
QUERIES = rows_about(TRUTH, 1, spread=1.2)
LABELS = np.arange(90) % 3
SUPPORT = rows_about(LABELS, 2, spread=1.2)
POOL = rows_about(np.arange(60) % 3, 3)


@pytest.fixture
async def service(settings, encoder, anyio_backend):
    async with open_service(settings, [encoder]) as opened:
        for names in (THINGS, COLOURS):
            await opened.label_sets.put(names[0], [ClassEntry(name) for name in names], "{}")
        yield opened


async def curve_of(
    service, names=THINGS, *, truth=TRUTH, labels=LABELS, pool=NOTHING, shots=(2, 8), draws=3, queries=QUERIES, **more
):
    support = (SUPPORT[: len(labels)], labels)
    task = await service.resolver.resolve(ClassifyRequest(label_set=names[0]))
    return await learning_curve(
        service.comparer, task, (queries, truth), support, pool, shots=shots, draws=draws, **more
    )


async def text_of(service):
    """Return the text features of class names that mean nothing."""
    return await service.classifiers.class_rows(
        await service.resolver.resolve(ClassifyRequest(label_set=THINGS[0], method=DEFAULT_METHOD))
    )


def point_of(curve, method, shots):
    (found,) = [point for point in curve.points if (point.method, point.shots) == (method, shots)]
    return found


async def test_fitted_methods_have_a_point_per_number_of_images_and_others_have_one(service):
    curve = await curve_of(service, pool=POOL)
    assert {point.method for point in curve.points if point.shots is None} == WITHOUT_LABELS
    for count in (2, 8):
        some = [point for point in curve.points if point.shots == count]
        assert {item.method for item in some} == {"gda", "tip-adapter", AUTO}
        assert all(len(item.accuracies) == 3 for item in some)
    assert (curve.images, curve.labelled, curve.unlabelled, curve.model) == (60, 90, 60, "fake")


async def test_without_a_pool_methods_that_need_one_have_no_point(service):
    curve = await curve_of(service)
    needs_pool = {name for name, method in METHODS.items() if "unlabelled images" in method.learns}
    assert {point.method for point in curve.points if point.shots is None} == WITHOUT_LABELS - needs_pool


async def test_more_labels_help_if_names_mean_nothing(service):
    curve = await curve_of(service, shots=(1, 30))
    least = point_of(curve, DEFAULT_METHOD, None).mean
    assert least < 0.4
    assert point_of(curve, "gda", 30).mean > point_of(curve, "gda", 1).mean > least
    assert point_of(curve, AUTO, 30).mean > 0.6


async def test_draws_are_reproducible(service):
    first, second = [await curve_of(service) for _ in range(2)]
    assert first == second


async def test_draws_have_different_images(service):
    accuracies = point_of(await curve_of(service, shots=(2,), draws=5), "gda", 2).accuracies
    assert len(set(accuracies)) > 1


async def test_a_class_with_few_images_uses_all_of_them_in_every_draw(service):
    labels = LABELS[:5]
    curve = await curve_of(service, labels=labels, shots=(100,))
    encoder = SimpleNamespace(logit_scale=10.0, logit_bias=None)
    taught = fitting.fit(GDA(), await text_of(service), Examples(SUPPORT[:5], labels), encoder)
    by_hand = (fitting.predict(taught, QUERIES).logits.argmax(axis=1) == TRUTH).mean()
    assert point_of(curve, "gda", 100).accuracies == (by_hand,) * 3


async def test_auto_has_the_accuracy_of_the_method_it_selected_in_each_draw(service):
    curve = await curve_of(service, shots=(1, 2, 4, 8), draws=4)
    for count in (1, 2, 4, 8):
        auto = point_of(curve, AUTO, count)
        assert len(auto.chosen) == 4
        for number, name in enumerate(auto.chosen):
            taken = point_of(curve, name, count if name in {"gda", "tip-adapter"} else None)
            assert auto.accuracies[number] == taken.accuracies[number if taken.shots else 0]


async def test_with_one_image_per_class_auto_selects_gda(service):
    auto = point_of(await curve_of(service, shots=(1,)), AUTO, 1)
    assert auto.chosen == (PREFERRED,) * 3
    assert auto.worse == 0


async def test_auto_does_not_use_the_test_images(service):
    """With other test images and classes, it selects the same methods."""
    curve = await curve_of(service, shots=(1, 4, 8))
    shuffled = await curve_of(service, shots=(1, 4, 8), truth=np.random.default_rng(0).permutation(TRUTH))
    others = await curve_of(service, shots=(1, 4, 8), queries=rows_about((TRUTH + 1) % 3, 9))
    for count in (1, 4, 8):
        chosen = point_of(curve, AUTO, count).chosen
        assert point_of(shuffled, AUTO, count).chosen == point_of(others, AUTO, count).chosen == chosen
    assert point_of(shuffled, "gda", 8).accuracies != point_of(curve, "gda", 8).accuracies


async def test_draws_in_which_auto_lost_are_counted(service):
    """All training labels are wrong, which a method cannot detect, and zero-shot would be right."""
    curve = await curve_of(service, COLOURS, labels=(LABELS + 1) % 3, shots=(20,))
    auto = point_of(curve, AUTO, 20)
    assert DEFAULT_METHOD not in auto.chosen
    assert auto.worse == 3
    assert auto.mean < point_of(curve, DEFAULT_METHOD, None).mean


async def test_no_losses_are_counted_if_auto_does_not_lose(service):
    curve = await curve_of(service)
    assert [point.worse for point in curve.points] == [0] * len(curve.points)


async def test_with_only_a_pool_auto_has_one_point_and_methods_that_need_labels_are_named(service):
    curve = await curve_of(service, COLOURS, labels=np.zeros(0, np.int64), pool=POOL)
    auto = point_of(curve, AUTO, None)
    assert auto.chosen == ("tfup",)
    assert auto.accuracies == point_of(curve, "tfup", None).accuracies
    assert {item.partition(":")[0] for item in curve.not_run} == {"gda", "tip-adapter"}
    assert all(point.shots is None for point in curve.points)


async def test_a_method_that_exceeds_the_memory_is_named_with_and_without_labels(settings):
    small = settings.model_copy(update={"cache_mib": 1 / 128})
    async with open_service(small, [FakeEncoder()]) as service:
        await service.label_sets.put("many", [ClassEntry(f"thing {number}") for number in range(8)], "ensemble")
        for labels in (np.zeros(0, np.int64), LABELS):
            curve = await curve_of(service, ["many"], labels=labels, pool=POOL, shots=(1,), draws=1)
            assert "autoclip" in {item.partition(":")[0] for item in curve.not_run}


async def test_the_interval_is_that_of_zero_shot(service):
    curve = await curve_of(service, shots=(1,), draws=1)
    correct = (QUERIES @ (await text_of(service)).T).argmax(axis=1) == TRUTH
    assert curve.interval == bootstrap_interval(correct.astype(float))
    assert point_of(curve, DEFAULT_METHOD, None).accuracies == (correct.mean(),)


async def test_progress_is_reported_per_draw(service):
    reported = []

    async def advance(done, total):
        reported.append((done, total))

    await curve_of(service, shots=(1, 2), draws=2, advance=advance)
    assert reported == [(number, 4) for number in range(1, 5)]


async def test_no_training_data_and_numbers_below_one_are_rejected(service):
    with pytest.raises(InvalidFieldError, match="give --support or --pool"):
        await curve_of(service, labels=np.zeros(0, np.int64))
    for wrong in ({"shots": (0, 1)}, {"shots": (-1,)}, {"draws": 0}):
        with pytest.raises(InvalidFieldError, match="at least 1"):
            await curve_of(service, **wrong)


async def test_a_curve_is_plain_json(service):
    curve = await curve_of(service, shots=(2,), draws=2)
    result = json.loads(json.dumps(curve.to_json(), allow_nan=False))
    assert [(point["method"], point["shots"], point["accuracies"], point["chosen"]) for point in result["points"]] == [
        (point.method, point.shots, list(point.accuracies), list(point.chosen)) for point in curve.points
    ]


def test_the_deviation_is_that_of_a_sample_and_none_for_a_single_draw():
    point = CurvePoint("gda", 1, (0.2, 0.4, 0.9))
    assert point.mean == pytest.approx(0.5)
    assert point.deviation == pytest.approx(np.sqrt((0.3**2 + 0.1**2 + 0.4**2) / 2))
    assert CurvePoint("gda", 1, (0.2,)).deviation == 0
