import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from app.adapters._cross_validation import compared_images, first_best, held_out_folds

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=60).map(np.array)


@given(LABELS)
def test_every_class_has_an_image_in_each_fold_and_is_held_out_evenly(labels):
    folds = held_out_folds(labels, 5)
    counts = np.bincount(labels, minlength=5)
    if folds is None:
        assert (counts >= 2).sum() < 2.5
        return
    fold_count = min(5, counts[counts >= 2].min())
    assert set(folds.tolist()) <= set(range(-1, fold_count))
    for label in np.unique(labels):
        held_out = folds[labels == label]
        if counts[label] == 1:
            assert held_out.tolist() == [-1]
        else:
            per_fold = np.bincount(held_out, minlength=fold_count)
            assert 1 <= per_fold.min() <= per_fold.max() <= per_fold.min() + 1
            assert per_fold.max() < counts[label]


def test_there_are_no_folds_if_fewer_than_half_of_the_classes_have_two_images():
    assert held_out_folds(np.array([0, 0, 0, 0, 1, 2]), 3) is None
    assert held_out_folds(np.array([0, 0, 1, 1, 2]), 3) is not None
    assert held_out_folds(np.array([0, 0, 1, 1]), 5) is None


def test_a_large_number_of_held_out_images_is_sampled_from_every_fold():
    folds = np.arange(100_000) % 5
    folds[::2] = -1
    some = compared_images(folds)
    assert len(np.unique(some)) == len(some) == 2048
    assert (folds[some] >= 0).all()
    assert some[0] < 10
    assert some[-1] > 99_990


def test_the_first_candidate_is_kept_unless_another_is_better_by_a_margin():
    assert first_best([1.0, 1.0, 0.9995]) == 0
    assert first_best([1.0, 0.9, 0.9, 0.95]) == 1
    assert first_best([1.0, 0.9, 0.5]) == 2
