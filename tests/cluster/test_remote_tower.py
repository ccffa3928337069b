"""The queue of a remote tower: calls, retries, late responses and cancellation."""

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


class Squares:
    """A remote tower that squares numbers; calls wait while it is closed. Calls raise or return ``outcomes`` first."""

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


def tower(remote, *, batch_size=4, max_queued=None, metrics=None):
    tower_metrics = TowerMetrics(metrics or Metrics(), "m", "images")
    return RemoteTower("m images", remote, batch_size=batch_size, metrics=tower_metrics, max_queued=max_queued)


async def until(done):
    async with asyncio.timeout(10):
        while not done():  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.001)


def value(row):
    return float(row[0])


async def test_a_single_item_is_sent_immediately_and_concurrent_items_share_calls():
    remote = Squares()
    queue = tower(remote)
    assert value((await queue.run([3]))[0]) == 9
    rows = await queue.run([1, 2, 3, 4, 5, 6])
    assert [value(row) for row in rows] == [1, 4, 9, 16, 25, 36]
    assert remote.calls == [[3], [1, 2, 3, 4], [5, 6]]


async def test_items_that_arrive_during_the_maximum_of_calls_share_the_next_call(monkeypatch):
    monkeypatch.setattr(remote_tower, "_MAX_CALLS", 2)
    remote = Squares(shut=True)
    queue = tower(remote)
    waiting = [asyncio.create_task(queue.run([number])) for number in range(6)]
    await until(lambda: (len(remote.calls) == 2 and queue.waiting == 0) or queue.waiting == 2)
    for extra in range(6, 8):
        waiting.append(asyncio.create_task(queue.run([extra])))
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    remote.open.set()
    rows = await asyncio.gather(*waiting)
    assert [value(row) for (row,) in rows] == [number**2 for number in range(8)]
    assert sum(len(call) for call in remote.calls) == 8
    assert max(len(call) for call in remote.calls) == 4
    assert len(remote.calls) <= 4


async def test_requests_are_interleaved():
    remote = Squares(shut=True)
    queue = tower(remote, batch_size=2)
    queue._send = lambda: None
    many = asyncio.create_task(queue.run([1, 2, 3, 4, 5, 6]))
    few = asyncio.create_task(queue.run([100]))
    await until(lambda: queue.waiting == 7)
    del queue._send
    remote.open.set()
    queue._send()
    await asyncio.gather(many, few)
    assert 100 in remote.calls[0]


async def test_an_item_that_fails_does_not_affect_the_others():
    remote = Squares({1: SerializedError("fault", "ValueError: bad")})
    queue = tower(remote)
    with queue.admit(3) as ticket:
        done = await asyncio.gather(*(queue.encode(item, ticket) for item in (1, 2, 3)), return_exceptions=True)
    assert [value(done[0].row), value(done[2].row)] == [1, 9]
    assert isinstance(done[1], RemoteEncoderError)
    assert "ValueError: bad" in str(done[1])


async def test_the_time_of_messages_counts_as_waiting_and_the_remaining_time_is_sent():
    remote = Squares()
    queue = tower(remote)
    with queue.admit(1, within_s=5) as ticket:
        encoded = await queue.encode(2, ticket)
    assert encoded.encode_s == pytest.approx(0.001)
    assert encoded.queue_s >= -0.001
    assert 0 < remote.within_s[0] <= 5
    with queue.admit(1) as ticket:
        await queue.encode(2, ticket)
    assert remote.within_s[1] is None


async def test_a_call_to_a_replica_that_disappeared_is_repeated():
    metrics = Metrics()
    remote = Squares(ReplicaUnavailableError("ActorDiedError"), ReplicaUnavailableError("ActorDiedError"))
    queue = tower(remote, metrics=metrics)
    assert value((await queue.run([3]))[0]) == 9
    assert remote.calls == [[3]] * 3
    assert queue.problem is None
    failures = metrics.registry.get_sample_value(
        "deixis_batch_failures_total", {"model": "m", "tower": "images", "reason": "away"}
    )
    assert failures == 2


async def test_a_late_call_is_sent_to_a_second_replica_and_the_first_response_counts(monkeypatch):
    monkeypatch.setattr(remote_tower, "_FIRST_LATE_AFTER_S", 0.05)
    remote = Squares(shut=True)
    queue = tower(remote)
    waiting = asyncio.create_task(queue.run([3]))
    await until(lambda: remote.calls == [[3]])
    never, remote.open = remote.open, asyncio.Event()
    remote.open.set()
    assert value((await waiting)[0]) == 9
    assert remote.calls == [[3], [3]]
    await until(lambda: remote.cancelled == [[3]])
    assert not never.is_set()


async def test_if_the_second_replica_is_unavailable_the_first_response_is_awaited(monkeypatch):
    monkeypatch.setattr(remote_tower, "_FIRST_LATE_AFTER_S", 0.02)
    remote = Squares(shut=True)
    queue = tower(remote)
    waiting = asyncio.create_task(queue.run([3]))
    await until(lambda: remote.calls == [[3]])
    first, remote.open = remote.open, asyncio.Event()
    remote.open.set()
    remote.outcomes = [ReplicaUnavailableError("gone")]
    await until(lambda: len(remote.calls) == 2)
    await asyncio.sleep(0.01)
    assert not waiting.done()
    first.set()
    assert value((await waiting)[0]) == 9
    assert len(remote.calls) == 2


async def test_without_replicas_calls_are_rejected_until_one_is_available(monkeypatch):
    monkeypatch.setattr(remote_tower, "_RETRY_DELAY_S", 0.001)
    remote = Squares(*[ReplicaUnavailableError("gone")] * remote_tower._TRIES)
    queue = tower(remote)
    with pytest.raises(NotReadyError, match="cannot be reached"):
        await queue.run([3])
    assert "cannot be reached" in queue.problem
    assert value((await queue.run([4]))[0]) == 16
    assert queue.problem is None


@pytest.mark.parametrize(
    "error", [OverloadedError("full", 7), NotReadyError("starting"), DeadlineExceededError("late")]
)
async def test_rejections_of_the_replica_are_passed_on(error):
    queue = tower(Squares(error))
    with pytest.raises(type(error)) as caught:
        await queue.run([3])
    assert caught.value is error
    assert queue.admitted == 0


async def test_items_above_the_limit_are_rejected():
    remote = Squares(shut=True)
    queue = tower(remote, max_queued=3)
    waiting = asyncio.create_task(queue.run([1, 2]))
    await until(lambda: remote.calls)
    with pytest.raises(OverloadedError) as caught:
        await queue.run([3, 4])
    assert caught.value.retry_after_s >= 1
    remote.open.set()
    await waiting
    assert len(await queue.run([3, 4, 5])) == 3


async def test_a_call_is_cancelled_when_all_its_items_are_cancelled_and_not_before():
    remote = Squares(shut=True)
    queue = tower(remote)
    first = asyncio.create_task(queue.run([1]))
    second = asyncio.create_task(queue.run([2]))
    await until(lambda: remote.calls == [[1, 2]])
    first.cancel()
    await asyncio.sleep(0.01)
    assert remote.cancelled == []
    second.cancel()
    await until(lambda: remote.cancelled == [[1, 2]])
    for cancelled in (first, second):
        with contextlib.suppress(asyncio.CancelledError):
            await cancelled
    assert (queue.admitted, queue.waiting) == (0, 0)
    remote.open.set()
    assert value((await queue.run([5]))[0]) == 25


async def test_an_item_after_its_deadline_is_not_sent(monkeypatch):
    monkeypatch.setattr(remote_tower, "_MAX_CALLS", 1)
    remote = Squares(shut=True)
    queue = tower(remote)
    before = asyncio.create_task(queue.run([1]))
    await until(lambda: remote.calls)
    late = asyncio.create_task(queue.run([2], within_s=0.02))
    await asyncio.sleep(0.05)
    remote.open.set()
    with pytest.raises(DeadlineExceededError):
        await late
    await before
    assert remote.calls == [[1]]


async def test_a_closed_queue_rejects_waiting_and_new_items(monkeypatch):
    monkeypatch.setattr(remote_tower, "_MAX_CALLS", 1)
    remote = Squares(shut=True)
    queue = tower(remote)
    in_progress = asyncio.create_task(queue.run([1]))
    await until(lambda: remote.calls)
    waits = asyncio.create_task(queue.run([2]))
    await until(lambda: queue.waiting == 1)
    queue.close()
    with pytest.raises(NotReadyError, match="stopping"):
        await waits
    with pytest.raises(NotReadyError, match="stopping"):
        await queue.run([3])
    remote.open.set()
    assert value((await in_progress)[0]) == 1


async def test_a_call_to_an_encoder_with_other_weights_is_repeated(monkeypatch):
    monkeypatch.setattr(remote_tower, "_RETRY_DELAY_S", 0.0)
    remote = Squares(WeightsMismatchError("other weights"))
    queue = tower(remote)
    with queue.admit(1) as ticket:
        assert value((await queue.encode(3, ticket)).row) == 9
    assert (len(remote.calls), queue.is_outdated) == (2, False)

    remote.outcomes = [WeightsMismatchError("other weights")] * 4
    with queue.admit(1) as ticket, pytest.raises(NotReadyError, match="other weights"):
        await queue.encode(3, ticket)
    assert queue.is_outdated
    with queue.admit(1) as ticket:
        assert value((await queue.encode(3, ticket)).row) == 9
    assert not queue.is_outdated


async def test_a_call_runs_in_the_trace_of_a_request_but_not_in_its_context():
    """Ray cancels calls in the context of a request with it, and a call may serve other requests too."""
    request, seen = contextvars.ContextVar("request", default="none"), []

    class RecordsContext(Squares):
        async def __call__(self, items, within_s):
            seen.append((request.get(), context.get_value("trace")))
            return await super().__call__(items, within_s)

    queue = tower(RecordsContext())
    request.set("the first")
    token = context.attach(context.set_value("trace", "of the first"))
    try:
        with queue.admit(1) as ticket:
            await queue.encode(3, ticket)
    finally:
        context.detach(token)
    assert seen == [("none", "of the first")]
