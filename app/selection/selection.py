"""Which method answers for a label set: selected by comparing the methods on its example images."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from app.adapters._examples import MIN_BALANCE, effective_classes
from app.classification.classifiers import ClassifierCache
from app.classification.method_names import DEFAULT_METHOD
from app.classification.resolve import Resolver
from app.errors import TooLargeError
from app.fewshot.examples import ExampleImages
from app.fewshot.fitting import FittedAdapter
from app.label_sets.service import LabelSets
from app.models.registry import ModelRegistry
from app.scoring.calibration import Calibration, calibrate
from app.scoring.measures import expected_calibration_error, negative_log_likelihood
from app.scoring.numerics import log_softmax
from app.scoring.thresholds import fit_scalings, fit_thresholds, logit
from app.selection.comparison import (
    SIGNIFICANT,
    Advance,
    MethodComparer,
    MethodReport,
    MethodScores,
    TrainingData,
    corrected,
    no_progress,
    points,
    report_methods,
)
from app.selection.selection_reader import evidence_of
from app.store.examples import LabelledFeatures, SelectionRepository
from app.types import LabelSet, Task

MAX_IMAGES = 5000
"""Labelled images that methods are compared on; a larger number is sampled evenly."""

PREFERRED = "gda"
"""The method that is selected if there are labelled images, and no other is clearly better."""

WITHOUT_LABELS = "tfup"
"""The method that is selected if there are only unlabelled images, and they are spread over the classes."""

# With many classes fewer images, so that the logits of all methods, images times classes, stay within some 100 MB.
_MAX_LOGITS = 2**23
_MIN_IMAGES = 500

# With fewer unlabelled images per class there is no evidence.
_MIN_POOL_PER_CLASS = 8

_NLL_DIGITS = 6

# The one-sided 5 % quantile of the normal distribution.
_STANDARD_ERRORS = 1.645

# Of the images that there are: a forecast from few images is rough.
_MAX_TIMES_IMAGES = 10


class MethodSelector:
    """Compares the methods on the examples of label sets, and stores which one is best.

    Args:
        comparer: runs the methods.
        models: in service.
        label_sets: by name.
        examples: of the label sets.
        resolver: makes tasks of label sets.
        classifiers: fits the selected method, so that the next request finds it fitted.
        repository: stores selections.
    """

    def __init__(
        self,
        comparer: MethodComparer,
        models: ModelRegistry,
        label_sets: LabelSets,
        examples: ExampleImages,
        resolver: Resolver,
        classifiers: ClassifierCache,
        repository: SelectionRepository,
    ) -> None:
        self._comparer = comparer
        self._models = models
        self._label_sets = label_sets
        self._examples = examples
        self._resolver = resolver
        self._classifiers = classifiers
        self._repository = repository

    async def select_for_every_model(self, name: str, advance: Advance = no_progress) -> dict[str, Any]:
        """Compare the methods on a label set's examples with each model, and store and fit the selected ones.

        Stored image files are encoded first by models that have not encoded them. Returns the selections by model.

        Raises:
            UnknownNameError: no such label set.
        """
        for model in self._models.names:
            await self._examples.encode_stored(name, model)
        results = {}
        for served in self._models:
            label_set = await self._label_sets.get(name)
            result, revision = await self.select(label_set, served.name, advance)
            try:
                # Its examples have one label each.
                task = await self._resolver.resolve_label_set(
                    label_set, model=served.name, method=result["method"], multi_label=False
                )
                await self._classifiers.get(task)
            except TooLargeError as error:
                reason = f"{result['reason']}, but it cannot be used: {error.message}"
                result |= {"method": DEFAULT_METHOD, "reason": reason}
            await self._repository.put(
                label_set.name, await served.image_fingerprint(), label_set.version, revision, result
            )
            results[served.name] = evidence_of(result)
        return results

    async def select(
        self, label_set: LabelSet, model: str, advance: Advance = no_progress
    ) -> tuple[dict[str, Any], int]:
        """Return what is stored as a selection, and the revision of the examples that it rests on.

        Each labelled image is predicted by adapters fitted to the others, fold by fold. ``PREFERRED`` is selected if
        its loss after calibration is lower than that of zero-shot, and another method if its loss is clearly lower
        still. The reason says how sure that is, and whether the accuracy is significantly higher: by a paired test of
        the images, corrected for the number of methods (Holm). With one image of each class, ``PREFERRED`` is selected
        unseen. With unlabelled images alone ``WITHOUT_LABELS`` is selected, if they are spread over the classes as it
        needs. Images with several classes count only for the thresholds of requests with several labels per
        image.

        Raises:
            StoreError: the examples could not be read.
        """
        stored = await self._examples.features(label_set, model)
        features, labels, pool = stored.support_features, stored.support_labels, stored.pool_features
        kept = sampled_images(len(labels), len(label_set.classes))
        task = await self._resolver.resolve_label_set(label_set, model=model, method=DEFAULT_METHOD, multi_label=False)
        result = await find_best_method(self._comparer, task, features[kept], labels[kept], pool, advance)
        examples = await self._examples.labelled_features(label_set, model)
        if not (len(labels) or len(pool)) and len(examples.features):
            problem = "have several classes each, and methods need one"
            result["reason"] = f"all {len(examples.features)} example images {problem}"
        return result | await fit_label_thresholds(self._comparer, task, examples), stored.revision


async def fit_label_thresholds(comparer: MethodComparer, task: Task, examples: LabelledFeatures) -> dict[str, Any]:
    """Return how requests with several labels per image are answered: thresholds and scalings, by label.

    The scalings calibrate the log odds of the scores (Platt), and the thresholds have the highest F1 on the examples.
    ``shared_threshold`` is for all other labels. Without labelled examples there are none.
    """
    if not len(examples.features):
        return {"thresholds": {}, "shared_threshold": None, "scalings": {}}
    kept = sampled_images(len(examples.features), len(task.classes))
    scores, _ = await comparer.label_scores(task, examples.features[kept])
    return await comparer.run(partial(_label_fit, task.classnames, scores, examples.is_label[kept]))


def _label_fit(names: Sequence[str], scores: np.ndarray, is_label: np.ndarray) -> dict[str, Any]:
    log_odds = logit(scores)
    scalings = fit_scalings(log_odds, is_label)
    calibrated = np.stack([each.probabilities(column) for each, column in zip(scalings, log_odds.T, strict=True)], 1)
    fitted = fit_thresholds(calibrated, is_label)
    by_label = zip(names, fitted.by_label, strict=True)
    return {
        "thresholds": {name: threshold for name, threshold in by_label if threshold is not None},
        "shared_threshold": fitted.shared,
        "scalings": {name: (each.slope, each.intercept) for name, each in zip(names, scalings, strict=True)},
    }


def sampled_images(images: int, classes: int, max_scores: int = _MAX_LOGITS) -> np.ndarray:
    """Return the indices of the labelled images that methods are compared on: all, or an even sample."""
    limit = min(MAX_IMAGES, max(_MIN_IMAGES, max_scores // classes))
    return np.arange(images) if images <= limit else np.linspace(0, images - 1, limit).astype(np.int64)


async def find_best_method(
    comparer: MethodComparer,
    task: Task,
    features: np.ndarray,
    labels: np.ndarray,
    pool: np.ndarray,
    advance: Advance = no_progress,
    fitted_to_pool: dict[str, FittedAdapter] | None = None,
) -> dict[str, Any]:
    """Return the method that labelled images (s, d) and unlabelled ones (u, d) favour, the reason, and all figures.

    Args:
        comparer: runs the methods.
        task: the classes and the model; its method does not matter.
        features: unit rows of the labelled images.
        labels: the class of each, by index.
        pool: unit rows of the unlabelled images.
        advance: called after each method.
        fitted_to_pool: adapters fitted to the same pool before; new ones are added.
    """
    result: dict[str, Any] = {
        "labelled": len(labels),
        "unlabelled": len(pool),
        "folds": 0,
        "leaderboard": [],
        "not_run": [],
        "calibrations": {},
    }
    training = TrainingData.held_out(features, labels, pool, fitted_to_pool)
    if training.folds is not None and len(labels) and training.folds.max() > 0:
        scores, not_run = await comparer.score_all(task, features, training, advance)
        reports, rows, calibrations, losses = await comparer.run(lambda: _leaderboard(scores, task.classnames, labels))
        method, reason = _by_loss(reports, losses)
        result |= {
            "folds": int(training.folds.max()) + 1,
            "leaderboard": rows,
            "not_run": list(not_run),
            "calibrations": calibrations,
            "rejection": (await comparer.rejection(task, scores[DEFAULT_METHOD], training)).to_json(),
        }
    elif len(labels):
        method = PREFERRED
        reason = (
            f"no class has two labelled images, so none can be held out; {PREFERRED} gives the images a small weight"
            " then, and a second image of each class would tell whether it helps"
        )
    elif len(pool):
        text = await comparer.class_rows(task)
        method, reason = await comparer.run(lambda: by_balance(pool, text))
    else:
        method, reason = DEFAULT_METHOD, "there are no example images with features of this model"
    return result | {"method": method, "reason": reason}


def by_balance(pool: np.ndarray, text: np.ndarray) -> tuple[str, str]:
    """Return the method for unlabelled images (u, d) alone, and the reason."""
    classes = len(text)
    if len(pool) < _MIN_POOL_PER_CLASS * classes:
        return DEFAULT_METHOD, (
            f"{len(pool)} unlabelled images are too few for {classes} classes;"
            f" {_MIN_POOL_PER_CLASS} per class are needed"
        )
    spread = effective_classes(pool, text)
    evidence = f"by zero-shot, {len(pool)} unlabelled images are spread over {spread:.1f} of {classes} classes"
    if spread < MIN_BALANCE * classes:
        return DEFAULT_METHOD, f"{evidence}, too unevenly to learn from"
    return WITHOUT_LABELS, f"{evidence}, and there are no labelled images to compare the methods on"


def _leaderboard(
    scores: Mapping[str, MethodScores], classnames: Sequence[str], labels: np.ndarray
) -> tuple[list[MethodReport], list[dict[str, Any]], dict[str, Any], dict[str, np.ndarray]]:
    """Return the reports, best first, a row of figures for each, and each method's calibration and losses (n,)."""
    reports = list(corrected(report_methods(scores, classnames, labels, per_class=False)))
    # Of equally accurate methods zero-shot comes first; rounding keeps methods that agree in the order of METHODS.
    reports.sort(
        key=lambda report: (
            -report.evaluation.top1,
            report.to_baseline is not None,
            round(report.evaluation.nll or 0.0, _NLL_DIGITS),
        )
    )
    calibrations = {name: calibrate(method.logits, labels) for name, method in scores.items()}
    rows = [_row(report, scores[report.method], calibrations[report.method], labels) for report in reports]
    stored = {name: calibration.to_json() for name, calibration in calibrations.items()}
    losses = {
        name: -log_softmax(method.logits / calibrations[name].temperature)[np.arange(len(labels)), labels]
        for name, method in scores.items()
    }
    return reports, rows, stored, losses


def _row(report: MethodReport, scores: MethodScores, calibration: Calibration, labels: np.ndarray) -> dict[str, Any]:
    calibrated = calibration.probabilities(scores.logits)
    return {
        "method": report.method,
        "accuracy": report.evaluation.top1,
        "interval": report.interval,
        "macro_f1": report.evaluation.macro_f1,
        "nll": report.evaluation.nll,
        "ece": report.evaluation.ece,
        "temperature": calibration.temperature,
        "calibrated_nll": negative_log_likelihood(calibrated, labels),
        "calibrated_ece": expected_calibration_error(calibrated, labels),
        "ms_per_image": round(report.ms_per_image, 4),
        "to_zero_shot": None if report.to_baseline is None else asdict(report.to_baseline),
        "warnings": list(report.warnings),
    }


def _by_loss(reports: Sequence[MethodReport], losses: Mapping[str, np.ndarray]) -> tuple[str, str]:
    """Return the method to use by its held-out loss, and the reason.

    The loss is the negative log-likelihood of the true class after calibration. It decides with fewer images than the
    accuracy, because it also counts how sure a method is. Between zero-shot and ``PREFERRED``, the lower mean loss
    decides. Another method is used if its accuracy is higher than that of zero-shot, and its loss is lower still by
    more than 1.645 standard errors of the difference, a one-sided paired z-test at 5 %: with few images, one of many
    methods has the lowest loss by chance.

    Args:
        reports: of all methods.
        losses: of each method and image (n,), at least 2.
    """
    baseline = next(report for report in reports if report.to_baseline is None)
    others = [report for report in reports if report.to_baseline is not None]
    if not others:
        return DEFAULT_METHOD, "no other method could be run"
    preferred = next((report for report in others if report.method == PREFERRED), None)
    best = preferred or baseline
    if _Gain.of(losses, best.method, baseline.method).mean <= 0:
        best = baseline
    better = [report for report in others if report.to_baseline is not None and report.to_baseline.mean > 0]
    lowest = min((*better, best), key=lambda report: float(losses[report.method].mean()))
    if _Gain.of(losses, lowest.method, best.method).is_significant:
        best = lowest
    # Without a better method, the reason is about another one that could have been selected.
    shown = best if best is not baseline else preferred or others[0]
    assert shown.to_baseline is not None
    gain = _Gain.of(losses, shown.method, baseline.method)
    evidence = (
        f"on {gain.images} labelled images, each held out in turn, the loss of {shown.method} is"
        f" {losses[shown.method].mean():.3f} and that of zero-shot {losses[baseline.method].mean():.3f}, a gain of"
        f" {gain.mean:.3f} ± {gain.error:.3f}; its accuracy is {100 * shown.evaluation.top1:.1f} % and that of"
        f" zero-shot {100 * baseline.evaluation.top1:.1f} %: {points(shown.to_baseline)}"
    )
    if best is shown and shown.to_baseline.p < SIGNIFICANT and shown.to_baseline.mean > 0:
        return best.method, f"{evidence}, which is a significant gain"
    if best is shown and gain.is_significant:
        return (
            best.method,
            f"{evidence}; the loss is significantly lower, which accuracies cannot show with so few images",
        )
    return best.method, f"{evidence}; {gain.needed}"


@dataclass(frozen=True, slots=True)
class _Gain:
    """How much lower the loss of a method is than that of another: the mean over the images, and its standard error."""

    mean: float
    error: float
    images: int

    @classmethod
    def of(cls, losses: Mapping[str, np.ndarray], method: str, other: str) -> "_Gain":
        gains = losses[other] - losses[method]
        return cls(float(gains.mean()), float(gains.std(ddof=1)) / math.sqrt(len(gains)), len(gains))

    @property
    def is_significant(self) -> bool:
        return self.mean > _STANDARD_ERRORS * self.error

    @property
    def needed(self) -> str:
        """How many images would make a mean like this one significant, as a sentence."""
        uncertain = "this is not certain"
        if not self.mean or not self.error:
            return uncertain
        wanted = math.ceil(self.images * (_STANDARD_ERRORS * self.error / self.mean) ** 2)
        if wanted > _MAX_TIMES_IMAGES * self.images:
            return f"{uncertain}, and the difference is too small for a few more images to decide"
        return f"{uncertain}; about {max(wanted - self.images, 1):,} more labelled images would decide"
