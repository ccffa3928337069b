"""CaSED scores: an image and the captions near it, compared with the candidate words of these captions.

Conti et al., "Vocabulary-free Image Classification", NeurIPS 2023. Deviations: the encoder's own logit scale, where the
authors write 100; shared labels for several images, which are not in the paper.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64

from app.scoring.numerics import softmax, unit_rows
from app.types import TextFeatures

ALPHA = 0.7
"""The weight of the image's score, as in the authors' model; the weight of the captions' score is 1 - ALPHA."""

DUPLICATE_COSINE = 0.94
"""Captions with a larger cosine count as duplicates, as in the authors' code."""

_MIN_NORM = 1e-6
_MIN_PROBABILITY = 1e-12


def distinct(embeddings: TextFeatures, threshold: float = DUPLICATE_COSINE) -> Int64[np.ndarray, " m"]:
    """Return the indices of the rows to keep, ascending: the first row of each group of duplicates.

    Rows are in one group if a chain of cosines above the threshold connects them.

    Args:
        embeddings: unit rows (k, d), the best first; k is at most a few hundred, because all pairs are compared.
        threshold: in [-1, 1].
    """
    # Imported by the first request without labels, not at every start.
    from scipy.sparse import csr_array  # noqa: PLC0415
    from scipy.sparse.csgraph import connected_components  # noqa: PLC0415

    _, groups = connected_components(csr_array(embeddings @ embeddings.T > threshold), directed=False)
    _, first = np.unique(groups, return_index=True)
    return np.sort(first)


def centroid(caption_features: Float[np.ndarray, "k d"]) -> Float[np.ndarray, " d"]:
    """Return the unit mean of the captions' directions; zeros if they cancel out or there are no captions."""
    if not len(caption_features):
        return np.zeros(caption_features.shape[1], caption_features.dtype)
    mean = unit_rows(caption_features).mean(axis=0)
    # The mean of directions that cancel out is only a rounding error.
    return unit_rows(mean) if np.linalg.norm(mean) > _MIN_NORM else np.zeros_like(mean)


def score(
    image: Float[np.ndarray, " d"],
    word_features: Float[np.ndarray, "w d"],
    caption_features: Float[np.ndarray, "k d"],
    *,
    logit_scale: float,
    alpha: float = ALPHA,
) -> Float[np.ndarray, " w"]:
    """Return the probability of each word (w,); they sum to 1.

    Without captions, or if these cancel out, it is the score of the image alone.

    Args:
        image: unit vector (d,).
        word_features: one row per candidate, w >= 1, of any length but zero.
        caption_features: of the captions that contain the words, without duplicates.
        logit_scale: of the encoder.
        alpha: the weight of the image's score, in [0, 1].
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
        word_features: one row per word, w >= 1, of any length but zero.
        centroids: the ``centroid`` of each image's captions.
        logit_scale: of the encoder.
        alpha: the weight of the image's score, in [0, 1].
    """
    words = unit_rows(word_features)
    weight = np.where(centroids.any(axis=1, keepdims=True), alpha, 1.0)
    by_image = softmax(logit_scale * images @ words.T)
    by_captions = softmax(logit_scale * centroids @ words.T)
    scores: np.ndarray = weight * by_image + (1 - weight) * by_captions
    return scores


def shared_vocabulary(candidates: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Return the distinct candidates of several images, sorted."""
    return tuple(sorted({word for words in candidates for word in words}))


@dataclass(frozen=True, slots=True)
class SharedWords:
    """The words that n images share, as indices into a vocabulary of w words.

    ``kept`` (v,) are the words in use, ascending; ``chosen`` (n,) is the word of each image; ``images`` (v,) is the
    number of images of each kept word.
    """

    kept: Int64[np.ndarray, " v"]
    chosen: Int64[np.ndarray, " n"]
    images: Int64[np.ndarray, " v"]


def choose_shared_words(probabilities: Float[np.ndarray, "n w"], *, min_images: int = 2) -> SharedWords:
    """Choose one word per image so that each chosen word has at least ``min_images`` images, or all if there are fewer.

    At first every image chooses its most probable word. Images whose word has too few images are undecided. While there
    are undecided images, the least supported of their words is removed, and its images choose the best of the remaining
    words. The least supported word has the fewest images; among those, the lowest mean log-probability over the
    undecided images; among those, the last place in the vocabulary. A word with enough images is never removed. A word
    that no image has chosen yet stays until the end, so two images with the best words "beagle" and "poodle" can both
    choose "dog", which is the first choice of neither.

    The rule needs no threshold, no number of clusters and no seed, and is repeatable. Its price is that an image that
    resembles no other image gets a word of other images, with a low probability. With ``min_images=1`` every image
    keeps its best word.

    Args:
        probabilities: of all words for all images, as ``score_many`` returns them; w >= 1.
        min_images: at least 1.

    Raises:
        ValueError: there are no words, or ``min_images`` is below 1.
    """
    images, words = probabilities.shape
    if words < 1 or min_images < 1:
        raise ValueError(f"{images} images cannot share {words} words with at least {min_images} images each")
    needed = min(min_images, images)
    remaining = np.array(probabilities, np.float64)
    logs = np.log(np.maximum(remaining, _MIN_PROBABILITY))
    chosen = remaining.argmax(axis=1)
    counts = np.bincount(chosen, minlength=words)
    undecided = counts[chosen] < needed
    support = logs[undecided].sum(axis=0)
    while undecided.any():
        weak = np.unique(chosen[undecided])
        # np.lexsort sorts by its last key first.
        worst = weak[np.lexsort((-weak, support[weak], counts[weak]))[0]]
        moving = np.flatnonzero(chosen == worst)
        remaining[:, worst] = -1
        chosen[moving] = remaining[moving].argmax(axis=1)
        counts = np.bincount(chosen, minlength=words)
        settled = undecided & (counts[chosen] >= needed)
        support = support - logs[settled].sum(axis=0)
        undecided &= ~settled
    kept = np.flatnonzero(counts)
    return SharedWords(kept=kept, chosen=chosen, images=counts[kept])
