import numpy as np
import pytest

from app.adapters._base import Examples
from app.adapters.tfup import TFUP, select, shots_per_class, similarities
from tests.adapters.problems import PROBLEMS, difference, problem, same_in_float64, unit
from tests.oracles import extras as oracle


def pool_of(drawn, seed):
    """Return several times as many images as there are labelled ones, near these."""
    rng = np.random.default_rng(seed)
    rows = np.tile(drawn.rows, (1 + seed % 6, 1))
    return unit(rows + 0.1 * rng.standard_normal(rows.shape)).astype(np.float32)


def wanted(drawn, pool, alpha=0.3, beta=1.0):
    queries, text, rows = (array.astype(float) for array in (drawn.queries, drawn.text, pool))
    indices, labels = oracle.tfup_select(rows, text, shots_per_class(len(pool), len(text)))
    return oracle.tfup(queries, text, rows[indices], labels, alpha, beta, drawn.logit_scale) + (drawn.logit_bias or 0)


def test_two_hundred_random_pools_are_cached_as_by_the_reference():
    for seed in range(PROBLEMS):
        drawn = problem(seed)
        pool = pool_of(drawn, seed)
        for shots in (3, 9):
            indices, labels = select(pool, drawn.text, shots)
            wanted_indices, wanted_labels = oracle.tfup_select(pool.astype(float), drawn.text.astype(float), shots)
            np.testing.assert_array_equal(indices, wanted_indices)
            np.testing.assert_array_equal(labels, wanted_labels)


def test_two_hundred_random_problems_equal_the_reference():
    """Some have more dimensions than images, or an encoder with a bias and negative cosines."""
    worst, learned = 0.0, 0
    for seed in range(PROBLEMS):
        drawn = problem(seed)
        pool = pool_of(drawn, seed)
        adapter = drawn.fit(TFUP(), Examples(pool_features=pool))
        if adapter.learned_:
            learned += 1
            worst = max(worst, difference(adapter.predict(drawn.queries).logits, wanted(drawn, pool)))
    assert learned > PROBLEMS / 2
    assert worst <= 2e-6


def test_the_pool_and_the_images_can_be_processed_in_chunks(monkeypatch):
    drawn = problem(1, classes=4, dims=12, images=30)
    monkeypatch.setattr("app.adapters.tfup._AT_ONCE", 12 * 25)
    result = drawn.fit(TFUP(), drawn.pool).predict(drawn.queries)
    assert difference(result.logits, wanted(drawn, drawn.rows)) <= 2e-6


@pytest.mark.parametrize(
    ("images", "classes", "shots"), [(10, 10, 9), (300, 10, 9), (340, 10, 10), (500, 10, 15), (10**6, 10, 16)]
)
def test_between_nine_and_sixteen_images_per_class_are_cached(images, classes, shots):
    assert shots_per_class(images, classes) == shots


def test_an_image_may_be_cached_for_several_classes():
    """It votes for each of them, and the number of such images is reported."""
    text = unit(np.array([[1, 0.2, 0], [1, -0.2, 0], [0, 0, 1]])).astype(np.float32)
    rows = unit(np.random.default_rng(2).standard_normal((40, 3)) * 0.3 + np.repeat(text, [10, 10, 20], axis=0))
    adapter = TFUP().fit(
        text, logit_scale=10.0, logit_bias=None, examples=Examples(pool_features=rows.astype(np.float32))
    )
    indices, labels = select(rows, text, 9)
    several = np.flatnonzero(np.bincount(indices) > 1)
    assert len(several) > 0
    assert len(set(labels[indices == several[0]].tolist())) > 1
    assert adapter.diagnostics_["cached_under_several_classes"] == len(several)


def test_a_pool_cached_completely_for_each_class_has_no_effect():
    """With fewer images than the cache of a class, each votes equally for all classes."""
    drawn = problem(3, classes=4, dims=16, sigmoid=False)
    rows = np.concatenate([drawn.rows[drawn.labels == label][:2] for label in range(4)])
    adapter = drawn.fit(TFUP(), Examples(pool_features=rows))
    assert adapter.learned_
    assert adapter.diagnostics_["cached"] == 4 * len(rows)
    moved = adapter.predict(drawn.queries).logits - drawn.zero_shot()
    np.testing.assert_allclose(moved, np.repeat(moved[:, :1], 4, axis=1), atol=1e-4)


def test_similarities_are_rescaled_per_image():
    """From 0, for the cached image with the most different probabilities, to 2."""
    drawn = problem(4, classes=4, dims=12, images=20)
    adapter = drawn.fit(TFUP(), drawn.pool)
    together = adapter.predict(drawn.queries).logits
    alone = np.concatenate([adapter.predict(row[None]).logits for row in drawn.queries])
    np.testing.assert_allclose(alone, together, rtol=1e-5, atol=1e-5)
    shares = oracle.softmax(10 * drawn.queries @ drawn.text.T)
    alike = similarities(shares.astype(float), np.log(oracle.softmax(10 * drawn.rows @ drawn.text.T).astype(float)))
    np.testing.assert_allclose(alike.min(axis=1), 0, atol=1e-12)
    np.testing.assert_allclose(alike.max(axis=1), 2, atol=1e-12)


def test_identical_images_are_finite():
    drawn = problem(5, classes=2)
    examples = Examples(pool_features=np.repeat(drawn.rows[:1], 30, axis=0))
    adapter = TFUP()
    adapter.balanced = False  # one image has one class
    result = drawn.fit(adapter, examples).predict(drawn.queries).logits
    assert adapter.learned_
    assert np.isfinite(result).all()
    np.testing.assert_allclose(result[:, 0] - result[:, 1], np.diff(-drawn.zero_shot())[:, 0], atol=1e-2)


def test_copies_are_cached_like_other_images():
    drawn = problem(6, classes=3, dims=10)
    pool = np.tile(drawn.rows, (4, 1))
    indices, labels = select(pool, drawn.text, 9)
    wanted_indices, wanted_labels = oracle.tfup_select(pool.astype(float), drawn.text.astype(float), 9)
    np.testing.assert_array_equal(labels, wanted_labels)
    np.testing.assert_array_equal(np.sort(indices % len(drawn.rows)), np.sort(wanted_indices % len(drawn.rows)))


@pytest.mark.parametrize("count", [1, 5])
def test_one_image_and_more_classes_than_images_are_finite(count):
    drawn = problem(7, classes=7)
    indices, labels = select(drawn.rows[:count], drawn.text, 9)
    assert np.bincount(indices).tolist() == [7] * count
    assert np.bincount(labels).tolist() == [count] * 7
    result = drawn.fit(TFUP(), Examples(pool_features=drawn.rows[:count])).predict(drawn.queries)
    assert np.isfinite(result.logits).all()


def test_a_single_class_is_finite():
    drawn = problem(8, classes=1)
    adapter = drawn.fit(TFUP(), drawn.pool)
    assert adapter.learned_
    assert np.isfinite(adapter.predict(drawn.queries).logits).all()


def test_a_pool_of_few_classes_is_not_used():
    text = np.eye(6, dtype=np.float32)
    examples = Examples(pool_features=unit(text[[0, 0, 0, 1]] + 0.01).astype(np.float32))
    result = TFUP().fit(text, logit_scale=20.0, logit_bias=None, examples=examples).predict(text)
    np.testing.assert_allclose(result.logits, 20 * text, atol=1e-5)
    assert "about the same number of images of each class" in result.warnings[0]


def test_double_precision_gives_the_same_logits():
    drawn = problem(10, sigmoid=True)
    same_in_float64(drawn, TFUP, drawn.pool)


def test_inputs_are_not_modified():
    drawn = problem(11)
    for array in (drawn.rows, drawn.text, drawn.queries):
        array.flags.writeable = False
    drawn.fit(TFUP(), drawn.pool).predict(drawn.queries)
