"""Labels with almost equal text features are named in a warning."""

import numpy as np
import pytest

from app.classification.classifiers import _indistinct_labels
from app.fewshot.fitting import ClassNames
from app.types import ClassEntry, Task


def _at(*degrees):
    """Return unit rows (r, 8) at these angles; 14.1 degrees are a cosine of 0.97."""
    rows = np.zeros((len(degrees), 8), np.float32)
    rows[:, 0], rows[:, 1] = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return rows


def _warnings(rows, first_rows=None):
    first_rows = np.arange(len(rows)) if first_rows is None else np.array(first_rows)
    task = Task("fake", "zero-shot", tuple(ClassEntry(f"c{index}") for index in range(len(first_rows))), (), 5)
    return _indistinct_labels(task, ClassNames(rows, first_rows))


@pytest.mark.parametrize(
    ("degrees", "shown"),
    [
        ((0, 90), None),
        ((0, 15), None),
        ((0, 13), "'c0', 'c1'"),
        ((0, 90, 10), "'c0', 'c2'"),
        ((0, 2, 90, 4), "'c0', 'c1', 'c3'"),
        ((0, 90, 1, 91), "'c0', 'c2' and 'c1', 'c3'"),
        ((0, 1, 30, 31, 60, 61, 90, 91, 120, 121), "'c0', 'c1' and 'c2', 'c3' and 'c4', 'c5', and 2 more groups"),
        ([0] * 9, "'c0', 'c1', 'c2', 'c3', 'c4', 'c5' and 3 more"),
    ],
)
def test_labels_with_a_cosine_above_097_are_listed_in_groups(degrees, shown):
    warnings = _warnings(_at(*degrees))
    if shown is None:
        assert warnings == ()
    else:
        (warning,) = warnings
        assert f"almost equal: {shown}; they may" in warning


def test_names_of_one_class_may_be_alike():
    assert _warnings(_at(0, 1, 90), first_rows=[0, 2]) == ()
    assert "'c0', 'c1'" in _warnings(_at(0, 90, 91), first_rows=[0, 2])[0]


def test_among_many_labels_only_equal_ones_are_found():
    rows = np.random.default_rng(0).standard_normal((3000, 8)).astype(np.float32)
    rows[2900] = rows[17] * 2
    rows[2901] = rows[18] + 0.01
    (warning,) = _warnings(rows)
    assert "almost equal: 'c17', 'c2900'; " in warning


def test_labels_of_a_method_that_weighs_prompts_are_compared_by_their_means():
    rows = np.stack([_at(0, 90, 1), _at(20, 70, 21)], axis=1)
    assert "almost equal: 'c0', 'c2'; " in _warnings(rows)[0]
