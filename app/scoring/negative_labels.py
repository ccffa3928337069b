"""None of these: the labels compete with words for other things, whose images nobody needs to have.

Jiang et al., "Negative Label Guided OOD Detection with Pretrained Vision-Language Models", ICLR 2024.

Deviations, each measured on the data of docs/decisions/0032: the softmax has the scale of the model, and not 100. The
words are not divided into groups. All words that are unrelated to the labels are used, not those farthest from them.
The labels together have the same prior as the words together, so that the result has a meaning of its own.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Int64

from app.scoring.numerics import log_sum_exp
from app.types import ImageFeatures, NearWord, Similarities, TextFeatures

KNOWN_ABOVE = 0.5
"""An image shows one of the labels if 1 minus its score is at least this: more probably than not."""

_MAX_NEAREST = 10


@dataclass(frozen=True, slots=True, eq=False)
class NegativeLabels:
    """The words that compete with some labels.

    ``words`` and ``features`` (m, d) are those of the whole vocabulary, which all lists of labels share; ``used`` are
    the indices of the words that have nothing to do with the labels.
    """

    words: tuple[str, ...]
    features: TextFeatures
    used: Int64[np.ndarray, " u"]

    def compete(self, image_features: ImageFeatures, labels: Similarities, scale: float) -> "NoneOfThese":
        """Return how probably each image shows none of the labels, from its cosines with them (n, c)."""
        # Not a matrix product, which OpenBLAS divides among threads: on busy cores, it waits 8 ms for one of them.
        # Taken row by row, not as columns: their order in memory is that of the sums, which must not depend on n.
        cosines = np.vecdot(image_features[:, None], self.features).take(self.used, axis=1)
        return NoneOfThese(none_probability(labels, cosines, scale), cosines, self)


@dataclass(frozen=True, slots=True, eq=False)
class NoneOfThese:
    """The probability that an image shows none of the labels (n,), and its cosines with the words in use (n, u)."""

    scores: Float32[np.ndarray, " n"]
    cosines: Float32[np.ndarray, "n u"]
    negatives: NegativeLabels

    def nearest(self, number: int, above: float) -> tuple[NearWord, ...]:
        """Return the words that are nearer to an image than a cosine, nearest first, at most ten."""
        cosines = self.cosines[number]
        best = np.argsort(-cosines, kind="stable")[:_MAX_NEAREST]
        words, used = self.negatives.words, self.negatives.used
        return tuple(NearWord(words[used[each]], float(cosines[each])) for each in best if cosines[each] > above)


def none_probability(
    labels: Float[np.ndarray, "n c"], words: Float[np.ndarray, "n m"], scale: float
) -> Float32[np.ndarray, " n"]:
    """Return the probability that an image shows one of the words and none of the labels, in [0, 1].

    It is the share of the words in the softmax of all similarities, with a prior of 1/2 for the labels together and 1/2
    for the words together. The sigmoid bias of a model cancels out.

    Args:
        labels: cosines of the images and the labels.
        words: cosines of the images and the words.
        scale: the logit scale of the model.
    """
    gaps = _mean_log(labels, scale) - _mean_log(words, scale)
    # Only negative numbers are exponentiated, so that large scales do not overflow.
    small = np.exp(-np.abs(gaps))
    shares: np.ndarray = np.where(gaps >= 0, small, 1) / (1 + small)
    return shares.astype(np.float32)


def _mean_log(similarities: np.ndarray, scale: float) -> np.ndarray:
    """Return the logarithm of the mean of the exponentials over the last axis."""
    sums = log_sum_exp(np.float32(scale) * similarities)
    mean: np.ndarray = sums - np.float32(np.log(similarities.shape[-1]))
    return mean
