"""Calibration: calibrated probabilities, conformal sets of labels, and the rejection of images of unknown classes.

Everything is fitted to labelled images that the method has not learned from. The guarantees of ``rejection_threshold``
and ``conformal_quantile`` are exact, for any number of images and any distribution, if their scores and those of new
images are exchangeable. ``calibrate`` fits one temperature to the same images, and not to new images, so its guarantees
are approximate: in simulations of 19 to 50 images and 2 to 100 classes, both were missed by less than 0.4 percentage
points, with 9 images by up to 1.3. For two classes they are exact, because no temperature changes the order of the
images. Two temperatures, each fitted to one half and used for the other, were tried instead: these scores, compared
with new ones at a third temperature, missed by -4 to +10 points. The logits of a method that learns must be
cross-validated. Its final fit, to all images, differs slightly from those of the folds.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import ceil, floor, inf, log2
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from app.runtime.turns import give_way
from app.scoring.numerics import log_softmax, log_sum_exp, softmax, tempered_softmax, validate_temperature
from app.types import RejectBy

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.01, 100.0
_MIN_TEMPERED_LOSS_TEMPERATURE = 0.5

MAX_KEPT_SCORES = 2000
"""The largest number of order statistics that a ``Calibration`` stores, which describes the selection."""

# Products such as 0.29 * 100 differ from the intended whole number by about 1e-14.
_ROUNDING = 1e-9


def fit_temperature(logits: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"]) -> float:
    """Return the T in [0.01, 100] at which ``softmax(logits / T)`` fits the true classes best; n is at least 1.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 4.2: the minimum of the negative
    log-likelihood.

    Deviation: a prior with the weight of one image draws T to 1, the scale of the model. It adds ``1/T + log(T)`` to
    the sum over the images, the negative log-likelihood of one draw of 1 from an exponential distribution of rate
    ``1/T``. So labels that are all correct cannot drive T to 0: at the optimum ``T = 1 + sum_i (mean_i - true_i)``,
    with the mean logit under the probabilities and the logit of the true class, and T is never below ``1 / (1 + n *
    log(c))``. The objective is strictly convex in ``1/T``, so there is one minimum, which the search finds. A normal
    prior in ``log(T)`` would not guarantee that.

    Raises:
        ValueError: there are no images, a logit is not finite, or the labels are invalid.
    """
    wide = _labelled(logits, labels)
    gaps = wide - wide[np.arange(len(wide)), labels][:, None]
    log2_inverse = _fitted_log2_inverse(
        gaps, -log2(HIGHEST_TEMPERATURE), -log2(LOWEST_TEMPERATURE), halvings=32, prior=1
    )
    return float(2**-log2_inverse)


def tempered_loss(logits: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"]) -> tuple[float, float]:
    """Return the mean negative log-likelihood, in nats, at the temperature that makes it smallest, and the temperature.

    It compares classifiers by how well they rank the classes. At a temperature of 1 the loss would mainly compare how
    overconfident they are, which a temperature can mend; and the accuracy on few images says little.

    The temperature is searched between 2**-4 and 2**10 to a factor of 2**0.02, in the precision of the logits and
    without a prior. It is returned as at least 0.5, because a few images that are all classified correctly would call
    for any lower one.
    """
    gaps = logits - np.take_along_axis(logits, labels[:, None], axis=1)
    inverse = 2 ** _fitted_log2_inverse(gaps, -10.0, 4.0, halvings=10, prior=0)
    true = np.take_along_axis(log_softmax(inverse * gaps), labels[:, None], axis=1)
    return -float(true.mean()), max(1 / inverse, _MIN_TEMPERED_LOSS_TEMPERATURE)


def _fitted_log2_inverse(
    gaps: Float[np.ndarray, "n c"], low: float, high: float, *, halvings: int, prior: float
) -> float:
    """Return log2 of the inverse temperature b that fits the true classes best, between ``low`` and ``high``.

    Minimises ``sum(logsumexp(b * gaps)) + prior * (b - log(b))``, which is convex in b, by halving the range at the
    sign of its derivative.

    Args:
        gaps: the logits less that of the true class.
        low: the bounds of log2(b).
        high: see ``low``.
        halvings: how often the range is halved.
        prior: the weight, in images, of the prior that draws b to 1.
    """
    for _ in range(halvings):
        give_way()
        middle = (low + high) / 2
        inverse = 2**middle
        slope = float((softmax(inverse * gaps) * gaps).sum()) + prior * (1 - 1 / inverse)
        if slope > 0:
            high = middle
        else:
            low = middle
    return (low + high) / 2


def max_concept_matching(similarities: Float[np.ndarray, "n c"], temperature: float = 1.0) -> Float[np.ndarray, " n"]:
    """Return the largest softmax of the cosines, in [1/c, 1]; low for images that may show none of the classes.

    Ming et al., "Delving into Out-of-Distribution Detection with Vision-Language Representations", NeurIPS 2022,
    who use the cosines of CLIP at a temperature of 1, far above the temperature of its logits.
    """
    largest: np.ndarray = tempered_softmax(similarities, temperature).max(axis=1)
    return largest


def energy(logits: Float[np.ndarray, "n c"], temperature: float = 1.0) -> Float[np.ndarray, " n"]:
    """Return ``-T * logsumexp(logits / T)``; high for images that may show none of the classes.

    Liu et al., "Energy-based Out-of-distribution Detection", NeurIPS 2020. The functions below expect low scores for
    such images, so pass them the negative energy.
    """
    validate_temperature(temperature)
    energies: np.ndarray = -temperature * log_sum_exp(np.asarray(logits, np.float64) / temperature)
    return energies


def false_rejection_rate(scores: Float[np.ndarray, " n"], threshold: float) -> float:
    """Return the share of scores below the threshold, for n >= 1 images that belong to a class.

    Raises:
        ValueError: there are no scores, or a score is not a number.
    """
    return _below(scores, threshold) / len(scores)


def rejection_threshold(scores: Float[np.ndarray, " n"], rate: float) -> float:
    """Return the largest threshold below which at most ``rate`` of new scores like these fall.

    It is the k-th smallest of the n scores, with ``k = floor(rate * (n + 1))``. A new score is below it only if it is
    among the k smallest of the n + 1, which has a probability of at most ``k / (n + 1)``, also with ties. With ``k =
    0`` it is -inf: n is too small to reject any image (Vovk et al., "Algorithmic Learning in a Random World", 2005).
    The guarantee holds on average over draws of the n images and a new one. It does not say how many images of unknown
    classes are rejected.

    Raises:
        ValueError: the rate is outside [0, 1), or a score is not a number.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"a rate of {rate}; it must be at least 0 and below 1")
    values = _sorted(scores)
    rank = min(floor(rate * (len(values) + 1) + _ROUNDING), len(values))
    return float(values[rank - 1]) if rank else -inf


def conformal_quantile(scores: Float[np.ndarray, " n"], coverage: float) -> float:
    """Return the q that a new score like these exceeds with probability at most ``1 - coverage``.

    It is the k-th smallest of the n scores, with ``k = ceil((n + 1) * coverage)``, and inf if k is above n (Vovk et
    al., 2005; Angelopoulos and Bates, "Conformal Prediction: A Gentle Introduction", 2023, section 1). Without ties, a
    new score is at most q with a probability of exactly ``k / (n + 1)``.

    Args:
        scores: the nonconformity of the true class of each image, such as 1 less its probability.
        coverage: in (0, 1].

    Raises:
        ValueError: the coverage is outside (0, 1], or a score is not a number.
    """
    if not 0 < coverage <= 1:
        raise ValueError(f"a coverage of {coverage}; it must be above 0 and at most 1")
    values = _sorted(scores)
    rank = max(1, ceil((len(values) + 1) * coverage - _ROUNDING))
    return float(values[rank - 1]) if rank <= len(values) else inf


def prediction_sets(probabilities: Float[np.ndarray, "n c"], quantile: float) -> list[Int[np.ndarray, " k"]]:
    """Return the classes of each image with a probability of at least ``1 - quantile``, and always the best one.

    Sadinle et al., "Least Ambiguous Set-Valued Classifiers With Bounded Error Levels", JASA 2019, with the quantile of
    ``1 - p`` of the true classes. If the probabilities are correct, these are the smallest sets with this average
    coverage, and one number defines them. Adaptive sets (Romano et al., NeurIPS 2020: the most probable classes until
    their sum passes the quantile) had the same size on photographs of ten classes and covered the hardest class
    slightly better. With many classes they grow by every small probability.

    Deviation: a set is never empty, which can only increase its coverage. Classes are sorted, the best first; of equal
    classes the earlier comes first.
    """
    wide = np.asarray(probabilities, np.float64)
    if wide.ndim != 2 or not wide.shape[1]:
        raise ValueError(f"probabilities of shape {wide.shape}; they must have two axes and a class")
    if not len(wide):
        return []
    order = np.argsort(-wide, axis=1, kind="stable")
    # The same expression as for the quantile, so that rounding cannot separate equal probabilities.
    sizes = (1 - wide <= quantile).sum(axis=1).clip(1)
    inside = np.arange(wide.shape[1]) < sizes[:, None]
    return np.split(order[inside], np.cumsum(sizes)[:-1])


@dataclass(frozen=True, slots=True)
class Calibration:
    """The calibration of a method on a label set, from held-out images that belong to a class.

    ``top_scores`` are the largest calibrated probabilities of the images, and ``true_scores`` the probabilities of
    their true classes, both ascending. Of more than 2,000 images, 2,000 scores are kept, evenly spaced by rank, with
    the first and the last. Each of the others counts as the next smaller score that is kept. All guarantees still hold,
    because smaller scores make a threshold lower, a quantile higher and a rate higher, by at most ``images / 2000``
    ranks, which is 0.05 % of the images.

    Raises:
        ValueError: ``calibrate`` cannot return these values.
    """

    temperature: float
    top_scores: tuple[float, ...]
    true_scores: tuple[float, ...]
    images: int

    def __post_init__(self) -> None:
        validate_temperature(self.temperature)
        for name, scores in (("top", self.top_scores), ("true", self.true_scores)):
            if self.images < 1 or len(scores) != min(self.images, MAX_KEPT_SCORES):
                raise ValueError(f"{len(scores)} {name} scores of {self.images} images")
            steps = np.diff([0.0, *scores, 1.0])
            if not (steps >= 0).all():
                raise ValueError(f"the {name} scores do not ascend from 0 to 1")

    def to_json(self) -> dict[str, Any]:
        """Return the argument of ``from_json``, of at most about 80 kB."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Calibration":
        """Return the calibration from the result of ``to_json``."""
        return cls(
            temperature=float(stored["temperature"]),
            top_scores=tuple(map(float, stored["top_scores"])),
            true_scores=tuple(map(float, stored["true_scores"])),
            images=int(stored["images"]),
        )

    def probabilities(self, logits: Float[np.ndarray, "n c"]) -> Float[np.ndarray, "n c"]:
        """Return the calibrated probabilities, to compare with thresholds and quantiles, in float64; rows sum to 1."""
        return tempered_softmax(logits, self.temperature)

    @property
    def rejection(self) -> "Rejection":
        """Rejection by the largest probability."""
        return Rejection(RejectBy.SCORE, self.top_scores, self.images)

    def set_quantile(self, coverage: float) -> float:
        """Return the quantile for ``prediction_sets``; 1, which includes every class, if there are too few images."""
        return min(1.0, conformal_quantile(1 - _unthinned(self.true_scores, self.images), coverage))


def calibrate(logits: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"]) -> Calibration:
    """Fit a calibration to the held-out logits of n >= 1 labelled images; its guarantees are in the module docstring.

    Raises:
        ValueError: there are no images, a logit is not finite, or the labels are invalid.
    """
    temperature = fit_temperature(logits, labels)
    probabilities = tempered_softmax(logits, temperature)
    return Calibration(
        temperature=temperature,
        # Rounding may leave a probability slightly above 1.
        top_scores=_thinned(probabilities.max(axis=1).clip(0, 1)),
        true_scores=_thinned(probabilities[np.arange(len(probabilities)), labels].clip(0, 1)),
        images=len(probabilities),
    )


@dataclass(frozen=True, slots=True)
class Rejection:
    """How images of none of the classes are rejected at a chosen rate, from held-out images that belong to a class.

    ``scores`` are the scores ``by`` of the images, ascending in [-1, 1], kept as in ``Calibration``.

    Raises:
        ValueError: ``of_held_out`` cannot return these values.
    """

    by: RejectBy
    scores: tuple[float, ...]
    images: int

    def __post_init__(self) -> None:
        if self.images < 1 or len(self.scores) != min(self.images, MAX_KEPT_SCORES):
            raise ValueError(f"{len(self.scores)} scores of {self.images} images")
        if not (np.diff([-1.0, *self.scores, 1.0]) >= 0).all():
            raise ValueError("the scores do not ascend from -1 to 1")

    @classmethod
    def of_held_out(cls, by: RejectBy, scores: Float[np.ndarray, " n"]) -> "Rejection":
        """Return the rejection by scores of n >= 1 held-out images, in [-1, 1]; rounding beyond that is cut off."""
        return cls(by, _thinned(np.asarray(scores, np.float64).clip(-1, 1)), len(scores))

    def to_json(self) -> dict[str, Any]:
        """Return the argument of ``from_json``, of at most about 40 kB."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Rejection":
        """Return the rejection from the result of ``to_json``."""
        return cls(RejectBy(stored["by"]), tuple(map(float, stored["scores"])), int(stored["images"]))

    def threshold(self, rate: float) -> float:
        """Return the score below which an image is rejected, at the rate; the lowest one rejects no image."""
        lowest = 0.0 if self.by is RejectBy.SCORE else -1.0
        return max(lowest, rejection_threshold(_unthinned(self.scores, self.images), rate))

    def false_rejection_rate(self, threshold: float) -> float:
        """Return the share of the images whose score is below the threshold."""
        return false_rejection_rate(_unthinned(self.scores, self.images), threshold)


def _labelled(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    wide, truth = np.asarray(logits, np.float64), np.asarray(labels)
    if wide.ndim != 2 or not wide.size or truth.shape != (len(wide),):
        raise ValueError(f"logits of shape {wide.shape} and labels of shape {truth.shape}; give (n, c) and (n,)")
    if not np.isfinite(wide).all():
        raise ValueError("a logit is not a finite number")
    if truth.min() < 0 or truth.max() >= wide.shape[1]:
        raise ValueError(f"a label lies outside 0..{wide.shape[1] - 1}")
    return wide


def _sorted(scores: np.ndarray) -> np.ndarray:
    values = np.sort(np.asarray(scores, np.float64))
    # NaN is sorted to the end.
    if len(values) and np.isnan(values[-1]):
        raise ValueError("a score is not a number")
    return values


def _below(scores: np.ndarray, threshold: float) -> int:
    if not len(scores):
        raise ValueError("there are no scores to compute a rate from")
    return int(np.searchsorted(_sorted(scores), threshold))


def _kept_ranks(images: int) -> np.ndarray:
    if images <= MAX_KEPT_SCORES:
        return np.arange(images)
    return np.arange(MAX_KEPT_SCORES) * (images - 1) // (MAX_KEPT_SCORES - 1)


def _thinned(scores: np.ndarray) -> tuple[float, ...]:
    return tuple(np.sort(scores)[_kept_ranks(len(scores))].tolist())


def _unthinned(kept: tuple[float, ...], images: int) -> np.ndarray:
    return np.repeat(np.asarray(kept), np.diff(_kept_ranks(images), append=images))
