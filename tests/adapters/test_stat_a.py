import numpy as np
import pytest
import scipy.sparse as sp

from app.adapters import trans_clip as pieces_of
from app.adapters._base import Examples
from app.adapters.stat_a import StatA, stat_a
from app.adapters.trans_clip import NEAREST, neighbour_graph
from app.scoring.numerics import softmax
from tests.adapters.neighbours import clustered, nearest, nearest_others, pool_of
from tests.oracles.extras import stata as oracle


def problem(rng, **changes):
    sizes = {"images": int(rng.integers(2, 50)), "classes": int(rng.integers(1, 8)), "dims": int(rng.integers(4, 24))}
    return clustered(rng, **{**sizes, "noise": rng.choice([0.5, 1, 3]), **changes})


def fitted(adapter, text, pool, **given):
    examples = pool_of(pool, adapter.neighbours)
    return adapter.fit(text, **{"logit_scale": 50.0, "logit_bias": None, "examples": examples, **given})


def shares_of(adapter, pool, queries):
    return softmax(adapter.predict(queries, nearest(queries, pool, adapter.neighbours)).logits)


def computed_directly(query, text, pool, adapter, *, scale):
    """Return the shares of one query by the equations of the paper."""
    means, variances = adapter.gaussians_.means, adapter.gaussians_.variances
    prior = softmax(scale * (text @ query)[None])[0]
    density = -0.5 * (((query - means) ** 2) / variances).sum(axis=1) - 0.5 * np.log(variances).sum(axis=1)
    order = np.argsort(-(pool @ query))[:NEAREST]
    pull = sum((pool[other] @ query) * adapter.shares_[other].astype(float) for other in order) * 50 / (2 * NEAREST)
    found = density + adapter.laplacian * pull
    found = prior**adapter.lam * np.exp((found - found.max()) / 50)
    return found / found.sum()


def test_two_hundred_random_problems_equal_the_reference():
    rng = np.random.default_rng(0)
    worst = 0.0
    for _ in range(200):
        text, pool, *_ = problem(rng)
        scale, anchor, lam = (
            float(rng.choice([10, 50, 100])),
            float(rng.choice([0.5, 1, 4])),
            float(rng.choice([0.5, 1])),
        )
        lap = float(rng.choice([0.5, 1]))
        graph = neighbour_graph(nearest_others(pool, 3), len(pool))
        shares, *_ = stat_a(pool, text, graph, scale=scale, anchor=anchor, lam=lam, laplacian=lap)
        worst = max(worst, np.abs(shares - oracle(pool, text, scale=scale, anchor=anchor, lam=lam, lap=lap)).max())
    assert worst <= 1e-9, worst


def test_two_hundred_queries_equal_the_equations():
    rng = np.random.default_rng(1)
    worst = 0.0
    for _ in range(20):
        text, pool, queries, *_ = problem(rng, queries=10, dtype=np.float32)
        adapter = fitted(StatA(lam=0.7, laplacian=0.5), text, pool)
        result = shares_of(adapter, pool, queries)
        wide = [array.astype(float) for array in (queries, text, pool)]
        wanted = [computed_directly(query, *wide[1:], adapter, scale=50) for query in wide[0]]
        worst = max(worst, np.abs(result - wanted).max())
    assert worst <= 1e-4, worst


def test_the_adapter_in_float32_equals_the_reference_in_float64():
    rng = np.random.default_rng(2)
    for scale in (15.0, 100.0) * 10:
        text, pool, *_ = problem(rng, images=60, dtype=np.float32)
        adapter = fitted(StatA(), text, pool, logit_scale=scale)
        wanted = oracle(pool.astype(float), text.astype(float), scale=scale)
        np.testing.assert_allclose(softmax(adapter.pool_scores(pool).logits), wanted, atol=1e-3)


def test_a_class_without_images_in_the_pool_stays_at_its_text():
    text, pool, _, labels, _ = clustered(
        np.random.default_rng(3), images=200, classes=5, dims=32, noise=0.3, gap=0.3, dtype=np.float32
    )
    adapter = fitted(StatA(), text, pool[labels < 2], logit_scale=100.0)
    assert adapter.learned_
    assert adapter.diagnostics_["classes_seen"] == 2
    np.testing.assert_allclose(adapter.gaussians_.means[2:], text[2:], atol=1e-6)
    centres = np.stack([pool[labels == seen].mean(axis=0) for seen in range(2)])
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    assert (np.einsum("cd,cd->c", adapter.gaussians_.means[:2], centres) > 0.99).all()


def test_a_pool_of_few_classes_hardly_affects_its_images():
    text, pool, queries, labels, query_labels = clustered(
        np.random.default_rng(4), images=1000, classes=10, dims=32, queries=500, noise=1.0, gap=1.0, dtype=np.float32
    )
    adapter = fitted(StatA(), text, pool[labels < 2], logit_scale=50.0)
    queries, query_labels = queries[query_labels < 2], query_labels[query_labels < 2]
    result = shares_of(adapter, pool[labels < 2], queries).argmax(axis=1)
    assert (result == query_labels).mean() >= ((queries @ text.T).argmax(axis=1) == query_labels).mean() - 0.02


@pytest.mark.parametrize("at_once", [20, 60, 400])
def test_the_initial_variances_do_not_depend_on_the_chunk_size(monkeypatch, at_once):
    """A bug of the reference: each chunk is divided by the number of all images."""
    text, pool, *_ = problem(np.random.default_rng(5), images=50, classes=4)
    graph = neighbour_graph(nearest_others(pool, 3), 50)
    whole = stat_a(pool, text, graph, scale=20.0, anchor=1e12, rounds=1)
    monkeypatch.setattr(pieces_of, "_AT_ONCE", at_once)
    some = stat_a(pool, text, graph, scale=20.0, anchor=1e12, rounds=1)
    np.testing.assert_allclose(some[1].variances, whole[1].variances, rtol=1e-6)
    np.testing.assert_allclose(some[0], whole[0], atol=1e-9)
    # With this anchor, every class keeps its initial variances, which are those around the text.
    shares = softmax(20.0 * pool @ text.T)
    wanted = np.einsum("uc,ucd->d", shares, (pool[:, None] - text[None]) ** 2) / 50
    np.testing.assert_allclose(whole[1].variances, np.tile(wanted, (4, 1)), rtol=1e-6)


def test_predictions_in_chunks_are_the_same(monkeypatch):
    text, pool, queries, *_ = problem(np.random.default_rng(6), images=50, queries=20, dtype=np.float32)
    whole = shares_of(fitted(StatA(), text, pool), pool, queries)
    monkeypatch.setattr(pieces_of, "_AT_ONCE", 60)
    np.testing.assert_allclose(shares_of(fitted(StatA(), text, pool), pool, queries), whole, atol=1e-4)


def test_more_images_move_a_class_further_from_its_text():
    text, pool, *_ = clustered(np.random.default_rng(7), images=200, classes=2, dims=16, noise=0.3, gap=1.0)
    graph = neighbour_graph(nearest_others(pool, 3), 200)
    betas = [stat_a(pool, text, graph, scale=50.0, anchor=anchor)[2].mean() for anchor in (1, 10, 100)]
    np.testing.assert_allclose(betas, [100 / 101, 100 / 110, 0.5], atol=0.02)


@pytest.mark.parametrize(("images", "classes"), [(1, 1), (1, 2), (2, 2), (20, 1), (3, 8)])
def test_tiny_problems_are_finite(images, classes):
    text, pool, queries, *_ = clustered(
        np.random.default_rng(8), images=images, classes=classes, dims=16, queries=4, dtype=np.float32
    )
    adapter = fitted(StatA(), text, pool)
    assert adapter.learned_
    result = adapter.predict(queries, nearest(queries, pool, 3))
    assert not result.warnings
    np.testing.assert_allclose(softmax(result.logits).sum(axis=1), 1, rtol=1e-5)
    assert np.isfinite(adapter.pool_scores(pool).logits).all()


def test_images_identical_to_the_text_have_no_variance_and_get_their_class():
    text, *_ = clustered(np.random.default_rng(9), images=4, classes=3, dims=16, dtype=np.float32)
    same = np.repeat(text, 4, axis=0)
    adapter = fitted(StatA(), text, same)
    assert adapter.learned_
    assert adapter.pool_scores(same).logits.argmax(axis=1).tolist() == np.repeat(range(3), 4).tolist()


def test_copies_of_an_image_have_only_the_variance_of_the_text():
    text, pool, *_ = clustered(np.random.default_rng(14), images=2, classes=2, dims=64, gap=0.5, dtype=np.float32)
    many = np.repeat(pool, 20_000, axis=0)
    copies = np.repeat(np.arange(2), 20_000)
    no_links = sp.csr_array((40_000, 40_000), dtype=np.float32)
    shares, gaussians, _ = stat_a(many, text, no_links, scale=100.0)
    assert np.isfinite(shares).all()
    assert (gaussians.variances > 0).all()
    assert (shares.argmax(axis=1) == (pool @ text.T).argmax(axis=1)[copies]).all()


def test_an_empty_pool_gives_the_results_of_zero_shot_with_a_warning():
    text, _, queries, *_ = clustered(
        np.random.default_rng(10), images=4, classes=3, dims=8, queries=4, dtype=np.float32
    )
    result = StatA().fit(text, logit_scale=20.0, logit_bias=-3.0, examples=Examples()).predict(queries)
    np.testing.assert_allclose(result.logits, 20 * result.similarities - 3)
    assert "no unlabelled images" in result.warnings[0]


def test_float64_features_give_the_same_results():
    text, pool, queries, *_ = problem(np.random.default_rng(11), queries=9)
    narrow = [array.astype(np.float32) for array in (text, pool, queries)]
    wide = shares_of(fitted(StatA(), text, pool), pool, queries)
    np.testing.assert_allclose(shares_of(fitted(StatA(), *narrow[:2]), *narrow[1:]), wide, atol=1e-4)


def test_the_bias_of_a_sigmoid_encoder_and_negative_cosines_have_no_effect():
    text, pool, queries, *_ = problem(np.random.default_rng(12), images=60, classes=4, queries=9, dtype=np.float32)
    text = (text - 2 * pool.mean(axis=0)).astype(np.float32)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    assert (pool @ text.T).mean() < 0
    plain = fitted(StatA(), text, pool, logit_scale=117.0)
    moved = fitted(StatA(), text, pool, logit_scale=117.0, logit_bias=-16.0)
    assert plain.learned_
    np.testing.assert_allclose(shares_of(moved, pool, queries), shares_of(plain, pool, queries), atol=1e-4)


def test_an_image_has_the_same_scores_alone_and_in_a_batch():
    text, pool, queries, *_ = problem(np.random.default_rng(13), images=40, queries=8, dtype=np.float32)
    adapter = fitted(StatA(), text, pool)
    alone = np.vstack([shares_of(adapter, pool, queries[[index]]) for index in range(8)])
    np.testing.assert_allclose(alone, shares_of(adapter, pool, queries), atol=1e-5)
    assert shares_of(adapter, pool, queries[:0]).shape == (0, len(text))
