import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from app.scoring.negative_labels import NegativeLabels, none_probability
from app.scoring.numerics import unit_rows
from tests.oracles.negative_labels import none_of_these

RNG = np.random.default_rng(0)

cosines = st.floats(-1, 1, width=32)
counts = st.integers(1, 30)


@given(st.data(), counts, counts, st.sampled_from([1.0, 14.9, 100.0, 1000.0]))
def test_the_probability_equals_that_of_the_oracle(data, labels, words, scale):
    similarities = data.draw(arrays(np.float32, (3, labels), elements=cosines))
    others = data.draw(arrays(np.float32, (3, words), elements=cosines))
    expected = none_of_these(similarities, others, scale)
    np.testing.assert_allclose(none_probability(similarities, others, scale), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("labels", "words"), [(1, 1), (1, 2000), (10_000, 500), (7, 2318)])
def test_labels_that_are_as_similar_as_the_words_are_as_probable_whatever_their_numbers(labels, words):
    same = none_probability(np.full((1, labels), 0.2, np.float32), np.full((1, words), 0.2, np.float32), 100.0)
    assert same == pytest.approx(0.5, abs=1e-4)


def test_random_features_say_nothing():
    """As those of a model that was not trained."""
    rows = unit_rows(RNG.standard_normal((3000, 256))).astype(np.float32)
    images, labels, words = rows[:400], rows[400:410], rows[410:]
    scores = none_probability(images @ labels.T, images @ words.T, 15.0)
    known = none_probability(images @ rows[20:30].T, images @ words.T, 15.0)
    assert np.mean(scores > np.median(known)) == pytest.approx(0.5, abs=0.1)


def test_only_words_in_use_count_and_the_nearest_ones_are_named():
    axes = np.eye(4, dtype=np.float32)
    image = unit_rows(np.array([[1, 2, 3, 0]], np.float32))
    negatives = NegativeLabels(("a", "b", "c", "d"), axes, np.array([0, 1, 3]))
    none = negatives.compete(image, image @ axes[:1].T, 10.0)
    expected = none_probability(image @ axes[:1].T, image @ axes[[0, 1, 3]].T, 10.0)
    np.testing.assert_allclose(none.scores, expected, rtol=1e-6)
    assert [near.word for near in none.nearest(0, above=0.1)] == ["b", "a"]
    assert [near.word for near in none.nearest(0, above=float(image[0, 0]))] == ["b"]
    assert none.nearest(0, above=0.9) == ()


def test_an_image_has_the_same_score_alone_as_in_a_batch():
    rows = unit_rows(RNG.standard_normal((1200, 128))).astype(np.float32)
    images, words = rows[:16], rows[20:]
    labels = images @ rows[16:20].T
    negatives = NegativeLabels(tuple(map(str, range(len(words)))), words, np.arange(0, len(words), 2))
    together = negatives.compete(images, labels, 15.0).scores
    alone = [negatives.compete(images[n : n + 1], labels[n : n + 1], 15.0).scores[0] for n in range(len(images))]
    np.testing.assert_array_equal(together, alone)
