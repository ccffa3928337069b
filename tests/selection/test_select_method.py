"""Methods are tried on example images, and one that is better beyond chance is chosen, or none."""

import json

import numpy as np
import pytest

from app.classification.methods import DEFAULT_METHOD, METHODS
from app.classification.resolve import ClassifyRequest
from app.encoders.fake import FakeEncoder
from app.errors import UnknownNameError
from app.main import open_service
from app.scoring.calibration import Calibration
from app.scoring.measures import Difference, Evaluation, paired_difference
from app.selection import selection as selection_module
from app.selection.comparison import MethodReport, no_progress
from app.selection.selection import WITHOUT_LABELS, by_balance, find_best_method
from app.types import ClassEntry
from tests.shades import COLOURS, THINGS, keep, rows_about, shade, shades, stock, unit_rows

pytestmark = pytest.mark.anyio

NO_POOL = np.zeros((0, 16), np.float32)
LEARN_FROM_LABELS = {"gda", "tip-adapter"}


@pytest.fixture
async def service(settings, encoder, anyio_backend):
    async with open_service(settings, [encoder]) as opened:
        yield opened


async def tried(service, name, model="fake"):
    return (await service.method_selector.select_for_every_model(name))[model]


async def selected(service, name, features, labels, pool):
    task = await service.resolver.resolve(ClassifyRequest(label_set=name))
    return await find_best_method(service.comparer, task, features, labels, pool)


# --- labelled images -----------------------------------------------------------------------------------------------


async def test_a_method_that_is_clearly_better_is_chosen_and_it_is_told_by_how_much(service):
    await stock(service, "things")
    told = await tried(service, "things")
    assert told["method"] in LEARN_FROM_LABELS
    for part in ("24 labelled images", told["method"], "100.0 %", "that of zero-shot 33.3 %", "+66.7 points"):
        assert part in told["reason"]


async def test_where_no_method_is_better_zero_shot_stays_and_it_is_told_why(service):
    await stock(service, "colours", COLOURS)
    told = await tried(service, "colours")
    assert told["method"] == DEFAULT_METHOD
    assert "not a significant gain" in told["reason"]


async def test_every_method_that_can_learn_from_what_there_is_is_on_the_board_the_most_accurate_first(service):
    await stock(service, "things", pool=4)
    told = await tried(service, "things")
    rows = {row["method"]: row for row in told["leaderboard"]}
    assert set(rows) == {name for name, method in METHODS.items() if not (method.is_control or method.stateful)}
    accuracies = [row["accuracy"] for row in told["leaderboard"]]
    assert accuracies == sorted(accuracies, reverse=True)
    assert (told["labelled"], told["unlabelled"], told["folds"], told["not_run"]) == (24, 12, 5, [])
    for name, row in rows.items():
        low, high = row["interval"]
        assert low <= row["accuracy"] <= high
        assert (row["to_zero_shot"] is None) == (name == DEFAULT_METHOD)
    assert "only 1.0 of 3 classes" in rows["zlap"]["warnings"][0]


async def test_methods_without_what_they_need_are_named(service):
    await stock(service, "things")
    told = await tried(service, "things")
    in_need = {name for name, method in METHODS.items() if "unlabelled images" in method.learns}
    assert {each.partition(":")[0] for each in told["not_run"]} == in_need
    assert all("there are no unlabelled images" in each for each in told["not_run"])


async def test_labels_without_sense_are_hardly_ever_taken_for_evidence(service):
    """As often as the test allows: one in twenty times, and half of those with zero-shot being the better one."""
    described = [ClassEntry(f"kind {each}", (f"It looks {each}.",), features=(f"part {each}",)) for each in range(3)]
    await service.label_sets.put("kinds", described, "{}")
    taken = []
    for seed in range(48):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 3, 30)
        pool = unit_rows(rng, 30) if seed % 8 == 0 else NO_POOL
        told = await selected(
            service,
            "kinds",
            unit_rows(rng, 30),
            labels,
            pool,
        )
        taken.append(told["method"] != DEFAULT_METHOD)
    # Of 48 at 5 % each there are more than 6 in less than one of a hundred cases.
    assert sum(taken) <= 6


async def test_p_values_are_corrected_for_as_many_methods_as_say_anything_else_than_zero_shot(service):
    await stock(service, "things", pool=4)
    told = await tried(service, "things")
    by_hand = paired_difference(np.ones(24), np.tile([1.0, 0.0, 0.0], 8))
    corrected = {row["method"]: row["to_zero_shot"]["p"] for row in told["leaderboard"] if row["to_zero_shot"]}
    assert {name for name, p in corrected.items() if p < 1} == LEARN_FROM_LABELS
    assert {corrected[name] for name in LEARN_FROM_LABELS} == {2 * by_hand.p}


async def test_a_method_is_not_told_what_it_is_asked(service):
    """Each image lies on an axis of its own, so that whoever saw it knows it, and nobody else can."""
    await service.label_sets.put("things", [ClassEntry(name) for name in THINGS], "{}")
    rng = np.random.default_rng(0)
    features = np.eye(16, dtype=np.float32)[rng.permutation(15)]
    told = await selected(
        service,
        "things",
        features,
        np.arange(15) % 3,
        NO_POOL,
    )
    assert told["method"] == DEFAULT_METHOD
    assert max(row["accuracy"] for row in told["leaderboard"]) < 0.8


def evaluation(accuracy):
    return Evaluation(100, accuracy, (0.0, 1.0), 1.0, accuracy, (), ())


def test_a_method_that_is_worse_beyond_chance_is_never_chosen():
    """Not even where it is the best of all others."""
    reports = [
        MethodReport("gda", 1, evaluation(0.5), (0.4, 0.6), Difference(-0.4, -0.5, -0.3, 0.0001), None),
        MethodReport(DEFAULT_METHOD, 1, evaluation(0.9), (0.8, 1.0), None, None),
    ]
    method, reason = selection_module._by_accuracy(reports, 100)
    assert method == DEFAULT_METHOD
    assert "-40.0 points" in reason


async def test_with_one_image_of_each_class_none_can_be_held_out_and_zero_shot_stays(service):
    await stock(service, "things", labelled=1)
    told = await tried(service, "things")
    assert (told["method"], told["folds"], told["leaderboard"]) == (DEFAULT_METHOD, 0, [])
    assert "no class has two labelled images" in told["reason"]


async def test_of_more_images_than_are_tried_as_many_are_taken_evenly(service, monkeypatch):
    await stock(service, "things", labelled=10)
    monkeypatch.setattr(selection_module, "MAX_IMAGES", 12)
    told = await tried(service, "things")
    assert told["labelled"] == 12
    assert "on 12 labelled images" in told["reason"]
    zero_shot = next(row for row in told["leaderboard"] if row["method"] == DEFAULT_METHOD)
    assert zero_shot["accuracy"] == pytest.approx(1 / 3, abs=0.1)
    # What is chosen learns from all of them.
    classification = await service.pipeline.classify(
        [shade(1, 0)], await service.resolver.resolve(ClassifyRequest(label_set="things"))
    )
    assert classification.examples.labelled == 30


async def test_methods_are_told_to_the_caller_as_they_are_done(service):
    await stock(service, "things", labelled=2)
    told = []

    async def advance(done, total):
        told.append((done, total))

    await service.method_selector.select_for_every_model("things", advance)
    assert told == sorted(told)
    assert all(done <= total for done, total in told)


async def test_nothing_but_numbers_and_words_is_kept_and_every_calibration_comes_back(service):
    await stock(service, "things", pool=4)
    result, revision = await service.method_selector.select(await service.label_sets.get("things"), "fake", no_progress)
    assert revision == (await service.label_sets.get("things")).examples_revision
    kept = json.loads(json.dumps(result, allow_nan=False))
    assert set(kept["calibrations"]) == {row["method"] for row in kept["leaderboard"]}
    for each in kept["calibrations"].values():
        assert Calibration.from_json(each).images == 24


# --- unlabelled images alone ---------------------------------------------------------------------------------------


async def test_unlabelled_images_of_every_class_are_reason_to_spread_labels_over_them(service):
    await stock(service, "colours", COLOURS, labelled=0, pool=8)
    told = await tried(service, "colours")
    assert told["method"] == WITHOUT_LABELS == "zlap"
    assert "24 unlabelled images are spread over 3.0 of 3 classes" in told["reason"]
    assert (told["labelled"], told["unlabelled"], told["leaderboard"]) == (0, 24, [])


async def test_too_few_unlabelled_images_are_no_reason_for_anything(service):
    await stock(service, "colours", COLOURS, labelled=0, pool=7)
    told = await tried(service, "colours")
    assert told["method"] == DEFAULT_METHOD
    assert "21 unlabelled images are too few for 3 classes" in told["reason"]


async def test_unlabelled_images_of_one_class_alone_are_no_reason_either(service):
    await stock(service, "colours", COLOURS, labelled=0)
    await keep(service, "colours", [shade(0, number) for number in range(30)], [None] * 30)
    told = await tried(service, "colours")
    assert told["method"] == DEFAULT_METHOD
    assert "1.0 of 3 classes, too unevenly" in told["reason"]


def test_a_pool_that_covers_half_of_the_classes_evenly_is_just_enough():
    text = np.eye(8, 16, dtype=np.float32)
    for classes, method in [(8, WITHOUT_LABELS), (4, WITHOUT_LABELS), (3, DEFAULT_METHOD), (1, DEFAULT_METHOD)]:
        pool = rows_about(np.arange(96) % classes)
        assert by_balance(pool, text)[0] == method


async def test_without_any_image_zero_shot_stays(service):
    await stock(service, "things")
    await service.examples.delete("things", everything=True)
    told = await tried(service, "things")
    assert (told["method"], told["reason"]) == (
        DEFAULT_METHOD,
        "there are no example images with features of this model",
    )


# --- for every model -----------------------------------------------------------------------------------------------


class ColourBlind(FakeEncoder):
    """Takes every picture for the same."""

    def encode_images(self, pixels):
        rows = super().encode_images(pixels)
        return np.broadcast_to(np.eye(self.embed_dim, dtype=np.float32)[0], rows.shape).copy()


async def test_each_model_that_is_served_gets_a_choice_of_its_own(settings, encoder):
    async with open_service(settings, [encoder, ColourBlind("blind")]) as service:
        await stock(service, "things")
        told = await service.method_selector.select_for_every_model("things")
        assert told["fake"]["method"] in LEARN_FROM_LABELS
        assert told["blind"]["method"] == DEFAULT_METHOD
        for model in ("fake", "blind"):
            selection = await service.selection_reader.stored(await service.label_sets.get("things"), model)
            assert selection.is_current
            assert selection.result["method"] == told[model]["method"]
            assert (await service.resolver.resolve(ClassifyRequest(label_set="things", model=model))).method == told[
                model
            ]["method"]


async def test_what_is_chosen_has_learned_before_it_is_asked_for(service):
    await stock(service, "things")
    await service.prewarmer.idle()
    await tried(service, "things")
    reads = []
    features = service.examples.repository.features

    async def noted(*arguments, **options):
        reads.append(arguments)
        return await features(*arguments, **options)

    service.examples.repository.features = noted
    await service.pipeline.classify(shades(3), await service.resolver.resolve(ClassifyRequest(label_set="things")))
    assert not reads


async def test_a_model_that_is_new_here_learns_from_the_files_that_were_kept(settings, encoder):
    keeping = settings.model_copy(update={"keep_images": True})
    async with open_service(keeping, [encoder]) as service:
        await stock(service, "things", pool=4)
    second = FakeEncoder("second")
    async with open_service(keeping, [encoder, second]) as service:
        told = await service.method_selector.select_for_every_model("things")
        assert (told["second"]["labelled"], told["second"]["unlabelled"]) == (24, 12)
        assert told["second"]["method"] in LEARN_FROM_LABELS
        assert sum(second.image_batches) == 36
        await service.method_selector.select_for_every_model("things")
        assert sum(second.image_batches) == 36


async def test_features_made_of_kept_files_leave_the_choices_of_other_models_current(settings, encoder):
    """Nothing has changed for these, and to try the methods on them once more would find the same."""
    keeping = settings.model_copy(update={"keep_images": True})
    async with open_service(keeping, [encoder]) as service:
        await stock(service, "things")
    async with open_service(keeping, [encoder, FakeEncoder("second")]) as service:
        await service.method_selector.select_for_every_model("things")
        assert [
            (await service.selection_reader.stored(await service.label_sets.get("things"), model)).is_current
            for model in ("fake", "second")
        ] == [True, True]


async def test_a_model_that_is_new_here_has_nothing_to_learn_from_where_no_files_were_kept(settings, encoder):
    async with open_service(settings, [encoder]) as service:
        await stock(service, "things")
    async with open_service(settings, [encoder, FakeEncoder("second")]) as service:
        told = await service.method_selector.select_for_every_model("things")
        assert told["fake"]["method"] in LEARN_FROM_LABELS
        assert (told["second"]["method"], told["second"]["labelled"]) == (DEFAULT_METHOD, 0)


async def test_a_label_set_that_is_not_there_is_told(service):
    with pytest.raises(UnknownNameError, match="label set 'things'"):
        await service.method_selector.select_for_every_model("things")
