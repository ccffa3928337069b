"""The queue in front of each tower of each model: bounded, in order, one forward pass at a time."""

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from app.errors import NotReadyError, OverloadedError

Item = TypeVar("Item")

# How much one finished batch moves the measured rate: recent enough for Retry-After, steady enough not to jump.
_RATE_MEMORY = 0.2


@dataclass(frozen=True, slots=True)
class Encoded:
    """The rows that one request got, the time it waited for its turn and the time its own forward passes took."""

    features: np.ndarray
    queue_ms: float
    encode_ms: float


class EncodeQueue(Generic[Item]):
    """Runs ``encode`` on one thread of its own, in batches of at most ``batch_size`` items.

    Requests take turns by batch, so that a large one holds a small one up for a batch and not for all its items.

    Args:
        name: names the thread, for logs and debuggers.
        encode: items to rows; called from the queue's thread only.
        batch_size: items in one call of ``encode``.
        max_queued: items admitted at once, waiting and running; None sets no bound.
    """

    def __init__(
        self,
        name: str,
        encode: Callable[[Sequence[Item]], np.ndarray],
        *,
        batch_size: int,
        max_queued: int | None = None,
    ) -> None:
        self.name = name
        self.max_queued = max_queued
        self.batch_size = batch_size
        self._encode = encode
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._admitted = 0
        self._items_per_s = 0.0

    @property
    def admitted(self) -> int:
        """Items that are admitted and not done."""
        return self._admitted

    @contextmanager
    def admit(self, count: int) -> Iterator[None]:
        """Hold ``count`` places, from before an image is decoded until its features are there.

        Raises:
            OverloadedError: they are not free; ``retry_after_s`` is how long those before take at the measured rate.
        """
        if self.max_queued is not None and self._admitted + count > self.max_queued:
            wait_s = self._admitted / self._items_per_s if self._items_per_s else 1.0
            raise OverloadedError(
                f"{count} more would not fit: {self._admitted} of {self.max_queued} places in the queue of {self.name}"
                " are taken; try again later, or raise DEIXIS_MAX_QUEUED_IMAGES",
                retry_after_s=max(1, math.ceil(wait_s)),
            )
        self._admitted += count
        try:
            yield
        finally:
            self._admitted -= count

    async def run(self, items: Sequence[Item]) -> Encoded:
        """Encode at least one item; cancelling stops what has not begun.

        Raises:
            NotReadyError: the queue is closed, or was before the last of the items had its turn.
        """
        rows, queue_s, encode_s = [], 0.0, 0.0
        for start in range(0, len(items), self.batch_size):
            submitted = time.perf_counter()
            features, began, ended = await self._in_turn(items[start : start + self.batch_size])
            rows.append(features)
            queue_s += began - submitted
            encode_s += ended - began
        return Encoded(rows[0] if len(rows) == 1 else np.concatenate(rows), queue_s * 1000, encode_s * 1000)

    async def _in_turn(self, batch: Sequence[Item]) -> tuple[np.ndarray, float, float]:
        closed = f"the queue of {self.name} is closed; the service is stopping"
        try:
            running = asyncio.get_running_loop().run_in_executor(self._thread, self._timed, batch)
        except RuntimeError:  # the thread takes nothing more
            raise NotReadyError(closed) from None
        try:
            return await running
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # It was ``close`` that dropped the batch: this request is not cancelled and must learn why it ends.
            raise NotReadyError(closed) from None

    def _timed(self, batch: Sequence[Item]) -> tuple[np.ndarray, float, float]:
        began = time.perf_counter()
        features = self._encode(batch)
        ended = time.perf_counter()
        rate = len(batch) / max(ended - began, 1e-9)
        self._items_per_s += (_RATE_MEMORY if self._items_per_s else 1.0) * (rate - self._items_per_s)
        return features, began, ended

    def close(self) -> None:
        """Finish the batch that is running, drop the rest, end the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)
