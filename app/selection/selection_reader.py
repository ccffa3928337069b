"""The stored selections: read for requests, and requested again if a label set or its examples have changed."""

import asyncio
from collections.abc import Mapping
from typing import Any

import structlog
from cachetools import LRUCache

from app.classification.resolve import SelectedMethod
from app.errors import StoreError, UnknownNameError
from app.models.registry import ModelRegistry
from app.scoring.calibration import Calibration, Rejection
from app.store.examples import SelectionRepository, StoredSelection
from app.store.jobs import JobRepository, JobStatus
from app.types import LabelSet

log = structlog.get_logger()

SELECT_METHOD = "select-method"
"""The kind of the job that compares the methods on a label set's examples."""

# Selections in memory; one takes up to two megabytes, with the scores of thousands of held-out images.
_CACHED_SELECTIONS = 64


class SelectionReader:
    """Reads selections, and asks for a new one if the label set or its examples have changed.

    Args:
        repository: stores selections.
        models: in service.
        jobs: where a new selection is asked for; None asks for none, for commands that run no jobs.
    """

    def __init__(self, repository: SelectionRepository, models: ModelRegistry, jobs: JobRepository | None) -> None:
        self._repository = repository
        self._models = models
        self._jobs = jobs
        self._known: LRUCache[tuple[str, str], SelectedMethod] = LRUCache(_CACHED_SELECTIONS)
        self._requested: dict[str, tuple[int, int]] = {}
        self._requests: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Cancel the requests for new selections that have not been written."""
        self._jobs = None
        for request in self._requests:
            request.cancel()
        await asyncio.gather(*self._requests, return_exceptions=True)

    @property
    def is_kept_current(self) -> bool:
        """Whether a job compares the methods again after each change."""
        return self._jobs is not None

    async def stored(self, label_set: LabelSet, model: str | None) -> StoredSelection:
        """Return the latest selection with all of its figures.

        Raises:
            UnknownNameError: no such model, or the methods have not been compared yet.
        """
        fingerprint = await self._models.get(model).image_fingerprint()
        selection = await self._repository.get(label_set.name, fingerprint)
        if selection is None:
            raise UnknownNameError(
                "selection of label set",
                label_set.name,
                way_out="add example images, and wait until the methods have been compared on them",
            )
        return selection

    async def get(self, label_set: LabelSet, model: str) -> SelectedMethod | None:
        """Return the latest selection; None if the label set has no examples or the methods were never compared."""
        if not label_set.examples_revision:
            return None
        fingerprint = await self._models.get(model).image_fingerprint()
        key = (label_set.name, fingerprint)
        selected = self._known.get(key)
        current = (label_set.version, label_set.examples_revision)
        if selected is not None and (selected.version, selected.revision) == current:
            return selected
        state = await self._repository.state(label_set.name, fingerprint)
        if state is None:
            self._request(label_set.name, (0, label_set.examples_revision))
            return None
        if not state.is_current:
            self._request(label_set.name, (state.last_version, state.last_revision))
        if selected is not None and (selected.version, selected.revision) == (state.version, state.revision):
            return selected
        selection = await self._repository.get(label_set.name, fingerprint)
        if selection is None:  # deleted since
            return None
        selected = await asyncio.to_thread(_selected_method, selection)
        self._known[key] = selected
        return selected

    def _request(self, name: str, state: tuple[int, int]) -> None:
        """Ask for a new selection, once for each state of the label set."""
        if self._jobs is None or self._requested.get(name) == state:
            return
        self._requested[name] = state
        request = asyncio.create_task(self._add_job(name, self._jobs))
        self._requests.add(request)
        request.add_done_callback(self._requests.discard)

    async def _add_job(self, name: str, jobs: JobRepository) -> None:
        try:
            # A running job may have read an older state, so the next request asks again.
            _, added = await jobs.add_unless({JobStatus.QUEUED, JobStatus.RUNNING}, SELECT_METHOD, name, {})
            if not added:
                self._requested.pop(name, None)
        except Exception as error:
            self._requested.pop(name, None)  # the next request asks again
            if not isinstance(error, StoreError):
                raise
            log.warning("selection_not_requested", label_set=name, reason=error.message)


def evidence_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what responses show of a stored selection: all but the scores of the held-out images."""
    return {name: value for name, value in result.items() if name not in {"calibrations", "rejection", "scalings"}}


def _selected_method(selection: StoredSelection) -> SelectedMethod:
    result = selection.result
    calibrations = {name: Calibration.from_json(each) for name, each in result["calibrations"].items()}
    stored = result.get("rejection")  # which earlier releases did not store
    return SelectedMethod(
        result["method"],
        result["reason"],
        calibrations,
        None if stored is None else Rejection.from_json(stored),
        selection.version,
        selection.revision,
        result.get("thresholds", {}),
        result.get("shared_threshold"),
        result.get("scalings", {}),
    )
