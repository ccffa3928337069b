"""Builds the classifiers of label sets in the background, before the first request needs them."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from app.errors import StoreError, UnknownNameError
from app.label_sets.service import LabelSets
from app.types import LabelSet

log = structlog.get_logger()

_PAGE = 100


class Prewarmer:
    """Calls ``build`` for one label set after another, so that requests wait for one batch of texts at most.

    A newer version replaces an older one of the same name, whether that is waiting or running. For use from the event
    loop only.

    Args:
        build: computes what a label set needs; logs its own failures.
    """

    def __init__(self, build: Callable[[LabelSet], Awaitable[None]]) -> None:
        self._build = build
        self._waiting: dict[str, LabelSet] = {}
        self._current: tuple[LabelSet, asyncio.Future[None]] | None = None
        self._runner: asyncio.Task[None] | None = None

    def add(self, label_set: LabelSet) -> None:
        """Queue a label set, unless a newer version is queued or running."""
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

    async def add_all(self, label_sets: LabelSets) -> None:
        """Build for the latest version of every stored label set; returns when all are done."""
        after = None
        try:
            while page := await label_sets.list(limit=_PAGE, after=after):
                for summary in page:
                    try:
                        self.add(await label_sets.get(summary.name))
                    except UnknownNameError:
                        continue  # deleted since the page was read
                    await self.idle()  # one at a time, to limit memory
                after = page[-1].name
        except StoreError as error:
            log.warning("prewarming_stopped", reason=error.message)

    async def idle(self) -> None:
        """Wait until the queue is empty."""
        if self._runner is not None:
            await asyncio.wait([self._runner])

    async def close(self) -> None:
        """Drop the queue and cancel what is running."""
        self._waiting.clear()
        if self._current is not None:
            self._current[1].cancel()
        await self.idle()

    async def _run(self) -> None:
        while self._waiting:
            label_set = self._waiting.pop(next(iter(self._waiting)))
            running = asyncio.ensure_future(self._build(label_set))
            self._current = (label_set, running)
            await asyncio.wait([running])
            self._current = None
            if not running.cancelled() and (error := running.exception()) is not None:
                log.error("not_prewarmed", label_set=label_set.name, exc_info=error)
