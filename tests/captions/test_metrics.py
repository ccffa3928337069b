from itertools import permutations

import numpy as np
import pytest

from app.captions.metrics import cluster_accuracy, semantic_iou, semantic_similarity
from app.errors import InvalidFieldError


def slow_cluster_accuracy(predicted, truth):
    """Return the best accuracy over all assignments of names to classes."""
    clusters, classes = sorted(set(predicted)), sorted(set(truth))
    classes += [None] * max(0, len(clusters) - len(classes))
    return max(
        sum(dict(zip(clusters, match, strict=False))[name] == true for name, true in zip(predicted, truth, strict=True))
        for match in permutations(classes, len(clusters))
    ) / len(truth)


def test_cluster_accuracy_equals_the_best_assignment():
    for seed in range(100):
        rng = np.random.default_rng(seed)
        images = rng.integers(1, 15)
        predicted = rng.integers(0, rng.integers(1, 6), images).tolist()
        truth = rng.integers(0, rng.integers(1, 6), images).tolist()
        assert cluster_accuracy(predicted, truth) == pytest.approx(slow_cluster_accuracy(predicted, truth))


def test_cluster_accuracy_does_not_depend_on_names():
    assert cluster_accuracy(["hound", "hound", "feline"], ["dog", "dog", "cat"]) == 1
    assert cluster_accuracy(["cat", "cat", "dog"], ["dog", "dog", "cat"]) == 1


def test_images_of_surplus_clusters_are_wrong():
    assert cluster_accuracy(["beagle", "poodle", "cat", "cat"], ["dog", "dog", "cat", "cat"]) == 0.75
    assert cluster_accuracy(["a", "b", "c", "d"], ["dog"] * 4) == 0.25


def test_surplus_classes_are_missed():
    assert cluster_accuracy(["animal"] * 5, ["dog", "dog", "dog", "cat", "bird"]) == 0.6


def test_cluster_accuracy_is_at_least_the_share_of_the_largest_pair():
    for seed in range(100):
        rng = np.random.default_rng(seed)
        predicted, truth = rng.integers(0, 8, 30), rng.integers(0, 5, 30)
        pairs = np.unique(np.stack([predicted, truth], axis=1), axis=0, return_counts=True)[1]
        assert pairs.max() / 30 <= cluster_accuracy(predicted.tolist(), truth.tolist()) <= 1


@pytest.mark.parametrize(
    ("predicted", "true", "share"),
    [
        ("dog", "dog", 1.0),
        ("Dog", "dog", 1.0),
        ("labrador", "labrador retriever", 1 / 2),
        ("red sports car", "sports car", 2 / 3),
        ("golden retriever", "labrador retriever", 1 / 3),
        ("dog dog", "dog", 1.0),
        ("t-shirt", "tshirt", 1.0),
        ("dog", "cat", 0.0),
        ("café", "Café!", 1.0),
        ("", "dog", 0.0),
        ("!", "", 0.0),
    ],
)
def test_shared_words_of_two_names_are_counted(predicted, true, share):
    assert semantic_iou([predicted], [true]) == pytest.approx(share)
    assert semantic_iou([true], [predicted]) == pytest.approx(share)


def test_word_shares_are_averaged_over_images():
    assert semantic_iou(["dog", "cat", "sports car"], ["dog", "dog", "car"]) == pytest.approx(0.5)


def test_similarity_is_the_mean_cosine_for_rows_of_any_length():
    rng = np.random.default_rng(0)
    ours, true = rng.normal(size=(2, 20, 8))
    cosines = [one @ other / np.linalg.norm(one) / np.linalg.norm(other) for one, other in zip(ours, true, strict=True)]
    assert semantic_similarity(ours, true) == pytest.approx(np.mean(cosines))
    assert semantic_similarity(3 * ours, 0.1 * true) == pytest.approx(np.mean(cosines))


def test_similarity_is_between_minus_one_and_one():
    rows = np.random.default_rng(1).normal(size=(20, 8)).astype(np.float32)
    assert semantic_similarity(rows, rows) == pytest.approx(1)
    assert semantic_similarity(rows, -rows) == pytest.approx(-1)
    assert semantic_similarity(rows, rows) <= 1


def test_a_name_with_zero_features_has_similarity_zero():
    assert semantic_similarity(np.array([[0.0, 0.0], [0.0, 1.0]]), np.array([[1.0, 0.0], [0.0, 1.0]])) == 0.5


@pytest.mark.parametrize("measure", [cluster_accuracy, semantic_iou, semantic_similarity])
def test_no_images_are_rejected(measure):
    nothing = np.zeros((0, 2)) if measure is semantic_similarity else []
    with pytest.raises(InvalidFieldError, match="give at least one"):
        measure(nothing, nothing)


@pytest.mark.parametrize("measure", [cluster_accuracy, semantic_iou, semantic_similarity])
def test_names_and_classes_must_have_the_same_number(measure):
    one, two = (np.ones((1, 2)), np.ones((2, 2))) if measure is semantic_similarity else (["a"], ["a", "b"])
    with pytest.raises(ValueError, match="1 predicted labels for 2 true ones"):
        measure(one, two)


def test_features_of_different_dimensions_are_rejected():
    with pytest.raises(ValueError, match="shape"):
        semantic_similarity(np.ones((2, 3)), np.ones((2, 4)))
