import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.adapters.auto_clip import AutoCLIP, auto_clip, entropic_softmax
from tests.oracles.autoclip import autoclip as oracle

SIZES = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 9))


def cosines_of(rng, sizes, spread=0.2):
    return np.clip(0.2 + spread * rng.standard_normal(sizes), -1, 1)


def entropy(weights):
    return -(weights * np.log(np.where(weights > 0, weights, 1))).sum(axis=-1)


def test_two_hundred_random_problems_equal_the_reference():
    rng = np.random.default_rng(0)
    worst = 0.0
    for _ in range(200):
        sizes = rng.integers(1, 5), rng.integers(1, 8), rng.integers(1, 12)
        beta = rng.uniform(0.3, 1.0)
        cosines = cosines_of(rng, sizes, spread=rng.choice([0.001, 0.05, 0.3]))
        scores, weights = auto_clip(cosines, beta)
        wanted_scores, wanted_weights, _ = oracle(cosines, beta)
        worst = max(worst, np.abs(scores - wanted_scores).max(), np.abs(weights - wanted_weights).max())
    assert worst <= 1e-6


def test_the_adapter_equals_the_reference_on_the_cosines_of_its_features():
    rng = np.random.default_rng(1)
    text = rng.standard_normal((5, 7, 32)).astype(np.float32)
    text /= np.linalg.norm(text, axis=2, keepdims=True)
    images = rng.standard_normal((6, 32)).astype(np.float32)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    result = AutoCLIP(0.7).fit(text, logit_scale=50.0, logit_bias=-2.0).predict(images)
    scores, weights, _ = oracle(np.einsum("nd,ckd->nck", images.astype(float), text.astype(float)), 0.7)
    np.testing.assert_allclose(result.similarities, scores, atol=1e-6)
    np.testing.assert_allclose(result.prompt_weights, weights, atol=1e-4)
    np.testing.assert_allclose(result.logits, 50 * scores - 2, atol=1e-4)


@given(SIZES, st.floats(0.05, 1.0), st.integers(0, 2**32 - 1))
def test_weights_are_a_distribution_with_the_requested_entropy(sizes, beta, seed):
    cosines = cosines_of(np.random.default_rng(seed), sizes)
    _, weights = auto_clip(cosines, beta)
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    assert (weights >= 0).all()
    np.testing.assert_allclose(entropy(weights), beta * np.log(sizes[2]), atol=1e-6)


def test_the_gradient_of_the_logsumexp_equals_finite_differences():
    rng = np.random.default_rng(2)
    cosines = cosines_of(rng, (1, 4, 5))

    def logsumexp(logits):
        weights = np.exp(logits) / np.exp(logits).sum()
        return np.log(np.exp(cosines[0] @ weights).sum())

    step = 1e-6
    numeric = np.array([(logsumexp(row) - logsumexp(-row)) / (2 * step) for row in step * np.eye(5)])
    means = cosines[0].mean(axis=1)
    shares = np.exp(means) / np.exp(means).sum()
    gradient = (shares[:, None] * (cosines[0] - means[:, None])).sum(axis=0) / 5
    np.testing.assert_allclose(gradient, numeric, atol=1e-9)
    # The weights are softmax(a * gradient) for some a >= 0: their logarithms are linear in it.
    _, (weights,) = auto_clip(cosines, 0.85)
    slope, _ = np.polyfit(gradient, np.log(weights), 1)
    assert slope > 0
    np.testing.assert_allclose(
        np.log(weights) - slope * gradient, (np.log(weights) - slope * gradient).mean(), atol=1e-8
    )


def test_weights_apply_to_prompts_and_not_to_classes():
    """A bug of the reference: its weights are applied to the axis of the classes."""
    cosines = np.array([[[0.9, 0.1, 0.1], [0.1, 0.1, 0.1], [0.1, 0.1, 0.1]]])
    scores, weights = auto_clip(cosines, 0.5)
    assert weights[0].argmax() == 0
    np.testing.assert_allclose(scores[0], cosines[0] @ weights[0])


def test_prompts_with_equal_cosines_get_equal_weights():
    """The reference raises an error, because there is no sign change to bracket."""
    scores, weights = auto_clip(np.full((2, 3, 4), 0.25), 0.85)
    np.testing.assert_allclose(weights, 0.25)
    np.testing.assert_allclose(scores, 0.25)


def test_a_tie_at_the_maximum_with_too_large_an_entropy_shares_the_weight():
    """log(3) exceeds 0.5 * log(4): the requested entropy cannot be reached."""
    weights = entropic_softmax(np.array([[1.0, 1.0, 1.0, 0.0]]), 0.5)
    np.testing.assert_allclose(weights, [[1 / 3, 1 / 3, 1 / 3, 0]], atol=1e-12)


def test_a_single_prompt_has_weight_one():
    scores, weights = auto_clip(np.array([[[0.3], [0.1]]]), 0.85)
    assert weights.tolist() == [[1.0]]
    np.testing.assert_allclose(scores, [[0.3, 0.1]])


def test_a_single_class_is_finite():
    scores, weights = auto_clip(np.array([[[0.3, 0.1]]]), 0.85)
    assert np.isfinite(scores).all()
    assert weights[0, 0] > weights[0, 1]


def test_beta_one_gives_equal_weights():
    _, weights = auto_clip(cosines_of(np.random.default_rng(3), (2, 3, 4)), 1.0)
    np.testing.assert_allclose(weights, 0.25)


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e3])
def test_the_bracket_works_for_gradients_of_any_size(factor):
    values = factor * np.random.default_rng(4).standard_normal((3, 6))
    np.testing.assert_allclose(entropy(entropic_softmax(values, 0.6)), 0.6 * np.log(6), atol=1e-6)


def test_prompts_are_weighted_per_image_in_batches_of_any_size(monkeypatch):
    rng = np.random.default_rng(5)
    text = rng.standard_normal((4, 3, 8)).astype(np.float32)
    images = rng.standard_normal((10, 8)).astype(np.float32) / 8
    whole = AutoCLIP().fit(text, logit_scale=1, logit_bias=None).predict(images)
    monkeypatch.setattr("app.adapters.auto_clip._AT_ONCE", 25)
    pieces = AutoCLIP().fit(text, logit_scale=1, logit_bias=None).predict(images)
    np.testing.assert_allclose(pieces.logits, whole.logits, atol=1e-6)
    np.testing.assert_allclose(pieces.prompt_weights, whole.prompt_weights, atol=1e-6)
