import importlib
import sys

import numpy as np
import pytest

from app.adapters import inmap
from app.adapters._base import Examples
from app.adapters._examples import distinct_rows
from app.adapters.inmap import InMaP, balanced_labels, proxies
from app.scoring.numerics import softmax
from tests.adapters.neighbours import clustered
from tests.oracles import text_prototypes

sys.modules.setdefault("text_prototypes", text_prototypes)  # the name under which the reference imports it
oracle = importlib.import_module("tests.oracles.inmap")

SETTINGS = {"lr": 10.0, "tau_i": 0.04, "alpha": 0.6}


def problem(rng, **changes):
    sizes = {"images": int(rng.integers(1, 50)), "classes": int(rng.integers(1, 10)), "dims": int(rng.integers(4, 24))}
    return clustered(rng, **{**sizes, "noise": rng.choice([0.3, 1, 3]), **changes})


def fitted(adapter, text, pool, **given):
    examples = Examples(pool_features=pool)
    return adapter.fit(text, **{"logit_scale": 50.0, "logit_bias": None, "examples": examples, **given})


def test_two_hundred_random_problems_have_the_labels_of_the_reference():
    rng = np.random.default_rng(0)
    worst = 0.0
    for _ in range(200):
        text, pool, *_ = problem(rng)
        settings = {"tau_t": float(rng.choice([0.01, 0.05])), "gamma": float(rng.choice([0, 0.5, 1]))}
        cosines = pool @ text.T
        worst = max(worst, np.abs(balanced_labels(cosines, **settings) - oracle.sinkhorn(cosines, **settings)).max())
    assert worst <= 1e-9, worst


def test_two_hundred_random_problems_have_the_proxies_of_the_reference(monkeypatch):
    monkeypatch.setattr(inmap, "_STILL", 0)
    rng = np.random.default_rng(1)
    worst = 0.0
    for _ in range(200):
        text, pool, *_ = problem(rng)
        labels = oracle.sinkhorn(pool @ text.T)
        found, _ = proxies(pool, text, labels, steps=60, **SETTINGS)
        worst = max(worst, np.abs(found - oracle.inmap(pool, text, labels, iters=60)).max())
    assert worst <= 1e-9, worst


def test_early_stopping_gives_the_result_of_all_two_thousand_steps():
    rng = np.random.default_rng(2)
    worst, fewest = 0.0, 2000
    for _ in range(12):
        text, pool, *_ = problem(rng, images=40)
        labels = oracle.sinkhorn(pool @ text.T)
        found, taken = proxies(pool, text, labels, steps=2000, **SETTINGS)
        worst = max(worst, np.abs(found - oracle.inmap(pool, text, labels)).max())
        fewest = min(fewest, taken)
    assert worst <= 1e-5, worst
    assert fewest < 1000


def test_the_adapter_in_float32_is_close_to_the_reference_in_float64():
    """Rounding ends the steps at other points, so the proxies differ by more than rounding errors."""
    rng = np.random.default_rng(3)
    for _ in range(3):
        text, pool, queries, *_ = problem(rng, images=80, classes=5, dims=16, queries=20, dtype=np.float32)
        adapter = fitted(InMaP(steps=300), text, pool)
        wide_pool, wide_text = pool.astype(float), text.astype(float)
        wanted = oracle.inmap(wide_pool, wide_text, oracle.sinkhorn(wide_pool @ wide_text.T), iters=300)
        np.testing.assert_allclose(adapter.predict(queries).logits, 50 * queries @ wanted.T, atol=0.5)


def test_labels_are_balanced_over_classes_and_sum_to_one_per_image():
    text, pool, *_ = clustered(np.random.default_rng(4), images=60, classes=6, dims=32)
    labels = balanced_labels(pool @ text.T, tau_t=0.05, gamma=0.0)
    np.testing.assert_allclose(labels.sum(axis=1), 1)
    np.testing.assert_allclose(labels.sum(axis=0), 10, atol=0.2)


def test_a_class_without_probable_images_has_finite_labels():
    cosines = np.array([[0.9, -1.0, 0.1], [0.1, -1.0, 0.9]], np.float32)
    labels = balanced_labels(cosines, tau_t=0.001, gamma=0.0)
    assert np.isfinite(labels).all()
    np.testing.assert_allclose(labels, [[1, 0, 0], [0, 0, 1]], atol=1e-6)


def test_balanced_pools_are_classified_better_than_by_zero_shot():
    rng = np.random.default_rng(5)
    text, pool, queries, _, labels = clustered(
        rng, images=400, classes=10, dims=32, queries=400, noise=1.0, gap=1.5, dtype=np.float32
    )
    result = fitted(InMaP(), text, pool).predict(queries)
    right = (result.logits.argmax(axis=1) == labels).mean(), (result.similarities.argmax(axis=1) == labels).mean()
    assert right[0] > right[1]


def test_classes_with_the_same_text_share_a_proxy():
    rng = np.random.default_rng(6)
    text, pool, queries, *_ = clustered(rng, images=50, classes=4, dims=16, queries=9, dtype=np.float32)
    twice = np.stack([text[2], *text])
    both, once = (fitted(InMaP(steps=50), rows, pool).predict(queries).logits for rows in (twice, text))
    np.testing.assert_array_equal(both[:, 0], both[:, 3])
    np.testing.assert_allclose(both[:, 1:], once, atol=1e-3)


def test_unique_rows_keep_their_order():
    text = np.array([[3, 1], [1, 1], [3, 1], [0, 2]], np.float32)
    rows, which = distinct_rows(text)
    np.testing.assert_array_equal(rows, text[[0, 1, 3]])
    np.testing.assert_array_equal(rows[which], text)


def test_a_large_pool_is_sampled_deterministically(monkeypatch):
    rng = np.random.default_rng(7)
    text, pool, queries, *_ = clustered(rng, images=200, classes=4, dims=16, queries=9, dtype=np.float32)
    whole = fitted(InMaP(steps=50), text, pool)
    assert whole.diagnostics_["images"] == 200
    monkeypatch.setattr(inmap, "_MAX_STEP", 100 * text.size + 1)
    some, again = (fitted(InMaP(steps=50), text, pool) for _ in range(2))
    assert some.diagnostics_["images"] == 100
    np.testing.assert_array_equal(some.proxies_, again.proxies_)
    result, wanted = (adapter.predict(queries).logits.argmax(axis=1) for adapter in (some, whole))
    assert (result == wanted).mean() >= 0.7


def test_labels_computed_in_chunks_are_the_same(monkeypatch):
    text, pool, *_ = clustered(np.random.default_rng(8), images=50, classes=5, dims=16, dtype=np.float32)
    whole = balanced_labels(pool @ text.T, tau_t=0.01, gamma=0.0)
    monkeypatch.setattr(inmap, "_AT_ONCE", 17)
    np.testing.assert_allclose(balanced_labels(pool @ text.T, tau_t=0.01, gamma=0.0), whole, atol=1e-6)


@pytest.mark.parametrize(("images", "classes"), [(1, 1), (1, 2), (20, 1), (3, 8)])
def test_tiny_problems_are_finite(images, classes):
    text, pool, queries, *_ = clustered(
        np.random.default_rng(9), images=images, classes=classes, dims=16, queries=4, dtype=np.float32
    )
    adapter = InMaP(steps=100)
    adapter.balanced = False  # few images cannot have many classes
    result = fitted(adapter, text, pool).predict(queries)
    assert adapter.learned_
    assert not result.warnings
    assert np.isfinite(result.logits).all()
    np.testing.assert_allclose(np.linalg.norm(adapter.proxies_, axis=1), 1, rtol=1e-5)


def test_an_empty_pool_gives_the_results_of_zero_shot_with_a_warning():
    text, _, queries, *_ = clustered(
        np.random.default_rng(10), images=4, classes=3, dims=8, queries=4, dtype=np.float32
    )
    result = InMaP().fit(text, logit_scale=20.0, logit_bias=-3.0).predict(queries)
    np.testing.assert_allclose(result.logits, 20 * result.similarities - 3)
    assert "no unlabelled images" in result.warnings[0]


def test_a_pool_of_few_classes_is_not_used():
    text, pool, _, labels, _ = clustered(
        np.random.default_rng(11), images=200, classes=10, dims=64, noise=0.3, gap=0.3, dtype=np.float32
    )
    adapter = fitted(InMaP(), text, pool[labels < 2])
    assert not adapter.learned_
    assert "of 10 classes" in adapter.warnings_[0]


def test_float64_features_give_the_same_results():
    text, pool, queries, *_ = clustered(np.random.default_rng(12), images=50, classes=5, dims=16, queries=9)
    narrow = [array.astype(np.float32) for array in (text, pool, queries)]
    wide = fitted(InMaP(steps=50), text, pool).predict(queries).logits
    np.testing.assert_allclose(fitted(InMaP(steps=50), *narrow[:2]).predict(narrow[2]).logits, wide, atol=1e-3)


def test_a_sigmoid_encoder_keeps_its_bias_and_works_with_negative_cosines():
    rng = np.random.default_rng(13)
    text, pool, queries, *_ = clustered(rng, images=80, classes=4, dims=16, queries=9, dtype=np.float32)
    away = np.hstack([text, np.full((4, 1), 1)]) / np.sqrt(2)
    lift = lambda rows: np.hstack([rows, np.full((len(rows), 1), -1.0)]).astype(np.float32) / np.sqrt(2)  # noqa: E731
    assert (lift(pool) @ away.T).max() <= 0.01
    result = fitted(InMaP(steps=50), away.astype(np.float32), lift(pool), logit_scale=117.0, logit_bias=-16.0)
    logits = result.predict(lift(queries)).logits
    np.testing.assert_allclose(logits, 117 * lift(queries) @ result.proxies_.T - 16, rtol=1e-4, atol=1e-4)
    assert not np.allclose(softmax(logits), 1 / 4)


def test_pool_images_have_the_same_results_as_queries():
    text, pool, *_ = clustered(np.random.default_rng(14), images=30, classes=3, dims=8, dtype=np.float32)
    adapter = fitted(InMaP(steps=20), text, pool)
    np.testing.assert_array_equal(adapter.pool_scores(pool).logits, adapter.predict(pool).logits)
