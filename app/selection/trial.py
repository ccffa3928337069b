"""Tries every method on the example images of a label set, and chooses by evidence."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from app.adapters._examples import LEAST_BALANCE, effective_classes
from app.classification.service import DEFAULT_METHOD, ClassifyRequest, Service
from app.errors import TooLargeError
from app.fewshot.fitting import FittedAdapter
from app.scoring.calibration import calibrate
from app.scoring.measures import (
    Difference,
    bootstrap_interval,
    expected_calibration_error,
    holm,
    macro_f1,
    negative_log_likelihood,
    paired_difference,
)
from app.selection.comparison import SIGNIFICANT, Answers, TrainingData, answer_all, no_progress, points
from app.types import LabelSet

MAX_TRIED = 5000
"""Labelled images that methods are tried on; of more, so many are taken evenly."""

# With many classes fewer, so that the logits of every method, images times classes, take some hundred megabytes in all.
_LARGEST_TRIAL = 2**23
_FEWEST_TRIED = 500

WITHOUT_LABELS = "zlap"
"""The method that is taken where there are only unlabelled images, if they are spread over the classes."""

# Unlabelled images per class below which they are no evidence of anything.
_FEWEST_PER_CLASS = 8


async def try_for_every_model(
    service: Service, name: str, advance: Callable[[int, int], Awaitable[object]] = no_progress
) -> dict[str, Any]:
    """Try the methods on a label set's examples with each model that is served, keep what is chosen, and have it learn.

    Kept files are encoded first where a model has not seen them. Returns what was found, by model.

    Raises:
        UnknownNameError: there is no such label set.
    """
    for model in service.pipeline.models:
        await service.examples.encode_kept(name, model)
    results = {}
    for model, served in service.pipeline.models.items():
        label_set = await service.label_sets.get(name)
        result, revision = await try_methods(service, label_set, model, advance)
        try:
            # So that the next request finds it learned, if it can be.
            await service.pipeline.classifier(
                await service.plan(ClassifyRequest.about(label_set, model=model, method=result["method"]))
            )
        except TooLargeError as error:
            reason = f"{result['reason']}, but it cannot be used: {error.message}"
            result |= {"method": DEFAULT_METHOD, "reason": reason}
        await service.choices.repository.put(
            label_set.name, await served.image_fingerprint(), label_set.version, revision, result
        )
        results[model] = {key: value for key, value in result.items() if key != "calibrations"}
    return results


async def try_methods(
    service: Service, label_set: LabelSet, model: str, advance: Callable[[int, int], Awaitable[object]]
) -> tuple[dict[str, Any], int]:
    """Return what is stored as a selection, and the revision of the examples that it rests on.

    Labelled images are answered by what was learned from the others, fold by fold. The method of the highest accuracy
    is chosen if it is better than zero-shot beyond chance: by a paired test of the images, corrected for the number of
    methods (Holm). With unlabelled images alone ``WITHOUT_LABELS`` is, if they are spread over the classes as it needs.

    Raises:
        StoreError: the examples could not be read.
    """
    stored = await service.examples.features(label_set, model)
    features, labels, pool = stored.support_features, stored.support_labels, stored.pool_features
    kept = tried_images(len(labels), len(label_set.classes))
    features, labels = features[kept], labels[kept]
    question = ClassifyRequest.about(label_set, model=model)
    return await choose(service, question, features, labels, pool, advance), stored.revision


def tried_images(images: int, classes: int) -> np.ndarray:
    """Return the places of the labelled images that methods are tried on: all, or as many as may be, evenly."""
    most = min(MAX_TRIED, max(_FEWEST_TRIED, _LARGEST_TRIAL // classes))
    return np.arange(images) if images <= most else np.linspace(0, images - 1, most).astype(np.int64)


async def choose(
    service: Service,
    question: ClassifyRequest,
    features: np.ndarray,
    labels: np.ndarray,
    pool: np.ndarray,
    advance: Callable[[int, int], Awaitable[object]] = no_progress,
    of_pool: dict[str, FittedAdapter] | None = None,
) -> dict[str, Any]:
    """Return the method that labelled images (s, d) and unlabelled ones (u, d) are evidence for, why, and all figures.

    Args:
        service: to plan and classify with.
        question: the classes and the model; its method does not count.
        features: unit rows of the labelled images.
        labels: the class of each, by index.
        pool: unit rows of the unlabelled images.
        advance: called after each method.
        of_pool: what was learned of the same pool before, and where it is kept for the next time.
    """
    told: dict[str, Any] = {
        "labelled": len(labels),
        "unlabelled": len(pool),
        "folds": 0,
        "leaderboard": [],
        "not_run": [],
        "calibrations": {},
    }
    lessons = TrainingData.held_out(features, labels, pool, of_pool)
    if lessons.folds is not None and len(labels) and lessons.folds.max() > 0:
        answers, not_run, task = await answer_all(service, question, features, lessons, advance)
        rows, calibrations = await service.pipeline.learner.run(
            lambda: _leaderboard(answers, labels, len(task.classes))
        )
        method, reason = _by_accuracy(rows, len(labels))
        told |= {
            "folds": int(lessons.folds.max()) + 1,
            "leaderboard": rows,
            "not_run": list(not_run),
            "calibrations": calibrations,
        }
    elif len(labels):
        method, reason = DEFAULT_METHOD, "no class has two labelled images, so that none can be held out"
    elif len(pool):
        task = await service.plan(replace(question, method=DEFAULT_METHOD))
        text = await service.pipeline.class_rows(task)
        method, reason = await service.pipeline.learner.run(lambda: by_balance(pool, text))
    else:
        method, reason = DEFAULT_METHOD, "there are no example images that have features of this model"
    return told | {"method": method, "reason": reason}


def by_balance(pool: np.ndarray, text: np.ndarray) -> tuple[str, str]:
    """Return the method for unlabelled images (u, d) alone, and why."""
    classes = len(text)
    if len(pool) < _FEWEST_PER_CLASS * classes:
        return DEFAULT_METHOD, (
            f"{len(pool)} unlabelled images are too few for {classes} classes; {_FEWEST_PER_CLASS} for each would do"
        )
    spread = effective_classes(pool, text)
    told = f"by zero-shot, {len(pool)} unlabelled images are spread over {spread:.1f} of {classes} classes"
    if spread < LEAST_BALANCE * classes:
        return DEFAULT_METHOD, f"{told}, which is too uneven to learn from"
    return WITHOUT_LABELS, f"{told}, and no labelled ones tell the methods apart"


def _leaderboard(
    answers: Mapping[str, Answers], labels: np.ndarray, classes: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return a row per method, the best first, and each method's calibration."""
    best = {name: each.best[:, 0] for name, each in answers.items()}
    correct = {name: (each == labels).astype(np.float64) for name, each in best.items()}
    differences = {
        name: paired_difference(correct[name], correct[DEFAULT_METHOD]) for name in answers if name != DEFAULT_METHOD
    }
    # A method that is right on the same images as zero-shot is no rival, and no comparison to correct for.
    rivals = [name for name in differences if (correct[name] != correct[DEFAULT_METHOD]).any()]
    p_values = dict(zip(rivals, holm([differences[name].p for name in rivals]), strict=True))
    corrected = {name: replace(each, p=p_values.get(name, 1.0)) for name, each in differences.items()}
    calibrations = {name: calibrate(each.logits, labels) for name, each in answers.items()}
    rows: list[dict[str, Any]] = [
        {
            "method": name,
            "accuracy": float(correct[name].mean()),
            "interval": bootstrap_interval(correct[name]),
            "macro_f1": macro_f1(labels, best[name], classes),
            "nll": negative_log_likelihood(each.scores, labels),
            "ece": expected_calibration_error(each.scores, labels),
            "temperature": calibrations[name].temperature,
            "calibrated_nll": negative_log_likelihood(calibrations[name].probabilities(each.logits), labels),
            "calibrated_ece": expected_calibration_error(calibrations[name].probabilities(each.logits), labels),
            "ms_per_image": round(each.ms_per_image, 4),
            "to_zero_shot": asdict(corrected[name]) if name in corrected else None,
            "warnings": list(each.warnings),
        }
        for name, each in answers.items()
    ]
    # Among equals the simplest comes first.
    rows.sort(key=lambda row: (-row["accuracy"], row["to_zero_shot"] is not None, row["nll"]))
    return rows, {name: each.to_json() for name, each in calibrations.items()}


def _by_accuracy(rows: list[dict[str, Any]], images: int) -> tuple[str, str]:
    """Return the best method if it is better than zero-shot beyond chance, else that, and why."""
    candidates = [row for row in rows if row["to_zero_shot"] is not None]
    baseline = next(row for row in rows if row["to_zero_shot"] is None)
    if not candidates:
        return DEFAULT_METHOD, "no other method could be tried"
    best = candidates[0]
    difference = Difference(**best["to_zero_shot"])
    told = (
        f"on {images} labelled images, each held out in turn, {best['method']} is right on"
        f" {100 * best['accuracy']:.1f} % and zero-shot on {100 * baseline['accuracy']:.1f} %: {points(difference)}"
    )
    if difference.mean > 0 and difference.p < SIGNIFICANT:
        return best["method"], told
    return DEFAULT_METHOD, f"{told}, which is no gain beyond chance"
