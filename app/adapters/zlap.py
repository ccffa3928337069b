"""ZLaP: label propagation from the text of the classes over a graph of unlabelled images.

Stojnić et al., "Label Propagation for Zero-Shot Classification with Vision-Language Models", CVPR 2024. Each image is
linked to its nearest images and its nearest classes. A unit of mass starts at the text of a class, and at each step a
share ``alpha`` of it moves along the links. The score of the class is the mass that reaches an image: ``Z = inv(I -
alpha W) [I; 0]``. That matrix is symmetric, so a new image has the scores ``y @ Z``, with the weights y of its own
links, and no system is solved for it.

Deviations: cosines are clipped after they are scaled, not before, which gave negative weights. Classes with the same
text are one node. An image that no mass reaches gets the results of zero-shot. If no image is linked to any class, the
adapter does not learn.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, TypeAlias

import numpy as np
from jaxtyping import Float, Int64
from numpy.typing import DTypeLike

from app.adapters._base import Declaration, Examples, Neighbours, Range
from app.adapters._examples import DegenerateExamplesError, ExampleAdapter, Need, log_shares
from app.runtime.turns import give_way
from app.types import ImageFeatures, Logits

if TYPE_CHECKING:
    import scipy.sparse as sp

Span: TypeAlias = tuple[float, float]
"""The smallest and the largest cosine of a graph, which are scaled to 0 and 1."""

# The largest number of entries of a dense solution, 1 GiB, and the number of classes per node that are kept above it.
_MAX_SOLUTION = 2**28
_KEPT_CLASSES = 16
# Entries of a matrix that are processed together; the solver needs about five such matrices.
_AT_ONCE = 2**20
_TOLERANCE = 1e-6
_ITERATIONS = 50
_MIN_SPAN = 1e-6


class ZLaP(ExampleAdapter):
    """Logits are the logarithms of the shares of the classes in the mass that reaches an image.

    Args:
        k: the number of images (including itself) and of classes that an image is linked to.
        gamma: power of the cosines with classes, which are smaller than those with images.
        alpha: share of the mass that moves along the links at each step, in [0, 1).
        keep: the number of classes whose mass is kept for each node; 1 is the sparse variant of the paper. 0 keeps all,
            or 16 if all would be more than 2**28 numbers; ``diagnostics_`` contains the number.
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
        """The number of images that an image is linked to."""
        return self.k

    def _learn(self, examples: Examples) -> None:
        self.propagation_ = propagation(
            np.asarray(examples.pool_features, np.float32),
            self.text_,
            required(examples.pool_neighbours),
            k=self.k,
            gamma=self.gamma,
            alpha=self.alpha,
            keep=self.keep,
        )
        self.diagnostics_ = self.propagation_.diagnostics()

    def _logits(self, image_features: ImageFeatures, zero_shot: Logits, neighbours: Neighbours | None) -> np.ndarray:
        return mass_logits(self.propagation_.query_masses(image_features, required(neighbours)), zero_shot)

    def _pool_logits(self, pool_features: ImageFeatures, zero_shot: Logits) -> np.ndarray:  # noqa: ARG002
        return mass_logits(self.propagation_.pool_masses(), zero_shot)


@dataclass(frozen=True, slots=True, eq=False)
class Propagation:
    """The mass that reaches each node from each class. Nodes are the c classes, followed by the u images of the pool.

    ``values`` (c + u, c) are the masses of all classes, or (c + u, m) those of the m classes in ``kept`` (c + u, m).
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

    def query_masses(self, images: Float[np.ndarray, "n d"], neighbours: Neighbours) -> Float[np.ndarray, "n c"]:
        """Return the masses of new images, from their neighbours in the pool."""
        text_indices, text_cosines = nearest_classes(images, self.text, self.k)
        nodes = np.hstack([text_indices, neighbours.indices[:, : self.k] + len(self.text)])
        weights = link_weights(text_cosines, neighbours.cosines[:, : self.k], self.gamma, self.span)
        masses = np.empty((len(images), len(self.text)), self.values.dtype)
        step = max(1, _AT_ONCE // (nodes.shape[1] * self.values.shape[1]))
        for first in range(0, len(images), step):
            give_way()
            piece = slice(first, first + step)
            masses[piece] = self._gathered(nodes[piece], weights[piece])
        return masses

    def pool_masses(self) -> Float[np.ndarray, "u c"]:
        """Return the masses of the images of the pool."""
        classes = len(self.text)
        if self.kept is None:
            return self.values[classes:]
        masses = np.zeros((len(self.values) - classes, classes), self.values.dtype)
        np.put_along_axis(masses, self.kept[classes:], self.values[classes:], axis=1)
        return masses

    def diagnostics(self) -> dict[str, float]:
        """Return the number of classes that are kept for each node, and the share of images that no mass reaches."""
        largest = self.values[len(self.text) :].max(axis=1)
        return {"kept_classes": self.values.shape[1], "unreached": float((largest <= 0).mean())}

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
    """Solve for the masses of all nodes; ``scaled`` scales the cosines of the graph to [0, 1] first.

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
    if keep == 0 and system.shape[0] * len(text) > _MAX_SOLUTION:
        keep = _KEPT_CLASSES
    values, kept = solution(system, len(text), 0 if keep >= len(text) else keep, images.dtype)
    return Propagation(text, values, kept, k, gamma, span)


def nearest_classes(
    images: Float[np.ndarray, "n d"], text: Float[np.ndarray, "c d"], k: int
) -> tuple[Int64[np.ndarray, "n k"], Float[np.ndarray, "n k"]]:
    """Return the min(k, c) classes nearest to each image, in no order, and their cosines."""
    kept = min(k, len(text))
    indices = np.empty((len(images), kept), np.int64)
    cosines = np.empty((len(images), kept), images.dtype)
    step = max(1, _AT_ONCE // len(text))
    for first in range(0, len(images), step):
        give_way()
        piece = slice(first, first + step)
        similar = images[piece] @ text.T
        indices[piece] = np.argpartition(similar, len(text) - kept, axis=1)[:, len(text) - kept :]
        cosines[piece] = np.take_along_axis(similar, indices[piece], axis=1)
    return indices, cosines


def link_weights(
    text_cosines: Float[np.ndarray, "n t"], image_cosines: Float[np.ndarray, "n k"], gamma: float, span: Span | None
) -> Float[np.ndarray, "n t+k"]:
    """Return non-negative weights, those of the classes first: cosines, scaled by ``span`` and then clipped."""
    low, high = span or (0.0, 1.0)
    scale = max(high - low, _MIN_SPAN)
    to_text = np.maximum((text_cosines - low) / scale, 0) ** gamma
    return np.hstack([to_text, np.maximum((image_cosines - low) / scale, 0)])


def laplacian(
    nodes: Int64[np.ndarray, "u j"], weights: Float[np.ndarray, "u j"], classes: int, alpha: float
) -> "sp.csr_array":
    """Return ``I - alpha D^-1/2 W D^-1/2`` over classes and images; mutual links count twice."""
    import scipy.sparse as sp  # noqa: PLC0415 - imported by the first fit, not at every start

    images, links = nodes.shape
    size = classes + images
    starts = np.repeat(np.arange(classes, size), links)
    one_way = sp.csr_array((weights.ravel().astype(np.float64), (starts, nodes.ravel())), shape=(size, size))
    both = one_way + one_way.T
    degrees = np.asarray(both.sum(axis=1)).ravel()
    roots = sp.diags_array(1 / np.sqrt(np.where(degrees > 0, degrees, 1)))
    return sp.csr_array(sp.eye_array(size) - alpha * (roots @ both @ roots))


def solution(
    system: "sp.csr_array", classes: int, keep: int, dtype: DTypeLike = np.float32
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the first ``classes`` columns of the inverse, or each row's ``keep`` largest entries and their columns.

    The columns are solved in pieces, so the memory is that of the result and some megabytes.
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


def conjugate_gradients(system: "sp.csr_array", right: Float[np.ndarray, "s b"]) -> Float[np.ndarray, "s b"]:
    """Solve each column independently (Hestenes and Stiefel, 1952), to a residual of 1e-6 of the right-hand side.

    ``right`` is overwritten.
    """
    found = np.zeros_like(right)
    residual = right
    direction = residual.copy()
    squares = _column_squares(residual, residual)
    enough = _TOLERANCE**2 * squares
    for _ in range(_ITERATIONS):
        give_way()
        unsolved = squares > enough
        if not unsolved.any():
            break
        image = system @ direction
        curvature = _column_squares(direction, image)
        # Columns that are solved do not change any more.
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
    """Return the logarithms of the shares, and the zero-shot logits for images that no mass reaches."""
    reached = masses.max(axis=1, keepdims=True) > 0
    logits: np.ndarray = np.where(reached, log_shares(masses), zero_shot)
    return logits


def required(neighbours: Neighbours | None) -> Neighbours:
    """Return the neighbours, which must be given to an adapter whose ``neighbours`` is above 0."""
    assert neighbours is not None, "an adapter that needs neighbours is given them"
    return neighbours


def _span(text_cosines: np.ndarray, image_cosines: np.ndarray) -> Span:
    # An image is its own nearest neighbour, at a cosine of 1, which is not a link but belongs to the span.
    lows = [float(cosines.min()) for cosines in (text_cosines, image_cosines) if cosines.size]
    span = min(lows), max(1.0, float(text_cosines.max()))
    if span[1] - span[0] < _MIN_SPAN:
        raise DegenerateExamplesError("the unlabelled images and the classes are all the same")
    return span


def _column_squares(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    sums: np.ndarray = np.einsum("sb,sb->b", first, second, dtype=np.float64)
    return sums
