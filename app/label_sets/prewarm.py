"""Label sets are made ready in the background, before they are asked for: one at a time, each in its newest version."""

import asyncio
from collections.abc import Awaitable, Callable

from app.types import LabelSet


class Prewarmer:
    """Calls ``warm`` for one label set after another, so that the new words of requests wait for one batch at most.

    A newer version takes the place of an older one of the same name, whether that has begun or not. Used from the event
    loop only.

    Args:
        warm: computes what a label set needs, and tells of its failures by itself.
    """

    def __init__(self, warm: Callable[[LabelSet], Awaitable[None]]) -> None:
        self._warm = warm
        self._waiting: dict[str, LabelSet] = {}
        self._current: tuple[LabelSet, asyncio.Future[None]] | None = None
        self._runner: asyncio.Task[None] | None = None

    def add(self, label_set: LabelSet) -> None:
        """Take a label set into the list, unless it holds a newer version."""
        waiting = self._waiting.get(label_set.name)
        if waiting is not None and waiting.version > label_set.version:
            return
        if self._current is not None and self._current[0].name == label_set.name:
            current, running = self._current
            if current.version > label_set.version:
                return
            running.cancel()
        self._waiting[label_set.name] = label_set
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._run())

    async def idle(self) -> None:
        """Wait until the list is empty."""
        if self._runner is not None:
            await asyncio.wait([self._runner])

    async def close(self) -> None:
        """Drop the list and stop what has begun."""
        self._waiting.clear()
        if self._current is not None:
            self._current[1].cancel()
        await self.idle()

    async def _run(self) -> None:
        while self._waiting:
            label_set = self._waiting.pop(next(iter(self._waiting)))
            running = asyncio.ensure_future(self._warm(label_set))
            self._current = (label_set, running)
            await asyncio.wait([running])
            self._current = None
