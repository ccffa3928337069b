import numpy as np
import pytest

from app.names.hierarchy import forest_of
from app.scoring.hierarchy import descend, rolled_up
from app.types import ClassEntry
from tests.oracles import hierarchy as oracle


def path_of(forest, index):
    """Return the names from the root to a label."""
    above = [] if forest.parents[index] < 0 else path_of(forest, forest.parents[index])
    return [*above, forest.names[index]]


def problem(seed):
    """Return classes whose parents form a forest, some of them classes, and the parent of each label by name."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 12))
    parents = {"0": None}
    for number in range(1, count):
        parents[str(number)] = None if rng.random() < 0.3 else str(rng.integers(0, number))
    inner = set(parents.values())
    names = [label for label in parents if label not in inner or rng.random() < 0.4]
    used = {upper for label in names for upper in oracle.above(parents, label)}
    parents = {label: upper for label, upper in parents.items() if label in used}
    rng.shuffle(names)

    def path_above(label):
        return "|".join(reversed(oracle.above(parents, label)[1:])) or None

    return [ClassEntry(name, parent=path_above(name)) for name in names], parents, rng


@pytest.mark.parametrize("seed", range(200))
def test_scores_and_paths_are_those_of_the_definitions(seed):
    classes, parents, rng = problem(seed)
    forest = forest_of(classes)
    if forest is None:
        assert set(parents.values()) <= {None}
        return
    scores = rng.dirichlet(np.ones(len(classes)), 3)
    for independent in (False, True):
        labels = rolled_up(scores, forest.order, forest.starts, forest.ends, independent=independent)
        for row, own in zip(labels, scores, strict=True):
            by_name = {entry.name: score for entry, score in zip(classes, own.tolist(), strict=True)}
            expected = oracle.rolled_up(by_name, parents, independent)
            assert dict(zip(forest.names, row.tolist(), strict=True)) == pytest.approx(expected)
            for min_score in (0, 0.3, 0.6, 0.99):
                path = descend(row.tolist(), own.tolist(), forest.children, forest.roots, min_score)
                names = [forest.names[index] for index in path]
                assert names == oracle.path(by_name, parents, independent, min_score)
                assert not path or names == path_of(forest, path[-1])


def test_ten_thousand_levels_are_no_problem():
    count = 10_000
    classes = [ClassEntry(str(number), parent=str(number - 1) if number else None) for number in range(count)]
    forest = forest_of(classes)
    assert forest.parents == (-1, *range(count - 1))
    with pytest.raises(Exception, match="form a cycle: '0' is below '9999' is below '9998'"):
        forest_of([ClassEntry("0", parent=str(count - 1)), *classes[1:]])
