"""ZLaP: labels spread from the names of the classes over a graph of unlabelled images.

Stojnić et al., "Label Propagation for Zero-Shot Classification with Vision-Language Models", CVPR 2024. Each image is
linked to its nearest images and its nearest classes; the score of a class is what reaches an image when a unit of mass
begins at its text and, at each step, a share ``alpha`` of it goes on along the links: ``Z = inv(I - alpha W) [I; 0]``.
As that matrix is symmetric, a new image has ``y @ Z`` for the weights y of its own links, without solving anything.

Deviations: cosines are clipped after they are scaled, and not before, which gave negative weights; classes whose text
is the same are one node; an image that no mass reaches is answered as by zero-shot; and where no image is linked to
any class, the adapter does not learn.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, TypeAlias

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int64
from numpy.typing import DTypeLike

from app.adapters._base import Declaration, Examples, Neighbours, Range
from app.adapters._examples import DegenerateExamplesError, ExampleAdapter, Need, log_shares
from app.types import ImageFeatures, Logits

Span: TypeAlias = tuple[float, float]
"""The smallest and the largest cosine of a graph, between which they are scaled."""

# Entries of a dense solution, for 1 GiB; above it, so many classes of each node are kept.
_LARGEST_SOLUTION = 2**28
_KEPT_OF_LARGE = 16
# Entries of a matrix that are handled together; the solver needs some five such matrices.
_AT_ONCE = 2**20
_TOLERANCE = 1e-6
_ITERATIONS = 50
_LEAST_SPAN = 1e-6


class ZLaP(ExampleAdapter):
    """Scores are the logarithms of each class's share of the mass that reaches an image.

    Args:
        k: how many images (itself among them) and how many classes an image is linked to.
        gamma: power of the cosines with classes, which are smaller than those with images.
        alpha: share of the mass that goes on at each step, in [0, 1).
        keep: of how many classes each node's mass is kept; the paper's sparse variant is 1. 0 is for all, or for
            16 where all would be more than 2**28 numbers; ``diagnostics_`` says how many.
    """

    declaration: ClassVar[Declaration] = Declaration(
        "zlap", "Label propagation from the text over a graph of unlabelled images (Stojnić et al., CVPR 2024)."
    )
    needs: ClassVar[frozenset[Need]] = frozenset({Need.POOL})
    balanced: ClassVar[bool] = True

    def __init__(
        self,
        *,
        k: Annotated[int, Range(1, 100, "Neighbours of each image.")] = 5,
        gamma: Annotated[float, Range(0.1, 20, "Power of the similarities between images and text.")] = 5.0,
        alpha: Annotated[float, Range(0.01, 0.99, "How far labels spread.")] = 0.3,
        keep: Annotated[int, Range(0, 1000, "Classes that are kept for each image; 0 keeps all.")] = 0,
    ) -> None:
        self.k = k
        self.gamma = gamma
        self.alpha = alpha
        self.keep = keep

    @property
    def neighbours(self) -> int:
        """As many as an image is linked to."""
        return self.k

    def _learn(self, examples: Examples) -> None:
        self.propagation_ = propagation(
            np.asarray(examples.pool_features, np.float32),
            self.text_,
            expected(examples.pool_neighbours),
            k=self.k,
            gamma=self.gamma,
            alpha=self.alpha,
            keep=self.keep,
        )
        self.diagnostics_ = self.propagation_.diagnostics()

    def _logits(self, image_features: ImageFeatures, zero_shot: Logits, neighbours: Neighbours | None) -> np.ndarray:
        return mass_logits(self.propagation_.of_queries(image_features, expected(neighbours)), zero_shot)

    def _pool_logits(self, pool_features: ImageFeatures, zero_shot: Logits) -> np.ndarray:  # noqa: ARG002
        return mass_logits(self.propagation_.of_pool(), zero_shot)


@dataclass(frozen=True, slots=True, eq=False)
class Propagation:
    """What reaches each node from each class: nodes are the c classes and then the u images of the pool.

    ``values`` (c + u, c) are of all classes, or where ``kept`` (c + u, m) names some, of those (c + u, m).
    """

    text: Float[np.ndarray, "c d"]
    values: Float[np.ndarray, "nodes m"]
    kept: Int64[np.ndarray, "nodes m"] | None
    k: int
    gamma: float
    span: Span | None

    @property
    def nbytes(self) -> int:
        """Return the memory of its arrays."""
        return self.text.nbytes + self.values.nbytes + (0 if self.kept is None else self.kept.nbytes)

    def of_queries(self, images: Float[np.ndarray, "n d"], neighbours: Neighbours) -> Float[np.ndarray, "n c"]:
        """Return what would reach new images, whose neighbours are in the pool."""
        text_indices, text_cosines = nearest_classes(images, self.text, self.k)
        nodes = np.hstack([text_indices, neighbours.indices[:, : self.k] + len(self.text)])
        weights = link_weights(text_cosines, neighbours.cosines[:, : self.k], self.gamma, self.span)
        masses = np.empty((len(images), len(self.text)), self.values.dtype)
        step = max(1, _AT_ONCE // (nodes.shape[1] * self.values.shape[1]))
        for first in range(0, len(images), step):
            some = slice(first, first + step)
            masses[some] = self._gathered(nodes[some], weights[some])
        return masses

    def of_pool(self) -> Float[np.ndarray, "u c"]:
        """Return what reaches the images of the pool."""
        classes = len(self.text)
        if self.kept is None:
            return self.values[classes:]
        masses = np.zeros((len(self.values) - classes, classes), self.values.dtype)
        np.put_along_axis(masses, self.kept[classes:], self.values[classes:], axis=1)
        return masses

    def diagnostics(self) -> dict[str, float]:
        """Return of how many classes each node's mass is kept, and the share of images that none reaches."""
        most = self.values[len(self.text) :].max(axis=1)
        return {"kept_classes": self.values.shape[1], "unreached": float((most <= 0).mean())}

    def _gathered(self, nodes: np.ndarray, weights: np.ndarray) -> np.ndarray:
        values = self.values[nodes]
        if self.kept is None:
            dense: np.ndarray = np.matmul(weights[:, None, :].astype(values.dtype), values)[:, 0]
            return dense
        classes = len(self.text)
        places = self.kept[nodes] + classes * np.arange(len(nodes))[:, None, None]
        masses = np.bincount(places.ravel(), (weights[:, :, None] * values).ravel(), minlength=len(nodes) * classes)
        return masses.reshape(len(nodes), classes)


def propagation(
    images: Float[np.ndarray, "u d"],
    text: Float[np.ndarray, "c d"],
    neighbours: Neighbours,
    *,
    k: int,
    gamma: float,
    alpha: float,
    keep: int = 0,
    scaled: bool = False,
) -> Propagation:
    """Solve for what reaches each node; ``scaled`` moves the cosines of the graph onto [0, 1] first.

    Raises:
        DegenerateExamplesError: no image is linked to any class.
    """
    text_indices, text_cosines = nearest_classes(images, text, k)
    image_cosines = neighbours.cosines[:, : k - 1]
    span = _span(text_cosines, image_cosines) if scaled else None
    weights = link_weights(text_cosines, image_cosines, gamma, span)
    if not weights[:, : text_indices.shape[1]].any():
        raise DegenerateExamplesError("no unlabelled image is similar to the text of any class (no cosine is positive)")
    nodes = np.hstack([text_indices, neighbours.indices[:, : k - 1] + len(text)])
    system = laplacian(nodes, weights, len(text), alpha)
    if keep == 0 and system.shape[0] * len(text) > _LARGEST_SOLUTION:
        keep = _KEPT_OF_LARGE
    values, kept = solution(system, len(text), 0 if keep >= len(text) else keep, images.dtype)
    return Propagation(text, values, kept, k, gamma, span)


def nearest_classes(
    images: Float[np.ndarray, "n d"], text: Float[np.ndarray, "c d"], k: int
) -> tuple[Int64[np.ndarray, "n k"], Float[np.ndarray, "n k"]]:
    """Return the k classes nearest to each image, in no order, or all where there are fewer, and their cosines."""
    kept = min(k, len(text))
    indices = np.empty((len(images), kept), np.int64)
    cosines = np.empty((len(images), kept), images.dtype)
    step = max(1, _AT_ONCE // len(text))
    for first in range(0, len(images), step):
        some = slice(first, first + step)
        similar = images[some] @ text.T
        indices[some] = np.argpartition(similar, len(text) - kept, axis=1)[:, len(text) - kept :]
        cosines[some] = np.take_along_axis(similar, indices[some], axis=1)
    return indices, cosines


def link_weights(
    text_cosines: Float[np.ndarray, "n t"], image_cosines: Float[np.ndarray, "n k"], gamma: float, span: Span | None
) -> Float[np.ndarray, "n t+k"]:
    """Return weights of at least 0, those of the classes first: cosines, moved by ``span``, and clipped after it."""
    low, high = span or (0.0, 1.0)
    scale = max(high - low, _LEAST_SPAN)
    to_text = np.maximum((text_cosines - low) / scale, 0) ** gamma
    return np.hstack([to_text, np.maximum((image_cosines - low) / scale, 0)])


def laplacian(
    nodes: Int64[np.ndarray, "u j"], weights: Float[np.ndarray, "u j"], classes: int, alpha: float
) -> sp.csr_array:
    """Return ``I - alpha D^-1/2 W D^-1/2`` over classes and images; links that go both ways count twice."""
    images, links = nodes.shape
    size = classes + images
    starts = np.repeat(np.arange(classes, size), links)
    one_way = sp.csr_array((weights.ravel().astype(np.float64), (starts, nodes.ravel())), shape=(size, size))
    both = one_way + one_way.T
    degrees = np.asarray(both.sum(axis=1)).ravel()
    roots = sp.diags_array(1 / np.sqrt(np.where(degrees > 0, degrees, 1)))
    return sp.csr_array(sp.eye_array(size) - alpha * (roots @ both @ roots))


def solution(
    system: sp.csr_array, classes: int, keep: int, dtype: DTypeLike = np.float32
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the first ``classes`` columns of the inverse, or of each row the ``keep`` largest entries and where.

    Columns are solved for in pieces, so that memory is what is kept and some megabytes.
    """
    size = system.shape[0]
    system = system.astype(dtype)
    step = max(1, _AT_ONCE // size)
    values = np.empty((size, classes), dtype) if keep == 0 else np.zeros((size, 0), dtype)
    kept = None if keep == 0 else np.zeros((size, 0), np.int64)
    for first in range(0, classes, step):
        columns = np.arange(first, min(first + step, classes))
        right = np.zeros((size, len(columns)), dtype)
        right[columns, columns - first] = 1
        found = conjugate_gradients(system, right)
        if kept is None:
            values[:, columns] = found
            continue
        values = np.hstack([values, found])
        kept = np.hstack([kept, np.broadcast_to(columns, found.shape)])
        if values.shape[1] > keep:
            largest = np.argpartition(values, -keep, axis=1)[:, -keep:]
            values = np.take_along_axis(values, largest, axis=1)
            kept = np.take_along_axis(kept, largest, axis=1)
    return values, kept


def conjugate_gradients(system: sp.csr_array, right: Float[np.ndarray, "s b"]) -> Float[np.ndarray, "s b"]:
    """Solve for each column by itself (Hestenes and Stiefel, 1952), to a residual of 1e-6 of the right-hand side.

    ``right`` is overwritten.
    """
    found = np.zeros_like(right)
    residual = right
    direction = residual.copy()
    squares = _column_squares(residual, residual)
    enough = _TOLERANCE**2 * squares
    for _ in range(_ITERATIONS):
        unsolved = squares > enough
        if not unsolved.any():
            break
        image = system @ direction
        curvature = _column_squares(direction, image)
        # Columns that are solved stay as they are.
        length = np.where(unsolved, squares / np.where(curvature > 0, curvature, 1), 0).astype(right.dtype)
        found += length * direction
        image *= length
        residual -= image
        new = _column_squares(residual, residual)
        direction *= np.where(unsolved, new / np.where(squares > 0, squares, 1), 0).astype(right.dtype)
        direction += residual
        squares = np.where(unsolved, new, squares)
    return found


def mass_logits(masses: Float[np.ndarray, "n c"], zero_shot: Logits) -> np.ndarray:
    """Return the logarithms of shares, and zero-shot's logits of images that no mass reaches."""
    reached = masses.max(axis=1, keepdims=True) > 0
    logits: np.ndarray = np.where(reached, log_shares(masses), zero_shot)
    return logits


def expected(neighbours: Neighbours | None) -> Neighbours:
    """Return neighbours that an adapter asked for by its property."""
    assert neighbours is not None, "an adapter that looks at neighbours is given them"
    return neighbours


def _span(text_cosines: np.ndarray, image_cosines: np.ndarray) -> Span:
    # An image is its own nearest neighbour, at a cosine of 1, which is left out of the links but not of the span.
    lows = [float(cosines.min()) for cosines in (text_cosines, image_cosines) if cosines.size]
    span = min(lows), max(1.0, float(text_cosines.max()))
    if span[1] - span[0] < _LEAST_SPAN:
        raise DegenerateExamplesError("the unlabelled images and the classes are all the same")
    return span


def _column_squares(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    sums: np.ndarray = np.einsum("sb,sb->b", first, second, dtype=np.float64)
    return sums
