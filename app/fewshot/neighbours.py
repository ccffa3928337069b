"""Nearest neighbours among the images of a pool, found with FAISS."""

from typing import Any

import numpy as np

from app.adapters._base import Neighbours
from app.runtime.turns import give_way
from app.types import ImageFeatures

EXACT_UP_TO = 30_000
"""Number of rows up to which the search is exact; larger pools use an inverted file."""

# Lists of an inverted file per square root of its rows, rows per list for training its centroids, and lists that a
# search reads.
_LISTS = 2
_TRAINED_ON = 50
_PROBES = 24
_QUERIES_AT_ONCE = 1024


class NeighbourIndex:
    """Finds the images of a pool that are nearest by cosine.

    Up to ``EXACT_UP_TO`` rows the search is exact. A larger pool is stored in half precision in an inverted file; a
    search reads the nearest lists, so it may miss a neighbour. Searches may run in several threads.

    Args:
        features: unit rows (u, d), copied; values that are not finite count as zero, here and in queries.
    """

    def __init__(self, features: ImageFeatures) -> None:
        import faiss  # noqa: PLC0415 - slow to import, and most commands do not search

        count, dims = features.shape
        rows = _finite(features)
        self._index: Any
        if count <= EXACT_UP_TO:
            self._index = faiss.IndexFlatIP(dims)
        else:
            lists = int(_LISTS * count**0.5)
            self._quantizer = faiss.IndexFlatIP(dims)
            self._index = faiss.IndexIVFScalarQuantizer(
                self._quantizer, dims, lists, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
            )
            step = max(1, count // (lists * _TRAINED_ON))
            self._index.train(np.ascontiguousarray(rows[::step]))
            self._index.nprobe = _PROBES
        self._index.add(rows)

    def __len__(self) -> int:
        """Number of images."""
        return int(self._index.ntotal)

    @property
    def nbytes(self) -> int:
        """Approximate memory of the rows."""
        exact = len(self) <= EXACT_UP_TO
        return int(len(self) * self._index.d * (4 if exact else 2))

    def search(self, queries: ImageFeatures, k: int) -> Neighbours:
        """Return the min(k, u) nearest images of each query (n, d), nearest first."""
        cosines, indices = self._index.search(_finite(queries), min(k, len(self)))
        if not self._searches_all:
            cosines, indices = _completed(cosines, indices)
        return Neighbours(indices, cosines)

    def within_pool(self, features: ImageFeatures, k: int) -> Neighbours:
        """Return the min(k, u - 1) nearest other images of each image of the pool.

        Args:
            features: the rows that the index was built from, (u, d).
            k: number of neighbours.
        """
        count = len(self)
        wanted = min(k, count - 1)
        indices = np.empty((count, wanted), np.int64)
        cosines = np.empty((count, wanted), np.float32)
        for first in range(0, count, _QUERIES_AT_ONCE):
            give_way()
            batch = slice(first, first + _QUERIES_AT_ONCE)
            found = self.search(features[batch], wanted + 1)
            own = np.arange(first, first + len(found.indices))
            # The image itself, or the farthest neighbour if the image was not found, goes last and is cut off.
            last = found.indices == own[:, None]
            last[~last.any(axis=1), -1] = True
            order = np.argsort(last, axis=1, kind="stable")[:, :wanted]
            indices[batch] = np.take_along_axis(found.indices, order, axis=1)
            cosines[batch] = np.take_along_axis(found.cosines, order, axis=1)
        return Neighbours(indices, cosines)

    @property
    def _searches_all(self) -> bool:
        return len(self) <= EXACT_UP_TO


def _finite(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.nan_to_num(rows, posinf=0, neginf=0), np.float32)


def _completed(cosines: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fill the places for which a search found no row with the nearest row, at a cosine of 0."""
    missing = indices < 0
    if not missing.any():
        return cosines, indices
    return np.where(missing, np.float32(0), cosines), np.where(missing, np.maximum(indices[:, :1], 0), indices)


def use_one_thread() -> None:
    """Limit the searches of this thread to one core."""
    import faiss  # noqa: PLC0415 - as above

    faiss.omp_set_num_threads(1)
