"""InMaP: for each class a proxy among the images, learned from balanced pseudo-labels of unlabelled ones.

Qian et al., "Intra-Modal Proxy Learning for Zero-Shot Visual Categorization with CLIP", NeurIPS 2023. Text and images
lie apart in the space that they share; a proxy is where the text would be if it lay among the images. The labels are
zero-shot's, made to fall as often on each class (Sinkhorn), so that a pool with uneven classes makes answers worse.

Deviations: steps end when those that are left could not move a proxy by ``_STILL``. A pool too large for them teaches
with some of its images, drawn at random and always the same; all of it still decides about the labels.
"""

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int64

from app.adapters._base import Declaration, Examples, Neighbours
from app.adapters._examples import ExampleAdapter, Need
from app.scoring.numerics import softmax, unit_rows
from app.types import ImageFeatures, Logits

_ROUNDS = 20
# The largest entry by which the steps that are left could move a proxy of unit length when they are left out.
_STILL = 1e-6
# Multiplications per step of the gradient up to which they are in float64: seconds for all of them on one core.
_SMALL_STEP = 2**25
# Multiplications per step of the gradient: minutes for all of them on one core.
_LARGEST_STEP = 2**30
# Entries of a matrix that are handled together in float64, for 32 MiB.
_AT_ONCE = 2**22
_LEAST = 1e-30


class InMaP(ExampleAdapter):
    """Scores are cosines with the proxies, times the encoder's scale.

    Args:
        tau_t: temperature of the text's softmax, before it is balanced.
        gamma: 0 to want as many images of each class, 1 to want as many as zero-shot sees.
        tau_i: temperature of the proxies' softmax.
        lr: length of the first steps, which is halved whenever the gradient grows.
        steps: how many at most.
        alpha: share above which a pseudo-label becomes certain, in [0, 1].
    """

    declaration: ClassVar[Declaration] = Declaration(
        "inmap", "Class embeddings moved to where the unlabelled images are (Qian et al., NeurIPS 2023)."
    )
    needs: ClassVar[frozenset[Need]] = frozenset({Need.POOL})
    balanced: ClassVar[bool] = True

    def __init__(
        self,
        *,
        tau_t: float = 0.01,
        gamma: float = 0.0,
        tau_i: float = 0.04,
        lr: float = 10.0,
        steps: int = 2000,
        alpha: float = 0.6,
    ) -> None:
        self.tau_t = tau_t
        self.gamma = gamma
        self.tau_i = tau_i
        self.lr = lr
        self.steps = steps
        self.alpha = alpha

    def _learn(self, examples: Examples) -> None:
        self.proxies_, self.diagnostics_ = learned_proxies(
            np.asarray(examples.pool_features, np.float32),
            self.text_,
            tau_t=self.tau_t,
            gamma=self.gamma,
            tau_i=self.tau_i,
            lr=self.lr,
            steps=self.steps,
            alpha=self.alpha,
        )

    def _logits(self, image_features: ImageFeatures, zero_shot: Logits, neighbours: Neighbours | None) -> np.ndarray:  # noqa: ARG002
        logits: np.ndarray = self.logit_scale_ * (image_features @ self.proxies_.T) + self.logit_bias_
        return logits


def learned_proxies(
    images: Float[np.ndarray, "u d"],
    text: Float[np.ndarray, "c d"],
    *,
    tau_t: float = 0.01,
    gamma: float = 0.0,
    tau_i: float = 0.04,
    lr: float = 10.0,
    steps: int = 2000,
    alpha: float = 0.6,
) -> tuple[Float[np.ndarray, "c d"], dict[str, float]]:
    """Label the images, and return unit proxies, how many steps were taken for them, and with how many images.

    Small problems are solved in float64, whatever precision comes.
    """
    dtype = images.dtype
    if images.size * len(text) <= _SMALL_STEP:
        images = images.astype(np.float64)
    labels = balanced_labels(images @ text.T, tau_t=tau_t, gamma=gamma)
    shown = taught(len(images), text.size)
    if len(shown) < len(images):
        images, labels = images[shown], labels[shown]
    found, taken = proxies(images, text, labels, lr=lr, steps=steps, tau_i=tau_i, alpha=alpha)
    return found.astype(dtype), {"steps": taken, "images": len(shown)}


def taught(images: int, text_entries: int) -> Int64[np.ndarray, " t"]:
    """Return which images the gradient looks at: all, or as many as the largest step allows, and at least one."""
    allowed = max(1, _LARGEST_STEP // text_entries)
    if images <= allowed:
        return np.arange(images)
    return np.sort(np.random.default_rng(0).permutation(images)[:allowed])


def balanced_labels(cosines: Float[np.ndarray, "u c"], *, tau_t: float, gamma: float) -> Float[np.ndarray, "u c"]:
    """Return soft labels whose rows sum to 1 and whose columns sum to ``u / c`` (Sinkhorn and Knopp, 1967).

    The columns wanted are proportional to the zero-shot shares to the power of ``gamma``. Memory is a second matrix.
    """
    images = len(cosines)
    # P = diag(rows) @ kernel @ diag(columns): only the two vectors change, and they need the range of float64.
    kernel = cosines / tau_t
    softmax(kernel, out=kernel)
    rows, columns = np.full(images, 1 / images), np.ones(kernel.shape[1])
    wanted = _column_sums(kernel, rows) ** gamma
    wanted /= wanted.sum()
    for _ in range(_ROUNDS):
        sums = columns * _column_sums(kernel, rows)
        # A class that no image could belong to stays without.
        columns = np.where(sums > 0, columns * wanted / np.maximum(sums, _LEAST), columns)
        for some in _pieces(kernel):
            sums = rows[some] * (kernel[some].astype(np.float64) @ columns)
            rows[some] /= np.maximum(sums, _LEAST) * images
    for some in _pieces(kernel):
        kernel[some] = kernel[some] * columns * rows[some, None] * images
    return kernel


def proxies(
    images: Float[np.ndarray, "u d"],
    text: Float[np.ndarray, "c d"],
    labels: Float[np.ndarray, "u c"],
    *,
    lr: float,
    steps: int,
    tau_i: float,
    alpha: float,
) -> tuple[Float[np.ndarray, "c d"], int]:
    """Return unit proxies that tell the images as their labels do, and how many steps were taken.

    Projected gradient descent on the cross-entropy, from the text. Products are in the precision of the images, and
    the proxies in float64; with float32 the rounding decides when a gradient no longer shrinks, and so where the last
    steps end.
    """
    certain = labels.max(axis=1) > alpha
    targets = labels.astype(images.dtype)
    targets[certain] = 0
    targets[certain, labels[certain].argmax(axis=1)] = 1
    wanted = (targets.T @ images).astype(np.float64)
    shares = targets  # its memory, which is not needed any more
    moved, found = np.empty(text.shape, images.dtype), text.astype(np.float64)
    previous = np.inf
    taken = 0
    for taken in range(1, steps + 1):
        np.matmul(images, (found / tau_i).astype(images.dtype).T, out=shares)
        softmax(shares, out=shares)
        gradient = np.matmul(shares.T, images, out=moved) - wanted
        length = float(np.linalg.norm(gradient))
        if length > previous:
            lr /= 2
        previous = length
        before = found
        found = unit_rows(before - lr / (len(images) * tau_i) * gradient)
        # RemoteSteps never grow again by much, as their length only ever is halved.
        if np.abs(found - before).max() * (steps - taken) < _STILL:
            break
    return found, taken


def _column_sums(kernel: np.ndarray, rows: np.ndarray) -> np.ndarray:
    sums = np.zeros(kernel.shape[1])
    for some in _pieces(kernel):
        sums += rows[some] @ kernel[some].astype(np.float64)
    return sums


def _pieces(matrix: np.ndarray) -> Iterator[slice]:
    step = max(1, _AT_ONCE // matrix.shape[1])
    return (slice(first, first + step) for first in range(0, len(matrix), step))
