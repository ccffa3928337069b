"""Measures of scores of several labels per image: average precision, and F1 at thresholds."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from app.errors import InvalidFieldError
from app.scoring.measures import MAX_CLASS_ROWS, fraction


@dataclass(frozen=True, slots=True)
class LabelScore:
    """One row of the table of labels: n images, of which ``support`` have the label and ``predicted`` were given it.

    ``average_precision`` is None without an image of the label. ``precision``, ``recall`` and ``f1`` are those at
    ``threshold``; a fraction whose denominator is zero is None.
    """

    name: str
    support: int
    average_precision: float | None
    threshold: float
    predicted: int
    correct: int
    precision: float | None
    recall: float | None
    f1: float | None


@dataclass(frozen=True, slots=True)
class MultiLabelEvaluation:
    """All measures of the scores of n images over c labels, and of the labels at or above a threshold.

    ``mean_average_precision`` (mAP) and ``macro_f1`` are means over the labels with images; the F1 of a label that is
    never predicted is 0. ``micro_average_precision`` and ``micro_f1`` count every pair of an image and a label alike.
    ``exact`` is the share of images with exactly their labels. ``labels`` has the ``label_count`` labels with images or
    predictions in their given order; of more than ``MAX_CLASS_ROWS``, those with the most images.
    """

    images: int
    labels_per_image: float
    mean_average_precision: float
    micro_average_precision: float
    micro_f1: float
    macro_f1: float
    exact: float
    labels: tuple[LabelScore, ...]
    label_count: int

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts, tuples, strings and numbers."""
        return asdict(self)


def evaluate_labels(
    names: Sequence[str],
    scores: Float[np.ndarray, "n c"],
    is_label: Bool[np.ndarray, "n c"],
    thresholds: Float[np.ndarray, " c"] | Float[np.ndarray, "n c"],
) -> MultiLabelEvaluation:
    """Compare scores, and the labels whose score is at least the threshold, with the true labels.

    Args:
        names: of the c labels.
        scores: higher for labels that are more likely.
        is_label: whether an image has a label.
        thresholds: of each label; for cross-validation, of each image and label. ``inf`` never predicts a label.

    Raises:
        InvalidFieldError: no image has a label.
        ValueError: the shapes differ, or a score or a threshold is not a number.
    """
    wide, limits = np.asarray(scores, np.float64), np.asarray(thresholds, np.float64)
    _check(names, wide, is_label)
    if np.isnan(limits).any():
        raise ValueError("a threshold is not a number")
    if not is_label.any():
        raise InvalidFieldError.of("labels", "no image has a label to evaluate; give at least one")
    predicted = wide >= limits
    shown = limits if limits.ndim == 1 else np.median(limits, axis=0)
    by_label = average_precision(wide, is_label)
    support, guesses, correct = is_label.sum(axis=0), predicted.sum(axis=0), (predicted & is_label).sum(axis=0)
    present = support > 0
    occurring = np.flatnonzero(support + guesses)
    largest = occurring[np.lexsort((-guesses[occurring], -support[occurring]))][:MAX_CLASS_ROWS]
    return MultiLabelEvaluation(
        images=len(wide),
        labels_per_image=float(support.sum() / len(wide)),
        mean_average_precision=float(by_label[present].mean()),
        micro_average_precision=float(average_precision(wide.reshape(-1, 1), is_label.reshape(-1, 1))[0]),
        micro_f1=float(2 * correct.sum() / (support.sum() + guesses.sum())),
        macro_f1=float(np.mean(2 * correct[present] / (support + guesses)[present])),
        exact=float((predicted == is_label).all(axis=1).mean()),
        labels=tuple(
            LabelScore(
                name=names[index],
                support=int(support[index]),
                average_precision=float(by_label[index]) if present[index] else None,
                threshold=float(shown[index]),
                predicted=int(guesses[index]),
                correct=int(correct[index]),
                precision=fraction(int(correct[index]), int(guesses[index])),
                recall=fraction(int(correct[index]), int(support[index])),
                f1=fraction(2 * int(correct[index]), int(support[index] + guesses[index])),
            )
            for index in np.sort(largest).tolist()
        ),
        label_count=len(occurring),
    )


def average_precision(scores: Float[np.ndarray, "n c"], is_label: Bool[np.ndarray, "n c"]) -> Float[np.ndarray, " c"]:
    """Return the mean over the images with a label of the precision at the score of each; NaN without such images.

    Equal scores have one precision, that of all of them together, so the order of the images does not matter. This is
    the area below the precision by recall as a step function, not interpolated (Manning et al., "Introduction to
    Information Retrieval", 2008, section 8.4).
    """
    averages = np.full(scores.shape[1], np.nan)
    for label, (column, truth) in enumerate(zip(scores.T, is_label.T, strict=True)):
        if truth.any():
            _, hits, selected = counts_above(column, truth)
            found = np.diff(hits, prepend=0)
            averages[label] = (found * hits / selected).sum() / hits[-1]
    return averages


def counts_above(
    scores: Float[np.ndarray, " n"], is_label: Bool[np.ndarray, " n"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the distinct scores, highest first, and for each the images with the label and all images at or above it.

    There must be one image at least.
    """
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    last_of_score = np.append(np.flatnonzero(np.diff(ordered)), len(scores) - 1)
    return ordered[last_of_score], np.cumsum(is_label[order])[last_of_score], last_of_score + 1


def _check(names: Sequence[str], scores: np.ndarray, is_label: np.ndarray) -> None:
    if scores.ndim != 2 or scores.shape != is_label.shape or scores.shape[1] != len(names):
        raise ValueError(f"scores of shape {scores.shape} for labels of shape {is_label.shape} and {len(names)} names")
    if not len(scores):
        raise InvalidFieldError.of("labels", "there are no labelled images to evaluate; give at least one")
    if np.isnan(scores).any():
        raise ValueError("a score is not a number")
