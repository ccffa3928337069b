"""Which method the example images of a label set are evidence for: what was found, and that it is found out again."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import structlog
from cachetools import LRUCache

from app.classification.pipeline import Pipeline
from app.errors import StoreError
from app.scoring.calibration import Calibration
from app.store.examples import Selection, SelectionRepository
from app.types import LabelSet

log = structlog.get_logger()

# Choices that are kept in memory; one takes up to two megabytes, with the scores of thousands of held-out images.
_CHOICES = 64


@dataclass(frozen=True, slots=True)
class MethodChoice:
    """Which method the examples of a label set are evidence for, and what held-out ones say of each method's scores.

    ``version`` and ``revision`` are those of the label set and of its examples that were tried.
    """

    method: str
    reason: str
    calibrations: Mapping[str, Calibration]
    version: int
    revision: int

    @classmethod
    def of(cls, selection: Selection) -> "MethodChoice":
        """Return the choice that was stored."""
        told = selection.result
        calibrations = {name: Calibration.from_json(each) for name, each in told["calibrations"].items()}
        return cls(told["method"], told["reason"], calibrations, selection.version, selection.revision)


class MethodSelector:
    """Hands out choices, and notices where one is out of date.

    Args:
        repository: where they are kept.
        pipeline: knows the models.
    """

    def __init__(self, repository: SelectionRepository, pipeline: Pipeline) -> None:
        self.repository = repository
        self._pipeline = pipeline
        self.on_untried: Callable[[str], Awaitable[object]] | None = None
        """Called with the name of a label set whose examples, or classes, have changed since methods were tried.

        It returns False to be asked again by the next request.
        """
        self._known: LRUCache[tuple[str, str], MethodChoice] = LRUCache(_CHOICES)
        self._asked_to_try: dict[str, tuple[int, int]] = {}
        self._trying: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Stop asking."""
        self.on_untried = None
        for asking in self._trying:
            asking.cancel()
        await asyncio.gather(*self._trying, return_exceptions=True)

    async def get(self, label_set: LabelSet, model: str) -> MethodChoice | None:
        """Return what was chosen by the examples of a label set; None where there are none, or nothing was yet."""
        if not label_set.examples_revision:
            return None
        fingerprint = await self._pipeline.models[model].image_fingerprint()
        key = (label_set.name, fingerprint)
        choice = self._known.get(key)
        if choice is not None and (choice.version, choice.revision) == (label_set.version, label_set.examples_revision):
            return choice
        state = await self.repository.state(label_set.name, fingerprint)
        if state is None:
            self._ask_to_try(label_set.name, (0, label_set.examples_revision))
            return None
        if not state.is_current:
            self._ask_to_try(label_set.name, (state.last_version, state.last_revision))
        if choice is not None and (choice.version, choice.revision) == (state.version, state.revision):
            return choice
        selection = await self.repository.get(label_set.name, fingerprint)
        if selection is None:  # deleted since
            return None
        choice = await asyncio.to_thread(MethodChoice.of, selection)
        self._known[key] = choice
        return choice

    def _ask_to_try(self, name: str, state: tuple[int, int]) -> None:
        """Have the methods tried on the examples, once for each state of the label set."""
        if self.on_untried is None or self._asked_to_try.get(name) == state:
            return
        self._asked_to_try[name] = state
        asking = asyncio.create_task(self._try(name))
        self._trying.add(asking)
        asking.add_done_callback(self._trying.discard)

    async def _try(self, name: str) -> None:
        assert self.on_untried is not None
        try:
            if await self.on_untried(name) is False:
                self._asked_to_try.pop(name, None)  # it is being tried, and perhaps in an older state
        except StoreError as error:
            self._asked_to_try.pop(name, None)
            log.warning("methods_not_tried", label_set=name, reason=error.message)
