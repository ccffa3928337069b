"""How sure to be: scores that mean what they say, sets of labels that hold the true one, and "none of these".

Everything is learned from labelled images that the method has not seen. ``rejection_threshold`` and
``conformal_quantile`` keep their promises exactly, for any number of images and for any distribution, where the scores
they are given and those of new images are exchangeable. ``calibrate`` fits one temperature to the same images, which
new images had no part in, so that there the promises hold approximately: in simulations of 19 to 50 images and 2 to
100 classes both were missed by less than 0.4 percentage points, with 9 images by up to 1.3. For two classes they stay
exact, as no temperature changes the order of the images. Temperatures fitted crosswise to two halves were tried
instead: scores at two temperatures, compared with new ones at a third, missed by -4 to +10 points. The logits of a
method that learns must be cross-validated, and its last fit, to all images, differs a little from those of the folds.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import ceil, floor, inf, log2
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.special import logsumexp

from app.scoring.measures import wilson_interval
from app.scoring.numerics import log_softmax, softmax, tempered_softmax, validate_temperature

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.01, 100.0
_MIN_TEMPERED_LOSS_TEMPERATURE = 0.5

MAX_KEPT_SCORES = 2000
"""Order statistics that a calibration stores; which ones, and what stands for the rest, is told there."""

# Products such as 0.29 * 100 miss the whole number that is meant by some 1e-14.
_ROUNDING = 1e-9


def fit_temperature(logits: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"]) -> float:
    """Return the T in [0.01, 100] at which ``softmax(logits / T)`` fits the true classes best; n is at least 1.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 4.2: the least negative log-likelihood.

    Deviation: a prior with the weight of one image draws T to 1, the model's own scale. It adds ``1/T + log(T)`` to
    the sum over the images, as if 1 had been drawn once from an exponential distribution of rate ``1/T``. Labels that
    are all right can then not drive T to 0: at the optimum ``T = 1 + sum_i (mean_i - true_i)``, with the mean logit
    under the probabilities and the logit of the true class, and T is never below ``1 / (1 + n * log(c))``. The whole
    is strictly convex in ``1/T``, so that there is one minimum and the search finds it; a prior that is normal in
    ``log(T)`` would not promise that.

    Raises:
        ValueError: no images, logits that are not finite, or labels that do not fit.
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
        middle = (low + high) / 2
        inverse = 2**middle
        slope = float((softmax(inverse * gaps) * gaps).sum()) + prior * (1 - 1 / inverse)
        if slope > 0:
            high = middle
        else:
            low = middle
    return (low + high) / 2


def max_concept_matching(similarities: Float[np.ndarray, "n c"], temperature: float = 1.0) -> Float[np.ndarray, " n"]:
    """Return the largest softmax of cosines, in [1/c, 1]; low where an image may show none of the classes.

    Ming et al., "Delving into Out-of-Distribution Detection with Vision-Language Representations", NeurIPS 2022,
    who take the cosines of CLIP at a temperature of 1, far above the one that its logits are made with.
    """
    largest: np.ndarray = tempered_softmax(similarities, temperature).max(axis=1)
    return largest


def energy(logits: Float[np.ndarray, "n c"], temperature: float = 1.0) -> Float[np.ndarray, " n"]:
    """Return ``-T * logsumexp(logits / T)``; high where an image may show none of the classes.

    Liu et al., "Energy-based Out-of-distribution Detection", NeurIPS 2020. The functions below take low scores for
    foreign images, so give them its negative.
    """
    validate_temperature(temperature)
    energies: np.ndarray = -temperature * logsumexp(np.asarray(logits, np.float64) / temperature, axis=1)
    return energies


def false_rejection_rate(scores: Float[np.ndarray, " n"], threshold: float) -> float:
    """Return the share of scores below the threshold, of n >= 1 images that do belong to a class.

    Raises:
        ValueError: no scores, or one that is not a number.
    """
    return _below(scores, threshold) / len(scores)


def false_rejection_bound(scores: Float[np.ndarray, " n"], threshold: float) -> float:
    """Return the upper end of the 95 % Wilson interval of that share, for a threshold not chosen by these scores."""
    return wilson_interval(_below(scores, threshold), len(scores))[1]


def rejection_threshold(scores: Float[np.ndarray, " n"], rate: float) -> float:
    """Return the largest threshold below which at most ``rate`` of new scores like these fall.

    That is the k-th smallest of the n, with ``k = floor(rate * (n + 1))``: a new score is below it only if it is among
    the k smallest of the n + 1, which has probability at most ``k / (n + 1)``, ties or not. With ``k = 0`` it is
    -inf: so few images do not allow any to be rejected (Vovk et al., "Algorithmic Learning in a Random World", 2005).
    The promise is about the mean over draws of the n images and a new one. How many images of other things are
    rejected it does not say.

    Raises:
        ValueError: a rate outside [0, 1), or a score that is not a number.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"a rate of {rate}; it must be at least 0 and below 1")
    values = _sorted(scores)
    rank = min(floor(rate * (len(values) + 1) + _ROUNDING), len(values))
    return float(values[rank - 1]) if rank else -inf


def conformal_quantile(scores: Float[np.ndarray, " n"], coverage: float) -> float:
    """Return the q that a new score like these exceeds with probability at most ``1 - coverage``.

    That is the k-th smallest of the n, with ``k = ceil((n + 1) * coverage)``, and inf where k is above n (Vovk et al.,
    2005; Angelopoulos and Bates, "Conformal Prediction: A Gentle Introduction", 2023, section 1). Without ties a new
    score is within it with probability ``k / (n + 1)`` exactly.

    Args:
        scores: how badly the true class of each image fits it, such as 1 less its probability.
        coverage: in (0, 1].

    Raises:
        ValueError: a coverage outside (0, 1], or a score that is not a number.
    """
    if not 0 < coverage <= 1:
        raise ValueError(f"a coverage of {coverage}; it must be above 0 and at most 1")
    values = _sorted(scores)
    rank = max(1, ceil((len(values) + 1) * coverage - _ROUNDING))
    return float(values[rank - 1]) if rank <= len(values) else inf


def prediction_sets(probabilities: Float[np.ndarray, "n c"], quantile: float) -> list[Int[np.ndarray, " k"]]:
    """Return the classes of each image whose probability is at least ``1 - quantile``, best first; the first always.

    Sadinle et al., "Least Ambiguous Set-Valued Classifiers With Bounded Error Levels", JASA 2019, with the quantile
    of ``1 - p`` of the true classes. Of all sets with this coverage on average over images, theirs are the smallest
    where the probabilities are right, and one number says what is in them. Adaptive sets (Romano et al., NeurIPS 2020;
    the largest classes until their sum passes the quantile) were as large on photographs of ten classes and covered
    the hardest class a little better; with many classes they grow by every small probability.

    Deviation: a set is never empty, which can only add to its coverage. Of equal classes the earlier comes first.
    """
    wide = np.asarray(probabilities, np.float64)
    if wide.ndim != 2 or not wide.shape[1]:
        raise ValueError(f"probabilities of shape {wide.shape}; they must have two axes and a class")
    if not len(wide):
        return []
    order = np.argsort(-wide, axis=1, kind="stable")
    # The same expression as for the quantile, so that rounding cannot part equal probabilities.
    sizes = (1 - wide <= quantile).sum(axis=1).clip(1)
    inside = np.arange(wide.shape[1]) < sizes[:, None]
    return np.split(order[inside], np.cumsum(sizes)[:-1])


@dataclass(frozen=True, slots=True)
class Calibration:
    """What held-out images, of which each belongs to a class, teach about a method on a label set.

    ``top_scores`` are the largest calibrated probabilities of the images and ``true_scores`` those of their true
    classes, both ascending. Of more than 2,000 images only as many are kept, evenly spaced by rank with the first and
    the last among them, and each that is left out counts as the next smaller one kept. Every promise survives that,
    since smaller scores make a threshold lower, a quantile higher and a rate higher; by ``images / 2000`` ranks at
    most, which is 0.05 % of the images.

    Raises:
        ValueError: values that ``calibrate`` cannot have made.
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
        """Return what ``from_json`` reads, at most about 80 kB of it."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Calibration":
        """Return the calibration as it was before it was stored."""
        return cls(
            temperature=float(stored["temperature"]),
            top_scores=tuple(map(float, stored["top_scores"])),
            true_scores=tuple(map(float, stored["true_scores"])),
            images=int(stored["images"]),
        )

    def probabilities(self, logits: Float[np.ndarray, "n c"]) -> Float[np.ndarray, "n c"]:
        """Return what thresholds and quantiles are to be compared with, in float64; rows sum to 1."""
        return tempered_softmax(logits, self.temperature)

    def false_rejection_rate(self, threshold: float) -> float:
        """Return the share of the images whose largest probability is below the threshold."""
        return false_rejection_rate(_unthinned(self.top_scores, self.images), threshold)

    def false_rejection_bound(self, threshold: float) -> float:
        """Return the upper end of the 95 % Wilson interval of that share."""
        return false_rejection_bound(_unthinned(self.top_scores, self.images), threshold)

    def rejection_threshold(self, rate: float) -> float:
        """Return below which largest probability to answer "none of these"; 0, which nothing is below, if never."""
        return max(0.0, rejection_threshold(_unthinned(self.top_scores, self.images), rate))

    def set_quantile(self, coverage: float) -> float:
        """Return the quantile for ``prediction_sets``; 1, which lets in every class, where images are too few."""
        return min(1.0, conformal_quantile(1 - _unthinned(self.true_scores, self.images), coverage))


def calibrate(logits: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"]) -> Calibration:
    """Learn from the held-out logits of n >= 1 labelled images; see the top of this file for what holds exactly.

    Raises:
        ValueError: no images, logits that are not finite, or labels that do not fit.
    """
    temperature = fit_temperature(logits, labels)
    probabilities = tempered_softmax(logits, temperature)
    return Calibration(
        temperature=temperature,
        top_scores=_thinned(probabilities.max(axis=1)),
        true_scores=_thinned(probabilities[np.arange(len(probabilities)), labels]),
        images=len(probabilities),
    )


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
        raise ValueError("there are no scores to tell a rate of")
    return int(np.searchsorted(_sorted(scores), threshold))


def _kept_ranks(images: int) -> np.ndarray:
    if images <= MAX_KEPT_SCORES:
        return np.arange(images)
    return np.arange(MAX_KEPT_SCORES) * (images - 1) // (MAX_KEPT_SCORES - 1)


def _thinned(scores: np.ndarray) -> tuple[float, ...]:
    # Rounding may leave a probability a hair above 1.
    return tuple(np.sort(scores.clip(0, 1))[_kept_ranks(len(scores))].tolist())


def _unthinned(kept: tuple[float, ...], images: int) -> np.ndarray:
    return np.repeat(np.asarray(kept), np.diff(_kept_ranks(images), append=images))
