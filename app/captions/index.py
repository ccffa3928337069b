"""The index of a caption database: training it, putting captions into its lists, and choosing how many are read.

Up to ``EXACT_UP_TO`` captions half-precision features, all of which are compared. Above, an inverted file of product
codes. Not HNSW, which at 512 dimensions takes 1,300 bytes per caption instead of 80, and whose graph depends on the
order in which threads insert. Nor a learned rotation before the codes (OPQ), which takes more than twice as long to
train: as the stored features decide among 400 candidates, it made no difference where it was tried.

The captions are put in the order of the lists that they are in, so that a part of a database is its own pages of the
features too, and not a few rows of nearly every page.

Everything is done in blocks of rows that do not depend on how many threads there are, each block in one thread, so that
the same rows give the same index on any number of cores.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from jaxtyping import Float16, Float32, Int64
from scipy.sparse import csr_array

from app.captions.database import FLAT, IVF_PQ, CaptionIndex, IndexParameters
from app.runtime.cpu import one_blas_thread
from app.scoring.numerics import unit_rows
from app.types import ImageFeatures

RECALL_AT = 10
"""How many nearest captions the recall is measured with."""

_SEED = 20_240_531
# Lists per square root of the captions, captions per list that its centroid is learned from, dimensions per byte of a
# code, iterations of k-means, and captions per centroid of a code.
_LISTS = 2
_TRAINED_ON = 50
_DIMS_PER_BYTE = 8
_ITERATIONS = 10
_TRAINED_ON_PER_CODE = 128
_BITS = 8
# Queries of each kind, and the length of the chance that is added to a caption's features to make one. The far ones
# have a cosine of about 0.45 with their caption; no share of the lists above this one is read for their sake.
_QUERIES = 1000
_NOISE = {"near": 0.3, "far": 2.0}
_FAR_SHARE = 1 / 8
# Times that the interval between too few lists and enough of them is halved.
_REFINEMENTS = 3
# Equal captions have equal cosines up to this, and it does not matter which of them is found.
_TIE = 1e-5
_ROWS_AT_ONCE = 16_384
# So that the cosines of a block with all centroids, or with all queries, stay within some tens of megabytes.
_COSINES_AT_ONCE = 2**24
_QUERIES_AT_ONCE = 100

_Done = TypeVar("_Done")


class Threads:
    """Does blocks of rows in so many threads, each of which has one core."""

    def __init__(self, count: int, executor: ThreadPoolExecutor) -> None:
        self._count = count
        self._executor = executor

    def blocks(self, rows: int, at_once: int, work: Callable[[slice], _Done]) -> Iterator[_Done]:
        """Yield what is made of each block, in their order; no more are at hand than threads can use."""
        begun: deque[Future[_Done]] = deque()
        for first in range(0, rows, at_once):
            begun.append(self._executor.submit(work, slice(first, min(first + at_once, rows))))
            if len(begun) > 2 * self._count:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()


@contextmanager
def threads(count: int) -> Iterator[Threads]:
    """Have so many threads, in which FAISS and NumPy use one core each.

    NumPy's limit is that of the whole process, and ends with the block; so does FAISS's, of the thread that is here.
    """
    import faiss  # noqa: PLC0415 - commands that search nothing do not wait for it

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        with (
            one_blas_thread(),
            ThreadPoolExecutor(count, initializer=faiss.omp_set_num_threads, initargs=(1,)) as executor,
        ):
            yield Threads(count, executor)
    finally:
        faiss.omp_set_num_threads(before)


def write_flat(features: Float16[np.ndarray, "n d"], content: BinaryIO) -> IndexParameters:
    """Write an index that compares all rows, and return how it is searched."""
    import faiss  # noqa: PLC0415 - as above

    index: Any = faiss.IndexScalarQuantizer(
        features.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    )
    index.train(features[:1].astype(np.float32))
    for first in range(0, len(features), _ROWS_AT_ONCE):
        index.add(features[first : first + _ROWS_AT_ONCE].astype(np.float32))
    _write(index, content)
    return IndexParameters(FLAT)


def trained(features: Float16[np.ndarray, "n d"], pool: Threads) -> Any:
    """Return an inverted file of product codes that has learned its centroids, and holds nothing yet."""
    import faiss  # noqa: PLC0415 - as above

    count, dims = features.shape
    lists = max(1, int(_LISTS * count**0.5))
    code_bytes = max(each for each in range(1, max(1, dims // _DIMS_PER_BYTE) + 1) if dims % each == 0)
    sample = _sample(features, max(_TRAINED_ON * lists, _TRAINED_ON_PER_CODE * 2**_BITS))
    quantizer = faiss.IndexFlatIP(dims)
    index: Any = faiss.IndexIVFPQ(quantizer, dims, lists, code_bytes, _BITS, faiss.METRIC_INNER_PRODUCT)
    quantizer.add(_centroids(sample, lists, pool))
    index.pq.cp.niter = _ITERATIONS
    index.pq.cp.min_points_per_centroid = 1
    index.pq.cp.max_points_per_centroid = _TRAINED_ON_PER_CODE
    index.train(sample)
    return index


def lists_of(index: Any, features: Float16[np.ndarray, "n d"], pool: Threads) -> Int64[np.ndarray, " n"]:
    """Return the list that each row belongs to: that of the centroid with the largest inner product."""
    centroids = index.quantizer.reconstruct_n(0, index.nlist)
    return _nearest_centroids(features, centroids, pool)[0]


def write_lists(
    index: Any, features: Float16[np.ndarray, "n d"], lists: Int64[np.ndarray, " n"], content: BinaryIO, pool: Threads
) -> IndexParameters:
    """Put rows, in the order of their lists, into an index, write it, and return how it is searched.

    How many lists are read is not known as long as recall is not measured; ``tuned`` does.
    """
    import faiss  # noqa: PLC0415 - as above

    def coded(some: slice) -> np.ndarray:
        rows, own = features[some].astype(np.float32), lists[some]
        codes = np.empty((len(rows), index.code_size), np.uint8)
        index.encode_vectors(len(rows), faiss.swig_ptr(rows), faiss.swig_ptr(own), faiss.swig_ptr(codes))
        return codes

    first = 0
    for codes in pool.blocks(len(features), _ROWS_AT_ONCE, coded):
        numbers, starts = np.unique(lists[first : first + len(codes)], return_index=True)
        for number, start, stop in zip(numbers, starts, [*starts[1:], len(codes)], strict=True):
            ids = np.arange(first + start, first + stop)
            index.invlists.add_entries(
                int(number), int(stop - start), faiss.swig_ptr(ids), faiss.swig_ptr(codes[start:stop])
            )
        first += len(codes)
    index.ntotal = first
    _write(index, content)
    return IndexParameters(IVF_PQ, lists=index.nlist, probes=1, code_bytes=index.code_size)


def _write(index: Any, content: BinaryIO) -> None:
    import faiss  # noqa: PLC0415 - as above

    library: Any = faiss
    # FAISS itself would pass over an error of the last bytes.
    faiss.write_index(index, library.PyCallbackIOWriter(content.write))


def _centroids(rows: Float32[np.ndarray, "n d"], count: int, pool: Threads) -> Float32[np.ndarray, "m d"]:
    """Return unit centroids of unit rows by spherical k-means (Dhillon and Modha 2001, "Concept decompositions")."""
    chosen = np.random.default_rng(_SEED).choice(len(rows), count, replace=False)
    centroids = rows[np.sort(chosen)]
    for _ in range(_ITERATIONS):
        lists, cosines = _nearest_centroids(rows, centroids, pool)
        members = csr_array((np.ones(len(rows), np.float32), lists, np.arange(len(rows) + 1)), shape=(len(rows), count))
        sums = members.T @ rows
        # A list that has lost all its rows begins again at one that is far from its own.
        lost = np.flatnonzero(np.bincount(lists, minlength=count) == 0)
        sums[lost] = rows[np.argsort(cosines, kind="stable")[: len(lost)]]
        centroids = unit_rows(sums)
    return np.ascontiguousarray(centroids, np.float32)


def _nearest_centroids(
    rows: Float16[np.ndarray, "n d"] | Float32[np.ndarray, "n d"],
    centroids: Float32[np.ndarray, "m d"],
    pool: Threads,
) -> tuple[Int64[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
    """Return the number of each row's nearest centroid, and their inner product.

    By NumPy, whose matrix product is five times as fast as that which FAISS comes with.
    """

    def nearest(some: slice) -> tuple[np.ndarray, np.ndarray]:
        cosines = rows[some].astype(np.float32, copy=False) @ centroids.T
        lists = cosines.argmax(axis=1)
        return lists, cosines[np.arange(len(lists)), lists]

    found = list(pool.blocks(len(rows), _at_once(len(centroids)), nearest))
    return np.concatenate([lists for lists, _ in found]), np.concatenate([cosines for _, cosines in found])


def _at_once(others: int) -> int:
    """Return how many rows are compared with so many others together."""
    return max(RECALL_AT, min(_ROWS_AT_ONCE, _COSINES_AT_ONCE // max(1, others)))


def tuned(
    features: Float16[np.ndarray, "n d"],
    file: Path,
    parameters: IndexParameters,
    target: float,
    queries: ImageFeatures | None,
    pool: Threads,
) -> tuple[IndexParameters, Mapping[str, float]]:
    """Return the parameters with few probes that reach the target, and the recall by kind.

    Probes are doubled until they do, and then it is tried whether fewer than the last doubling are enough.
    """
    if queries is None:
        rows = _sample(features, _QUERIES)
        asked = {kind: _noisy(rows, length) for kind, length in _NOISE.items()}
    else:
        asked = {"images": np.asarray(queries, np.float32)}
    wanted = min(RECALL_AT, len(features))
    least = {kind: _largest_cosines(features, some, wanted, pool)[:, -1:] - _TIE for kind, some in asked.items()}
    index = CaptionIndex.open(file, features, parameters)

    def found_by(some: np.ndarray) -> np.ndarray:
        blocks = pool.blocks(len(some), _QUERIES_AT_ONCE, lambda rows: index.search(some[rows], wanted)[1])
        return np.concatenate(list(blocks))

    def measured() -> tuple[Mapping[str, float], bool]:
        recall = {kind: round(float((found_by(some) >= least[kind]).mean()), 4) for kind, some in asked.items()}
        return recall, all(share >= target for share in recall.values())

    too_few = 0
    while True:
        recall, reached = measured()
        near_enough = all(share >= target for kind, share in recall.items() if kind != "far")
        given_up = near_enough and 2 * index.probes > _FAR_SHARE * parameters.lists
        if reached or given_up or index.probes >= parameters.lists:
            break
        too_few, index.probes = index.probes, min(2 * index.probes, parameters.lists)
    probes = index.probes
    for _ in range(_REFINEMENTS if reached else 0):
        if probes - too_few < 2:
            break
        index.probes = (too_few + probes) // 2
        fewer, enough = measured()
        if enough:
            probes, recall = index.probes, fewer
        else:
            too_few = index.probes
    return replace(parameters, probes=probes), recall


def _largest_cosines(
    features: Float16[np.ndarray, "n d"], queries: np.ndarray, k: int, pool: Threads
) -> Float32[np.ndarray, "q k"]:
    """Return the k largest cosines of each query, the largest first, by comparing all."""

    def largest(some: slice) -> np.ndarray:
        return _largest(queries @ features[some].astype(np.float32).T, k)

    best = np.empty((len(queries), 0), np.float32)
    for found in pool.blocks(len(features), _at_once(len(queries)), largest):
        best = _largest(np.concatenate([best, found], axis=1), k)
    return -np.sort(-best, axis=1)


def _largest(values: np.ndarray, k: int) -> np.ndarray:
    """Return the k largest of each row, in any order."""
    return values if values.shape[1] <= k else np.partition(values, -k, axis=1)[:, -k:]


def _sample(features: Float16[np.ndarray, "n d"], count: int) -> Float32[np.ndarray, "m d"]:
    if count >= len(features):
        return features.astype(np.float32)
    chosen = np.random.default_rng(_SEED).choice(len(features), count, replace=False)
    return features[np.sort(chosen)].astype(np.float32)


def _noisy(rows: Float32[np.ndarray, "n d"], length: float) -> Float32[np.ndarray, "n d"]:
    noise = np.random.default_rng(_SEED).standard_normal(rows.shape, np.float32)
    return unit_rows(rows + np.float32(length / rows.shape[1] ** 0.5) * noise)
