"""Labels for images from the captions near them: candidates, scores, and explanations.

Conti et al., "Vocabulary-free Image Classification", NeurIPS 2023. The parts are in ``candidates.py`` and
``scoring.py``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from app.captions.cased.candidates import candidates, phrases, suggested_by
from app.captions.cased.lexicon import Lexicon
from app.captions.cased.scoring import centroid, choose_shared_words, distinct, score, score_many
from app.captions.database import NearestCaptions
from app.types import ImageFeatures, ImageResult, NearCaption, Prediction, SharedName, TextFeatures

# Far more words than real captions share. The limit keeps long captions from occupying the text tower.
_MAX_CANDIDATES = 200
# The number of predictions for which captions are explained.
_MAX_EXPLAINED = 10


@dataclass(frozen=True, slots=True)
class CaptionCandidates:
    """The k captions near an image without near duplicates, their cosines and features, and the candidate words."""

    captions: tuple[str, ...]
    cosines: Float32[np.ndarray, " k"]
    features: TextFeatures
    candidates: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ScoreOptions:
    """The encoder's ``logit_scale``, the weight ``alpha`` of the image's score, and the limits of the result."""

    logit_scale: float
    alpha: float
    top_k: int
    reject_below: float | None


def find_candidates(found: NearestCaptions, lexicon: Lexicon, *, with_phrases: bool) -> CaptionCandidates:
    """Return the captions of a search without near duplicates, and the words that they have in common.

    Args:
        found: with features.
        lexicon: tags parts of speech and returns singulars.
        with_phrases: add noun phrases, which are not in the paper.
    """
    assert found.features is not None
    kept = distinct(found.features)
    captions = tuple(found.captions[index] for index in kept.tolist())
    words = candidates(captions, tag=lexicon.tag, singular=lexicon.singular, max_words=_MAX_CANDIDATES)
    if with_phrases:
        found_phrases = phrases(captions, tag=lexicon.tag, singular=lexicon.singular)[:_MAX_CANDIDATES]
        words = tuple(sorted({*words, *found_phrases}))
    return CaptionCandidates(captions, found.cosines[kept], found.features[kept], words)


def label_separately(
    images: ImageFeatures,
    image_candidates: Sequence[CaptionCandidates],
    word_features: Sequence[TextFeatures],
    options: ScoreOptions,
) -> list[ImageResult]:
    """Score each image against its own candidates.

    Args:
        images: unit rows (n, d).
        image_candidates: of each image.
        word_features: of each image's candidates, in their order.
        options: of the scores.
    """
    return [
        _result(
            own.candidates,
            score(image, words, own.features, logit_scale=options.logit_scale, alpha=options.alpha),
            words @ image,
            options,
        )
        for image, own, words in zip(images, image_candidates, word_features, strict=True)
    ]


def label_together(
    images: ImageFeatures,
    image_candidates: Sequence[CaptionCandidates],
    vocabulary: Sequence[str],
    word_features: TextFeatures,
    options: ScoreOptions,
    *,
    min_images: int,
) -> tuple[list[ImageResult], tuple[SharedName, ...]]:
    """Label images with few words that they share; also return these words, those of the most images first.

    The scores are probabilities over the whole vocabulary, so those of the words in use sum to less than 1. An image
    that resembles no other image gets a label of other images with a low score.

    Args:
        images: unit rows (n, d).
        image_candidates: of each image.
        vocabulary: the w candidates of all images.
        word_features: of the vocabulary, unit rows (w, d).
        options: of the scores.
        min_images: the smallest number of images of a word.
    """
    scores = score_many(
        images,
        word_features,
        np.stack([centroid(own.features) for own in image_candidates]),
        logit_scale=options.logit_scale,
        alpha=options.alpha,
    )
    shared = choose_shared_words(scores, min_images=min_images)
    labels = [vocabulary[index] for index in shared.kept.tolist()]
    kept = word_features[shared.kept]
    results = [
        _result(labels, row[shared.kept], kept @ image, options) for image, row in zip(images, scores, strict=True)
    ]
    order = np.argsort(-shared.images, kind="stable").tolist()
    return results, tuple(SharedName(labels[index], int(shared.images[index])) for index in order)


def explain_captions(result: ImageResult, found: CaptionCandidates, lexicon: Lexicon) -> tuple[NearCaption, ...]:
    """Return the captions near an image, each with those of the ten best predictions that it contains."""
    suggested: list[list[str]] = [[] for _ in found.captions]
    for prediction in result.predictions[:_MAX_EXPLAINED]:
        for index in suggested_by(prediction.label, found.captions, singular=lexicon.singular):
            suggested[index].append(prediction.label)
    cosines = found.cosines.clip(-1, 1).tolist()
    return tuple(
        NearCaption(caption, cosine, tuple(labels))
        for caption, cosine, labels in zip(found.captions, cosines, suggested, strict=True)
    )


def _result(labels: Sequence[str], scores: np.ndarray, similarities: np.ndarray, options: ScoreOptions) -> ImageResult:
    best = np.argsort(-scores, kind="stable")[: options.top_k]
    rows = zip(best.tolist(), scores[best].tolist(), similarities[best].clip(-1, 1).tolist(), strict=True)
    return ImageResult(
        tuple(Prediction(labels[index], probability, similarity) for index, probability, similarity in rows),
        rejected=None if options.reject_below is None else bool(scores[best[0]] < options.reject_below),
        rejection_score=None if options.reject_below is None else float(scores[best[0]]),
    )
