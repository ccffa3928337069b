"""Compute and cache the rows that adapters take from prompts."""

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from cachetools import LRUCache

from app.prompting.recipes import Pooling, Row
from app.scoring.numerics import unit_rows
from app.types import TextFeatures

_Key = tuple[str, Pooling, bytes]

# Prompts that are encoded together. So the features of all prompts (1.6 GB for 80 templates of 10,000 classes) are
# never in memory at the same time, and a computation that no request waits for any more ends after the current piece.
_PROMPTS_AT_ONCE = 256

# Up to this number, prompts are hashed in one or two milliseconds, which is not worth another thread.
_FEW_PROMPTS = 2000


class TextEncoder(Protocol):
    """Encodes prompts off the event loop."""

    async def __call__(self, prompts: Sequence[str], /) -> TextFeatures:
        """Return unit rows (k, d)."""


def prototype(features: TextFeatures) -> np.ndarray:
    """Return the normalised mean (d,) of unit rows (k, d); zero if they cancel each other.

    unit -> mean -> unit (Radford et al., ICML 2021, section 3.1.4; Pratt et al., ICCV 2023, section 3).
    """
    return unit_rows(features.mean(axis=0))


def pool(row: Row, pooling: Pooling, features: TextFeatures) -> np.ndarray:
    """Return the pooled unit features (k, d) of a row's prompts: (d,), or (slots, d) if aligned."""
    if pooling is Pooling.PROTOTYPE:
        return prototype(features)
    if pooling is Pooling.MEAN:
        mean: np.ndarray = features.mean(axis=0)
        return mean
    if len(row.slots) == len(features):
        return np.ascontiguousarray(features)
    ends = np.cumsum([len(slot.texts) for slot in row.slots])[:-1]
    return np.stack([prototype(part) for part in np.split(features, ends)])


def _nothing(*_: object) -> None:
    pass


@dataclass(eq=False, slots=True)
class _Work:
    """Rows that are being computed, and the number of requests that wait for them."""

    task: asyncio.Task[dict[_Key, np.ndarray]] | None = None
    waiting: int = 0


class ClassEmbeddingCache:
    """A cache of rows that drops the least recently used first.

    It has one entry for each row, and not one matrix for each label set, so a class that is added to a thousand others
    costs one class. A request waits for rows that another one is computing. For use from the event loop only.

    Args:
        max_bytes: limit of all rows; a row takes 2 KiB at 512 dimensions, times its slots if it is aligned.
        count: called for each request with the model, the number of cached rows and the number of missing ones.
    """

    def __init__(self, max_bytes: int, count: Callable[[str, int, int], object] = _nothing) -> None:
        self._count = count
        self._rows: LRUCache[_Key, np.ndarray] = LRUCache(max_bytes, getsizeof=lambda row: row.nbytes)
        self._running: dict[_Key, _Work] = {}

    async def get(self, model: str, encode: TextEncoder, pooling: Pooling, rows: Sequence[Row]) -> np.ndarray:
        """Return the rows stacked, (r, d) or (r, k, d), float32 and read-only.

        If every request for the rows is cancelled, those that are computed are kept and the rest is not computed.
        """
        # The prompts of ten thousand classes are many megabytes, which take long to hash.
        few = sum(len(slot.texts) for row in rows for slot in row.slots) <= _FEW_PROMPTS
        keys = _keys(model, pooling, rows) if few else await asyncio.to_thread(_keys, model, pooling, rows)
        found = {key: row for key in keys if (row := self._rows.get(key)) is not None}
        self._count(model, len(keys) - (missing_count := sum(key not in found for key in keys)), missing_count)
        missing = {key: row for key, row in zip(keys, rows, strict=True) if not (key in found or key in self._running)}
        if missing:
            work = _Work()
            work.task = asyncio.create_task(self._compute(encode, missing, work))
            # Requests that wait get the exception. Reading it here keeps asyncio from reporting it if none waits.
            work.task.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._running.update(dict.fromkeys(missing, work))
        needed = {self._running[key] for key in keys if key not in found}
        for work in needed:
            work.waiting += 1
        try:
            for work in needed:
                assert work.task is not None
                found |= await asyncio.shield(work.task)
        finally:
            for work in needed:
                work.waiting -= 1
        stacked = np.stack([found[key] for key in keys])
        stacked.flags.writeable = False
        return stacked

    async def _compute(self, encode: TextEncoder, missing: dict[_Key, Row], work: _Work) -> dict[_Key, np.ndarray]:
        computed: dict[_Key, np.ndarray] = {}
        try:
            for number, piece in enumerate(_pieces(list(missing.items()))):
                if number and not work.waiting:
                    break
                prompts = [text for _, row in piece for text in row.texts]
                features = await encode(prompts)
                if len(features) != len(prompts):
                    raise ValueError(f"{len(features)} rows of features for {len(prompts)} prompts")
                first = 0
                for key, row in piece:
                    last = first + len(row.texts)
                    # A copy, because a view would keep the features of the whole piece in memory.
                    embedding = np.array(pool(row, key[1], features[first:last]))
                    computed[key] = embedding
                    if embedding.nbytes <= self._rows.maxsize:
                        self._rows[key] = embedding
                    first = last
            return computed
        finally:
            for key in missing:
                del self._running[key]


def _keys(model: str, pooling: Pooling, rows: Sequence[Row]) -> list[_Key]:
    """Return a key for each row, with a hash of 16 bytes in place of the prompts."""
    keys = []
    for row in rows:
        digest = hashlib.blake2b(digest_size=16)
        for slot in row.slots:
            for text in slot.texts:
                digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
            digest.update(b"\1")
        keys.append((model, pooling, digest.digest()))
    return keys


def _pieces(rows: list[tuple[_Key, Row]]) -> list[list[tuple[_Key, Row]]]:
    """Split rows into pieces of about ``_PROMPTS_AT_ONCE`` prompts, and of at least one row."""
    pieces: list[list[tuple[_Key, Row]]] = []
    prompts = _PROMPTS_AT_ONCE
    for key, row in rows:
        count = len(row.texts)
        if prompts + count > _PROMPTS_AT_ONCE:
            pieces.append([])
            prompts = 0
        pieces[-1].append((key, row))
        prompts += count
    return pieces
