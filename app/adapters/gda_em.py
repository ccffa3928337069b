"""GDA without labels: expectation maximisation on unlabelled images, starting from the zero-shot predictions.

Wang et al., "A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation", ICLR 2024, its unsupervised variant: the
M-step takes the classes' means and the mean of their covariances, the E-step is the softmax of zero-shot + alpha
(x W + b) with equal priors. The result is a linear classifier, so new images are classified independently.

The paper does not specify some details. Here, the ridge of the covariance counts every pool image, a class with a mass
of less than 1e-6 images keeps its text as its mean, and alpha, the rounds and the tolerance are not tuned on labels;
the best alpha differs between data sets, and no value is sure to improve on zero-shot. P is that of the paper, not
rescaled as in ``gda``, because there is no grid of alphas. Deviation: the scale of the encoder replaces the paper's
100. As in ``gda``, contributions have a mean of zero over the classes.
"""

from collections.abc import Iterator
from typing import Annotated, ClassVar

import numpy as np
from jaxtyping import Float

from app.adapters._base import Declaration, Examples, Neighbours, Range
from app.adapters._examples import DegenerateExamplesError, ExampleAdapter, Need
from app.runtime.turns import give_way
from app.scoring.numerics import softmax
from app.types import ImageFeatures, Logits

_MIN_MASS = 1e-6
# The part of the mean square length of the images that is due to rounding.
_NO_VARIANCE = 1e-9
# Numbers of a piece of the pool in float64, for about 32 MiB.
_AT_ONCE = 2**22


class GDAEM(ExampleAdapter):
    """Logits are zero-shot + alpha (x W + b), learned from a pool with about the same number of images of each class.

    ``W_`` (d, c) and ``b_`` (c,) have a mean of zero over the classes.

    Args:
        alpha: weight of the pool.
        rounds: the largest number of rounds of expectation and maximisation.
        tolerance: the change of the shares, at most, at which it stops.
    """

    declaration: ClassVar[Declaration] = Declaration(
        "gda-em",
        "Gaussian discriminant analysis of unlabelled images by expectation maximisation, added to zero-shot"
        " (Wang et al., ICLR 2024).",
    )
    needs: ClassVar[frozenset[Need]] = frozenset({Need.POOL})
    balanced: ClassVar[bool] = True

    def __init__(
        self,
        alpha: Annotated[float, Range(1e-4, 1e4, "Weight of the images relative to the text.")] = 1.0,
        rounds: int = 10,
        tolerance: float = 1e-4,
    ) -> None:
        self.alpha = alpha
        self.rounds = rounds
        self.tolerance = tolerance

    def _learn(self, examples: Examples) -> None:
        weights, biases, masses, done = fit_em(
            examples.pool_features,
            self.text_,
            logit_scale=self.logit_scale_,
            alpha=self.alpha,
            rounds=self.rounds,
            tolerance=self.tolerance,
        )
        self.W_ = (weights - weights.mean(axis=1, keepdims=True)).astype(np.float32)
        self.b_ = (biases - biases.mean()).astype(np.float32)
        self.diagnostics_ = {
            "images": len(examples.pool_features),
            "rounds": done,
            "least_images_of_a_class": float(masses.min()),
            "most_images_of_a_class": float(masses.max()),
        }

    def _logits(self, image_features: ImageFeatures, zero_shot: Logits, neighbours: Neighbours | None) -> np.ndarray:
        del neighbours
        logits: np.ndarray = zero_shot + np.float32(self.alpha) * (image_features @ self.W_ + self.b_)
        return logits


def fit_em(
    pool: Float[np.ndarray, "u d"],
    text: Float[np.ndarray, "c d"],
    *,
    logit_scale: float,
    alpha: float,
    rounds: int,
    tolerance: float,
) -> tuple[Float[np.ndarray, "d c"], Float[np.ndarray, " c"], Float[np.ndarray, " c"], int]:
    """Return W, b, the mass of each class in the shares that they are fitted to, and the number of rounds.

    The shares (u, c) are float32; everything else is float64, computed in pieces of the pool.

    Raises:
        DegenerateExamplesError: the images are all the same.
    """
    images, classes = len(pool), len(text)
    wide_text = text.astype(np.float64)
    shares = np.empty((images, classes), np.float32)
    for piece, rows in _pieces(pool):
        shares[piece] = softmax(logit_scale * rows @ wide_text.T)
    means, done, change = wide_text, 0, np.inf
    weights, biases, masses = np.zeros((text.shape[1], classes)), np.zeros(classes), np.zeros(classes)
    while done < rounds and change >= tolerance:
        masses = shares.sum(axis=0, dtype=np.float64)
        means, covariance = _maximised(pool, shares, masses, means)
        weights, biases = _linear(means, covariance, images)
        done, change = done + 1, 0.0
        for piece, rows in _pieces(pool):
            new = softmax(logit_scale * rows @ wide_text.T + alpha * (rows @ weights + biases))
            change = max(change, float(np.abs(new - shares[piece]).max()))
            shares[piece] = new
    return weights, biases, masses, done


def _maximised(
    pool: Float[np.ndarray, "u d"],
    shares: Float[np.ndarray, "u c"],
    masses: Float[np.ndarray, " c"],
    means: Float[np.ndarray, "c d"],
) -> tuple[Float[np.ndarray, "c d"], Float[np.ndarray, "d d"]]:
    """Return the means of the classes, and the mean covariance of the classes that have mass."""
    kept = masses > _MIN_MASS
    sums = np.zeros_like(means)
    second = np.zeros((means.shape[1], means.shape[1]))
    for piece, rows in _pieces(pool):
        portions = shares[piece].astype(np.float64)
        sums += portions.T @ rows
        # The weight of an image is sum_c share / mass. Its root on both sides makes the product symmetric.
        roots = np.sqrt((portions[:, kept] / masses[kept]).sum(axis=1) / kept.sum())
        weighted = rows * roots[:, None]
        second += weighted.T @ weighted
    moved = np.where(kept[:, None], sums / np.maximum(masses, _MIN_MASS)[:, None], means)
    return moved, second - moved[kept].T @ moved[kept] / kept.sum()


def _linear(
    means: Float[np.ndarray, "c d"], covariance: Float[np.ndarray, "d d"], images: int
) -> tuple[Float[np.ndarray, "d c"], Float[np.ndarray, " c"]]:
    """Return W = P mu and b = -log c - mu P mu / 2, where P = d inv((n - 1) cov + trace(cov) I)."""
    from scipy.linalg import cho_factor, cho_solve  # noqa: PLC0415 - imported by the first fit, not at every start

    dims = len(covariance)
    trace = float(np.trace(covariance))
    if trace <= _NO_VARIANCE:
        raise DegenerateExamplesError("the unlabelled images are all the same, so they do not separate the classes")
    system = (images - 1) * covariance + trace * np.eye(dims)
    weights: np.ndarray = dims * cho_solve(cho_factor(system, lower=True), means.T)
    return weights, -np.log(len(means)) - (weights.T * means).sum(axis=1) / 2


def _pieces(pool: Float[np.ndarray, "u d"]) -> Iterator[tuple[slice, Float[np.ndarray, "p d"]]]:
    step = max(1, _AT_ONCE // pool.shape[1])
    for first in range(0, len(pool), step):
        give_way()
        piece = slice(first, first + step)
        yield piece, pool[piece].astype(np.float64)
