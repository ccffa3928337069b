"""Shared array operations equal their formulas, keep the precision of their arguments, and accept extreme values."""

from math import exp, inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.scoring.numerics import log_softmax, softmax, stratified_folds, tempered_softmax, unit_rows

LABELS = st.lists(st.integers(0, 6), min_size=1, max_size=60).map(np.array)
TYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@TYPES
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5), (5,), (0, 4), (4, 1)])
def test_softmax_and_log_softmax_equal_their_formulas(shape, dtype):
    logits = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    before = logits.copy()
    shares = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    for found, wanted in ((softmax(logits), shares), (np.exp(log_softmax(logits)), shares)):
        assert found.dtype == dtype
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_array_equal(logits, before)


@TYPES
def test_softmax_and_log_softmax_are_finite_for_logits_of_any_size(dtype):
    logits = np.array([[1e30, -1e30], [-1e30, -1e30], [800.0, 0.0]], dtype)
    np.testing.assert_allclose(softmax(logits), [[1, 0], [0.5, 0.5], [1, exp(-700) * exp(-100)]])
    assert np.isfinite(log_softmax(logits)).all()
    assert log_softmax(logits)[2, 1] == -800


def test_softmax_can_overwrite_its_argument():
    logits = np.random.default_rng(0).standard_normal((4, 6))
    wanted = softmax(logits)
    assert softmax(logits, out=logits) is logits
    np.testing.assert_array_equal(logits, wanted)


@pytest.mark.parametrize("temperature", [0.0, -1.0, inf, np.nan])
def test_a_temperature_that_is_not_positive_is_rejected(temperature):
    with pytest.raises(ValueError, match="temperature"):
        tempered_softmax(np.zeros((1, 2)), temperature)


def test_a_tempered_softmax_is_that_of_the_divided_logits_in_float64():
    logits = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    tempered = tempered_softmax(logits, 0.3)
    assert tempered.dtype == np.float64
    np.testing.assert_array_equal(tempered, softmax(logits.astype(np.float64) / 0.3))


@TYPES
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (0, 7)])
def test_unit_rows_have_length_one_and_the_direction_of_the_rows(shape, dtype):
    rows = 30 * np.random.default_rng(0).standard_normal(shape).astype(dtype)
    unit = unit_rows(rows)
    assert unit.dtype == dtype
    np.testing.assert_allclose((unit**2).sum(axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(unit * np.linalg.norm(rows, axis=-1, keepdims=True), rows, rtol=1e-5)


def test_zero_rows_stay_zero():
    np.testing.assert_array_equal(unit_rows(np.array([[0.0, 0.0], [0.0, 2.0]])), [[0, 0], [0, 1]])
    np.testing.assert_array_equal(unit_rows(np.zeros(3, np.float32)), np.zeros(3))


@given(LABELS, st.integers(1, 8))
def test_folds_are_stratified_and_of_equal_size(labels, max_folds):
    folds = stratified_folds(labels, max_folds)
    count = int(folds.max()) + 1
    assert count == min(max_folds, np.bincount(labels).max())
    for held in (np.bincount(folds[labels == label], minlength=count) for label in np.unique(labels)):
        assert held.max() - held.min() <= 1
    sizes = np.bincount(folds, minlength=count)
    assert sizes.min() >= 1
    assert sizes.max() - sizes.min() <= 1


@given(LABELS, st.integers(1, 8), st.booleans())
def test_the_images_of_a_class_are_distributed_in_order(labels, max_folds, restart):
    folds = stratified_folds(labels, max_folds, restart=restart)
    count = int(folds.max()) + 1
    for label in np.unique(labels):
        steps = np.diff(folds[labels == label])
        assert ((steps == 1) | (steps == 1 - count)).all() or count == 1
        assert not restart or folds[labels == label][0] == 0


def test_no_images_have_no_folds():
    assert stratified_folds(np.zeros(0, np.int64), 5).shape == (0,)
