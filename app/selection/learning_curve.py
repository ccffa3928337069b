"""How accuracy grows with the number of labelled images: every method on several draws of each number."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from app.adapters._base import Examples
from app.adapters._examples import Need
from app.classification.methods import AUTO, METHODS
from app.classification.service import DEFAULT_METHOD, ClassifyRequest, Service
from app.errors import InvalidFieldError
from app.fewshot.fitting import FittedAdapter
from app.scoring.measures import bootstrap_interval, paired_difference
from app.selection.comparison import TrainingData, answer_all, no_progress
from app.selection.trial import choose
from app.types import ImageFeatures

_SIGNIFICANT = 0.05


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One method with one number of labelled images per class; ``shots`` is None where it uses none.

    ``accuracies`` are of the draws; ``chosen`` are the methods that ``auto`` took in them, and ``worse`` counts the
    draws in which it was below zero-shot beyond chance.
    """

    method: str
    shots: int | None
    accuracies: tuple[float, ...]
    chosen: tuple[str, ...] = ()
    worse: int = 0

    @property
    def mean(self) -> float:
        """Of the draws."""
        return float(np.mean(self.accuracies))

    @property
    def deviation(self) -> float:
        """Standard deviation over the draws, 0 for a single one."""
        return float(np.std(self.accuracies, ddof=1)) if len(self.accuracies) > 1 else 0.0


@dataclass(frozen=True, slots=True)
class LearningCurve:
    """Every point, on n images; ``interval`` is the 95 % bootstrap interval of zero-shot's accuracy."""

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
    service: Service,
    question: ClassifyRequest,
    asked: tuple[ImageFeatures, Sequence[int]],
    support: tuple[ImageFeatures, Sequence[int]],
    pool_features: ImageFeatures,
    *,
    shots: Sequence[int],
    draws: int,
    advance: Callable[[int, int], Awaitable[object]] = no_progress,
) -> LearningCurve:
    """Draw so many labelled images of each class, let every method learn from them, and count what it gets right.

    ``auto`` sees nothing but the draw and the pool, as it would in the service. A class with fewer images than shots
    gives all it has. Draws are the same for the same numbers.

    Args:
        service: to plan and classify with.
        question: the classes, model and templates.
        asked: unit rows (n, d) and the class of each.
        support: unit rows (s, d) and the class of each, to draw from; none will do if there is a pool.
        pool_features: unit rows (u, d) of unlabelled images; none will do.
        shots: images per class, each at least 1.
        draws: of each number, at least 1.
        advance: called after each draw.

    Raises:
        InvalidFieldError: nothing to learn from, or a number below 1.
    """
    features, truth = asked[0], np.asarray(asked[1], np.int64)
    support_features, support_labels = support[0], np.asarray(support[1], np.int64)
    if not (len(support_labels) or len(pool_features)):
        raise InvalidFieldError.of("--support", "there is no image to learn from; give --support or --pool")
    if min((*shots, draws)) < 1:
        raise InvalidFieldError.of("--shots", "every number of images and of draws must be at least 1")
    total = len(shots) * draws if len(support_labels) else 0
    of_pool: dict[str, FittedAdapter] = {}
    width = features.shape[1]
    no_labels = Examples(np.zeros((0, width), np.float32), np.zeros(0, np.int64), pool_features)
    answers, not_run, task = await answer_all(service, question, features, TrainingData(no_labels, of_pool=of_pool))
    correct = {name: each.best[:, 0] == truth for name, each in answers.items()}
    points = [CurvePoint(name, None, (float(each.mean()),)) for name, each in correct.items()]
    if not total:
        choice = await choose(
            service, question, no_labels.support_features, no_labels.support_labels, pool_features, of_pool=of_pool
        )
        taken = correct[choice["method"]]
        worse = _worse(taken, correct[DEFAULT_METHOD])
        points.append(CurvePoint(AUTO, None, (float(taken.mean()),), (choice["method"],), int(worse)))
    rng = np.random.default_rng(0)
    done = 0
    for count in shots if total else ():
        found: dict[str, list[float]] = {}
        chosen: list[str] = []
        worse_draws = 0
        for _ in range(draws):
            drawn = _draw(rng, support_labels, count)
            examples = Examples(support_features[drawn], support_labels[drawn], pool_features)
            lessons = TrainingData(examples, of_pool=of_pool)
            told, _, _ = await answer_all(service, question, features, lessons, only=Need.SUPPORT)
            of_draw = correct | {name: each.best[:, 0] == truth for name, each in told.items()}
            choice = await choose(
                service, question, support_features[drawn], support_labels[drawn], pool_features, of_pool=of_pool
            )
            chosen.append(choice["method"])
            of_draw[AUTO] = of_draw[choice["method"]]
            worse_draws += _worse(of_draw[AUTO], correct[DEFAULT_METHOD])
            for name in (*told, AUTO):
                found.setdefault(name, []).append(float(of_draw[name].mean()))
            done += 1
            await advance(done, total)
        points += [
            CurvePoint(
                name,
                count,
                tuple(each),
                tuple(chosen) if name == AUTO else (),
                worse_draws if name == AUTO else 0,
            )
            for name, each in found.items()
        ]
    return LearningCurve(
        len(truth),
        len(support_labels),
        len(pool_features),
        task.model,
        tuple(points),
        bootstrap_interval(correct[DEFAULT_METHOD].astype(np.float64)),
        # Methods that want labelled images are run on the draws, where there are any.
        tuple(each for each in not_run if not (total and Need.SUPPORT in METHODS[each.partition(":")[0]].learns)),
    )


def _draw(rng: np.random.Generator, labels: np.ndarray, count: int) -> np.ndarray:
    """Return the places of at most ``count`` images of each class."""
    return np.concatenate([rng.permutation(np.flatnonzero(labels == label))[:count] for label in np.unique(labels)])


def _worse(correct: np.ndarray, baseline: np.ndarray) -> bool:
    difference = paired_difference(correct.astype(np.float64), baseline.astype(np.float64))
    return difference.mean < 0 and difference.p < _SIGNIFICANT
