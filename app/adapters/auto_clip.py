"""AutoCLIP: weights the prompts separately for each image, by how well they match it.

Metzen et al., "AutoCLIP: Auto-tuning Zero-Shot Classifiers for Vision-Language Models", TMLR 2024, section 3. One step
of gradient ascent on the logsumexp of the class scores, from equal weights. The length of the step is chosen such that
the entropy of the weights is ``beta`` times the largest possible one.

Deviations: the gradient is divided by its range, so that one bracket for the length of the step fits every model. If
prompts tie at the largest gradient and that entropy cannot be reached, they share the weight.
"""

from typing import Annotated, ClassVar, Self

import numpy as np
from jaxtyping import Float

from app.adapters._base import Declaration, Range, Scores
from app.scoring.numerics import softmax
from app.types import ImageFeatures, PromptEmbeddings

# Cosines that are in memory together, for about 64 MiB.
_AT_ONCE = 2**23
# Halvings of a bracket that begins at 1 and is doubled while the entropy is too large. The error is 1e-13 of it.
_HALVINGS = 44
_DOUBLINGS = 60
_MAX_STEP = 1e6
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
        """Weight the prompts separately for each image."""
        rows, prompts, dims = self.text_.shape
        flat = self.text_.reshape(rows * prompts, dims)
        similarities = np.empty((len(image_features), rows), np.float32)
        weights = np.empty((len(image_features), prompts), np.float32)
        step = max(1, _AT_ONCE // (rows * prompts))
        for first in range(0, len(image_features), step):
            piece = slice(first, first + step)
            cosines = (image_features[piece] @ flat.T).reshape(-1, rows, prompts).clip(-1, 1)
            similarities[piece], weights[piece] = auto_clip(cosines, self.beta)
        return Scores(similarities, self.logit_scale_ * similarities + self.logit_bias_, weights)


def auto_clip(cosines: Float[np.ndarray, "n r k"], beta: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the weighted scores (n, r) and the weights (n, k), both float64."""
    wide = cosines.astype(np.float64)
    means = wide.mean(axis=2)
    shares = softmax(means)
    # The derivative of the logsumexp of the weighted scores by the logits of the weights, at equal weights, is
    # (1/k) sum_r shares_r (cosine_rk - mean_r). The term with the mean is equal for all prompts: softmax ignores it.
    gradient = np.matmul(shares[:, None, :], wide)[:, 0] / wide.shape[2]
    weights = entropic_softmax(gradient, beta)
    return np.matmul(wide, weights[:, :, None])[:, :, 0], weights


def entropic_softmax(values: Float[np.ndarray, "n k"], beta: float) -> Float[np.ndarray, "n k"]:
    """Return softmax(a * values), with the a >= 0 for each row at which its entropy is ``beta * log(k)``.

    A row of equal values gets equal weights. If the largest values of a row tie and their equal weights already have a
    larger entropy, only those get weight, in equal shares.
    """
    prompts = values.shape[1]
    falls = values - values.max(axis=1, keepdims=True)
    ranges = -falls.min(axis=1)
    solvable = (ranges > _TIE) & (prompts > 1) & (beta < 1)
    falls = falls / np.where(solvable, ranges, 1.0)[:, None]
    target = beta * np.log(prompts)
    low, high = np.zeros(len(values)), np.ones(len(values))
    too_flat = solvable & (_entropy(_weights(high, falls)) > target)
    for _ in range(_DOUBLINGS):
        if not too_flat.any():
            break
        high[too_flat] *= 2
        too_flat &= _entropy(_weights(high, falls)) > target
    high[too_flat] = _MAX_STEP
    low[too_flat] = _MAX_STEP
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        flat = _entropy(_weights(middle, falls)) > target
        low, high = np.where(flat, middle, low), np.where(flat, high, middle)
    return _weights(np.where(solvable, (low + high) / 2, 0.0), falls)


def _weights(steps: np.ndarray, falls: np.ndarray) -> np.ndarray:
    return softmax(steps[:, None] * falls)


def _entropy(weights: np.ndarray) -> np.ndarray:
    entropy: np.ndarray = -(weights * np.log(np.where(weights > 0, weights, 1.0))).sum(axis=1)
    return entropy
