"""What methods learn from example images: in the background, on few cores, the old answering until the new is ready."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
from app.scoring.numerics import unit_rows
from app.types import ClassEmbeddings, ImageFeatures, Logits

log = structlog.get_logger()

_Result = TypeVar("_Result")

# Fits under way at once, each on one core at low priority.
_FITS = 2
# Fits of one label set that may wait or be under way.
_WAITING = 16
_RETRY_AFTER_S = 5


class LogitScaling(Protocol):
    """An encoder, as far as adapters are concerned."""

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
    """An adapter that has learned, with the index of its pool where it looks at neighbours, and what it learned from.

    ``revision`` is of the examples of the label set; ``labelled`` and ``unlabelled`` are how many were used. ``names``
    are what its text was made of.
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


def learn(
    adapter: ExampleAdapter,
    text: ClassEmbeddings,
    examples: Examples,
    scale: LogitScaling,
    index: NeighbourIndex | None = None,
) -> FittedAdapter:
    """Fit an adapter to the rows of the classes (c, d) and to examples, whose neighbours are searched here.

    Args:
        adapter: not shared with anybody.
        text: one row per class.
        examples: without neighbours.
        scale: the encoder's own.
        index: of the pool, where there is one already.
    """
    pool = examples.pool_features
    if not (adapter.neighbours and len(pool)):
        index = None
    else:
        index = index or NeighbourIndex(pool)
        near = index.among_themselves(pool, adapter.neighbours)
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
    """Let an adapter learn from the images that are asked about, and return their scores (n, c)."""
    examples = Examples(pool_features=image_features)
    learned = learn(adapter, text, examples, scale)
    return learned.adapter.pool_scores(image_features)


@dataclass(frozen=True, slots=True, eq=False)
class TimedLogits:
    """Logits (n, c) of n images, the seconds that they took without the learning, and what adapters warned of."""

    logits: Logits
    seconds: float
    warnings: tuple[str, ...]


def answer(learned: FittedAdapter, image_features: ImageFeatures) -> TimedLogits:
    """Answer images (n, d) by what was learned."""
    began = time.perf_counter()
    scores = learned.predict(image_features)
    return TimedLogits(scores.logits, time.perf_counter() - began, scores.warnings)


def predict_held_out(
    make: Callable[[], ExampleAdapter],
    text: ClassEmbeddings,
    examples: Examples,
    folds: np.ndarray,
    scale: LogitScaling,
    index: NeighbourIndex | None = None,
) -> TimedLogits:
    """Answer the labelled images themselves, each by what was learned from the other folds (s,)."""
    logits = np.empty((len(folds), len(text)), np.float32)
    seconds = 0.0
    warnings: dict[str, None] = {}
    for fold in range(int(folds.max()) + 1):
        asked = folds == fold
        others = Examples(examples.support_features[~asked], examples.support_labels[~asked], examples.pool_features)
        told = answer(learn(make(), text, others, scale, index), examples.support_features[asked])
        logits[asked] = told.logits
        seconds += told.seconds
        warnings.update(dict.fromkeys(told.warnings))
    return TimedLogits(logits, seconds, tuple(warnings))


def _nbytes(adapter: ExampleAdapter) -> int:
    return sum(int(getattr(value, "nbytes", 0)) for value in vars(adapter).values())


@dataclass(frozen=True, slots=True)
class FitKey:
    """What is learned, whatever the examples are at the moment.

    ``model`` is the fingerprint of the image tower; ``label_set`` names the label set, ``reference`` its version.
    """

    model: str
    method: str
    options: tuple[tuple[str, float], ...]
    templates: tuple[str, ...]
    label_set: str
    reference: str


class FitCache:
    """Keeps what was learned from stored examples, and has it learned again when they have changed.

    Fits of one label set take turns, and no more than two are under way at all, each on one core.

    Args:
        cache_bytes: bound on all that was learned.
    """

    def __init__(self, *, cache_bytes: int) -> None:
        self._ready: LRUCache[FitKey, FittedAdapter] = LRUCache(cache_bytes, getsizeof=lambda learned: learned.nbytes)
        self._running: dict[tuple[FitKey, int], asyncio.Task[FittedAdapter]] = {}
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._closing = False
        self._threads = ThreadPoolExecutor(_FITS, thread_name_prefix="fit", initializer=lower_priority)

    async def learned(
        self, subject: FitKey, revision: int, fit: Callable[[], Awaitable[FittedAdapter]], *, oldest: int = 0
    ) -> FittedAdapter:
        """Return what was learned of a label set's examples.

        Where that is of an older revision it is returned all the same, and the new one is made in the background;
        where there is nothing, or nothing newer than ``oldest``, the caller waits.

        Args:
            subject: what is learned.
            revision: of the examples, at least.
            fit: reads the newest examples and learns from them.
            oldest: the revision of the last deletion, before which nothing may be answered by.

        Raises:
            TooLargeError: what was learned takes more memory than there may be of it.
            StoreError: the examples could not be read.
            NotReadyError: the service is stopping.
            OverloadedError: too many other fits of the label set wait.
        """
        while True:
            if self._closing:
                raise NotReadyError("the service is stopping; try again")
            ready = self._ready.get(subject)
            if ready is not None and ready.revision < oldest:
                del self._ready[subject]
                ready = None
            if ready is not None and ready.revision >= revision:
                return ready
            running = self._running.get((subject, revision))
            if running is None:
                self._check_room(subject.label_set)
                running = asyncio.create_task(self._learn(subject, revision, fit))
                self._running[subject, revision] = running
                running.add_done_callback(lambda done: self._finished(subject, revision, done))
            if ready is not None:
                return ready
            try:
                # The fit goes on where its caller does not wait any more, for the next one.
                return await asyncio.shield(running)
            except asyncio.CancelledError:
                caller = asyncio.current_task()
                if not running.cancelled() or (caller is not None and caller.cancelling()):
                    raise
                # Examples were deleted while it learned from them: once more, without those.

    def _check_room(self, label_set: str) -> None:
        """Refuse what would wait behind many other fits of the label set, each with options of its own."""
        if sum(subject.label_set == label_set for subject, _ in self._running) >= _WAITING:
            raise OverloadedError(
                f"{_WAITING} fits of '{label_set}' are under way or wait already; try again, with options that were"
                " used before",
                _RETRY_AFTER_S,
            )

    async def run(self, work: Callable[[], _Result]) -> _Result:
        """Run some work where fits are run, so that it takes no more than one core from those who wait for answers."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, _on_one_core, work)

    def forget(self, label_set: str) -> None:
        """Drop all that was learned of a label set's examples, and what is being learned."""
        for subject in [subject for subject in self._ready if subject.label_set == label_set]:
            del self._ready[subject]
        for (subject, _), running in list(self._running.items()):
            if subject.label_set == label_set:
                running.cancel()

    async def idle(self) -> None:
        """Wait until nothing is being learned."""
        while self._running:
            await asyncio.wait(self._running.values())

    async def close(self) -> None:
        """Stop; a fit that has begun ends by itself."""
        self._closing = True
        for running in list(self._running.values()):
            running.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)
        await asyncio.to_thread(self._threads.shutdown, wait=True, cancel_futures=True)

    async def _learn(
        self, subject: FitKey, revision: int, fit: Callable[[], Awaitable[FittedAdapter]]
    ) -> FittedAdapter:
        lock = self._locks.setdefault(subject.label_set, asyncio.Lock())
        async with lock:
            ready = self._ready.get(subject)
            if ready is not None and ready.revision >= revision:
                return ready  # an earlier turn has read these examples already
            learned = await fit()
            if learned.nbytes > self._ready.maxsize:
                raise TooLargeError(
                    f"what '{subject.method}' learned takes {learned.nbytes / 2**20:,.0f} MiB, and"
                    f" {self._ready.maxsize / 2**20:,.0f} are set aside; delete unlabelled images, or raise"
                    " DEIXIS_LEARNED_CACHE_MIB"
                )
            self._ready[subject] = learned
            log.info(
                "learned",
                label_set=subject.reference,
                method=subject.method,
                examples_revision=learned.revision,
                labelled=learned.labelled,
                unlabelled=learned.unlabelled,
            )
            return learned

    def _finished(self, subject: FitKey, revision: int, done: "asyncio.Task[FittedAdapter]") -> None:
        del self._running[subject, revision]
        if not done.cancelled() and (error := done.exception()) is not None:
            reason = str(error) or type(error).__name__
            log.warning("not_learned", label_set=subject.reference, method=subject.method, reason=reason)


def _on_one_core(work: Callable[[], _Result]) -> _Result:
    use_one_thread()
    with one_blas_thread():
        return work()
