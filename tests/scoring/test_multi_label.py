import numpy as np
import pytest

from app.adapters._base import probabilities
from app.scoring.multi_label import DEFAULT_THRESHOLD, RELATED_WORDS, independent_logits, labels_above
from tests.oracles import multi_label as oracle

PROBLEMS = 300


def problem(seed):
    """Return logits (n, c), logits of words (n, w) and thresholds (c,), with ties now and then."""
    rng = np.random.default_rng(seed)
    images, labels, words = rng.integers(1, 5), rng.integers(1, 30), rng.integers(1, 500)
    scale = rng.choice([1, 15, 100])
    logits, word_logits = (scale * rng.normal(0.1, 0.1, (images, count)) for count in (labels, words))
    if seed % 3 == 0:
        logits, word_logits = logits.round(), word_logits.round()
    thresholds = rng.choice([0, 0.3, DEFAULT_THRESHOLD, 0.9, 1], labels)
    return logits.astype(np.float32), word_logits.astype(np.float32), thresholds


def test_scores_and_labels_are_those_of_simple_reference_code():
    largest = 0.0
    for seed in range(PROBLEMS):
        logits, word_logits, thresholds = problem(seed)
        scores = probabilities(independent_logits(logits, word_logits), sigmoid=True)
        for ours, own, words in zip(scores, logits.tolist(), word_logits.tolist(), strict=True):
            largest = max(largest, *(abs(a - oracle.score(b, words)) for a, b in zip(ours, own, strict=True)))
            assert labels_above(ours, thresholds).tolist() == oracle.above(ours.tolist(), thresholds)
    assert largest < 1e-5


def test_the_score_of_a_label_does_not_depend_on_the_other_labels_or_images():
    logits, word_logits, _ = problem(7)
    together = independent_logits(logits, word_logits)
    for image in range(len(logits)):
        for label in range(logits.shape[1]):
            one = slice(image, image + 1)
            assert independent_logits(logits[one, label : label + 1], word_logits[one]) == together[image, label]


@pytest.mark.parametrize("bias", [0, -12.5])
def test_a_bias_of_the_encoder_has_no_effect(bias):
    logits, word_logits, _ = problem(8)
    shifted = independent_logits(logits + np.float32(bias), word_logits + np.float32(bias))
    np.testing.assert_allclose(shifted, independent_logits(logits, word_logits), atol=1e-4)


def test_one_word_in_fifty_may_be_more_similar_than_a_label_at_the_default_threshold():
    words = np.arange(1001, dtype=np.float32)[None]
    (logits,) = independent_logits(np.array([[979.9, 980, 980.1]], np.float32), words)
    assert np.mean(words > 980) == pytest.approx(RELATED_WORDS, abs=1e-3)
    scores = probabilities(logits, sigmoid=True)
    assert (scores >= DEFAULT_THRESHOLD).tolist() == [False, True, True]
