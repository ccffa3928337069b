"""The interface of adapters to the pipeline, and the conversion of logits to probabilities."""

from dataclasses import dataclass, field
from typing import ClassVar, Protocol, Self

import numpy as np
from jaxtyping import Float32, Int64

from app.scoring.numerics import softmax
from app.types import ImageFeatures, Logits, Probabilities, Similarities


@dataclass(frozen=True, slots=True, eq=False)
class Neighbours:
    """The k pool images nearest to each of n images, the nearest first: their rows in the pool, and their cosines."""

    indices: Int64[np.ndarray, "n k"]
    cosines: Float32[np.ndarray, "n k"]


def _no_rows() -> np.ndarray:
    return np.zeros((0, 0), np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """The unit features of the images that an adapter learns from; an array is empty if there are none.

    ``support_features`` (s, d) are those of labelled images, ``support_labels`` (s,) their class indices, and
    ``pool_features`` (u, d) those of unlabelled images. ``pool_neighbours`` (u, k) are the nearest other images of each
    pool image, where k is the adapter's ``neighbours`` or u - 1 if that is less. It is None if the adapter needs none.
    """

    support_features: Float32[np.ndarray, "s d"] = field(default_factory=_no_rows)
    support_labels: Int64[np.ndarray, " s"] = field(default_factory=lambda: np.zeros(0, np.int64))
    pool_features: Float32[np.ndarray, "u d"] = field(default_factory=_no_rows)
    pool_neighbours: Neighbours | None = None


NO_EXAMPLES = Examples()


@dataclass(frozen=True, slots=True)
class Scores:
    """The result of an adapter for n images and r rows of text.

    ``similarities`` are cosines or weighted means of cosines. ``logits`` are the input of ``probabilities``.
    ``prompt_weights`` (n, k) are the weights of the k prompts of every row, for each image. ``warnings`` are sentences
    for the response, for example that the adapter returned the results of zero-shot, and why.
    """

    similarities: Similarities
    logits: Logits
    prompt_weights: Float32[np.ndarray, "n k"] | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Declaration:
    """How an adapter is offered as a method.

    Args:
        name: by which requests select it.
        summary: one sentence that cites the paper.
        recipe: the prompts that it reads, a name in ``RECIPES`` of app/prompting/recipes.py.
        uses_descriptions: whether descriptions of the classes change its results.
        is_control: whether it exists only to be compared with.
    """

    name: str
    summary: str
    recipe: str = "templates"
    uses_descriptions: bool = False
    is_control: bool = False


@dataclass(frozen=True, slots=True)
class Range:
    """Makes an argument of ``__init__`` an option of requests: its bounds, and its description for users.

    Used as ``Annotated[float, Range(...)]``, or with ``int`` for whole numbers. The default of the argument is that of
    the option.
    """

    minimum: float
    maximum: float
    description: str


class Adapter(Protocol):
    """A training-free classifier over frozen features.

    Hyperparameters are arguments of ``__init__``, which only keeps them. Attributes that ``fit`` learns end in ``_``;
    it forgets those of an earlier call. Neither ``fit`` nor ``predict`` changes its arguments.
    """

    declaration: ClassVar[Declaration]

    aligned: ClassVar[bool]
    """Whether it takes the prompts of each name separately, (r, k, d), and not one row for each name, (r, d)."""

    transductive: ClassVar[bool]
    """Whether the result of an image may depend on the other images of the request."""

    def fit(self, text: np.ndarray, *, logit_scale: float, logit_bias: float | None) -> Self:
        """Learn from the text, (r, d) or if ``aligned`` (r, k, d), with the scale and bias of the encoder."""

    def predict(self, image_features: ImageFeatures) -> Scores:
        """Return the scores (n, r) of unit rows (n, d)."""


def merge_rows(values: Float32[np.ndarray, "n r"], first_rows: np.ndarray, *, mean: bool) -> Float32[np.ndarray, "n c"]:
    """Return the mean or the maximum over the rows of each class, which begin at ``first_rows`` (c,), ascending."""
    if len(first_rows) == values.shape[1]:
        return values
    if not mean:
        largest: np.ndarray = np.maximum.reduceat(values, first_rows, axis=1)
        return largest
    counts = np.diff(np.append(first_rows, values.shape[1]))
    means: np.ndarray = (np.add.reduceat(values, first_rows, axis=1) / counts).astype(np.float32)
    return means


def probabilities(logits: Logits, *, sigmoid: bool) -> Probabilities:
    """Return scores in [0, 1]: a softmax over the classes, or for sigmoid models the sigmoid of each class.

    A sigmoid model is trained on whether a text matches an image, for each pair (Zhai et al., "Sigmoid Loss for
    Language Image Pre-Training", ICCV 2023, eq. 1). So its rows need not sum to 1, and all scores of a row may be
    small.
    """
    wide = logits.astype(np.float64)
    if sigmoid:
        # Only negative numbers are exponentiated, so logits of any size do not overflow.
        small = np.exp(-np.abs(wide))
        return np.where(wide >= 0, 1 / (1 + small), small / (1 + small)).astype(np.float32)
    return softmax(wide).astype(np.float32)
