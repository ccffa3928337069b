"""From scores to results: probabilities, predictions, rejection and prediction sets."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from app.adapters._base import merge_rows, probabilities
from app.classification.classifiers import Classifier
from app.encoders._base import ModelInfo
from app.errors import ClientError
from app.scoring.calibration import energy, max_concept_matching, prediction_sets
from app.scoring.numerics import tempered_softmax
from app.types import (
    ImageFeatures,
    ImageResult,
    Logits,
    MergeSynonyms,
    OutOfVocabulary,
    Prediction,
    Probabilities,
    Similarities,
    Task,
)

_ONE_LABEL = ("there is only one label, so its score is 1 for every image; add labels to compare it with",)


@dataclass(frozen=True, slots=True)
class ClassScores:
    """Scores of n images over c classes; ``ranked`` (n, c) holds class indices, best first."""

    ranked: np.ndarray
    scores: Probabilities
    logits: Logits
    similarities: Similarities
    prompt_weights: np.ndarray | None
    warnings: tuple[str, ...]


def score_classes(encoder: ModelInfo, task: Task, image_features: ImageFeatures, classifier: Classifier) -> ClassScores:
    """Apply a classifier to image features (n, d)."""
    rows = classifier.predict(image_features)
    mean = task.merge_synonyms is MergeSynonyms.MEAN
    similarities, first_rows = rows.similarities, classifier.first_rows
    if classifier.names is not None and len(classifier.names.rows) != similarities.shape[1]:
        similarities, first_rows = (image_features @ classifier.names.rows.T).clip(-1, 1), classifier.names.first_rows
    logits = merge_rows(rows.logits, classifier.first_rows, mean=mean)
    # Labelled examples imply that an image belongs to one class: the scores are a softmax then, for every encoder.
    sigmoid = encoder.logit_bias is not None and not classifier.exclusive and not task.scoring.calibrated_on
    return ClassScores(
        np.argsort(-logits, axis=1, kind="stable"),
        probabilities(logits / np.float32(task.scoring.temperature), sigmoid=sigmoid),
        logits,
        merge_rows(similarities, first_rows, mean=mean),
        rows.prompt_weights,
        rows.warnings + (_ONE_LABEL if len(task.classes) == 1 and not sigmoid else ()),
    )


def image_results(task: Task, classes: ClassScores) -> list[ImageResult]:
    """Return each image's ``top_k`` predictions, best first, with rejection and prediction set where requested."""
    scoring = task.scoring
    unknown_scores = 1 - max_concept_matching(classes.similarities), energy(classes.logits)
    sets = rejected = None
    if scoring.calibrated_on:
        # In the precision of the calibration, so that a score that lies on a threshold lies on it again.
        probability = tempered_softmax(classes.logits, scoring.temperature)
        sets = None if scoring.set_quantile is None else prediction_sets(probability, scoring.set_quantile)
    else:
        probability = classes.scores
    if scoring.reject_below is not None:
        rejected = probability.max(axis=1) < scoring.reject_below
    results = []
    for number, (ranked, scores, similarities) in enumerate(
        zip(classes.ranked, classes.scores, classes.similarities, strict=True)
    ):
        best = ranked[: task.top_k]
        columns = zip(best.tolist(), scores[best].tolist(), similarities[best].tolist(), strict=True)
        results.append(
            ImageResult(
                tuple(Prediction(task.classes[index].name, score, similarity) for index, score, similarity in columns),
                out_of_vocabulary=OutOfVocabulary(*(float(scores[number]) for scores in unknown_scores)),
                rejected=None if rejected is None else bool(rejected[number]),
                prediction_set=None if sets is None else tuple(task.classes[index].name for index in sets[number]),
            )
        )
    return results


def in_order(encoded: Sequence[object], results: Sequence[ImageResult]) -> tuple[ImageResult, ...]:
    """Return one result per image: the next of ``results``, or the error of an image that could not be decoded."""
    remaining = iter(results)
    return tuple(ImageResult(error=image) if isinstance(image, ClientError) else next(remaining) for image in encoded)
