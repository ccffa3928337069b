"""How good names are that nobody gave a list for: three measures of Conti et al., NeurIPS 2023."""

from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment

from app.errors import InvalidFieldError
from app.scoring.numerics import unit_rows


def cluster_accuracy(predicted: Sequence[Hashable], truth: Sequence[Hashable]) -> float:
    """Return the share of images that are right when names are matched with classes as well as they can be.

    Images of one predicted name are a cluster, whatever the name says. Each cluster is matched with at most one class
    and each class with at most one cluster, by the Hungarian algorithm; images of clusters that are left over, where
    there are more of them than classes, are wrong. In [0, 1], and above 0 always: some match is right.

    Raises:
        InvalidFieldError: no images.
        ValueError: not as many names as classes.
    """
    _check(len(predicted), len(truth))
    clusters = {name: index for index, name in enumerate(dict.fromkeys(predicted))}
    classes = {name: index for index, name in enumerate(dict.fromkeys(truth))}
    together = np.zeros((len(clusters), len(classes)), np.int64)
    np.add.at(together, ([clusters[name] for name in predicted], [classes[name] for name in truth]), 1)
    rows, columns = linear_sum_assignment(together, maximize=True)
    return int(together[rows, columns].sum()) / len(truth)


def semantic_similarity(predicted_features: Float[np.ndarray, "n d"], true_features: Float[np.ndarray, "n d"]) -> float:
    """Return the mean cosine between text features of the predicted and of the true name, in [-1, 1].

    The paper takes those of a sentence encoder (Sentence-BERT); an encoder's own text tower gives other numbers, which
    compare only with each other. Rows need not be unit; a row of zeros has the cosine 0 with everything.

    Raises:
        InvalidFieldError: no images.
        ValueError: shapes that differ.
    """
    _check(len(predicted_features), len(true_features))
    if predicted_features.shape != true_features.shape:
        raise ValueError(f"features of shape {predicted_features.shape} and of shape {true_features.shape}")
    ours, true = np.asarray(predicted_features, np.float64), np.asarray(true_features, np.float64)
    cosines = (unit_rows(ours) * unit_rows(true)).sum(axis=1)
    return float(cosines.clip(-1, 1).mean())


def semantic_iou(predicted: Sequence[str], truth: Sequence[str]) -> float:
    """Return the mean share of words that the predicted and the true name have in common, in [0, 1].

    Intersection over union of the sets of words, lower case and without punctuation, so that "Labrador" against
    "labrador retriever" is one half, and "t-shirt" is the one word "tshirt". 0 for two names without any word.

    Raises:
        InvalidFieldError: no images.
        ValueError: not as many names as classes.
    """
    _check(len(predicted), len(truth))
    pairs = [(_word_set(ours), _word_set(true)) for ours, true in zip(predicted, truth, strict=True)]
    return sum(len(ours & true) / max(len(ours | true), 1) for ours, true in pairs) / len(pairs)


def _check(predicted: int, truth: int) -> None:
    if predicted != truth:
        raise ValueError(f"{predicted} predicted names for {truth} true ones")
    if not truth:
        raise InvalidFieldError.of("labels", "there are no labelled images to evaluate; give at least one")


def _word_set(name: str) -> set[str]:
    return set("".join(each for each in name if each.isalnum() or each == " ").lower().split())
