from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from app.adapters.tda import NEGATIVE, POSITIVE, TDA, is_doubtful
from tests.adapters.problems import PROBLEMS, difference, problem
from tests.oracles.extras import TDA as ORACLE


def fitted(drawn):
    return TDA().fit(drawn.text, logit_scale=drawn.logit_scale, logit_bias=drawn.logit_bias)


def stream(drawn, seed):
    return drawn.rows[np.random.default_rng(seed).permutation(len(drawn.rows))]


def sizes(cache):
    return [len(slots) for slots in cache.slots.values()]


def test_two_hundred_random_streams_equal_the_reference_over_several_calls():
    """Many of them fill both caches, and some encoders have a bias and negative cosines."""
    worst, full = 0.0, 0
    for seed in range(PROBLEMS):
        drawn = problem(seed, dims=int(np.random.default_rng(seed).integers(4, 24)))
        images = stream(drawn, seed)
        adapter = fitted(drawn)
        result = [adapter.predict(images[first : first + 5]).logits for first in range(0, len(images), 5)]
        result.append(adapter.predict(drawn.queries).logits)
        oracle = ORACLE(drawn.text.astype(float), scale=drawn.logit_scale)
        steps = [oracle.step(row) for row in np.concatenate([images, drawn.queries]).astype(float)]
        worst = max(worst, difference(np.concatenate(result), np.array(steps) + (drawn.logit_bias or 0)))
        full += (
            max(sizes(adapter.negative_), default=0) == NEGATIVE.size and max(sizes(adapter.positive_)) == POSITIVE.size
        )
    assert worst <= 2e-6
    assert full > 10


def test_classified_images_are_cached():
    drawn = problem(1, classes=3, dims=16, images=8, sigmoid=False)
    assert (TDA.stateful, TDA.transductive, TDA.needs) == (True, True, frozenset())
    fresh, used = fitted(drawn), fitted(drawn)
    used.predict(drawn.rows)
    assert np.abs(used.predict(drawn.queries).logits - fresh.predict(drawn.queries).logits).max() > 0.01


def test_fitting_again_empties_the_caches():
    drawn = problem(2)
    adapter = fitted(drawn)
    adapter.predict(drawn.rows)
    again = adapter.fit(drawn.text, logit_scale=drawn.logit_scale, logit_bias=drawn.logit_bias)
    np.testing.assert_array_equal(again.predict(drawn.queries).logits, fitted(drawn).predict(drawn.queries).logits)


def test_one_call_equals_one_call_per_image():
    drawn = problem(3)
    one, many = fitted(drawn), fitted(drawn)
    together = one.predict(drawn.rows).logits
    alone = np.concatenate([many.predict(row[None]).logits for row in drawn.rows])
    np.testing.assert_allclose(alone, together, rtol=1e-5, atol=1e-4)


def test_memory_is_limited_by_the_number_of_classes():
    drawn = problem(4, classes=4, dims=6, images=200)
    adapter = fitted(drawn)
    for _ in range(3):
        adapter.predict(drawn.rows)
    assert sizes(adapter.positive_) == [POSITIVE.size] * 4
    assert all(size <= NEGATIVE.size for size in sizes(adapter.negative_))
    assert len(adapter.positive_.features) <= 4 * 4 * POSITIVE.size
    assert all(len(targets) <= 33 for targets in adapter.negative_.targets)


def test_the_most_certain_images_of_a_class_are_kept():
    text = np.eye(2, 3, dtype=np.float32)
    angles = np.array([0.6, 0.3, 0.5, 0.1, 0.4, 0.2])
    rows = np.stack([np.cos(angles), np.sin(angles), np.zeros(6)], axis=1).astype(np.float32)
    adapter = TDA().fit(text, logit_scale=5.0, logit_bias=None)
    adapter.predict(rows)
    kept = adapter.positive_.features[adapter.positive_.slots[0]]
    np.testing.assert_allclose(kept, rows[[3, 5, 1]])


def test_entropy_bounds_are_shares_of_log2_and_entropies_are_in_nats():
    """As published: equal shares of c classes have log(c) / log2(c) = 0.69 of the maximum."""
    entropies = np.array([0.19, 0.21, 0.49, 0.51, np.log(2) / np.log2(2)]) * np.log2(8)
    assert is_doubtful(entropies, 8).tolist() == [False, True, True, False, False]


def test_a_single_class_does_not_divide_by_zero():
    drawn = problem(5, classes=1)
    adapter = fitted(drawn)
    assert np.isfinite(adapter.predict(drawn.rows).logits).all()
    assert not adapter.negative_.targets
    assert not is_doubtful(np.zeros(3), 1).any()


def test_invalid_images_are_not_cached():
    drawn = problem(6)
    broken = drawn.rows[:3].copy()
    broken[0], broken[1, 0] = 0, np.nan
    adapter, other = fitted(drawn), fitted(drawn)
    result = adapter.predict(broken)
    assert np.isfinite(result.logits).all()
    assert len(result.warnings) == 1
    other.predict(broken[2:])
    np.testing.assert_allclose(
        adapter.predict(drawn.queries).logits, other.predict(drawn.queries).logits, rtol=1e-6, atol=1e-5
    )


def test_copies_of_an_image_are_finite_and_fill_the_cache():
    drawn = problem(7)
    adapter = fitted(drawn)
    result = adapter.predict(np.repeat(drawn.rows[:1], 9, axis=0)).logits
    assert np.isfinite(result).all()
    assert sizes(adapter.positive_) == [POSITIVE.size]
    np.testing.assert_allclose(result[3:], np.repeat(result[3:4], 6, axis=0), atol=1e-4)


def test_the_scale_of_the_encoder_changes_the_entropy_of_an_image():
    drawn = problem(8, classes=5, sigmoid=False)
    for scale in (1.0, 1000.0):
        adapter = TDA().fit(drawn.text, logit_scale=scale, logit_bias=None)
        adapter.predict(drawn.rows[:1])
        assert not adapter.negative_.targets


@pytest.mark.parametrize("seed", range(3))
def test_concurrent_requests_are_processed_sequentially(seed):
    """The results are those of a sequential order. All calls are equal, so every order gives the same results."""
    drawn = problem(seed + 20, classes=4, dims=12, images=6)
    adapter, one_by_one = fitted(drawn), fitted(drawn)
    with ThreadPoolExecutor(8) as threads:
        result = list(threads.map(lambda _: adapter.predict(drawn.rows).logits, range(16)))
    expected = [one_by_one.predict(drawn.rows).logits for _ in range(16)]
    first = min(result, key=lambda logits: np.abs(logits - expected[0]).max())
    np.testing.assert_allclose(first, expected[0], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(np.sum(result, axis=0), np.sum(expected, axis=0), rtol=1e-4, atol=1e-2)
    assert sizes(adapter.positive_) == sizes(one_by_one.positive_)


def test_double_precision_gives_the_same_logits():
    drawn = problem(9)
    single = fitted(drawn).predict(drawn.rows).logits
    double = fitted(drawn).predict(drawn.rows.astype(float)).logits
    assert double.dtype == np.float32
    np.testing.assert_allclose(double, single, rtol=1e-4, atol=1e-3)


def test_inputs_are_not_modified():
    drawn = problem(10)
    for array in (drawn.rows, drawn.text):
        array.flags.writeable = False
    before = drawn.rows.copy()
    adapter = fitted(drawn)
    adapter.predict(drawn.rows)
    adapter.predict(drawn.rows[::-1])
    np.testing.assert_array_equal(drawn.rows, before)
