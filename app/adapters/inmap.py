"""InMaP: a proxy for each class among the images, learned from balanced pseudo-labels of unlabelled images.

Qian et al., "Intra-Modal Proxy Learning for Zero-Shot Visual Categorization with CLIP", NeurIPS 2023. Text and image
features lie in different regions of their common space; a proxy is where the text would be if it lay among the images.
The pseudo-labels are the zero-shot predictions, balanced so that every class gets the same share (Sinkhorn). So a pool
with unequal classes makes the results worse.

Deviations: the descent ends when the remaining steps could not move a proxy by ``_STILL``. If the pool is too large,
the descent uses a random part of its images, the same for the same size; the labels are computed with all of them.
"""

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int64

from app.adapters._base import Declaration, Examples, Neighbours
from app.adapters._examples import ExampleAdapter, Need
from app.runtime.turns import give_way
from app.scoring.numerics import softmax, unit_rows
from app.types import ImageFeatures, Logits

_ROUNDS = 20
# The largest change of an entry of a unit proxy that is neglected.
_STILL = 1e-6
# Multiplications per gradient step up to which float64 is used: all steps take seconds on one core.
_SMALL_STEP = 2**25
# The largest number of multiplications per gradient step: all steps take minutes on one core.
_MAX_STEP = 2**30
# Entries of a matrix that are converted to float64 together, for 32 MiB.
_AT_ONCE = 2**22
_TINY = 1e-30


class InMaP(ExampleAdapter):
    """Logits are the cosines with the proxies, times the scale of the encoder.

    Args:
        tau_t: temperature of the softmax over the text, before it is balanced.
        gamma: 0 balances the classes, 1 keeps the shares that zero-shot predicts.
        tau_i: temperature of the softmax over the proxies.
        lr: the first learning rate, which is halved whenever the gradient grows.
        steps: the largest number of gradient steps.
        alpha: share above which a soft pseudo-label becomes a hard one, in [0, 1].
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
    """Label the images, and return unit proxies, and the number of steps and of images that they took.

    Small problems are solved in float64, for arguments of any precision.
    """
    dtype = images.dtype
    if images.size * len(text) <= _SMALL_STEP:
        images = images.astype(np.float64)
    labels = balanced_labels(images @ text.T, tau_t=tau_t, gamma=gamma)
    shown = gradient_images(len(images), text.size)
    if len(shown) < len(images):
        images, labels = images[shown], labels[shown]
    found, taken = proxies(images, text, labels, lr=lr, steps=steps, tau_i=tau_i, alpha=alpha)
    return found.astype(dtype), {"steps": taken, "images": len(shown)}


def gradient_images(images: int, text_entries: int) -> Int64[np.ndarray, " t"]:
    """Return the indices of the images that the gradient uses: as many as ``_MAX_STEP`` allows, at least one."""
    allowed = max(1, _MAX_STEP // text_entries)
    if images <= allowed:
        return np.arange(images)
    return np.sort(np.random.default_rng(0).permutation(images)[:allowed])


def balanced_labels(cosines: Float[np.ndarray, "u c"], *, tau_t: float, gamma: float) -> Float[np.ndarray, "u c"]:
    """Return soft labels whose rows sum to 1 and whose columns have balanced sums (Sinkhorn and Knopp, 1967).

    The sums of the columns are proportional to the zero-shot shares to the power of ``gamma``; 0 makes each ``u / c``.
    It needs memory for a second matrix.
    """
    images = len(cosines)
    # The labels are diag(rows) @ kernel @ diag(columns). Only the two vectors change, and they need the range of
    # float64.
    kernel = cosines / tau_t
    softmax(kernel, out=kernel)
    rows, columns = np.full(images, 1 / images), np.ones(kernel.shape[1])
    wanted = _column_sums(kernel, rows) ** gamma
    wanted /= wanted.sum()
    for _ in range(_ROUNDS):
        sums = columns * _column_sums(kernel, rows)
        # A class that no image can belong to keeps a sum of zero.
        columns = np.where(sums > 0, columns * wanted / np.maximum(sums, _TINY), columns)
        for piece in _pieces(kernel):
            sums = rows[piece] * (kernel[piece].astype(np.float64) @ columns)
            rows[piece] /= np.maximum(sums, _TINY) * images
    for piece in _pieces(kernel):
        kernel[piece] = kernel[piece] * columns * rows[piece, None] * images
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
    """Return unit proxies that classify the images as their labels do, and the number of steps.

    Projected gradient descent on the cross-entropy, starting from the text. Products have the precision of the images,
    proxies are float64. With float32, rounding decides when the gradient no longer shrinks, and so where it ends.
    """
    certain = labels.max(axis=1) > alpha
    targets = labels.astype(images.dtype)
    targets[certain] = 0
    targets[certain, labels[certain].argmax(axis=1)] = 1
    wanted = (targets.T @ images).astype(np.float64)
    shares = targets  # reuses the memory of the targets, which are not needed any more
    moved, found = np.empty(text.shape, images.dtype), text.astype(np.float64)
    previous = np.inf
    taken = 0
    for taken in range(1, steps + 1):
        give_way()
        np.matmul(images, (found / tau_i).astype(images.dtype).T, out=shares)
        softmax(shares, out=shares)
        gradient = np.matmul(shares.T, images, out=moved) - wanted
        length = float(np.linalg.norm(gradient))
        if length > previous:
            lr /= 2
        previous = length
        before = found
        found = unit_rows(before - lr / (len(images) * tau_i) * gradient)
        # Later steps are not much longer, because the learning rate is only ever halved.
        if np.abs(found - before).max() * (steps - taken) < _STILL:
            break
    return found, taken


def _column_sums(kernel: np.ndarray, rows: np.ndarray) -> np.ndarray:
    sums = np.zeros(kernel.shape[1])
    for piece in _pieces(kernel):
        sums += rows[piece] @ kernel[piece].astype(np.float64)
    return sums


def _pieces(matrix: np.ndarray) -> Iterator[slice]:
    step = max(1, _AT_ONCE // matrix.shape[1])
    for first in range(0, len(matrix), step):
        give_way()
        yield slice(first, first + step)
