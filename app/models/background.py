"""Lets background work have a model only while no request needs it, and a little of the time in any case."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from app.types import TextFeatures

_QUIET_S = 0.05
"""Seconds without a request after which background work runs: longer than between the requests of one caller."""

_SHARE = 0.05
"""Share of the time that background work gets while requests never pause, so that it ends some time."""

_TURN_S = 0.02
"""Seconds of a turn: a request that arrives during one is slowed for as long."""

_RECENTLY_S = 2.0
"""Seconds after the last request from which turns are longer, because no request is expected."""

_LONG_TURN_S = 0.25
_FIRST_TEXTS = 8
_MAX_TEXTS = 256


class BackgroundTurns:
    """Takes turns with requests, one turn at a time; for use from one event loop.

    A turn begins when no request has been admitted for a moment, or at the latest when its wait was so long that
    background work had only ``_SHARE`` of the time.

    Args:
        last_request_at: returns when the last request was in a queue, on the clock of ``time.perf_counter``; now while
            one is.
    """

    def __init__(self, last_request_at: Callable[[], float]) -> None:
        self._last_request_at = last_request_at
        self._lock = asyncio.Lock()
        self._ended_at = 0.0
        self._took_s = 0.0
        self._s_per_text = _TURN_S / _FIRST_TEXTS

    async def encode(
        self, encode: Callable[[Sequence[str]], Awaitable[TextFeatures]], texts: Sequence[str]
    ) -> TextFeatures:
        """Return the rows of one or more texts, encoded a few at a time in turns."""
        rows: list[TextFeatures] = []
        done = 0
        while done < len(texts):
            async with self._lock:
                await self._quiet()
                some = texts[done : done + self._texts_of_a_turn()]
                began = time.perf_counter()
                rows.append(await encode(some))
                self._ended_at = time.perf_counter()
                self._took_s = self._ended_at - began
                self._s_per_text = self._took_s / len(some)
            done += len(some)
        features: TextFeatures = np.concatenate(rows)
        return features

    async def _quiet(self) -> None:
        """Wait until the next turn may begin."""
        while True:
            now = time.perf_counter()
            quiet_in_s = self._last_request_at() + _QUIET_S - now
            due_in_s = self._ended_at + self._took_s * (1 / _SHARE - 1) - now
            wait_s = min(quiet_in_s, due_in_s)
            if wait_s <= 0:
                return
            await asyncio.sleep(min(wait_s, _QUIET_S))

    def _texts_of_a_turn(self) -> int:
        is_recent = time.perf_counter() - self._last_request_at() < _RECENTLY_S
        turn_s = _TURN_S if is_recent else _LONG_TURN_S
        return max(1, min(_MAX_TEXTS, int(turn_s / max(self._s_per_text, 1e-6))))
