"""TFUP: a cache of the unlabelled images with the most confident zero-shot predictions, which vote for their classes.

Long et al., "Training-Free Unsupervised Prompt for Vision-Language Models", arXiv 2404.16339, 2024. For each class,
twice as many images as are needed are taken, those that are most probable under softmax(10 cosine). Of these, the
images whose probabilities differ least from the rest are cached (FCM). A vote is weighted by the cosine, times the
similarity of the probabilities of the cached image and of the query (MSM).

logits = zero-shot + alpha exp(-beta (1 - cosine similarity)) @ one-hot pseudo-labels. The similarity is 2 (1 - d), with
the Kullback-Leibler divergence d, scaled to [0, 1] over the cached images. It is scaled separately for each query, so
its result does not depend on other images.

As in the paper, an image may be cached under several classes, and then votes for each of them. Deviation: the scale of
the encoder replaces 100; the 10 for the pseudo-labels is that of the paper.
"""

from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int

from app.adapters._base import Declaration, Examples, Neighbours
from app.adapters._examples import ExampleAdapter, Need
from app.runtime.turns import give_way
from app.scoring.numerics import softmax
from app.types import ImageFeatures, Logits

_SHARPNESS = 10.0
_MIN_SHOTS, _MAX_SHOTS, _SHARE = 9, 16, 0.3
_MIN_RANGE = 1e-12
# Numbers in a piece in float64, for about 32 MiB.
_AT_ONCE = 2**22


class TFUP(ExampleAdapter):
    """Logits are zero-shot + alpha times the votes of the cached images.

    ``keys_`` (m, d) are cached under the classes ``labels_`` (m,), ascending.

    Args:
        alpha: weight of the votes.
        beta: how fast the vote of an image falls with its distance.
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
            give_way()
            piece = slice(start, start + step)
            rows = image_features[piece].astype(np.float64)
            likeness = similarities(softmax(_SHARPNESS * rows @ text.T), self.log_shares_)
            cached = np.exp(-self.beta * (1 - (rows @ self.keys_.T) * likeness))
            logits[piece] += self.alpha * np.add.reduceat(cached, first, axis=1)
        return logits


def shots_per_class(images: int, classes: int) -> int:
    """Return the number of images to cache for each class: three tenths of u / c, but from 9 to 16."""
    return min(max(int(_SHARE * images / classes), _MIN_SHOTS), _MAX_SHOTS)


def select(
    pool: Float[np.ndarray, "u d"], text: Float[np.ndarray, "c d"], shots: int
) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"]]:
    """Return the indices of the images to cache, and their classes, ascending (FCM).

    Of equal images the earlier comes first. A pool of up to ``shots`` images is cached completely under every class.
    """
    classes = len(text)
    wide = text.astype(np.float64)
    shares = np.zeros((classes, 0))
    candidates = np.zeros((classes, 0), np.int64)
    step = max(1, _AT_ONCE // max(classes, pool.shape[1]))
    for start in range(0, len(pool), step):
        give_way()
        rows = pool[start : start + step].astype(np.float64)
        shares = np.concatenate([shares, softmax(_SHARPNESS * rows @ wide.T).T], axis=1)
        numbers = np.broadcast_to(np.arange(start, start + len(rows)), (classes, len(rows)))
        candidates = np.concatenate([candidates, numbers], axis=1)
        kept = _largest(shares, 2 * shots)
        shares = np.take_along_axis(shares, kept, axis=1)
        candidates = np.take_along_axis(candidates, kept, axis=1)
    chosen = []
    for row in candidates:
        give_way()
        near = softmax(_SHARPNESS * pool[row].astype(np.float64) @ wide.T)
        chosen.append(row[np.argsort(divergences(near).sum(axis=1), kind="stable")[:shots]])
    return np.concatenate(chosen), np.repeat(np.arange(classes), len(chosen[0]))


def _largest(values: Float[np.ndarray, "c n"], count: int) -> Int[np.ndarray, "c k"]:
    """Return the columns of the largest values of each row, in descending order, the earlier of equal ones first."""
    if values.shape[1] <= count:
        return np.argsort(-values, axis=1, kind="stable")
    bounds = np.partition(values, -count, axis=1)[:, -count]
    kept = np.empty((len(values), count), np.int64)
    for index, (row, bound) in enumerate(zip(values, bounds, strict=True)):
        enough = np.flatnonzero(row >= bound)
        kept[index] = enough[np.argsort(-row[enough], kind="stable")[:count]]
    return kept


def divergences(shares: Float[np.ndarray, "n c"]) -> Float[np.ndarray, "n n"]:
    """Return the Kullback-Leibler divergence of every row from every row, in nats."""
    logs = np.log(shares)
    between: np.ndarray = (shares * logs).sum(axis=1)[:, None] - shares @ logs.T
    return between


def similarities(shares: Float[np.ndarray, "n c"], log_shares: Float[np.ndarray, "m c"]) -> Float[np.ndarray, "n m"]:
    """Return the similarities of queries and cached images, scaled to [0, 2] for each query (MSM).

    The cross entropy is enough: it differs from the divergence by the entropy of the query, which is constant in a row.
    """
    cross = -shares @ log_shares.T
    smallest = cross.min(axis=1, keepdims=True)
    ranges = np.maximum(cross.max(axis=1, keepdims=True) - smallest, _MIN_RANGE)
    alike: np.ndarray = 2 * (1 - (cross - smallest) / ranges)
    return alike
