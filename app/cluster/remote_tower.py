"""The queue of a tower that runs in other processes."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from functools import partial
from typing import Any, TypeVar

import numpy as np
import structlog
from opentelemetry import context

from app.cluster.messages import EncodeResponse, ReplicaUnavailableError, WeightsMismatchError
from app.errors import NotReadyError, OverloadedError
from app.models.queue import Entry, QueueMetrics, TurnQueue

Item = TypeVar("Item")

log = structlog.get_logger()

# Concurrent calls of one edge to one tower; items that arrive meanwhile share the next call.
_MAX_CALLS = 8
# A call whose replica disappeared is repeated; encoding an item twice is harmless.
_TRIES = 4
_RETRY_DELAY_S = 0.1
# A call that is late is also sent to another replica: Ray may not have noticed yet that a machine has failed. A call is
# late after this time and this multiple of the recent duration of calls, so that a long queue does not count as late.
_LATE_AFTER_S = 3.0
_LATE_FACTOR = 4.0
_FIRST_LATE_AFTER_S = 10.0
# Weight of the latest call in the recent duration.
_CALL_MEMORY = 0.1


class RemoteTower(TurnQueue[Item, np.ndarray]):
    """Sends the items of many requests to a remote tower, in several concurrent calls with all waiting items.

    There is no timer: a single item is sent at once. The replica forms the batches of its device from the calls of all
    edges.

    Args:
        name: for messages and logs.
        encode: encodes items within a number of seconds; raises ReplicaUnavailableError if a retry may succeed.
        batch_size: maximum number of items in a call.
        metrics: counts a call as a batch.
        max_queued: maximum number of admitted items; None for no limit.

    ``is_outdated`` is true if the last call only found encoders with other weights than this edge expects.
    """

    def __init__(
        self,
        name: str,
        encode: Callable[[Sequence[Item], float | None], Awaitable[EncodeResponse]],
        *,
        batch_size: int,
        metrics: QueueMetrics,
        max_queued: int | None = None,
    ) -> None:
        super().__init__(name, batch_size=batch_size, metrics=metrics, max_queued=max_queued)
        self._encode_remote = encode
        self._calls: set[asyncio.Task[None]] = set()
        self._problem: str | None = None
        self.is_outdated = False
        self._call_s: float | None = None

    @property
    def problem(self) -> str | None:
        """The reason why the last call reached no encoder; None if it did."""
        return self._problem

    def close(self) -> None:
        """Refuse the waiting items; calls in progress finish."""
        super().close()
        self._problem = None

    def _why_down(self) -> NotReadyError | None:
        # A problem of the last call does not refuse the next: it shows whether an encoder is back.
        return self._closed_error() if self._closed else None

    def _submitted(self) -> None:
        # The call is sent after the other callbacks of this iteration of the event loop, with the items they add.
        asyncio.get_running_loop().call_soon(self._send)

    def _send(self) -> None:
        while len(self._calls) < _MAX_CALLS and (entries := self._take(self.batch_size)):
            # A call for several requests belongs to the trace of the first.
            call = asyncio.get_running_loop().create_task(self._call(entries), context=_trace_only(entries[0].context))
            self._calls.add(call)
            call.add_done_callback(self._call_ended)
            for entry in entries:
                entry.future.add_done_callback(partial(_cancel_if_unused, entries, call))

    def _call_ended(self, call: asyncio.Task[None]) -> None:
        self._calls.discard(call)
        self._send()

    async def _call(self, entries: Sequence[Entry[Item, np.ndarray]]) -> None:
        started = time.perf_counter()
        concurrent = len(self._calls)
        try:
            response = await self._encode_with_retries(entries)
        except asyncio.CancelledError:
            self._metrics.dropped("cancelled", len(entries))
            self._settle(entries, [NotReadyError(f"a call of {self.name} was cancelled; try again")] * len(entries))
            raise
        except Exception as error:  # noqa: BLE001 - a remote process may raise anything
            if isinstance(error, OverloadedError):
                self._metrics.rejected("overloaded", len(entries))
            else:
                self._metrics.failed("away" if isinstance(error, ReplicaUnavailableError) else "error")
            if isinstance(error, ReplicaUnavailableError):
                self.is_outdated = isinstance(error, WeightsMismatchError)
                self._problem = f"the encoders of {self.name} cannot be reached ({error})"
                error = NotReadyError(f"{self._problem}; try again later")
            self._settle(entries, [error] * len(entries))
            return
        ended = time.perf_counter()
        self._problem, self._last_ended, self.is_outdated = None, ended, False
        before = ended - started if self._call_s is None else self._call_s
        self._call_s = before + _CALL_MEMORY * (ended - started - before)
        # The other concurrent calls finish about as many items in the same time.
        self._measured(len(entries) * concurrent, ended - started)
        outcomes: list[tuple[np.ndarray, float, float] | Exception] = []
        for place, (row, encode_s) in enumerate(zip(response.rows, response.encode_s, strict=True)):
            failure = response.failures.get(place)
            # The time of the messages counts as waiting.
            outcomes.append((row, ended - encode_s, ended) if failure is None else failure.to_exception())
        self._settle(entries, outcomes)
        self._metrics.batch(len(entries), ended - started)
        for entry, encode_s in zip(entries, response.encode_s, strict=True):
            self._metrics.waited(ended - encode_s - entry.submitted)

    async def _encode_with_retries(self, entries: Sequence[Entry[Item, np.ndarray]]) -> EncodeResponse:
        deadlines = [entry.deadline for entry in entries]
        latest = None if None in deadlines else max(deadline for deadline in deadlines if deadline is not None)
        for attempt in range(_TRIES):
            within_s = None if latest is None else latest - time.perf_counter()
            try:
                return await self._encode_hedged([entry.item for entry in entries], within_s)
            except ReplicaUnavailableError as error:
                if attempt + 1 == _TRIES:
                    raise
                log.warning("call_repeated", queue=self.name, items=len(entries), reason=str(error))
                self._metrics.failed("away")
                await asyncio.sleep(_RETRY_DELAY_S * 2**attempt)
        raise AssertionError

    async def _encode_hedged(self, items: Sequence[Item], within_s: float | None) -> EncodeResponse:
        """Return the response; a late call is sent to a second replica, and the first response counts."""
        attempts = [asyncio.ensure_future(self._encode_remote(items, within_s))]
        late_after_s = _FIRST_LATE_AFTER_S if self._call_s is None else max(_LATE_AFTER_S, _LATE_FACTOR * self._call_s)
        try:
            await asyncio.wait(attempts, timeout=late_after_s)
            if not attempts[0].done():
                log.warning("call_late", queue=self.name, items=len(items), seconds=round(late_after_s, 1))
                self._metrics.failed("late")
                attempts.append(
                    asyncio.ensure_future(
                        self._encode_remote(items, None if within_s is None else within_s - late_after_s)
                    )
                )
            while True:
                done, waiting = await asyncio.wait(attempts, return_when=asyncio.FIRST_COMPLETED)
                success = next((attempt for attempt in done if attempt.exception() is None), None)
                if success is not None or not waiting:
                    return (success or attempts[0]).result()
                attempts = list(waiting)
        finally:
            for attempt in attempts:
                attempt.cancel()


def _trace_only(caller: Context) -> Context:
    """Return a context with only the trace of a caller.

    Ray cancels the calls in the context of a request when its client disconnects, but a call may serve more requests.
    """
    trace_context = Context()
    trace_context.run(context.attach, caller.run(context.get_current))
    return trace_context


def _cancel_if_unused(
    entries: Sequence[Entry[Item, np.ndarray]], call: asyncio.Task[None], _: asyncio.Future[Any]
) -> None:
    """Cancel a call if all its items are cancelled."""
    if all(entry.future.cancelled() for entry in entries):
        call.cancel()
