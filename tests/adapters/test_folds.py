import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from app.adapters._folds import first_best, fold_numbers, judged, tempered_loss

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=60).map(np.array)


@given(LABELS)
def test_every_class_keeps_an_image_in_each_fold_and_is_held_out_evenly(labels):
    folds = fold_numbers(labels, 5)
    counts = np.bincount(labels, minlength=5)
    if folds is None:
        assert (counts >= 2).sum() < 2.5
        return
    fold_count = min(5, counts[counts >= 2].min())
    assert set(folds.tolist()) <= set(range(-1, fold_count))
    for label in np.unique(labels):
        held_out = folds[labels == label]
        if counts[label] == 1:
            assert held_out.tolist() == [-1]
        else:
            per_fold = np.bincount(held_out, minlength=fold_count)
            assert 1 <= per_fold.min() <= per_fold.max() <= per_fold.min() + 1
            assert per_fold.max() < counts[label]


def test_there_are_no_folds_where_less_than_half_of_the_classes_have_two_images():
    assert fold_numbers(np.array([0, 0, 0, 0, 1, 2]), 3) is None
    assert fold_numbers(np.array([0, 0, 1, 1, 2]), 3) is not None
    assert fold_numbers(np.array([0, 0, 1, 1]), 5) is None


def test_thousands_of_held_out_images_are_judged_by_some_of_every_part():
    folds = np.arange(100_000) % 5
    folds[::2] = -1
    some = judged(folds)
    assert len(np.unique(some)) == len(some) == 2048
    assert (folds[some] >= 0).all()
    assert some[0] < 10
    assert some[-1] > 99_990


@given(st.integers(0, 2**32 - 1))
def test_the_loss_is_that_at_the_best_temperature(seed):
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


def test_the_loss_does_not_see_how_overconfident_logits_are():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 50)
    logits = rng.standard_normal((50, 4)) + np.eye(4)[labels]
    (loss, temperature), (loss_of_20, temperature_of_20) = (
        tempered_loss(logits, labels),
        tempered_loss(20 * logits, labels),
    )
    assert loss_of_20 == pytest.approx(loss, abs=1e-4)
    assert temperature_of_20 == pytest.approx(20 * temperature, rel=0.02)


def test_the_first_candidate_stays_until_another_is_better_by_enough():
    assert first_best([1.0, 1.0, 0.9995]) == 0
    assert first_best([1.0, 0.9, 0.9, 0.95]) == 1
    assert first_best([1.0, 0.9, 0.5]) == 2
