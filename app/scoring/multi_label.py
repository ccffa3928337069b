"""Several labels for one image: each label has a probability that does not depend on the other labels.

A softmax-trained encoder says which of some texts fits an image best, and not whether one fits: its logits have no
zero. The similarities of the same image with common words that have nothing to do with the labels give it one. A label
is a good match if it is more similar to the image than nearly all of these words are; the few that are more similar may
name what the image shows. Encoders trained with a sigmoid get the same zero in place of their own bias, so that a score
means the same with every model.

The zero belongs to the image, so labels of one image keep their order, one label alone has a score, and images that
are similar to every text do not get all labels.
"""

import numpy as np
from jaxtyping import Float

RELATED_WORDS = 0.02
"""The share of the words that may be more similar to an image than a label that fits."""

DEFAULT_THRESHOLD = 0.5
"""The score of a label that is as similar to the image as the words at ``RELATED_WORDS`` are."""


def independent_logits(
    logits: Float[np.ndarray, "n c"], word_logits: Float[np.ndarray, "n w"]
) -> Float[np.ndarray, "n c"]:
    """Return the log odds of each label: its logit less the quantile ``1 - RELATED_WORDS`` of the words' logits.

    Args:
        logits: scaled similarities of n images and c labels.
        word_logits: the same of the same images and w words.
    """
    position = (1 - RELATED_WORDS) * (word_logits.shape[1] - 1)
    below = int(position)
    above = min(below + 1, word_logits.shape[1] - 1)
    # Not np.quantile, which takes several times as long for one image.
    ordered = np.partition(word_logits, (below, above), axis=1)
    zero = ordered[:, below] + (position - below) * (ordered[:, above] - ordered[:, below])
    shifted: np.ndarray = logits - zero[:, None].astype(logits.dtype)
    return shifted


def labels_above(scores: Float[np.ndarray, " c"], thresholds: Float[np.ndarray, " c"]) -> np.ndarray:
    """Return the indices of the labels of an image whose score is at least their threshold, best first."""
    above = np.flatnonzero(scores >= thresholds)
    best_first: np.ndarray = above[np.argsort(-scores[above], kind="stable")]
    return best_first
