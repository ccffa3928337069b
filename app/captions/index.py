"""Search in the index of a caption database.

A flat index compares all rows. An inverted file of product codes finds candidates, and the exact cosines with their
stored features then decide.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from jaxtyping import Float16, Float32, Int

from app.captions.manifest import FLAT, IndexParameters
from app.errors import StoreError
from app.types import ImageFeatures, TextFeatures

# Candidates that an inverted file finds for each caption wanted, and the bounds of their number.
_CANDIDATES_PER_CAPTION = 8
_MIN_CANDIDATES = 400
_MAX_CANDIDATES = 2000


@dataclass(frozen=True, slots=True)
class Part:
    """The part ``number`` of ``of`` parts of a database; all parts are about equally large.

    A part is a range of captions. In an inverted file it is a range of whole lists.
    """

    number: int = 0
    of: int = 1

    def rows(self, count: int) -> range:
        """Return the part's rows of a database with ``count`` captions and no lists."""
        return range(count * self.number // self.of, count * (self.number + 1) // self.of)


WHOLE = Part()


class CaptionIndex:
    """Finds the nearest of n rows of features; searches may run in several threads.

    Args:
        index: the FAISS index.
        features: the rows, whose cosines decide among the candidates of an inverted file.
        probes: lists that a search reads; 0 for a flat index.
    """

    def __init__(self, index: Any, features: Float16[np.ndarray, "n d"], probes: int) -> None:
        self._index = index
        self._features = features
        self.probes = probes
        lists = range(index.nlist) if probes else ()
        self._list_sizes = np.array([index.invlists.list_size(number) for number in lists], np.int64)
        self._list_starts = np.cumsum(self._list_sizes) - self._list_sizes

    @classmethod
    def open(cls, file: Path, features: Float16[np.ndarray, "n d"], parameters: IndexParameters) -> Self:
        """Read an index; as much as possible is mapped into memory.

        Raises:
            StoreError: it is damaged, or does not belong to these rows.
        """
        import faiss  # noqa: PLC0415 - slow to import, and commands that do not search do without it

        is_flat = parameters.kind == FLAT
        # FAISS maps an inverted file with the one flag, and a flat index, since 1.10, with the other.
        flags = getattr(faiss, "IO_FLAG_MMAP_IFC", 0) if is_flat else faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY
        try:
            index: Any = faiss.read_index(str(file), flags)
        except (RuntimeError, MemoryError) as error:
            raise StoreError(f"the index '{file}' cannot be read; build the database again") from error
        if (index.ntotal, index.d) != features.shape or hasattr(index, "nprobe") is is_flat:
            problem = f"the index '{file}' has {index.ntotal} rows of {index.d}, but the features are {features.shape}"
            raise StoreError(f"{problem}; build the database again")
        if not is_flat:
            lists: Any = faiss.downcast_InvertedLists(index.invlists)
            # The default starts up to 32 threads per search, which read ahead.
            lists.prefetch_nthread = 0
        return cls(index, features, parameters.probes)

    def search(
        self, queries: ImageFeatures | TextFeatures, k: int, part: Part = WHOLE
    ) -> tuple[Int[np.ndarray, "q m"], Float32[np.ndarray, "q m"]]:
        """Return the indices and cosines of the m = min(k, n) nearest of the n rows of a part, the nearest first.

        Where the probed lists of a part have fewer than m rows, the result is filled with index -1 and cosine -1.
        """
        import faiss  # noqa: PLC0415 - as above

        rows = np.ascontiguousarray(np.nan_to_num(queries, posinf=0, neginf=0), np.float32)
        part_rows = part.rows(len(self._features))
        lists = self._lists(part)
        count = int(self._list_sizes[lists.start : lists.stop].sum()) if self.probes else len(part_rows)
        wanted = min(k, count)
        if not len(rows) or not wanted:
            return np.empty((len(rows), wanted), np.int64), np.empty((len(rows), wanted), np.float32)
        # For this thread only: requests need the other cores, and one search is too short to be shared.
        faiss.omp_set_num_threads(1)
        if not self.probes:
            selector: Any = None if part == WHOLE else faiss.IDSelectorRange(part_rows.start, part_rows.stop)
            parameters: Any = faiss.SearchParameters
            cosines, indices = self._index.search(rows, wanted, params=parameters(sel=selector))
            return indices, cosines
        # Where many captions are wanted, as many candidates are enough; only the last captions may then be inexact.
        candidates = max(min(_CANDIDATES_PER_CAPTION * wanted, _MAX_CANDIDATES), wanted, _MIN_CANDIDATES)
        found = self._candidates(rows, min(candidates, count), min(k, len(self._features)), lists)
        return self._nearest(rows, found, wanted)

    def _lists(self, part: Part) -> range:
        """Return the lists of a part: those whose first row is in the part's range of rows."""
        part_rows = part.rows(len(self._features))
        start, stop = np.searchsorted(self._list_starts, [part_rows.start, part_rows.stop]).tolist()
        return range(start, len(self._list_sizes) if part.number + 1 == part.of else stop)

    def _candidates(
        self, rows: Float32[np.ndarray, "q d"], count: int, min_rows: int, lists: range
    ) -> Int[np.ndarray, "q c"]:
        """Return the rows with the nearest codes in ``lists``, out of the lists that a search of the whole probes.

        A query whose probed lists have fewer than ``min_rows`` rows in all reads every list. Searches of the other
        parts decide the same, so that the parts together give the result of the whole.
        """
        import faiss  # noqa: PLC0415 - as above

        closeness, probed = self._index.quantizer.search(rows, self.probes)
        too_few = self._list_sizes[probed].sum(axis=1) < min_rows
        probed[(probed < lists.start) | (probed >= lists.stop)] = -1
        self._index.nprobe = self.probes  # FAISS requires the number of lists that are passed to it
        found: np.ndarray = self._index.search_preassigned(rows, count, probed, closeness)[1]
        if too_few.any():
            ivf_parameters: Any = faiss.SearchParametersIVF
            parameters: Any = faiss.SearchParameters
            selector = parameters(sel=faiss.IDSelectorRange(lists.start, lists.stop))
            all_lists = ivf_parameters(nprobe=len(lists), quantizer_params=selector)
            found[too_few] = self._index.search(rows[too_few], count, params=all_lists)[1]
        return found

    @property
    def nbytes_resident(self) -> int:
        """About how many bytes are always in memory; mapped files are not counted."""
        import faiss  # noqa: PLC0415 - as above

        count, dims = self._features.shape
        if not self.probes:
            return 0 if hasattr(faiss, "IO_FLAG_MMAP_IFC") else 2 * count * dims
        return int(4 * dims * (self._index.nlist + 256))  # the centroids of the lists and of the codes

    def _nearest(self, queries: np.ndarray, found: np.ndarray, wanted: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the candidates with the largest exact cosines."""
        indices = np.full((len(queries), wanted), -1, np.int64)
        cosines = np.full((len(queries), wanted), -1, np.float32)
        for number, (query, candidates) in enumerate(zip(queries, found, strict=True)):
            rows = np.sort(candidates[candidates >= 0])  # the disk is then read in one direction
            exact = self._features[rows].astype(np.float32) @ query
            best = np.argsort(-exact, kind="stable")[:wanted]
            indices[number, : len(best)], cosines[number, : len(best)] = rows[best], exact[best]
        return indices, cosines
