import importlib
import sys

import numpy as np
import pytest

from app.adapters._base import Examples
from app.adapters.inmap import learned_proxies
from app.adapters.inmap_zlap import InMaPZLaP
from app.adapters.zlap import propagation
from app.scoring.numerics import softmax
from tests.adapters.neighbours import clustered, nearest, nearest_others, pool_of
from tests.oracles import text_prototypes
from tests.oracles import zlap as oracle

sys.modules.setdefault("text_prototypes", text_prototypes)  # the name under which the reference imports it
inmap_oracle = importlib.import_module("tests.oracles.inmap")


def fitted(adapter, text, pool, **given):
    examples = pool_of(pool, adapter.neighbours)
    return adapter.fit(text, **{"logit_scale": 50.0, "logit_bias": None, "examples": examples, **given})


def shares_of(adapter, pool, queries):
    return softmax(adapter.predict(queries, nearest(queries, pool, adapter.neighbours)).logits)


def test_two_hundred_random_problems_equal_both_references_in_sequence():
    rng = np.random.default_rng(0)
    worst = np.zeros(2)
    for _ in range(200):
        text, pool, queries, *_ = clustered(
            rng, images=int(rng.integers(2, 30)), classes=int(rng.integers(1, 6)), dims=12, queries=3
        )
        found, _ = learned_proxies(pool, text, steps=30)
        wanted = inmap_oracle.inmap(pool, text, inmap_oracle.sinkhorn(pool @ text.T), iters=30)
        reached = propagation(pool, found, nearest_others(pool, 10), k=10, gamma=3.0, alpha=0.3, scaled=True)
        values, span = oracle.fit(pool, wanted, 10, 3.0, 0.3, scale_sim=True)
        nodes, weights, _ = oracle.weights(queries, pool, wanted, 10, 3.0, span)
        differences = (
            reached.pool_masses() - values[len(text) :],
            reached.query_masses(queries, nearest(queries, pool, 10)) - np.einsum("qj,qjc->qc", weights, values[nodes]),
        )
        worst = np.maximum(worst, [np.abs(difference).max() for difference in differences])
    assert (worst <= 1e-5).all(), worst


def test_labels_are_propagated_from_the_proxies_with_rescaled_cosines():
    text, pool, queries, *_ = clustered(
        np.random.default_rng(1), images=60, classes=4, dims=16, queries=9, dtype=np.float32
    )
    adapter = fitted(InMaPZLaP(), text, pool)
    proxies = adapter.propagation_.text.astype(float)
    values, span = oracle.fit(pool.astype(float), proxies, 10, 3.0, 0.3, scale_sim=True)
    nodes, weights, _ = oracle.weights(queries.astype(float), pool.astype(float), proxies, 10, 3.0, span)
    wanted = np.einsum("qj,qjc->qc", weights, values[nodes])
    np.testing.assert_allclose(shares_of(adapter, pool, queries), wanted / wanted.sum(axis=1, keepdims=True), atol=1e-4)
    assert adapter.diagnostics_["kept_classes"] == 4
    assert adapter.diagnostics_["images"] == 60


def test_balanced_pools_are_classified_better_than_by_zero_shot():
    text, pool, queries, _, labels = clustered(
        np.random.default_rng(2), images=400, classes=10, dims=32, queries=400, noise=1.0, gap=1.5, dtype=np.float32
    )
    adapter = fitted(InMaPZLaP(), text, pool)
    result = shares_of(adapter, pool, queries).argmax(axis=1)
    assert (result == labels).mean() > ((queries @ text.T).argmax(axis=1) == labels).mean()


def test_negative_cosines_with_the_text_are_allowed():
    text, pool, queries, *_ = clustered(
        np.random.default_rng(3), images=80, classes=4, dims=16, queries=9, dtype=np.float32
    )
    moved_text = np.hstack([text, np.full((4, 1), 1)]).astype(np.float32) / np.float32(np.sqrt(2))
    moved, queries = (
        np.hstack([rows, np.full((len(rows), 1), -1)]).astype(np.float32) / np.float32(np.sqrt(2))
        for rows in (pool, queries)
    )
    adapter = fitted(InMaPZLaP(), moved_text, moved, logit_scale=117.0, logit_bias=-16.0)
    assert adapter.learned_
    assert not np.allclose(shares_of(adapter, moved, queries), 1 / 4, atol=0.01)


@pytest.mark.parametrize("keep", [0, 1])
def test_classes_with_the_same_text_have_the_same_score(keep):
    text, pool, queries, *_ = clustered(
        np.random.default_rng(4), images=50, classes=4, dims=16, queries=9, dtype=np.float32
    )
    once = shares_of(fitted(InMaPZLaP(keep=keep), text, pool), pool, queries)
    both = shares_of(fitted(InMaPZLaP(keep=keep), np.stack([text[2], *text]), pool), pool, queries)
    np.testing.assert_array_equal(both[:, 0], both[:, 3])
    np.testing.assert_allclose(both[:, 1:] / both[:, 1:].sum(axis=1, keepdims=True), once, atol=0.01)


@pytest.mark.parametrize(("images", "classes"), [(1, 1), (1, 2), (20, 1), (3, 8)])
def test_tiny_problems_are_finite(images, classes):
    text, pool, queries, *_ = clustered(
        np.random.default_rng(5), images=images, classes=classes, dims=16, queries=4, dtype=np.float32
    )
    adapter = InMaPZLaP()
    adapter.balanced = False  # few images cannot have many classes
    shares = shares_of(fitted(adapter, text, pool), pool, queries)
    assert shares.shape == (4, classes)
    np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-5)
    assert np.isfinite(adapter.pool_scores(pool).logits).all()


def test_images_identical_to_the_only_class_have_no_effect():
    same = np.tile(np.eye(1, 8, dtype=np.float32), (6, 1))
    adapter = fitted(InMaPZLaP(), same[:1], same)
    assert not adapter.learned_
    assert "all the same" in adapter.warnings_[0]


def test_an_empty_pool_gives_the_results_of_zero_shot_with_a_warning():
    text, _, queries, *_ = clustered(np.random.default_rng(6), images=4, classes=3, dims=8, queries=4, dtype=np.float32)
    result = InMaPZLaP().fit(text, logit_scale=20.0, logit_bias=-3.0, examples=Examples()).predict(queries)
    np.testing.assert_allclose(result.logits, 20 * result.similarities - 3)
    assert "no unlabelled images" in result.warnings[0]


def test_a_pool_of_few_classes_is_not_used():
    text, pool, _, labels, _ = clustered(
        np.random.default_rng(7), images=200, classes=10, dims=64, noise=0.3, gap=0.3, dtype=np.float32
    )
    adapter = fitted(InMaPZLaP(), text, pool[labels < 2])
    assert not adapter.learned_
    assert "of 10 classes" in adapter.warnings_[0]


def test_float64_features_give_the_same_results():
    text, pool, queries, *_ = clustered(np.random.default_rng(8), images=50, classes=5, dims=16, queries=9)
    narrow = [array.astype(np.float32) for array in (text, pool, queries)]
    wide = shares_of(fitted(InMaPZLaP(), text, pool), pool, queries)
    np.testing.assert_allclose(shares_of(fitted(InMaPZLaP(), *narrow[:2]), *narrow[1:]), wide, atol=1e-3)
