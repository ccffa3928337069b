import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy.special import expit, softmax

from app.adapters._base import probabilities
from app.adapters.cosine import Cosine

LARGEST = float(np.finfo(np.float32).max)
LOGITS = arrays(
    np.float32,
    array_shapes(min_dims=2, max_dims=2, max_side=6),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)


def unit_rows(rng, count, dims):
    rows = rng.standard_normal((count, dims))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


# --- the adapter ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bias", "added"), [(None, 0.0), (0.0, 0.0), (-12.5, -12.5)])
def test_logits_are_the_scaled_cosines_plus_the_bias(bias, added):
    rng = np.random.default_rng(0)
    classes, images = unit_rows(rng, 4, 16), unit_rows(rng, 3, 16)
    logits = Cosine().fit(classes, logit_scale=37.5, logit_bias=bias).predict(images).logits
    cosines = [[float(np.dot(image.astype(float), entry.astype(float))) for entry in classes] for image in images]
    np.testing.assert_allclose(logits, 37.5 * np.array(cosines) + added, atol=1e-4)


def test_the_nearest_class_is_predicted_at_every_scale():
    classes, images = np.eye(5, dtype=np.float32), np.eye(5, dtype=np.float32)[[3, 0]]
    for scale in (0.01, 1.0, 100.0):
        logits = Cosine().fit(classes, logit_scale=scale, logit_bias=None).predict(images).logits
        assert logits.argmax(axis=1).tolist() == [3, 0]


# --- probabilities -------------------------------------------------------------------------------------------------


@given(LOGITS)
def test_softmax_scores_equal_those_of_scipy_and_sum_to_one(logits):
    scores = probabilities(logits, sigmoid=False)
    np.testing.assert_allclose(scores, softmax(logits.astype(np.float64), axis=1), rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose(scores.sum(axis=1, dtype=np.float64), 1, atol=1e-6)
    assert scores.dtype == np.float32


@given(LOGITS)
def test_sigmoid_scores_equal_those_of_scipy(logits):
    scores = probabilities(logits, sigmoid=True)
    np.testing.assert_allclose(scores, expit(logits.astype(np.float64)), rtol=1e-6, atol=1e-37)
    assert scores.dtype == np.float32


@given(LOGITS, st.floats(-1000, 1000, width=32))
def test_softmax_scores_do_not_change_if_a_constant_is_added_to_a_row(logits, added):
    small = np.clip(logits, -1000, 1000).astype(np.float64)
    np.testing.assert_allclose(
        probabilities(small, sigmoid=False), probabilities(small + added, sigmoid=False), rtol=1e-5, atol=1e-30
    )


@given(LOGITS, st.booleans())
def test_scores_are_monotonic_in_the_logits(logits, sigmoid):
    scores = probabilities(logits, sigmoid=sigmoid)
    for row, row_scores in zip(logits, scores, strict=True):
        assert (np.diff(row_scores[np.argsort(row)]) >= 0).all()


@pytest.mark.parametrize("sigmoid", [True, False])
@pytest.mark.parametrize(
    "row", [[LARGEST, -LARGEST], [LARGEST, LARGEST], [-LARGEST, -LARGEST], [0.0, LARGEST], [1e4, 0]]
)
def test_logits_of_any_size_do_not_overflow(row, sigmoid):
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        scores = probabilities(np.array([row], dtype=np.float32), sigmoid=sigmoid)
    assert np.isfinite(scores).all()
    assert ((scores >= 0) & (scores <= 1)).all()


def test_a_single_class_is_certain_with_softmax_and_not_with_sigmoid():
    logits = np.array([[-3.0], [5.0]], dtype=np.float32)
    assert probabilities(logits, sigmoid=False).tolist() == [[1.0], [1.0]]
    np.testing.assert_allclose(probabilities(logits, sigmoid=True), [[0.04742587], [0.9933072]], rtol=1e-6)


@given(LOGITS, st.booleans())
def test_logits_are_not_modified(logits, sigmoid):
    before = logits.copy()
    probabilities(logits, sigmoid=sigmoid)
    np.testing.assert_array_equal(logits, before)
