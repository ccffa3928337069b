import numpy as np
import pytest

from app.adapters._base import Examples
from app.adapters.tip_adapter import ALPHAS, BETAS, TipAdapter, votes
from tests.adapters.problems import PROBLEMS, difference, problem, same_in_float64
from tests.oracles.extras import tip_adapter as oracle


def wanted(drawn, alpha, beta):
    queries, text, rows = (array.astype(float) for array in (drawn.queries, drawn.text, drawn.rows))
    return oracle(queries, text, rows, drawn.labels, alpha, beta, drawn.logit_scale) + (drawn.logit_bias or 0)


def test_two_hundred_random_problems_equal_the_reference():
    """Some have more dimensions than images, or an encoder with a bias and negative cosines."""
    worst = 0.0
    for seed in range(PROBLEMS):
        drawn = problem(seed)
        rng = np.random.default_rng(seed)
        alpha, beta = rng.uniform(0.1, 20), rng.uniform(0.5, 10)
        result = drawn.fit(TipAdapter(alpha, beta), drawn.support).predict(drawn.queries)
        worst = max(worst, difference(result.logits, wanted(drawn, alpha, beta)))
        assert result.warnings == ()
    assert worst <= 2e-6


def test_images_can_be_processed_in_chunks(monkeypatch):
    drawn = problem(1)
    monkeypatch.setattr("app.adapters.tip_adapter._AT_ONCE", 4 * len(drawn.rows))
    result = drawn.fit(TipAdapter(1.0), drawn.support).predict(drawn.queries)
    assert difference(result.logits, wanted(drawn, 1.0, 5.5)) <= 2e-6


def test_one_image_per_class_votes_for_it():
    text = np.eye(3, 8, dtype=np.float32)
    rows = np.eye(3, 8, k=4, dtype=np.float32)
    adapter = TipAdapter(2.0).fit(text, logit_scale=10.0, logit_bias=None, examples=Examples(rows, np.array([2, 0, 1])))
    result = adapter.predict(rows).logits
    assert result.argmax(axis=1).tolist() == [2, 0, 1]
    np.testing.assert_allclose(result[0], 2 * np.exp([-5.5, -5.5, 0.0]), rtol=1e-5)


def test_a_class_without_images_gets_no_votes_and_a_warning():
    drawn = problem(2, classes=4)
    kept = drawn.labels != 1
    adapter = drawn.fit(TipAdapter(1.0), Examples(drawn.rows[kept], drawn.labels[kept]))
    result = adapter.predict(drawn.queries)
    np.testing.assert_allclose(result.logits[:, 1], drawn.zero_shot()[:, 1], rtol=1e-5, atol=1e-4)
    assert "classes without a labelled image: 1;" in result.warnings[0]
    assert np.isfinite(result.logits).all()


def test_each_copy_of_an_image_votes():
    drawn = problem(3)
    twice = Examples(np.tile(drawn.rows, (2, 1)), np.tile(drawn.labels, 2))
    once = drawn.fit(TipAdapter(2.0), drawn.support).predict(drawn.queries).logits
    np.testing.assert_allclose(
        drawn.fit(TipAdapter(1.0), twice).predict(drawn.queries).logits, once, rtol=1e-5, atol=1e-4
    )


def test_more_classes_than_images_are_finite():
    drawn = problem(4, classes=7)
    for alpha in (0.0, 1.0):
        result = drawn.fit(TipAdapter(alpha), Examples(drawn.rows[:2], drawn.labels[:2])).predict(drawn.queries)
        assert np.isfinite(result.logits).all()


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_double_precision_gives_the_same_logits(alpha):
    drawn = problem(5)
    same_in_float64(drawn, lambda: TipAdapter(alpha), drawn.support)


def test_votes_equal_a_sum_over_one_hot_labels():
    rng = np.random.default_rng(6)
    labels = np.sort(rng.integers(0, 5, 30))
    cosines = rng.uniform(-1, 1, (4, 30))
    np.testing.assert_allclose(votes(cosines, labels, 3.0, 6), np.exp(-3 * (1 - cosines)) @ np.eye(6)[labels])


def test_alpha_and_beta_equal_those_of_a_simple_search():
    for seed in range(8):
        drawn = problem(seed, images=5, classes=4, dims=20)
        rows, labels = drawn.rows.astype(float), drawn.labels
        seen = dict.fromkeys(range(4), 0)
        folds = np.empty(len(labels), int)
        for index, label in enumerate(labels):
            folds[index] = seen[label] % 5
            seen[label] += 1
        other = folds[:, None] != folds[None]
        zero_shot = drawn.zero_shot(drawn.rows)
        losses = {}
        for beta in BETAS:
            counted = (np.exp(-beta * (1 - rows @ rows.T)) * other) @ np.eye(4)[labels]
            for alpha in ALPHAS:
                scaled = (zero_shot + alpha * counted)[None] * 2.0 ** np.linspace(-10, 4, 281)[:, None, None]
                scaled -= scaled.max(axis=2, keepdims=True)
                log_shares = scaled - np.log(np.exp(scaled).sum(axis=2, keepdims=True))
                losses[alpha, beta] = -log_shares[:, np.arange(len(labels)), labels].mean(axis=1).max()
        adapter = drawn.fit(TipAdapter(0), drawn.support)
        assert losses[adapter.alpha_, adapter.beta_] <= min(losses.values()) + 2e-3
        assert adapter.warnings_ == ()


def test_the_selected_weight_follows_the_labels():
    drawn = problem(12, classes=4, dims=16, images=12)
    nothing = Examples(drawn.rows, np.random.default_rng(0).permutation(drawn.labels))
    assert drawn.fit(TipAdapter(0), nothing).alpha_ <= 1
    useless_text = np.roll(drawn.text, 1, axis=0)
    adapter = TipAdapter(0).fit(useless_text, logit_scale=drawn.logit_scale, logit_bias=None, examples=drawn.support)
    assert adapter.alpha_ >= 10


def test_too_few_images_for_a_selection_use_the_default_weight():
    drawn = problem(13, classes=4)
    single = np.array([np.flatnonzero(drawn.labels == label)[0] for label in range(4)])
    adapter = drawn.fit(TipAdapter(0), Examples(drawn.rows[single], drawn.labels[single]))
    assert (adapter.alpha_, adapter.beta_) == (1.0, 5.5)
    assert "a fixed one is used" in adapter.warnings_[0]


def test_inputs_are_not_modified():
    drawn = problem(14)
    for array in (drawn.rows, drawn.labels, drawn.text, drawn.queries):
        array.flags.writeable = False
    drawn.fit(TipAdapter(0), drawn.support).predict(drawn.queries)
