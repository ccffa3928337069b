"""Methods are compared on example images; one with a lower loss is selected, otherwise zero-shot."""

import json
from unittest import mock

import numpy as np
import pytest

from app.classification.method_names import DEFAULT_METHOD
from app.classification.methods import METHODS
from app.classification.request import ClassifyRequest
from app.encoders.fake import FakeEncoder
from app.errors import UnknownNameError
from app.main import open_service
from app.scoring.calibration import Calibration, Rejection
from app.scoring.measures import Difference, Evaluation, paired_difference
from app.scoring.thresholds import logit
from app.selection import selection as selection_module
from app.selection.comparison import MethodReport, no_progress
from app.selection.selection import PREFERRED, WITHOUT_LABELS, by_balance, find_best_method
from app.types import ClassEntry, RejectBy
from tests.shades import COLOURS, THINGS, keep, rows_about, shade, shades, stock, unit_rows

pytestmark = pytest.mark.anyio

NO_POOL = np.zeros((0, 16), np.float32)
LEARN_FROM_LABELS = {"gda", "tip-adapter"}


@pytest.fixture
async def service(settings, encoder, anyio_backend):
    async with open_service(settings, [encoder]) as opened:
        yield opened


async def select_on_examples(service, name, model="fake"):
    return (await service.method_selector.select_for_every_model(name))[model]


async def selected(service, name, features, labels, pool):
    task = await service.resolver.resolve(ClassifyRequest(label_set=name))
    return await find_best_method(service.comparer, task, features, labels, pool)


# --- labelled images -----------------------------------------------------------------------------------------------


async def test_a_clearly_better_method_is_selected_with_its_gain_as_the_reason(service):
    await stock(service, "things")
    result = await select_on_examples(service, "things")
    assert result["method"] in LEARN_FROM_LABELS
    for part in ("24 labelled images", result["method"], "100.0 %", "that of zero-shot 33.3 %", "+66.7 points"):
        assert part in result["reason"]


async def test_a_surer_method_is_selected_where_zero_shot_is_right_already(service):
    await stock(service, "colours", COLOURS)
    result = await select_on_examples(service, "colours")
    assert result["method"] == PREFERRED
    assert "its accuracy is 100.0 % and that of zero-shot 100.0 %" in result["reason"]
    assert "the loss is significantly lower" in result["reason"]


async def test_the_leaderboard_has_every_applicable_method_best_first(service):
    await stock(service, "things", pool=4)
    result = await select_on_examples(service, "things")
    rows = {row["method"]: row for row in result["leaderboard"]}
    assert set(rows) == {name for name, method in METHODS.items() if not (method.is_control or method.stateful)}
    accuracies = [row["accuracy"] for row in result["leaderboard"]]
    assert accuracies == sorted(accuracies, reverse=True)
    assert (result["labelled"], result["unlabelled"], result["folds"], result["not_run"]) == (24, 12, 5, [])
    for name, row in rows.items():
        low, high = row["interval"]
        assert low <= row["accuracy"] <= high
        assert (row["to_zero_shot"] is None) == (name == DEFAULT_METHOD)
    assert "only 1.0 of 3 classes" in rows["zlap"]["warnings"][0]


async def test_methods_without_their_training_data_are_named(service):
    await stock(service, "things")
    result = await select_on_examples(service, "things")
    in_need = {name for name, method in METHODS.items() if "unlabelled images" in method.learns}
    assert {item.partition(":")[0] for item in result["not_run"]} == in_need
    assert all("there are no unlabelled images" in item for item in result["not_run"])


async def test_random_labels_rarely_select_a_method_that_needs_certainty(service):
    described = [
        ClassEntry(f"kind {number}", (f"It looks {number}.",), features=(f"part {number}",)) for number in range(3)
    ]
    await service.label_sets.put("kinds", described, "{}")
    taken = []
    for seed in range(24):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 3, 30)
        pool = unit_rows(rng, 30) if seed % 8 == 0 else NO_POOL
        result = await selected(
            service,
            "kinds",
            unit_rows(rng, 30),
            labels,
            pool,
        )
        taken.append(result["method"] not in {DEFAULT_METHOD, PREFERRED})
    # At 5 %, more than 4 of 24 occur in less than one of a hundred cases.
    assert sum(taken) <= 4


async def test_p_values_are_corrected_for_methods_that_differ_from_zero_shot(service):
    await stock(service, "things", pool=4)
    result = await select_on_examples(service, "things")
    by_hand = paired_difference(np.ones(24), np.tile([1.0, 0.0, 0.0], 8))
    corrected = {row["method"]: row["to_zero_shot"]["p"] for row in result["leaderboard"] if row["to_zero_shot"]}
    assert {name for name, p in corrected.items() if p < 1} == LEARN_FROM_LABELS
    assert {corrected[name] for name in LEARN_FROM_LABELS} == {2 * by_hand.p}


async def test_held_out_images_are_not_used_for_fitting(service):
    """Each image has an axis of its own, so only a method that has seen it can know its label."""
    await service.label_sets.put("things", [ClassEntry(name) for name in THINGS], "{}")
    rng = np.random.default_rng(0)
    features = np.eye(16, dtype=np.float32)[rng.permutation(15)]
    result = await selected(
        service,
        "things",
        features,
        np.arange(15) % 3,
        NO_POOL,
    )
    assert result["method"] == DEFAULT_METHOD
    assert max(row["accuracy"] for row in result["leaderboard"]) < 0.8


def evaluation(accuracy):
    return Evaluation(100, accuracy, (0.0, 1.0), 1.0, accuracy, (), 0, (), 0)


HIGHER, SAME, LOWER = (
    Difference(0.2, 0.1, 0.3, 0.001),
    Difference(0.0, -0.1, 0.1, 1.0),
    Difference(-0.4, -0.5, -0.3, 0.001),
)


@pytest.mark.parametrize(
    ("gda", "tip", "difference", "selected", "part"),
    [
        ([0.5] * 20, 0.6, HIGHER, "gda", "which is a significant gain"),
        ([0.5] * 20, 0.6, SAME, "gda", "the loss is significantly lower"),
        ([0.5] * 20, 0.6, LOWER, "gda", "the loss is significantly lower"),
        ([0.1, 1.8] * 10, 1.2, SAME, "gda", "this is not certain, and the difference is too small"),
        ([0.1, 1.5] * 10, 1.2, SAME, "gda", "this is not certain; about 15 more labelled images would"),
        # Only gda needs no certainty.
        ([1.0] * 20, 0.99, SAME, "tip-adapter", "the loss of tip-adapter is 0.990"),
        ([0.1, 1.5] * 10, 0.7, SAME, "gda", "the loss of gda is 0.800"),
        ([0.8] * 20, 0.7, SAME, "tip-adapter", "the loss of tip-adapter is 0.700"),
        # Zero-shot, and what came nearest.
        ([1.0] * 20, 1.2, HIGHER, DEFAULT_METHOD, "a gain of 0.000 ± 0.000; its accuracy"),
        ([1.5] * 20, 1.7, HIGHER, DEFAULT_METHOD, "the loss of gda is 1.500 and that of zero-shot 1.000"),
        ([0.5, 1.7] * 10, 1.2, SAME, DEFAULT_METHOD, "this is not certain; about 83 more labelled images would"),
    ],
)
def test_the_lower_loss_decides_between_zero_shot_and_gda_and_certainty_for_other_methods(
    gda, tip, difference, selected, part
):
    reports = [
        MethodReport("gda", 1, evaluation(0.5), (0.4, 0.6), difference, None),
        MethodReport("tip-adapter", 1, evaluation(0.9), (0.8, 1.0), HIGHER, None),
        MethodReport("cupl", 1, evaluation(0.5), (0.4, 0.6), SAME, None),
        MethodReport(DEFAULT_METHOD, 1, evaluation(0.5), (0.4, 0.6), None, None),
    ]
    held_out = {"gda": np.array(gda), "tip-adapter": np.full(20, tip), "cupl": np.full(20, 0.01)}
    held_out[DEFAULT_METHOD] = np.ones(20)
    method, reason = selection_module._by_loss(reports, held_out)
    assert method == selected
    assert part in reason


async def test_with_one_image_per_class_gda_is_selected_unseen(service):
    await stock(service, "things", labelled=1)
    result = await select_on_examples(service, "things")
    assert (result["method"], result["folds"], result["leaderboard"]) == (PREFERRED, 0, [])
    assert "no class has two labelled images" in result["reason"]
    resolved = await service.resolver.resolve(ClassifyRequest(label_set="things"))
    classification = await service.pipeline.classify(shades(3), resolved)
    assert (resolved.method, classification.examples.labelled) == (PREFERRED, 3)


async def test_a_large_number_of_images_is_sampled_evenly_for_the_comparison(service, monkeypatch):
    await stock(service, "things", labelled=10)
    monkeypatch.setattr(selection_module, "MAX_IMAGES", 12)
    result = await select_on_examples(service, "things")
    assert result["labelled"] == 12
    assert "on 12 labelled images" in result["reason"]
    zero_shot = next(row for row in result["leaderboard"] if row["method"] == DEFAULT_METHOD)
    assert zero_shot["accuracy"] == pytest.approx(1 / 3, abs=0.1)
    # The selected method is fitted on all of them.
    classification = await service.pipeline.classify(
        [shade(1, 0)], await service.resolver.resolve(ClassifyRequest(label_set="things"))
    )
    assert classification.examples.labelled == 30


async def test_progress_is_reported_per_method(service):
    await stock(service, "things", labelled=2)
    reported = []

    async def advance(done, total):
        reported.append((done, total))

    await service.method_selector.select_for_every_model("things", advance)
    assert reported == sorted(reported)
    assert all(done <= total for done, total in reported)


async def test_a_selection_is_plain_json_with_every_calibration(service):
    await stock(service, "things", pool=4)
    result, revision = await service.method_selector.select(await service.label_sets.get("things"), "fake", no_progress)
    assert revision == (await service.label_sets.get("things")).examples_revision
    kept = json.loads(json.dumps(result, allow_nan=False))
    assert set(kept["calibrations"]) == {row["method"] for row in kept["leaderboard"]}
    for calibration in kept["calibrations"].values():
        assert Calibration.from_json(calibration).images == 24
    assert Rejection.from_json(kept["rejection"]).images == 24


async def test_rejection_is_by_class_means_if_each_class_has_two_images_and_else_by_the_text(service):
    await stock(service, "pairs", COLOURS, labelled=2)
    await stock(service, "few", COLOURS, labelled=0)
    await keep(service, "few", shades(6)[:5], [*COLOURS, *COLOURS][:5])
    for name, by, images in (("pairs", RejectBy.CLASS_MEAN, 6), ("few", RejectBy.SIMILARITY, 5)):
        label_set = await service.label_sets.get(name)
        result, _ = await service.method_selector.select(label_set, "fake")
        rejection = Rejection.from_json(result["rejection"])
        assert (rejection.by, rejection.images) == (by, images)
        rows = (await service.examples.features(label_set, "fake")).support_features
        if by is RejectBy.SIMILARITY:
            text = await service.classifiers.class_rows(await service.resolver.resolve_label_set(label_set))
            scores = (rows @ text.T).max(axis=1)
        else:
            # Of each class one image is held out and the other is the mean, for both folds.
            assert result["folds"] == 2
            cosines = (rows @ rows.T)[:3, 3:]
            scores = [*cosines.max(axis=1), *cosines.max(axis=0)]
        # Features are stored in half precision, so rows are not exactly of length 1.
        np.testing.assert_allclose(rejection.scores, np.sort(scores), atol=5e-4)


async def test_similarities_with_other_texts_are_not_compared_with_those_of_zero_shot(service):
    """Methods with descriptions have similarities of their own, so images are rejected by their scores."""
    await stock(service, "few", COLOURS, labelled=0)
    await keep(service, "few", shades(5), [*COLOURS, *COLOURS][:5])
    await service.method_selector.select_for_every_model("few")
    for method in ("zero-shot", "gda", "cupl", "autoclip"):
        request = ClassifyRequest(label_set="few", method=method, false_rejection_rate=0.2)
        expected = RejectBy.SIMILARITY if method in {"zero-shot", "gda"} else RejectBy.SCORE
        assert (await service.resolver.resolve(request)).scoring.reject_by is expected, method


# --- several labels per image --------------------------------------------------------------------------------------


async def keep_both(service, name, images):
    """Add images that have the classes red and blue."""
    prepared = await service.examples.prepare(name, images, [("red", "blue")] * len(images))
    await service.examples.add(name, prepared)


async def test_thresholds_are_fitted_to_all_labelled_images_and_stored_with_the_selection(service):
    await stock(service, "colours", ("red", "green", "blue", "grey"), labelled=0)
    await keep(service, "colours", shades(9), [*COLOURS] * 3)
    before = await select_on_examples(service, "colours")
    assert set(before["thresholds"]) == set(COLOURS)
    assert 0 < before["shared_threshold"] < 1
    await keep_both(service, "colours", [shade(0, number) for number in range(50, 60)])
    after = await select_on_examples(service, "colours")
    assert after["thresholds"] != before["thresholds"]
    assert (after["labelled"], after["leaderboard"][0]["method"]) == (9, before["leaderboard"][0]["method"])
    assert await select_on_examples(service, "colours") == after | {"leaderboard": mock.ANY}
    label_set = await service.label_sets.get("colours")
    selected = await service.selection_reader.get(label_set, "fake")
    thresholds = selected.label_thresholds(label_set.classes, 0.7)
    by_name = after["thresholds"]
    assert thresholds == (by_name["red"], by_name["green"], by_name["blue"], after["shared_threshold"])


async def test_a_request_of_several_labels_has_the_thresholds_of_the_examples_unless_it_or_the_class_has_one(service):
    classes = [ClassEntry("red"), ClassEntry("green", threshold=0.25), ClassEntry("blue")]
    await service.label_sets.put("colours", classes, "{}")
    await keep(service, "colours", shades(9), [*COLOURS] * 3)
    fitted = (await select_on_examples(service, "colours"))["thresholds"]

    async def thresholds(**fields):
        request = ClassifyRequest(label_set="colours", multi_label=True, **fields)
        return (await service.resolver.resolve(request)).scoring.thresholds

    assert await thresholds() == (fitted["red"], 0.25, fitted["blue"])
    assert await thresholds(reject_below=0.6) == (0.6,) * 3
    # The scores of other texts are others.
    assert await thresholds(template="a photo of {}") == await thresholds(method="cupl") == (0.5, 0.25, 0.5)
    await keep(service, "colours", [shade(0, 99)], ["red"])
    assert await thresholds() == (fitted["red"], 0.25, fitted["blue"])
    # So are those of other prompts in another version.
    await service.label_sets.put("colours", classes, "a photo of {}")
    assert await thresholds() == (0.5, 0.25, 0.5)
    await select_on_examples(service, "colours")
    assert await thresholds() != (0.5, 0.25, 0.5)
    await service.examples.delete("colours", classname="red")
    assert await thresholds() == (0.5, 0.25, 0.5)


async def test_scores_of_several_labels_are_calibrated_on_the_examples(service):
    await stock(service, "colours", (*COLOURS, "grey"), labelled=0)
    await keep(service, "colours", shades(36), [*COLOURS] * 12)
    label_set = await service.label_sets.get("colours")
    stored = await service.examples.labelled_features(label_set, "fake")

    async def answered():
        task = await service.resolver.resolve(ClassifyRequest(label_set="colours", multi_label=True))
        return task.scoring.label_scalings, await service.pipeline.predict(task, stored.features)

    none, before = await answered()
    await service.method_selector.select_for_every_model("colours")
    scalings, after = await answered()
    assert (none, len(scalings)) == ((), 4)
    slopes, intercepts = np.array(scalings).T
    np.testing.assert_allclose(logit(after.scores), slopes * logit(before.scores) + intercepts, atol=2e-2)
    assert after.ranked.tolist() == np.argsort(-after.scores, axis=1, kind="stable").tolist()
    losses = [
        -np.log(np.where(stored.is_label, each.scores, 1 - each.scores).clip(1e-6)).mean() for each in (before, after)
    ]
    assert losses[1] < losses[0]
    await service.label_sets.add_classes("colours", [ClassEntry("black")])
    assert (
        await service.resolver.resolve(ClassifyRequest(label_set="colours", multi_label=True))
    ).scoring.label_scalings == ()


async def test_methods_of_one_class_per_image_are_compared_for_a_label_set_of_several_labels(service):
    """A request may ask for one label, and names the method then."""
    await service.label_sets.put("things", [ClassEntry(name) for name in THINGS], "{}", multi_label=True)
    await keep(service, "things", shades(24), [*THINGS] * 8)
    result = await select_on_examples(service, "things")
    assert result["method"] in LEARN_FROM_LABELS
    task = await service.resolver.resolve(ClassifyRequest(label_set="things"))
    assert (task.method, task.scoring.multi_label) == (DEFAULT_METHOD, True)
    assert task.scoring.thresholds == tuple(result["thresholds"][name] for name in THINGS)


async def test_images_of_several_classes_alone_select_zero_shot_and_have_thresholds(service):
    await stock(service, "colours", COLOURS, labelled=0)
    await keep_both(service, "colours", shades(6))
    result = await select_on_examples(service, "colours")
    assert result["method"] == DEFAULT_METHOD
    assert result["reason"] == "all 6 example images have several classes each, and methods need one"
    assert set(result["thresholds"]) == {"red", "blue"}


async def test_without_labelled_images_thresholds_are_the_default(service):
    await stock(service, "colours", COLOURS, labelled=0, pool=2)
    result = await select_on_examples(service, "colours")
    assert (result["thresholds"], result["shared_threshold"]) == ({}, None)
    label_set = await service.label_sets.get("colours")
    selected = await service.selection_reader.get(label_set, "fake")
    assert selected.label_thresholds(label_set.classes, 0.7) == (0.7,) * 3


# --- unlabelled images alone ---------------------------------------------------------------------------------------


async def test_unlabelled_images_of_every_class_select_tfup(service):
    await stock(service, "colours", COLOURS, labelled=0, pool=8)
    result = await select_on_examples(service, "colours")
    assert result["method"] == WITHOUT_LABELS == "tfup"
    assert "24 unlabelled images are spread over 3.0 of 3 classes" in result["reason"]
    assert (result["labelled"], result["unlabelled"], result["leaderboard"]) == (0, 24, [])


async def test_too_few_unlabelled_images_select_zero_shot(service):
    await stock(service, "colours", COLOURS, labelled=0, pool=7)
    result = await select_on_examples(service, "colours")
    assert result["method"] == DEFAULT_METHOD
    assert "21 unlabelled images are too few for 3 classes" in result["reason"]


async def test_unlabelled_images_of_one_class_select_zero_shot(service):
    await stock(service, "colours", COLOURS, labelled=0)
    await keep(service, "colours", [shade(0, number) for number in range(30)], [None] * 30)
    result = await select_on_examples(service, "colours")
    assert result["method"] == DEFAULT_METHOD
    assert "1.0 of 3 classes, too unevenly" in result["reason"]


def test_a_pool_must_cover_four_fifths_of_the_classes_evenly():
    text = np.eye(10, 16, dtype=np.float32)
    for classes, method in [(10, WITHOUT_LABELS), (9, WITHOUT_LABELS), (7, DEFAULT_METHOD), (1, DEFAULT_METHOD)]:
        pool = rows_about(np.arange(630) % classes)
        assert by_balance(pool, text)[0] == method


async def test_without_images_zero_shot_is_selected(service):
    await stock(service, "things")
    await service.examples.delete("things", everything=True)
    result = await select_on_examples(service, "things")
    assert (result["method"], result["reason"]) == (
        DEFAULT_METHOD,
        "there are no example images with features of this model",
    )


# --- for every model -----------------------------------------------------------------------------------------------


class ColourBlind(FakeEncoder):
    """Encodes every image as the same."""

    def encode_images(self, pixels):
        rows = super().encode_images(pixels)
        return np.broadcast_to(np.eye(self.embed_dim, dtype=np.float32)[0], rows.shape).copy()


async def test_each_served_model_has_its_own_selection(settings, encoder):
    async with open_service(settings, [encoder, ColourBlind("blind")]) as service:
        await stock(service, "things")
        result = await service.method_selector.select_for_every_model("things")
        assert result["fake"]["method"] in LEARN_FROM_LABELS
        assert result["blind"]["method"] == DEFAULT_METHOD
        for model in ("fake", "blind"):
            selection = await service.selection_reader.stored(await service.label_sets.get("things"), model)
            assert selection.is_current
            assert selection.result["method"] == result[model]["method"]
            assert (await service.resolver.resolve(ClassifyRequest(label_set="things", model=model))).method == result[
                model
            ]["method"]


async def test_a_selected_method_is_fitted_before_the_first_request(service):
    await stock(service, "things")
    await service.prewarmer.idle()
    await select_on_examples(service, "things")
    reads = []
    features = service.examples.repository.features

    async def recorded(*arguments, **options):
        reads.append(arguments)
        return await features(*arguments, **options)

    service.examples.repository.features = recorded
    await service.pipeline.classify(shades(3), await service.resolver.resolve(ClassifyRequest(label_set="things")))
    assert not reads


async def test_a_new_model_is_fitted_on_stored_files(settings, encoder):
    keeping = settings.model_copy(update={"keep_images": True})
    async with open_service(keeping, [encoder]) as service:
        await stock(service, "things", pool=4)
    second = FakeEncoder("second")
    async with open_service(keeping, [encoder, second]) as service:
        result = await service.method_selector.select_for_every_model("things")
        assert (result["second"]["labelled"], result["second"]["unlabelled"]) == (24, 12)
        assert result["second"]["method"] in LEARN_FROM_LABELS
        assert sum(second.image_batches) == 36
        await service.method_selector.select_for_every_model("things")
        assert sum(second.image_batches) == 36


async def test_features_for_a_new_model_keep_the_selections_of_other_models_current(settings, encoder):
    """Nothing has changed for them, so a new comparison would give the same result."""
    keeping = settings.model_copy(update={"keep_images": True})
    async with open_service(keeping, [encoder]) as service:
        await stock(service, "things")
    async with open_service(keeping, [encoder, FakeEncoder("second")]) as service:
        await service.method_selector.select_for_every_model("things")
        assert [
            (await service.selection_reader.stored(await service.label_sets.get("things"), model)).is_current
            for model in ("fake", "second")
        ] == [True, True]


async def test_a_new_model_has_no_training_data_without_stored_files(settings, encoder):
    async with open_service(settings, [encoder]) as service:
        await stock(service, "things")
    async with open_service(settings, [encoder, FakeEncoder("second")]) as service:
        result = await service.method_selector.select_for_every_model("things")
        assert result["fake"]["method"] in LEARN_FROM_LABELS
        assert (result["second"]["method"], result["second"]["labelled"]) == (DEFAULT_METHOD, 0)


async def test_an_unknown_label_set_is_an_error(service):
    with pytest.raises(UnknownNameError, match="label set 'things'"):
        await service.method_selector.select_for_every_model("things")
