import numpy as np
import pytest

from app.adapters import zlap
from app.adapters._base import Examples, Neighbours
from app.adapters._examples import DegenerateExamplesError
from app.adapters.zlap import ZLaP, link_weights, mass_logits, propagation
from app.scoring.numerics import softmax
from tests.adapters.neighbours import clustered, nearest, nearest_others, pool_of
from tests.oracles import zlap as oracle


def problems(seed, count=200):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        images, classes = int(rng.integers(1, 40)), int(rng.integers(1, 12))
        text, pool, queries, *_ = clustered(
            rng, images=images, classes=classes, dims=int(rng.integers(4, 24)), queries=3, noise=rng.choice([0.3, 1, 3])
        )
        settings = {
            "k": int(rng.integers(1, 9)),
            "gamma": float(rng.choice([1, 2.5, 5])),
            "alpha": float(rng.choice([0.3, 0.9])),
        }
        yield rng, text, pool, queries, settings


def fitted(adapter, text, pool, **given):
    examples = pool_of(pool, adapter.neighbours)
    return adapter.fit(text, **{"logit_scale": 50.0, "logit_bias": None, "examples": examples, **given})


def shares_of(adapter, pool, queries):
    return softmax(adapter.predict(queries, nearest(queries, pool, adapter.neighbours)).logits)


def solved(pool, text, settings, **more):
    try:
        return propagation(pool, text, nearest_others(pool, settings["k"]), **settings, **more)
    except DegenerateExamplesError:
        return None  # which the reference answers with zeros


def test_two_hundred_random_problems_equal_the_reference():
    worst = np.zeros(3)
    for rng, text, pool, queries, settings in problems(0):
        found = solved(pool, text, settings)
        values, _ = oracle.fit(pool, text, **settings)
        k, gamma = settings["k"], settings["gamma"]
        if found is None:
            assert not oracle.transductive(values, len(text)).any()
            continue
        near = nearest(queries, pool, k)
        keep = int(rng.integers(1, len(text) + 1))
        sparse = solved(pool, text, settings, keep=keep).query_masses(queries, near)
        differences = (
            found.pool_masses() - oracle.transductive(values, len(text)),
            found.query_masses(queries, near) - oracle.inductive(queries, pool, text, values, k, gamma),
            sparse - oracle.inductive(queries, pool, text, values, k, gamma, keep=keep),
        )
        worst = np.maximum(worst, [np.abs(difference).max() for difference in differences])
    assert (worst <= 1e-9).all(), worst


def test_two_hundred_scaled_problems_equal_the_reference_with_clipping_after_scaling():
    worst = np.zeros(2)
    for _, text, pool, queries, settings in problems(1):
        found = solved(pool, text, settings, scaled=True)
        values, span = oracle.fit(pool, text, **settings, scale_sim=True)
        k, gamma = settings["k"], settings["gamma"]
        if found is None:
            assert not oracle.transductive(values, len(text)).any()
            continue
        nodes, weights, _ = oracle.weights(queries, pool, text, k, gamma, span)
        wanted = np.einsum("qj,qjc->qc", weights, values[nodes])
        differences = (
            found.pool_masses() - values[len(text) :],
            found.query_masses(queries, nearest(queries, pool, k)) - wanted,
        )
        worst = np.maximum(worst, [np.abs(difference).max() for difference in differences])
    assert (worst <= 1e-9).all(), worst


def test_the_adapter_in_float32_equals_the_reference_in_float64():
    rng = np.random.default_rng(2)
    worst = 0.0
    for keep in (0, 1, 2) * 10:
        text, pool, queries, *_ = clustered(rng, images=60, classes=6, dims=16, queries=9, dtype=np.float32)
        adapter = fitted(ZLaP(keep=keep), text, pool)
        wide = [array.astype(np.float64) for array in (queries, pool, text)]
        values, _ = oracle.fit(*wide[1:])
        wanted = oracle.inductive(*wide, values, keep=keep or None)
        wanted /= wanted.sum(axis=1, keepdims=True)
        worst = max(worst, np.abs(shares_of(adapter, pool, queries) - wanted).max())
    assert worst <= 1e-5


def test_cosines_are_clipped_after_scaling():
    """Otherwise a query outside the range of the graph has negative weights, and NaN with a fractional power."""
    weights = link_weights(np.array([[-0.5, 0.2]]), np.array([[-0.5, 0.6]]), 2.5, (0.1, 0.6))
    np.testing.assert_allclose(weights, [[0, 0.2**2.5, 0, 1]])


def test_without_positive_cosines_results_are_those_of_zero_shot_with_a_warning():
    rng = np.random.default_rng(3)
    text, pool, queries, *_ = clustered(
        rng, images=40, classes=4, dims=12, queries=5, noise=0.1, gap=0, dtype=np.float32
    )
    text = -text
    text = text - 2 * np.maximum(pool @ text.T, 0).max() * pool.mean(axis=0)
    kept = (pool @ text.T).max(axis=1) <= 0
    pool, queries = pool[kept], queries[(queries @ text.T).max(axis=1) <= 0]
    with pytest.raises(DegenerateExamplesError, match="no cosine is positive"):
        propagation(pool, text, nearest_others(pool, 5), k=5, gamma=5.0, alpha=0.3)
    adapter = fitted(ZLaP(), text, pool, logit_scale=117.0, logit_bias=-12.0)
    result = adapter.predict(queries, nearest(queries, pool, 5))
    assert result.warnings
    np.testing.assert_allclose(result.logits, 117 * result.similarities - 12, rtol=1e-5)


def test_an_image_without_mass_has_the_results_of_zero_shot():
    rng = np.random.default_rng(4)
    text, pool, queries, *_ = clustered(rng, images=40, classes=4, dims=32, queries=2, noise=0.3, dtype=np.float32)
    adapter = fitted(ZLaP(), text, pool)
    queries = np.stack([queries[0], -pool.mean(axis=0) / np.linalg.norm(pool.mean(axis=0))])
    near = nearest(queries, pool, 5)
    nobody = Neighbours(near.indices, np.where([[True], [False]], near.cosines, np.minimum(near.cosines, 0)))
    away = adapter.text_ @ queries[1]
    queries[1] -= np.linalg.lstsq(adapter.text_, np.maximum(away, 0) + 0.01, rcond=None)[0]
    queries[1] /= np.linalg.norm(queries[1])
    assert (adapter.text_ @ queries[1]).max() < 0
    result = adapter.predict(queries, nobody)
    np.testing.assert_allclose(result.logits[1], 50 * result.similarities[1], rtol=1e-5)
    assert not np.allclose(result.logits[0], 50 * result.similarities[0])
    assert result.logits[1].argmax() == result.similarities[1].argmax()


def test_zero_masses_become_the_logits_of_zero_shot():
    zero_shot = np.array([[3.0, 1.0], [1.0, 4.0]], np.float32)
    logits = mass_logits(np.array([[0.0, 0.0], [3.0, 1.0]]), zero_shot)
    np.testing.assert_allclose(logits[0], zero_shot[0])
    np.testing.assert_allclose(softmax(logits)[1], [0.75, 0.25])


@pytest.mark.parametrize("keep", [0, 1])
def test_classes_with_the_same_text_have_the_same_score_and_do_not_displace_others(keep):
    rng = np.random.default_rng(5)
    text, pool, queries, *_ = clustered(rng, images=50, classes=5, dims=16, queries=9, dtype=np.float32)
    twice = np.stack([text[2], *text[:4], text[2], text[4]])
    once = shares_of(fitted(ZLaP(k=3, keep=keep), text, pool), pool, queries)
    both = shares_of(fitted(ZLaP(k=3, keep=keep), twice, pool), pool, queries)
    np.testing.assert_array_equal(both[:, 0], both[:, 3])
    np.testing.assert_array_equal(both[:, 0], both[:, 5])
    others = both[:, [1, 2, 3, 4, 6]]
    np.testing.assert_allclose(others / others.sum(axis=1, keepdims=True), once, atol=1e-5)


def test_identical_cosines_are_neither_scaled_nor_used():
    same = np.tile(np.eye(1, 8), (6, 1))
    with pytest.raises(DegenerateExamplesError, match="all the same"):
        propagation(same, same[:1], nearest_others(same, 4), k=4, gamma=3.0, alpha=0.3, scaled=True)
    weights = link_weights(np.full((2, 1), 0.3), np.full((2, 3), 0.3), 3.0, (0.3, 0.3))
    assert not weights.any()


def test_a_solution_above_the_memory_limit_keeps_the_best_classes_of_each_node(monkeypatch):
    rng = np.random.default_rng(6)
    text, pool, queries, *_ = clustered(rng, images=90, classes=30, dims=64, queries=20, dtype=np.float32)
    exact = fitted(ZLaP(), text, pool)
    assert exact.diagnostics_["kept_classes"] == 30
    monkeypatch.setattr(zlap, "_MAX_SOLUTION", 120 * 30 - 1)
    bounded = fitted(ZLaP(), text, pool)
    assert bounded.diagnostics_["kept_classes"] == 16
    assert bounded.propagation_.nbytes == 30 * 64 * 4 + 120 * 16 * (4 + 8)
    assert bounded.propagation_.values.shape == bounded.propagation_.kept.shape == (120, 16)
    np.testing.assert_allclose(shares_of(bounded, pool, queries), shares_of(exact, pool, queries), atol=0.02)


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_a_solution_in_chunks_is_the_same(monkeypatch, keep):
    rng = np.random.default_rng(7)
    text, pool, queries, *_ = clustered(rng, images=50, classes=9, dims=24, queries=20, dtype=np.float32)
    whole = shares_of(fitted(ZLaP(keep=keep), text, pool), pool, queries)
    monkeypatch.setattr(zlap, "_AT_ONCE", 130)
    np.testing.assert_allclose(shares_of(fitted(ZLaP(keep=keep), text, pool), pool, queries), whole, atol=1e-6)


def test_a_pool_of_few_classes_is_not_used():
    rng = np.random.default_rng(8)
    text, pool, queries, labels, _ = clustered(
        rng, images=200, classes=10, dims=64, queries=20, noise=0.3, gap=0.3, dtype=np.float32
    )
    adapter = fitted(ZLaP(), text, pool[labels < 2])
    assert not adapter.learned_
    result = adapter.predict(queries, nearest(queries, pool[labels < 2], 5))
    np.testing.assert_allclose(result.logits, 50 * result.similarities)
    assert "of 10 classes" in result.warnings[0]


@pytest.mark.parametrize(
    ("images", "classes", "k"), [(1, 1, 5), (1, 2, 5), (20, 1, 5), (3, 8, 5), (8, 3, 20), (9, 4, 1)]
)
def test_tiny_problems_are_finite(images, classes, k):
    rng = np.random.default_rng(9)
    text, pool, queries, *_ = clustered(rng, images=images, classes=classes, dims=16, queries=4, dtype=np.float32)
    for keep in (0, 1, 99):
        adapter = ZLaP(k=k, keep=keep)
        adapter.balanced = False  # few images cannot have many classes
        fitted(adapter, text, pool)
        assert adapter.learned_
        shares = shares_of(adapter, pool, queries)
        assert shares.shape == (4, classes)
        np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-5)
        assert adapter.pool_scores(pool).logits.shape == (images, classes)


def test_an_empty_pool_gives_the_results_of_zero_shot_with_a_warning():
    rng = np.random.default_rng(10)
    text, _, queries, *_ = clustered(rng, images=4, classes=3, dims=8, queries=4, dtype=np.float32)
    result = ZLaP().fit(text, logit_scale=20.0, logit_bias=-3.0, examples=Examples()).predict(queries)
    np.testing.assert_allclose(result.logits, 20 * result.similarities - 3)
    assert "no unlabelled images" in result.warnings[0]


def test_float64_features_give_the_same_results():
    rng = np.random.default_rng(11)
    text, pool, queries, *_ = clustered(rng, images=50, classes=5, dims=16, queries=9)
    narrow = [array.astype(np.float32) for array in (text, pool, queries)]
    wide = shares_of(fitted(ZLaP(), text, pool), pool, queries)
    np.testing.assert_allclose(shares_of(fitted(ZLaP(), *narrow[:2]), *narrow[1:]), wide, atol=1e-5)


def test_scores_of_pool_images_are_their_masses():
    rng = np.random.default_rng(12)
    text, pool, _, labels, _ = clustered(rng, images=300, classes=6, dims=32, noise=1.0, gap=1.2, dtype=np.float32)
    adapter = fitted(ZLaP(), text, pool)
    result = adapter.pool_scores(pool)
    masses = oracle.fit(pool.astype(float), text.astype(float))[0][6:]
    np.testing.assert_allclose(softmax(result.logits), masses / masses.sum(axis=1, keepdims=True), atol=1e-5)
    assert (result.logits.argmax(axis=1) == labels).mean() > (result.similarities.argmax(axis=1) == labels).mean()


def test_no_images_give_no_results():
    rng = np.random.default_rng(13)
    text, pool, queries, *_ = clustered(rng, images=20, classes=3, dims=8, dtype=np.float32)
    for keep in (0, 1):
        assert shares_of(fitted(ZLaP(keep=keep), text, pool), pool, queries).shape == (0, 3)


def test_an_image_has_the_same_scores_alone_and_in_a_batch():
    rng = np.random.default_rng(14)
    text, pool, queries, *_ = clustered(rng, images=60, classes=5, dims=16, queries=8, dtype=np.float32)
    for keep in (0, 2):
        adapter = fitted(ZLaP(keep=keep), text, pool)
        together = shares_of(adapter, pool, queries)
        alone = np.vstack([shares_of(adapter, pool, queries[[index]]) for index in range(8)])
        np.testing.assert_allclose(alone, together, atol=1e-6)
