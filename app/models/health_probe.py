"""A periodic health probe: encodes a fixed input so that device failures are detected before they affect a request."""

import asyncio
import time
from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np
import structlog

from app.errors import OverloadedError
from app.models.queue import TurnQueue
from app.observability.loops import Progressed

log = structlog.get_logger()

Item = TypeVar("Item")


class HealthProbe(Generic[Item]):
    """Probes one queue while it is idle; requests show the health of a busy one.

    Args:
        queue: its rows are vectors.
        make: returns the item to encode; called once, in a thread.
    """

    def __init__(self, queue: TurnQueue[Item, np.ndarray], make: Callable[[], Item]) -> None:
        self._queue = queue
        self._make = make
        self._failed_at = 0.0
        self._failure: str | None = None

    @property
    def problem(self) -> str | None:
        """Why the last probe failed; None if it succeeded, or if anything was encoded since."""
        return self._failure if self._failed_at > self._queue.last_encoded_at else None

    @property
    def name(self) -> str:
        """The name of the loop ``watch``."""
        return f"health probe of {self._queue.name}"

    async def watch(self, every_s: float, progressed: Progressed) -> None:
        """Probe the queue whenever it was idle for ``every_s`` seconds; a loop for ``Loops.run``."""
        item = await asyncio.to_thread(self._make)
        while True:
            await asyncio.sleep(every_s)
            if time.perf_counter() - self._queue.last_encoded_at >= every_s:
                await self._try(item)
            progressed()

    async def _try(self, item: Item) -> None:
        try:
            await self._queue.run([item], is_request=False)
            failure = None
        except OverloadedError:
            return  # the queue is busy, and detects itself if it is stuck
        except Exception as error:  # noqa: BLE001 - an encoder may raise anything
            failure = str(error) or type(error).__name__
        if failure is None:
            self._failure = None
            return
        if self._failure is None:
            log.error("health_probe_failed", queue=self._queue.name, reason=failure)
        self._failure = f"{self._queue.name}: the health probe could not be encoded ({failure})"
        self._failed_at = time.perf_counter()
