"""Builds a caption database: encodes captions in shards, builds an index, and publishes the new generation.

Everything is built in ``<folder>.building``. A build that was interrupted and is started again with the same captions
encodes only the missing shards (``app/captions/shards.py``). The later steps run again; they take minutes where
encoding takes hours. At the end the finished folder is renamed to ``<folder>/<digest>``, and then the file ``current``
is replaced, so readers see either the old generation or the new one. Both folders must be on one file system. It
temporarily holds the features twice, or three times if the captions are sorted by the lists of the index
(``app/captions/index_training.py``).

The same captions, encoder and options give the same files byte for byte, interrupted or not, on any number of threads,
on the same kind of processor and the same releases of FAISS and NumPy: random numbers have fixed seeds, and no sum
depends on how the work was divided. Only ``created_at`` in the manifest differs; it is not part of the digest.
"""

import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float16, Int64, UInt64

from app.captions.cleaning import Counts
from app.captions.generations import building_folder, building_lock, disk_errors, publish_generation
from app.captions.index_training import (
    RECALL_AT,
    Threads,
    assign_lists,
    threads,
    train_index,
    tune_probes,
    write_flat_index,
    write_inverted_index,
)
from app.captions.manifest import (
    DATA_FILES,
    FEATURES,
    FORMAT,
    INDEX,
    MANIFEST,
    TO_COME,
    IndexParameters,
    Manifest,
    read_manifest,
    sha256_of,
)
from app.captions.shards import distinct_rows, encode_shards, read_shard, remove_other_shards
from app.captions.texts import OFFSETS, TEXTS, CaptionTexts, offsets_of
from app.errors import InvalidFieldError
from app.runtime.arrays import map_array
from app.runtime.atomic_files import atomic_file, write_atomically
from app.runtime.turns import give_way
from app.types import ImageFeatures, TextFeatures

EXACT_UP_TO = 75_000
"""The largest number of captions in a flat index. Comparing all of them takes about 3 ms; WordNet has fewer nouns."""

_ASSEMBLED = "assembled"
_UNORDERED = "unordered"
_SHARDS = "shards"
_ROWS_PER_BLOCK = 16_384


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """Options of a build; all but ``batch_size`` and ``threads`` change the result.

    Args:
        shard_size: captions per shard; a shard is encoded again if one of its captions changes.
        batch_size: captions per call of the encoder.
        exact_up_to: the largest number of captions in a flat index.
        recall: share of the nearest captions that a search should find. The number of probed lists is doubled until a
            search reaches it, or probes all lists; for queries far from all captions it stops at an eighth of them.
        near_duplicates: drop captions whose cosine with an earlier one in the same shard exceeds this; None keeps
            them. 0.97 is a good value.
        threads: threads that build the index; each uses one core.
    """

    shard_size: int = 8192
    batch_size: int = 1024
    exact_up_to: int = EXACT_UP_TO
    recall: float = 0.95
    near_duplicates: float | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        if min(self.shard_size, self.batch_size, self.threads) < 1 or not 0 < self.recall <= 1:
            raise ValueError(f"{self}: sizes must be at least 1, and recall in (0, 1]")


Advance = Callable[[str, int], None]
"""Called with ``encode`` and the captions encoded so far, then with ``assemble``, ``index``, ``measure`` and all."""


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
    to_come: int = 0,
) -> Manifest:
    """Build a database of ``captions`` in ``folder``, make it the current generation, and return its manifest.

    Args:
        captions: clean and distinct (``app/captions/cleaning.py``); read once, a shard at a time.
        folder: of the database; created if it does not exist.
        encode: returns unit rows for texts.
        fingerprint: of the text tower that ``encode`` uses.
        model: its name, for messages.
        name: of the database.
        source_notes: the origin of the captions.
        licence: of the captions.
        options: of the build.
        counts: of the source, complete once ``captions`` has been read; stored in the manifest.
        queries: image features (q, d) to measure recall with. None takes captions with a little and with much noise,
            whose recall only approximates that of images.
        advance: called with the progress.
        to_come: captions that the next build adds; it finds the shards of this one.

    Raises:
        InvalidFieldError: there are no captions.
        ConflictError: another build for the folder is running.
        StoreError: the disk is full, or the folder cannot be written. The current generation is unchanged, and the
            finished shards are kept.
        ValueError: ``encode`` returned rows that are not unit rows of one length.
    """
    report = advance or (lambda _stage, _done: None)
    building = building_folder(folder)
    with building_lock(folder):
        shards = building / _SHARDS
        with disk_errors(building):
            shards.mkdir(parents=True, exist_ok=True)
        files = encode_shards(
            captions,
            shards,
            encode=encode,
            fingerprint=fingerprint,
            shard_size=options.shard_size,
            batch_size=options.batch_size,
            advance=lambda done: report("encode", done),
        )
        if not files:
            read = f"; {counts.read:,} were read, and {counts.bad:,} could not be read" if counts else ""
            raise InvalidFieldError.of("captions", f"no captions are left{read}; check the source and the rules")
        assembled, unordered = building / _ASSEMBLED, building / _UNORDERED
        with disk_errors(building):
            remove_other_shards(shards, files)
            for path in (assembled, unordered):
                shutil.rmtree(path, ignore_errors=True)
                path.mkdir()
            kept = [distinct_rows(file, options.near_duplicates) for file in files]
            total = sum(int(rows.sum()) for rows in kept)
            report("assemble", total)
            _assemble(files, kept, unordered)
            with threads(options.threads) as pool:
                report("index", total)
                parameters = _index(unordered, assembled, options, pool)
                features = _map_features(assembled)
                report("measure", total)
                parameters, recall = tune_probes(features, assembled / INDEX, parameters, options.recall, queries, pool)
            near_duplicates = sum(len(rows) for rows in kept) - total
            source_counts = asdict(counts) if counts else {"read": total + near_duplicates}
            manifest = Manifest(
                format=FORMAT,
                name=name,
                source_notes=_valid_unicode(source_notes),
                licence=_valid_unicode(licence),
                model=model,
                fingerprint=fingerprint,
                captions=total,
                dims=features.shape[1],
                counts=source_counts
                | {"near_duplicates": near_duplicates, "kept": total}
                | ({TO_COME: to_come} if to_come else {}),
                index=parameters,
                recall=recall,
                recall_at=min(RECALL_AT, total),
                recall_target=options.recall,
                files={file_name: _file_entry(assembled / file_name) for file_name in DATA_FILES},
                created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            write_atomically(assembled / MANIFEST, json.dumps(manifest.to_json(), indent=2, ensure_ascii=False) + "\n")
            publish_generation(assembled, folder, manifest)
            if not to_come:
                shutil.rmtree(building, ignore_errors=True)
        return read_manifest(folder / manifest.generation)


def _valid_unicode(text: str) -> str:
    """Replace what cannot be written as UTF-8; the bytes of a command line need not be valid UTF-8."""
    return text.encode("utf-8", "replace").decode()


def _assemble(files: Sequence[Path], kept: Sequence[Bool[np.ndarray, " n"]], folder: Path) -> None:
    """Write the kept captions and features of all shards one after another."""
    total, dims = sum(int(rows.sum()) for rows in kept), read_shard(files[0])[2].shape[1]
    all_lengths: list[np.ndarray] = []

    def text_pieces() -> Iterator[bytes]:
        for file, rows in zip(files, kept, strict=True):
            texts, lengths, _ = read_shard(file)
            all_lengths.append(lengths[rows])
            yield texts[np.repeat(rows, lengths.astype(np.int64))].tobytes()

    _write_pieces(folder / TEXTS, text_pieces())
    _write_features(
        folder / FEATURES, (total, dims), (read_shard(file)[2][rows] for file, rows in zip(files, kept, strict=True))
    )
    _write_offsets(folder / OFFSETS, np.concatenate(all_lengths))


def _index(unordered: Path, assembled: Path, options: BuildOptions, pool: Threads) -> IndexParameters:
    """Write the index and the captions in its order into ``assembled``, and return the search parameters."""
    features = _map_features(unordered)
    if len(features) <= options.exact_up_to:
        for name in (TEXTS, OFFSETS, FEATURES):
            (unordered / name).rename(assembled / name)
        with atomic_file(assembled / INDEX) as content:
            return write_flat_index(features, content)
    index = train_index(features, pool)
    lists = assign_lists(index, features, pool)
    order = np.argsort(lists, kind="stable")
    _write_in_order(unordered, features, order, assembled)
    shutil.rmtree(unordered)
    with atomic_file(assembled / INDEX) as content:
        return write_inverted_index(index, _map_features(assembled), lists[order], content, pool)


def _write_in_order(
    unordered: Path, features: Float16[np.ndarray, "n d"], order: Int64[np.ndarray, " n"], folder: Path
) -> None:
    texts = CaptionTexts.open(unordered)
    blocks = [order[first : first + _ROWS_PER_BLOCK] for first in range(0, len(order), _ROWS_PER_BLOCK)]
    _write_pieces(folder / TEXTS, (texts.packed(rows) for rows in blocks))
    _write_features(folder / FEATURES, features.shape, (features[rows] for rows in blocks))
    _write_offsets(folder / OFFSETS, texts.lengths[order])


def _map_features(folder: Path) -> Float16[np.ndarray, "n d"]:
    return np.asarray(map_array(folder / FEATURES))


def _write_features(file: Path, shape: tuple[int, ...], pieces: Iterable[Float16[np.ndarray, "m d"]]) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f2", "fortran_order": False, "shape": shape})
    _write_pieces(file, chain([header.getvalue()], (piece.tobytes() for piece in pieces)))


def _write_offsets(file: Path, lengths: UInt64[np.ndarray, " n"]) -> None:
    content = io.BytesIO()
    np.save(content, offsets_of(lengths))
    write_atomically(file, content.getvalue())


def _write_pieces(file: Path, pieces: Iterable[bytes]) -> None:
    with atomic_file(file) as content:
        for piece in pieces:
            give_way()
            content.write(piece)


def _file_entry(file: Path) -> Mapping[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
