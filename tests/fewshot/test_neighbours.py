import numpy as np
import pytest

from app.fewshot import neighbours
from app.fewshot.neighbours import NeighbourIndex


def unit_rows(count, dims=16, seed=0):
    rows = np.random.default_rng(seed).standard_normal((count, dims)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_the_nearest_come_first_with_their_cosines():
    pool, queries = unit_rows(50), unit_rows(7, seed=1)
    found = NeighbourIndex(pool).search(queries, 5)
    cosines = queries @ pool.T
    order = np.argsort(-cosines, axis=1)[:, :5]
    np.testing.assert_array_equal(found.indices, order)
    np.testing.assert_allclose(found.cosines, np.take_along_axis(cosines, order, axis=1), atol=1e-6)


def test_more_neighbours_than_images_returns_all_images():
    found = NeighbourIndex(unit_rows(3)).search(unit_rows(2, seed=1), 10)
    assert found.indices.shape == (2, 3)
    assert NeighbourIndex(unit_rows(3)).within_pool(unit_rows(3), 10).indices.shape == (3, 2)


def test_an_image_is_not_its_own_neighbour_even_among_duplicates():
    pool = np.concatenate([unit_rows(4), unit_rows(4)[[0, 0, 0]], unit_rows(1500, seed=2)])
    found = NeighbourIndex(pool).within_pool(pool, 3)
    assert not (found.indices == np.arange(len(pool))[:, None]).any()
    assert set(found.indices[0]) == {4, 5, 6}
    cosines = pool @ pool.T
    np.fill_diagonal(cosines, -2)
    np.testing.assert_allclose(found.cosines, -np.sort(-cosines, axis=1)[:, :3], atol=1e-6)


def test_a_single_image_has_no_neighbours():
    assert NeighbourIndex(unit_rows(1)).within_pool(unit_rows(1), 4).indices.shape == (1, 0)


@pytest.fixture
def in_lists(monkeypatch):
    """Use an inexact index for pools of more than a hundred images."""
    monkeypatch.setattr(neighbours, "EXACT_UP_TO", 100)


def clustered(count, seed=0):
    centres = unit_rows(20, 32, seed=3)
    rng = np.random.default_rng(seed)
    rows = centres[rng.integers(0, 20, count)] + 0.05 * rng.standard_normal((count, 32)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_an_inexact_index_finds_nearly_all_near_images(in_lists):
    pool, queries = clustered(4000), clustered(200, seed=1)
    index = NeighbourIndex(pool)
    found = index.search(queries, 10)
    nearest = np.argsort(-(queries @ pool.T), axis=1)[:, :10]
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.indices, nearest, strict=True)])
    assert recall >= 0.95
    assert index.nbytes == pool.nbytes // 2


def test_missing_neighbours_have_no_weight(in_lists):
    pool = clustered(150)
    found = NeighbourIndex(pool).search(-pool[:3], 150)
    assert found.indices.shape == (3, 150)
    assert (found.indices >= 0).all()
    assert np.isfinite(found.cosines).all()
