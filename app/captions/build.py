"""Building a caption database: encoding in shards that outlive an interruption, then an index, then the switch.

Everything is made in ``<folder>.building``. A shard is encoded, written aside, synced and renamed, so that it is there
whole or not at all; a build that is started again with the same captions encodes only the shards that are not there.
What comes after the shards is made anew, which takes minutes where encoding took hours. At last the finished folder is
renamed to ``<folder>/<digest>``, and then the file ``current`` is replaced by one that names it, so that readers see
the old database or the new one. Both folders must be on one file system, which for a while holds the features twice,
and three times where captions are put in the order of the index's lists (``app/captions/index.py``).

The same captions, encoder and parameters give the same files byte for byte, interrupted or not, on any number of
threads, on the same kind of processor and releases of FAISS and NumPy: chance has fixed seeds, and no sum depends on
how work was shared out. ``created_at`` in the manifest differs, and is not part of the digest.
"""

import errno
import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from jaxtyping import Bool, Float16, Int64, UInt64

from app.captions.database import (
    CURRENT,
    DATA_FILES,
    EXACT_UP_TO,
    FEATURES,
    FORMAT,
    GENERATION,
    INDEX,
    MANIFEST,
    IndexParameters,
    Manifest,
    check_files,
    current_generation,
    read_manifest,
    sha256_of,
)
from app.captions.index import RECALL_AT, Threads, lists_of, threads, trained, tuned, write_flat, write_lists
from app.captions.sources import Counts
from app.captions.texts import OFFSETS, TEXTS, CaptionTexts, offsets_of, pack
from app.errors import ConflictError, InvalidFieldError, StoreError
from app.runtime.atomic_files import atomic_file, sync
from app.types import ImageFeatures, TextFeatures

_LOCK = ".lock"
_REMOVED = ".removed"
_ASSEMBLED = "assembled"
_UNORDERED = "unordered"
_SHARDS = "shards"
_COMPARED_AT_ONCE = 1024
_ROWS_AT_ONCE = 16_384
_NORM_ERROR = 1e-2


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How to build; every one of them but ``encoded_at_once`` and ``threads`` is part of what is built.

    Args:
        shard: captions that are encoded and kept together; all of them are encoded again if one is another.
        encoded_at_once: captions in one call of the encoder.
        exact_up_to: captions up to which the index compares all.
        recall: share of the nearest captions that a search should find; the lists that it reads are doubled until it
            does, or until it reads all. For queries far from all captions no more than an eighth of them is read.
        near_duplicates: leave out captions whose cosine with one before them in the same shard is above this; None
            leaves them in. 0.97 is a good value.
        threads: that make the index, each of which takes a core.
    """

    shard: int = 8192
    encoded_at_once: int = 1024
    exact_up_to: int = EXACT_UP_TO
    recall: float = 0.95
    near_duplicates: float | None = None
    threads: int = 1


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
            for each in (made, place / _UNORDERED):
                shutil.rmtree(each, ignore_errors=True)
                each.mkdir()
            kept = [_distinct_rows(file, options.near_duplicates) for file in files]
            total = sum(int(each.sum()) for each in kept)
            tell("assemble", total)
            _assemble(files, kept, place / _UNORDERED)
            with threads(options.threads) as pool:
                tell("index", total)
                parameters = _indexed(place / _UNORDERED, made, options, pool)
                features = _features_of(made)
                tell("measure", total)
                parameters, recall = tuned(features, made / INDEX, parameters, options.recall, queries, pool)
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
            with file.open("rb") as content, atomic_file(made / file.name) as copy:
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
            sync(folder)
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
    if min(options.shard, options.encoded_at_once, options.threads) < 1 or not 0 < options.recall <= 1:
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
    every: list[np.ndarray] = []

    def pieces_of_texts() -> Iterator[bytes]:
        for file, rows in zip(files, kept, strict=True):
            texts, lengths, _ = _shard(file)
            every.append(lengths[rows])
            yield texts[np.repeat(rows, lengths.astype(np.int64))].tobytes()

    _write(place / TEXTS, pieces_of_texts())
    _write_features(
        place / FEATURES, (total, dims), (_shard(file)[2][rows] for file, rows in zip(files, kept, strict=True))
    )
    _write_offsets(place / OFFSETS, np.concatenate(every))


def _indexed(unordered: Path, place: Path, options: BuildOptions, pool: Threads) -> IndexParameters:
    """Give what is in ``unordered`` its order in ``place``, and its index, and return how that is searched."""
    features = _features_of(unordered)
    if len(features) <= options.exact_up_to:
        for name in (TEXTS, OFFSETS, FEATURES):
            (unordered / name).rename(place / name)
        with atomic_file(place / INDEX) as content:
            return write_flat(features, content)
    index = trained(features, pool)
    lists = lists_of(index, features, pool)
    order = np.argsort(lists, kind="stable")
    _write_in_order(unordered, features, order, place)
    shutil.rmtree(unordered)
    with atomic_file(place / INDEX) as content:
        return write_lists(index, _features_of(place), lists[order], content, pool)


def _write_in_order(
    unordered: Path, features: Float16[np.ndarray, "n d"], order: Int64[np.ndarray, " n"], place: Path
) -> None:
    """Write captions and features in another order."""
    texts = CaptionTexts.open(unordered)
    blocks = [order[first : first + _ROWS_AT_ONCE] for first in range(0, len(order), _ROWS_AT_ONCE)]
    _write(place / TEXTS, (texts.packed(rows) for rows in blocks))
    _write_features(place / FEATURES, features.shape, (features[rows] for rows in blocks))
    _write_offsets(place / OFFSETS, texts.lengths[order])


def _features_of(folder: Path) -> Float16[np.ndarray, "n d"]:
    return np.asarray(np.load(folder / FEATURES, mmap_mode="r"))


def _write_features(file: Path, shape: tuple[int, ...], pieces: Iterable[Float16[np.ndarray, "m d"]]) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f2", "fortran_order": False, "shape": shape})
    _write(file, chain([header.getvalue()], (piece.tobytes() for piece in pieces)))


def _write_offsets(file: Path, lengths: UInt64[np.ndarray, " n"]) -> None:
    content = io.BytesIO()
    np.save(content, offsets_of(lengths))
    _write(file, [content.getbuffer()])


def _publish(made: Path, folder: Path, manifest: Manifest) -> None:
    """Give a finished generation its place, and then make it the current one."""
    place = folder / manifest.generation
    sync(made)
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
    sync(folder)
    _write(folder / CURRENT, [manifest.generation.encode() + b"\n"])


def _description(file: Path) -> Mapping[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}


def _write(file: Path, pieces: Iterable[bytes | memoryview]) -> None:
    with atomic_file(file) as content:
        for piece in pieces:
            content.write(piece)


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
