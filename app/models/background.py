"""Encodes a few texts or images at a time in turns with requests."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from app.errors import OverloadedError
from app.runtime.turns import TURN_S, Turns

_Item = TypeVar("_Item")
_Row = TypeVar("_Row")

_LONG_TURN_S = 0.25
"""Seconds of a turn while no request is expected."""

_MAX_CONTENDED = 3
"""How many turns a turn may count for because requests slow it, beyond the fastest time that its items have taken."""

_FIRST_ITEMS = 8
_MAX_ITEMS = 256


class BackgroundEncoding:
    """Encodes in turns, one turn at a time; for use from one event loop.

    Args:
        turns: of all background work.
    """

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._lock = asyncio.Lock()
        self._s_per_item: dict[Hashable, float] = {}

    async def encode(
        self,
        tower: Hashable,
        encode: Callable[[Sequence[_Item]], Awaitable[Iterable[_Row]]],
        items: Sequence[_Item],
    ) -> list[_Row]:
        """Return the rows of items, encoded a few at a time.

        Once the first of them are encoded, it waits while requests fill the queue; it raises the errors of ``encode``.

        Args:
            tower: identifies what encodes, and so has a speed of its own.
            encode: returns a row for each item.
            items: any number.
        """
        rows: list[_Row] = []
        while len(rows) < len(items):
            try:
                rows += await self._turn(tower, encode, items[len(rows) : len(rows) + _MAX_ITEMS])
            except OverloadedError as error:
                if not rows:
                    raise
                await asyncio.sleep(error.retry_after_s)
        return rows

    async def _turn(
        self, tower: Hashable, encode: Callable[[Sequence[_Item]], Awaitable[Iterable[_Row]]], items: Sequence[_Item]
    ) -> list[_Row]:
        """Wait for a turn, and return the rows of the first items."""
        async with self._lock:
            wait_s, counts = self._turns.begin(self)
            while wait_s:
                await asyncio.sleep(wait_s)
                wait_s, counts = self._turns.begin(self)
            some = items[: self._items_of_a_turn(tower)]
            began = time.perf_counter()
            try:
                rows = list(await encode(some))
                self._measured(tower, time.perf_counter() - began, rows)
                return rows
            finally:
                if counts:
                    # While requests use the cores, most of the time is theirs.
                    most_s = max(_MAX_CONTENDED * TURN_S, self._s_per_item.get(tower, 0.0) * len(some))
                    self._turns.end(min(time.perf_counter() - began, most_s))

    def _measured(self, tower: Hashable, took_s: float, rows: Sequence[object]) -> None:
        """Keep the fastest time of an item; one that cannot be decoded takes almost none, and says nothing."""
        if encoded := sum(not isinstance(row, Exception) for row in rows):
            self._s_per_item[tower] = min(took_s / encoded, self._s_per_item.get(tower, took_s))

    def _items_of_a_turn(self, tower: Hashable) -> int:
        turn_s = TURN_S if self._turns.is_request_expected else _LONG_TURN_S
        s_per_item = self._s_per_item.get(tower, TURN_S / _FIRST_ITEMS)
        return max(1, min(_MAX_ITEMS, int(turn_s / max(s_per_item, 1e-6))))
