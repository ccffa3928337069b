"""From scores to results: probabilities, predictions, rejection and prediction sets."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final, overload

import numpy as np

from app.adapters._base import merge_rows, probabilities
from app.classification.classifiers import Classifier
from app.encoders._base import ModelInfo
from app.errors import ClientError
from app.names.hierarchy import Forest
from app.scoring.calibration import energy, max_concept_matching, prediction_sets
from app.scoring.hierarchy import descend, rolled_up
from app.scoring.numerics import tempered_softmax
from app.scoring.unrelated import UnrelatedSimilarity
from app.types import (
    ClassEntry,
    ImageFeatures,
    ImageResult,
    Logits,
    MergeSynonyms,
    OutOfVocabulary,
    PathStep,
    Prediction,
    Probabilities,
    RejectBy,
    Similarities,
    Task,
)

_ONE_LABEL = ("there is only one label, so its score is 1 for every image; add labels to compare it with",)


@dataclass(frozen=True, slots=True)
class ClassScores:
    """Scores of n images over c classes; ``ranked`` (n, c) holds class indices, best first.

    ``nearest_mean`` (n,) is the largest cosine with a class mean; None unless images are rejected by it.
    ``independent`` means that an image may belong to several classes. ``forest`` is the hierarchy of the classes; None
    without parents.
    """

    ranked: np.ndarray
    scores: Probabilities
    logits: Logits
    similarities: Similarities
    prompt_weights: np.ndarray | None
    warnings: tuple[str, ...]
    nearest_mean: np.ndarray | None = None
    independent: bool = False
    forest: Forest | None = None


@final
class RankedPredictions(Sequence[Prediction]):
    """The predictions of one image, each made when it is read.

    A request may have hundreds of thousands; as objects they would keep the garbage collector busy for seconds.

    Args:
        classes: of the task.
        ranked: the indices of k classes, best first.
        scores: of these classes (k,).
        similarities: of these classes (k,).
    """

    __slots__ = ("_classes", "_ranked", "_scores", "_similarities")

    def __init__(
        self, classes: Sequence[ClassEntry], ranked: np.ndarray, scores: np.ndarray, similarities: np.ndarray
    ) -> None:
        self._classes = classes
        self._ranked, self._scores, self._similarities = ranked, scores, similarities

    def __len__(self) -> int:
        return len(self._ranked)

    @overload
    def __getitem__(self, index: int) -> Prediction: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Prediction]: ...
    def __getitem__(self, index: int | slice) -> Prediction | Sequence[Prediction]:
        if isinstance(index, slice):
            return RankedPredictions(self._classes, self._ranked[index], self._scores[index], self._similarities[index])
        return Prediction(
            self._classes[self._ranked[index]].name, float(self._scores[index]), float(self._similarities[index])
        )

    def __iter__(self) -> Iterator[Prediction]:
        columns = self._ranked.tolist(), self._scores.tolist(), self._similarities.tolist()
        return (
            Prediction(self._classes[index].name, score, similarity)
            for index, score, similarity in zip(*columns, strict=True)
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))


def score_classes(encoder: ModelInfo, task: Task, image_features: ImageFeatures, classifier: Classifier) -> ClassScores:
    """Apply a classifier to image features (n, d)."""
    rows = classifier.predict(image_features)
    mean = task.merge_synonyms is MergeSynonyms.MEAN
    similarities, first_rows = rows.similarities, classifier.first_rows
    if classifier.names is not None and len(classifier.names.rows) != similarities.shape[1]:
        similarities, first_rows = (image_features @ classifier.names.rows.T).clip(-1, 1), classifier.names.first_rows
    logits = classifier.class_logits(rows.logits, task.merge_synonyms)
    if classifier.priors is not None:
        # Weights belong to calibrated logits.
        logits = logits + np.float32(task.scoring.temperature) * np.array(classifier.priors.weights, np.float32)
    # Labelled examples imply that an image belongs to one class: the scores are a softmax then, for every encoder.
    sigmoid = encoder.logit_bias is not None and not classifier.exclusive and not task.scoring.calibrated_on
    return ClassScores(
        np.argsort(-logits, axis=1, kind="stable"),
        probabilities(logits / np.float32(task.scoring.temperature), sigmoid=sigmoid),
        logits,
        merge_rows(similarities, first_rows, mean=mean),
        rows.prompt_weights,
        rows.warnings + (_ONE_LABEL if len(task.classes) == 1 and not sigmoid else ()),
        None if classifier.class_means is None else classifier.class_means(image_features).logits.max(axis=1),
        sigmoid,
        classifier.forest,
    )


def image_results(task: Task, classes: ClassScores, unrelated: UnrelatedSimilarity | None = None) -> list[ImageResult]:
    """Return each image's ``top_k`` predictions, best first, with rejection and prediction set where requested.

    Args:
        task: resolved.
        classes: the scores of n images.
        unrelated: warns of images to which no label is more similar than unrelated labels are; None warns of none.
    """
    scoring = task.scoring
    unknown_scores = 1 - max_concept_matching(classes.similarities), energy(classes.logits)
    sets = rejection_scores = None
    if scoring.calibrated_on:
        # In the precision of the calibration, so that a score that lies on a threshold lies on it again.
        probability = tempered_softmax(classes.logits, scoring.temperature)
        sets = None if scoring.set_quantile is None else prediction_sets(probability, scoring.set_quantile)
    else:
        probability = classes.scores
    if scoring.reject_below is not None:
        rejection_scores = _rejection_scores(scoring.reject_by, probability, classes)
    weak_below = None if unrelated is None else unrelated.typical_best(len(task.classes))
    is_weak = [] if weak_below is None else (classes.similarities.max(axis=1) < weak_below).tolist()
    paths = _paths(task, classes)
    results = []
    for number, (ranked, scores, similarities) in enumerate(
        zip(classes.ranked, classes.scores, classes.similarities, strict=True)
    ):
        best = ranked[: task.top_k]
        results.append(
            ImageResult(
                RankedPredictions(task.classes, best.copy(), scores[best], similarities[best]),
                out_of_vocabulary=OutOfVocabulary(*(float(scores[number]) for scores in unknown_scores)),
                rejected=None if rejection_scores is None else bool(rejection_scores[number] < scoring.reject_below),
                rejection_score=None if rejection_scores is None else float(rejection_scores[number]),
                prediction_set=None if sets is None else tuple(task.classes[index].name for index in sets[number]),
                weak_match=None if weak_below is None else is_weak[number],
                warnings=(_weak_match(weak_below),) if weak_below is not None and is_weak[number] else (),
                path=None if paths is None else paths[number],
            )
        )
    return results


def _paths(task: Task, classes: ClassScores) -> list[tuple[PathStep, ...]] | None:
    """Return each image's labels from a root of the hierarchy to where the answer stops; None without a hierarchy."""
    forest = classes.forest
    if forest is None:
        return None
    labels = rolled_up(classes.scores, forest.order, forest.starts, forest.ends, independent=classes.independent)
    paths = []
    for row, own in zip(labels.tolist(), classes.scores.tolist(), strict=True):
        path = descend(row, own, forest.children, forest.roots, task.min_score or 0.0)
        paths.append(tuple(PathStep(forest.names[index], row[index]) for index in path))
    return paths


def _weak_match(usual: float) -> str:
    return (
        "probably none of the labels fits: the image is less similar to the best of them than to the best of unrelated"
        f" words ({usual:.2f})"
    )


def _rejection_scores(by: RejectBy, probability: np.ndarray, classes: ClassScores) -> np.ndarray:
    scores = {RejectBy.SCORE: probability, RejectBy.SIMILARITY: classes.similarities}
    largest: np.ndarray | None = scores[by].max(axis=1) if by in scores else classes.nearest_mean
    assert largest is not None
    return largest.astype(np.float64)


def in_order(encoded: Sequence[object], results: Sequence[ImageResult]) -> tuple[ImageResult, ...]:
    """Return one result per image: the next of ``results``, or the error of an image that could not be decoded."""
    remaining = iter(results)
    return tuple(ImageResult(error=image) if isinstance(image, ClientError) else next(remaining) for image in encoded)
