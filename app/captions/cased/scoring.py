"""CaSED: an image is scored against words that were found in the captions near it.

Conti et al., "Vocabulary-free Image Classification", NeurIPS 2023. Deviations: the encoder's own logit
scale where the authors write 100; and names for several images together, which are not in the paper.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from app.scoring.numerics import softmax, unit_rows
from app.types import TextFeatures

ALPHA = 0.7
"""How much of the score is the image's; the rest is that of its captions, as the authors' model is set."""

DUPLICATE_COSINE = 0.94
"""Captions that are more similar than this are one, as in the authors' code."""

_CANCELLED = 1e-6
_LEAST_PROBABILITY = 1e-12


def distinct(embeddings: TextFeatures, threshold: float = DUPLICATE_COSINE) -> Int64[np.ndarray, " m"]:
    """Return which rows to keep, ascending: the first of those that a chain of cosines above the threshold connects.

    Args:
        embeddings: unit rows (k, d), the best first; k is some hundred at most, since all pairs are compared.
        threshold: in [-1, 1].
    """
    _, chains = connected_components(csr_array(embeddings @ embeddings.T > threshold), directed=False)
    _, first = np.unique(chains, return_index=True)
    return np.sort(first)


def centroid(caption_features: Float[np.ndarray, "k d"]) -> Float[np.ndarray, " d"]:
    """Return the unit mean of the captions' directions; zeros if they cancel out, or if there are none."""
    if not len(caption_features):
        return np.zeros(caption_features.shape[1], caption_features.dtype)
    mean = unit_rows(caption_features).mean(axis=0)
    # What rounding leaves of directions that cancel out is no direction.
    return unit_rows(mean) if np.linalg.norm(mean) > _CANCELLED else np.zeros_like(mean)


def score(
    image: Float[np.ndarray, " d"],
    word_features: Float[np.ndarray, "w d"],
    caption_features: Float[np.ndarray, "k d"],
    *,
    logit_scale: float,
    alpha: float = ALPHA,
) -> Float[np.ndarray, " w"]:
    """Return the probability of each word (w,); together they are 1.

    Without captions, or where they cancel out, the score is that of the image alone.

    Args:
        image: unit (d,).
        word_features: one row per candidate, w >= 1; of any length but zero.
        caption_features: of the captions that the words come from, duplicates left out.
        logit_scale: the encoder's.
        alpha: the image's share, in [0, 1].
    """
    centroids = centroid(caption_features)[None]
    scores: np.ndarray = score_many(image[None], word_features, centroids, logit_scale=logit_scale, alpha=alpha)[0]
    return scores


def score_many(
    images: Float[np.ndarray, "n d"],
    word_features: Float[np.ndarray, "w d"],
    centroids: Float[np.ndarray, "n d"],
    *,
    logit_scale: float,
    alpha: float = ALPHA,
) -> Float[np.ndarray, "n w"]:
    """Return the probability of each word of one vocabulary for each image; rows sum to 1.

    Args:
        images: unit rows.
        word_features: one row per word, w >= 1; of any length but zero.
        centroids: of each image's captions, from ``centroid``.
        logit_scale: the encoder's.
        alpha: the image's share, in [0, 1].
    """
    words = unit_rows(word_features)
    share = np.where(centroids.any(axis=1, keepdims=True), alpha, 1.0)
    by_image = softmax(logit_scale * images @ words.T)
    by_captions = softmax(logit_scale * centroids @ words.T)
    scores: np.ndarray = share * by_image + (1 - share) * by_captions
    return scores


def pooled(candidates: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Return the shared vocabulary of several images' candidates: each word once, sorted."""
    return tuple(sorted({word for words in candidates for word in words}))


@dataclass(frozen=True, slots=True)
class GroupNames:
    """Names that n images share: indices into the vocabulary of w words.

    ``kept`` (v,) ascends, ``chosen`` (n,) is the word of each image, one of those, and ``images`` (v,) counts the
    images of each kept word.
    """

    kept: Int64[np.ndarray, " v"]
    chosen: Int64[np.ndarray, " n"]
    images: Int64[np.ndarray, " v"]


def name_together(probabilities: Float[np.ndarray, "n w"], *, min_images: int = 2) -> GroupNames:
    """Name images by few words, each the best of at least ``min_images`` of them (of all, if there are fewer).

    At first every image chooses its most probable word. Images whose word is chosen by too few are undecided. While
    there are any, the least supported of their words is taken away, and its images choose the next best of the words
    that are left. The least supported is chosen by the fewest images, then has the lowest mean log-probability over
    the undecided, then stands last in the vocabulary. A word that enough images choose is never taken away; one that
    no image chooses yet stays until the end. So two images that are best named "beagle" and "poodle" can still meet
    at "dog", which is the first choice of neither.

    Taking away one word at a time, by a rule without a threshold, needs no number of clusters and no seed, and is
    repeatable. The price is that an image that resembles no other gets another's name too, with a low probability;
    ``min_images=1`` leaves each its own best word.

    Args:
        probabilities: of all words for all images, as ``score_many`` returns them; w >= 1.
        min_images: at least 1.

    Raises:
        ValueError: no words, or ``min_images`` below 1.
    """
    images, words = probabilities.shape
    if words < 1 or min_images < 1:
        raise ValueError(f"names for {images} images by {words} words, each chosen by at least {min_images}")
    needed = min(min_images, images)
    left = np.array(probabilities, np.float64)
    logs = np.log(np.maximum(left, _LEAST_PROBABILITY))
    chosen = left.argmax(axis=1)
    counts = np.bincount(chosen, minlength=words)
    undecided = counts[chosen] < needed
    support = logs[undecided].sum(axis=0)
    while undecided.any():
        weak = np.unique(chosen[undecided])
        # The last key is the first to sort by; of words that are equal in both the last in the vocabulary goes.
        worst = weak[np.lexsort((-weak, support[weak], counts[weak]))[0]]
        moving = np.flatnonzero(chosen == worst)
        left[:, worst] = -1
        chosen[moving] = left[moving].argmax(axis=1)
        counts = np.bincount(chosen, minlength=words)
        settled = undecided & (counts[chosen] >= needed)
        support = support - logs[settled].sum(axis=0)
        undecided &= ~settled
    kept = np.flatnonzero(counts)
    return GroupNames(kept=kept, chosen=chosen, images=counts[kept])
