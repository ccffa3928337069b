"""The dynamic batching queue in front of each tower of each model, and of each caption database.

Items of many callers share one forward pass, or one search. There is no timer: the items that arrive while the device
is busy form the next batch, and a single item starts at once. A device that runs several batches at the same time has a
worker for each; these share the waiting items. A device that runs one at a time starts the next one early if it is
full, so that an accelerator copies one batch while it computes the other. Callers take turns item by item, so that a
large request delays a small one by one batch at most.

The queue knows nothing about images, texts or torch. Each entry has its own future, which receives a row or an error in
every case; ``tests/models/test_queue.py`` lists the ways in which that could fail.
"""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, Protocol, TypeVar

import structlog

from app.errors import DeadlineExceededError, NotReadyError, OverloadedError, ServerError
from app.runtime.tracebacks import drop_tracebacks

Item = TypeVar("Item")
Row = TypeVar("Row")

log = structlog.get_logger()

# Weight of the latest batch in the measured rate: recent enough for Retry-After, steady enough not to jump.
_RATE_MEMORY = 0.2
# Seconds before a worker that died is restarted: the first time, and at most after repeated deaths.
_RESTART_AFTER_S = 0.5
_MAX_RESTART_AFTER_S = 30.0
# For the running batch to finish when the queue is closed; a thread that hangs must not keep the process from ending.
_CLOSES_WITHIN_S = 10.0
# Successful batches before a batch size that exceeded the memory is tried again.
_GOOD_BATCHES_BEFORE_GROWTH = 100


class QueueMetrics(Protocol):
    """Receives the events of a queue; called from its worker and from the event loop."""

    def batch(self, size: int, seconds: float) -> None:
        """A batch was encoded."""

    def waited(self, seconds: float) -> None:
        """An item waited for its batch to start."""

    def rejected(self, reason: str, count: int) -> None:
        """Items were not admitted."""

    def dropped(self, reason: str, count: int) -> None:
        """Admitted items will not be encoded."""

    def failed(self, reason: str) -> None:
        """A batch failed, or was too large for the memory."""

    def restarted(self) -> None:
        """The worker died and is restarted."""


@dataclass(frozen=True, slots=True)
class Encoded(Generic[Row]):
    """One item's row, the seconds until its batch started, and the seconds that the batch took."""

    row: Row
    queue_s: float
    encode_s: float


@dataclass(eq=False, slots=True)
class Entry(Generic[Item, Row]):
    """An item in a queue, with its arrival time and its deadline on the clock of ``time.perf_counter``.

    ``context`` is the caller's, so that errors and traces can be attributed to its request.
    """

    item: Item
    future: asyncio.Future[Encoded[Row]]
    submitted: float
    deadline: float | None
    context: Context


@dataclass(eq=False, slots=True)
class _Batch(Generic[Item, Row]):
    """Entries that are being encoded; ``wait`` returns their rows."""

    entries: Sequence[Entry[Item, Row]]
    wait: Callable[[], Collection[Row]]
    began: float


@dataclass(eq=False, slots=True)
class _Worker(Generic[Item, Row]):
    """The state of one thread that encodes; only that thread writes it.

    Args:
        begun: every entry that it has taken and not settled.
        busy_since: when its oldest batch began; None while it has none.
        last_ended: when a batch last succeeded.
        down: why it died, until it is restarted; written under the lock of the queue.
    """

    begun: list[Entry[Item, Row]] = field(default_factory=list)
    busy_since: float | None = None
    last_ended: float = 0.0
    down: str | None = None


@dataclass(eq=False, slots=True)
class Ticket(Generic[Item, Row]):
    """One request's places in a queue, and its waiting items; created by ``TurnQueue.admit``.

    Args:
        deadline: on the clock of ``time.perf_counter``; items that wait longer are dropped. None for no deadline.
    """

    deadline: float | None
    waiting: deque[Entry[Item, Row]] = field(default_factory=deque)


class TurnQueue(Generic[Item, Row]):
    """Admits the items of many callers up to a limit, and hands them out in turns; subclasses encode them.

    For use from one event loop; ``_take`` may be called by other threads.

    Args:
        name: for messages and logs.
        batch_size: limit on the items of one batch.
        metrics: receives all events.
        max_queued: limit on admitted items, waiting and running; None for no limit.
    """

    def __init__(self, name: str, *, batch_size: int, metrics: QueueMetrics, max_queued: int | None) -> None:
        self.name = name
        self.batch_size = batch_size
        self.max_queued = max_queued
        self._metrics = metrics
        # Used by the event loop only.
        self._admitted = 0
        self._requested = 0
        self._last_requested = 0.0
        # Used by all threads, under the lock.
        self._changed = threading.Condition()
        self._turns: deque[Ticket[Item, Row]] = deque()
        self._waiting = 0
        self._closed = False
        # Written by the threads that encode.
        self._last_ended = 0.0
        self._items_per_s = 0.0

    @property
    def admitted(self) -> int:
        """Number of items that are admitted and not finished."""
        return self._admitted

    @property
    def waiting(self) -> int:
        """Number of items that wait for a batch."""
        return self._waiting

    @property
    def expected_wait_s(self) -> float:
        """Seconds that an item arriving now would wait, at the measured rate; 0 before the first batch."""
        return self._admitted / self._items_per_s if self._items_per_s else 0.0

    @property
    def last_request_at(self) -> float:
        """When a request last had a place, on the clock of ``time.perf_counter``; now while one has, 0 before any."""
        return time.perf_counter() if self._requested else self._last_requested

    @property
    def last_encoded_at(self) -> float:
        """When a batch last succeeded, on the clock of ``time.perf_counter``; 0 before the first batch."""
        return self._last_ended

    @property
    def problem(self) -> str | None:
        """Why nothing is encoded at the moment; None if the queue works."""
        return None

    @contextmanager
    def admit(
        self, count: int, *, within_s: float | None = None, is_request: bool = True
    ) -> Iterator[Ticket[Item, Row]]:
        """Hold ``count`` places, from before an image is decoded until its features are computed.

        Args:
            count: number of items that the caller will encode.
            within_s: seconds after which the results are useless.
            is_request: whether somebody waits for the results; background work makes way for them
                (``app/models/background.py``).

        Raises:
            OverloadedError: not enough places are free, or the items ahead would take longer than ``within_s`` at the
                measured rate; ``retry_after_s`` is the time that they take.
            NotReadyError: the queue is closed, or all its workers are down.
        """
        refusal = self._refusal(count, within_s)
        if refusal is not None:
            self._metrics.rejected("overloaded" if isinstance(refusal, OverloadedError) else "not_ready", count)
            raise refusal
        ticket: Ticket[Item, Row] = Ticket(None if within_s is None else time.perf_counter() + within_s)
        self._admitted += count
        self._requested += is_request
        try:
            yield ticket
        finally:
            self._admitted -= count
            if is_request:
                self._requested -= 1
                self._last_requested = time.perf_counter()
            self._forget(ticket)

    async def encode(self, item: Item, ticket: Ticket[Item, Row]) -> Encoded[Row]:
        """Return an item's row; cancelling drops the item unless its batch has started.

        Raises:
            NotReadyError: the queue is closed, the worker that had this item died, all workers are down, or the memory
                has no room for this item alone.
            DeadlineExceededError: the deadline passed while the item waited.
            Exception: raised by the encoder for this item.
        """
        # Not a variable: the traceback of an error refers to this frame, and the future to the error.
        return await self._submit(ticket, [item]).pop()

    async def run(self, items: Sequence[Item], *, within_s: float | None = None, is_request: bool = True) -> list[Row]:
        """Encode one or more items as one caller, and return all rows; raises as ``admit`` and ``encode``."""
        with self.admit(len(items), within_s=within_s, is_request=is_request) as ticket:
            futures = self._submit(ticket, items)
            try:
                encoded = await asyncio.gather(*futures)
            finally:
                while futures:  # as in ``encode``
                    futures.pop().cancel()
        return [result.row for result in encoded]

    def _submit(self, ticket: Ticket[Item, Row], items: Sequence[Item]) -> list[asyncio.Future[Encoded[Row]]]:
        loop, now, context = asyncio.get_running_loop(), time.perf_counter(), copy_context()
        entries = [Entry(item, loop.create_future(), now, ticket.deadline, context) for item in items]
        with self._changed:
            if (down := self._why_down()) is not None:
                raise down
            if not ticket.waiting:
                self._turns.append(ticket)
            ticket.waiting.extend(entries)
            self._waiting += len(entries)
            self._changed.notify(len(entries))
        self._submitted()
        return [entry.future for entry in entries]

    def close(self) -> None:
        """Refuse the waiting items, and all items from now on."""
        with self._changed:
            self._closed = True
            waiting = self._take_all()
            self._changed.notify_all()
        self._fail(waiting, self._closed_error)

    def _submitted(self) -> None:
        """Start to encode the items just submitted, if no worker is waiting for them."""

    def _forget(self, ticket: Ticket[Item, Row]) -> None:
        """Drop the items of a cancelled caller, so that they neither run nor stay in memory."""
        if not ticket.waiting:
            return
        with self._changed:
            left = len(ticket.waiting)
            if left:
                self._turns.remove(ticket)
                self._waiting -= left
                for entry in ticket.waiting:
                    entry.future.cancel()
                ticket.waiting.clear()
        self._metrics.dropped("cancelled", left)

    def _refusal(self, count: int, within_s: float | None) -> ServerError | None:
        if (down := self._why_down()) is not None:
            return down
        wait_s = self.expected_wait_s
        if self.max_queued is not None and self._admitted + count > self.max_queued:
            reason = (
                f"{count} more items do not fit: {self._admitted} of {self.max_queued} places in the queue of"
                f" {self.name} are taken; try again later, or raise DEIXIS_MAX_QUEUED_IMAGES"
            )
        elif within_s is not None and wait_s > within_s:
            reason = (
                f"the {self._admitted} items ahead in the queue of {self.name} take about {wait_s:.0f} s, longer than"
                f" the {within_s:g} s that a request may take; try again later"
            )
        else:
            return None
        return OverloadedError(reason, retry_after_s=max(1, math.ceil(wait_s)))

    def _why_down(self) -> NotReadyError | None:
        if self._closed:
            return self._closed_error()
        problem = self.problem
        return None if problem is None else NotReadyError(f"{problem}; try again later")

    def _closed_error(self) -> NotReadyError:
        return NotReadyError(f"the queue of {self.name} is closed; the service is stopping")

    def _take(
        self, at_most: int, *, at_least: int = 1, into: list[Entry[Item, Row]] | None = None
    ) -> list[Entry[Item, Row]]:
        """Return the next batch, one item of each caller in turn.

        It is empty if fewer than ``at_least`` items wait, if all of them were cancelled or are late, and after closing.
        Each entry is appended to ``into`` when it is taken, so that none is lost if this fails.
        """
        taken: list[Entry[Item, Row]] = []
        late: list[Entry[Item, Row]] = []
        cancelled = 0
        with self._changed:
            now = time.perf_counter()
            while self._turns and len(taken) < at_most and self._waiting + len(taken) >= at_least:
                ticket = self._turns.popleft()
                entry = ticket.waiting.popleft()
                self._waiting -= 1
                if ticket.waiting:
                    self._turns.append(ticket)
                if entry.future.cancelled():
                    cancelled += 1
                elif entry.deadline is not None and now > entry.deadline:
                    late.append(entry)
                else:
                    taken.append(entry)
                    if into is not None:
                        into.append(entry)
        self._fail(late, lambda: DeadlineExceededError(f"the deadline passed in the queue of {self.name}"))
        self._metrics.dropped("cancelled", cancelled)
        self._metrics.dropped("deadline", len(late))
        return taken

    def _take_all(self) -> list[Entry[Item, Row]]:
        entries = [entry for ticket in self._turns for entry in ticket.waiting]
        for ticket in self._turns:
            ticket.waiting.clear()
        self._turns.clear()
        self._waiting = 0
        return entries

    def _measured(self, count: int, seconds: float) -> None:
        """Update the measured rate with ``count`` items in ``seconds``."""
        rate = count / max(seconds, 1e-9)
        self._items_per_s += (_RATE_MEMORY if self._items_per_s else 1.0) * (rate - self._items_per_s)

    def _settle(
        self, entries: Sequence[Entry[Item, Row]], outcomes: Sequence[tuple[Row, float, float] | Exception]
    ) -> None:
        """Resolve the futures of entries that were taken, on their event loop; errors lose their tracebacks."""
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                drop_tracebacks(outcome)  # their frames refer to the entries, whose futures will refer to the errors

        def resolve() -> None:
            for entry, outcome in zip(entries, outcomes, strict=True):
                if entry.future.done():
                    continue
                if isinstance(outcome, Exception):
                    entry.future.set_exception(outcome)
                else:
                    row, began, ended = outcome
                    entry.future.set_result(Encoded(row, began - entry.submitted, ended - began))

        _call_soon(entries[0].future.get_loop(), resolve)

    def _fail(self, entries: Sequence[Entry[Item, Row]], error: Callable[[], Exception]) -> None:
        """Fail entries that did not start or cannot finish, each with an error of its own."""

        def fail() -> None:
            for entry in entries:
                if not entry.future.done():
                    entry.future.set_exception(error())

        if entries:
            _call_soon(entries[0].future.get_loop(), fail)


class EncodeQueue(TurnQueue[Item, Row]):
    """Batches the items of many callers and encodes them on supervised threads.

    For use from one event loop. A single thread starts a batch, and possibly the next one, before it waits for the
    first; several threads encode one batch each. If a batch fails, its halves are tried separately, so that only the
    item that caused the failure gets the error. If a worker itself dies, its items get an error at once, and it is
    restarted; until then the others encode what waits. If no other is left, the waiting items get the error too.

    Args:
        name: of the threads, for logs and debuggers.
        begin: starts encoding a batch, and returns a function that waits for its rows, in order; both may raise
            MemoryError. Its second argument tells that few other items are in the queue, so that this batch may use
            what several batches would share.
        batch_size: limit on the items of one batch.
        metrics: receives all events.
        max_queued: limit on admitted items, waiting and running; None for no limit.
        stalled_after_s: seconds after which a running batch makes the queue unhealthy.
        workers: number of batches that are encoded at the same time.
    """

    def __init__(
        self,
        name: str,
        begin: Callable[[Sequence[Item], bool], Callable[[], Collection[Row]]],
        *,
        batch_size: int,
        metrics: QueueMetrics,
        max_queued: int | None = None,
        stalled_after_s: float = 300.0,
        workers: int = 1,
    ) -> None:
        super().__init__(name, batch_size=batch_size, metrics=metrics, max_queued=max_queued)
        self._begin_encoding = begin
        self._stalled_after_s = stalled_after_s
        self._closing = threading.Event()
        # Written by the workers.
        self._room = batch_size
        self._good_batches = 0
        self._workers: list[_Worker[Item, Row]] = [_Worker() for _ in range(workers)]
        # Daemons, so that a thread that hangs inside a driver does not keep the process from ending.
        self._threads = [
            threading.Thread(
                target=self._supervise, args=[worker], name=f"{name} {number}" if workers > 1 else name, daemon=True
            )
            for number, worker in enumerate(self._workers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def problem(self) -> str | None:
        """Why nothing is encoded at the moment; None if the queue works."""
        reasons = [worker.down for worker in self._workers]
        if None not in reasons:
            return reasons[0]
        since = min((since for worker in self._workers if (since := worker.busy_since) is not None), default=None)
        if since is not None and time.perf_counter() - since > self._stalled_after_s:
            return f"a batch in the queue of {self.name} has been running for more than {self._stalled_after_s:g} s"
        return None

    def close(self) -> None:
        """Finish the running batches, refuse the rest, and end the threads; waits at most ten seconds."""
        super().close()
        self._closing.set()
        ends = time.perf_counter() + min(self._stalled_after_s, _CLOSES_WITHIN_S)
        for thread in self._threads:
            thread.join(max(0.0, ends - time.perf_counter()))

    @property
    def _living(self) -> int:
        return sum(worker.down is None for worker in self._workers)

    # --- the workers' side ---------------------------------------------------------------------------------------

    def _supervise(self, worker: _Worker[Item, Row]) -> None:
        """Run a worker, and restart it if it dies of an error in this module or in the interpreter."""
        restart_after_s = _RESTART_AFTER_S
        while not self._closed:
            before = worker.last_ended
            try:
                self._work(worker)
            except BaseException as error:
                if worker.last_ended > before:
                    restart_after_s = _RESTART_AFTER_S
                reason = f"the worker of {self.name} ended with {type(error).__name__} and is being restarted"
                with self._changed:
                    worker.down = reason
                    lost = worker.begun if self._living else [*worker.begun, *self._take_all()]
                    self._changed.notify_all()  # it may have been woken for items that it did not take
                worker.begun, worker.busy_since = [], None
                self._metrics.restarted()
                self._fail(lost, partial(NotReadyError, f"{reason}; try again later"))
                log.exception("worker_died", queue=self.name, lost=len(lost), restart_after_s=restart_after_s)
                del lost  # this frame lives as long as the queue
                # Not on the condition, where this worker could be notified of an item in place of one that is idle.
                self._closing.wait(restart_after_s)
                with self._changed:
                    worker.down = None
                restart_after_s = min(2 * restart_after_s, _MAX_RESTART_AFTER_S)

    def _work(self, worker: _Worker[Item, Row]) -> None:
        """Start batches and wait for them, until the queue is closed."""
        current: _Batch[Item, Row] | None = None
        while True:
            if current is None:
                entries = self._next(worker)
                if self._closed and not entries:
                    return
                current = self._begin(worker, entries) if entries else None
                continue
            ahead = None
            # Start the next batch early only if it is full: a smaller one may still grow while the device is busy.
            if len(self._workers) == 1 and (entries := self._take(self._room, at_least=self._room, into=worker.begun)):
                ahead = self._begin(worker, entries)
            self._finish(worker, current)
            current = ahead

    def _next(self, worker: _Worker[Item, Row]) -> list[Entry[Item, Row]]:
        """Wait until there are items or the queue is closed, and return the next batch of this worker."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            share = -(-self._waiting // self._living)
        return self._take(self._room if self._has_few() else min(self._room, share), into=worker.begun)

    def _has_few(self) -> bool:
        """Return whether the items in the queue, including those not yet submitted, need few of the workers."""
        return self._admitted <= max(1, len(self._workers) // 2)

    def _begin(self, worker: _Worker[Item, Row], entries: Sequence[Entry[Item, Row]]) -> _Batch[Item, Row] | None:
        """Start a batch; None if that failed, with its entries settled."""
        began = time.perf_counter()
        if worker.busy_since is None:
            worker.busy_since = began
        try:
            return _Batch(entries, self._begin_encoding([entry.item for entry in entries], self._has_few()), began)
        except Exception as error:  # noqa: BLE001 - an encoder may raise anything
            self._recover(worker, entries, error)
            return None

    def _finish(self, worker: _Worker[Item, Row], batch: _Batch[Item, Row]) -> None:
        """Wait for a batch, and give each entry its row."""
        entries = batch.entries
        try:
            rows = batch.wait()
            if len(rows) != len(entries):
                msg = f"the encoder of {self.name} returned {len(rows)} rows for {len(entries)} items"
                raise ValueError(msg)  # noqa: TRY301 - handled like an error of the encoder
        except Exception as error:  # noqa: BLE001 - an encoder may raise anything
            self._recover(worker, entries, error)
            return
        ended = time.perf_counter()
        # A batch that started early waited for the one before it.
        began = max(batch.began, worker.last_ended)
        busy = sum(each.busy_since is not None for each in self._workers)
        self._measured(busy * len(entries), ended - began)
        self._regrow()
        worker.last_ended = self._last_ended = ended
        self._metrics.batch(len(entries), ended - began)
        for entry in entries:
            self._metrics.waited(began - entry.submitted)
        # Last, because the event loop needs the interpreter from now on.
        self._settle_for(worker, entries, [(row, began, ended) for row in rows])

    def _recover(self, worker: _Worker[Item, Row], entries: Sequence[Entry[Item, Row]], error: Exception) -> None:
        """Try the halves of a failed batch separately; a single entry gets the error."""
        if isinstance(error, StopIteration):  # futures refuse it
            error = RuntimeError(f"the encoder of {self.name} raised StopIteration")
        out_of_memory = isinstance(error, MemoryError)
        self._metrics.failed("out of memory" if out_of_memory else "error")
        if out_of_memory:
            self._room, self._good_batches = max(1, len(entries) // 2), 0
        if len(entries) == 1:
            if out_of_memory:
                error = NotReadyError(
                    f"the device has no memory for a single item of {self.name} ({error}); try again later, or serve a"
                    " smaller model"
                )
            entries[0].context.run(log.warning, "item_failed", queue=self.name, exc_info=error)
            self._settle_for(worker, entries, [error])
            return
        log.warning("batch_failed", queue=self.name, size=len(entries), error=type(error).__name__, detail=str(error))
        middle = len(entries) // 2
        for half in (entries[:middle], entries[middle:]):
            batch = self._begin(worker, half)
            if batch is not None:
                self._finish(worker, batch)

    def _regrow(self) -> None:
        """Use larger batches again after enough successful ones."""
        self._good_batches += 1
        if self._room < self.batch_size and self._good_batches >= _GOOD_BATCHES_BEFORE_GROWTH:
            self._room, self._good_batches = min(2 * self._room, self.batch_size), 0

    def _settle_for(
        self,
        worker: _Worker[Item, Row],
        entries: Sequence[Entry[Item, Row]],
        outcomes: Sequence[tuple[Row, float, float] | Exception],
    ) -> None:
        settled = set(map(id, entries))
        remaining = [entry for entry in worker.begun if id(entry) not in settled]
        worker.busy_since = time.perf_counter() if remaining else None
        self._settle(entries, outcomes)
        worker.begun = remaining


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    with suppress(RuntimeError):  # the loop is closed, and so is every caller that waited
        loop.call_soon_threadsafe(callback)
