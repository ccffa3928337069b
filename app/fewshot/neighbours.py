"""The images of a pool that are nearest to others, by FAISS."""

from typing import Any

import numpy as np

from app.adapters._base import Neighbours
from app.types import ImageFeatures

EXACT_UP_TO = 30_000
"""Rows up to which every cosine is taken; above, an inverted file is searched in part."""

# Lists of an inverted file per square root of its rows, rows per list that its centroids are learned from, and the
# lists that a search reads.
_LISTS = 2
_TRAINED_ON = 50
_PROBES = 24
_QUERIES_AT_ONCE = 1024


class NeighbourIndex:
    """Finds the images of a pool that are nearest by cosine.

    Up to ``EXACT_UP_TO`` rows the search is exact. Larger pools are kept in half precision in an inverted file, of
    which the nearest lists are read, so that a near image may be missed. Searches may run in several threads.

    Args:
        features: unit rows (u, d), copied; what is not finite in them counts as zero, here as in queries.
    """

    def __init__(self, features: ImageFeatures) -> None:
        import faiss  # noqa: PLC0415 - commands that search nothing do not wait for it

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
        """How many images there are."""
        return int(self._index.ntotal)

    @property
    def nbytes(self) -> int:
        """About how much memory the rows take."""
        exact = len(self) <= EXACT_UP_TO
        return int(len(self) * self._index.d * (4 if exact else 2))

    def search(self, queries: ImageFeatures, k: int) -> Neighbours:
        """Return the min(k, u) nearest of each query (n, d), the nearest first."""
        wanted = min(k, len(self))
        cosines, indices = self._index.search(_finite(queries), wanted)
        if not self._searches_all:
            cosines, indices = _completed(cosines, indices)
        return Neighbours(indices, cosines)

    def among_themselves(self, features: ImageFeatures, k: int) -> Neighbours:
        """Return the min(k, u - 1) nearest of each image of the pool among the others.

        Args:
            features: the rows that the index was made of, (u, d).
            k: how many.
        """
        count = len(self)
        wanted = min(k, count - 1)
        indices = np.empty((count, wanted), np.int64)
        cosines = np.empty((count, wanted), np.float32)
        for first in range(0, count, _QUERIES_AT_ONCE):
            some = slice(first, first + _QUERIES_AT_ONCE)
            found = self.search(features[some], wanted + 1)
            own = np.arange(first, first + len(found.indices))
            # Itself, or where it was not found the farthest, is put last and cut off; the others keep their order.
            last = found.indices == own[:, None]
            last[~last.any(axis=1), -1] = True
            order = np.argsort(last, axis=1, kind="stable")[:, :wanted]
            indices[some] = np.take_along_axis(found.indices, order, axis=1)
            cosines[some] = np.take_along_axis(found.cosines, order, axis=1)
        return Neighbours(indices, cosines)

    @property
    def _searches_all(self) -> bool:
        return len(self) <= EXACT_UP_TO


def _finite(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.nan_to_num(rows, posinf=0, neginf=0), np.float32)


def _completed(cosines: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fill places for which the lists that were read had no row with the first one found, at no weight."""
    missing = indices < 0
    if not missing.any():
        return cosines, indices
    return np.where(missing, np.float32(0), cosines), np.where(missing, np.maximum(indices[:, :1], 0), indices)


def use_one_thread() -> None:
    """Let searches that this thread begins stay on its own core."""
    import faiss  # noqa: PLC0415 - as above

    faiss.omp_set_num_threads(1)
