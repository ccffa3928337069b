"""Choosing between hyperparameters by cross-validation on the few labelled images that there are."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

_MOST_FOLDS = 5
# Held-out images that are looked at: more tell hardly more, and cost time for each candidate.
_JUDGED = 2048
# Improvements of the loss, in nats, below which the earlier candidate stays.
_MATERIAL = 1e-3
# The temperature is between 2**-4 and 2**10, found to 2**0.02.
_LEAST_TEMPERATURE = 0.5
_COLDEST, _HOTTEST, _HALVINGS = -4.0, 10.0, 10


def fold_numbers(labels: Int[np.ndarray, " s"], classes: int) -> Int[np.ndarray, " s"] | None:
    """Return the fold in which each image is held out, or -1 for never, which is for classes of one image.

    The images of each class go round the k folds in the order that they come in, k being 5 or the smallest count of the
    classes that have at least two, if that is less. None where less than half of the classes have two: what is
    best for those would be said by few.
    """
    counts = np.bincount(labels, minlength=classes)
    several = counts >= 2
    if 2 * several.sum() < classes:
        return None
    order = np.argsort(labels, kind="stable")
    ranks = np.empty(len(labels), np.int64)
    ranks[order] = np.arange(len(labels)) - (np.cumsum(counts) - counts)[labels[order]]
    folds: np.ndarray = np.where(several[labels], ranks % min(_MOST_FOLDS, int(counts[several].min())), -1)
    return folds


def judged(folds: Int[np.ndarray, " s"]) -> Int[np.ndarray, " j"]:
    """Return which images to compare candidates on: those held out, or some thousands of them, evenly over the rest."""
    held_out = np.flatnonzero(folds >= 0)
    if len(held_out) <= _JUDGED:
        return held_out
    some: np.ndarray = held_out[np.linspace(0, len(held_out) - 1, _JUDGED).astype(np.int64)]
    return some


def tempered_loss(logits: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"]) -> tuple[float, float]:
    """Return the mean negative log-likelihood, in nats, at the temperature that makes it smallest, and that.

    The temperature is told as at least 0.5: a few images that are all told rightly would want any that is lower.

    The loss at temperature one would compare how overconfident candidates are, which a temperature can mend, more than
    how well they rank; the accuracy tells little of few images.
    """
    # The logits are taken relative to that of the true class, and the loss is convex in the inverse temperature.
    gaps = logits - np.take_along_axis(logits, labels[:, None], axis=1)
    low, high = -_HOTTEST, -_COLDEST
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _slope(gaps, 2**middle) > 0:
            high = middle
        else:
            low = middle
    inverse = 2 ** ((low + high) / 2)
    scaled = inverse * gaps
    largest = scaled.max(axis=1)
    loss = float((largest + np.log(np.exp(scaled - largest[:, None]).sum(axis=1))).mean())
    return loss, max(1 / inverse, _LEAST_TEMPERATURE)


def _slope(gaps: Float[np.ndarray, "n c"], inverse: float) -> float:
    scaled = inverse * gaps
    exponentials = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return float(((exponentials * gaps).sum(axis=1) / exponentials.sum(axis=1)).mean())


def first_best(losses: Sequence[float]) -> int:
    """Return the index of the candidate after which none is better by a thousandth of a nat."""
    best = 0
    for index, loss in enumerate(losses):
        if loss < losses[best] - _MATERIAL:
            best = index
    return best
