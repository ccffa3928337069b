"""Learning curve: the accuracy of every method against the number of labelled images per class."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from app.adapters._base import Examples
from app.adapters._examples import Need
from app.classification.method_names import AUTO, DEFAULT_METHOD
from app.classification.methods import METHODS
from app.errors import InvalidFieldError
from app.fewshot.fitting import FittedAdapter
from app.scoring.measures import bootstrap_interval, paired_difference
from app.selection.comparison import SIGNIFICANT, Advance, MethodComparer, TrainingData, no_progress
from app.selection.selection import find_best_method
from app.types import ImageFeatures, Task


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One method with one number of labelled images per class; ``shots`` is None if it uses none.

    ``accuracies`` has one entry per draw. ``chosen`` are the methods that ``auto`` selected in the draws, and ``worse``
    counts the draws in which its choice was significantly below zero-shot.
    """

    method: str
    shots: int | None
    accuracies: tuple[float, ...]
    chosen: tuple[str, ...] = ()
    worse: int = 0

    @property
    def mean(self) -> float:
        """Mean accuracy over the draws."""
        return float(np.mean(self.accuracies))

    @property
    def deviation(self) -> float:
        """Standard deviation over the draws, 0 for a single one."""
        return float(np.std(self.accuracies, ddof=1)) if len(self.accuracies) > 1 else 0.0


@dataclass(frozen=True, slots=True)
class LearningCurve:
    """Every point, measured on n images; ``interval`` is the 95 % bootstrap interval of the accuracy of zero-shot."""

    images: int
    labelled: int
    unlabelled: int
    model: str
    points: tuple[CurvePoint, ...]
    interval: tuple[float, float]
    not_run: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts, tuples, strings and numbers."""
        return asdict(self)


async def learning_curve(
    comparer: MethodComparer,
    task: Task,
    test: tuple[ImageFeatures, Sequence[int]],
    support: tuple[ImageFeatures, Sequence[int]],
    pool_features: ImageFeatures,
    *,
    shots: Sequence[int],
    draws: int,
    advance: Advance = no_progress,
) -> LearningCurve:
    """Measure the accuracy of every method after fitting it to several draws of labelled images.

    ``auto`` sees only the draw and the pool, as it does in the service. A class with fewer images than shots
    contributes all of them. The draws depend only on the number of images.

    Args:
        comparer: runs the methods.
        task: the classes, model and templates.
        test: unit rows (n, d) and the class of each.
        support: unit rows (s, d) and the class of each, to draw from; may be empty if there is a pool.
        pool_features: unit rows (u, d) of unlabelled images; may be empty.
        shots: images per class, each at least 1.
        draws: of each number of shots, at least 1.
        advance: called after each draw.

    Raises:
        InvalidFieldError: nothing to learn from, or a number below 1.
    """
    features, truth = test[0], np.asarray(test[1], np.int64)
    support_features, support_labels = support[0], np.asarray(support[1], np.int64)
    if not (len(support_labels) or len(pool_features)):
        raise InvalidFieldError.of("--support", "there is no image to learn from; give --support or --pool")
    if min((*shots, draws)) < 1:
        raise InvalidFieldError.of("--shots", "every number of images and of draws must be at least 1")
    total = len(shots) * draws if len(support_labels) else 0
    fitted_to_pool: dict[str, FittedAdapter] = {}
    width = features.shape[1]
    no_labels = Examples(np.zeros((0, width), np.float32), np.zeros(0, np.int64), pool_features)
    scores, not_run = await comparer.score_all(task, features, TrainingData(no_labels, fitted_to_pool=fitted_to_pool))
    correct = {name: method.ranked[:, 0] == truth for name, method in scores.items()}
    points = [CurvePoint(name, None, (float(is_correct.mean()),)) for name, is_correct in correct.items()]
    if not total:
        selection = await find_best_method(
            comparer,
            task,
            no_labels.support_features,
            no_labels.support_labels,
            pool_features,
            fitted_to_pool=fitted_to_pool,
        )
        selected = correct[selection["method"]]
        worse = _is_worse(selected, correct[DEFAULT_METHOD])
        points.append(CurvePoint(AUTO, None, (float(selected.mean()),), (selection["method"],), int(worse)))
    rng = np.random.default_rng(0)
    done = 0
    for count in shots if total else ():
        accuracies: dict[str, list[float]] = {}
        chosen: list[str] = []
        worse_draws = 0
        for _ in range(draws):
            drawn = _draw(rng, support_labels, count)
            examples = Examples(support_features[drawn], support_labels[drawn], pool_features)
            training = TrainingData(examples, fitted_to_pool=fitted_to_pool)
            fitted, _ = await comparer.score_all(task, features, training, only=Need.SUPPORT)
            correct_in_draw = correct | {name: method.ranked[:, 0] == truth for name, method in fitted.items()}
            selection = await find_best_method(
                comparer,
                task,
                support_features[drawn],
                support_labels[drawn],
                pool_features,
                fitted_to_pool=fitted_to_pool,
            )
            chosen.append(selection["method"])
            correct_in_draw[AUTO] = correct_in_draw[selection["method"]]
            worse_draws += _is_worse(correct_in_draw[AUTO], correct[DEFAULT_METHOD])
            for name in (*fitted, AUTO):
                accuracies.setdefault(name, []).append(float(correct_in_draw[name].mean()))
            done += 1
            await advance(done, total)
        points += [
            CurvePoint(
                name,
                count,
                tuple(values),
                tuple(chosen) if name == AUTO else (),
                worse_draws if name == AUTO else 0,
            )
            for name, values in accuracies.items()
        ]
    return LearningCurve(
        len(truth),
        len(support_labels),
        len(pool_features),
        task.model,
        tuple(points),
        bootstrap_interval(correct[DEFAULT_METHOD].astype(np.float64)),
        # Methods that need labelled images run on the draws, if there are any.
        tuple(entry for entry in not_run if not (total and Need.SUPPORT in METHODS[entry.partition(":")[0]].learns)),
    )


def _draw(rng: np.random.Generator, labels: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of at most ``count`` images of each class."""
    return np.concatenate([rng.permutation(np.flatnonzero(labels == label))[:count] for label in np.unique(labels)])


def _is_worse(correct: np.ndarray, baseline: np.ndarray) -> bool:
    difference = paired_difference(correct.astype(np.float64), baseline.astype(np.float64))
    return difference.mean < 0 and difference.p < SIGNIFICANT
