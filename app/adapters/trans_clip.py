"""TransCLIP: unlabelled images as a mixture of Gaussians, held together by their neighbours and by the text.

Zanella, Gérin and Ben Ayed, "Boosting Vision-Language Models with Transduction", NeurIPS 2024. Each class has a mean,
and all classes have one diagonal covariance. The share of a class in an image is large where its density, the shares of
the nearest images, and the zero-shot probability are large. Shares and parameters are updated in turns.

The shares of a new image are computed from the parameters and from the shares of its neighbours in the pool. One update
is enough, because it is not a neighbour of any image. Only its own neighbours count, and not the images that it would
be a neighbour of, so neighbours have about half the weight that they have within the pool.

Deviations: the scale of the encoder replaces CLIP's 100; the divisor of the densities is 50, as in the reference.
Variances have a lower bound, a small part of the average variance of unit rows, because images that are all alike have
none.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
from jaxtyping import Float
from numpy.typing import DTypeLike

from app.adapters._base import Declaration, Examples, Neighbours
from app.adapters._examples import ExampleAdapter, Need, log_shares
from app.adapters.zlap import required
from app.runtime.turns import give_way
from app.scoring.numerics import log_softmax, softmax, unit_rows
from app.types import ImageFeatures, Logits

if TYPE_CHECKING:
    import scipy.sparse as sp

NEAREST = 3
"""The number of neighbours of an image in TransCLIP and StatA."""

SOFTNESS = 50.0
"""The divisor of the log densities, which would otherwise outweigh the other terms."""

_LOOKS = 5
_FIRST_IMAGES = 8
_MIN_VARIANCE = 1e-4
_TINY = 1e-12
# Entries of a matrix that are processed together, for 16 MiB.
_AT_ONCE = 2**22


class TransCLIP(ExampleAdapter):
    """Logits are the logarithms of the shares of the classes in an image.

    Args:
        lam: weight of the zero-shot probabilities.
        rounds: the number of updates of the parameters.
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
        """The number of neighbours of an image."""
        return NEAREST

    def _learn(self, examples: Examples) -> None:
        self.shares_, self.gaussians_ = trans_clip(
            np.asarray(examples.pool_features, np.float32),
            self.text_,
            neighbour_graph(required(examples.pool_neighbours), len(examples.pool_features)),
            scale=self.logit_scale_,
            lam=self.lam,
            rounds=self.rounds,
        )

    def _logits(self, image_features: ImageFeatures, zero_shot: Logits, neighbours: Neighbours | None) -> np.ndarray:
        pulls = neighbour_pulls(required(neighbours), self.shares_)
        alone = self.lam * log_softmax(zero_shot) + self.gaussians_.log_densities(image_features) / SOFTNESS
        logits: np.ndarray = log_softmax(alone + pulls)
        return logits

    def _pool_logits(self, pool_features: ImageFeatures, zero_shot: Logits) -> np.ndarray:  # noqa: ARG002
        return log_shares(self.shares_)


@dataclass(frozen=True, slots=True, eq=False)
class SharedGaussians:
    """The means of the classes (c, d), and their common variances (d,).

    Log densities are linear in the image, with ``slopes`` (c, d) and ``offsets`` (c,).
    """

    means: Float[np.ndarray, "c d"]
    variances: Float[np.ndarray, " d"]
    slopes: Float[np.ndarray, "c d"]
    offsets: Float[np.ndarray, " c"]

    @classmethod
    def of(cls, means: Float[np.ndarray, "c d"], variances: Float[np.ndarray, " d"], dtype: DTypeLike) -> Self:
        """Return the Gaussians, prepared for images of this precision."""
        slopes = means / variances
        offsets = -0.5 * (slopes * means).sum(axis=1)
        return cls(means, variances, slopes.astype(dtype), offsets.astype(dtype))

    @property
    def nbytes(self) -> int:
        """Return the memory of its arrays."""
        return self.means.nbytes + self.variances.nbytes + self.slopes.nbytes + self.offsets.nbytes

    def log_densities(self, images: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n c"]:
        """Return log densities, up to a term that is the same for all classes."""
        logs: np.ndarray = images @ self.slopes.T
        logs += self.offsets
        return logs


def trans_clip(
    images: Float[np.ndarray, "u d"],
    text: Float[np.ndarray, "c d"],
    graph: "sp.csr_array",
    *,
    scale: float,
    lam: float = 1.0,
    rounds: int = 10,
) -> tuple[Float[np.ndarray, "u c"], SharedGaussians]:
    """Return the shares of the classes in the images, and the parameters for these shares."""
    count, dims = images.shape
    prior = log_softmax(scale * (images @ text.T)).astype(images.dtype)
    shares = np.exp(prior)
    prior *= lam
    gaussians = SharedGaussians.of(first_means(images, text, scale), np.full(dims, 1 / dims), images.dtype)
    squares = mean_squares(images)
    for done in range(rounds + 1):
        shares = smoothed(prior + gaussians.log_densities(images) / SOFTNESS, graph, shares)
        if done == rounds:
            break
        sums = (shares.T @ images).astype(np.float64)
        sizes = column_sums(shares)
        means = unit_rows(sums / np.maximum(sizes, _TINY)[:, None])
        # The mean over images and classes of shares * (image - mean)^2, where the shares of an image sum to 1.
        variances = squares + (sizes @ means**2 - 2 * (sums * means).sum(axis=0)) / count
        gaussians = SharedGaussians.of(means, np.maximum(variances, _MIN_VARIANCE / dims), images.dtype)
    return shares, gaussians


def first_means(
    images: Float[np.ndarray, "u d"], text: Float[np.ndarray, "c d"], scale: float
) -> Float[np.ndarray, "c d"]:
    """Return for each class the normalised mean of the images with its highest probabilities, weighted by these."""
    best = np.zeros((0, len(text)), np.int64)
    logs = np.zeros((0, len(text)))
    # Only float64 can distinguish probabilities near 1; few rows of it are needed together.
    for piece in pieces(len(images), len(text)):
        rows = np.arange(len(images))[piece]
        found = log_softmax(scale * (images[piece] @ text.T).astype(np.float64))
        best = np.vstack([best, np.broadcast_to(rows[:, None], found.shape)])
        logs = np.vstack([logs, found])
        if len(best) > _FIRST_IMAGES:
            kept = np.argpartition(logs, -_FIRST_IMAGES, axis=0)[-_FIRST_IMAGES:]
            best, logs = np.take_along_axis(best, kept, axis=0), np.take_along_axis(logs, kept, axis=0)
    weights = np.exp(logs - logs.max(axis=0))
    means: np.ndarray = unit_rows(np.einsum("kc,kcd->cd", weights, images[best]))
    return means


def neighbour_graph(neighbours: Neighbours, images: int) -> "sp.csr_array":
    """Return the weights of the links between images: cosines, doubled for mutual neighbours."""
    import scipy.sparse as sp  # noqa: PLC0415 - imported by the first fit, not at every start

    indices, cosines = neighbours.indices[:, :NEAREST], neighbours.cosines[:, :NEAREST]
    starts = np.repeat(np.arange(images), indices.shape[1])
    one_way = sp.csr_array((cosines.ravel(), (starts, indices.ravel())), shape=(images, images))
    return sp.csr_array((one_way + one_way.T) / (2 * NEAREST)).astype(cosines.dtype)


def neighbour_pulls(neighbours: Neighbours, shares: Float[np.ndarray, "u c"]) -> Float[np.ndarray, "n c"]:
    """Return the weighted sums of the shares of the neighbours of new images in the pool."""
    indices, cosines = neighbours.indices[:, :NEAREST], neighbours.cosines[:, :NEAREST]
    pulls = np.empty((len(indices), shares.shape[1]), shares.dtype)
    for piece in pieces(len(indices), NEAREST * shares.shape[1]):
        pulls[piece] = np.matmul(cosines[piece, None, :], shares[indices[piece]])[:, 0] / (2 * NEAREST)
    return pulls


def smoothed(
    alone: Float[np.ndarray, "u c"], graph: "sp.csr_array", shares: Float[np.ndarray, "u c"]
) -> Float[np.ndarray, "u c"]:
    """Return the shares after five updates by those of the neighbours.

    Args:
        alone: the logits of the classes without the neighbours.
        graph: weights of the links between images.
        shares: the shares before.
    """
    for _ in range(_LOOKS):
        give_way()
        shares = softmax(alone + graph @ shares)
    return shares


def mean_squares(images: Float[np.ndarray, "u d"]) -> Float[np.ndarray, " d"]:
    """Return the mean square of each dimension, without a copy of all images."""
    sums = np.zeros(images.shape[1])
    for piece in pieces(*images.shape):
        sums += np.square(images[piece], dtype=np.float64).sum(axis=0)
    means: np.ndarray = sums / len(images)
    return means


def column_sums(shares: Float[np.ndarray, "u c"]) -> Float[np.ndarray, " c"]:
    """Return the sum of each column in float64."""
    sums: np.ndarray = shares.sum(axis=0, dtype=np.float64)
    return sums


def pieces(rows: int, width: int) -> Iterator[slice]:
    """Yield slices that divide the rows into pieces of some megabytes."""
    step = max(1, _AT_ONCE // max(1, width))
    for first in range(0, rows, step):
        give_way()
        yield slice(first, first + step)
