"""StatA: a mixture of Gaussians over unlabelled images, each class held to its text as long as few images speak for it.

Zanella et al., "Realistic Test-Time Adaptation of Vision-Language Models", CVPR 2025. Like TransCLIP, with a diagonal
covariance for each class, and with parameters that go from those of the text to those of the images by
``n / (anchor + n)`` for n images: a class that the pool does not show stays where zero-shot has it, so that pools of
few classes, or of uneven ones, do little harm.

Deviations: the first variances are the mean over all images, in whatever pieces they are looked at, where the
reference divides each of its pieces by the number of all; the encoder's own scale stands where it has CLIP's 100;
variances are at least a small part of what unit rows have on average.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float
from numpy.typing import DTypeLike

from app.adapters._base import Declaration, Examples, Neighbours
from app.adapters._examples import ExampleAdapter, Need, log_shares
from app.adapters.trans_clip import (
    NEAREST,
    SOFTNESS,
    column_sums,
    held_together,
    neighbour_graph,
    neighbour_pulls,
    pieces,
)
from app.adapters.zlap import expected
from app.scoring.numerics import log_softmax, unit_rows
from app.types import ImageFeatures, Logits

_LEAST_VARIANCE = 1e-4
_LEAST = 1e-12


class StatA(ExampleAdapter):
    """Scores are the logarithms of an image's shares of the classes.

    Args:
        anchor: of how many images the text has the weight.
        lam: weight of zero-shot's own shares.
        laplacian: weight of the neighbours' shares.
        rounds: how often the parameters are found anew.
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
        """As many as hold an image."""
        return NEAREST

    def _learn(self, examples: Examples) -> None:
        self.shares_, self.gaussians_, betas = stat_a(
            np.asarray(examples.pool_features, np.float32),
            self.text_,
            neighbour_graph(expected(examples.pool_neighbours), len(examples.pool_features)),
            scale=self.logit_scale_,
            anchor=self.anchor,
            lam=self.lam,
            laplacian=self.laplacian,
            rounds=self.rounds,
        )
        self.diagnostics_ = {"classes_seen": float((betas > 0).sum())}

    def _logits(self, image_features: ImageFeatures, zero_shot: Logits, neighbours: Neighbours | None) -> np.ndarray:
        pulls = self.laplacian * neighbour_pulls(expected(neighbours), self.shares_)
        alone = self.lam * log_softmax(zero_shot) + self.gaussians_.log_densities(image_features) / SOFTNESS
        logits: np.ndarray = log_softmax(alone + pulls)
        return logits

    def _pool_logits(self, pool_features: ImageFeatures, zero_shot: Logits) -> np.ndarray:  # noqa: ARG002
        return log_shares(self.shares_)


@dataclass(frozen=True, slots=True, eq=False)
class Gaussians:
    """Means and variances of the classes, (c, d) each.

    Densities are quadratic in each dimension, by ``curvatures`` (c, d), ``slopes`` (c, d) and ``offsets`` (c,).
    """

    means: Float[np.ndarray, "c d"]
    variances: Float[np.ndarray, "c d"]
    curvatures: Float[np.ndarray, "c d"]
    slopes: Float[np.ndarray, "c d"]
    offsets: Float[np.ndarray, " c"]

    @classmethod
    def of(cls, means: Float[np.ndarray, "c d"], variances: Float[np.ndarray, "c d"], dtype: DTypeLike) -> Self:
        """Prepare densities of images of this precision."""
        # What the precisions have in common is left out, as it is large beside what tells the classes apart.
        precisions = 1 / variances
        curvatures = -0.5 * (precisions - precisions.mean(axis=0))
        slopes = means * precisions
        offsets = -0.5 * ((slopes * means).sum(axis=1) + np.log(variances).sum(axis=1))
        offsets -= offsets.mean()
        return cls(means, variances, curvatures.astype(dtype), slopes.astype(dtype), offsets.astype(dtype))

    @property
    def nbytes(self) -> int:
        """Return the memory of its arrays."""
        of_classes = self.means.nbytes + self.variances.nbytes + self.curvatures.nbytes
        return of_classes + self.slopes.nbytes + self.offsets.nbytes

    def log_densities(self, images: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n c"]:
        """Return logarithms, but for what is the same for every class."""
        logs: np.ndarray = images @ self.slopes.T
        for some in pieces(*images.shape):
            logs[some] += np.square(images[some]) @ self.curvatures.T
        logs += self.offsets
        return logs


def stat_a(
    images: Float[np.ndarray, "u d"],
    text: Float[np.ndarray, "c d"],
    graph: sp.csr_array,
    *,
    scale: float,
    anchor: float = 1.0,
    lam: float = 1.0,
    laplacian: float = 1.0,
    rounds: int = 10,
) -> tuple[Float[np.ndarray, "u c"], Gaussians, Float[np.ndarray, " c"]]:
    """Return the shares of the images, the parameters that they were found with, and each class's part of them.

    The last says how much of a class's parameters comes from the images, from 0, where it has none, to below 1.
    """
    count, dims = images.shape
    classes = len(text)
    least = _LEAST_VARIANCE / dims
    graph = (graph * laplacian).astype(images.dtype)
    prior = log_softmax(scale * (images @ text.T)).astype(images.dtype)
    shares = np.exp(prior)
    prior *= lam
    anchors = text.astype(np.float64)
    of_text = np.maximum(_Moments.of(images, shares).deviations(anchors).sum(axis=0) / count, least)
    gaussians = Gaussians.of(anchors, np.repeat(of_text[None], classes, axis=0), images.dtype)
    betas = np.zeros(classes)
    for done in range(rounds + 1):
        shares = held_together(prior + gaussians.log_densities(images) / SOFTNESS, graph, shares)
        if done == rounds:
            break
        taken = np.bincount(shares.argmax(axis=1), minlength=classes)
        betas = taken / (anchor + taken + _LEAST)
        part, rest = betas[:, None], 1 - betas[:, None]
        seen = _Moments.of(images, shares)
        means = unit_rows(part * unit_rows(seen.sums) + rest * anchors)
        of_images = seen.deviations(means) / np.maximum(seen.sizes, _LEAST)[:, None]
        variances = part * of_images + rest * (of_text + (anchors - means) ** 2)
        gaussians = Gaussians.of(means, np.maximum(variances, least), images.dtype)
    return shares, gaussians, betas


@dataclass(frozen=True, slots=True, eq=False)
class _Moments:
    """Sums over images, weighted by their shares of each class: of nothing else, of them, and of their squares."""

    sizes: Float[np.ndarray, " c"]
    sums: Float[np.ndarray, "c d"]
    squares: Float[np.ndarray, "c d"]

    @classmethod
    def of(cls, images: Float[np.ndarray, "u d"], shares: Float[np.ndarray, "u c"]) -> Self:
        squares = np.zeros((shares.shape[1], images.shape[1]))
        for some in pieces(*images.shape):
            squares += shares[some].T @ np.square(images[some])
        return cls(column_sums(shares), (shares.T @ images).astype(np.float64), squares)

    def deviations(self, means: Float[np.ndarray, "c d"]) -> Float[np.ndarray, "c d"]:
        """Return the weighted sums of ``(image - mean)^2``."""
        deviations: np.ndarray = self.squares - 2 * self.sums * means + self.sizes[:, None] * means**2
        return deviations
