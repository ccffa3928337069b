"""Temperatures are optimal, scores are finite, and guarantees for new images hold."""

import json
from math import ceil, exp, floor, inf, log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest

from app.scoring.calibration import (
    MAX_KEPT_SCORES,
    Calibration,
    Rejection,
    calibrate,
    conformal_quantile,
    energy,
    false_rejection_rate,
    fit_temperature,
    max_concept_matching,
    prediction_sets,
    rejection_threshold,
    tempered_loss,
)
from app.scoring.measures import expected_calibration_error, negative_log_likelihood
from app.scoring.numerics import tempered_softmax
from app.types import RejectBy

RATES = [0.01, 0.05, 0.07, 0.1, 0.2, 0.29, 0.5, 0.9]


def labelled(seed, images, classes, *, temperature=1.0, spread=3.0):
    """Return logits, and labels drawn from their softmax at a temperature."""
    rng = np.random.default_rng(seed)
    logits = spread * rng.standard_normal((images, classes))
    shares = tempered_softmax(logits, temperature).cumsum(axis=1)
    return logits, (shares < rng.random((images, 1))).sum(axis=1).clip(max=classes - 1)


def penalised(logits, labels, temperature):
    """Return the objective that the temperature minimises."""
    total = 0.0
    for row, label in zip(logits / temperature, labels, strict=True):
        total += log(sum(exp(value - row.max()) for value in row)) + row.max() - row[label]
    return total + 1 / temperature + log(temperature)


@st.composite
def answered(draw):
    images, classes = draw(st.integers(1, 30)), draw(st.integers(1, 8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = draw(st.sampled_from([0.01, 1.0, 30.0])) * rng.standard_normal((images, classes))
    return logits, rng.integers(0, classes, images)


# A few distinct values produce many ties, many values produce almost none.
pools = st.tuples(st.integers(2, 60), st.integers(1, 80), st.integers(0, 2**32 - 1)).map(
    lambda drawn: np.random.default_rng(drawn[2]).integers(0, drawn[1], drawn[0]) / drawn[1]
)


# --- temperature -----------------------------------------------------------------------------------------------------


@given(answered())
@settings(deadline=None)
def test_the_temperature_minimises_the_objective(task):
    fitted = fit_temperature(*task)
    assert 0.01 <= fitted <= 100
    least = penalised(*task, fitted)
    for other in (*np.geomspace(0.01, 100, 60), fitted * 0.99, min(fitted * 1.01, 100)):
        if other >= 0.01:
            assert least <= penalised(*task, other) + 1e-7 * max(1, abs(least))


@given(answered())
@settings(deadline=None)
def test_the_optimality_condition_holds_at_the_temperature(task):
    logits, labels = task
    fitted = fit_temperature(logits, labels)
    means = (tempered_softmax(logits, fitted) * logits).sum(axis=1)
    lacking = (means - logits[np.arange(len(logits)), labels]).sum()
    if 0.011 < fitted < 99:
        assert fitted == pytest.approx(1 + lacking, rel=1e-4)
    assert fitted >= 1 / (1 + len(logits) * log(logits.shape[1])) * (1 - 1e-6)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5, 8.0])
def test_the_temperature_of_generated_labels_is_recovered(temperature):
    logits, labels = labelled(0, 4000, 10, temperature=temperature, spread=3 * temperature)
    assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.05)


def test_calibration_improves_the_scores_of_new_images():
    logits, labels = labelled(1, 2000, 8, temperature=3.0, spread=6.0)
    fitted = fit_temperature(logits[:1000], labels[:1000])
    before, after = tempered_softmax(logits[1000:], 1.0), tempered_softmax(logits[1000:], fitted)
    errors = [expected_calibration_error(scores, labels[1000:]) for scores in (before, after)]
    assert errors[1] < errors[0] / 3
    assert negative_log_likelihood(after, labels[1000:]) < negative_log_likelihood(before, labels[1000:])


def test_perfect_labels_or_a_single_image_keep_the_temperature_near_that_of_the_model():
    logits = 10 * np.eye(5)[np.arange(200) % 5]
    labels = np.arange(200) % 5
    assert 0.5 < fit_temperature(logits, labels) < 1
    assert fit_temperature(logits[:1], labels[:1]) == pytest.approx(1, abs=0.01)
    assert 1 < fit_temperature(logits[:1], labels[1:2]) < 11
    assert fit_temperature(np.zeros((9, 1)), np.zeros(9, int)) == pytest.approx(1, abs=1e-3)


def test_random_labels_of_confident_logits_give_the_maximum_temperature():
    logits = 1e4 * np.eye(5)[np.arange(200) % 5]
    assert fit_temperature(logits, (np.arange(200) + 1) % 5) == pytest.approx(100, rel=1e-3)


@given(answered(), st.floats(-1e3, 1e3))
@settings(deadline=None)
def test_the_temperature_does_not_depend_on_a_bias_or_the_order_of_the_images(task, bias):
    logits, labels = task
    fitted = fit_temperature(logits, labels)
    assert fit_temperature(logits[::-1] + bias, labels[::-1]) == pytest.approx(fitted, rel=1e-4)


@pytest.mark.parametrize(
    ("logits", "labels", "problem"),
    [
        ([[0.0, np.nan]], [0], "finite"),
        ([[0.0, -np.inf]], [0], "finite"),
        ([[np.inf, 0.0]], [0], "finite"),
        ([[0.0, 1.0]], [2], r"outside 0\.\.1"),
        ([[0.0, 1.0]], [-1], r"outside 0\.\.1"),
        ([[0.0, 1.0]], [0, 1], "shape"),
        ([0.0, 1.0], [0, 1], "shape"),
        (np.zeros((0, 3)), np.zeros(0, int), "shape"),
        (np.zeros((3, 0)), np.zeros(3, int), "shape"),
    ],
)
@pytest.mark.parametrize("learn", [fit_temperature, calibrate])
def test_logits_and_labels_of_different_shapes_are_rejected(learn, logits, labels, problem):
    with pytest.raises(ValueError, match=problem):
        learn(np.array(logits), np.array(labels))


@given(st.integers(0, 2**32 - 1))
def test_the_loss_is_that_at_the_optimal_temperature(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, 30)
    logits = rng.uniform(0.1, 30) * (rng.standard_normal((30, 4)) + np.eye(4)[labels])

    def loss(log_temperature):
        scaled = logits * 2.0**-log_temperature
        return (np.log(np.exp(scaled).sum(axis=1)) - scaled[np.arange(30), labels]).mean()

    best = minimize_scalar(loss, bounds=(-4, 10), method="bounded")
    loss, temperature = tempered_loss(logits, labels)
    assert loss == pytest.approx(best.fun, abs=1e-3)
    assert temperature >= 0.5


def test_the_loss_does_not_depend_on_the_scale_of_the_logits():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 50)
    logits = rng.standard_normal((50, 4)) + np.eye(4)[labels]
    (loss, temperature), (loss_of_20, temperature_of_20) = (
        tempered_loss(logits, labels),
        tempered_loss(20 * logits, labels),
    )
    assert loss_of_20 == pytest.approx(loss, abs=1e-4)
    assert temperature_of_20 == pytest.approx(20 * temperature, rel=0.02)


# --- scores for images of unknown classes -------------------------------------------------------------------------


@given(answered(), st.sampled_from([0.01, 0.5, 1.0, 7.0]))
def test_both_unknown_class_scores_equal_the_formulas_of_their_papers(task, temperature):
    logits, _ = task
    for row, matched, free in zip(
        logits, max_concept_matching(logits, temperature), energy(logits, temperature), strict=True
    ):
        shares = [exp((value - row.max()) / temperature) for value in row]
        assert matched == pytest.approx(1 / sum(shares))
        assert free == pytest.approx(-row.max() - temperature * log(sum(shares)))
        assert 1 / len(row) - 1e-12 <= matched <= 1
        assert -row.max() - temperature * log(len(row)) - 1e-9 <= free <= -row.max() + 1e-9


def test_logits_of_any_size_and_precision_give_finite_scores():
    logits = np.array([[1e30, -1e30], [-1e30, -1e30], [3e38, 3e38], [0, 0]], np.float32)
    np.testing.assert_allclose(max_concept_matching(logits), [1, 0.5, 0.5, 0.5])
    assert np.isfinite(energy(logits, 0.01)).all()
    assert energy(logits)[3] == pytest.approx(-log(2))


def test_the_default_temperatures_are_one():
    cosines = np.array([[0.1, 0.3, 0.2]])
    assert max_concept_matching(cosines) == pytest.approx(tempered_softmax(cosines, 1.0).max())
    assert energy(cosines) == energy(cosines, 1.0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, inf, np.nan])
@pytest.mark.parametrize("score", [max_concept_matching, energy])
def test_a_temperature_that_is_not_positive_is_rejected(score, temperature):
    with pytest.raises(ValueError, match="temperature"):
        score(np.zeros((1, 2)), temperature)


# --- rejection -------------------------------------------------------------------------------------------------------


@given(pools, st.sampled_from(RATES))
def test_the_rejection_rate_is_guaranteed_for_exchangeable_images(pool, rate):
    # Each image of the pool is equally likely to be the new one, so this is exact, not a sample.
    rejected = [pool[new] < rejection_threshold(np.delete(pool, new), rate) for new in range(len(pool))]
    assert sum(rejected) <= rate * len(pool) + 1e-9
    if len(set(pool)) == len(pool):
        assert sum(rejected) == floor(rate * len(pool) + 1e-9)


@given(pools, st.sampled_from(RATES))
def test_the_threshold_is_the_largest_that_guarantees_the_rate(scores, rate):
    threshold = rejection_threshold(scores, rate)
    below = false_rejection_rate(scores, threshold)
    assert below * len(scores) < max(1, rate * (len(scores) + 1) + 1e-9)
    # Just above it, k of the n images and the new one exceed the rate: k + 1 of n + 1.
    more = false_rejection_rate(scores, np.nextafter(threshold, inf))
    assert threshold == -inf or more * len(scores) + 1 > rate * (len(scores) + 1) - 1e-9


def test_too_few_images_allow_no_rejection():
    scores = np.linspace(0, 1, 18)
    assert rejection_threshold(scores, 0.05) == -inf
    assert rejection_threshold(np.append(scores, 0.5), 0.05) == 0
    assert rejection_threshold(np.zeros(0), 0.9) == -inf
    assert rejection_threshold(scores, 0.0) == -inf


def test_a_rate_is_the_share_below_the_threshold():
    scores = np.array([0.4, 0.1, 0.2, 0.2, 0.9])
    for threshold, below in ((0.2, 1), (-inf, 0), (np.nextafter(0.2, 1), 3), (inf, 5)):
        assert false_rejection_rate(scores, threshold) == below / 5


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, np.nan])
def test_an_invalid_rate_is_rejected(rate):
    with pytest.raises(ValueError, match="rate"):
        rejection_threshold(np.ones(3), rate)


def test_missing_or_non_finite_scores_are_rejected():
    with pytest.raises(ValueError, match="no scores"):
        false_rejection_rate(np.zeros(0), 0.5)
    for ask in (false_rejection_rate, rejection_threshold, conformal_quantile):
        with pytest.raises(ValueError, match="not a number"):
            ask(np.array([0.1, np.nan, 0.3]), 0.5)


# --- sets ------------------------------------------------------------------------------------------------------------


@given(pools, st.sampled_from(RATES))
def test_the_coverage_is_guaranteed_for_exchangeable_images(pool, miss):
    coverage = 1 - miss
    covered = [pool[new] <= conformal_quantile(np.delete(pool, new), coverage) for new in range(len(pool))]
    assert sum(covered) >= coverage * len(pool) - 1e-9
    if len(set(pool)) == len(pool):
        assert sum(covered) == ceil(coverage * len(pool) - 1e-9)


@pytest.mark.parametrize("images", [19, 20, 50])
@pytest.mark.parametrize("decimals", [None, 1])
def test_prediction_sets_cover_new_images_at_the_target_rate(images, decimals):
    rng = np.random.default_rng(images)
    draws = 3000
    covered = dict.fromkeys((0.8, 0.9, 0.95), 0)
    within = dict(covered)
    probabilities = rng.dirichlet(np.full(6, 0.4), (draws, images + 1))
    # Labels that are nearly independent of the probabilities: the guarantee makes no assumption about them.
    labels = np.where(
        rng.random((draws, images + 1)) < 0.5, probabilities.argmax(axis=2), rng.integers(0, 6, (draws, images + 1))
    )
    if decimals is not None:
        probabilities = probabilities.round(decimals)
    badness = 1 - np.take_along_axis(probabilities, labels[:, :, None], axis=2)[:, :, 0]
    for draw in range(draws):
        for coverage in covered:
            quantile = conformal_quantile(badness[draw, :-1], coverage)
            (chosen,) = prediction_sets(probabilities[draw, -1:], quantile)
            covered[coverage] += labels[draw, -1] in chosen
            within[coverage] += badness[draw, -1] <= quantile
    for coverage in covered:
        assert binomtest(covered[coverage], draws, coverage, alternative="less").pvalue > 1e-3
        if decimals is None:
            exact = min(1.0, ceil((images + 1) * coverage - 1e-9) / (images + 1))
            assert binomtest(within[coverage], draws, exact).pvalue > 1e-3


def test_too_few_images_put_every_class_into_the_set():
    assert conformal_quantile(np.linspace(0, 1, 18), 0.95) == inf
    assert conformal_quantile(np.linspace(0, 1, 19), 0.95) == 1
    assert conformal_quantile(np.zeros(0), 0.1) == inf
    (chosen,) = prediction_sets(np.array([[0.0, 1.0, 0.0]]), inf)
    np.testing.assert_array_equal(chosen, [1, 0, 2])


@given(answered(), st.floats(0, 1))
def test_a_set_has_the_classes_above_the_quantile_best_first_and_is_not_empty(task, quantile):
    probabilities = tempered_softmax(task[0], 1.0).round(2)
    for row, chosen in zip(probabilities, prediction_sets(probabilities, quantile), strict=True):
        enough = np.flatnonzero(1 - row <= quantile)
        assert chosen[0] == row.argmax()
        np.testing.assert_array_equal(np.sort(chosen), enough if len(enough) else [row.argmax()])
        pairs = [(-row[index], index) for index in chosen]
        assert pairs == sorted(pairs)


def test_no_images_give_no_sets_and_probabilities_without_classes_are_rejected():
    assert prediction_sets(np.zeros((0, 3)), 0.5) == []
    for shape in ((3,), (3, 0)):
        with pytest.raises(ValueError, match="shape"):
            prediction_sets(np.zeros(shape), 0.5)


@pytest.mark.parametrize("coverage", [0.0, -0.1, 1.1, np.nan])
def test_an_invalid_coverage_is_rejected(coverage):
    with pytest.raises(ValueError, match="coverage"):
        conformal_quantile(np.ones(3), coverage)


# --- a calibration ---------------------------------------------------------------------------------------------------


def test_a_calibration_has_the_scores_at_its_temperature():
    logits, labels = labelled(2, 300, 6, temperature=2.0)
    learned = calibrate(logits, labels)
    assert learned.temperature == fit_temperature(logits, labels)
    probabilities = learned.probabilities(logits)
    np.testing.assert_array_equal(probabilities, tempered_softmax(logits, learned.temperature))
    true = probabilities[np.arange(300), labels]
    for threshold in (0.0, 0.3, 0.7, 1.0):
        top = probabilities.max(axis=1)
        assert learned.rejection.false_rejection_rate(threshold) == false_rejection_rate(top, threshold)
    for rate in RATES:
        assert learned.rejection.threshold(rate) == rejection_threshold(probabilities.max(axis=1), rate)
        assert learned.set_quantile(1 - rate) == conformal_quantile(1 - true, 1 - rate)


@pytest.mark.parametrize(("images", "classes"), [(19, 2), (19, 10), (50, 10)])
def test_a_temperature_from_the_same_images_hardly_weakens_the_guarantees(images, classes):
    draws, fresh = 600, 200
    covered, rejected = [], []
    for seed in range(draws):
        logits, labels = labelled(seed, images + fresh, classes, temperature=3.0)
        learned = calibrate(logits[:images], labels[:images])
        probabilities = learned.probabilities(logits[images:])
        true = probabilities[np.arange(fresh), labels[images:]]
        covered.append([np.mean(1 - true <= learned.set_quantile(coverage)) for coverage in (0.8, 0.9, 0.95)])
        rejected.append([np.mean(probabilities.max(axis=1) < learned.rejection.threshold(r)) for r in (0.2, 0.1, 0.05)])
    for means, errors, promised in (
        (np.mean(covered, axis=0), np.std(covered, axis=0), [0.8, 0.9, 0.95]),
        (-np.mean(rejected, axis=0), np.std(rejected, axis=0), [-0.2, -0.1, -0.05]),
    ):
        assert (means >= np.array(promised) - 0.004 - 3 * errors / np.sqrt(draws)).all()


def test_with_two_classes_the_temperature_does_not_change_coverage_or_rejection():
    logits, labels = labelled(3, 80, 2, temperature=5.0)
    learned = calibrate(logits[:40], labels[:40])
    assert abs(log(learned.temperature)) > 0.5
    outcomes = []
    for temperature in (1.0, learned.temperature):
        probabilities = tempered_softmax(logits, temperature)
        true, top = probabilities[np.arange(80), labels], probabilities.max(axis=1)
        outcomes.append(
            (1 - true[40:] <= conformal_quantile(1 - true[:40], 0.9), top[40:] < rejection_threshold(top[:40], 0.1))
        )
    np.testing.assert_array_equal(outcomes[0], outcomes[1])


def test_few_images_give_no_rejection_and_full_sets_in_plain_json():
    learned = calibrate(np.array([[2.0, 0.0, 1.0]]), np.array([0]))
    assert learned.rejection.threshold(0.4) == 0
    assert learned.set_quantile(0.9) == 1
    (chosen,) = prediction_sets(learned.probabilities(np.array([[0.0, 500.0, 1.0]])), learned.set_quantile(0.9))
    assert len(chosen) == 3
    json.dumps([learned.rejection.threshold(0.4), learned.set_quantile(0.9)], allow_nan=False)


@pytest.mark.parametrize("images", [MAX_KEPT_SCORES, MAX_KEPT_SCORES + 1, 5003])
def test_compressing_many_scores_keeps_the_guarantees(images):
    logits, labels = labelled(4, images, 5, temperature=1.5)
    learned = calibrate(logits, labels)
    assert len(learned.top_scores) == len(learned.true_scores) == MAX_KEPT_SCORES
    probabilities = learned.probabilities(logits)
    top, bad = np.sort(probabilities.max(axis=1)), np.sort(1 - probabilities[np.arange(images), labels])
    slack = ceil(images / MAX_KEPT_SCORES)
    for rate in (0.0007, *RATES, 0.999):
        threshold, quantile = learned.rejection.threshold(rate), learned.set_quantile(1 - rate)
        exact, exact_quantile = rejection_threshold(top, rate), conformal_quantile(bad, 1 - rate)
        assert threshold <= exact
        assert quantile >= exact_quantile
        assert np.searchsorted(top, exact) - np.searchsorted(top, threshold) <= slack
        assert np.searchsorted(bad, quantile) - np.searchsorted(bad, exact_quantile) <= slack
    for threshold in np.linspace(0, 1, 41):
        exact = false_rejection_rate(top, threshold)
        assert exact <= learned.rejection.false_rejection_rate(threshold) <= exact + slack / images


def test_a_calibration_can_be_stored_as_json():
    learned = calibrate(*labelled(5, 3000, 5))
    stored = json.dumps(learned.to_json(), allow_nan=False)
    assert Calibration.from_json(json.loads(stored)) == learned
    assert len(stored) < 100_000


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"images": 3}, "2 top scores of 3"),
        ({"images": 0, "top_scores": [], "true_scores": []}, "0 top scores of 0"),
        ({"true_scores": [0.5]}, "1 true scores of 2"),
        ({"top_scores": [0.9, 0.5]}, "ascend"),
        ({"top_scores": [0.5, 1.1]}, "ascend"),
        ({"true_scores": [-0.1, 0.2]}, "ascend"),
        ({"true_scores": [0.1, float("nan")]}, "ascend"),
    ],
)
def test_an_invalid_calibration_is_rejected(changed, problem):
    stored = {"temperature": 1.0, "top_scores": [0.5, 0.9], "true_scores": [0.1, 0.9], "images": 2}
    assert Calibration.from_json(stored).images == 2
    with pytest.raises(ValueError, match=problem):
        Calibration.from_json({**stored, **changed})


def test_rejection_can_be_stored_as_json():
    scores = np.random.default_rng(0).uniform(-1, 1, 3000)
    for by in RejectBy:
        learned = Rejection.of_held_out(by, scores)
        assert Rejection.from_json(json.loads(json.dumps(learned.to_json()))) == learned
        assert len(learned.scores) == MAX_KEPT_SCORES


def test_cosines_that_rounding_took_beyond_one_are_cut_off():
    learned = Rejection.of_held_out(RejectBy.CLASS_MEAN, np.array([1.0000001, -1.0000001, 0.5], np.float32))
    assert learned.scores == (-1.0, 0.5, 1.0)


def test_the_lowest_threshold_rejects_no_image():
    scores = np.linspace(0.2, 0.9, 8)
    for by, lowest in ((RejectBy.SCORE, 0.0), (RejectBy.SIMILARITY, -1.0), (RejectBy.CLASS_MEAN, -1.0)):
        learned = Rejection.of_held_out(by, scores)
        assert learned.threshold(0.1) == lowest
        assert learned.false_rejection_rate(lowest) == 0
        assert learned.threshold(0.2) == scores[0]


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"by": "energy"}, "energy"),
        ({"images": 3}, "2 scores of 3"),
        ({"images": 0, "scores": []}, "0 scores of 0"),
        ({"scores": [0.9, 0.5]}, "ascend"),
        ({"scores": [0.5, 1.1]}, "ascend"),
        ({"scores": [-1.1, 0.5]}, "ascend"),
        ({"scores": [0.1, float("nan")]}, "ascend"),
    ],
)
def test_an_invalid_rejection_is_refused(changed, problem):
    stored = {"by": "class-mean", "scores": [0.5, 0.9], "images": 2}
    assert Rejection.from_json(stored).images == 2
    with pytest.raises(ValueError, match=problem):
        Rejection.from_json({**stored, **changed})


def test_inputs_are_not_modified():
    logits, labels = labelled(6, 30, 4)
    given_logits, given_labels = logits.copy(), labels.copy()
    for values in (logits, labels):
        values.flags.writeable = False
    learned = calibrate(logits, labels)
    prediction_sets(learned.probabilities(logits), learned.set_quantile(0.9))
    max_concept_matching(logits)
    energy(logits)
    np.testing.assert_array_equal(logits, given_logits)
    np.testing.assert_array_equal(labels, given_labels)
