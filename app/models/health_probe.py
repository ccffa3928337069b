"""Something small and known that is encoded now and then, so that a device that fails is found before a caller is."""

import asyncio
import time
from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np
import structlog

from app.errors import OverloadedError
from app.models.queue import TurnQueue

log = structlog.get_logger()

Item = TypeVar("Item")


class HealthProbe(Generic[Item]):
    """Watches one queue. Where callers keep it busy, what they get tells enough, and nothing is added.

    Args:
        queue: whose rows are vectors.
        make: gives what to encode; called once, in a thread.
    """

    def __init__(self, queue: TurnQueue[Item, np.ndarray], make: Callable[[], Item]) -> None:
        self._queue = queue
        self._make = make
        self._failed_at = 0.0
        self._failure: str | None = None

    @property
    def problem(self) -> str | None:
        """Why the last one failed; None where it did not, or where anything was encoded since."""
        return self._failure if self._failed_at > self._queue.last_encoded_at else None

    async def watch(self, every_s: float) -> None:
        """Encode one whenever nothing else was for so long; until it is cancelled."""
        item = await asyncio.to_thread(self._make)
        while True:
            await asyncio.sleep(every_s)
            if time.perf_counter() - self._queue.last_encoded_at >= every_s:
                await self._try(item)

    async def _try(self, item: Item) -> None:
        try:
            (row,) = await self._queue.run([item])
            failure = None if np.isfinite(row).all() else "its features are not finite numbers"
        except OverloadedError:
            return  # it is busy; whether it is stuck, the queue knows itself
        except Exception as error:  # noqa: BLE001 - whatever an encoder raises
            failure = str(error) or type(error).__name__
        if failure is None:
            self._failure = None
            return
        if self._failure is None:
            log.error("canary_failed", queue=self._queue.name, reason=failure)
        self._failure = f"{self._queue.name}: a test could not be encoded ({failure})"
        self._failed_at = time.perf_counter()
