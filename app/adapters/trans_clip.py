"""TransCLIP: unlabelled images as a mixture of Gaussians, held together by their neighbours and by the text.

Zanella, Gérin and Ben Ayed, "Boosting Vision-Language Models with Transduction", NeurIPS 2024. Classes have a mean each
and one diagonal covariance; an image's shares of the classes are large where its density is, where those of its nearest
images are, and where zero-shot says so. Shares and parameters are found in turns.

A new image gets its shares from the parameters and from the shares of its neighbours in the pool. One look is enough,
as no image has it for a neighbour. Only its own neighbours count, and not those whose neighbour it would be, so that
they have about half the weight that they had within the pool.

Deviations: the encoder's own scale stands where the reference has CLIP's 100, and the divisor of the densities stays
50. Variances are at least a small part of what unit rows have on average: images that are all alike have none.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float
from numpy.typing import DTypeLike

from app.adapters._base import Declaration, Examples, Neighbours
from app.adapters._examples import ExampleAdapter, Need, log_shares
from app.adapters.zlap import expected
from app.scoring.numerics import log_softmax, softmax, unit_rows
from app.types import ImageFeatures, Logits

NEAREST = 3
"""How many neighbours hold an image, in TransCLIP and StatA."""

SOFTNESS = 50.0
"""What the logarithms of densities are divided by, which would otherwise outweigh all else."""

_LOOKS = 5
_FIRST_IMAGES = 8
_LEAST_VARIANCE = 1e-4
_LEAST = 1e-12
# Entries of a matrix that are handled together, for 16 MiB.
_AT_ONCE = 2**22


class TransCLIP(ExampleAdapter):
    """Scores are the logarithms of an image's shares of the classes.

    Args:
        lam: weight of zero-shot's own shares.
        rounds: how often the parameters are found anew.
    """

    declaration: ClassVar[Declaration] = Declaration(
        "transclip",
        "A mixture of Gaussians over unlabelled images, tied to the text and to their neighbours"
        " (Zanella et al., NeurIPS 2024).",
    )
    needs: ClassVar[frozenset[Need]] = frozenset({Need.POOL})
    balanced: ClassVar[bool] = True

    def __init__(self, *, lam: float = 1.0, rounds: int = 10) -> None:
        self.lam = lam
        self.rounds = rounds

    @property
    def neighbours(self) -> int:
        """As many as hold an image."""
        return NEAREST

    def _learn(self, examples: Examples) -> None:
        self.shares_, self.gaussians_ = trans_clip(
            np.asarray(examples.pool_features, np.float32),
            self.text_,
            neighbour_graph(expected(examples.pool_neighbours), len(examples.pool_features)),
            scale=self.logit_scale_,
            lam=self.lam,
            rounds=self.rounds,
        )

    def _logits(self, image_features: ImageFeatures, zero_shot: Logits, neighbours: Neighbours | None) -> np.ndarray:
        pulls = neighbour_pulls(expected(neighbours), self.shares_)
        alone = self.lam * log_softmax(zero_shot) + self.gaussians_.log_densities(image_features) / SOFTNESS
        logits: np.ndarray = log_softmax(alone + pulls)
        return logits

    def _pool_logits(self, pool_features: ImageFeatures, zero_shot: Logits) -> np.ndarray:  # noqa: ARG002
        return log_shares(self.shares_)


@dataclass(frozen=True, slots=True, eq=False)
class SharedGaussians:
    """Means of the classes (c, d), and the variances (d,) that they have in common.

    Densities are linear in the image, by ``slopes`` (c, d) and ``offsets`` (c,).
    """

    means: Float[np.ndarray, "c d"]
    variances: Float[np.ndarray, " d"]
    slopes: Float[np.ndarray, "c d"]
    offsets: Float[np.ndarray, " c"]

    @classmethod
    def of(cls, means: Float[np.ndarray, "c d"], variances: Float[np.ndarray, " d"], dtype: DTypeLike) -> Self:
        """Prepare densities of images of this precision."""
        slopes = means / variances
        offsets = -0.5 * (slopes * means).sum(axis=1)
        return cls(means, variances, slopes.astype(dtype), offsets.astype(dtype))

    @property
    def nbytes(self) -> int:
        """Return the memory of its arrays."""
        return self.means.nbytes + self.variances.nbytes + self.slopes.nbytes + self.offsets.nbytes

    def log_densities(self, images: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n c"]:
        """Return logarithms, but for what is the same for every class."""
        logs: np.ndarray = images @ self.slopes.T
        logs += self.offsets
        return logs


def trans_clip(
    images: Float[np.ndarray, "u d"],
    text: Float[np.ndarray, "c d"],
    graph: sp.csr_array,
    *,
    scale: float,
    lam: float = 1.0,
    rounds: int = 10,
) -> tuple[Float[np.ndarray, "u c"], SharedGaussians]:
    """Return the shares of the images, and the parameters that they were found with."""
    count, dims = images.shape
    prior = log_softmax(scale * (images @ text.T)).astype(images.dtype)
    shares = np.exp(prior)
    prior *= lam
    gaussians = SharedGaussians.of(first_means(images, text, scale), np.full(dims, 1 / dims), images.dtype)
    squares = mean_squares(images)
    for done in range(rounds + 1):
        shares = held_together(prior + gaussians.log_densities(images) / SOFTNESS, graph, shares)
        if done == rounds:
            break
        sums = (shares.T @ images).astype(np.float64)
        sizes = column_sums(shares)
        means = unit_rows(sums / np.maximum(sizes, _LEAST)[:, None])
        # Mean over images and classes of shares * (image - mean)^2; an image's shares sum to 1.
        variances = squares + (sizes @ means**2 - 2 * (sums * means).sum(axis=0)) / count
        gaussians = SharedGaussians.of(means, np.maximum(variances, _LEAST_VARIANCE / dims), images.dtype)
    return shares, gaussians


def first_means(
    images: Float[np.ndarray, "u d"], text: Float[np.ndarray, "c d"], scale: float
) -> Float[np.ndarray, "c d"]:
    """Return for each class the direction of the images that it is most probable for, weighted by how probable."""
    best = np.zeros((0, len(text)), np.int64)
    logs = np.zeros((0, len(text)))
    # Probabilities near 1 are told apart in float64 only; few rows of it are needed at once.
    for some in pieces(len(images), len(text)):
        rows = np.arange(len(images))[some]
        found = log_softmax(scale * (images[some] @ text.T).astype(np.float64))
        best = np.vstack([best, np.broadcast_to(rows[:, None], found.shape)])
        logs = np.vstack([logs, found])
        if len(best) > _FIRST_IMAGES:
            kept = np.argpartition(logs, -_FIRST_IMAGES, axis=0)[-_FIRST_IMAGES:]
            best, logs = np.take_along_axis(best, kept, axis=0), np.take_along_axis(logs, kept, axis=0)
    weights = np.exp(logs - logs.max(axis=0))
    means: np.ndarray = unit_rows(np.einsum("kc,kcd->cd", weights, images[best]))
    return means


def neighbour_graph(neighbours: Neighbours, images: int) -> sp.csr_array:
    """Return how much each image is pulled to the shares of the others: cosines, twice where both are nearest."""
    indices, cosines = neighbours.indices[:, :NEAREST], neighbours.cosines[:, :NEAREST]
    starts = np.repeat(np.arange(images), indices.shape[1])
    one_way = sp.csr_array((cosines.ravel(), (starts, indices.ravel())), shape=(images, images))
    return sp.csr_array((one_way + one_way.T) / (2 * NEAREST)).astype(cosines.dtype)


def neighbour_pulls(neighbours: Neighbours, shares: Float[np.ndarray, "u c"]) -> Float[np.ndarray, "n c"]:
    """Return how much new images are pulled to the shares of their neighbours in the pool."""
    indices, cosines = neighbours.indices[:, :NEAREST], neighbours.cosines[:, :NEAREST]
    pulls = np.empty((len(indices), shares.shape[1]), shares.dtype)
    for some in pieces(len(indices), NEAREST * shares.shape[1]):
        pulls[some] = np.matmul(cosines[some, None, :], shares[indices[some]])[:, 0] / (2 * NEAREST)
    return pulls


def held_together(
    alone: Float[np.ndarray, "u c"], graph: sp.csr_array, shares: Float[np.ndarray, "u c"]
) -> Float[np.ndarray, "u c"]:
    """Return shares after some looks at the neighbours', given what speaks for each class without them."""
    for _ in range(_LOOKS):
        shares = softmax(alone + graph @ shares)
    return shares


def mean_squares(images: Float[np.ndarray, "u d"]) -> Float[np.ndarray, " d"]:
    """Return the mean square of each dimension, without a copy of all images."""
    sums = np.zeros(images.shape[1])
    for some in pieces(*images.shape):
        sums += np.square(images[some], dtype=np.float64).sum(axis=0)
    means: np.ndarray = sums / len(images)
    return means


def column_sums(shares: Float[np.ndarray, "u c"]) -> Float[np.ndarray, " c"]:
    """Return the sum of each column in float64."""
    sums: np.ndarray = shares.sum(axis=0, dtype=np.float64)
    return sums


def pieces(rows: int, width: int) -> Iterator[slice]:
    """Divide rows so that each piece has some megabytes."""
    step = max(1, _AT_ONCE // max(1, width))
    return (slice(first, first + step) for first in range(0, rows, step))
