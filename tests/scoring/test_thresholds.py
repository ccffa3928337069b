"""Thresholds and probabilities per label, fitted to images with several labels."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from app.scoring.thresholds import (
    MIN_IMAGES_OF_SCALING,
    fit_platt,
    fit_scalings,
    fit_thresholds,
    folds_by_labels,
    held_out_thresholds,
)


def drawn(rng, images, labels, *, shift=1.5):
    """Return normal scores, higher by ``shift`` for images with the label, and the labels."""
    is_label = rng.random((images, labels)) < 0.4
    return rng.normal(size=(images, labels)) + shift * is_label, is_label


@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.sampled_from([3, 1000]))
def test_no_threshold_has_a_higher_f1_on_the_same_images(seed, images, levels):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, levels, (images, 2)) / 7
    is_label = rng.random((images, 2)) < 0.5
    fitted = fit_thresholds(scores, is_label, shared_images=0)
    for threshold, column, truth in zip(fitted.by_label, scores.T, is_label.T, strict=True):
        if threshold is None:
            assert not truth.any()
            continue
        best = max(f1_score(truth, column >= level, zero_division=0) for level in np.unique(column))
        assert f1_score(truth, column >= threshold, zero_division=0) == pytest.approx(best)


def test_a_threshold_lies_between_the_two_scores_that_it_separates():
    scores = np.array([[0.1], [0.2], [0.6], [0.8]])
    is_label = np.array([[False], [False], [True], [True]])
    assert fit_thresholds(scores, is_label).by_label == pytest.approx([0.4])


@pytest.mark.parametrize("goal", [{}, {"precision": 0.5}, {"recall": 0.5}])
def test_images_whose_scores_are_rounded_are_still_selected(goal):
    """The scores of answers are in single precision, and those of example images come from rounded features."""
    rng = np.random.default_rng(0)
    for levels in (1, 3, 1000):  # with one, all images have the same score
        scores = (1 + rng.integers(0, levels, (60, 2))) / (levels + 1.1)
        is_label = rng.random((60, 2)) < 0.5 + 0.5 * scores
        for threshold, column in zip(fit_thresholds(scores, is_label, **goal).by_label, scores.T, strict=True):
            assert threshold is not None
            np.testing.assert_array_equal(column - 1e-4 >= threshold, column >= threshold)


def test_a_label_of_few_images_has_a_threshold_nearer_to_the_shared_one():
    rng = np.random.default_rng(0)
    scores, is_label = drawn(rng, 400, 3)
    is_label[:, 1] = False
    is_label[0, 1] = True
    scores[0, 1] = -9
    alone = fit_thresholds(scores, is_label, shared_images=0).by_label[1]
    few, shared = fit_thresholds(scores, is_label).by_label[1], fit_thresholds(scores, is_label).shared
    assert alone == -9
    assert abs(few - shared) < 2


def test_a_rare_label_that_its_scores_do_not_find_is_not_given_to_all_images():
    rng = np.random.default_rng(0)
    is_label = rng.random((400, 3)) < 0.3
    is_label[:, 2] = np.arange(400) < 10
    scores = rng.random((400, 3)) / 2 + is_label / 2
    scores[:, 2] = 0.025  # as Platt scaling makes them
    fitted = fit_thresholds(scores, is_label)
    assert fitted.by_label[2] == fitted.shared > 0.025
    is_label[:, 2] = np.arange(400) < 360
    assert fit_thresholds(scores, is_label).by_label[2] < 0.025  # of a frequent one, most images have it


def test_a_label_without_images_takes_the_shared_threshold_and_says_why():
    scores, is_label = drawn(np.random.default_rng(0), 60, 2)
    is_label[:, 1] = False
    fitted = fit_thresholds(scores, is_label)
    assert fitted.by_label[1] is None
    assert fitted.reasons == (None, "none of the 60 images has the label; it takes the threshold that all labels share")
    assert fitted.filled(0.5).tolist() == [fitted.by_label[0], fitted.shared]


def test_without_labelled_images_all_thresholds_are_the_default():
    fitted = fit_thresholds(np.zeros((4, 2)), np.zeros((4, 2), bool))
    assert (fitted.by_label, fitted.shared) == ((None, None), None)
    assert fitted.filled([0.3, 0.7]).tolist() == [0.3, 0.7]
    assert fit_thresholds(np.zeros((0, 2)), np.zeros((0, 2), bool)).shared is None


def test_new_images_of_a_label_reach_the_threshold_of_a_recall_as_often_as_promised():
    rng = np.random.default_rng(0)
    reached = []
    for _ in range(400):
        scores, is_label = drawn(rng, 60, 1)
        (threshold,) = fit_thresholds(scores, is_label, recall=0.8).by_label
        reached.append(np.mean(rng.normal(1.5, 1, 200) >= threshold))
    assert np.mean(reached) == pytest.approx(0.8, abs=0.02) or np.mean(reached) > 0.8


@pytest.mark.parametrize(("recall", "needed"), [(0.8, 4), (0.9, 9), (0.95, 19)])
def test_a_recall_needs_a_number_of_images(recall, needed):
    for count in (needed - 1, needed):
        scores = np.arange(2 * count, dtype=float)[:, None]
        fitted = fit_thresholds(scores, scores >= count, recall=recall)
        assert (fitted.by_label[0] is None) == (count < needed)
    assert (
        f"a recall of {recall:g} needs at least {needed}"
        in fit_thresholds(scores, scores < 1, recall=recall).reasons[0]
    )


@pytest.mark.parametrize("goal", ["precision", "recall"])
@pytest.mark.parametrize("share", [1e-300, 1e-17, 1 - 2**-53])
def test_goals_next_to_the_ends_have_a_threshold_or_a_reason(goal, share):
    scores = np.arange(1.0, 9)[:, None]
    fitted = fit_thresholds(scores, scores > 4, **{goal: share})
    assert (fitted.by_label[0] is None) == (fitted.reasons[0] is not None) == (share > 0.5)


@pytest.mark.parametrize(("precision", "needed"), [(0.5, 1), (0.8, 4), (0.9, 9)])
def test_a_precision_counts_one_more_error(precision, needed):
    for count in (needed - 1, needed):
        scores = np.arange(count + 20, dtype=float)[:, None]
        fitted = fit_thresholds(scores, scores >= 20, precision=precision)
        assert (fitted.by_label[0] is None) == (count < needed)
    assert fitted.by_label[0] <= 20  # the lowest score with the label is above the threshold
    found = scores[:, 0] >= fitted.by_label[0]
    assert (scores >= 20)[found].sum() / (found.sum() + 1) >= precision


def test_held_out_thresholds_do_not_depend_on_the_image_itself():
    scores, is_label = drawn(np.random.default_rng(0), 50, 3)
    folds = folds_by_labels(is_label, 5)
    thresholds = held_out_thresholds(scores, is_label, folds, 0.5)
    changed = scores.copy()
    changed[folds == 2] += 7
    again = held_out_thresholds(changed, is_label, folds, 0.5)
    np.testing.assert_array_equal(thresholds[folds == 2], again[folds == 2])
    shared = held_out_thresholds(scores, is_label, folds, 0.5, per_label=False)
    assert all(len(np.unique(row)) == 1 for row in shared)


@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 5))
def test_folds_have_about_as_many_images_of_the_rarest_label(seed, images, folds):
    is_label = np.random.default_rng(seed).random((images, 3)) < [0.1, 0.5, 0.5]
    dealt = folds_by_labels(is_label, folds)
    assert set(dealt.tolist()) <= set(range(folds))
    rare = np.bincount(dealt[is_label[:, 0]], minlength=folds)
    if is_label[:, 0].sum() < is_label[:, 1:].sum(axis=0).min():
        assert rare.max() - rare.min() <= 1


@given(st.integers(0, 2**32 - 1))
def test_platt_scaling_is_a_logistic_regression_on_smoothed_targets(seed):
    rng = np.random.default_rng(seed)
    scores, is_label = drawn(rng, 40, 1)
    found = fit_platt(scores[:, 0], is_label[:, 0])
    positives = int(is_label.sum())
    high, low = (positives + 1) / (positives + 2), 1 / (40 - positives + 2)
    targets = np.where(is_label[:, 0], high, low)
    weights = np.concatenate([targets, 1 - targets])
    reference = LogisticRegression(C=1e9, tol=1e-9, max_iter=1000).fit(
        np.concatenate([scores, scores]), np.repeat([1, 0], 40), weights
    )
    if reference.coef_[0, 0] > 0.01:
        expected = reference.predict_proba(scores)[:, 1]
        np.testing.assert_allclose(found.probabilities(scores[:, 0]), expected, atol=2e-3)


@pytest.mark.parametrize(
    ("scores", "is_label"),
    [
        pytest.param(np.arange(10.0), np.arange(10) >= 5, id="separated"),
        pytest.param(np.arange(10.0), np.zeros(10, bool), id="no image"),
        pytest.param(np.arange(10.0), np.ones(10, bool), id="all images"),
        pytest.param(np.ones(10), np.arange(10) >= 5, id="equal scores"),
        pytest.param(-np.arange(10.0), np.arange(10) >= 5, id="wrong order"),
        pytest.param(np.arange(1.0), np.ones(1, bool), id="one image"),
        pytest.param(1e8 * np.arange(10.0), np.arange(10) >= 5, id="large"),
    ],
)
def test_platt_scaling_of_degenerate_images_is_finite_and_never_reverses_the_order(scores, is_label):
    chances = fit_platt(scores, is_label).probabilities(scores)
    assert ((chances > 0) & (chances < 1)).all()
    assert (np.diff(chances[np.argsort(scores)]) >= -1e-12).all()


@pytest.mark.parametrize("targets", [{"precision": 0}, {"recall": 1}, {"precision": 0.5, "recall": 0.5}])
def test_impossible_targets_are_refused(targets):
    with pytest.raises(ValueError, match=r"target|either"):
        fit_thresholds(np.zeros((2, 1)), np.zeros((2, 1), bool), **targets)


def test_labels_of_few_images_share_a_scaling():
    scores, is_label = drawn(np.random.default_rng(0), 60, 3)
    is_label[:, 1] = np.arange(60) < MIN_IMAGES_OF_SCALING - 1
    is_label[:, 2] = np.arange(60) < MIN_IMAGES_OF_SCALING
    own, shared, other = fit_scalings(scores, is_label)
    assert shared == fit_platt(scores.reshape(-1), is_label.reshape(-1))
    assert own == fit_platt(scores[:, 0], is_label[:, 0])
    assert other == fit_platt(scores[:, 2], is_label[:, 2])
