"""A caption database in service: the generation in use, and the queue of its searches."""

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import structlog
from jaxtyping import Float32

from app.captions.database import CaptionDatabase, NearestCaptions
from app.captions.generations import current_generation, is_database
from app.captions.index import WHOLE, Part
from app.errors import StoreError
from app.models.queue import EncodeQueue
from app.observability.metrics import Metrics, TowerMetrics
from app.types import ImageFeatures, TextFeatures

log = structlog.get_logger()

_REFRESH_INTERVAL_S = 1.0
_SEARCHES_PER_BATCH = 64


@dataclass(frozen=True, slots=True)
class _Search:
    """One query (d,) for the k nearest captions in a part of a database."""

    database: CaptionDatabase
    query: Float32[np.ndarray, " d"]
    k: int
    features: bool
    part: Part


class ServedDatabase:
    """A database and the queue of its searches; ``database`` is the generation in use, once ``refresh`` found one.

    Args:
        folder: of the database.
        metrics: receives the numbers of searches.
        max_queued: searches that may wait.
        stalled_after_s: a search that takes longer makes the database unhealthy.
    """

    def __init__(self, folder: Path, metrics: Metrics, *, max_queued: int, stalled_after_s: float) -> None:
        self.database: CaptionDatabase | None = None
        self.is_deleted = False
        self._folder = folder
        self._lock = threading.Lock()
        self._refreshed_at = -math.inf
        self._last_problem: str | None = None
        self._metrics = TowerMetrics(metrics, folder.name, "captions")
        self.queue: EncodeQueue[_Search, NearestCaptions] = EncodeQueue(
            f"the caption database '{folder.name}'",
            lambda searches, _: partial(_search_batch, searches),
            batch_size=_SEARCHES_PER_BATCH,
            metrics=self._metrics,
            max_queued=max(max_queued, _SEARCHES_PER_BATCH),
            stalled_after_s=stalled_after_s,
        )
        queue = self.queue  # the metrics must not hold a reference to self, which would keep the database open
        self._metrics.watch(waiting=lambda: queue.waiting, admitted=lambda: queue.admitted)

    def close(self) -> None:
        """End the thread, and close the files."""
        self.queue.close()
        self.database = None
        self._metrics.forget()

    @property
    def current(self) -> CaptionDatabase:
        """The generation in use; there is one after ``refresh``."""
        assert self.database is not None
        return self.database

    @property
    def is_fresh(self) -> bool:
        """Whether the database exists and was refreshed less than a second ago."""
        return (
            self.database is not None
            and not self.is_deleted
            and time.monotonic() - self._refreshed_at <= _REFRESH_INTERVAL_S
        )

    def refresh(self) -> None:
        """Open the current generation unless it is open; may run in any thread.

        If the database was deleted, or the current generation cannot be opened, the previous one stays open.

        Raises:
            StoreError: it is damaged, and no generation is open.
        """
        with self._lock:
            self.is_deleted = not is_database(self._folder)
            if self.is_deleted:
                return
            try:
                if (
                    self.database is None
                    or current_generation(self._folder) != self.database.generation
                    or self.database.problem is not None  # a build may have repaired this generation
                ):
                    self.database = CaptionDatabase.open(self._folder, fingerprint=None)
                    self._log_opened(self.database)
            except StoreError as error:
                if self.database is None:
                    raise
                if error.message != self._last_problem:
                    log.warning("database_not_replaced", database=self._folder.name, reason=error.message)
                    self._last_problem = error.message
            self._refreshed_at = time.monotonic()

    def _log_opened(self, database: CaptionDatabase) -> None:
        self._last_problem = None
        log.info(
            "database_opened",
            database=self._folder.name,
            generation=database.generation,
            captions=len(database),
            model=database.manifest.model,
        )

    async def search(
        self,
        database: CaptionDatabase,
        queries: ImageFeatures | TextFeatures,
        k: int,
        *,
        features: bool,
        within_s: float | None,
        part: Part = WHOLE,
    ) -> list[NearestCaptions]:
        """Return the k captions of a generation nearest to each query, in batches with other callers' searches."""
        searches = [_Search(database, query, k, features, part) for query in queries]
        found: list[NearestCaptions] = []
        # One request may have more images than the queue has room for.
        for first in range(0, len(searches), self.queue.batch_size):
            found += await self.queue.run(searches[first : first + self.queue.batch_size], within_s=within_s)
        return found


def _search_batch(searches: Sequence[_Search]) -> list[NearestCaptions]:
    """Run together the searches of the same generation, part and k; the candidates of a search depend on k."""
    found: dict[int, NearestCaptions] = {}
    groups: dict[tuple[int, int, Part], list[int]] = {}
    for index, search in enumerate(searches):
        groups.setdefault((id(search.database), search.k, search.part), []).append(index)
    for (_, k, part), group in groups.items():
        database = searches[group[0]].database
        rows, cosines = database.search(np.stack([searches[index].query for index in group]), k, part)
        for index, own_rows, own_cosines in zip(group, rows, cosines, strict=True):
            found[index] = database.nearest(own_rows, own_cosines, features=searches[index].features)
    return [found[index] for index in range(len(searches))]
