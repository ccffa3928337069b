"""Builds the index of a caption database: trains it, assigns captions to its lists, and tunes how many are probed.

A small database gets a flat index of half-precision features, a large one an inverted file of product codes. Two
alternatives were rejected. HNSW takes 1,300 bytes per caption at 512 dimensions instead of 80, and its graph depends on
the order in which threads insert. A learned rotation before the codes (OPQ) takes more than twice as long to train, and
made no measured difference, because the stored features decide among 400 candidates.

The captions are sorted by their lists. So the features of a part of a database are on pages of their own, and not a few
rows on nearly every page.

All work is done in blocks of rows, one thread per block. The blocks do not depend on the number of threads, so the same
rows give the same index on any number of cores.
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

from app.captions.index import CaptionIndex
from app.captions.manifest import FLAT, IVF_PQ, IndexParameters
from app.runtime.cpu import one_blas_thread
from app.runtime.turns import give_way
from app.scoring.numerics import unit_rows
from app.types import ImageFeatures

RECALL_AT = 10
"""The number of nearest captions that recall is measured on."""

_SEED = 20_240_531
_LISTS_PER_ROOT = 2
"""Lists per square root of the number of captions."""
_SAMPLES_PER_LIST = 50
_DIMS_PER_CODE_BYTE = 8
_ITERATIONS = 10
_SAMPLES_PER_CODE = 128
_BITS = 8

_QUERIES = 1000
"""Queries of each kind."""
_NOISE_LENGTHS = {"near": 0.3, "far": 2.0}
"""The length of the noise added to a caption's features. A far query has a cosine of about 0.45 with its caption."""
_MAX_FAR_SHARE = 1 / 8
"""The largest share of the lists that is probed to improve the recall of far queries."""
_REFINEMENTS = 3
"""How often the interval between too few probes and enough probes is halved."""
_TIE = 1e-5
"""Cosines that differ by less count as equal: it does not matter which of two equal captions is found."""

_ROWS_PER_BLOCK = 16_384
_COSINES_PER_BLOCK = 2**24
"""Limits the cosines of a block with all centroids, or with all queries, to some tens of megabytes."""
_QUERIES_PER_BLOCK = 100

_Result = TypeVar("_Result")


class Threads:
    """Works on blocks of rows in ``count`` threads, each of which uses one core."""

    def __init__(self, count: int, executor: ThreadPoolExecutor) -> None:
        self._count = count
        self._executor = executor

    def blocks(self, rows: int, block_size: int, work: Callable[[slice], _Result]) -> Iterator[_Result]:
        """Yield the result of each block, in order; at most two blocks per thread are submitted ahead.

        A single thread is the calling one, which makes way for requests.
        """
        if self._count == 1:
            for first in range(0, rows, block_size):
                give_way()
                yield work(slice(first, min(first + block_size, rows)))
            return
        submitted: deque[Future[_Result]] = deque()
        for first in range(0, rows, block_size):
            submitted.append(self._executor.submit(work, slice(first, min(first + block_size, rows))))
            if len(submitted) > 2 * self._count:
                yield submitted.popleft().result()
        while submitted:
            yield submitted.popleft().result()


@contextmanager
def threads(count: int) -> Iterator[Threads]:
    """Start ``count`` threads in which FAISS and NumPy use one core each.

    Until the block ends, NumPy is limited to one core in the whole process, and FAISS in the calling thread.
    """
    import faiss  # noqa: PLC0415 - slow to import, and commands that do not search do without it

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


def write_flat_index(features: Float16[np.ndarray, "n d"], content: BinaryIO) -> IndexParameters:
    """Write an index that compares all rows, and return its parameters."""
    import faiss  # noqa: PLC0415 - as above

    index: Any = faiss.IndexScalarQuantizer(
        features.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    )
    index.train(features[:1].astype(np.float32))
    for first in range(0, len(features), _ROWS_PER_BLOCK):
        give_way()
        index.add(features[first : first + _ROWS_PER_BLOCK].astype(np.float32))
    _write(index, content)
    return IndexParameters(FLAT)


def train_index(features: Float16[np.ndarray, "n d"], pool: Threads) -> Any:
    """Return an empty inverted file of product codes with trained centroids."""
    import faiss  # noqa: PLC0415 - as above

    count, dims = features.shape
    lists = max(1, int(_LISTS_PER_ROOT * count**0.5))
    code_bytes = max(size for size in range(1, max(1, dims // _DIMS_PER_CODE_BYTE) + 1) if dims % size == 0)
    sample = _sample(features, max(_SAMPLES_PER_LIST * lists, _SAMPLES_PER_CODE * 2**_BITS))
    quantizer = faiss.IndexFlatIP(dims)
    index: Any = faiss.IndexIVFPQ(quantizer, dims, lists, code_bytes, _BITS, faiss.METRIC_INNER_PRODUCT)
    quantizer.add(_centroids(sample, lists, pool))
    index.pq.cp.niter = _ITERATIONS
    index.pq.cp.min_points_per_centroid = 1
    index.pq.cp.max_points_per_centroid = _SAMPLES_PER_CODE
    index.train(sample)
    return index


def assign_lists(index: Any, features: Float16[np.ndarray, "n d"], pool: Threads) -> Int64[np.ndarray, " n"]:
    """Return the list of each row: the list whose centroid has the largest inner product with it."""
    centroids = index.quantizer.reconstruct_n(0, index.nlist)
    return _nearest_centroids(features, centroids, pool)[0]


def write_inverted_index(
    index: Any, features: Float16[np.ndarray, "n d"], lists: Int64[np.ndarray, " n"], content: BinaryIO, pool: Threads
) -> IndexParameters:
    """Fill a trained index with rows that are sorted by their lists, write it, and return its parameters.

    The parameters have one probe; ``tune_probes`` finds the right number.
    """
    import faiss  # noqa: PLC0415 - as above

    def encode(block: slice) -> np.ndarray:
        rows, block_lists = features[block].astype(np.float32), lists[block]
        codes = np.empty((len(rows), index.code_size), np.uint8)
        index.encode_vectors(len(rows), faiss.swig_ptr(rows), faiss.swig_ptr(block_lists), faiss.swig_ptr(codes))
        return codes

    first = 0
    for codes in pool.blocks(len(features), _ROWS_PER_BLOCK, encode):
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
    # FAISS's own file writer ignores an error in the last bytes.
    faiss.write_index(index, library.PyCallbackIOWriter(content.write))


def _centroids(rows: Float32[np.ndarray, "n d"], count: int, pool: Threads) -> Float32[np.ndarray, "m d"]:
    """Return unit centroids of unit rows by spherical k-means (Dhillon and Modha 2001, "Concept decompositions")."""
    from scipy.sparse import csr_array  # noqa: PLC0415 - imported by the first build, not at every start

    chosen = np.random.default_rng(_SEED).choice(len(rows), count, replace=False)
    centroids = rows[np.sort(chosen)]
    for _ in range(_ITERATIONS):
        lists, cosines = _nearest_centroids(rows, centroids, pool)
        members = csr_array((np.ones(len(rows), np.float32), lists, np.arange(len(rows) + 1)), shape=(len(rows), count))
        sums = members.T @ rows
        # An empty list starts again at one of the rows that are farthest from their centroids.
        empty = np.flatnonzero(np.bincount(lists, minlength=count) == 0)
        sums[empty] = rows[np.argsort(cosines, kind="stable")[: len(empty)]]
        centroids = unit_rows(sums)
    return np.ascontiguousarray(centroids, np.float32)


def _nearest_centroids(
    rows: Float16[np.ndarray, "n d"] | Float32[np.ndarray, "n d"],
    centroids: Float32[np.ndarray, "m d"],
    pool: Threads,
) -> tuple[Int64[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
    """Return the number of each row's nearest centroid, and their inner product.

    NumPy's matrix product is five times as fast as that of the FAISS package.
    """

    def nearest(block: slice) -> tuple[np.ndarray, np.ndarray]:
        cosines = rows[block].astype(np.float32, copy=False) @ centroids.T
        lists = cosines.argmax(axis=1)
        return lists, cosines[np.arange(len(lists)), lists]

    found = list(pool.blocks(len(rows), _block_size(len(centroids)), nearest))
    return np.concatenate([lists for lists, _ in found]), np.concatenate([cosines for _, cosines in found])


def _block_size(columns: int) -> int:
    """Return the number of rows per block whose cosines with ``columns`` other rows are computed at once."""
    return max(RECALL_AT, min(_ROWS_PER_BLOCK, _COSINES_PER_BLOCK // max(1, columns)))


def tune_probes(
    features: Float16[np.ndarray, "n d"],
    file: Path,
    parameters: IndexParameters,
    target: float,
    queries: ImageFeatures | None,
    pool: Threads,
) -> tuple[IndexParameters, Mapping[str, float]]:
    """Return the parameters with a small number of probes that reaches the target, and the recall by kind of query.

    The number is doubled until it reaches the target, and then refined by halving the last interval.
    """
    if queries is None:
        rows = _sample(features, _QUERIES)
        samples = {kind: _add_noise(rows, length) for kind, length in _NOISE_LENGTHS.items()}
    else:
        samples = {"images": np.asarray(queries, np.float32)}
    wanted = min(RECALL_AT, len(features))
    thresholds = {kind: _largest_cosines(features, rows, wanted, pool)[:, -1:] - _TIE for kind, rows in samples.items()}
    index = CaptionIndex.open(file, features, parameters)

    def search(rows: np.ndarray) -> np.ndarray:
        blocks = pool.blocks(len(rows), _QUERIES_PER_BLOCK, lambda block: index.search(rows[block], wanted)[1])
        return np.concatenate(list(blocks))

    def measure() -> tuple[Mapping[str, float], bool]:
        recall = {kind: round(float((search(rows) >= thresholds[kind]).mean()), 4) for kind, rows in samples.items()}
        return recall, all(share >= target for share in recall.values())

    too_few = 0
    while True:
        recall, reached = measure()
        only_far_missing = all(share >= target for kind, share in recall.items() if kind != "far")
        stop_for_far = only_far_missing and 2 * index.probes > _MAX_FAR_SHARE * parameters.lists
        if reached or stop_for_far or index.probes >= parameters.lists:
            break
        too_few, index.probes = index.probes, min(2 * index.probes, parameters.lists)
    probes = index.probes
    for _ in range(_REFINEMENTS if reached else 0):
        if probes - too_few < 2:
            break
        index.probes = (too_few + probes) // 2
        refined, enough = measure()
        if enough:
            probes, recall = index.probes, refined
        else:
            too_few = index.probes
    return replace(parameters, probes=probes), recall


def _largest_cosines(
    features: Float16[np.ndarray, "n d"], queries: np.ndarray, k: int, pool: Threads
) -> Float32[np.ndarray, "q k"]:
    """Return the k largest cosines of each query with all rows, the largest first."""

    def largest(block: slice) -> np.ndarray:
        return _largest(queries @ features[block].astype(np.float32).T, k)

    best = np.empty((len(queries), 0), np.float32)
    for found in pool.blocks(len(features), _block_size(len(queries)), largest):
        best = _largest(np.concatenate([best, found], axis=1), k)
    return -np.sort(-best, axis=1)


def _largest(values: np.ndarray, k: int) -> np.ndarray:
    """Return the k largest values of each row, in any order."""
    return values if values.shape[1] <= k else np.partition(values, -k, axis=1)[:, -k:]


def _sample(features: Float16[np.ndarray, "n d"], count: int) -> Float32[np.ndarray, "m d"]:
    if count >= len(features):
        return features.astype(np.float32)
    chosen = np.random.default_rng(_SEED).choice(len(features), count, replace=False)
    return features[np.sort(chosen)].astype(np.float32)


def _add_noise(rows: Float32[np.ndarray, "n d"], length: float) -> Float32[np.ndarray, "n d"]:
    noise = np.random.default_rng(_SEED).standard_normal(rows.shape, np.float32)
    return unit_rows(rows + np.float32(length / rows.shape[1] ** 0.5) * noise)
