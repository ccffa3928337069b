"""Tip-Adapter: a cache of the labelled images, each of which votes for its class.

Zhang et al., "Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification", ECCV 2022: zero-shot +
alpha exp(-beta (1 - cosine)) @ one-hot labels.

Deviations: the scale of the encoder replaces the paper's 100. Alpha and beta are selected by cross-validation on the
labelled images, by their likelihood at the best temperature. As in the paper, the votes of a class are summed, so that
a
class with more images gets more votes.
"""

from typing import Annotated, ClassVar

import numpy as np
from jaxtyping import Float, Int

from app.adapters._base import Declaration, Examples, Neighbours, Range
from app.adapters._cross_validation import compared_images, first_best, held_out_folds
from app.adapters._examples import ExampleAdapter, Need
from app.runtime.turns import give_way
from app.scoring.calibration import tempered_loss
from app.types import ImageFeatures, Logits

ALPHAS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
BETAS = (1.0, 2.0, 5.5, 10.0)
"""The candidates of cross-validation: every pair of the two."""

DEFAULT_ALPHA = 1.0
"""The weight where too few images are labelled to select one."""

# Votes that are in memory together, for about 32 MiB.
_AT_ONCE = 2**23


class TipAdapter(ExampleAdapter):
    """Logits are zero-shot + alpha times the votes of the labelled images, divided by a temperature.

    ``alpha_``, ``beta_`` and ``temperature_`` are the values that are used; the temperature is 1 if they are not
    selected.
    """

    declaration: ClassVar[Declaration] = Declaration(
        "tip-adapter", "Similarity to each labelled image, added to zero-shot (Zhang et al., ECCV 2022)."
    )
    needs: ClassVar[frozenset[Need]] = frozenset({Need.SUPPORT})

    def __init__(
        self,
        alpha: Annotated[
            float, Range(0, 1e4, "Weight of the images; 0 selects it and beta by cross-validation.")
        ] = 0.0,
        beta: Annotated[float, Range(0.01, 100, "How fast the vote of an image falls with its distance.")] = 5.5,
    ) -> None:
        self.alpha = alpha
        self.beta = beta

    def _learn(self, examples: Examples) -> None:
        order = np.argsort(examples.support_labels, kind="stable")
        self.keys_ = examples.support_features[order].astype(np.float32)
        self.labels_ = examples.support_labels[order]
        missing = len(self.text_) - len(np.unique(self.labels_))
        self.alpha_, self.beta_, self.temperature_ = self.alpha, self.beta, 1.0
        if missing:
            self.warnings_ += (f"classes without a labelled image: {missing}; no image votes for them",)
        if not self.alpha:
            chosen = self._chosen()
            self.alpha_, self.beta_, self.temperature_ = chosen or (DEFAULT_ALPHA, self.beta, 1.0)
            if not chosen:
                self.warnings_ += ("too few images are labelled to select their weight; a fixed one is used",)
        self.diagnostics_ = {
            "alpha": self.alpha_,
            "beta": self.beta_,
            "temperature": self.temperature_,
            "images": len(self.keys_),
            "classes_without_images": missing,
        }

    def _logits(self, image_features: ImageFeatures, zero_shot: Logits, neighbours: Neighbours | None) -> np.ndarray:
        del neighbours
        logits = zero_shot.copy()
        step = max(1, _AT_ONCE // len(self.keys_))
        for first in range(0, len(image_features), step):
            give_way()
            piece = slice(first, first + step)
            cosines = image_features[piece] @ self.keys_.T
            logits[piece] += np.float32(self.alpha_) * votes(cosines, self.labels_, self.beta_, logits.shape[1])
        return logits / np.float32(self.temperature_)

    def _chosen(self) -> tuple[float, float, float] | None:
        """Return the alpha, beta and temperature with the best likelihood of held-out images; None if too few.

        Among equals the smallest beta is preferred, and then the smallest alpha.
        """
        classes = len(self.text_)
        folds = held_out_folds(self.labels_, classes)
        if folds is None or classes == 1:
            return None
        compared = compared_images(folds)
        queries, truth = self.keys_[compared], self.labels_[compared]
        zero_shot = self.logit_scale_ * queries @ self.text_.T
        pairs, fits = [], []
        for beta in BETAS:
            summed_votes = np.empty_like(zero_shot)
            for fold in range(int(folds.max()) + 1):
                give_way()
                rest, here = folds != fold, folds[compared] == fold
                summed_votes[here] = votes(queries[here] @ self.keys_[rest].T, self.labels_[rest], beta, classes)
            pairs += [(alpha, beta) for alpha in ALPHAS]
            fits += [tempered_loss(zero_shot + np.float32(alpha) * summed_votes, truth) for alpha in ALPHAS]
        losses, temperatures = zip(*fits, strict=True)
        best = first_best(losses)
        return *pairs[best], temperatures[best]


def votes(
    cosines: Float[np.ndarray, "n s"], labels: Int[np.ndarray, " s"], beta: float, classes: int
) -> Float[np.ndarray, "n c"]:
    """Return the sum of exp(-beta (1 - cosine)) over the images of each class, labels ascending."""
    present, first = np.unique(labels, return_index=True)
    summed = np.zeros((len(cosines), classes), cosines.dtype)
    summed[:, present] = np.add.reduceat(np.exp(beta * (cosines - 1)), first, axis=1)
    return summed
