"""Encodes captions in shards, and keeps each shard in a file.

A shard file is either complete or missing, and is named by a digest of its captions and the model. So a build that is
started again with the same captions encodes only the missing shards.
"""

import io
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from itertools import islice
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float16, UInt64

from app.captions.generations import disk_errors
from app.captions.texts import pack
from app.runtime.arrays import read_arrays
from app.runtime.atomic_files import atomic_file
from app.runtime.turns import give_way
from app.types import TextFeatures

_ROWS_PER_COMPARISON = 1024
_NORM_TOLERANCE = 1e-2


def encode_shards(
    captions: Iterable[str],
    folder: Path,
    *,
    encode: Callable[[Sequence[str]], TextFeatures],
    fingerprint: str,
    shard_size: int,
    batch_size: int,
    advance: Callable[[int], None],
) -> list[Path]:
    """Encode the shards that are missing in ``folder``, and return the files of all shards in order.

    Args:
        captions: read once, a shard at a time.
        folder: of the shards.
        encode: returns unit rows for texts.
        fingerprint: of the text tower that ``encode`` uses.
        shard_size: captions per shard.
        batch_size: captions per call of ``encode``.
        advance: called with the number of captions encoded so far.

    Raises:
        StoreError: a shard cannot be written.
        ValueError: ``encode`` returned rows that are not unit rows of one length.
    """
    remaining, done, dims = iter(captions), 0, None
    files: list[Path] = []
    while shard := list(islice(remaining, shard_size)):
        texts, lengths = pack(shard)
        digest = sha256(b"\0".join([fingerprint.encode(), lengths.tobytes(), texts])).hexdigest()
        file = folder / f"{len(files):06d}-{digest[:32]}.npz"
        shape = _features_shape(file, len(shard))
        if shape is None:
            features = _encode_by_length(shard, encode, batch_size)
            content = io.BytesIO()  # closing a zip file on a full disk raises errors of its own
            np.savez(content, texts=np.frombuffer(texts, np.uint8), lengths=lengths, features=features)
            with disk_errors(folder), atomic_file(file) as opened:
                opened.write(content.getbuffer())
            shape = features.shape
        if dims not in {None, shape[1]}:
            raise ValueError(f"the encoder returned {shape[1]} dimensions, and {dims} before")
        dims = shape[1]
        files.append(file)
        done += len(shard)
        advance(done)
    return files


def read_shard(file: Path) -> tuple[np.ndarray, UInt64[np.ndarray, " n"], Float16[np.ndarray, "n d"]]:
    """Return a shard's texts, their lengths and their features; the checksums of the zip file are compared."""
    texts, lengths, features = read_arrays(file, ("texts", "lengths", "features"))
    return texts, lengths, features


def remove_other_shards(folder: Path, files: Sequence[Path]) -> None:
    """Remove the shards that an abandoned build of other captions left behind."""
    for file in set(folder.iterdir()) - set(files):
        file.unlink()


def distinct_rows(file: Path, near_duplicates: float | None) -> Bool[np.ndarray, " n"]:
    """Return which captions of a shard to keep: those without a cosine above the threshold with an earlier kept one."""
    features = read_shard(file)[2]
    kept = np.ones(len(features), bool)
    if near_duplicates is None:
        return kept
    wide = features.astype(np.float32)
    for first in range(0, len(wide), _ROWS_PER_COMPARISON):
        give_way()
        rows = slice(first, first + _ROWS_PER_COMPARISON)
        near = wide[rows] @ wide[: rows.stop].T > near_duplicates
        for row in np.flatnonzero(near.sum(axis=1) > 1):
            kept[first + row] = not (near[row, : first + row] & kept[: first + row]).any()
    return kept


def _encode_by_length(
    texts: Sequence[str], encode: Callable[[Sequence[str]], TextFeatures], batch_size: int
) -> Float16[np.ndarray, "n d"]:
    """Encode texts in batches of similar lengths, because a tower pads a batch to its longest text."""
    order = np.argsort([len(text) for text in texts], kind="stable").tolist()
    starts = range(0, len(texts), batch_size)
    batches = [[texts[index] for index in order[first : first + batch_size]] for first in starts]
    rows = np.concatenate([_half_precision(encode(batch), batch) for batch in batches])
    features = np.empty_like(rows)
    features[order] = rows
    return features


def _half_precision(features: TextFeatures, texts: Sequence[str]) -> Float16[np.ndarray, "n d"]:
    rows = np.asarray(features)
    if rows.ndim != 2 or len(rows) != len(texts):
        raise ValueError(f"the encoder returned shape {rows.shape} for {len(texts)} captions")
    norms = np.linalg.norm(rows.astype(np.float32), axis=1)
    wrong = ~(np.abs(norms - 1) <= _NORM_TOLERANCE)
    if wrong.any():
        first = int(np.argmax(wrong))
        raise ValueError(f"the encoder returned a row of length {norms[first]} for {texts[first]!r}, not a unit row")
    return rows.astype(np.float16)


def _features_shape(file: Path, count: int) -> tuple[int, ...] | None:
    """Return the shape of a shard's features, or None if the shard is missing or damaged."""
    try:
        _, lengths, features = read_shard(file)
    except Exception:  # noqa: BLE001 - a damaged zip file raises many kinds of errors
        return None
    return features.shape if len(lengths) == len(features) == count else None
