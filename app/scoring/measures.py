"""Measures of predictions, given the true classes: accuracy, a table of classes, and a confusion matrix."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from app.errors import InvalidFieldError
from app.runtime.turns import give_way

Z_95 = 1.959963984540054
"""The standard normal quantile that leaves 2.5 % above it."""

CONFIDENCE_BINS = 15
"""The number of bins of Guo et al., "On Calibration of Modern Neural Networks", ICML 2017."""

MAX_CLASS_ROWS = 1000
"""The largest number of rows in the table of classes of an evaluation."""

MAX_CONFUSIONS = 500
"""The largest number of cells of the confusion matrix in an evaluation."""

_MIN_PROBABILITY = 1e-12


@dataclass(frozen=True, slots=True)
class ClassScore:
    """One row of the table of classes. A fraction whose denominator is zero is None.

    ``support`` is the number of images of the class, ``predicted`` the number of predictions of it, and ``correct`` the
    number of correct ones. ``confused_with`` is the wrong class that is predicted most often for its images, and
    ``confused_count`` is the number of these predictions.
    """

    name: str
    support: int
    predicted: int
    correct: int
    recall: float | None
    precision: float | None
    f1: float | None
    confused_with: str | None
    confused_count: int


@dataclass(frozen=True, slots=True)
class Confusion:
    """A cell of the confusion matrix: the number of images of class ``label`` for which ``predicted`` is predicted."""

    label: str
    predicted: str
    count: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All measures of one method on one set of n images and c classes. Fractions are in [0, 1].

    The size does not depend on c. ``classes`` has the ``class_count`` classes with images or predictions, in their
    given order; of more than ``MAX_CLASS_ROWS``, those with the most images. ``confusion`` has the ``confusion_count``
    cells of the confusion matrix that are not zero, the largest first, and at most ``MAX_CONFUSIONS``.

    ``top1_interval`` is the 95 % Wilson score interval. ``top5`` is the share of images whose true class is among the
    first ``min(5, c)``. ``mean_recall`` and ``macro_f1`` are means over the classes with images. ``nll`` is the
    negative log-likelihood in nats, and ``ece`` the expected calibration error; both are None if only the order of the
    classes is known. ``macro_f1`` is None only in results that were stored by older releases.
    """

    images: int
    top1: float
    top1_interval: tuple[float, float]
    top5: float
    mean_recall: float
    classes: tuple[ClassScore, ...]
    class_count: int
    confusion: tuple[Confusion, ...]
    confusion_count: int
    macro_f1: float | None = None
    nll: float | None = None
    ece: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts, tuples, strings and numbers."""
        return asdict(self)


def evaluate(
    classnames: Sequence[str],
    labels: Int[np.ndarray, " n"],
    ranked: Int[np.ndarray, "n k"],
    scores: Float[np.ndarray, "n c"] | None = None,
    *,
    per_class: bool = True,
) -> Evaluation:
    """Compare class indices, best first, with the true classes; k is at least ``min(5, c)``.

    Args:
        classnames: c names.
        labels: the true class of each image.
        ranked: classes, best first.
        scores: the scores of all classes in [0, 1]. Rows need not sum to 1 (sigmoid models): the calibration error uses
            the largest score unchanged, and the log-likelihood divides each row by its sum.
        per_class: include the rows of the classes and the confusion matrix; without, both are empty.

    Raises:
        InvalidFieldError: no images.
        ValueError: invalid shapes, indices or scores.
    """
    truth, best = np.asarray(labels), np.asarray(ranked)
    _check(len(classnames), truth, best)
    kept = best[:, : min(5, len(classnames))]
    table = _table(classnames, truth, kept[:, 0]) if per_class else _NO_TABLE
    is_correct = truth == kept[:, 0]
    correct = int(is_correct.sum())
    support = np.bincount(truth, minlength=len(classnames))
    recalls = np.bincount(truth[is_correct], minlength=len(classnames))[support > 0] / support[support > 0]
    nll, ece = None, None
    if scores is not None:
        shown = np.asarray(scores, np.float64)
        _check_scores((len(truth), len(classnames)), shown)
        nll = negative_log_likelihood(shown, truth)
        ece = expected_calibration_error(shown, truth)
    return Evaluation(
        images=len(truth),
        top1=correct / len(truth),
        top1_interval=wilson_interval(correct, len(truth)),
        top5=float((kept == truth[:, None]).any(axis=1).mean()),
        mean_recall=float(recalls.mean()),
        classes=table.classes,
        class_count=table.class_count,
        confusion=table.confusion,
        confusion_count=table.confusion_count,
        macro_f1=macro_f1(truth, kept[:, 0], len(classnames)),
        nll=nll,
        ece=ece,
    )


def macro_f1(labels: Int[np.ndarray, " n"], predicted: Int[np.ndarray, " n"], classes: int) -> float:
    """Return the mean F1 of the classes with images, 0 for a class that is never predicted; n is at least 1."""
    support, predictions = np.bincount(labels, minlength=classes), np.bincount(predicted, minlength=classes)
    correct = np.bincount(labels[labels == predicted], minlength=classes)
    present = support > 0
    return float(np.mean(2 * correct[present] / (support + predictions)[present]))


def negative_log_likelihood(probabilities: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"]) -> float:
    """Return the mean of ``-log p`` of the true classes, in nats; n is at least 1.

    Rows are divided by their sum first, because the scores of sigmoid models are not a distribution over the classes. A
    row of zeros becomes equal shares. Shares below 1e-12 are replaced by 1e-12, so that one image cannot make the mean
    infinite.
    """
    wide = np.asarray(probabilities, np.float64)
    totals = wide.sum(axis=1)
    true = wide[np.arange(len(wide)), labels]
    shares = np.divide(true, totals, out=np.full(len(wide), 1 / wide.shape[1]), where=totals > 0)
    return float(-np.log(shares.clip(_MIN_PROBABILITY, 1)).mean())


def expected_calibration_error(
    probabilities: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"], *, bins: int = CONFIDENCE_BINS
) -> float:
    """Return the difference between the largest score and the share of correct labels, in [0, 1]; n is at least 1.

    It is the mean over bins of the score, weighted by their images: Naeini et al., "Obtaining Well Calibrated
    Probabilities Using Bayesian Binning", AAAI 2015; Guo et al., ICML 2017. Bins have equal width,
    ``((m - 1) / bins, m / bins]``. For few images it is too large, because of chance differences in every bin.
    """
    wide = np.asarray(probabilities, np.float64)
    confidences = wide.max(axis=1)
    correct = wide.argmax(axis=1) == labels
    edges = np.arange(1, bins) / bins
    # The weight of a bin times the difference of its means is the difference of its sums, divided by n.
    gaps = np.bincount(np.searchsorted(edges, confidences), weights=correct - confidences)
    return float(np.abs(gaps).sum() / len(wide))


def wilson_interval(successes: int, trials: int, z: float = Z_95) -> tuple[float, float]:
    """Return the score interval of a proportion, in [0, 1]; ``trials`` is at least 1.

    Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 1927.
    """
    share = successes / trials
    spread = z * sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    centre = share + z * z / (2 * trials)
    scale = 1 + z * z / trials
    # Without any success or any failure, one bound is exactly 0 or 1, which rounding would miss.
    low = 0.0 if successes == 0 else (centre - spread) / scale
    high = 1.0 if successes == trials else (centre + spread) / scale
    return low, high


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference between two methods on the same n images.

    ``mean`` is the difference of their top-1 accuracies, in [-1, 1]. ``low`` and ``high`` are the bounds of its 95 %
    bootstrap interval. ``p`` is the p-value of the two-sided test of no difference.
    """

    mean: float
    low: float
    high: float
    p: float


def bootstrap_interval(correct: Float[np.ndarray, " n"], *, resamples: int = 2000) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean of n values, images drawn with replacement.

    Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13. Equal values give the same interval.
    """
    rng = np.random.default_rng(0)
    values = np.asarray(correct, np.float64)
    # The draws are processed in pieces of some megabytes.
    means: list[float] = []
    at_once = max(1, 4_000_000 // len(values))
    for first in range(0, resamples, at_once):
        give_way()
        draws = rng.integers(0, len(values), (min(at_once, resamples - first), len(values)))
        means += values[draws].mean(axis=1).tolist()
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def paired_difference(
    better: Float[np.ndarray, " n"], worse: Float[np.ndarray, " n"], *, flips: int = 10_000
) -> Difference:
    """Compare two methods by image. A value is 1 if a method was correct, or the share of its repetitions that were.

    The test flips the signs of the differences at random (Fisher, "The Design of Experiments", 1935, section 21). For
    values of 0 and 1 it is a simulation of McNemar's test. The p-value is at least ``1 / (flips + 1)``.
    """
    differences = np.asarray(better, np.float64) - np.asarray(worse, np.float64)
    low, high = bootstrap_interval(differences)
    nonzero = differences[differences != 0]
    if not len(nonzero):
        return Difference(0.0, low, high, 1.0)
    rng = np.random.default_rng(0)
    observed = abs(nonzero.sum())
    as_large = 0
    at_once = max(1, 4_000_000 // len(nonzero))
    for first in range(0, flips, at_once):
        give_way()
        signs = rng.integers(0, 2, (min(at_once, flips - first), len(nonzero)), dtype=np.int8) * 2 - 1
        # With a tolerance, because sums of the same numbers in another order may differ in their last digit.
        as_large += int((np.abs(signs @ nonzero) >= observed - 1e-9).sum())
    return Difference(float(differences.mean()), low, high, (as_large + 1) / (flips + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values, corrected for multiple comparisons (Holm, Scandinavian Journal of Statistics, 1979)."""
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def _check(classes: int, labels: np.ndarray, ranked: np.ndarray) -> None:
    if not len(labels):
        raise InvalidFieldError.of("labels", "there are no labelled images to evaluate; give at least one")
    if ranked.ndim != 2 or len(ranked) != len(labels) or ranked.shape[1] < min(5, classes):
        raise ValueError(f"ranks of shape {ranked.shape} for {len(labels)} images and {classes} classes")
    for what, indices in (("label", labels), ("ranked class", ranked)):
        if indices.min() < 0 or indices.max() >= classes:
            raise ValueError(f"a {what} lies outside 0..{classes - 1}")


def _check_scores(shape: tuple[int, int], scores: np.ndarray) -> None:
    if scores.shape != shape:
        raise ValueError(f"scores of shape {scores.shape} for {shape[0]} images and {shape[1]} classes")
    # NaN fails this condition too. Rounding may leave a score slightly above 1.
    if not ((scores >= 0) & (scores <= 1 + 1e-6)).all():
        raise ValueError("a score lies outside 0..1")


@dataclass(frozen=True, slots=True)
class _Table:
    """The fields of an ``Evaluation`` about its classes."""

    classes: tuple[ClassScore, ...] = ()
    class_count: int = 0
    confusion: tuple[Confusion, ...] = ()
    confusion_count: int = 0


_NO_TABLE = _Table()


def _table(classnames: Sequence[str], truth: np.ndarray, guesses: np.ndarray) -> _Table:
    """Return the largest rows and cells, in time and memory that grow with images plus classes."""
    classes = len(classnames)
    support, predicted = np.bincount(truth, minlength=classes), np.bincount(guesses, minlength=classes)
    correct = np.bincount(truth[truth == guesses], minlength=classes)
    pairs, counts = np.unique(truth.astype(np.int64) * classes + guesses, return_counts=True)
    largest_first = np.lexsort((pairs, -counts))
    true_of, guess_of = pairs[largest_first] // classes, pairs[largest_first] % classes
    cells = list(zip(true_of.tolist(), guess_of.tolist(), counts[largest_first].tolist(), strict=True))
    most_confused: dict[int, tuple[int, int]] = {}
    for true, guess, count in cells:
        if true != guess:
            most_confused.setdefault(true, (guess, count))
    occurring = np.flatnonzero(support + predicted)
    largest = occurring[np.lexsort((-predicted[occurring], -support[occurring]))][:MAX_CLASS_ROWS]

    def row(index: int) -> ClassScore:
        confused_with, confused_count = most_confused.get(index, (None, 0))
        return ClassScore(
            name=classnames[index],
            support=int(support[index]),
            predicted=int(predicted[index]),
            correct=int(correct[index]),
            recall=fraction(int(correct[index]), int(support[index])),
            precision=fraction(int(correct[index]), int(predicted[index])),
            f1=fraction(2 * int(correct[index]), int(support[index] + predicted[index])),
            confused_with=None if confused_with is None else classnames[confused_with],
            confused_count=confused_count,
        )

    return _Table(
        tuple(map(row, np.sort(largest).tolist())),
        len(occurring),
        tuple(Confusion(classnames[true], classnames[guess], count) for true, guess, count in cells[:MAX_CONFUSIONS]),
        len(cells),
    )


def fraction(part: int, whole: int) -> float | None:
    """Return the quotient; None if the denominator is zero."""
    return part / whole if whole else None
