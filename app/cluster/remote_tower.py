"""The queue of a tower that is in other processes."""

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

# Calls under way at once of one edge for one tower; what comes meanwhile goes together in the next.
_CALLS_AT_ONCE = 8
# A call whose process went away is made again, since encoding twice does no harm.
_TRIES = 4
_BETWEEN_TRIES_S = 0.1
# So does asking somebody else when an answer is late, as from a machine of which nobody has noticed yet that it is
# gone: after so long, and so many times what calls took of late, so that a long queue is not taken for that.
_LATE_AFTER_S = 3.0
_LATE_TIMES = 4.0
_FIRST_LATE_AFTER_S = 10.0
_CALL_MEMORY = 0.1


class RemoteTower(TurnQueue[Item, np.ndarray]):
    """Sends the items of many callers to a tower elsewhere, several calls at once, each as large as what waits.

    There is no timer: a lone item leaves at once. The batches of the device are made where it is, out of the calls of
    every edge.

    Args:
        name: for messages and logs.
        ask: encodes items within a number of seconds; ReplicaUnavailableError if a retry may succeed.
        batch_size: most items in one call.
        metrics: told of calls, as of batches.
        max_queued: items admitted at once; None sets no bound.

    ``is_outdated`` says that the last call found nobody but encoders with other weights than those that are known here.
    """

    def __init__(
        self,
        name: str,
        ask: Callable[[Sequence[Item], float | None], Awaitable[EncodeResponse]],
        *,
        batch_size: int,
        metrics: QueueMetrics,
        max_queued: int | None = None,
    ) -> None:
        super().__init__(name, batch_size=batch_size, metrics=metrics, max_queued=max_queued)
        self._ask = ask
        self._calls: set[asyncio.Task[None]] = set()
        self._lost: str | None = None
        self.is_outdated = False
        self._call_s: float | None = None

    @property
    def problem(self) -> str | None:
        """Why the last call reached nobody; None while all is well."""
        return self._lost

    def close(self) -> None:
        """Refuse what waits; calls under way end by themselves."""
        super().close()
        self._lost = None

    def _why_down(self) -> NotReadyError | None:
        # Whether somebody is there again is found out by asking.
        return NotReadyError(f"the queue of {self.name} is closed; the service is stopping") if self._closed else None

    def _submitted(self) -> None:
        # After what else becomes ready in this turn of the loop, so that it goes along.
        asyncio.get_running_loop().call_soon(self._send)

    def _send(self) -> None:
        while len(self._calls) < _CALLS_AT_ONCE and (entries := self._take(at_least=1)):
            # In the trace of the first, where it is several callers'.
            call = asyncio.get_running_loop().create_task(
                self._call(entries), context=_of_no_request(entries[0].context)
            )
            self._calls.add(call)
            call.add_done_callback(self._ended)
            for entry in entries:
                entry.future.add_done_callback(partial(_given_up, entries, call))

    def _ended(self, call: asyncio.Task[None]) -> None:
        self._calls.discard(call)
        self._send()

    async def _call(self, entries: Sequence[Entry[Item, np.ndarray]]) -> None:
        began = time.perf_counter()
        under_way = len(self._calls)
        try:
            reply = await self._answer(entries)
        except asyncio.CancelledError:
            self._metrics.dropped("cancelled", len(entries))
            self._settle(entries, [NotReadyError(f"a call of {self.name} was given up; try again")] * len(entries))
            raise
        except Exception as error:  # noqa: BLE001 - whatever comes from elsewhere
            if isinstance(error, OverloadedError):
                self._metrics.rejected("overloaded", len(entries))
            else:
                self._metrics.failed("away" if isinstance(error, ReplicaUnavailableError) else "error")
            if isinstance(error, ReplicaUnavailableError):
                self.is_outdated = isinstance(error, WeightsMismatchError)
                self._lost = f"the encoders of {self.name} cannot be reached ({error})"
                error = NotReadyError(f"{self._lost}; try again later")
            self._settle(entries, [error] * len(entries))
            return
        ended = time.perf_counter()
        self._lost, self._last_ended, self.is_outdated = None, ended, False
        before = ended - began if self._call_s is None else self._call_s
        self._call_s = before + _CALL_MEMORY * (ended - began - before)
        # Others are under way beside it, so that so many are done in its time.
        self._measured(len(entries) * under_way, ended - began)
        outcomes: list[tuple[np.ndarray, float, float] | Exception] = []
        for place, (row, encode_s) in enumerate(zip(reply.rows, reply.encode_s, strict=True)):
            failure = reply.failures.get(place)
            # The way there and back counts as waiting.
            outcomes.append((row, ended - encode_s, ended) if failure is None else failure.to_exception())
        self._settle(entries, outcomes)
        self._metrics.batch(len(entries), ended - began)
        for entry, encode_s in zip(entries, reply.encode_s, strict=True):
            self._metrics.waited(ended - encode_s - entry.submitted)

    async def _answer(self, entries: Sequence[Entry[Item, np.ndarray]]) -> EncodeResponse:
        deadlines = [entry.deadline for entry in entries]
        latest = None if None in deadlines else max(each for each in deadlines if each is not None)
        for attempt in range(_TRIES):
            within_s = None if latest is None else latest - time.perf_counter()
            try:
                return await self._soonest([entry.item for entry in entries], within_s)
            except ReplicaUnavailableError as error:
                if attempt + 1 == _TRIES:
                    raise
                log.warning("call_repeated", queue=self.name, items=len(entries), reason=str(error))
                self._metrics.failed("away")
                await asyncio.sleep(_BETWEEN_TRIES_S * 2**attempt)
        raise AssertionError

    async def _soonest(self, items: Sequence[Item], within_s: float | None) -> EncodeResponse:
        """Return the answer; where it is late, that of another process, if that is sooner."""
        asked = [asyncio.ensure_future(self._ask(items, within_s))]
        late_after_s = _FIRST_LATE_AFTER_S if self._call_s is None else max(_LATE_AFTER_S, _LATE_TIMES * self._call_s)
        try:
            await asyncio.wait(asked, timeout=late_after_s)
            if not asked[0].done():
                log.warning("call_late", queue=self.name, items=len(items), seconds=round(late_after_s, 1))
                self._metrics.failed("late")
                asked.append(
                    asyncio.ensure_future(self._ask(items, None if within_s is None else within_s - late_after_s))
                )
            while True:
                done, waiting = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
                good = next((each for each in done if each.exception() is None), None)
                if good is not None or not waiting:
                    return (good or asked[0]).result()
                asked = list(waiting)
        finally:
            for each in asked:
                each.cancel()


def _of_no_request(caller: Context) -> Context:
    """Return a context with a caller's trace and nothing else.

    Ray ends what was called in the context of a request when its caller hangs up, and a call may be of several.
    """
    made = Context()
    made.run(context.attach, caller.run(context.get_current))
    return made


def _given_up(entries: Sequence[Entry[Item, np.ndarray]], call: asyncio.Task[None], _: asyncio.Future[Any]) -> None:
    """End a call for whose items nobody waits any more."""
    if all(entry.future.cancelled() for entry in entries):
        call.cancel()
