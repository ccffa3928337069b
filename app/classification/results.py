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
from app.scoring.multi_label import independent_logits, labels_above
from app.scoring.negative_labels import KNOWN_ABOVE, NoneOfThese
from app.scoring.numerics import tempered_softmax
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

# The same for every image, so that it can be shown once for all of them.
_NONE_FITS = ("probably none of the labels fits: other words are more similar to the image",)
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
        thresholds: of all classes, where images may have several.
    """

    __slots__ = ("_classes", "_ranked", "_scores", "_similarities", "_thresholds")

    def __init__(
        self,
        classes: Sequence[ClassEntry],
        ranked: np.ndarray,
        scores: np.ndarray,
        similarities: np.ndarray,
        thresholds: Sequence[float] = (),
    ) -> None:
        self._classes, self._thresholds = classes, thresholds
        self._ranked, self._scores, self._similarities = ranked, scores, similarities

    def __len__(self) -> int:
        return len(self._ranked)

    @overload
    def __getitem__(self, index: int) -> Prediction: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Prediction]: ...
    def __getitem__(self, index: int | slice) -> Prediction | Sequence[Prediction]:
        if isinstance(index, slice):
            rows = self._ranked[index], self._scores[index], self._similarities[index]
            return RankedPredictions(self._classes, *rows, self._thresholds)
        return self._prediction(int(self._ranked[index]), float(self._scores[index]), float(self._similarities[index]))

    def __iter__(self) -> Iterator[Prediction]:
        columns = self._ranked.tolist(), self._scores.tolist(), self._similarities.tolist()
        return (self._prediction(index, score, similarity) for index, score, similarity in zip(*columns, strict=True))

    def _prediction(self, index: int, score: float, similarity: float) -> Prediction:
        if not self._thresholds:
            return Prediction(self._classes[index].name, score, similarity)
        threshold = self._thresholds[index]
        return Prediction(self._classes[index].name, score, similarity, threshold, score >= threshold)

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
    shown = logits / np.float32(task.scoring.temperature)
    if classifier.word_logits is not None:
        shown = independent_logits(logits, classifier.word_logits(image_features))
    if task.scoring.label_scalings:
        slopes, intercepts = np.array(task.scoring.label_scalings, np.float32).T
        shown = slopes * shown + intercepts
    # Labelled examples imply that an image belongs to one class: the scores are a softmax then, for every encoder.
    trained = encoder.logit_bias is not None and not classifier.exclusive and not task.scoring.calibrated_on
    sigmoid = trained or task.scoring.multi_label
    return ClassScores(
        np.argsort(-(shown if task.scoring.label_scalings else logits), axis=1, kind="stable"),
        probabilities(shown, sigmoid=sigmoid),
        logits,
        merge_rows(similarities, first_rows, mean=mean),
        rows.prompt_weights,
        rows.warnings + (_ONE_LABEL if len(task.classes) == 1 and not sigmoid else ()),
        None if classifier.class_means is None else classifier.class_means(image_features).logits.max(axis=1),
        sigmoid,
        classifier.forest,
    )


def image_results(
    task: Task, classes: ClassScores, none: NoneOfThese | None = None, *, warns: bool = True
) -> list[ImageResult]:
    """Return each image's predictions, best first, with rejection and prediction set where requested.

    They are the best ``top_k``, and where images may have several labels, all that reach their threshold.

    Args:
        task: resolved.
        classes: the scores of n images.
        none: how probably they show none of the classes; None if this is unknown.
        warns: whether to warn of images that probably show none of the classes.
    """
    scoring = task.scoring
    mcm, energies = 1 - max_concept_matching(classes.similarities), energy(classes.logits)
    sets = rejection_scores = None
    if scoring.calibrated_on:
        # In the precision of the calibration, so that a score that lies on a threshold lies on it again.
        probability = tempered_softmax(classes.logits, scoring.temperature)
        sets = None if scoring.set_quantile is None else prediction_sets(probability, scoring.set_quantile)
    else:
        probability = classes.scores
    if scoring.reject_below is not None:
        rejection_scores = _rejection_scores(scoring.reject_by, probability, classes, none)
    thresholds = np.array(scoring.thresholds)
    # Where images may have several labels, the path leads to one of those that an image has.
    possible = np.where(classes.scores >= thresholds, classes.scores, 0) if scoring.multi_label else classes.scores
    paths = _paths(task, classes, possible)
    results = []
    for number, (ranked, scores, similarities) in enumerate(
        zip(classes.ranked, classes.scores, classes.similarities, strict=True)
    ):
        is_above = scores >= thresholds if scoring.multi_label else None
        best = ranked[: task.top_k] if is_above is None else _best_and_above(ranked, is_above, task.top_k)
        none_score = None if none is None else float(none.scores[number])
        weak = None if none_score is None or not warns else none_score > 1 - KNOWN_ABOVE
        rejected = None if rejection_scores is None else bool(rejection_scores[number] < scoring.reject_below)
        has_none = rejected or (is_above is not None and not is_above.any())
        results.append(
            ImageResult(
                RankedPredictions(task.classes, best.copy(), scores[best], similarities[best], scoring.thresholds),
                out_of_vocabulary=OutOfVocabulary(
                    mcm=float(mcm[number]),
                    energy=float(energies[number]),
                    score=none_score,
                    nearest=none.nearest(number, similarities.max()) if none is not None and task.explain else None,
                ),
                rejected=rejected,
                rejection_score=None if rejection_scores is None else float(rejection_scores[number]),
                prediction_set=None if sets is None else _names(task, sets[number]),
                weak_match=weak,
                labels=_names(task, labels_above(scores, thresholds)) if scoring.multi_label else None,
                warnings=_NONE_FITS if weak else (),
                path=None if paths is None else () if has_none else paths[number],
            )
        )
    return results


def _best_and_above(ranked: np.ndarray, is_above: np.ndarray, top_k: int) -> np.ndarray:
    """Return the indices of the best ``top_k`` classes and of all that reach their threshold, best first."""
    kept = is_above[ranked]
    kept[:top_k] = True
    chosen: np.ndarray = ranked[kept]
    return chosen


def _names(task: Task, indices: np.ndarray) -> tuple[str, ...]:
    return tuple(task.classes[index].name for index in indices)


def _paths(task: Task, classes: ClassScores, scores: Probabilities) -> list[tuple[PathStep, ...]] | None:
    """Return each image's labels from a root of the hierarchy to where the answer stops; None without a hierarchy."""
    forest = classes.forest
    if forest is None:
        return None
    labels = rolled_up(scores, forest.order, forest.starts, forest.ends, independent=classes.independent)
    paths = []
    for row, own in zip(labels.tolist(), scores.tolist(), strict=True):
        path = descend(row, own, forest.children, forest.roots, task.min_score or 0.0)
        paths.append(tuple(PathStep(forest.names[index], row[index]) for index in path))
    return paths


def _rejection_scores(
    by: RejectBy, probability: np.ndarray, classes: ClassScores, none: NoneOfThese | None
) -> np.ndarray | None:
    if by is RejectBy.IN_VOCABULARY:
        return None if none is None else 1 - none.scores.astype(np.float64)
    scores = {RejectBy.SCORE: probability, RejectBy.SIMILARITY: classes.similarities}
    largest: np.ndarray | None = scores[by].max(axis=1) if by in scores else classes.nearest_mean
    assert largest is not None
    return largest.astype(np.float64)


def in_order(encoded: Sequence[object], results: Sequence[ImageResult]) -> tuple[ImageResult, ...]:
    """Return one result per image: the next of ``results``, or the error of an image that could not be decoded."""
    remaining = iter(results)
    return tuple(ImageResult(error=image) if isinstance(image, ClientError) else next(remaining) for image in encoded)
