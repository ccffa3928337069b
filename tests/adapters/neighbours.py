"""Exact neighbours by brute force, and clustered features, for the tests of adapters that use neighbours."""

import numpy as np

from app.adapters._base import Examples, Neighbours


def nearest_others(rows, k):
    """Return the k nearest other rows of each row, or all if there are fewer."""
    cosines = rows @ rows.T
    np.fill_diagonal(cosines, -np.inf)
    return _largest(cosines, min(k, len(rows) - 1))


def nearest(queries, rows, k):
    """Return the k nearest rows of each query, or all if there are fewer."""
    return _largest(queries @ rows.T, min(k, len(rows)))


def pool_of(rows, k):
    """Return a pool with its neighbours; the arrays are read-only."""
    neighbours = nearest_others(rows, k)
    for array in (neighbours.indices, neighbours.cosines):
        array.flags.writeable = False
    return Examples(pool_features=rows, pool_neighbours=neighbours)


def clustered(rng, *, images, classes, dims, queries=0, noise=1.0, gap=1.0, dtype=np.float64):
    """Return text (c, d), images (u, d) and queries (n, d), read-only unit rows, and the classes of images and queries.

    Images are near the text of their class, shifted by ``gap`` times a direction of the class, and by random ``noise``.
    """
    text = _unit(rng.standard_normal((classes, dims)))
    centres = text + gap * _unit(rng.standard_normal((classes, dims)))
    labels = rng.permutation(np.arange(images + queries) % classes)
    rows = _unit(centres[labels] + noise * _unit(rng.standard_normal((images + queries, dims))))
    made = text.astype(dtype), rows[:images].astype(dtype), rows[images:].astype(dtype)
    for array in made:
        array.flags.writeable = False
    return *made, labels[:images], labels[images:]


def _unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _largest(cosines, k):
    indices = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return Neighbours(indices, np.take_along_axis(cosines, indices, axis=1))
