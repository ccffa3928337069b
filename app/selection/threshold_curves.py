"""Precision and recall of labels against their thresholds, on the labelled examples of a label set."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float

from app.classification.pipeline import Pipeline
from app.classification.resolve import Resolver
from app.fewshot.examples import ExampleImages
from app.scoring.measures import MAX_CLASS_ROWS
from app.scoring.multi_label_measures import average_precision, counts_above
from app.scoring.thresholds import fit_thresholds
from app.selection.selection import sampled_images
from app.types import LabelSet

MAX_POINTS = 200
"""Points of a curve; of more distinct scores, a sample."""

# Of images and labels, which take about four seconds.
_MAX_SCORES = 2**21


@dataclass(frozen=True, slots=True)
class Curve:
    """The images that k thresholds, ascending scores of images, select.

    ``predicted`` images have at least this score, and ``correct`` of them have the label. A threshold between two of
    them selects the images of the next higher one, and a threshold above the last one selects none. In a sample of many
    scores, it selects up to about 1 % of the images with the label more than that.
    """

    thresholds: tuple[float, ...]
    predicted: tuple[int, ...]
    correct: tuple[int, ...]

    @classmethod
    def of(
        cls, scores: Float[np.ndarray, " n"], is_label: Bool[np.ndarray, " n"], exact_at: Sequence[float] = ()
    ) -> "Curve":
        """Return the curve of the scores of n images; empty without images.

        A sample has the scores on both sides of the at most 3 thresholds ``exact_at``.
        """
        if not len(scores):
            return cls((), (), ())
        levels, correct, predicted = counts_above(scores, is_label)
        kept = np.arange(len(levels))
        if len(levels) > MAX_POINTS:
            around = np.searchsorted(-levels, -np.array(exact_at), side="right")
            size = MAX_POINTS // 2 - len(around)
            # Even steps of the recall, however rare the label is, and of the logarithm of the number of images.
            even = np.searchsorted(correct, np.linspace(1, correct[-1], size).round())
            doubling = np.searchsorted(predicted, np.geomspace(1, predicted[-1], size).round())
            kept = np.unique(np.concatenate([around - 1, around, even, doubling]).clip(0, len(levels) - 1))
        return cls(*(tuple(each[kept][::-1].tolist()) for each in (levels, predicted, correct)))


@dataclass(frozen=True, slots=True)
class LabelThreshold:
    """The threshold of a label, and its curve.

    ``threshold`` is in use: ``own``, that of the class, or else ``automatic``. ``suggested`` meets the goal; None if no
    threshold does, and ``reason`` says why. ``images`` have the label; without any, ``average_precision`` is None.
    """

    label: str
    images: int
    average_precision: float | None
    own: float | None
    automatic: float
    suggested: float | None
    reason: str | None
    curve: Curve

    @property
    def threshold(self) -> float:
        """The threshold in use."""
        return self.automatic if self.own is None else self.own


@dataclass(frozen=True, slots=True)
class LabelThresholds:
    """The thresholds of the labels of a label set, in their order; of more than ``MAX_CLASS_ROWS``, the most frequent.

    ``images`` of the examples were used. If ``is_calibrated``, their scores are calibrated by them, as in answers.
    """

    label_set: LabelSet
    model: str
    images: int
    is_calibrated: bool
    labels: tuple[LabelThreshold, ...]


class ThresholdCurves:
    """Measures thresholds on the labelled examples of label sets.

    Args:
        pipeline: scores their features.
        resolver: says how requests with several labels per image are answered.
        examples: of the label sets.
    """

    def __init__(self, pipeline: Pipeline, resolver: Resolver, examples: ExampleImages) -> None:
        self._pipeline = pipeline
        self._resolver = resolver
        self._examples = examples

    async def measure(
        self,
        label_set: LabelSet,
        model: str | None = None,
        *,
        precision: float | None = None,
        recall: float | None = None,
    ) -> LabelThresholds:
        """Return the thresholds that answers use, with curves and suggestions.

        Args:
            label_set: its latest version.
            model: by default the first.
            precision: goal of the suggestions, in (0, 1); excludes ``recall``. Without both, the highest F1.
            recall: goal of the suggestions, in (0, 1).

        Raises:
            UnknownNameError: no such model.
        """
        without_own = (
            entry if entry.threshold is None else replace(entry, threshold=None) for entry in label_set.classes
        )
        automatic = replace(label_set, classes=tuple(without_own))
        task = await self._resolver.resolve_label_set(automatic, model=model, multi_label=True)
        examples = await self._examples.labelled_features(label_set, task.model)
        kept = sampled_images(len(examples.features), len(label_set.classes), _MAX_SCORES)
        is_label = examples.is_label[kept]
        scores = np.zeros(is_label.shape)
        if len(kept):
            scores = (await self._pipeline.predict(task, examples.features[kept])).scores
        labels = await asyncio.to_thread(
            _labels, label_set, task.scoring.thresholds, scores, is_label, precision, recall
        )
        return LabelThresholds(label_set, task.model, len(kept), bool(task.scoring.label_scalings), labels)


def _labels(
    label_set: LabelSet,
    automatic: Sequence[float],
    scores: np.ndarray,
    is_label: np.ndarray,
    precision: float | None,
    recall: float | None,
) -> tuple[LabelThreshold, ...]:
    support = is_label.sum(axis=0)
    shown = np.sort(np.argsort(-support, kind="stable")[:MAX_CLASS_ROWS])
    scores, is_label = np.asarray(scores[:, shown], np.float64), is_label[:, shown]
    averages = average_precision(scores, is_label)
    fitted = fit_thresholds(scores, is_label, precision=precision, recall=recall)

    def curve(column: int, index: int) -> Curve:
        exact_at = label_set.classes[index].threshold, automatic[index], fitted.by_label[column]
        return Curve.of(scores[:, column], is_label[:, column], [each for each in exact_at if each is not None])

    of_model = " with features of this model" if label_set.examples_revision else ""
    no_images = None if len(scores) else f"there are no labelled example images{of_model}"
    return tuple(
        LabelThreshold(
            label=label_set.classes[index].name,
            images=int(support[index]),
            average_precision=float(averages[column]) if support[index] else None,
            own=label_set.classes[index].threshold,
            automatic=automatic[index],
            suggested=fitted.by_label[column],
            reason=no_images or fitted.reasons[column],
            curve=curve(column, index),
        )
        for column, index in enumerate(shown.tolist())
    )
