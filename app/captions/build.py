"""Building a caption database: encoding in shards that outlive an interruption, then an index, then the switch.

Everything is made in ``<folder>.building``. A shard is encoded, written aside, synced and renamed, so that it is there
whole or not at all; a build that is started again with the same captions encodes only the shards that are not there.
What comes after the shards is made anew, which takes minutes where encoding took hours. At last the finished folder is
renamed to ``<folder>/<digest>``, and then the file ``current`` is replaced by one that names it, so that readers see
the old database or the new one. Both folders must be on one file system, which for a while holds the features twice.

The same captions, encoder and parameters give the same files byte for byte, interrupted or not, on the same kind of
processor and release of FAISS: chance has fixed seeds, and FAISS trains and adds in one thread. ``created_at`` in the
manifest differs, and is not part of the digest.

The index: up to ``EXACT_UP_TO`` captions half-precision features, all of which are compared. Above, an inverted file of
product codes. Not HNSW, which at 512 dimensions takes 1,300 bytes per caption instead of 80, and whose graph depends on
the order in which threads insert. Nor a learned rotation before the codes (OPQ), which takes more than twice as long to
train: as the stored features decide among 400 candidates, it made no difference where it was tried.
"""

import errno
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock, Timeout
from jaxtyping import Bool, Float16, Float32, UInt64

from app.captions.database import (
    CURRENT,
    DATA_FILES,
    EXACT_UP_TO,
    FEATURES,
    FLAT,
    FORMAT,
    GENERATION,
    INDEX,
    IVF_PQ,
    MANIFEST,
    CaptionIndex,
    IndexParameters,
    Manifest,
    check_files,
    current_generation,
    read_manifest,
    sha256_of,
)
from app.captions.sources import Counts
from app.captions.texts import OFFSETS, TEXTS, offsets_of, pack
from app.errors import ConflictError, InvalidFieldError, StoreError
from app.task import ImageFeatures, TextFeatures

RECALL_AT = 10
"""How many nearest captions the recall is measured with."""

_LOCK = ".lock"
_REMOVED = ".removed"
_ASSEMBLED = "assembled"
_SHARDS = "shards"
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
_COMPARED_AT_ONCE = 1024
_NORM_ERROR = 1e-2


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How to build; every one of them but ``encoded_at_once`` is part of what is built.

    Args:
        shard: captions that are encoded and kept together; all of them are encoded again if one is another.
        encoded_at_once: captions in one call of the encoder.
        exact_up_to: captions up to which the index compares all.
        recall: share of the nearest captions that a search should find; the lists that it reads are doubled until it
            does, or until it reads all. For queries far from all captions no more than an eighth of them is read.
        near_duplicates: leave out captions whose cosine with one before them in the same shard is above this; None
            leaves them in. 0.97 is a good value.
    """

    shard: int = 8192
    encoded_at_once: int = 1024
    exact_up_to: int = EXACT_UP_TO
    recall: float = 0.95
    near_duplicates: float | None = None


Advance = Callable[[str, int], None]
"""Is told ``encode`` and how many captions are done so far, then ``assemble``, ``index`` and ``measure`` with all."""


def build(
    captions: Iterable[str],
    folder: Path,
    *,
    encode: Callable[[Sequence[str]], TextFeatures],
    fingerprint: str,
    model: str = "",
    name: str,
    source_notes: str = "",
    licence: str = "",
    options: BuildOptions = BuildOptions(),
    counts: Counts | None = None,
    queries: ImageFeatures | None = None,
    advance: Advance | None = None,
) -> Manifest:
    """Build a database of ``captions`` in ``folder``, make it the current one, and return its manifest.

    Args:
        captions: clean and distinct (``app/captions/sources.py``); read once, a shard at a time.
        folder: where the database is or will be; made if it is not there.
        encode: returns unit rows for texts.
        fingerprint: of the text tower that ``encode`` uses.
        model: its name, for messages.
        name: of the database.
        source_notes: where the captions are from.
        licence: of the captions.
        options: how to build.
        counts: of the source, complete once ``captions`` has been read; kept in the manifest.
        queries: images (q, d) that recall is measured with. None takes captions with little and with much noise; what
            images are off by is no noise, and their recall may differ.
        advance: is told how far it is.

    Raises:
        InvalidFieldError: there are no captions.
        ConflictError: another build for the folder is under way.
        StoreError: the disk is full, or the folder cannot be written. The current database is as it was, and shards
            that are finished are kept.
        ValueError: options or rows that cannot be.
    """
    _check(options)
    tell = advance or (lambda _stage, _done: None)
    place = building_folder(folder)
    with _alone(folder):
        with _disk_errors(place):
            (place / _SHARDS).mkdir(parents=True, exist_ok=True)
        files = _encoded(captions, place / _SHARDS, encode, fingerprint, options, lambda done: tell("encode", done))
        if not files:
            read = f" of {counts.read:,} that were read, beside {counts.bad:,} that are bad" if counts else ""
            raise InvalidFieldError.of("captions", f"no captions are left{read}; check the source and the rules")
        made = place / _ASSEMBLED
        with _disk_errors(place):
            _keep_only(place / _SHARDS, files)
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
            kept = [_distinct_rows(file, options.near_duplicates) for file in files]
            total = sum(int(each.sum()) for each in kept)
            tell("assemble", total)
            _assemble(files, kept, made)
            features = np.asarray(np.load(made / FEATURES, mmap_mode="r"))
            tell("index", total)
            with _one_thread():
                parameters = _write_index(features, made / INDEX, options)
                tell("measure", total)
                parameters, recall = _tuned(features, made / INDEX, parameters, options.recall, queries)
            near = sum(len(each) for each in kept) - total
            told = asdict(counts) if counts else {"read": total + near}
            manifest = Manifest(
                format=FORMAT,
                name=name,
                source_notes=_unicode(source_notes),
                licence=_unicode(licence),
                model=model,
                fingerprint=fingerprint,
                captions=total,
                dims=features.shape[1],
                counts=told | {"near_duplicates": near, "kept": total},
                index=parameters,
                recall=recall,
                recall_at=min(RECALL_AT, total),
                recall_target=options.recall,
                files={each: _description(made / each) for each in DATA_FILES},
                created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            _write(made / MANIFEST, [json.dumps(manifest.to_json(), indent=2, ensure_ascii=False).encode() + b"\n"])
            _publish(made, folder, manifest)
            shutil.rmtree(place, ignore_errors=True)
        return read_manifest(folder / manifest.generation)


def install(generation: Path, folder: Path) -> None:
    """Copy a finished generation from elsewhere into ``folder``, and make it the current one.

    Raises:
        StoreError: it is damaged, or the disk is full.
        ConflictError: a build is under way.
    """
    manifest = read_manifest(generation)
    check_files(generation, manifest, verify=True)
    with _alone(folder), _disk_errors(folder):
        made = folder / f"{manifest.generation}.copied"
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        for file in generation.iterdir():
            with file.open("rb") as content, _aside(made / file.name) as copy:
                shutil.copyfileobj(content, copy)
        _publish(made, folder, manifest)


def prune(folder: Path) -> list[str]:
    """Remove the generations of ``folder`` that are not current, and return their names.

    Who has one of them open may go on reading it.

    Raises:
        ConflictError: a build is under way.
        StoreError: there is no database, or they cannot be removed.
    """
    current_generation(folder)
    with _alone(folder), _disk_errors(folder):
        current = current_generation(folder)
        old = sorted(
            each
            for each in folder.iterdir()
            if each.is_dir() and GENERATION.fullmatch(each.name.removesuffix(_REMOVED)) and each.name != current
        )
        for each in old:
            shutil.rmtree(each)
        return [each.name for each in old]


def remove(folder: Path) -> None:
    """Remove a database, and what was built for the next one.

    Who has it open may go on reading it.

    Raises:
        ConflictError: a build is under way.
        StoreError: it cannot be removed.
    """
    if folder.is_symlink():
        problem = f"the caption database '{folder.name}' is a link to another folder"
        raise StoreError(f"{problem}; remove the link, and what it leads to, by hand")
    with _alone(folder):
        try:
            # From here on there is none, even if the rest fails.
            (folder / CURRENT).unlink(missing_ok=True)
            _sync_folder(folder)
            shutil.rmtree(building_folder(folder), ignore_errors=True)
            # Aside, since who wants to build the next one makes its lock in the folder.
            aside = folder.with_name(f"{folder.name}{_REMOVED}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            shutil.rmtree(aside)
        except OSError as error:
            problem = f"the caption database '{folder.name}' cannot be removed: {error.strerror}"
            raise StoreError(f"{problem}; remove its folder by hand") from error


def building_folder(folder: Path) -> Path:
    """Return where the database of ``folder`` is built."""
    return folder.with_name(f"{folder.name}.building")


def _unicode(text: str) -> str:
    """Return a text of a command line, whose bytes may be no Unicode, as it can be written."""
    return text.encode("utf-8", "replace").decode()


def _check(options: BuildOptions) -> None:
    if options.shard < 1 or options.encoded_at_once < 1 or not 0 < options.recall <= 1:
        raise ValueError(f"{options}: sizes must be at least 1, and recall in (0, 1]")


def _encoded(
    captions: Iterable[str],
    folder: Path,
    encode: Callable[[Sequence[str]], TextFeatures],
    fingerprint: str,
    options: BuildOptions,
    advance: Callable[[int], None],
) -> list[Path]:
    """Return the files of all shards, in order, having encoded those that were not there."""
    remaining, done, dims = iter(captions), 0, None
    files: list[Path] = []
    while some := list(islice(remaining, options.shard)):
        texts, lengths = pack(some)
        digest = sha256(b"\0".join([fingerprint.encode(), lengths.tobytes(), texts])).hexdigest()
        file = folder / f"{len(files):06d}-{digest[:32]}.npz"
        shape = _shape_of(file, len(some))
        if shape is None:
            features = _features(some, encode, options.encoded_at_once)
            content = io.BytesIO()  # zip files cannot be closed in peace on a full disk
            np.savez(content, texts=np.frombuffer(texts, np.uint8), lengths=lengths, features=features)
            with _disk_errors(folder):
                _write(file, [content.getbuffer()])
            shape = features.shape
        if dims not in {None, shape[1]}:
            raise ValueError(f"the encoder returned {shape[1]} dimensions, and {dims} before")
        dims = shape[1]
        files.append(file)
        done += len(some)
        advance(done)
    return files


def _features(
    texts: Sequence[str], encode: Callable[[Sequence[str]], TextFeatures], at_once: int
) -> Float16[np.ndarray, "n d"]:
    """Encode texts, those of about one length together, since a tower pads a batch to its longest text."""
    order = np.argsort([len(text) for text in texts], kind="stable").tolist()
    batches = [[texts[index] for index in order[first : first + at_once]] for first in range(0, len(texts), at_once)]
    rows = np.concatenate([_half(encode(batch), batch) for batch in batches])
    features = np.empty_like(rows)
    features[order] = rows
    return features


def _half(features: TextFeatures, texts: Sequence[str]) -> Float16[np.ndarray, "n d"]:
    rows = np.asarray(features)
    if rows.ndim != 2 or len(rows) != len(texts):
        raise ValueError(f"the encoder returned shape {rows.shape} for {len(texts)} captions")
    norms = np.linalg.norm(rows.astype(np.float32), axis=1)
    wrong = ~(np.abs(norms - 1) <= _NORM_ERROR)
    if wrong.any():
        first = int(np.argmax(wrong))
        raise ValueError(f"the encoder returned a row of length {norms[first]} for {texts[first]!r}; unit rows are due")
    return rows.astype(np.float16)


def _shape_of(file: Path, count: int) -> tuple[int, ...] | None:
    """Return the shape of a shard's features, or None where it is missing or damaged."""
    try:
        _, lengths, features = _shard(file)
    except Exception:  # noqa: BLE001 - a damaged zip file raises whatever it likes
        return None
    return features.shape if len(lengths) == len(features) == count else None


def _shard(file: Path) -> tuple[np.ndarray, UInt64[np.ndarray, " n"], Float16[np.ndarray, "n d"]]:
    """Return a shard's texts, their lengths and their features; the checksums that zip files have are compared."""
    with file.open("rb") as opened, np.load(opened, allow_pickle=False) as content:
        return content["texts"], content["lengths"], content["features"]


def _keep_only(folder: Path, files: Sequence[Path]) -> None:
    """Remove the shards of other captions, which a build that was given up left."""
    for file in set(folder.iterdir()) - set(files):
        file.unlink()


def _distinct_rows(file: Path, near_duplicates: float | None) -> Bool[np.ndarray, " n"]:
    """Return which captions of a shard are kept: those that resemble no kept one before them."""
    features = _shard(file)[2]
    kept = np.ones(len(features), bool)
    if near_duplicates is None:
        return kept
    wide = features.astype(np.float32)
    for first in range(0, len(wide), _COMPARED_AT_ONCE):
        rows = slice(first, first + _COMPARED_AT_ONCE)
        near = wide[rows] @ wide[: rows.stop].T > near_duplicates
        for row in np.flatnonzero(near.sum(axis=1) > 1):
            kept[first + row] = not (near[row, : first + row] & kept[: first + row]).any()
    return kept


def _assemble(files: Sequence[Path], kept: Sequence[Bool[np.ndarray, " n"]], place: Path) -> None:
    """Write the captions and features of all shards end to end."""
    total, dims = sum(int(each.sum()) for each in kept), _shard(files[0])[2].shape[1]
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f2", "fortran_order": False, "shape": (total, dims)})
    every: list[np.ndarray] = []

    def pieces_of_texts() -> Iterator[bytes]:
        for file, rows in zip(files, kept, strict=True):
            texts, lengths, _ = _shard(file)
            every.append(lengths[rows])
            yield texts[np.repeat(rows, lengths.astype(np.int64))].tobytes()

    def pieces_of_features() -> Iterator[bytes]:
        yield header.getvalue()
        for file, rows in zip(files, kept, strict=True):
            yield _shard(file)[2][rows].tobytes()

    _write(place / TEXTS, pieces_of_texts())
    _write(place / FEATURES, pieces_of_features())
    content = io.BytesIO()
    np.save(content, offsets_of(np.concatenate(every)))
    _write(place / OFFSETS, [content.getbuffer()])


def _write_index(features: Float16[np.ndarray, "n d"], file: Path, options: BuildOptions) -> IndexParameters:
    """Write the index of ``features`` to ``file`` and return how it is searched, as long as recall is not measured."""
    import faiss  # noqa: PLC0415 - commands that search nothing do not wait for it

    count, dims = features.shape
    index: Any
    if count <= options.exact_up_to:
        index = faiss.IndexScalarQuantizer(dims, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        index.train(features[:1].astype(np.float32))
        parameters = IndexParameters(FLAT)
    else:
        lists = max(1, int(_LISTS * count**0.5))
        code_bytes = max(each for each in range(1, max(1, dims // _DIMS_PER_BYTE) + 1) if dims % each == 0)
        quantizer = faiss.IndexFlatIP(dims)
        index = faiss.IndexIVFPQ(quantizer, dims, lists, code_bytes, _BITS, faiss.METRIC_INNER_PRODUCT)
        index.cp.niter = index.pq.cp.niter = _ITERATIONS
        index.cp.min_points_per_centroid = index.pq.cp.min_points_per_centroid = 1
        index.pq.cp.max_points_per_centroid = _TRAINED_ON_PER_CODE
        index.train(_sample(features, max(_TRAINED_ON * lists, _TRAINED_ON_PER_CODE * 2**_BITS)))
        parameters = IndexParameters(IVF_PQ, lists=lists, probes=1, code_bytes=code_bytes)
    for first in range(0, count, _ROWS_AT_ONCE):
        index.add(features[first : first + _ROWS_AT_ONCE].astype(np.float32))
    library: Any = faiss
    with _aside(file) as content:
        # FAISS itself would pass over an error of the last bytes.
        faiss.write_index(index, library.PyCallbackIOWriter(content.write))
    return parameters


def _tuned(
    features: Float16[np.ndarray, "n d"],
    file: Path,
    parameters: IndexParameters,
    target: float,
    queries: ImageFeatures | None,
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
    least = {kind: _nearest(features, some, wanted)[:, -1:] - _TIE for kind, some in asked.items()}
    index = CaptionIndex.open(file, features, parameters)

    def measured() -> tuple[Mapping[str, float], bool]:
        recall = {
            kind: round(float((index.search(some, wanted)[1] >= least[kind]).mean()), 4) for kind, some in asked.items()
        }
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


def _nearest(features: Float16[np.ndarray, "n d"], queries: np.ndarray, k: int) -> Float32[np.ndarray, "q k"]:
    """Return the k largest cosines of each query, the largest first, by comparing all."""
    import faiss  # noqa: PLC0415 - as above

    best = np.full((len(queries), k), -np.inf, np.float32)
    for first in range(0, len(features), _ROWS_AT_ONCE):
        rows = features[first : first + _ROWS_AT_ONCE].astype(np.float32)
        some: Any = faiss.knn(queries, rows, min(k, len(rows)), metric=faiss.METRIC_INNER_PRODUCT)[0]
        best = -np.sort(-np.concatenate([best, some], axis=1), axis=1)[:, :k]
    return best


def _sample(features: Float16[np.ndarray, "n d"], count: int) -> Float32[np.ndarray, "m d"]:
    if count >= len(features):
        return features.astype(np.float32)
    chosen = np.random.default_rng(_SEED).choice(len(features), count, replace=False)
    return features[np.sort(chosen)].astype(np.float32)


def _noisy(rows: Float32[np.ndarray, "n d"], length: float) -> Float32[np.ndarray, "n d"]:
    noise = np.random.default_rng(_SEED).standard_normal(rows.shape, np.float32)
    moved = rows + np.float32(length / rows.shape[1] ** 0.5) * noise
    unit: np.ndarray = moved / np.linalg.norm(moved, axis=1, keepdims=True)
    return unit


def _publish(made: Path, folder: Path, manifest: Manifest) -> None:
    """Give a finished generation its place, and then make it the current one."""
    place = folder / manifest.generation
    _sync_folder(made)
    if place.exists():
        with suppress(StoreError):
            check_files(place, read_manifest(place), verify=True)
            shutil.rmtree(made)
    if made.exists():
        removed = place.with_name(place.name + _REMOVED)
        if place.exists():  # damaged
            shutil.rmtree(removed, ignore_errors=True)
            place.rename(removed)
        made.rename(place)
        shutil.rmtree(removed, ignore_errors=True)
    _sync_folder(folder)
    _write(folder / CURRENT, [manifest.generation.encode() + b"\n"])


def _description(file: Path) -> Mapping[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}


def _write(file: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write a file so that it is there whole or not at all, even after a power cut."""
    with _aside(file) as content:
        for piece in pieces:
            content.write(piece)
    _sync_folder(file.parent)


@contextmanager
def _aside(file: Path) -> Iterator[BinaryIO]:
    aside = file.with_name(file.name + ".part")
    try:
        with aside.open("wb") as content:
            yield content
            content.flush()
            os.fsync(content.fileno())
        aside.replace(file)
    except OSError:
        with suppress(OSError):
            aside.unlink()  # makes room on a full disk
        raise


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return  # where folders cannot be opened, and need not be
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep others from building in ``folder``; what holds them off ends with this process, however that ends."""
    lock = FileLock(folder / _LOCK)
    with _disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ConflictError(f"another build for '{folder.name}' is under way; wait for it, or end it") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let FAISS use one thread, which gives the same result every time, and on few cores is as fast."""
    import faiss  # noqa: PLC0415 - as above

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        match error.errno:
            case errno.ENOSPC | errno.EDQUOT:
                problem, way_out = "there is no room left on its disk", "make room"
            case errno.EFBIG:
                problem, way_out = "a file would be larger than it may be", "raise the limit on file sizes (ulimit -f)"
            case errno.EACCES | errno.EPERM | errno.EROFS:
                problem, way_out = f"'{error.filename or folder}' cannot be written", "make it writable"
            case errno.EXDEV:
                problem, way_out = "it and its '.building' are on two disks", "choose a folder below the mounted one"
            case _:
                problem, way_out = str(error.strerror or error), "mend that"
        way_out += ", or name another folder; what is encoded is kept, and is not encoded again"
        raise StoreError(f"the caption database '{folder}' cannot be built: {problem}; {way_out}") from error
