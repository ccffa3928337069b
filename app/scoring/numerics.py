"""The array operations that several packages share: softmax, unit rows, and stratified folds.

Results have the precision of the arguments, except where a function says otherwise.
"""

from math import isfinite

import numpy as np
from jaxtyping import Float, Int


def softmax(logits: Float[np.ndarray, "*n c"], *, out: np.ndarray | None = None) -> Float[np.ndarray, "*n c"]:
    """Return probabilities that sum to 1 over the last axis.

    Args:
        logits: of any size; the largest of each row is subtracted before the exponential.
        out: the array to write to, of the same shape and type; it may be ``logits`` itself.
    """
    shares: np.ndarray = np.subtract(logits, logits.max(axis=-1, keepdims=True), out=out)
    np.exp(shares, out=shares)
    shares /= shares.sum(axis=-1, keepdims=True)
    return shares


def log_softmax(logits: Float[np.ndarray, "*n c"]) -> Float[np.ndarray, "*n c"]:
    """Return the logarithms of ``softmax(logits)``, also of probabilities that are too small to be represented."""
    falls = logits - logits.max(axis=-1, keepdims=True)
    logs: np.ndarray = falls - np.log(np.exp(falls).sum(axis=-1, keepdims=True))
    return logs


def log_sum_exp(logits: Float[np.ndarray, "*n c"]) -> Float[np.ndarray, "*n"]:
    """Return the logarithm of the sum of the exponentials over the last axis, for logits of any size."""
    largest = logits.max(axis=-1)
    sums: np.ndarray = largest + np.log(np.exp(logits - largest[..., None]).sum(axis=-1))
    return sums


def tempered_softmax(logits: Float[np.ndarray, "n c"], temperature: float) -> Float[np.ndarray, "n c"]:
    """Return ``softmax(logits / temperature)`` in float64. The bias of a sigmoid model has no effect.

    Raises:
        ValueError: the temperature is not finite or not above 0.
    """
    validate_temperature(temperature)
    return softmax(np.asarray(logits, np.float64) / temperature)


def validate_temperature(temperature: float) -> None:
    """Raise ``ValueError`` unless the temperature is finite and above 0."""
    if not (isfinite(temperature) and temperature > 0):
        raise ValueError(f"a temperature of {temperature}; it must be finite and above 0")


def unit_rows(rows: Float[np.ndarray, "*n d"]) -> Float[np.ndarray, "*n d"]:
    """Return the rows divided by their lengths; rows of zeros stay zero."""
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    unit: np.ndarray = rows / np.where(lengths > 0, lengths, 1)
    return unit


def stratified_folds(labels: Int[np.ndarray, " n"], max_folds: int, *, restart: bool = False) -> Int[np.ndarray, " n"]:
    """Return a fold number for each image, so that every fold has about as many images of each class.

    The images of a class are dealt to the folds in their order, which makes the folds of equal inputs equal. There are
    ``max_folds`` folds, or as many as the largest class has images if that is less.

    Args:
        labels: the class index of each image.
        max_folds: at least 1.
        restart: deal each class from fold 0 on. By default a class continues after the last fold of the class before,
            which also makes the folds of equal size.
    """
    if not len(labels):
        return np.zeros(0, np.int64)
    counts = np.bincount(labels)
    order = np.argsort(labels, kind="stable")
    turns = np.arange(len(labels))
    if restart:
        turns -= (np.cumsum(counts) - counts)[labels[order]]
    folds = np.empty(len(labels), np.int64)
    folds[order] = turns % max(1, min(max_folds, int(counts.max())))
    return folds
