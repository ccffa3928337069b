"""The similarity of images and labels that have nothing to do with each other."""

import numpy as np
from jaxtyping import Float

# With two or three labels, the best of as many unrelated words is often similar to nothing at all.
_MIN_LABELS = 10
# The share of the words most similar to an image that may be related to it.
_RELATED = 0.02


class UnrelatedSimilarity:
    """How similar images of anything and unrelated words are for one model.

    The best of a list of unrelated labels is the more similar the longer the list is. With independent cosines of
    distribution function F, the median of the largest of k is the quantile F^-1(0.5^(1/k)).

    Args:
        cosines: of a few photographs and many words (n, k); of each photograph, the largest two percent are left out.
    """

    def __init__(self, cosines: Float[np.ndarray, "n k"]) -> None:
        kept = int(np.ceil(cosines.shape[1] * (1 - _RELATED)))
        self._sorted = np.sort(np.partition(cosines, kept - 1, axis=1)[:, :kept], axis=None)

    def typical_best(self, labels: int) -> float:
        """Return the median of the best similarity with this number of unrelated labels, at most the largest measured.

        Args:
            labels: fewer than ten count as ten.
        """
        # Not np.quantile, which takes a hundred times as long: every request asks.
        return float(self._sorted[int(0.5 ** (1 / max(labels, _MIN_LABELS)) * (len(self._sorted) - 1))])
