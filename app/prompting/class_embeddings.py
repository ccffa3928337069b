"""From class names and templates to class embeddings, with no text encoded twice.

A class embedding is the mean of its prompts' unit features, made unit again (Radford et al., ICML 2021, section 3.1.4):
unit -> mean -> unit.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from cachetools import LRUCache

from app.prompting.templates import fill
from app.task import ClassEmbeddings, TextFeatures

_Key = tuple[str, tuple[str, ...], str]

# Class embeddings are made in pieces: the features of all prompts (1.6 GB for 80 templates of 10,000 classes) never lie
# in memory together, and work that nobody waits for any more ends after the piece that has begun.
_PROMPTS_AT_ONCE = 256


class TextEncoder(Protocol):
    """Encodes prompts off the event loop."""

    async def __call__(self, prompts: Sequence[str], /) -> TextFeatures:
        """Return unit rows (k, d)."""


def class_embeddings(prompt_features: TextFeatures, prompts_per_class: int) -> ClassEmbeddings:
    """Return unit rows (c, d) from unit rows (c * k, d) in class order."""
    count, dims = prompt_features.shape
    means = prompt_features.reshape(count // prompts_per_class, prompts_per_class, dims).mean(axis=1)
    embeddings: ClassEmbeddings = means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    return embeddings


def _nothing(*_: object) -> None:
    pass


@dataclass(eq=False, slots=True)
class _Work:
    """Rows that are being computed, and how many requests wait for them."""

    task: asyncio.Task[dict[_Key, np.ndarray]] | None = None
    waiting: int = 0


class ClassEmbeddingCache:
    """Class embeddings by model, templates and class name, least recently used first out.

    One row per class rather than one matrix per label set: a class added to a thousand others costs one class. Rows
    that another request is computing are waited for, not computed again. Used from the event loop only.

    Args:
        max_bytes: bound on what is kept, half of it rows and half whole matrices; a row takes 2 KiB at 512 dimensions.
        count: told the model of each request, how many rows were there and how many were not.
    """

    def __init__(self, max_bytes: int, count: Callable[[str, int, int], object] = _nothing) -> None:
        self._count = count
        self._rows: LRUCache[_Key, np.ndarray] = LRUCache(max_bytes // 2, getsizeof=lambda row: row.nbytes)
        self._matrices: LRUCache[tuple[str, tuple[str, ...], tuple[str, ...]], ClassEmbeddings] = LRUCache(
            max_bytes // 2, getsizeof=lambda matrix: matrix.nbytes
        )
        self._running: dict[_Key, _Work] = {}

    async def get(
        self, model: str, encode: TextEncoder, *, templates: tuple[str, ...], classnames: tuple[str, ...]
    ) -> ClassEmbeddings:
        """Return unit rows (c, d), read-only, in the order of ``classnames``.

        When every request for them is cancelled, what has been computed is kept and the rest is left.
        """
        whole = (model, templates, classnames)
        if (cached := self._matrices.get(whole)) is not None:
            self._count(model, len(classnames), 0)
            return cached
        keys = [(model, templates, name) for name in classnames]
        rows = {key: row for key in keys if (row := self._rows.get(key)) is not None}
        self._count(model, len(rows), len(keys) - len(rows))
        missing = [key for key in dict.fromkeys(keys) if key not in rows and key not in self._running]
        if missing:
            work = _Work()
            work.task = asyncio.create_task(self._compute(encode, missing, work))
            # Whoever waits gets the exception; when nobody waits any more, it is not reported as lost.
            work.task.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._running.update(dict.fromkeys(missing, work))
        needed = {self._running[key] for key in keys if key not in rows}
        for work in needed:
            work.waiting += 1
        try:
            for work in needed:
                assert work.task is not None
                rows |= await asyncio.shield(work.task)
        finally:
            for work in needed:
                work.waiting -= 1
        matrix: ClassEmbeddings = np.stack([rows[key] for key in keys])
        matrix.flags.writeable = False
        if matrix.nbytes <= self._matrices.maxsize:
            self._matrices[whole] = matrix
        return matrix

    async def _compute(self, encode: TextEncoder, keys: Sequence[_Key], work: _Work) -> dict[_Key, np.ndarray]:
        _, templates, _ = keys[0]
        at_once = max(1, _PROMPTS_AT_ONCE // len(templates))
        rows: dict[_Key, np.ndarray] = {}
        try:
            for start in range(0, len(keys), at_once):
                if start and not work.waiting:
                    break
                piece = keys[start : start + at_once]
                prompts = [prompt for _, _, name in piece for prompt in fill(templates, name)]
                embeddings = class_embeddings(await encode(prompts), len(templates))
                # Copies, since a view would keep the whole matrix alive after its neighbours are evicted.
                made = {key: embedding.copy() for key, embedding in zip(piece, embeddings, strict=True)}
                rows |= made
                self._rows.update({key: row for key, row in made.items() if row.nbytes <= self._rows.maxsize})
            return rows
        finally:
            for key in keys:
                del self._running[key]
