"""Thresholds per label, and calibrated probabilities per label, from labelled images that may have several labels.

The scores must be those of images that the method has not learned from. A label is predicted if its score is at least
the threshold.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil, inf, nextafter
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from app.runtime.turns import give_way
from app.scoring.calibration import rejection_threshold
from app.scoring.multi_label_measures import counts_above

SHARED_IMAGES = 10.0
"""The weight of all labels in the threshold of one: as if that many images with the label were like those of all."""

MIN_IMAGES_OF_SCALING = 10
"""Images with a label, and without it, that a Platt scaling of its own needs; others share one."""

_MAX_LOG_ODDS = 16.0


@dataclass(frozen=True, slots=True)
class Thresholds:
    """A threshold for each of c labels; None for a label with too few images, and then ``reasons`` says why.

    ``shared`` is the one threshold for all labels that fits the same images best; None without any image of a label.
    """

    by_label: tuple[float | None, ...]
    reasons: tuple[str | None, ...]
    shared: float | None

    def filled(self, default: float | Sequence[float] | np.ndarray) -> Float[np.ndarray, " c"]:
        """Return the threshold of each label: its own, else the shared one, else the default."""
        others = np.broadcast_to(np.asarray(default, np.float64), len(self.by_label)) if self.shared is None else None
        return np.array(
            [
                own if own is not None else self.shared if others is None else others[label]
                for label, own in enumerate(self.by_label)
            ],
            np.float64,
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain lists, strings and numbers."""
        return asdict(self)


def fit_thresholds(
    scores: Float[np.ndarray, "n c"],
    is_label: Bool[np.ndarray, "n c"],
    *,
    precision: float | None = None,
    recall: float | None = None,
    shared_images: float = SHARED_IMAGES,
) -> Thresholds:
    """Return the threshold of each label with the highest F1, or with a wanted precision or recall.

    - F1: the threshold with the highest F1 on these images. On few images it would follow chance (Lipton et al.,
      "Optimal Thresholding of Classifiers to Maximize F1 Measure", ECML 2014). So ``shared_images`` images are added
      to those of the label, which have the scores of the images of all labels. A label without an image has no
      threshold of its own and takes the shared one, which has the highest micro F1; so does a label whose images have
      one score, if that is better. (With the shared one as a candidate for all labels, the macro F1 of new images was
      lower, by 0.013 with 20 composites of photographs.) On new images the F1 is lower than on these; there is no
      guarantee.
    - ``precision``: the lowest threshold at or above which the share of images with the label is at least that, if one
      more image without it is counted. So 0.9 needs 9 images with the label above every image without it. It is not a
      guarantee, because the lowest of many thresholds is chosen on the same images: in simulations with 100 images,
      30 % of them with the label, a target of 0.9 gave new images a precision of 0.90 on average, and less than 0.9 in
      39 % of the draws that had a threshold; with 40 images, 0.85 on average.
    - ``recall``: the largest threshold that new images of the label reach with at least that probability, on average
      over draws of the images: ``rejection_threshold``, which is exact for any number of images and any distribution.
      So 0.9 needs 9 images with the label.

    Each lies in the middle between two scores of images, or between the lowest one and 0, if that is positive.

    Args:
        scores: higher for labels that are more likely.
        is_label: whether an image has a label.
        precision: in (0, 1); excludes ``recall``.
        recall: in (0, 1).
        shared_images: for the highest F1; 0 fits each label alone.

    Raises:
        ValueError: the shapes differ, a score is not a number, or a target is outside (0, 1).
    """
    wide = np.asarray(scores, np.float64)
    if wide.ndim != 2 or wide.shape != is_label.shape or np.isnan(wide).any():
        raise ValueError(f"scores of shape {wide.shape} for labels of shape {is_label.shape}, or a score is NaN")
    for target in (precision, recall):
        if target is not None and not 0 < target < 1:
            raise ValueError(f"a target of {target}; it must be above 0 and below 1")
    if precision is not None and recall is not None:
        raise ValueError("give either a precision or a recall")
    every = wide.reshape(-1), is_label.reshape(-1)

    def fit(column: np.ndarray, truth: np.ndarray, shared: "_Shared | None" = None) -> tuple[float | None, str | None]:
        give_way()
        if precision is not None:
            return _at_precision(column, truth, precision)
        if recall is not None:
            return _at_recall(column, truth, recall)
        return _at_best_f1(column, truth, shared)

    threshold, _ = fit(*every)
    shared = None if threshold is None else _Shared(threshold, _Counts.of(*every).weighing(shared_images))
    fitted = [fit(column, truth, shared) for column, truth in zip(wide.T, is_label.T, strict=True)]
    return Thresholds(tuple(value for value, _ in fitted), tuple(reason for _, reason in fitted), threshold)


def held_out_thresholds(
    scores: Float[np.ndarray, "n c"],
    is_label: Bool[np.ndarray, "n c"],
    folds: Int[np.ndarray, " n"],
    default: float | Sequence[float] | np.ndarray,
    *,
    per_label: bool = True,
) -> Float[np.ndarray, "n c"]:
    """Return the thresholds of each image, with the highest F1 on the images of the other folds.

    Args:
        scores: as in ``fit_thresholds``.
        is_label: as in ``fit_thresholds``.
        folds: a number for each image.
        default: the threshold of each label that the other folds have no image to fit.
        per_label: False takes the shared threshold for all labels.
    """
    thresholds = np.empty(scores.shape, np.float64)
    for fold in np.unique(folds):
        other = folds != fold
        fitted = fit_thresholds(scores[other], is_label[other])
        if not per_label:
            fitted = Thresholds((None,) * scores.shape[1], fitted.reasons, fitted.shared)
        thresholds[~other] = fitted.filled(default)
    return thresholds


def folds_by_labels(is_label: Bool[np.ndarray, "n c"], max_folds: int) -> Int[np.ndarray, " n"]:
    """Return a fold for each image, so that every fold has about as many images of each label.

    An image joins the fold with the fewest images of its rarest label; of equal folds, the one with the fewest images.
    Images of rare labels are dealt first (Sechidis et al., "On the Stratification of Multi-Label Data", ECML 2011,
    which deals label by label).
    """
    counts = is_label.sum(axis=0)
    rarest = np.where(is_label, counts, len(is_label) + 1).argmin(axis=1)
    order = np.lexsort((rarest, np.where(is_label.any(axis=1), counts[rarest], len(is_label) + 1)))
    folds, of_fold = np.zeros(len(is_label), np.int64), np.zeros((max_folds, is_label.shape[1]), np.int64)
    sizes = np.zeros(max_folds, np.int64)
    for image in order.tolist():
        give_way()
        crowded = of_fold[:, rarest[image]] if is_label[image].any() else sizes
        fold = int(np.lexsort((sizes, crowded))[0])
        folds[image] = fold
        of_fold[fold] += is_label[image]
        sizes[fold] += 1
    return folds


@dataclass(frozen=True, slots=True)
class PlattScaling:
    """Probabilities ``sigmoid(slope * score + intercept)`` of a label."""

    slope: float
    intercept: float

    def probabilities(self, scores: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Return the probabilities in [0, 1]."""
        return _sigmoid(self.slope * np.asarray(scores, np.float64) + self.intercept)


def fit_platt(scores: Float[np.ndarray, " n"], is_label: Bool[np.ndarray, " n"]) -> PlattScaling:
    """Return the slope and intercept with the smallest log loss; n is at least 1.

    Platt, "Probabilistic Outputs for Support Vector Machines", 1999: the targets are ``(p + 1) / (p + 2)`` for the p
    images with the label and ``1 / (q + 2)`` for the q others, so that few images that are separated have finite
    scores. Solved by Newton's method with halved steps (Lin, Lin and Weng, Machine Learning, 2007). Deviation: the
    scores are standardised first, and the slope is not negative: a label that the scores do not find gets one
    probability for all images.
    """
    wide = np.asarray(scores, np.float64)
    centre, spread = float(wide.mean()), float(wide.std())
    standard = (wide - centre) / spread if spread > 0 else np.zeros_like(wide)
    positives = int(is_label.sum())
    targets = np.where(is_label, (positives + 1) / (positives + 2), 1 / (len(wide) - positives + 2))
    mean = float(targets.mean())
    constant = float(np.log(mean / (1 - mean)))
    slope, intercept = 0.0, constant
    for _ in range(100):
        give_way()
        chances = _sigmoid(slope * standard + intercept)
        errors, weights = chances - targets, chances * (1 - chances)
        gradient = np.array([(errors * standard).sum(), errors.sum()])
        if np.abs(gradient).max() < 1e-8 * len(wide):
            break
        mixed = (weights * standard).sum()
        hessian = np.array([[(weights * standard**2).sum() + 1e-12, mixed], [mixed, weights.sum() + 1e-12]])
        step, scale = np.linalg.solve(hessian, gradient), 1.0
        loss = _log_loss(slope * standard + intercept, targets)
        while scale > 1e-6:
            moved = slope - scale * step[0], intercept - scale * step[1]
            if _log_loss(moved[0] * standard + moved[1], targets) < loss:
                break
            scale /= 2
        else:
            break
        slope, intercept = float(moved[0]), float(moved[1])
    if slope <= 0 or spread == 0:
        return PlattScaling(0.0, constant)
    return PlattScaling(slope / spread, intercept - slope * centre / spread)


def logit(probabilities: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """Return the log odds, between -16 and 16, where probabilities in single precision become 0 and 1."""
    smallest = np.exp(-_MAX_LOG_ODDS)
    wide = np.asarray(probabilities, np.float64).clip(smallest, 1 - smallest)
    odds: np.ndarray = np.log(wide) - np.log1p(-wide)
    return odds


def fit_scalings(scores: Float[np.ndarray, "n c"], is_label: Bool[np.ndarray, "n c"]) -> tuple[PlattScaling, ...]:
    """Return the scaling of each label; those of few images share one that is fitted to all labels.

    On composites of photographs, the log loss of new images was lower with a scaling per label than with a shared one
    from 10 images of each label on, and higher with 5.
    """
    shared = fit_platt(scores.reshape(-1), is_label.reshape(-1))
    counts = is_label.sum(axis=0)
    enough = np.minimum(counts, len(scores) - counts) >= MIN_IMAGES_OF_SCALING
    return tuple(
        fit_platt(column, truth) if own else shared
        for column, truth, own in zip(scores.T, is_label.T, enough, strict=True)
    )


def _log_loss(logits: np.ndarray, targets: np.ndarray) -> float:
    return float((np.logaddexp(0, logits) - targets * logits).sum())


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    chances: np.ndarray = np.exp(-np.logaddexp(0, -logits))
    return chances


@dataclass(frozen=True, slots=True, eq=False)
class _Counts:
    """Images with a label, and all images, at or above each of k ascending scores; a weight may make them fractions.

    ``hits`` and ``selected`` have k + 1 items: none are above the last score.
    """

    levels: np.ndarray
    hits: np.ndarray
    selected: np.ndarray
    positives: float

    @classmethod
    def of(cls, scores: np.ndarray, is_label: np.ndarray) -> "_Counts":
        levels, hits, selected = counts_above(scores, is_label) if len(scores) else (np.zeros(0),) * 3
        return cls(levels[::-1], np.append(hits[::-1], 0), np.append(selected[::-1], 0), float(is_label.sum()))

    def weighing(self, images: float) -> "_Counts":
        """Return the counts as if the given number of images had the label."""
        factor = images / self.positives
        return _Counts(self.levels, factor * self.hits, factor * self.selected, factor * self.positives)

    def at(self, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the hits and the selected images at or above any thresholds (t,)."""
        places = np.searchsorted(self.levels, thresholds)
        return self.hits[places], self.selected[places]


@dataclass(frozen=True, slots=True, eq=False)
class _Shared:
    """The threshold of all labels, and their images as those of one label."""

    threshold: float
    images: _Counts


def _at_best_f1(scores: np.ndarray, is_label: np.ndarray, shared: _Shared | None) -> tuple[float | None, str | None]:
    if not is_label.any():
        return None, f"none of the {len(scores)} images has the label; it takes the threshold that all labels share"
    counts = _Counts.of(scores, is_label)
    thresholds, positives = _halfway_down(counts.levels), counts.positives
    if shared is not None and len(thresholds) == 1:  # one that selects every image
        thresholds = np.append(thresholds, shared.threshold)
    hits, selected = counts.at(thresholds)
    if shared is not None:
        more_hits, more_selected = shared.images.at(thresholds)
        hits, selected, positives = hits + more_hits, selected + more_selected, positives + shared.images.positives
    return float(thresholds[int(np.argmax(hits / (positives + selected)))]), None


def _at_precision(scores: np.ndarray, is_label: np.ndarray, precision: float) -> tuple[float | None, str | None]:
    if not len(scores):
        return None, "there are no images"
    levels, hits, selected = counts_above(scores, is_label)
    enough = np.flatnonzero(hits / (selected + 1) >= precision)
    if not len(enough):
        needed = ceil(precision / (1 - precision) - 1e-9)
        return None, (
            f"no threshold has a precision of {precision:g} with one more error counted; this needs at least {needed}"
            f" images with the label whose score no image without it reaches, and {int(is_label.sum())} have the label"
        )
    return float(_halfway_down(levels[::-1])[::-1][enough[-1]]), None


def _at_recall(scores: np.ndarray, is_label: np.ndarray, recall: float) -> tuple[float | None, str | None]:
    positives = scores[is_label]
    rate = min(1 - recall, nextafter(1, 0))  # the difference rounds to 1 for a tiny recall
    threshold = rejection_threshold(positives, rate) if len(positives) else -inf
    if threshold == -inf:
        needed = ceil(1 / (1 - recall) - 1e-9) - 1
        return None, f"{len(positives)} images have the label; a recall of {recall:g} needs at least {needed}"
    levels = np.unique(scores)
    return float(_halfway_down(levels)[np.searchsorted(levels, threshold)]), None


def _halfway_down(levels: np.ndarray) -> np.ndarray:
    """Return thresholds that select the images at or above each of the ascending scores of images.

    They lie in the middle between a score and the next lower one, and the first between the lowest score and 0: in an
    answer, the score of the same image may be slightly lower, because it is in single precision, and the features of
    example images are stored in half precision.
    """
    lower = np.append(min(0.0, levels[0]), levels[:-1])
    middles = lower / 2 + levels / 2
    return np.where((middles > lower) & np.isfinite(middles), middles, levels)
