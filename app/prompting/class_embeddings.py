"""From prompts to what an adapter takes, with no text encoded twice."""

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

# Rows are made in pieces: the features of all prompts (1.6 GB for 80 templates of 10,000 classes) never lie in memory
# together, and work that nobody waits for any more ends after the piece that has begun.
_PROMPTS_AT_ONCE = 256

# So few are hashed in a millisecond or two, and not worth another thread.
_FEW_PROMPTS = 2000


class TextEncoder(Protocol):
    """Encodes prompts off the event loop."""

    async def __call__(self, prompts: Sequence[str], /) -> TextFeatures:
        """Return unit rows (k, d)."""


def prototype(features: TextFeatures) -> np.ndarray:
    """Return the mean of unit rows (k, d), made unit again, (d,); zero where they cancel each other.

    unit -> mean -> unit (Radford et al., ICML 2021, section 3.1.4; Pratt et al., ICCV 2023, section 3).
    """
    return unit_rows(features.mean(axis=0))


def pool(row: Row, pooling: Pooling, features: TextFeatures) -> np.ndarray:
    """Return what is kept of a row whose prompts have these unit features (k, d): (d,), or (slots, d) where aligned."""
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
    """Rows being computed, and how many requests wait for them."""

    task: asyncio.Task[dict[_Key, np.ndarray]] | None = None
    waiting: int = 0


class ClassEmbeddingCache:
    """Keeps rows, least recently used first out.

    One entry per row rather than one matrix per label set: a class added to a thousand others costs one class. Rows
    that another request is computing are waited for, not computed again. Used from the event loop only.

    Args:
        max_bytes: bound on what is kept; a row takes 2 KiB at 512 dimensions, times its slots where it is aligned.
        count: told the model of each request, how many rows were there and how many were not.
    """

    def __init__(self, max_bytes: int, count: Callable[[str, int, int], object] = _nothing) -> None:
        self._count = count
        self._rows: LRUCache[_Key, np.ndarray] = LRUCache(max_bytes, getsizeof=lambda row: row.nbytes)
        self._running: dict[_Key, _Work] = {}

    async def get(self, model: str, encode: TextEncoder, pooling: Pooling, rows: Sequence[Row]) -> np.ndarray:
        """Return the rows stacked, (r, d) or (r, k, d), float32 and read-only.

        When every request for them is cancelled, what has been computed is kept and the rest is left.
        """
        # The prompts of ten thousand classes are many megabytes to hash.
        few = sum(len(slot.texts) for row in rows for slot in row.slots) <= _FEW_PROMPTS
        keys = _keys(model, pooling, rows) if few else await asyncio.to_thread(_keys, model, pooling, rows)
        found = {key: row for key in keys if (row := self._rows.get(key)) is not None}
        self._count(model, len(keys) - (missing_count := sum(key not in found for key in keys)), missing_count)
        missing = {key: row for key, row in zip(keys, rows, strict=True) if not (key in found or key in self._running)}
        if missing:
            work = _Work()
            work.task = asyncio.create_task(self._compute(encode, missing, work))
            # Whoever waits gets the exception; when nobody waits any more, it is not reported as lost.
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
        made: dict[_Key, np.ndarray] = {}
        try:
            for number, piece in enumerate(_pieces(list(missing.items()))):
                if number and not work.waiting:
                    break
                prompts = [text for _, row in piece for text in row.texts]
                features = await encode(prompts)
                if len(features) != len(prompts):
                    msg = f"{len(features)} rows of features for {len(prompts)} prompts"
                    raise ValueError(msg)
                first = 0
                for key, row in piece:
                    last = first + len(row.texts)
                    # A copy where it is a view, which would keep the whole piece alive.
                    embedding = np.array(pool(row, key[1], features[first:last]))
                    made[key] = embedding
                    if embedding.nbytes <= self._rows.maxsize:
                        self._rows[key] = embedding
                    first = last
            return made
        finally:
            for key in missing:
                del self._running[key]


def _keys(model: str, pooling: Pooling, rows: Sequence[Row]) -> list[_Key]:
    """Return a key per row that takes 16 bytes and not the length of its prompts."""
    keys = []
    for row in rows:
        told = hashlib.blake2b(digest_size=16)
        for slot in row.slots:
            for text in slot.texts:
                told.update(text.encode("utf-8", "surrogatepass") + b"\0")
            told.update(b"\1")
        keys.append((model, pooling, told.digest()))
    return keys


def _pieces(rows: list[tuple[_Key, Row]]) -> list[list[tuple[_Key, Row]]]:
    """Split into pieces of about as many prompts as are encoded at once, at least one row each."""
    pieces: list[list[tuple[_Key, Row]]] = []
    prompts = _PROMPTS_AT_ONCE
    for each in rows:
        count = len(each[1].texts)
        if prompts + count > _PROMPTS_AT_ONCE:
            pieces.append([])
            prompts = 0
        pieces[-1].append(each)
        prompts += count
    return pieces
