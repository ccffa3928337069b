"""Three measures of vocabulary-free labels: Conti et al., NeurIPS 2023."""

from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment

from app.errors import InvalidFieldError
from app.scoring.numerics import unit_rows


def cluster_accuracy(predicted: Sequence[Hashable], truth: Sequence[Hashable]) -> float:
    """Return the share of images that are right under the best matching of predicted labels with classes.

    The images with one predicted label are a cluster, whatever the label says. The Hungarian algorithm matches each
    cluster with at most one class, and each class with at most one cluster; the images of unmatched clusters are wrong.
    The result is in (0, 1], because at least one image is right.

    Raises:
        InvalidFieldError: there are no images.
        ValueError: the two sequences differ in length.
    """
    _check(len(predicted), len(truth))
    clusters = {name: index for index, name in enumerate(dict.fromkeys(predicted))}
    classes = {name: index for index, name in enumerate(dict.fromkeys(truth))}
    together = np.zeros((len(clusters), len(classes)), np.int64)
    np.add.at(together, ([clusters[name] for name in predicted], [classes[name] for name in truth]), 1)
    rows, columns = linear_sum_assignment(together, maximize=True)
    return int(together[rows, columns].sum()) / len(truth)


def semantic_similarity(predicted_features: Float[np.ndarray, "n d"], true_features: Float[np.ndarray, "n d"]) -> float:
    """Return the mean cosine between text features of the predicted and of the true label, in [-1, 1].

    The paper takes the features of a sentence encoder (Sentence-BERT). Those of another text tower give numbers that
    can only be compared with each other. Rows need not be unit rows; a row of zeros has the cosine 0 with every row.

    Raises:
        InvalidFieldError: there are no images.
        ValueError: the shapes differ.
    """
    _check(len(predicted_features), len(true_features))
    if predicted_features.shape != true_features.shape:
        raise ValueError(f"features of shape {predicted_features.shape} and of shape {true_features.shape}")
    ours, true = np.asarray(predicted_features, np.float64), np.asarray(true_features, np.float64)
    cosines = (unit_rows(ours) * unit_rows(true)).sum(axis=1)
    return float(cosines.clip(-1, 1).mean())


def semantic_iou(predicted: Sequence[str], truth: Sequence[str]) -> float:
    """Return the mean intersection over union of the words of the predicted and of the true label, in [0, 1].

    Words are in lower case and without punctuation: "Labrador" and "labrador retriever" give one half, and "t-shirt"
    is the one word "tshirt". Two labels without any word give 0.

    Raises:
        InvalidFieldError: there are no images.
        ValueError: the two sequences differ in length.
    """
    _check(len(predicted), len(truth))
    pairs = [(_word_set(ours), _word_set(true)) for ours, true in zip(predicted, truth, strict=True)]
    return sum(len(ours & true) / max(len(ours | true), 1) for ours, true in pairs) / len(pairs)


def _check(predicted: int, truth: int) -> None:
    if predicted != truth:
        raise ValueError(f"{predicted} predicted labels for {truth} true ones")
    if not truth:
        raise InvalidFieldError.of("labels", "there are no labelled images to evaluate; give at least one")


def _word_set(label: str) -> set[str]:
    return set("".join(character for character in label if character.isalnum() or character == " ").lower().split())
