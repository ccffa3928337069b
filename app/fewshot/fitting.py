"""Fits adapters to example images in the background, on few cores; the old fit is used until the new one is ready."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar
from weakref import WeakValueDictionary

import numpy as np
import structlog
from cachetools import LRUCache

from app.adapters._base import Examples, Scores
from app.adapters._examples import ExampleAdapter, Need
from app.errors import NotReadyError, OverloadedError, TooLargeError
from app.fewshot.neighbours import NeighbourIndex, use_one_thread
from app.runtime.cpu import lower_priority, one_blas_thread
from app.runtime.turns import Turns, give_way, in_background, is_in_background, taking_turns
from app.scoring.numerics import unit_rows
from app.types import ClassEmbeddings, ImageFeatures, Logits

log = structlog.get_logger()

_Result = TypeVar("_Result")

# Fits that run at a time, each on one core at low priority.
_MAX_RUNNING = 2
# Fits of one label set that may wait or run.
_MAX_WAITING = 16
_RETRY_AFTER_S = 5


class LogitScaling(Protocol):
    """The scale and bias that an encoder applies to its similarities."""

    logit_scale: float
    logit_bias: float | None


@dataclass(frozen=True, slots=True, eq=False)
class ClassNames:
    """Rows of text (r, d), one for each name of each class, and the first row of each class (c,), ascending."""

    rows: np.ndarray
    first_rows: np.ndarray

    def one_per_class(self) -> ClassEmbeddings:
        """Return the mean of each class's rows, made unit again, (c, d)."""
        if len(self.first_rows) == len(self.rows):
            return self.rows
        return unit_rows(np.add.reduceat(self.rows, self.first_rows, axis=0))


@dataclass(frozen=True, slots=True)
class FittedAdapter:
    """An adapter fitted to examples, with the index of its pool if it uses neighbours.

    ``revision`` is the examples revision of the label set; ``labelled`` and ``unlabelled`` count the images used;
    ``names`` are the text rows of the class names.
    """

    adapter: ExampleAdapter
    index: NeighbourIndex | None
    nbytes: int
    revision: int = 0
    labelled: int = 0
    unlabelled: int = 0
    names: ClassNames | None = None

    def predict(self, image_features: ImageFeatures) -> Scores:
        """Return the scores (n, c) of unit rows (n, d)."""
        if self.index is None:
            return self.adapter.predict(image_features)
        return self.adapter.predict(image_features, self.index.search(image_features, self.adapter.neighbours))


def fit(
    adapter: ExampleAdapter,
    text: ClassEmbeddings,
    examples: Examples,
    scale: LogitScaling,
    index: NeighbourIndex | None = None,
) -> FittedAdapter:
    """Fit an adapter to the rows of the classes (c, d) and to examples; search the neighbours that it needs.

    Args:
        adapter: a new one.
        text: one row per class.
        examples: without neighbours.
        scale: the encoder's own.
        index: of the pool; None builds it.
    """
    pool = examples.pool_features
    if not (adapter.neighbours and len(pool)):
        index = None
    else:
        index = index or NeighbourIndex(pool)
        near = index.within_pool(pool, adapter.neighbours)
        examples = Examples(examples.support_features, examples.support_labels, pool, near)
    adapter.fit(text, logit_scale=scale.logit_scale, logit_bias=scale.logit_bias, examples=examples)
    return FittedAdapter(
        adapter,
        index,
        _nbytes(adapter) + (0 if index is None else index.nbytes),
        labelled=len(examples.support_features) if Need.SUPPORT in adapter.needs else 0,
        unlabelled=len(pool) if Need.POOL in adapter.needs else 0,
    )


def transduce(
    adapter: ExampleAdapter,
    text: ClassEmbeddings,
    image_features: ImageFeatures,
    scale: LogitScaling,
) -> Scores:
    """Fit an adapter to the images of the request themselves, and return their scores (n, c)."""
    fitted = fit(adapter, text, Examples(pool_features=image_features), scale)
    return fitted.adapter.pool_scores(image_features)


@dataclass(frozen=True, slots=True, eq=False)
class TimedLogits:
    """Logits (n, c) of n images, the seconds that prediction took without fitting, and the adapter's warnings."""

    logits: Logits
    seconds: float
    warnings: tuple[str, ...]


def predict(fitted: FittedAdapter, image_features: ImageFeatures) -> TimedLogits:
    """Return the logits of images (n, d)."""
    began = time.thread_time()  # without the time in which requests have their turn
    scores = fitted.predict(image_features)
    return TimedLogits(scores.logits, time.thread_time() - began, scores.warnings)


def predict_held_out(
    make: Callable[[], ExampleAdapter],
    text: ClassEmbeddings,
    examples: Examples,
    folds: np.ndarray,
    scale: LogitScaling,
    index: NeighbourIndex | None = None,
) -> TimedLogits:
    """Return the logits of the labelled images themselves, each from an adapter fitted to the other folds (s,)."""
    logits = np.empty((len(folds), len(text)), np.float32)
    seconds = 0.0
    warnings: dict[str, None] = {}
    for fold in range(int(folds.max()) + 1):
        held_out = folds == fold
        others = Examples(
            examples.support_features[~held_out], examples.support_labels[~held_out], examples.pool_features
        )
        give_way()
        predicted = predict(fit(make(), text, others, scale, index), examples.support_features[held_out])
        logits[held_out] = predicted.logits
        seconds += predicted.seconds
        warnings.update(dict.fromkeys(predicted.warnings))
    return TimedLogits(logits, seconds, tuple(warnings))


def _nbytes(adapter: ExampleAdapter) -> int:
    return sum(int(getattr(value, "nbytes", 0)) for value in vars(adapter).values())


@dataclass(frozen=True, slots=True)
class FitKey:
    """What is fitted, apart from the examples.

    ``fingerprint`` identifies the image tower; ``label_set`` is the name of the label set, ``reference`` its version.
    """

    fingerprint: str
    method: str
    options: tuple[tuple[str, float], ...]
    templates: tuple[str, ...]
    label_set: str
    reference: str


class FitCache:
    """Fits adapters to stored examples in the background, keeps them, and fits them again when the examples change.

    Fits of one label set run one after another; at most two fits run at a time, each on one core at low priority. Work
    of jobs, and fits that no request waits for, have two threads of their own, and take turns with requests.

    Args:
        cache_bytes: limit on all fitted adapters.
        turns: of the background work; None if there are no requests to make way for.
    """

    def __init__(self, *, cache_bytes: int, turns: Turns | None = None) -> None:
        self._ready: LRUCache[FitKey, FittedAdapter] = LRUCache(cache_bytes, getsizeof=lambda fitted: fitted.nbytes)
        self._running: dict[tuple[FitKey, int], asyncio.Task[FittedAdapter]] = {}
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._closing = False
        self._turns = turns
        self._waiting_requests = 0
        self._threads, self._background = (
            ThreadPoolExecutor(_MAX_RUNNING, thread_name_prefix=name, initializer=lower_priority)
            for name in ("fit", "background-fit")
        )

    async def get(
        self, key: FitKey, revision: int, fit: Callable[[], Awaitable[FittedAdapter]], *, min_revision: int = 0
    ) -> FittedAdapter:
        """Return the adapter fitted to a label set's examples.

        An adapter of an older revision is returned at once, and the new one is fitted in the background; without any,
        or with one older than ``min_revision``, the caller waits for the fit.

        Args:
            key: what is fitted.
            revision: of the examples, at least.
            fit: reads the newest examples and fits the adapter.
            min_revision: the revision of the last deletion; adapters fitted before it must not be used.

        Raises:
            TooLargeError: the fitted adapter is larger than the whole cache.
            StoreError: the examples could not be read.
            NotReadyError: the service is stopping.
            OverloadedError: too many other fits of the label set are waiting.
        """
        while True:
            if self._closing:
                raise NotReadyError("the service is stopping; try again")
            ready = self._ready.get(key)
            if ready is not None and ready.revision < min_revision:
                del self._ready[key]
                ready = None
            if ready is not None and ready.revision >= revision:
                return ready
            running = self._running.get((key, revision))
            if running is None:
                self._check_room(key.label_set)
                with nullcontext() if ready is None else in_background(self._turns):
                    running = asyncio.create_task(self._fit(key, revision, fit))
                self._running[key, revision] = running
                running.add_done_callback(lambda done: self._finished(key, revision, done))
            if ready is not None:
                return ready
            is_request = not is_in_background()
            self._waiting_requests += is_request
            try:
                # The fit continues for the next caller if this one leaves.
                return await asyncio.shield(running)
            except asyncio.CancelledError:
                caller = asyncio.current_task()
                if not running.cancelled() or (caller is not None and caller.cancelling()):
                    raise
                # Examples were deleted during the fit: fit again without them.
            finally:
                self._waiting_requests -= is_request

    def _check_room(self, label_set: str) -> None:
        """Raise ``OverloadedError`` if many other fits of the label set, with other options, are waiting."""
        if sum(key.label_set == label_set for key, _ in self._running) >= _MAX_WAITING:
            raise OverloadedError(
                f"{_MAX_WAITING} fits of '{label_set}' are running or waiting; try again later, or with options that"
                " were used before",
                _RETRY_AFTER_S,
            )

    async def run(self, work: Callable[[], _Result]) -> _Result:
        """Run work on the threads of the fits, so that it takes at most one core from requests; in turns, for jobs."""
        threads = self._background if is_in_background() else self._threads
        run = partial(copy_context().run, _on_one_core, work, lambda: self._waiting_requests > 0, lambda: self._closing)
        return await asyncio.get_running_loop().run_in_executor(threads, run)

    def forget(self, label_set: str) -> None:
        """Drop every fitted adapter of a label set, and cancel its running fits."""
        for key in [key for key in self._ready if key.label_set == label_set]:
            del self._ready[key]
        for (key, _), running in list(self._running.items()):
            if key.label_set == label_set:
                running.cancel()

    async def idle(self) -> None:
        """Wait until no fit is running."""
        while self._running:
            await asyncio.wait(self._running.values())

    async def close(self) -> None:
        """Cancel all fits, and wait until those that have reached a thread notice it."""
        self._closing = True
        for running in list(self._running.values()):
            running.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)
        for threads in (self._threads, self._background):
            await asyncio.to_thread(threads.shutdown, wait=True, cancel_futures=True)

    async def _fit(self, key: FitKey, revision: int, fit: Callable[[], Awaitable[FittedAdapter]]) -> FittedAdapter:
        lock = self._locks.setdefault(key.label_set, asyncio.Lock())
        async with lock:
            ready = self._ready.get(key)
            if ready is not None and ready.revision >= revision:
                return ready  # an earlier fit has read these examples already
            fitted = await fit()
            if fitted.nbytes > self._ready.maxsize:
                raise TooLargeError(
                    f"the fitted adapter of '{key.method}' takes {fitted.nbytes / 2**20:,.0f} MiB, more than the"
                    f" {self._ready.maxsize / 2**20:,.0f} MiB of the cache; delete unlabelled images, or raise"
                    " DEIXIS_CACHE_MIB"
                )
            self._ready[key] = fitted
            log.info(
                "adapter_fitted",
                label_set=key.reference,
                method=key.method,
                examples_revision=fitted.revision,
                labelled=fitted.labelled,
                unlabelled=fitted.unlabelled,
            )
            return fitted

    def _finished(self, key: FitKey, revision: int, done: "asyncio.Task[FittedAdapter]") -> None:
        del self._running[key, revision]
        if not done.cancelled() and (error := done.exception()) is not None:
            reason = str(error) or type(error).__name__
            log.warning("adapter_not_fitted", label_set=key.reference, method=key.method, reason=reason)


def _on_one_core(
    work: Callable[[], _Result], is_awaited: Callable[[], bool], is_stopped: Callable[[], bool]
) -> _Result:
    use_one_thread()
    with one_blas_thread(), taking_turns(is_awaited, is_stopped):
        return work()
