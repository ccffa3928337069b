"""Choose hyperparameters by cross-validation on the few labelled images that there are."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from app.scoring.numerics import stratified_folds

_MAX_FOLDS = 5
# Held-out images on which candidates are compared. More images hardly change the choice, and cost time per candidate.
_MAX_COMPARED = 2048
# Improvements of the loss, in nats, below which the earlier candidate is kept.
_MIN_IMPROVEMENT = 1e-3


def held_out_folds(labels: Int[np.ndarray, " s"], classes: int) -> Int[np.ndarray, " s"] | None:
    """Return the fold in which each image is held out, -1 for the image of a class that has only one.

    There are 5 folds, or as many as the smallest class of at least two images has, if that is less. So every such class
    has images outside each fold. None if fewer than half of the classes have two images: too few classes would decide.
    """
    counts = np.bincount(labels, minlength=classes)
    several = counts >= 2
    if 2 * several.sum() < classes:
        return None
    folds = np.full(len(labels), -1)
    eligible = several[labels]
    folds[eligible] = stratified_folds(labels[eligible], min(_MAX_FOLDS, int(counts[several].min())), restart=True)
    return folds


def compared_images(folds: Int[np.ndarray, " s"]) -> Int[np.ndarray, " j"]:
    """Return the images to compare candidates on: all that are held out, or about 2,000 of them, evenly spaced."""
    held_out = np.flatnonzero(folds >= 0)
    if len(held_out) <= _MAX_COMPARED:
        return held_out
    spaced: np.ndarray = held_out[np.linspace(0, len(held_out) - 1, _MAX_COMPARED).astype(np.int64)]
    return spaced


def first_best(losses: Sequence[float]) -> int:
    """Return the index of the best candidate, where a later one must improve on an earlier one by 0.001 nats."""
    best = 0
    for index, loss in enumerate(losses):
        if loss < losses[best] - _MIN_IMPROVEMENT:
            best = index
    return best
