"""The measures equal those of scikit-learn, and are None if they are undefined."""

import json
from math import log, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from scipy.stats import binomtest
from sklearn import metrics

from app.errors import InvalidFieldError
from app.scoring.measures import (
    MAX_CLASS_ROWS,
    MAX_CONFUSIONS,
    Confusion,
    Difference,
    Evaluation,
    bootstrap_interval,
    evaluate,
    expected_calibration_error,
    holm,
    macro_f1,
    negative_log_likelihood,
    paired_difference,
    wilson_interval,
)

NAMES = ("lynx", "puma", "ocelot", "serval", "caracal", "margay", "bobcat")


def ranks(scores):
    """Return class indices, best first; ties are ordered by index."""
    return np.argsort(-np.asarray(scores), axis=1, kind="stable")


@st.composite
def scored(draw):
    classes = draw(st.integers(2, len(NAMES)))
    images = draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return NAMES[:classes], rng.integers(0, classes, images), rng.random((images, classes), dtype=np.float32)


@given(scored())
def test_every_measure_equals_scikit_learn(task):
    names, labels, scores = task
    every = np.arange(len(names))
    result = evaluate(names, labels, ranks(scores))
    guesses = scores.argmax(axis=1)

    assert result.images == len(labels)
    assert result.top1 == pytest.approx(metrics.accuracy_score(labels, guesses))
    matrix = np.zeros((len(names), len(names)), np.int64)
    for cell in result.confusion:
        matrix[names.index(cell.label), names.index(cell.predicted)] = cell.count
    np.testing.assert_array_equal(matrix, metrics.confusion_matrix(labels, guesses, labels=every))
    assert [cell.count for cell in result.confusion] == sorted((cell.count for cell in result.confusion), reverse=True)
    assert result.confusion_count == len(result.confusion) == np.count_nonzero(matrix)
    hits = [label in np.argsort(-row)[:5] for label, row in zip(labels, scores, strict=True)]
    assert result.top5 == pytest.approx(np.mean(hits))
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        labels, guesses, labels=every, zero_division=np.nan
    )
    occurring = np.union1d(labels, guesses)
    assert result.class_count == len(result.classes)
    assert [score.name for score in result.classes] == [names[index] for index in occurring]
    assert [score.support for score in result.classes] == support[occurring].tolist()
    for field, expected in (("precision", precision), ("recall", recall), ("f1", f1)):
        measured = [getattr(score, field) for score in result.classes]
        np.testing.assert_allclose(np.array(measured, dtype=float), expected[occurring], atol=1e-12)
    assert result.mean_recall == pytest.approx(np.nanmean(recall))
    present = np.unique(labels)
    assert result.macro_f1 == pytest.approx(
        metrics.f1_score(labels, guesses, labels=present, average="macro", zero_division=0)
    )
    assert (result.nll, result.ece) == (None, None)


@given(scored())
def test_the_interval_contains_the_accuracy_and_top5_is_at_least_top1(task):
    names, labels, scores = task
    result = evaluate(names, labels, ranks(scores))
    low, high = result.top1_interval
    assert 0 <= low <= result.top1 <= high <= 1
    assert result.top5 >= result.top1


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_bounds_solve_the_score_equation(counts):
    successes, trials = counts
    share = successes / trials
    for bound in wilson_interval(successes, trials, z=1.96):
        assert 0 <= bound <= 1
        if 0 < bound < 1:
            assert abs(share - bound) == pytest.approx(1.96 * sqrt(bound * (1 - bound) / trials), abs=1e-9)


def test_the_most_frequent_confusion_is_reported():
    labels = np.array([0, 0, 0, 0, 1, 2])
    result = evaluate(NAMES[:3], labels, np.array([[0, 1, 2], [1, 0, 2], [1, 0, 2], [2, 0, 1], [1, 0, 2], [2, 0, 1]]))
    lynx, puma, _ = result.classes
    assert (lynx.confused_with, lynx.confused_count, lynx.correct) == ("puma", 2, 1)
    assert (puma.confused_with, puma.confused_count) == (None, 0)


def test_a_class_without_images_has_no_recall_and_is_excluded_from_the_mean():
    result = evaluate(NAMES[:3], np.array([0, 1]), np.array([[0, 1, 2], [0, 1, 2]]))
    _, puma = result.classes
    assert puma.precision is None
    assert puma.f1 == 0
    assert result.mean_recall == 0.5


def test_a_predicted_class_without_images_has_no_recall():
    _, puma = evaluate(NAMES[:3], np.array([0]), np.array([[1, 0, 2]])).classes
    assert (puma.support, puma.predicted, puma.recall, puma.precision) == (0, 1, None, 0)


def test_the_size_of_an_evaluation_depends_on_the_images_and_not_on_the_classes():
    names = [f"class {number}" for number in range(10_000)]
    result = evaluate(names, np.array([7]), np.array([[9, 7, 1, 2, 3]]))
    assert [row.name for row in result.classes] == ["class 7", "class 9"]
    assert result.confusion == (Confusion("class 7", "class 9", 1),)
    assert len(json.dumps(result.to_json())) < 2000


def test_an_evaluation_keeps_the_largest_rows_and_cells_and_counts_all():
    names = [f"class {number}" for number in range(3000)]
    labels = np.concatenate([np.arange(3000), [2999, 2999, 5]])
    guesses = labels[:, None] + np.arange(5)
    result = evaluate(names, labels, guesses % 3000)
    assert (result.class_count, len(result.classes)) == (3000, MAX_CLASS_ROWS)
    assert (result.confusion_count, len(result.confusion)) == (3000, MAX_CONFUSIONS)
    assert [(cell.label, cell.count) for cell in result.confusion[:3]] == [
        ("class 2999", 3),
        ("class 5", 2),
        ("class 0", 1),
    ]
    assert result.classes[-1].name == "class 2999"


@given(scored())
def test_only_the_first_five_ranks_count(task):
    names, labels, scores = task
    ranked = ranks(scores)
    assert evaluate(names, labels, ranked[:, :5]) == evaluate(names, labels, ranked)


def test_top5_is_one_with_fewer_than_five_classes():
    assert evaluate(NAMES[:2], np.array([1]), np.array([[0, 1]])).top5 == 1


def test_perfect_and_zero_accuracies_have_valid_intervals():
    assert wilson_interval(10, 10) == (pytest.approx(0.7225, abs=1e-4), 1.0)
    assert wilson_interval(0, 10) == (0.0, pytest.approx(0.2775, abs=1e-4))


def test_the_result_is_plain_json():
    result = evaluate(NAMES, np.array([0, 3, 3]), ranks(np.eye(7)[[0, 3, 1]]))
    again = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert again["top1"] == pytest.approx(2 / 3)
    assert again["classes"][2] == {
        "name": "serval",
        "support": 2,
        "predicted": 1,
        "correct": 1,
        "recall": 0.5,
        "precision": 1.0,
        "f1": pytest.approx(2 / 3),
        "confused_with": "puma",
        "confused_count": 1,
    }


def test_no_images_is_a_client_error():
    with pytest.raises(InvalidFieldError, match="give at least one"):
        evaluate(NAMES, np.array([], dtype=int), np.zeros((0, 7), dtype=int))


@pytest.mark.parametrize(
    ("labels", "ranked", "problem"),
    [
        ([0, 1], [[0, 1, 2, 3, 4]], "shape"),
        ([0], [[0, 1, 2, 3]], "shape"),
        ([0], [0, 1, 2, 3, 4], "shape"),
        ([7], [[0, 1, 2, 3, 4]], r"label lies outside 0\.\.6"),
        ([-1], [[0, 1, 2, 3, 4]], "label lies outside"),
        ([0], [[0, 1, 2, 3, 7]], "ranked class lies outside"),
        ([0], [[0, 1, 2, 3, -1]], "ranked class lies outside"),
    ],
)
def test_inconsistent_input_is_an_internal_error(labels, ranked, problem):
    with pytest.raises(ValueError, match=problem):
        evaluate(NAMES, np.array(labels), np.array(ranked))


# --- scores ---------------------------------------------------------------------------------------------------------


def binned(confidences, correct, bins):
    """Return the calibration error computed per bin, as in the paper."""
    error = 0.0
    for index in range(bins):
        low, high = index / bins, (index + 1) / bins
        inside = [i for i, value in enumerate(confidences) if low < value <= high or (index == 0 and value == 0)]
        if inside:
            gap = np.mean([correct[i] for i in inside]) - np.mean([confidences[i] for i in inside])
            error += len(inside) / len(confidences) * abs(gap)
    return error


@given(scored())
def test_measures_of_scores_equal_their_definitions(task):
    names, labels, scores = task
    wide = scores.astype(np.float64)
    shares = wide / wide.sum(axis=1, keepdims=True)
    result = evaluate(names, labels, ranks(shares), shares)
    right = shares.argmax(axis=1) == labels
    assert result.nll == pytest.approx(metrics.log_loss(labels, shares, labels=np.arange(len(names))))
    assert result.ece == pytest.approx(binned(shares.max(axis=1), right, 15), abs=1e-9)
    # Scores that do not sum to 1 are calibrated as returned.
    alone = evaluate(names, labels, ranks(scores), scores)
    assert alone.nll == pytest.approx(result.nll, rel=1e-5)
    assert alone.ece == pytest.approx(binned(scores.max(axis=1).astype(float), right, 15), abs=1e-6)


@given(st.lists(st.tuples(st.integers(0, 30), st.booleans()), min_size=1, max_size=60), st.integers(1, 15))
def test_a_confidence_on_the_edge_of_two_bins_is_in_the_lower_one(pairs, bins):
    confidences = np.array([value / 30 for value, _ in pairs])
    correct = np.array([hit for _, hit in pairs])
    # A label outside the only column is never correct.
    error = expected_calibration_error(confidences[:, None], np.where(correct, 0, 1), bins=bins)
    assert error == pytest.approx(binned(confidences, correct, bins), abs=1e-9)
    # The error of a single bin is the smallest possible one.
    assert abs(correct.mean() - confidences.mean()) - 1e-9 <= error <= 1


def test_confident_scores_have_no_error_if_correct_and_the_maximum_if_wrong():
    certain = np.array([[0.0, 1.0]] * 4)
    assert expected_calibration_error(certain, np.ones(4, int)) == 0
    assert expected_calibration_error(certain, np.zeros(4, int)) == 1
    assert expected_calibration_error(np.array([[0.25, 0.75]] * 4), np.array([1, 1, 0, 1])) == pytest.approx(0)


def test_the_likelihood_is_finite_for_zero_scores():
    certain = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert negative_log_likelihood(certain, np.array([0, 0])) == pytest.approx(-log(1e-12) / 2)
    assert negative_log_likelihood(certain, np.array([0, 1])) == 0
    assert negative_log_likelihood(np.zeros((1, 4), np.float32), np.array([2])) == pytest.approx(log(4))


def test_a_class_that_is_never_predicted_counts_zero_and_one_without_images_is_excluded():
    labels, predicted = np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 0, 2, 0, 0])
    assert macro_f1(labels, predicted, 3) == pytest.approx((2 * 3 / (4 + 5) + 0) / 2)


@pytest.mark.parametrize(
    ("scores", "problem"),
    [
        ([[0.5, 0.5]], "shape"),
        ([0.1, 0.2, 0.7], "shape"),
        ([[0.1, 0.2, 1.7]], r"outside 0\.\.1"),
        ([[0.1, -0.2, 0.7]], r"outside 0\.\.1"),
        ([[0.1, np.nan, 0.7]], r"outside 0\.\.1"),
    ],
)
def test_invalid_scores_are_an_internal_error(scores, problem):
    with pytest.raises(ValueError, match=problem):
        evaluate(NAMES[:3], np.array([0]), np.array([[2, 1, 0]]), np.array(scores))


def test_an_evaluation_stored_before_a_measure_existed_can_be_read():
    scores = np.eye(7)[[0, 3, 1]]
    result = evaluate(NAMES, np.array([0, 3, 3]), ranks(scores), scores)
    stored = json.loads(json.dumps(result.to_json(), allow_nan=False))
    read = TypeAdapter(Evaluation)
    assert read.validate_python(stored) == result
    old = {name: value for name, value in stored.items() if name not in {"macro_f1", "nll", "ece"}}
    again = read.validate_python(old)
    assert (again.macro_f1, again.nll, again.ece) == (None, None, None)
    assert again.top1 == result.top1


# --- comparing methods ---------------------------------------------------------------------------------------------


def test_a_bootstrap_interval_has_the_stated_coverage():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        low, high = bootstrap_interval((rng.random(100) < 0.7).astype(float), resamples=400)
        covered += low <= 0.7 <= high
    assert 0.90 <= covered / 300 <= 0.99


def test_a_bootstrap_interval_is_reproducible_and_has_no_width_for_equal_values():
    values = np.array([1.0, 0, 1, 1, 0, 1])
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(np.ones(5)) == (1.0, 1.0)


@pytest.mark.parametrize(("only_first", "only_second"), [(10, 2), (3, 3), (25, 9), (1, 0), (0, 12)])
def test_the_paired_test_is_mcnemars_exact_test_for_binary_outcomes(only_first, only_second):
    both = [1.0] * 20
    first = np.array(both + [1.0] * only_first + [0.0] * only_second)
    second = np.array(both + [0.0] * only_first + [1.0] * only_second)
    exact = binomtest(min(only_first, only_second), only_first + only_second).pvalue
    result = paired_difference(first, second)
    assert result.p == pytest.approx(exact, abs=0.02)
    assert result.mean == pytest.approx((only_first - only_second) / len(first))
    assert result.low <= result.mean <= result.high


def test_the_paired_test_of_equal_methods_is_not_significant():
    values = np.array([1.0, 0, 1])
    assert paired_difference(values, values) == Difference(0.0, 0.0, 0.0, 1.0)


def test_the_paired_test_is_rarely_significant_without_a_difference():
    rng = np.random.default_rng(2)
    p_values = [paired_difference(*(rng.random((2, 60)) < 0.6).astype(float), flips=300).p for _ in range(200)]
    assert np.mean(np.array(p_values) < 0.05) < 0.1


def test_holms_correction_equals_that_of_the_paper():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
