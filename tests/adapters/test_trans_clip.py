import numpy as np
import pytest

from app.adapters import trans_clip as module
from app.adapters._base import Examples
from app.adapters.trans_clip import NEAREST, TransCLIP, first_means, neighbour_graph, trans_clip
from app.scoring.numerics import softmax
from tests.adapters.neighbours import clustered, nearest, nearest_others, pool_of
from tests.oracles.extras import transclip as oracle


def problem(rng, **changes):
    """Return a problem in which every dimension varies, because the reference divides by every variance."""
    sizes = {"images": int(rng.integers(8, 50)), "classes": int(rng.integers(1, 8)), "dims": int(rng.integers(4, 24))}
    return clustered(rng, **{**sizes, "noise": rng.choice([0.5, 1, 3]), **changes})


def fitted(adapter, text, pool, *, balanced=False, **given):
    """Fit an adapter to a pool, by default one with any shares of the classes."""
    adapter.balanced = balanced
    examples = pool_of(pool, adapter.neighbours)
    return adapter.fit(text, **{"logit_scale": 50.0, "logit_bias": None, "examples": examples, **given})


def shares_of(adapter, pool, queries):
    return softmax(adapter.predict(queries, nearest(queries, pool, adapter.neighbours)).logits)


def computed_directly(query, text, pool, shares, means, variances, *, scale, lam):
    """Return the shares of one query by the equations of the paper."""
    prior = softmax(scale * (text @ query)[None])[0]
    density = -0.5 * (((query - means) ** 2) / variances).sum(axis=1)
    order = np.argsort(-(pool @ query))[:NEAREST]
    pull = sum((pool[other] @ query) * shares[other] for other in order) * 50 / (2 * NEAREST)
    found = density + pull
    found = prior**lam * np.exp((found - found.max()) / 50)
    return found / found.sum()


def test_two_hundred_random_problems_equal_the_reference():
    rng = np.random.default_rng(0)
    worst = 0.0
    for _ in range(200):
        text, pool, *_ = problem(rng)
        settings = {"scale": float(rng.choice([10, 50, 100])), "lam": float(rng.choice([0.5, 1]))}
        shares, _ = trans_clip(pool, text, neighbour_graph(nearest_others(pool, 3), len(pool)), **settings)
        worst = max(worst, np.abs(shares - oracle(pool, text, **settings)).max())
    assert worst <= 1e-9, worst


def test_two_hundred_queries_equal_the_equations():
    rng = np.random.default_rng(1)
    worst = 0.0
    for _ in range(20):
        text, pool, queries, *_ = problem(rng, queries=10, dtype=np.float32)
        adapter = fitted(TransCLIP(lam=0.7), text, pool)
        shares, gaussians = adapter.shares_.astype(float), adapter.gaussians_
        result = shares_of(adapter, pool, queries)
        wide = [array.astype(float) for array in (queries, text, pool)]
        wanted = [
            computed_directly(query, *wide[1:], shares, gaussians.means, gaussians.variances, scale=50, lam=0.7)
            for query in wide[0]
        ]
        worst = max(worst, np.abs(result - wanted).max())
    assert worst <= 1e-4, worst


def test_the_adapter_in_float32_equals_the_reference_in_float64():
    rng = np.random.default_rng(2)
    for scale in (15.0, 100.0) * 10:
        text, pool, *_ = problem(rng, images=60, dtype=np.float32)
        adapter = fitted(TransCLIP(), text, pool, logit_scale=scale)
        wanted = oracle(pool.astype(float), text.astype(float), scale=scale)
        np.testing.assert_allclose(softmax(adapter.pool_scores(pool).logits), wanted, atol=1e-3)


def test_a_class_starts_at_its_most_probable_images():
    rng = np.random.default_rng(3)
    text, pool, *_ = clustered(rng, images=40, classes=3, dims=12)
    shares = softmax(100 * pool @ text.T)
    best = np.argsort(-shares, axis=0)[:8]
    wanted = np.stack([(shares[best[:, c], c, None] * pool[best[:, c]]).sum(axis=0) for c in range(3)])
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(first_means(pool, text, 100.0), wanted, atol=1e-9)


def test_a_class_without_probable_images_has_a_start():
    _, pool, *_ = problem(np.random.default_rng(15), images=20, noise=0.3)
    centre = pool.mean(axis=0, keepdims=True) / np.linalg.norm(pool.mean(axis=0))
    means = first_means(pool, np.vstack([centre, -centre]), 5000.0)
    np.testing.assert_allclose(np.linalg.norm(means, axis=1), 1)


def test_computation_in_chunks_is_the_same(monkeypatch):
    text, pool, queries, *_ = problem(np.random.default_rng(4), images=50, queries=9, dtype=np.float32)
    adapter = fitted(TransCLIP(), text, pool)
    whole = shares_of(adapter, pool, queries), adapter.shares_
    monkeypatch.setattr(module, "_AT_ONCE", 60)
    adapter = fitted(TransCLIP(), text, pool)
    np.testing.assert_allclose(shares_of(adapter, pool, queries), whole[0], atol=1e-4)
    np.testing.assert_allclose(adapter.shares_, whole[1], atol=1e-4)


def test_mutual_links_count_twice_and_images_are_not_their_own_neighbours():
    pool = problem(np.random.default_rng(5), images=20)[1]
    graph = neighbour_graph(nearest_others(pool, 5), 20).toarray()
    near = nearest_others(pool, 3)
    one_way = np.zeros((20, 20))
    np.put_along_axis(one_way, near.indices, near.cosines, axis=1)
    np.testing.assert_allclose(graph, (one_way + one_way.T) / 6)
    assert not graph.diagonal().any()


def test_balanced_pools_are_classified_better_than_by_zero_shot():
    text, pool, queries, pool_labels, labels = clustered(
        np.random.default_rng(6), images=400, classes=10, dims=32, queries=400, noise=1.0, gap=1.3, dtype=np.float32
    )
    adapter = fitted(TransCLIP(), text, pool, balanced=True, logit_scale=20.0)
    assert (shares_of(adapter, pool, queries).argmax(axis=1) == labels).mean() > (
        (queries @ text.T).argmax(axis=1) == labels
    ).mean()
    result = adapter.pool_scores(pool)
    assert (result.logits.argmax(axis=1) == pool_labels).mean() > (
        result.similarities.argmax(axis=1) == pool_labels
    ).mean()


def test_identical_images_have_no_variance_and_give_nearly_the_results_of_zero_shot():
    _, pool, *_ = clustered(np.random.default_rng(7), images=1, classes=1, dims=16, dtype=np.float32)
    same = np.repeat(pool, 6, axis=0)
    text = clustered(np.random.default_rng(8), images=6, classes=3, dims=16, dtype=np.float32)[0]
    adapter = TransCLIP()
    fitted(adapter, text, same, logit_scale=3.0)
    result = adapter.pool_scores(same)
    assert adapter.learned_
    assert result.logits.argmax(axis=1).tolist() == result.similarities.argmax(axis=1).tolist()
    assert np.isfinite(result.logits).all()


@pytest.mark.parametrize(("images", "classes"), [(1, 1), (1, 2), (2, 2), (20, 1), (3, 8)])
def test_tiny_problems_are_finite(images, classes):
    text, pool, queries, *_ = clustered(
        np.random.default_rng(9), images=images, classes=classes, dims=16, queries=4, dtype=np.float32
    )
    adapter = TransCLIP()
    fitted(adapter, text, pool)
    assert adapter.learned_
    result = adapter.predict(queries, nearest(queries, pool, 3))
    assert not result.warnings
    np.testing.assert_allclose(softmax(result.logits).sum(axis=1), 1, rtol=1e-5)
    assert np.isfinite(adapter.pool_scores(pool).logits).all()


def test_an_empty_pool_gives_the_results_of_zero_shot_with_a_warning():
    text, _, queries, *_ = clustered(
        np.random.default_rng(10), images=4, classes=3, dims=8, queries=4, dtype=np.float32
    )
    result = TransCLIP().fit(text, logit_scale=20.0, logit_bias=-3.0, examples=Examples()).predict(queries)
    np.testing.assert_allclose(result.logits, 20 * result.similarities - 3)
    assert "no unlabelled images" in result.warnings[0]


def test_a_pool_of_few_classes_is_not_used():
    text, pool, _, labels, _ = clustered(
        np.random.default_rng(11), images=200, classes=10, dims=64, noise=0.3, gap=0.3, dtype=np.float32
    )
    adapter = fitted(TransCLIP(), text, pool[labels < 2], balanced=True)
    assert not adapter.learned_
    assert "of 10 classes" in adapter.warnings_[0]


def test_float64_features_give_the_same_results():
    text, pool, queries, *_ = problem(np.random.default_rng(12), queries=9)
    narrow = [array.astype(np.float32) for array in (text, pool, queries)]
    wide = shares_of(fitted(TransCLIP(), text, pool), pool, queries)
    np.testing.assert_allclose(shares_of(fitted(TransCLIP(), *narrow[:2]), *narrow[1:]), wide, atol=1e-4)


def test_the_bias_of_a_sigmoid_encoder_and_negative_cosines_have_no_effect():
    text, pool, queries, *_ = problem(np.random.default_rng(13), images=60, classes=4, queries=9, dtype=np.float32)
    text = (text - 2 * pool.mean(axis=0)).astype(np.float32)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    assert (pool @ text.T).mean() < 0
    plain = fitted(TransCLIP(), text, pool, logit_scale=117.0)
    moved = fitted(TransCLIP(), text, pool, logit_scale=117.0, logit_bias=-16.0)
    assert plain.learned_
    assert moved.learned_
    np.testing.assert_allclose(shares_of(moved, pool, queries), shares_of(plain, pool, queries), atol=1e-4)


def test_an_image_has_the_same_scores_alone_and_in_a_batch():
    text, pool, queries, *_ = problem(np.random.default_rng(14), images=40, queries=8, dtype=np.float32)
    adapter = fitted(TransCLIP(), text, pool)
    alone = np.vstack([shares_of(adapter, pool, queries[[index]]) for index in range(8)])
    np.testing.assert_allclose(alone, shares_of(adapter, pool, queries), atol=1e-5)
    assert shares_of(adapter, pool, queries[:0]).shape == (0, len(text))
