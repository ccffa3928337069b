"""Priors: known or estimated frequencies of the classes, as one addition to the logits of each class.

Bayes' rule for scores whose classes have other frequencies than the images (Saerens et al., "Adjusting the Outputs of a
Classifier to New a Priori Probabilities", Neural Computation 2002, eq. 2.4): a probability is multiplied by the ratio
of the frequency to the frequency that the scores contain. Zero-shot scores contain preferences for some labels, and
methods that learn contain the frequencies of their images, so the denominator is measured: the mean probability of
each class over example images. docs/decisions/0031-priors-are-relative-to-predictions.md compares it with others.
"""

import numpy as np
from jaxtyping import Float, Int

from app.scoring.numerics import tempered_softmax

# Laplace's rule of succession: each class counts as if it had been seen once more.
_PSEUDO_COUNT = 1.0


def frequencies_of(values: Float[np.ndarray, " c"]) -> Float[np.ndarray, " c"]:
    """Return positive numbers divided by their sum; the smallest is positive, too."""
    # The largest number first, because the sum of large numbers may overflow.
    shares = np.maximum(np.asarray(values, np.float64) / np.max(values), np.finfo(np.float64).tiny)
    frequencies: np.ndarray = shares / shares.sum()
    return frequencies


def counted_frequencies(labels: Int[np.ndarray, " n"], classes: int) -> Float[np.ndarray, " c"]:
    """Return the frequencies of the labels; a class that none has gets a small one."""
    return _smoothed(np.bincount(labels, minlength=classes))


def predicted_frequencies(logits: Float[np.ndarray, "n c"], temperature: float) -> Float[np.ndarray, " c"]:
    """Return the mean probabilities over n images, smoothed as counts are; without images, all are equal."""
    return _smoothed(tempered_softmax(logits, temperature).sum(axis=0))


def prior_weights(frequencies: Float[np.ndarray, " c"], predicted: Float[np.ndarray, " c"]) -> Float[np.ndarray, " c"]:
    """Return what is added to calibrated logits, so that classes of these frequencies become as likely as they are."""
    weights: np.ndarray = np.log(frequencies) - np.log(predicted)
    return weights


def _smoothed(counts: np.ndarray) -> np.ndarray:
    frequencies: np.ndarray = (counts + _PSEUDO_COUNT) / (counts.sum() + _PSEUDO_COUNT * len(counts))
    return frequencies
