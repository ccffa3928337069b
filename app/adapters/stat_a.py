"""StatA: a mixture of Gaussians over unlabelled images, where a class with few images stays near its text.

Zanella et al., "Realistic Test-Time Adaptation of Vision-Language Models", CVPR 2025. It is TransCLIP with a diagonal
covariance for each class. The parameters of a class with n images are those of the images with a weight of ``n /
(anchor + n)``, and those of the text with the rest. A class that the pool does not show keeps the parameters of its
text, so pools of few or unequal classes do little harm.

Deviations: the first variances are the mean over all images, while the reference processes the images in pieces and
divides each of them by the number of all images. The scale of the encoder replaces CLIP's 100. Variances have a lower
bound, a small part of the average variance of unit rows.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
from jaxtyping import Float
from numpy.typing import DTypeLike

from app.adapters._base import Declaration, Examples, Neighbours
from app.adapters._examples import ExampleAdapter, Need, log_shares
from app.adapters.trans_clip import (
    NEAREST,
    SOFTNESS,
    column_sums,
    neighbour_graph,
    neighbour_pulls,
    pieces,
    smoothed,
)
from app.adapters.zlap import required
from app.scoring.numerics import log_softmax, unit_rows
from app.types import ImageFeatures, Logits

if TYPE_CHECKING:
    import scipy.sparse as sp

_MIN_VARIANCE = 1e-4
_TINY = 1e-12


class StatA(ExampleAdapter):
    """Logits are the logarithms of the shares of the classes in an image.

    Args:
        anchor: weight of the text, as a number of images.
        lam: weight of the zero-shot probabilities.
        laplacian: weight of the shares of the neighbours.
        rounds: the number of updates of the parameters.
    """

    declaration: ClassVar[Declaration] = Declaration(
        "stata",
        "TransCLIP with an anchor: a class stays near its text as long as few images belong to it"
        " (Zanella et al., CVPR 2025).",
    )
    needs: ClassVar[frozenset[Need]] = frozenset({Need.POOL})
    balanced: ClassVar[bool] = False

    def __init__(self, *, anchor: float = 1.0, lam: float = 1.0, laplacian: float = 1.0, rounds: int = 10) -> None:
        self.anchor = anchor
        self.lam = lam
        self.laplacian = laplacian
        self.rounds = rounds

    @property
    def neighbours(self) -> int:
        """The number of neighbours of an image."""
        return NEAREST

    def _learn(self, examples: Examples) -> None:
        self.shares_, self.gaussians_, betas = stat_a(
            np.asarray(examples.pool_features, np.float32),
            self.text_,
            neighbour_graph(required(examples.pool_neighbours), len(examples.pool_features)),
            scale=self.logit_scale_,
            anchor=self.anchor,
            lam=self.lam,
            laplacian=self.laplacian,
            rounds=self.rounds,
        )
        self.diagnostics_ = {"classes_seen": float((betas > 0).sum())}

    def _logits(self, image_features: ImageFeatures, zero_shot: Logits, neighbours: Neighbours | None) -> np.ndarray:
        pulls = self.laplacian * neighbour_pulls(required(neighbours), self.shares_)
        alone = self.lam * log_softmax(zero_shot) + self.gaussians_.log_densities(image_features) / SOFTNESS
        logits: np.ndarray = log_softmax(alone + pulls)
        return logits

    def _pool_logits(self, pool_features: ImageFeatures, zero_shot: Logits) -> np.ndarray:  # noqa: ARG002
        return log_shares(self.shares_)


@dataclass(frozen=True, slots=True, eq=False)
class Gaussians:
    """The means and variances of the classes, (c, d) each.

    Log densities are quadratic in each dimension, with ``curvatures`` (c, d), ``slopes`` (c, d) and ``offsets`` (c,).
    """

    means: Float[np.ndarray, "c d"]
    variances: Float[np.ndarray, "c d"]
    curvatures: Float[np.ndarray, "c d"]
    slopes: Float[np.ndarray, "c d"]
    offsets: Float[np.ndarray, " c"]

    @classmethod
    def of(cls, means: Float[np.ndarray, "c d"], variances: Float[np.ndarray, "c d"], dtype: DTypeLike) -> Self:
        """Return the Gaussians, prepared for images of this precision."""
        # The mean precision is subtracted, because it is large compared to the differences between the classes.
        precisions = 1 / variances
        curvatures = -0.5 * (precisions - precisions.mean(axis=0))
        slopes = means * precisions
        offsets = -0.5 * ((slopes * means).sum(axis=1) + np.log(variances).sum(axis=1))
        offsets -= offsets.mean()
        return cls(means, variances, curvatures.astype(dtype), slopes.astype(dtype), offsets.astype(dtype))

    @property
    def nbytes(self) -> int:
        """Return the memory of its arrays."""
        class_bytes = self.means.nbytes + self.variances.nbytes + self.curvatures.nbytes
        return class_bytes + self.slopes.nbytes + self.offsets.nbytes

    def log_densities(self, images: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n c"]:
        """Return log densities, up to a term that is the same for all classes."""
        logs: np.ndarray = images @ self.slopes.T
        for piece in pieces(*images.shape):
            logs[piece] += np.square(images[piece]) @ self.curvatures.T
        logs += self.offsets
        return logs


def stat_a(
    images: Float[np.ndarray, "u d"],
    text: Float[np.ndarray, "c d"],
    graph: "sp.csr_array",
    *,
    scale: float,
    anchor: float = 1.0,
    lam: float = 1.0,
    laplacian: float = 1.0,
    rounds: int = 10,
) -> tuple[Float[np.ndarray, "u c"], Gaussians, Float[np.ndarray, " c"]]:
    """Return the shares of the classes in the images, the parameters, and the weights (c,) of the images in those.

    The weight of the images is 0 for a class without images, and always below 1.
    """
    count, dims = images.shape
    classes = len(text)
    smallest = _MIN_VARIANCE / dims
    graph = (graph * laplacian).astype(images.dtype)
    prior = log_softmax(scale * (images @ text.T)).astype(images.dtype)
    shares = np.exp(prior)
    prior *= lam
    anchors = text.astype(np.float64)
    text_variances = np.maximum(_Moments.of(images, shares).deviations(anchors).sum(axis=0) / count, smallest)
    gaussians = Gaussians.of(anchors, np.repeat(text_variances[None], classes, axis=0), images.dtype)
    betas = np.zeros(classes)
    for done in range(rounds + 1):
        shares = smoothed(prior + gaussians.log_densities(images) / SOFTNESS, graph, shares)
        if done == rounds:
            break
        taken = np.bincount(shares.argmax(axis=1), minlength=classes)
        betas = taken / (anchor + taken + _TINY)
        part, rest = betas[:, None], 1 - betas[:, None]
        seen = _Moments.of(images, shares)
        means = unit_rows(part * unit_rows(seen.sums) + rest * anchors)
        image_variances = seen.deviations(means) / np.maximum(seen.sizes, _TINY)[:, None]
        variances = part * image_variances + rest * (text_variances + (anchors - means) ** 2)
        gaussians = Gaussians.of(means, np.maximum(variances, smallest), images.dtype)
    return shares, gaussians, betas


@dataclass(frozen=True, slots=True, eq=False)
class _Moments:
    """The sums over images, weighted by the shares of each class, of 1, of the image, and of its squares."""

    sizes: Float[np.ndarray, " c"]
    sums: Float[np.ndarray, "c d"]
    squares: Float[np.ndarray, "c d"]

    @classmethod
    def of(cls, images: Float[np.ndarray, "u d"], shares: Float[np.ndarray, "u c"]) -> Self:
        squares = np.zeros((shares.shape[1], images.shape[1]))
        for piece in pieces(*images.shape):
            squares += shares[piece].T @ np.square(images[piece])
        return cls(column_sums(shares), (shares.T @ images).astype(np.float64), squares)

    def deviations(self, means: Float[np.ndarray, "c d"]) -> Float[np.ndarray, "c d"]:
        """Return the weighted sums of ``(image - mean)^2``."""
        deviations: np.ndarray = self.squares - 2 * self.sums * means + self.sizes[:, None] * means**2
        return deviations
