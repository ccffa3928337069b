"""The measures agree with scikit-learn, and say None where a fraction has no meaning."""

import json
from math import sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn import metrics

from app.errors import InvalidFieldError
from app.evaluation import Difference, bootstrap_interval, evaluate, holm, paired_difference, wilson_interval

NAMES = ("lynx", "puma", "ocelot", "serval", "caracal", "margay", "bobcat")


def ranks(scores):
    """Return class indices, best first; of equal scores the earlier class comes first."""
    return np.argsort(-np.asarray(scores), axis=1, kind="stable")


@st.composite
def scored(draw):
    classes = draw(st.integers(2, len(NAMES)))
    images = draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return NAMES[:classes], rng.integers(0, classes, images), rng.random((images, classes), dtype=np.float32)


@given(scored())
def test_every_measure_agrees_with_scikit_learn(task):
    names, labels, scores = task
    every = np.arange(len(names))
    result = evaluate(names, labels, ranks(scores))
    guesses = scores.argmax(axis=1)

    assert result.images == len(labels)
    assert result.top1 == pytest.approx(metrics.accuracy_score(labels, guesses))
    np.testing.assert_array_equal(result.confusion, metrics.confusion_matrix(labels, guesses, labels=every))
    hits = [label in np.argsort(-row)[:5] for label, row in zip(labels, scores, strict=True)]
    assert result.top5 == pytest.approx(np.mean(hits))
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        labels, guesses, labels=every, zero_division=np.nan
    )
    assert [score.support for score in result.classes] == support.tolist()
    for field, expected in (("precision", precision), ("recall", recall), ("f1", f1)):
        measured = [getattr(score, field) for score in result.classes]
        np.testing.assert_allclose(np.array(measured, dtype=float), expected, atol=1e-12)
    assert result.mean_recall == pytest.approx(np.nanmean(recall))


@given(scored())
def test_the_interval_holds_the_accuracy_and_top5_is_never_below_top1(task):
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


def test_the_class_most_often_mistaken_for_is_named():
    labels = np.array([0, 0, 0, 0, 1, 2])
    result = evaluate(NAMES[:3], labels, np.array([[0, 1, 2], [1, 0, 2], [1, 0, 2], [2, 0, 1], [1, 0, 2], [2, 0, 1]]))
    lynx, puma, _ = result.classes
    assert (lynx.confused_with, lynx.confused_count, lynx.correct) == ("puma", 2, 1)
    assert (puma.confused_with, puma.confused_count) == (None, 0)


def test_a_class_without_images_has_no_recall_and_is_left_out_of_the_mean():
    result = evaluate(NAMES[:3], np.array([0, 1]), np.array([[0, 1, 2], [0, 1, 2]]))
    ocelot = result.classes[2]
    assert (ocelot.recall, ocelot.precision, ocelot.f1) == (None, None, None)
    assert result.classes[1].precision is None
    assert result.classes[1].f1 == 0
    assert result.mean_recall == 0.5


@given(scored())
def test_only_the_first_five_ranks_count(task):
    names, labels, scores = task
    ranked = ranks(scores)
    assert evaluate(names, labels, ranked[:, :5]) == evaluate(names, labels, ranked)


def test_with_fewer_than_five_classes_the_true_one_is_always_in_the_top_five():
    assert evaluate(NAMES[:2], np.array([1]), np.array([[0, 1]])).top5 == 1


def test_a_perfect_result_and_a_hopeless_one_keep_honest_intervals():
    assert wilson_interval(10, 10) == (pytest.approx(0.7225, abs=1e-4), 1.0)
    assert wilson_interval(0, 10) == (0.0, pytest.approx(0.2775, abs=1e-4))


def test_the_result_is_plain_json():
    result = evaluate(NAMES, np.array([0, 3, 3]), ranks(np.eye(7)[[0, 3, 1]]))
    again = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert again["top1"] == pytest.approx(2 / 3)
    assert again["classes"][3] == {
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


def test_no_images_is_the_callers_mistake():
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
def test_input_that_does_not_fit_is_our_own_bug(labels, ranked, problem):
    with pytest.raises(ValueError, match=problem):
        evaluate(NAMES, np.array(labels), np.array(ranked))


# --- comparing methods ---------------------------------------------------------------------------------------------


def test_a_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        low, high = bootstrap_interval((rng.random(100) < 0.7).astype(float), resamples=400)
        covered += low <= 0.7 <= high
    assert 0.90 <= covered / 300 <= 0.99


def test_a_bootstrap_interval_of_the_same_values_is_the_same_and_has_no_width_where_they_agree():
    values = np.array([1.0, 0, 1, 1, 0, 1])
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(np.ones(5)) == (1.0, 1.0)


@pytest.mark.parametrize(("only_first", "only_second"), [(10, 2), (3, 3), (25, 9), (1, 0), (0, 12)])
def test_the_paired_test_is_mcnemars_exact_test_where_answers_are_right_or_wrong(only_first, only_second):
    both = [1.0] * 20
    first = np.array(both + [1.0] * only_first + [0.0] * only_second)
    second = np.array(both + [0.0] * only_first + [1.0] * only_second)
    exact = binomtest(min(only_first, only_second), only_first + only_second).pvalue
    told = paired_difference(first, second)
    assert told.p == pytest.approx(exact, abs=0.02)
    assert told.mean == pytest.approx((only_first - only_second) / len(first))
    assert told.low <= told.mean <= told.high


def test_the_paired_test_of_methods_that_agree_finds_nothing():
    values = np.array([1.0, 0, 1])
    assert paired_difference(values, values) == Difference(0.0, 0.0, 0.0, 1.0)


def test_under_no_difference_the_paired_test_is_rarely_significant():
    rng = np.random.default_rng(2)
    p_values = [paired_difference(*(rng.random((2, 60)) < 0.6).astype(float), flips=300).p for _ in range(200)]
    assert np.mean(np.array(p_values) < 0.05) < 0.1


def test_holms_correction_is_that_of_the_paper():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
