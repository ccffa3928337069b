"""AutoCLIP: for each image, more weight to the prompts that see something in it.

Metzen et al., "AutoCLIP: Auto-tuning Zero-Shot Classifiers for Vision-Language Models", TMLR 2024, section 3. One step
of gradient ascent on the logsumexp of the class scores, from equal weights; the size of the step is the one after which
the weights have ``beta`` of the largest possible entropy.

Deviations: the gradient is divided by its range, which the size of the step takes up again, so that one bracket fits
every model; where prompts tie at the largest gradient and that entropy cannot be reached, they share the weight.
"""

from typing import Annotated, ClassVar, Self

import numpy as np
from jaxtyping import Float

from app.adapters._base import Declaration, Range, Scores
from app.scoring.numerics import softmax
from app.types import ImageFeatures, PromptEmbeddings

# Cosines that lie in memory together, for about 64 MiB.
_AT_ONCE = 2**23
# Halvings of a bracket that begins at 1 and is doubled as long as the entropy is too large: exact to 1e-13 of it.
_HALVINGS = 44
_DOUBLINGS = 60
_LARGEST_STEP = 1e6
_TIE = 1e-12


class AutoCLIP:
    """Scores are weighted means of the cosines with k aligned prompts; the weights differ by image."""

    declaration: ClassVar[Declaration] = Declaration(
        "autoclip",
        "Weighted mean of the cosines with templates and groups of descriptions, with weights for each image"
        " (Metzen et al., TMLR 2024).",
        recipe="aligned-prompts",
        uses_descriptions=True,
    )
    aligned: ClassVar[bool] = True
    transductive: ClassVar[bool] = False

    def __init__(
        self,
        beta: Annotated[
            float, Range(0.01, 1, "Entropy of the weights, as a share of the largest possible; 1 makes them equal.")
        ] = 0.85,
    ) -> None:
        self.beta = beta

    def fit(self, text: PromptEmbeddings, *, logit_scale: float, logit_bias: float | None) -> Self:
        """Keep the prompts (r, k, d)."""
        self.text_ = text
        self.logit_scale_ = logit_scale
        self.logit_bias_ = logit_bias or 0.0
        return self

    def predict(self, image_features: ImageFeatures) -> Scores:
        """Weigh the prompts for each image by itself."""
        rows, prompts, dims = self.text_.shape
        flat = self.text_.reshape(rows * prompts, dims)
        similarities = np.empty((len(image_features), rows), np.float32)
        weights = np.empty((len(image_features), prompts), np.float32)
        step = max(1, _AT_ONCE // (rows * prompts))
        for first in range(0, len(image_features), step):
            some = slice(first, first + step)
            cosines = (image_features[some] @ flat.T).reshape(-1, rows, prompts).clip(-1, 1)
            similarities[some], weights[some] = auto_clip(cosines, self.beta)
        return Scores(similarities, self.logit_scale_ * similarities + self.logit_bias_, weights)


def auto_clip(cosines: Float[np.ndarray, "n r k"], beta: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the weighted scores (n, r) and the weights (n, k), both float64."""
    wide = cosines.astype(np.float64)
    means = wide.mean(axis=2)
    shares = softmax(means)
    # Of logsumexp over the classes of their weighted scores, by the logits of the weights, where those are equal:
    # (1/k) sum_r shares_r (cosine_rk - mean_r). What is the same for every prompt, softmax forgets.
    gradient = np.matmul(shares[:, None, :], wide)[:, 0] / wide.shape[2]
    weights = entropic_softmax(gradient, beta)
    return np.matmul(wide, weights[:, :, None])[:, :, 0], weights


def entropic_softmax(values: Float[np.ndarray, "n k"], beta: float) -> Float[np.ndarray, "n k"]:
    """Return softmax(a * values) with the a >= 0 at which each row's entropy is ``beta * log(k)``.

    Rows whose values are all the same get equal weights; rows whose largest values tie in more than that many places
    share the weight among those.
    """
    prompts = values.shape[1]
    falls = values - values.max(axis=1, keepdims=True)
    ranges = -falls.min(axis=1)
    told = (ranges > _TIE) & (prompts > 1) & (beta < 1)
    falls = falls / np.where(told, ranges, 1.0)[:, None]
    target = beta * np.log(prompts)
    low, high = np.zeros(len(values)), np.ones(len(values))
    too_flat = told & (_entropy(_weights(high, falls)) > target)
    for _ in range(_DOUBLINGS):
        if not too_flat.any():
            break
        high[too_flat] *= 2
        too_flat &= _entropy(_weights(high, falls)) > target
    high[too_flat] = _LARGEST_STEP
    low[too_flat] = _LARGEST_STEP
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        flat = _entropy(_weights(middle, falls)) > target
        low, high = np.where(flat, middle, low), np.where(flat, high, middle)
    return _weights(np.where(told, (low + high) / 2, 0.0), falls)


def _weights(steps: np.ndarray, falls: np.ndarray) -> np.ndarray:
    return softmax(steps[:, None] * falls)


def _entropy(weights: np.ndarray) -> np.ndarray:
    entropy: np.ndarray = -(weights * np.log(np.where(weights > 0, weights, 1.0))).sum(axis=1)
    return entropy
