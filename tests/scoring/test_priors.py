import numpy as np
import pytest

from app.scoring.numerics import tempered_softmax
from app.scoring.priors import counted_frequencies, frequencies_of, predicted_frequencies, prior_weights
from tests.oracles import priors as oracle


def problem(seed):
    """Return logits of examples and of new images, labels of the examples, a temperature, and wanted counts."""
    rng = np.random.default_rng(seed)
    classes, examples = int(rng.integers(1, 8)), int(rng.integers(0, 12))
    logits = rng.normal(0, 8, (examples, classes)).astype(np.float32)
    return (
        logits,
        rng.normal(0, 8, (3, classes)).astype(np.float32),
        rng.integers(0, classes, examples),
        float(np.exp(rng.normal())),
        rng.uniform(0.01, 900, classes),
    )


@pytest.mark.parametrize("seed", range(200))
def test_scores_with_priors_are_those_of_the_equations(seed):
    logits, images, labels, temperature, counts = problem(seed)
    classes = images.shape[1]
    wanted, contained = frequencies_of(counts), predicted_frequencies(logits, temperature)
    np.testing.assert_allclose(counted_frequencies(labels, classes), oracle.counted(labels, classes), atol=1e-12)
    np.testing.assert_allclose(contained, oracle.predicted(logits.tolist(), temperature, classes), atol=1e-12)
    weights = prior_weights(wanted, contained)
    scores = tempered_softmax(images + temperature * weights, temperature)
    expected = [oracle.posterior(row, temperature, counts.tolist(), contained.tolist()) for row in images.tolist()]
    np.testing.assert_allclose(scores, expected, atol=1e-9)


def test_predictions_that_have_the_wanted_frequencies_already_are_not_changed():
    logits = np.random.default_rng(0).normal(0, 3, (50, 4))
    predicted = predicted_frequencies(logits, 1.0)
    np.testing.assert_allclose(prior_weights(predicted, predicted), 0)


def test_a_class_that_was_never_seen_is_rare_and_not_impossible():
    frequencies = counted_frequencies(np.array([0, 0, 0]), 3)
    np.testing.assert_allclose(frequencies, [4 / 6, 1 / 6, 1 / 6])


def test_frequencies_of_any_size_have_the_sum_1_and_finite_logarithms():
    for counts in ([1e308, 1e308, 1e-308], [5e-324, 5e-324], [7.0]):
        frequencies = frequencies_of(np.array(counts))
        assert frequencies.sum() == pytest.approx(1)
        assert np.isfinite(np.log(frequencies)).all()
