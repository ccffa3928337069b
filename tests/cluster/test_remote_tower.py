"""The queue of a tower elsewhere: what goes in a call, and what becomes of items whatever becomes of the call."""

import asyncio
import contextlib
import contextvars

import numpy as np
import pytest
from opentelemetry import context

from app.cluster import remote_tower
from app.cluster.messages import (
    EncodeResponse,
    RemoteEncoderError,
    ReplicaUnavailableError,
    SerializedError,
    WeightsMismatchError,
)
from app.cluster.remote_tower import RemoteTower
from app.errors import DeadlineExceededError, NotReadyError, OverloadedError
from app.observability.metrics import Metrics, TowerMetrics

pytestmark = pytest.mark.anyio


class There:
    """Squares numbers; while shut, calls wait. ``outcomes`` are raised or returned by the next calls, first."""

    def __init__(self, *outcomes, shut=False):
        self.calls = []
        self.within_s = []
        self.cancelled = []
        self.outcomes = list(outcomes)
        self.open = asyncio.Event()
        if not shut:
            self.open.set()

    async def __call__(self, items, within_s):
        self.calls.append(list(items))
        self.within_s.append(within_s)
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled.append(list(items))
            raise
        outcome = self.outcomes.pop(0) if self.outcomes else None
        if isinstance(outcome, Exception):
            raise outcome
        failures = outcome or {}
        return EncodeResponse(np.array([[item * item] for item in items], np.float32), failures, [0.0] * len(items),
                     [0.001] * len(items))  # fmt: skip


def tower(there, *, batch_size=4, max_queued=None, metrics=None):
    told = TowerMetrics(metrics or Metrics(), "m", "images")
    return RemoteTower("m images", there, batch_size=batch_size, metrics=told, max_queued=max_queued)


async def until(done):
    async with asyncio.timeout(10):
        while not done():  # noqa: ASYNC110 - calls tell nothing
            await asyncio.sleep(0.001)


def value(row):
    return float(row[0])


async def test_a_lone_item_leaves_at_once_and_what_comes_with_others_goes_together():
    there = There()
    queue = tower(there)
    assert value((await queue.run([3]))[0]) == 9
    rows = await queue.run([1, 2, 3, 4, 5, 6])
    assert [value(row) for row in rows] == [1, 4, 9, 16, 25, 36]
    assert there.calls == [[3], [1, 2, 3, 4], [5, 6]]


async def test_while_as_many_calls_as_may_be_are_under_way_the_next_grows(monkeypatch):
    monkeypatch.setattr(remote_tower, "_CALLS_AT_ONCE", 2)
    there = There(shut=True)
    queue = tower(there)
    waiting = [asyncio.create_task(queue.run([number])) for number in range(6)]
    await until(lambda: (len(there.calls) == 2 and queue.waiting == 0) or queue.waiting == 2)
    for extra in range(6, 8):
        waiting.append(asyncio.create_task(queue.run([extra])))
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    there.open.set()
    rows = await asyncio.gather(*waiting)
    assert [value(row) for (row,) in rows] == [number**2 for number in range(8)]
    assert sum(len(call) for call in there.calls) == 8
    assert max(len(call) for call in there.calls) == 4
    assert len(there.calls) <= 4


async def test_callers_take_turns():
    there = There(shut=True)
    queue = tower(there, batch_size=2)
    queue._send = lambda: None
    many = asyncio.create_task(queue.run([1, 2, 3, 4, 5, 6]))
    few = asyncio.create_task(queue.run([100]))
    await until(lambda: queue.waiting == 7)
    del queue._send
    there.open.set()
    queue._send()
    await asyncio.gather(many, few)
    assert 100 in there.calls[0]


async def test_an_item_that_fails_fails_alone():
    there = There({1: SerializedError("fault", "ValueError: bad")})
    queue = tower(there)
    with queue.admit(3) as caller:
        done = await asyncio.gather(*(queue.encode(item, caller) for item in (1, 2, 3)), return_exceptions=True)
    assert [value(done[0].row), value(done[2].row)] == [1, 9]
    assert isinstance(done[1], RemoteEncoderError)
    assert "ValueError: bad" in str(done[1])


async def test_the_time_of_its_way_counts_as_waiting_and_what_is_left_of_it_goes_along():
    there = There()
    queue = tower(there)
    with queue.admit(1, within_s=5) as caller:
        encoded = await queue.encode(2, caller)
    assert encoded.encode_s == pytest.approx(0.001)
    assert encoded.queue_s >= -0.001
    assert 0 < there.within_s[0] <= 5
    with queue.admit(1) as caller:
        await queue.encode(2, caller)
    assert there.within_s[1] is None


async def test_a_process_that_went_away_is_asked_again():
    metrics = Metrics()
    there = There(ReplicaUnavailableError("ActorDiedError"), ReplicaUnavailableError("ActorDiedError"))
    queue = tower(there, metrics=metrics)
    assert value((await queue.run([3]))[0]) == 9
    assert there.calls == [[3]] * 3
    assert queue.problem is None
    failures = metrics.registry.get_sample_value(
        "deixis_batch_failures_total", {"model": "m", "tower": "images", "reason": "away"}
    )
    assert failures == 2


async def test_where_an_answer_is_late_somebody_else_is_asked_and_the_sooner_counts(monkeypatch):
    monkeypatch.setattr(remote_tower, "_LATE_AFTER_S", 0.05)
    there = There(shut=True)
    queue = tower(there)
    waiting = asyncio.create_task(queue.run([3]))
    await until(lambda: there.calls == [[3]])
    never, there.open = there.open, asyncio.Event()
    there.open.set()
    assert value((await waiting)[0]) == 9
    assert there.calls == [[3], [3]]
    await until(lambda: there.cancelled == [[3]])
    assert not never.is_set()


async def test_where_the_second_that_is_asked_is_away_the_first_is_waited_for(monkeypatch):
    monkeypatch.setattr(remote_tower, "_FIRST_LATE_AFTER_S", 0.02)
    there = There(shut=True)
    queue = tower(there)
    waiting = asyncio.create_task(queue.run([3]))
    await until(lambda: there.calls == [[3]])
    first, there.open = there.open, asyncio.Event()
    there.open.set()
    there.outcomes = [ReplicaUnavailableError("gone")]
    await until(lambda: len(there.calls) == 2)
    await asyncio.sleep(0.01)
    assert not waiting.done()
    first.set()
    assert value((await waiting)[0]) == 9
    assert len(there.calls) == 2


async def test_when_nobody_is_there_it_is_told_and_found_out_when_somebody_is(monkeypatch):
    monkeypatch.setattr(remote_tower, "_BETWEEN_TRIES_S", 0.001)
    there = There(*[ReplicaUnavailableError("gone")] * remote_tower._TRIES)
    queue = tower(there)
    with pytest.raises(NotReadyError, match="cannot be reached"):
        await queue.run([3])
    assert "cannot be reached" in queue.problem
    assert value((await queue.run([4]))[0]) == 16
    assert queue.problem is None


@pytest.mark.parametrize(
    "error", [OverloadedError("full", 7), NotReadyError("starting"), DeadlineExceededError("late")]
)
async def test_what_is_refused_there_is_refused_here(error):
    queue = tower(There(error))
    with pytest.raises(type(error)) as told:
        await queue.run([3])
    assert told.value is error
    assert queue.admitted == 0


async def test_more_than_may_be_admitted_are_refused_here():
    there = There(shut=True)
    queue = tower(there, max_queued=3)
    waiting = asyncio.create_task(queue.run([1, 2]))
    await until(lambda: there.calls)
    with pytest.raises(OverloadedError) as told:
        await queue.run([3, 4])
    assert told.value.retry_after_s >= 1
    there.open.set()
    await waiting
    assert len(await queue.run([3, 4, 5])) == 3


async def test_a_call_is_given_up_when_all_its_callers_have_left_and_not_before():
    there = There(shut=True)
    queue = tower(there)
    first = asyncio.create_task(queue.run([1]))
    second = asyncio.create_task(queue.run([2]))
    await until(lambda: there.calls == [[1, 2]])
    first.cancel()
    await asyncio.sleep(0.01)
    assert there.cancelled == []
    second.cancel()
    await until(lambda: there.cancelled == [[1, 2]])
    for left in (first, second):
        with contextlib.suppress(asyncio.CancelledError):
            await left
    assert (queue.admitted, queue.waiting, queue._begun) == (0, 0, [])
    there.open.set()
    assert value((await queue.run([5]))[0]) == 25


async def test_an_item_whose_time_has_passed_is_not_sent(monkeypatch):
    monkeypatch.setattr(remote_tower, "_CALLS_AT_ONCE", 1)
    there = There(shut=True)
    queue = tower(there)
    before = asyncio.create_task(queue.run([1]))
    await until(lambda: there.calls)
    late = asyncio.create_task(queue.run([2], within_s=0.02))
    await asyncio.sleep(0.05)
    there.open.set()
    with pytest.raises(DeadlineExceededError):
        await late
    await before
    assert there.calls == [[1]]


async def test_when_it_is_closed_what_waits_and_what_comes_is_refused(monkeypatch):
    monkeypatch.setattr(remote_tower, "_CALLS_AT_ONCE", 1)
    there = There(shut=True)
    queue = tower(there)
    under_way = asyncio.create_task(queue.run([1]))
    await until(lambda: there.calls)
    waits = asyncio.create_task(queue.run([2]))
    await until(lambda: queue.waiting == 1)
    queue.close()
    with pytest.raises(NotReadyError, match="stopping"):
        await waits
    with pytest.raises(NotReadyError, match="stopping"):
        await queue.run([3])
    there.open.set()
    assert value((await under_way)[0]) == 1


async def test_encoders_with_other_weights_are_passed_over_and_told_where_there_are_no_others(monkeypatch):
    monkeypatch.setattr(remote_tower, "_BETWEEN_TRIES_S", 0.0)
    there = There(WeightsMismatchError("other weights"))
    queue = tower(there)
    with queue.admit(1) as caller:
        assert value((await queue.encode(3, caller)).row) == 9
    assert (len(there.calls), queue.is_outdated) == (2, False)

    there.outcomes = [WeightsMismatchError("other weights")] * 4
    with queue.admit(1) as caller, pytest.raises(NotReadyError, match="other weights"):
        await queue.encode(3, caller)
    assert queue.is_outdated
    with queue.admit(1) as caller:
        assert value((await queue.encode(3, caller)).row) == 9
    assert not queue.is_outdated


async def test_a_call_has_the_trace_of_a_request_and_belongs_to_none():
    """Ray ends calls that are made in the context of a request along with it, and others may be in the same call."""
    request, seen = contextvars.ContextVar("request", default="none"), []

    class Looks(There):
        async def __call__(self, items, within_s):
            seen.append((request.get(), context.get_value("trace")))
            return await super().__call__(items, within_s)

    queue = tower(Looks())
    request.set("the first")
    token = context.attach(context.set_value("trace", "of the first"))
    try:
        with queue.admit(1) as caller:
            await queue.encode(3, caller)
    finally:
        context.detach(token)
    assert seen == [("none", "of the first")]
