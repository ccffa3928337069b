"""Hierarchies: the scores of classes are added up to those of the labels above them, and an image gets a path.

A label above others has the probability that one of the classes at or below it fits: their sum if each image belongs to
one class, and their maximum, which is a lower bound, if the scores are independent. The path descends from the best
root to the best label below, as hierarchical classifiers do (Silla and Freitas, "A survey of hierarchical
classification across different application domains", Data Mining and Knowledge Discovery 2011, section 3.2).
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


def rolled_up(
    scores: Float[np.ndarray, "n c"],
    order: Sequence[int],
    starts: Sequence[int],
    ends: Sequence[int],
    *,
    independent: bool,
) -> Float[np.ndarray, "n l"]:
    """Return the score of each label (n, l), in [0, 1].

    Args:
        scores: of the classes.
        order: of the classes, so that those of each label are neighbours.
        starts: of each label, the place of its first class in the order.
        ends: of each label, the place behind its last class.
        independent: whether an image may belong to several classes.
    """
    padded = np.zeros((len(scores), len(order) + 1), scores.dtype)  # behind the last class
    padded[:, :-1] = scores[:, list(order)]
    places = np.stack([starts, ends], axis=1).ravel()
    combine = np.maximum if independent else np.add
    rolled: np.ndarray = combine.reduceat(padded, places, axis=1)[:, ::2]
    return rolled.clip(0, 1)


def descend(
    labels: Sequence[float],
    classes: Sequence[float],
    children: Sequence[Sequence[int]],
    roots: Sequence[int],
    min_score: float,
) -> list[int]:
    """Return the labels from a root to where the path stops; empty if no root has ``min_score``.

    Args:
        labels: the score of each label, of which the first are the classes.
        classes: the own score of each class.
        children: the labels below each label.
        roots: the labels below none.
        min_score: the path ends before a label with a lower score, and at a class that fits better than each of the
            labels below it.
    """
    path: list[int] = []
    below = roots
    while below:
        best = max(below, key=labels.__getitem__)
        is_better_itself = bool(path) and path[-1] < len(classes) and classes[path[-1]] > labels[best]
        if labels[best] < min_score or is_better_itself:
            break
        path.append(best)
        below = children[best]
    return path
