"""From captions near images to names for the images: candidates, scores, and what is told of both.

Conti et al., "Vocabulary-free Image Classification", NeurIPS 2023; the parts of it are in ``words.py`` and
``cased.py``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from app.captions.cased.candidates import candidates, phrases, suggested_by
from app.captions.cased.lexicon import Lexicon
from app.captions.cased.scoring import centroid, distinct, name_together, score, score_many
from app.captions.database import Found
from app.types import ImageFeatures, ImageResult, NearCaption, Prediction, SharedName, TextFeatures

# Of one image, so that long captions do not keep the text tower for themselves: far more than real captions share.
_MOST_CANDIDATES = 200
# Predictions of which is told what suggested them.
_EXPLAINED = 10


@dataclass(frozen=True, slots=True)
class CaptionCandidates:
    """The captions near an image, near duplicates left out: k, their cosines and features, and words of them."""

    captions: tuple[str, ...]
    cosines: Float32[np.ndarray, " k"]
    features: TextFeatures
    candidates: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Scale:
    """How scores are made: the encoder's ``logit_scale``, the image's share ``alpha``, and how many are told."""

    logit_scale: float
    alpha: float
    top_k: int
    reject_below: float | None


def mine(found: Found, lexicon: Lexicon, *, with_phrases: bool) -> CaptionCandidates:
    """Return the captions of a search without near duplicates, and the candidates that they have in common.

    Args:
        found: with features.
        lexicon: knows parts of speech and singular forms.
        with_phrases: also take noun phrases, which the paper does not.
    """
    assert found.features is not None
    kept = distinct(found.features)
    captions = tuple(found.captions[index] for index in kept.tolist())
    words = candidates(captions, tag=lexicon.tag, singular=lexicon.singular, most=_MOST_CANDIDATES)
    if with_phrases:
        found_phrases = phrases(captions, tag=lexicon.tag, singular=lexicon.singular)[:_MOST_CANDIDATES]
        words = tuple(sorted({*words, *found_phrases}))
    return CaptionCandidates(captions, found.cosines[kept], found.features[kept], words)


def name_each(
    images: ImageFeatures,
    mined: Sequence[CaptionCandidates],
    word_features: Sequence[TextFeatures],
    scale: Scale,
) -> list[ImageResult]:
    """Score each image against its own candidates.

    Args:
        images: unit rows (n, d).
        mined: of each image.
        word_features: of each image's candidates, in their order.
        scale: of the scores.
    """
    return [
        _result(
            each.candidates,
            score(image, words, each.features, logit_scale=scale.logit_scale, alpha=scale.alpha),
            words @ image,
            scale,
        )
        for image, each, words in zip(images, mined, word_features, strict=True)
    ]


def name_all(
    images: ImageFeatures,
    mined: Sequence[CaptionCandidates],
    vocabulary: Sequence[str],
    word_features: TextFeatures,
    scale: Scale,
    *,
    min_images: int,
) -> tuple[list[ImageResult], tuple[SharedName, ...]]:
    """Name images by few words that they share; also return these, those of the most images first.

    Args:
        images: unit rows (n, d).
        mined: of each image.
        vocabulary: the candidates of all of them, w.
        word_features: of the vocabulary, unit rows (w, d).
        scale: of the scores. They are shares of the whole vocabulary, so that those of the names in use add up to less
            than 1: an image that resembles none of the others gets a name of theirs with a low score.
        min_images: images that a name is the best of, at least.
    """
    scores = score_many(
        images,
        word_features,
        np.stack([centroid(each.features) for each in mined]),
        logit_scale=scale.logit_scale,
        alpha=scale.alpha,
    )
    names = name_together(scores, min_images=min_images)
    labels = [vocabulary[index] for index in names.kept.tolist()]
    kept = word_features[names.kept]
    results = [_result(labels, row[names.kept], kept @ image, scale) for image, row in zip(images, scores, strict=True)]
    order = np.argsort(-names.images, kind="stable").tolist()
    return results, tuple(SharedName(labels[index], int(names.images[index])) for index in order)


def told_captions(result: ImageResult, mined: CaptionCandidates, lexicon: Lexicon) -> tuple[NearCaption, ...]:
    """Return the captions near an image, and which of its ten best predictions each of them suggested."""
    suggested: list[list[str]] = [[] for _ in mined.captions]
    for prediction in result.predictions[:_EXPLAINED]:
        for index in suggested_by(prediction.label, mined.captions, singular=lexicon.singular):
            suggested[index].append(prediction.label)
    return tuple(
        NearCaption(caption, cosine, tuple(labels))
        for caption, cosine, labels in zip(mined.captions, mined.cosines.clip(-1, 1).tolist(), suggested, strict=True)
    )


def _result(labels: Sequence[str], scores: np.ndarray, similarities: np.ndarray, scale: Scale) -> ImageResult:
    best = np.argsort(-scores, kind="stable")[: scale.top_k]
    told = zip(best.tolist(), scores[best].tolist(), similarities[best].clip(-1, 1).tolist(), strict=True)
    return ImageResult(
        tuple(Prediction(labels[index], each, similarity) for index, each, similarity in told),
        rejected=None if scale.reject_below is None else bool(scores[best[0]] < scale.reject_below),
    )
