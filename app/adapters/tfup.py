"""TFUP: a cache of the unlabelled images that are most sure of their class, each voting for it.

Long et al., "Training-Free Unsupervised Prompt for Vision-Language Models", arXiv 2404.16339, 2024: of each class twice
as many images as it takes that are most probable under softmax(10 cosine), and of those the ones whose probabilities
differ least from the rest (FCM); an image votes by its cosine times how alike its probabilities are to the asked
image's (MSM).

logits = zero-shot + alpha exp(-beta (1 - cosine similarity)) @ one-hot pseudo-labels, the similarity being 2 (1 - the
Kullback-Leibler divergence, brought to [0, 1] over the cached images). That scaling is of each asked image by itself,
so that its answer does not depend on others.

As in the method, an image may be among the surest of several classes: it is cached under each and votes for each.
Deviation: the encoder's own scale stands for 100; the 10 that finds the pseudo-labels stays.
"""

from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int

from app.adapters._base import Declaration, Examples, Neighbours
from app.adapters._examples import ExampleAdapter, Need
from app.scoring.numerics import softmax
from app.types import ImageFeatures, Logits

_SHARPNESS = 10.0
_LEAST_SHOTS, _MOST_SHOTS, _SHARE = 9, 16, 0.3
_LEAST_RANGE = 1e-12
# Numbers of a piece in float64, for about 32 MiB.
_AT_ONCE = 2**22


class TFUP(ExampleAdapter):
    """Logits are zero-shot + alpha times the votes of the cached images.

    ``keys_`` (m, d) are cached under the classes ``labels_`` (m,), ascending.

    Args:
        alpha: how much the votes count.
        beta: how fast an image's vote falls with its distance.
    """

    declaration: ClassVar[Declaration] = Declaration(
        "tfup",
        "Similarity to the unlabelled images with the most confident zero-shot predictions, added to zero-shot"
        " (training-free unsupervised prompts, Long et al., 2024).",
    )
    needs: ClassVar[frozenset[Need]] = frozenset({Need.POOL})
    balanced: ClassVar[bool] = True

    def __init__(self, alpha: float = 0.3, beta: float = 1.0) -> None:
        self.alpha = alpha
        self.beta = beta

    def _learn(self, examples: Examples) -> None:
        pool = examples.pool_features
        shots = shots_per_class(len(pool), len(self.text_))
        indices, self.labels_ = select(pool, self.text_, shots)
        self.keys_ = pool[indices].astype(np.float64)
        self.log_shares_ = np.log(softmax(_SHARPNESS * self.keys_ @ self.text_.T.astype(np.float64)))
        self.diagnostics_ = {
            "images": len(pool),
            "images_per_class": shots,
            "cached": len(indices),
            "cached_under_several_classes": int((np.bincount(indices) > 1).sum()),
        }

    def _logits(self, image_features: ImageFeatures, zero_shot: Logits, neighbours: Neighbours | None) -> np.ndarray:
        del neighbours
        text = self.text_.astype(np.float64)
        logits = zero_shot.copy()
        _, first = np.unique(self.labels_, return_index=True)
        step = max(1, _AT_ONCE // len(self.keys_))
        for start in range(0, len(image_features), step):
            some = slice(start, start + step)
            rows = image_features[some].astype(np.float64)
            likeness = similarities(softmax(_SHARPNESS * rows @ text.T), self.log_shares_)
            cached = np.exp(-self.beta * (1 - (rows @ self.keys_.T) * likeness))
            logits[some] += self.alpha * np.add.reduceat(cached, first, axis=1)
        return logits


def shots_per_class(images: int, classes: int) -> int:
    """Return how many images are cached of each class: three tenths of its share of the pool, from 9 to 16."""
    return min(max(int(_SHARE * images / classes), _LEAST_SHOTS), _MOST_SHOTS)


def select(
    pool: Float[np.ndarray, "u d"], text: Float[np.ndarray, "c d"], shots: int
) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"]]:
    """Return which images are cached, and under which classes, ascending (FCM).

    Of equal images the earlier comes first; a pool of no more images than ``shots`` is cached under each class whole.
    """
    classes = len(text)
    wide = text.astype(np.float64)
    shares = np.zeros((classes, 0))
    candidates = np.zeros((classes, 0), np.int64)
    step = max(1, _AT_ONCE // max(classes, pool.shape[1]))
    for start in range(0, len(pool), step):
        rows = pool[start : start + step].astype(np.float64)
        shares = np.concatenate([shares, softmax(_SHARPNESS * rows @ wide.T).T], axis=1)
        numbers = np.broadcast_to(np.arange(start, start + len(rows)), (classes, len(rows)))
        candidates = np.concatenate([candidates, numbers], axis=1)
        kept = _largest(shares, 2 * shots)
        shares = np.take_along_axis(shares, kept, axis=1)
        candidates = np.take_along_axis(candidates, kept, axis=1)
    chosen = []
    for row in candidates:
        near = softmax(_SHARPNESS * pool[row].astype(np.float64) @ wide.T)
        chosen.append(row[np.argsort(divergences(near).sum(axis=1), kind="stable")[:shots]])
    return np.concatenate(chosen), np.repeat(np.arange(classes), len(chosen[0]))


def _largest(values: Float[np.ndarray, "c n"], count: int) -> Int[np.ndarray, "c k"]:
    """Return the columns of each row's largest values, falling, the earlier of equal ones first."""
    if values.shape[1] <= count:
        return np.argsort(-values, axis=1, kind="stable")
    least = np.partition(values, -count, axis=1)[:, -count]
    kept = np.empty((len(values), count), np.int64)
    for index, (row, bound) in enumerate(zip(values, least, strict=True)):
        enough = np.flatnonzero(row >= bound)
        kept[index] = enough[np.argsort(-row[enough], kind="stable")[:count]]
    return kept


def divergences(shares: Float[np.ndarray, "n c"]) -> Float[np.ndarray, "n n"]:
    """Return the Kullback-Leibler divergence of each row from each, in nats."""
    logs = np.log(shares)
    between: np.ndarray = (shares * logs).sum(axis=1)[:, None] - shares @ logs.T
    return between


def similarities(shares: Float[np.ndarray, "n c"], log_shares: Float[np.ndarray, "m c"]) -> Float[np.ndarray, "n m"]:
    """Return how alike the asked images are to the cached ones, from 0 to 2, over the cached of each row (MSM).

    Of the divergence only the cross entropy is needed: the entropy of the row itself is the same for all.
    """
    cross = -shares @ log_shares.T
    least = cross.min(axis=1, keepdims=True)
    ranges = np.maximum(cross.max(axis=1, keepdims=True) - least, _LEAST_RANGE)
    alike: np.ndarray = 2 * (1 - (cross - least) / ranges)
    return alike
