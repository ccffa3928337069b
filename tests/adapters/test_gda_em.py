import numpy as np
import pytest

from app.adapters._base import Examples
from app.adapters.gda_em import GDAEM, fit_em
from tests.adapters.problems import PROBLEMS, difference, problem, same_in_float64, unit
from tests.oracles import gda as oracle


def fitted(drawn, alpha=1.0, rounds=10, tolerance=1e-4):
    return fit_em(
        drawn.rows, drawn.text, logit_scale=drawn.logit_scale, alpha=alpha, rounds=rounds, tolerance=tolerance
    )


def oracle_classifier(drawn, alpha):
    weights, biases, _ = oracle.fit_em(
        drawn.rows.astype(float), drawn.text.astype(float), alpha=alpha, scale=drawn.logit_scale
    )
    return weights, biases


def test_two_hundred_random_problems_equal_the_reference():
    """In single precision, like the stored shares. Some have negative cosines, or more dimensions than images."""
    worst = 0.0
    for seed in range(PROBLEMS):
        drawn = problem(seed)
        alpha = (0.01, 0.1, 1.0)[seed % 3]
        weights, biases, _, _ = fitted(drawn, alpha)
        wanted_weights, wanted_biases = oracle_classifier(drawn, alpha)
        worst = max(worst, difference(weights, wanted_weights), difference(biases, wanted_biases))
    assert worst <= 1e-6


def test_new_images_are_classified_like_by_the_reference():
    """Up to a constant per image, which keeps the level of the scores of a sigmoid encoder."""
    worst, learned = 0.0, 0
    for seed in range(PROBLEMS):
        drawn = problem(seed)
        adapter = drawn.fit(GDAEM(alpha=0.5), drawn.pool)
        weights, biases = oracle_classifier(drawn, 0.5)
        added = drawn.queries.astype(float) @ weights + biases
        wanted = drawn.zero_shot() + 0.5 * (added - added.mean(axis=1, keepdims=True))
        if adapter.learned_:
            learned += 1
            worst = max(worst, difference(adapter.predict(drawn.queries).logits, wanted))
    assert learned > PROBLEMS / 2
    assert worst <= 1e-5


def test_the_pool_can_be_processed_in_chunks(monkeypatch):
    drawn = problem(1, classes=4, dims=12, images=20)
    whole = fitted(drawn)
    monkeypatch.setattr("app.adapters.gda_em._AT_ONCE", 12 * 7)
    pieces = fitted(drawn)
    np.testing.assert_allclose(pieces[0], whole[0], rtol=1e-6, atol=1e-6)
    assert pieces[3] == whole[3]


def test_the_covariance_is_the_mean_of_those_of_the_classes():
    """One round with certain shares equals the few-shot formula of the reference with equal weights of the classes."""
    rng = np.random.default_rng(2)
    text = np.eye(3, 6, dtype=np.float32)
    labels = np.repeat(np.arange(3), [4, 9, 20])
    rows = unit(text[labels] + 0.05 * rng.standard_normal((33, 6))).astype(np.float32)
    weights, _, masses, _ = fit_em(rows, text, logit_scale=1000.0, alpha=1.0, rounds=1, tolerance=0.0)
    np.testing.assert_allclose(masses, [4, 9, 20], rtol=1e-6)
    wide = rows.astype(float)
    means = np.stack([wide[labels == label].mean(axis=0) for label in range(3)])
    covariance = np.mean([np.cov(wide[labels == label].T, bias=True) for label in range(3)], axis=0)
    precision = 6 * np.linalg.inv(32 * covariance + np.trace(covariance) * np.eye(6))
    np.testing.assert_allclose(weights, precision @ means.T, rtol=1e-5, atol=1e-5)


def test_a_class_without_images_keeps_its_text_and_is_finite():
    rng = np.random.default_rng(3)
    text = np.eye(4, 8, dtype=np.float32)
    rows = unit(text[rng.integers(0, 3, 40)] + 0.05 * rng.standard_normal((40, 8))).astype(np.float32)
    adapter = GDAEM()
    adapter.balanced = False
    adapter.fit(text, logit_scale=100.0, logit_bias=None, examples=Examples(pool_features=rows))
    assert adapter.learned_
    assert adapter.diagnostics_["least_images_of_a_class"] < 1e-6
    wanted, _, _ = oracle.fit_em(rows.astype(float), text.astype(float), scale=100.0)
    assert difference(adapter.W_, wanted - wanted.mean(axis=1, keepdims=True)) <= 1e-6
    result = adapter.predict(text).logits
    assert np.isfinite(result).all()
    assert result.argmax(axis=1).tolist() == [0, 1, 2, 3]


def test_a_pool_of_few_classes_is_not_used():
    """The method assumes classes of similar size."""
    text = np.eye(6, dtype=np.float32)
    examples = Examples(pool_features=unit(text[[0, 0, 0, 1]] + 0.01).astype(np.float32))
    result = GDAEM().fit(text, logit_scale=20.0, logit_bias=None, examples=examples).predict(text)
    np.testing.assert_allclose(result.logits, 20 * text, atol=1e-5)
    assert "about the same number of images of each class" in result.warnings[0]


@pytest.mark.parametrize("count", [1, 2, 7])
def test_identical_images_give_the_results_of_zero_shot(count):
    drawn = problem(4, classes=2)
    adapter = GDAEM()
    adapter.balanced = False  # one image has one class
    result = drawn.fit(adapter, Examples(pool_features=np.repeat(drawn.rows[:1], count, axis=0))).predict(drawn.queries)
    np.testing.assert_allclose(result.logits, drawn.zero_shot(), atol=1e-4)
    assert "all the same" in result.warnings[0]


def test_more_classes_than_images_are_finite():
    drawn = problem(5, classes=7, dims=16)
    rows = np.concatenate([drawn.rows[drawn.labels == label][:1] for label in range(6)])
    weights, biases, _, _ = fit_em(rows, drawn.text, logit_scale=50.0, alpha=1.0, rounds=10, tolerance=1e-4)
    assert np.isfinite(weights).all()
    assert np.isfinite(biases).all()


def test_the_scale_of_the_encoder_is_used():
    drawn = problem(6)
    first, second = (
        fit_em(drawn.rows, drawn.text, logit_scale=scale, alpha=1.0, rounds=1, tolerance=0.0)[0]
        for scale in (5.0, 100.0)
    )
    assert np.abs(first - second).max() > 1e-3


def test_without_rounds_or_weight_the_results_are_those_of_zero_shot():
    drawn = problem(7, sigmoid=True)
    for adapter in (GDAEM(rounds=0), GDAEM(alpha=0.0)):
        result = drawn.fit(adapter, drawn.pool).predict(drawn.queries)
        np.testing.assert_allclose(result.logits, drawn.zero_shot(), atol=1e-4)


def test_it_stops_when_the_shares_have_converged():
    drawn = problem(8, images=8)
    assert fitted(drawn, tolerance=2.0)[3] == 1
    assert fitted(drawn, tolerance=0.0)[3] == 10
    assert fitted(drawn, rounds=3, tolerance=0.0)[3] == 3


def test_a_single_class_has_the_results_of_zero_shot():
    drawn = problem(10, classes=1)
    result = drawn.fit(GDAEM(), drawn.pool).predict(drawn.queries)
    np.testing.assert_allclose(result.logits, drawn.zero_shot(), atol=1e-4)


def test_double_precision_gives_the_same_logits():
    drawn = problem(11)
    same_in_float64(drawn, GDAEM, drawn.pool)


def test_pool_images_have_the_same_results_as_queries():
    drawn = problem(12, sigmoid=False, classes=3, images=6)
    adapter = drawn.fit(GDAEM(), drawn.pool)
    np.testing.assert_allclose(
        adapter.pool_scores(drawn.rows).logits, adapter.predict(drawn.rows).logits, rtol=1e-5, atol=1e-4
    )
