"""The measures of several labels per image equal those of scikit-learn, and are None if they are undefined."""

import json
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics

from app.errors import InvalidFieldError
from app.scoring.multi_label_measures import average_precision, evaluate_labels

NAMES = ("cat", "dog", "sofa", "lamp", "rug")


@st.composite
def scored(draw):
    """Scores with many ties, and labels of which some have no image and some have all."""
    images, labels = draw(st.integers(1, 30)), draw(st.integers(1, len(NAMES)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = rng.integers(0, draw(st.sampled_from([2, 5, 1000])), (images, labels)) / 7
    is_label = rng.random((images, labels)) < rng.choice([0, 0.3, 1], labels)
    is_label[rng.integers(images), rng.integers(labels)] = True
    return NAMES[:labels], scores, is_label


@given(scored())
def test_every_measure_equals_scikit_learn(task):
    names, scores, is_label = task
    thresholds = np.median(scores, axis=0)
    result = evaluate_labels(names, scores, is_label, thresholds)
    present = np.flatnonzero(is_label.any(axis=0))
    predicted = scores >= thresholds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of labels without images
        truth, guesses = is_label.astype(int), predicted.astype(int)
        micro = metrics.average_precision_score(truth.ravel(), scores.ravel())
        by_label = [metrics.average_precision_score(truth[:, index], scores[:, index]) for index in present]
        micro_f1 = metrics.f1_score(truth.ravel(), guesses.ravel(), zero_division=0)
        f1s = [metrics.f1_score(truth[:, index], guesses[:, index], zero_division=0) for index in present]
        exact = metrics.accuracy_score(truth, guesses)

    assert result.micro_average_precision == pytest.approx(micro)
    assert result.mean_average_precision == pytest.approx(np.mean(by_label))
    assert (result.micro_f1, result.macro_f1) == pytest.approx((micro_f1, np.mean(f1s)))
    assert result.exact == pytest.approx(exact)
    assert result.labels_per_image == pytest.approx(is_label.sum(axis=1).mean())
    rows = {row.name: row for row in result.labels}
    assert [rows[names[index]].average_precision for index in present] == pytest.approx(by_label)
    for index in present:
        row = rows[names[index]]
        assert row.recall == pytest.approx(metrics.recall_score(truth[:, index], guesses[:, index]))
        assert (row.precision is None) == (not predicted[:, index].any())
        assert (row.support, row.predicted) == (is_label[:, index].sum(), predicted[:, index].sum())


@pytest.mark.parametrize(
    ("scores", "is_label", "expected"),
    [
        pytest.param([3, 2, 1], [True, True, True], 1.0, id="all images have it"),
        pytest.param([3, 2, 1], [True, False, True], (1 + 2 / 3) / 2, id="one gap"),
        pytest.param([1, 1, 1, 1], [True, False, False, False], 0.25, id="all scores equal"),
        pytest.param([1, 1, 0, 0], [True, False, True, False], (0.5 + 0.5) / 2, id="two pairs of equal scores"),
        pytest.param([1, 2], [False, False], np.nan, id="no image has it"),
        pytest.param([np.inf, -np.inf], [True, True], 1.0, id="infinite scores"),
    ],
)
def test_average_precision_is_the_mean_of_the_precisions_at_the_images_with_the_label(scores, is_label, expected):
    order = np.random.default_rng(0).permutation(len(scores))
    for some in (slice(None), order):
        found = average_precision(np.array([scores], float).T[some], np.array([is_label]).T[some])
        assert found == pytest.approx([expected], nan_ok=True)


def test_a_label_without_images_or_predictions_has_no_row_and_no_part_in_the_means():
    scores = np.array([[0.9, 0.1, 0.2], [0.8, 0.2, 0.9]])
    is_label = np.array([[True, False, False], [True, False, False]])
    result = evaluate_labels(NAMES[:3], scores, is_label, np.full(3, 0.5))
    assert [row.name for row in result.labels] == ["cat", "sofa"]
    sofa = result.labels[1]
    assert (sofa.average_precision, sofa.precision, sofa.recall, sofa.f1) == (None, 0, None, 0)
    assert (result.mean_average_precision, result.macro_f1) == (1, 1)
    json.dumps(result.to_json())


def test_each_image_may_have_its_own_threshold():
    scores = np.array([[0.6], [0.4]])
    result = evaluate_labels(["cat"], scores, np.array([[True], [True]]), np.array([[0.7], [0.3]]))
    assert (result.labels[0].predicted, result.exact) == (1, 0.5)


@pytest.mark.parametrize(
    ("scores", "is_label", "error"),
    [
        (np.zeros((0, 1)), np.zeros((0, 1), bool), InvalidFieldError),
        (np.zeros((2, 1)), np.zeros((2, 1), bool), InvalidFieldError),
        (np.zeros((2, 2)), np.ones((2, 1), bool), ValueError),
        (np.full((2, 1), np.nan), np.ones((2, 1), bool), ValueError),
    ],
)
def test_input_without_meaning_is_refused(scores, is_label, error):
    with pytest.raises(error):
        evaluate_labels(["cat"], scores, is_label, np.array([0.5]))
