"""The queue: fairness, batches, and every way in which a future could be lost."""

import asyncio
import contextlib
import threading
import time
from itertools import chain

import numpy as np
import pytest

from app.errors import DeadlineExceededError, NotReadyError, OverloadedError
from app.models import queue as batching
from app.models.queue import EncodeQueue
from app.observability.metrics import Metrics, TowerMetrics

pytestmark = pytest.mark.anyio


class Gate:
    """A tower whose items are numbers and whose rows are their squares. While the gate is closed, a batch waits.

    ``begun`` lists batches in the order of their start, ``batches`` in the order of their computation, and ``had_few``
    whether the queue had few other items at each start.
    """

    def __init__(self, *, shut=False, room=1000):
        self.begun = []
        self.had_few = []
        self.batches = []
        self.threads = set()
        self.entered = threading.Semaphore(0)
        self.room = room
        self._open = threading.Event()
        if not shut:
            self._open.set()

    def __call__(self, batch, few):
        self.begun.append(list(batch))
        self.had_few.append(few)
        return lambda: self.compute(list(batch))

    def compute(self, batch):
        self.batches.append(batch)
        self.threads.add(threading.current_thread())
        self.entered.release()
        assert self._open.wait(10)
        if len(batch) > self.room:
            raise MemoryError("no room")
        if "poison" in batch:
            raise ZeroDivisionError
        if "death" in batch:
            raise SystemExit
        return np.array([[item * item] for item in batch], dtype=np.float32)

    def open(self):
        self._open.set()

    def shut(self):
        self._open.clear()

    async def one_has_entered(self):
        assert await asyncio.to_thread(self.entered.acquire, timeout=10)


@pytest.fixture
def metrics():
    return Metrics()


@pytest.fixture
def counted(metrics):
    """Return the value of a metric of the queue."""

    def value(name, **labels):
        return metrics.registry.get_sample_value(name, {"model": "m", "tower": "t", **labels}) or 0

    return value


@pytest.fixture
def start(metrics):
    with contextlib.ExitStack() as stack:

        def make(begin, *, max_queued=None, batch_size=4, stalled_after_s=300.0, workers=1):
            queue = EncodeQueue(
                "test",
                begin if isinstance(begin, Gate) else lambda batch, _: begin(batch),
                batch_size=batch_size,
                metrics=TowerMetrics(metrics, "m", "t"),
                max_queued=max_queued,
                stalled_after_s=stalled_after_s,
                workers=workers,
            )
            stack.callback(queue.close)
            if isinstance(begin, Gate):
                stack.callback(begin.open)
            return queue

        yield make


async def row_of(queue, item, **options):
    """Encode one item in a separate request."""
    with queue.admit(1, **options) as caller:
        return (await queue.encode(item, caller)).row.item()


async def in_line():
    """Let tasks that were just created reach the queue."""
    for _ in range(3):
        await asyncio.sleep(0)


async def healthy(queue):
    """Wait until the queue has no problem."""
    async with asyncio.timeout(10):
        while queue.problem is not None:  # noqa: ASYNC110 - a thread ends the wait
            await asyncio.sleep(0.001)


async def died(queue, count=1):
    """Wait until this number of workers is dead and not restarted."""
    async with asyncio.timeout(10):
        while sum(worker.down is not None for worker in queue._workers) < count:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.001)


# --- batches -------------------------------------------------------------------------------------------------------


async def test_rows_have_the_order_of_the_items_for_every_batch_size(start):
    gate = Gate()
    rows = await start(gate, batch_size=4).run(list(range(10)))
    assert gate.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    np.testing.assert_array_equal([row[0] for row in rows], np.arange(10.0) ** 2)


async def test_a_single_item_is_encoded_immediately_without_waiting_for_others(start):
    gate = Gate()
    queue = start(gate, batch_size=1000)
    assert await asyncio.wait_for(row_of(queue, 3), 5) == 9.0
    assert gate.batches == [[3]]


async def test_items_that_arrive_during_a_batch_form_the_next_batch(start):
    gate = Gate(shut=True)
    queue = start(gate, batch_size=8)
    first = asyncio.create_task(row_of(queue, 1))
    await gate.one_has_entered()
    others = [asyncio.create_task(row_of(queue, item)) for item in (2, 3, 4)]
    await in_line()
    gate.open()
    assert await asyncio.gather(first, *others) == [1.0, 4.0, 9.0, 16.0]
    assert gate.batches == [[1], [2, 3, 4]]


async def test_a_full_batch_begins_early_and_a_partial_one_does_not(start):
    gate = Gate(shut=True)
    queue = start(gate, batch_size=2)
    running = [asyncio.create_task(row_of(queue, 1))]
    await gate.one_has_entered()
    running += [asyncio.create_task(row_of(queue, item)) for item in range(2, 8)]
    await in_line()
    assert gate.begun == [[1]]
    gate.shut()
    gate._open.set()
    await asyncio.gather(*running)
    # [4, 5] begins when [2, 3] is computed, and [6, 7] only after that.
    assert gate.begun == [[1], [2, 3], [4, 5], [6, 7]]


async def test_the_next_full_batch_begins_before_the_wait_for_the_running_one(start):
    events = []

    def begin(batch):
        events.append(("begin", list(batch)))

        def wait():
            events.append(("wait", list(batch)))
            return np.zeros((len(batch), 1))

        return wait

    queue = start(begin, batch_size=2)
    await queue.run([1, 2, 3, 4, 5])
    assert events == [
        ("begin", [1, 2]),
        ("begin", [3, 4]),
        ("wait", [1, 2]),
        ("wait", [3, 4]),
        ("begin", [5]),
        ("wait", [5]),
    ]


async def test_all_calls_are_made_by_one_thread_outside_the_event_loop(start):
    gate = Gate()
    queue = start(gate, batch_size=1)
    await asyncio.gather(*(row_of(queue, number) for number in range(20)))
    (thread,) = gate.threads
    assert thread is not threading.current_thread()
    assert thread.name == "test"


async def test_several_workers_encode_at_the_same_time_and_share_the_waiting_items(start):
    gate = Gate(shut=True)
    queue = start(gate, batch_size=4, workers=2)
    first = asyncio.create_task(row_of(queue, 1))
    await gate.one_has_entered()
    second = asyncio.create_task(row_of(queue, 2))
    await gate.one_has_entered()
    others = [asyncio.create_task(row_of(queue, item)) for item in range(3, 9)]
    await in_line()
    assert (gate.begun, queue.waiting) == ([[1], [2]], 6)  # none begins early
    gate.open()
    assert await asyncio.gather(first, second, *others) == [float(item**2) for item in range(1, 9)]
    assert sorted(map(len, gate.begun)) in ([1, 1, 1, 2, 3], [1, 1, 3, 3])  # half of what waits at each start
    assert {thread.name for thread in gate.threads} == {"test 0", "test 1"}


async def test_a_batch_may_use_the_whole_device_if_few_items_are_in_the_queue(start):
    gate = Gate()
    queue = start(gate, batch_size=4, workers=4)
    await queue.run([1])
    with queue.admit(1):  # an image that is still being decoded
        await row_of(queue, 2)
        with queue.admit(1):
            await row_of(queue, 3)
    assert list(zip(gate.begun, gate.had_few, strict=True)) == [([1], True), ([2], True), ([3], False)]
    await queue.run([4, 5])  # one batch, since another would only wait for the device
    assert gate.begun[3:] == [[4, 5]]


async def test_the_rate_counts_all_workers_that_are_busy(start):
    both = threading.Barrier(2)

    def slow(batch):
        def wait():
            both.wait(10)
            time.sleep(0.1)
            return np.zeros((len(batch), 1))

        return wait

    queue = start(slow, batch_size=1, workers=2)
    await queue.run([1, 2])
    assert 11 < queue._items_per_s <= 20


async def test_a_worker_that_waits_for_its_restart_delays_no_item(start, monkeypatch):
    """One worker restarts at once, the other after a minute."""
    monkeypatch.setattr(batching, "_RESTART_AFTER_S", 0.001)
    taken, entered = {}, threading.Semaphore(0)
    ends = {item: threading.Event() for item in ("first", "death 1", "death 2")}

    def begin(batch):
        def wait():
            (item,) = batch
            taken[item] = threading.current_thread().name
            if item in ends:
                entered.release()
                assert ends[item].wait(10)
            if item.startswith("death"):
                raise SystemExit
            return np.ones((1, 1))

        return wait

    async def entering(*items):
        tasks = [asyncio.create_task(row_of(queue, item)) for item in items]
        for _ in items:
            assert await asyncio.to_thread(entered.acquire, timeout=10)
        return tasks

    queue = start(begin, batch_size=1, workers=2)
    (first,) = await entering("first")
    ends["first"].set()
    await first
    monkeypatch.setattr(batching, "_RESTART_AFTER_S", 60.0)  # of the worker that has succeeded
    deaths = await entering("death 1", "death 2")
    slow, fast = sorted(["death 1", "death 2"], key=lambda item: taken[item] != taken["first"])
    ends[slow].set()
    await died(queue)
    assert queue.problem is None
    ends[fast].set()
    await asyncio.gather(*deaths, return_exceptions=True)
    await healthy(queue)
    async with asyncio.timeout(10):
        for number in range(20):
            assert await row_of(queue, f"item {number}") == 1


async def test_the_event_loop_is_not_blocked_during_a_batch(start):
    gate = Gate(shut=True)
    running = asyncio.create_task(row_of(start(gate), 3))
    await gate.one_has_entered()
    assert not running.done()
    gate.open()
    assert await running == 9.0


async def test_rows_of_requests_in_one_batch_are_not_mixed_up(start):
    queue = start(Gate(), batch_size=3)
    requests = [list(range(first, first + size)) for first, size in [(0, 7), (10, 1), (20, 5), (30, 3)]]
    answers = await asyncio.gather(*(queue.run(request) for request in requests))
    for request, answer in zip(requests, answers, strict=True):
        assert [row[0] for row in answer] == [float(item * item) for item in request]


async def test_batches_and_waits_are_counted(start, counted):
    gate = Gate(shut=True)
    queue = start(gate, batch_size=2)
    task = asyncio.create_task(queue.run([1, 2, 3]))
    await gate.one_has_entered()
    await asyncio.sleep(0.05)
    gate.open()
    await task
    queue.close()  # after which all metrics are written
    assert counted("deixis_batch_size_count") == 2
    assert counted("deixis_batch_size_sum") == 3
    assert counted("deixis_queue_wait_seconds_count") == 3
    assert counted("deixis_queue_wait_seconds_sum") >= 0.05  # of the third item, which waited for the first two


async def test_waiting_and_encoding_are_timed_separately(start):
    gate = Gate(shut=True)
    queue = start(gate, batch_size=1)
    with queue.admit(2) as caller:
        first = asyncio.create_task(queue.encode(1, caller))
        await gate.one_has_entered()
        second = asyncio.create_task(queue.encode(2, caller))
        await asyncio.sleep(0.05)
        gate.open()
        first, second = await first, await second
    assert first.encode_s >= 0.05 > first.queue_s
    assert second.queue_s >= 0.05 > second.encode_s


# --- turns ---------------------------------------------------------------------------------------------------------


async def test_a_single_item_waits_for_one_batch_of_a_large_request(start):
    gate = Gate(shut=True)
    queue = start(gate, batch_size=2)
    large = asyncio.create_task(queue.run([1, 2, 3, 4, 5, 6]))
    await gate.one_has_entered()  # [1, 2] is running, [3, 4] has begun
    small = asyncio.create_task(row_of(queue, 7))
    await in_line()
    gate.open()
    await asyncio.gather(large, small)
    assert 7 in gate.batches[2]


async def test_requests_are_interleaved_by_item(start):
    gate = Gate(shut=True)
    queue = start(gate, batch_size=4)
    first = asyncio.create_task(row_of(queue, 0))
    await gate.one_has_entered()
    callers = [asyncio.create_task(queue.run(items)) for items in ([10, 11, 12], [20, 21, 22], [30])]
    await in_line()
    gate.open()
    await asyncio.gather(first, *callers)
    assert gate.batches == [[0], [10, 20, 30, 11], [21, 12, 22]]


# --- admission -----------------------------------------------------------------------------------------------------


async def test_admitted_items_are_counted_and_released(start):
    queue = start(Gate(), max_queued=5)
    with queue.admit(3):
        assert queue.admitted == 3
        with queue.admit(2):
            assert queue.admitted == 5
        assert queue.admitted == 3
    assert queue.admitted == 0


async def test_items_above_the_limit_are_rejected_immediately_and_not_counted(start, counted):
    queue = start(Gate(), max_queued=5)
    with queue.admit(3):
        with pytest.raises(OverloadedError, match=r"3 more items do not fit: 3 of 5 places .* of test") as caught:
            queue.admit(3).__enter__()
        assert caught.value.retry_after_s >= 1
        assert queue.admitted == 3
        with queue.admit(2):
            pass
    assert counted("deixis_rejected_total", reason="overloaded") == 3


async def test_without_a_limit_all_items_are_admitted_and_counted(start):
    queue = start(Gate(), max_queued=None)
    with queue.admit(1_000_000), queue.admit(1):
        assert queue.admitted == 1_000_001
    assert queue.admitted == 0


async def test_items_are_released_when_their_request_fails_or_is_cancelled(start):
    gate = Gate(shut=True)
    queue = start(gate, max_queued=5)
    cancelled = asyncio.create_task(queue.run([1, 2]))
    failing = asyncio.create_task(queue.run(["poison"]))
    await gate.one_has_entered()
    assert queue.admitted == 3
    cancelled.cancel()
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    with pytest.raises(ZeroDivisionError):
        await failing
    assert queue.admitted == 0


async def test_retry_after_is_the_number_of_waiting_items_divided_by_the_measured_rate(start):
    queue = start(Gate(), max_queued=10, batch_size=4)
    queue._measured(4, 1.0)
    with queue.admit(10), pytest.raises(OverloadedError) as caught:
        queue.admit(1).__enter__()
    assert caught.value.retry_after_s == 3  # 10 at 4 per second, rounded up


async def test_the_rate_is_that_of_the_batches(start):
    def slow(batch):
        def wait():
            time.sleep(0.05)
            return np.zeros((len(batch), 1))

        return wait

    queue = start(slow, max_queued=10, batch_size=4)
    await queue.run([1, 2, 3, 4])
    assert 0 < queue._items_per_s <= 80


async def test_items_that_cannot_meet_their_deadline_are_rejected_immediately(start):
    queue = start(Gate(), max_queued=100)
    queue._measured(10, 1.0)
    with queue.admit(60, within_s=5):
        with pytest.raises(OverloadedError, match=r"60 items ahead .* about 6 s, longer than the 5 s") as caught:
            queue.admit(1, within_s=5).__enter__()
        assert caught.value.retry_after_s == 6
        with queue.admit(1, within_s=7), queue.admit(1):
            pass


# --- dropping ------------------------------------------------------------------------------------------------------


async def test_items_cancelled_while_waiting_are_not_encoded(start, counted):
    gate = Gate(shut=True)
    queue = start(gate)
    first = asyncio.create_task(row_of(queue, 1))
    await gate.one_has_entered()
    abandoned = asyncio.create_task(row_of(queue, 2))
    last = asyncio.create_task(row_of(queue, 3))
    await in_line()
    assert queue.waiting == 2
    abandoned.cancel()
    with pytest.raises(asyncio.CancelledError):
        await abandoned
    assert queue.waiting == 1  # immediately, so that the memory is released while a batch hangs
    gate.open()
    await asyncio.gather(first, last)
    assert gate.batches == [[1], [3]]
    assert counted("deixis_dropped_total", reason="cancelled") == 1


async def test_a_single_item_of_a_request_can_be_cancelled(start, counted):
    gate = Gate(shut=True)
    queue = start(gate)
    with queue.admit(3) as caller:
        first = asyncio.create_task(queue.encode(1, caller))
        await gate.one_has_entered()
        abandoned = asyncio.create_task(queue.encode(2, caller))
        last = asyncio.create_task(queue.encode(3, caller))
        await in_line()
        abandoned.cancel()
        await in_line()
        gate.open()
        await first
        assert (await last).row.item() == 9.0
    assert gate.batches == [[1], [3]]
    assert counted("deixis_dropped_total", reason="cancelled") == 1


async def test_cancelling_a_running_batch_does_not_stop_the_queue(start):
    gate = Gate(shut=True)
    queue = start(gate, batch_size=1)
    abandoned = asyncio.create_task(row_of(queue, 1))
    await gate.one_has_entered()
    abandoned.cancel()
    with pytest.raises(asyncio.CancelledError):
        await abandoned
    gate.open()
    assert await row_of(queue, 3) == 9.0
    assert gate.batches == [[1], [3]]


async def test_items_past_their_deadline_are_dropped_with_an_error(start, counted):
    gate = Gate(shut=True)
    queue = start(gate)
    first = asyncio.create_task(row_of(queue, 1))
    await gate.one_has_entered()
    late = asyncio.create_task(row_of(queue, 2, within_s=0.01))
    in_time = asyncio.create_task(row_of(queue, 3, within_s=60))
    await asyncio.sleep(0.05)
    gate.open()
    with pytest.raises(DeadlineExceededError, match="queue of test"):
        await late
    assert await asyncio.gather(first, in_time) == [1.0, 9.0]
    assert gate.batches == [[1], [3]]
    assert counted("deixis_dropped_total", reason="deadline") == 1


async def test_a_queue_with_only_expired_items_waits_for_the_next_item(start):
    gate = Gate(shut=True)
    queue = start(gate)
    first = asyncio.create_task(row_of(queue, 1))
    await gate.one_has_entered()
    late = asyncio.create_task(row_of(queue, 2, within_s=0.01))
    await asyncio.sleep(0.05)
    gate.open()
    with pytest.raises(DeadlineExceededError):
        await late
    await first
    assert await row_of(queue, 3) == 9.0


# --- batches that fail ---------------------------------------------------------------------------------------------


async def test_only_the_invalid_item_of_a_failed_batch_gets_the_error(start, counted):
    gate = Gate(shut=True)
    queue = start(gate, batch_size=32)
    first = asyncio.create_task(row_of(queue, 0))
    await gate.one_has_entered()
    tasks = [asyncio.create_task(row_of(queue, "poison" if item == 13 else item)) for item in range(32)]
    await in_line()
    gate.open()
    answers = await asyncio.gather(first, *tasks, return_exceptions=True)
    assert isinstance(answers.pop(14), ZeroDivisionError)
    assert answers == [0.0] + [float(item * item) for item in range(32) if item != 13]
    # The batch, and five times the half with the invalid item.
    assert counted("deixis_batch_failures_total", reason="error") == 6
    assert await row_of(queue, 5) == 25.0


async def test_each_of_several_invalid_items_gets_its_error(start):
    queue = start(Gate(), batch_size=8)
    answers = await asyncio.gather(
        *(row_of(queue, item) for item in [1, "poison", 2, "poison", "poison"]), return_exceptions=True
    )
    errors = [answer for answer in answers if isinstance(answer, ZeroDivisionError)]
    assert len({id(error) for error in errors}) == 3
    assert [answers[0], answers[2]] == [1.0, 4.0]


async def test_a_batch_that_fails_in_begin_is_split_too(start):
    def begin(batch):
        if "poison" in batch:
            raise ZeroDivisionError
        return lambda: np.array([[item] for item in batch])

    queue = start(begin, batch_size=8)
    answers = await asyncio.gather(*(row_of(queue, item) for item in [1, 2, "poison", 4]), return_exceptions=True)
    assert isinstance(answers.pop(2), ZeroDivisionError)
    assert answers == [1, 2, 4]


@pytest.mark.parametrize("rows", [0, 1, 5])
async def test_a_wrong_number_of_rows_is_an_error(start, rows):
    queue = start(lambda batch: lambda: np.zeros((rows if len(batch) > 1 else 0, 1)))
    with pytest.raises(ValueError, match=r"returned 0 rows for 1 items"):
        await queue.run([1, 2, 3])


async def test_an_error_that_a_future_cannot_raise_is_wrapped(start):
    def begin(batch):
        raise StopIteration

    with pytest.raises(RuntimeError, match="StopIteration"):
        await asyncio.wait_for(start(begin).run([1]), 5)


async def test_after_out_of_memory_the_batch_is_split_and_the_size_remembered(start, counted):
    gate = Gate(room=2)
    queue = start(gate, batch_size=8)
    rows = await queue.run(list(range(8)))
    assert [row[0] for row in rows] == [float(item * item) for item in range(8)]
    assert [len(batch) for batch in gate.batches] == [8, 4, 2, 2, 4, 2, 2]
    assert counted("deixis_batch_failures_total", reason="out of memory") == 3
    gate.batches.clear()
    await queue.run(list(range(8)))
    assert [len(batch) for batch in gate.batches] == [2, 2, 2, 2]


async def test_larger_batches_are_tried_again_after_many_successes(start, monkeypatch):
    monkeypatch.setattr(batching, "_GOOD_BATCHES_BEFORE_GROWTH", 3)
    gate = Gate(room=2)
    queue = start(gate, batch_size=4)
    await queue.run(list(range(4)))
    gate.room = 1000
    gate.batches.clear()
    await queue.run(list(range(16)))
    sizes = [len(batch) for batch in gate.batches]
    assert sizes[0] == 2
    assert sizes[-1] == 4
    assert sum(sizes) == 16


async def test_a_single_item_that_exceeds_the_memory_gets_the_error(start):
    gate = Gate(room=0)
    with pytest.raises(NotReadyError, match=r"no memory for a single item of test \(no room\)"):
        await asyncio.wait_for(start(gate).run([1, 2]), 5)


# --- a worker that dies --------------------------------------------------------------------------------------------


async def test_when_the_worker_dies_all_requests_get_an_error_and_it_is_restarted(start, monkeypatch, counted):
    monkeypatch.setattr(batching, "_RESTART_AFTER_S", 1.0)
    gate = Gate(shut=True)
    queue = start(gate, batch_size=2)
    running = asyncio.create_task(row_of(queue, "death"))
    await gate.one_has_entered()
    waiting = [asyncio.create_task(row_of(queue, item)) for item in range(5)]
    await in_line()
    assert queue.problem is None
    gate.open()
    answers = await asyncio.wait_for(asyncio.gather(running, *waiting, return_exceptions=True), 5)
    assert [type(answer) for answer in answers] == [NotReadyError] * 6
    assert "ended with SystemExit and is being restarted; try again later" in str(answers[0])
    assert "SystemExit" in queue.problem
    with pytest.raises(NotReadyError, match="SystemExit"):  # immediately, not after the restart
        await row_of(queue, 1)
    assert counted("deixis_rejected_total", reason="not_ready") == 1
    await healthy(queue)
    assert await row_of(queue, 3) == 9.0
    assert queue.admitted == queue.waiting == 0
    assert counted("deixis_worker_restarts_total") == 1


async def test_a_worker_that_dies_fails_its_own_batch_and_the_others_encode_what_waits(start, monkeypatch, counted):
    monkeypatch.setattr(batching, "_RESTART_AFTER_S", 60.0)
    gate = Gate(shut=True)
    queue = start(gate, batch_size=4, workers=2)
    good, bad = (asyncio.create_task(row_of(queue, item)) for item in (3, "death"))
    await gate.one_has_entered()
    await gate.one_has_entered()
    waiting = asyncio.create_task(queue.run([4, 5, 6, 7]))
    await in_line()
    gate.open()
    with pytest.raises(NotReadyError, match="ended with SystemExit and is being restarted; try again later"):
        await bad
    async with asyncio.timeout(10):
        assert await good == 9.0
        assert [row[0] for row in await waiting] == [16.0, 25.0, 36.0, 49.0]
        assert queue.problem is None
        assert await row_of(queue, 8) == 64.0  # while the dead worker waits for its restart
    assert counted("deixis_rejected_total", reason="not_ready") == 0
    assert counted("deixis_worker_restarts_total") == 1


async def test_when_the_last_worker_dies_the_waiting_items_fail(start, monkeypatch, counted):
    monkeypatch.setattr(batching, "_RESTART_AFTER_S", 60.0)
    gate = Gate(shut=True)
    queue = start(gate, batch_size=1, workers=2)
    deaths = []
    for _ in range(2):
        deaths.append(asyncio.create_task(row_of(queue, "death")))
        await gate.one_has_entered()
    waiting = asyncio.create_task(queue.run([1, 2, 3]))
    await in_line()
    gate.open()
    with pytest.raises(NotReadyError, match="is being restarted"):
        await asyncio.wait_for(waiting, 10)
    for death in deaths:
        with pytest.raises(NotReadyError, match="is being restarted"):
            await death
    assert "SystemExit" in queue.problem
    with pytest.raises(NotReadyError, match="SystemExit"):
        await row_of(queue, 1)
    assert counted("deixis_worker_restarts_total") == 2


async def test_an_item_whose_worker_dies_before_taking_it_is_encoded_by_another(start, monkeypatch):
    """Only one worker is woken for a single item."""
    monkeypatch.setattr(batching, "_RESTART_AFTER_S", 60.0)
    queue = start(Gate(), workers=2)
    take = queue._take

    def die_once(*args, **options):
        monkeypatch.setattr(queue, "_take", take)
        raise SystemExit

    monkeypatch.setattr(queue, "_take", die_once)
    assert await asyncio.wait_for(row_of(queue, 3), 10) == 9.0
    await died(queue)


async def test_the_living_workers_share_the_waiting_items(start, monkeypatch):
    monkeypatch.setattr(batching, "_RESTART_AFTER_S", 60.0)
    gate = Gate()
    queue = start(gate, batch_size=8, workers=3)
    for _ in range(2):
        with pytest.raises(NotReadyError):
            await row_of(queue, "death")
    await died(queue, 2)
    gate.batches.clear()
    await queue.run(list(range(6)))
    assert gate.batches == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("seed", range(5))
async def test_exactly_the_items_in_the_batches_of_dead_workers_fail_while_one_lives(start, monkeypatch, seed):
    """Two of three workers die at random places in a stream of requests."""
    monkeypatch.setattr(batching, "_RESTART_AFTER_S", 60.0)
    random = np.random.default_rng(seed)
    gate = Gate()
    queue = start(gate, batch_size=8, workers=3)
    items = [[300 * number + place for place in range(random.integers(1, 6))] for number in range(200)]
    for number in random.choice(len(items), 2, replace=False):
        items[number] = ["death"]

    async def request(items):
        await asyncio.sleep(random.random() * 0.05)
        with queue.admit(len(items)) as caller:
            return await asyncio.gather(*(queue.encode(item, caller) for item in items), return_exceptions=True)

    async with asyncio.timeout(30):
        answers = await asyncio.gather(*map(request, items))
    lost = {item for batch in gate.batches if "death" in batch for item in batch}
    for item, answer in zip(chain(*items), chain(*answers), strict=True):
        if item in lost:
            assert isinstance(answer, NotReadyError)
        else:
            assert answer.row.item() == float(np.float32(item * item))
    assert queue.problem is None
    assert sum(worker.down is not None for worker in queue._workers) == 2


async def test_an_error_in_the_code_of_the_queue_loses_no_future(start, monkeypatch):
    """The error occurs between taking a batch and beginning it, or while rows are returned."""
    monkeypatch.setattr(batching, "_RESTART_AFTER_S", 0.01)
    gate = Gate()
    queue = start(gate)
    for place in ("dropped", "batch"):
        with monkeypatch.context() as broken:
            broken.setattr(queue._metrics, place, lambda *_: 1 / 0)
            with contextlib.suppress(NotReadyError):
                await asyncio.wait_for(row_of(queue, 2), 5)
        await healthy(queue)
    assert await row_of(queue, 3) == 9.0


async def test_the_restart_delay_grows_with_each_death_of_the_worker(start, monkeypatch):
    monkeypatch.setattr(batching, "_RESTART_AFTER_S", 0.001)
    waits = []
    queue = start(Gate())
    wait = queue._closing.wait

    def recorded(timeout):
        waits.append(timeout)
        return wait(timeout)

    monkeypatch.setattr(queue._closing, "wait", recorded)
    for _ in range(4):
        await healthy(queue)
        with pytest.raises(NotReadyError):
            await row_of(queue, "death")
    queue.close()  # after which the last delay has begun
    assert waits == [0.001, 0.002, 0.004, 0.008]


async def test_a_hanging_batch_makes_the_queue_unhealthy_until_it_ends(start):
    gate = Gate(shut=True)
    queue = start(gate, stalled_after_s=0.02)
    hanging = asyncio.create_task(row_of(queue, 1))
    await gate.one_has_entered()
    await asyncio.sleep(0.05)
    assert "running for more than 0.02 s" in queue.problem
    with pytest.raises(NotReadyError, match="running for more than"):
        await row_of(queue, 2)
    gate.open()
    assert await hanging == 1.0
    assert queue.problem is None


async def test_a_busy_queue_is_not_reported_as_hanging(start):
    def begin(batch):
        def wait():
            time.sleep(0.02)
            return np.zeros((len(batch), 1))

        return wait

    queue = start(begin, batch_size=2, stalled_after_s=0.2)
    running = asyncio.create_task(queue.run(list(range(40))))
    while not running.done():
        assert queue.problem is None
        await asyncio.sleep(0.01)


# --- closing -------------------------------------------------------------------------------------------------------


async def test_a_closed_queue_rejects_items(start):
    queue = start(Gate())
    queue.close()
    with pytest.raises(NotReadyError, match="queue of test is closed"):
        await queue.run([1])


async def test_closing_waits_for_the_running_batch_and_rejects_waiting_items(start):
    gate = Gate(shut=True)
    queue = start(gate, batch_size=2)
    whole = asyncio.create_task(queue.run([1, 2]))
    await gate.one_has_entered()
    waiting = asyncio.create_task(queue.run([3]))
    await in_line()
    closing = asyncio.create_task(asyncio.to_thread(queue.close))
    with pytest.raises(NotReadyError, match="queue of test is closed"):
        await asyncio.wait_for(waiting, 10)
    assert not closing.done()
    gate.open()
    await closing
    assert len(await whole) == 2
    assert gate.batches == [[1, 2]]


async def test_closing_waits_for_a_hanging_batch_for_a_limited_time(start):
    gate = Gate(shut=True)
    queue = start(gate, stalled_after_s=0.05)
    hanging = asyncio.create_task(row_of(queue, 1))
    await gate.one_has_entered()
    await asyncio.wait_for(asyncio.to_thread(queue.close), 5)
    gate.open()
    assert await hanging == 1.0


async def test_closing_ends_the_restart_delay(start, monkeypatch):
    monkeypatch.setattr(batching, "_RESTART_AFTER_S", 60.0)
    queue = start(Gate())
    queue.close()
    queue = start(Gate())
    with pytest.raises(NotReadyError):
        await row_of(queue, "death")
    await asyncio.wait_for(asyncio.to_thread(queue.close), 5)
    assert not any(thread.is_alive() for thread in queue._threads)


async def test_closing_twice_is_allowed_and_ends_the_thread(start):
    gate = Gate()
    queue = start(gate)
    await queue.run([1])
    queue.close()
    queue.close()
    assert not any(thread.is_alive() for thread in gate.threads)


# --- random failures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
async def test_under_random_failures_every_future_gets_its_row_or_an_expected_error(start, monkeypatch, workers):
    """A thousand requests with invalid items, little memory, deadlines, cancellations and deaths of the worker."""
    monkeypatch.setattr(batching, "_RESTART_AFTER_S", 0.001)
    monkeypatch.setattr(batching, "_MAX_RESTART_AFTER_S", 0.002)
    random = np.random.default_rng(0)
    gate = Gate(room=5)
    queue = start(gate, batch_size=8, max_queued=300, workers=workers)

    async def request(number):
        await asyncio.sleep(random.random() * 0.5)
        kind = random.choice(
            ["good", "poison", "death", "impatient", "cancelled", "many"], p=[0.5, 0.1, 0.02, 0.1, 0.1, 0.18]
        )
        items = {"poison": ["poison"], "death": ["death"], "many": list(range(number, number + 20))}.get(kind, [number])
        while True:
            work = asyncio.create_task(request_items(items, 0.001 if kind == "impatient" else 30.0))
            if kind == "cancelled":
                await asyncio.sleep(0.0005)
                work.cancel()
            try:
                rows = await work
            except (NotReadyError, OverloadedError):
                if kind == "death":
                    return kind
                await asyncio.sleep(0.01)  # like a client that respects Retry-After
                continue
            except DeadlineExceededError:
                assert kind == "impatient"
                return kind
            except asyncio.CancelledError:
                assert kind == "cancelled"
                return kind
            except ZeroDivisionError:
                assert kind == "poison"
                return kind
            assert kind not in {"poison", "death"}
            assert rows == [float(np.float32(item * item)) for item in items]
            return "rows"

    async def request_items(items, within_s):
        with queue.admit(len(items), within_s=within_s) as caller:
            return [entry.row.item() for entry in await asyncio.gather(*(queue.encode(item, caller) for item in items))]

    async with asyncio.timeout(60):
        outcomes = await asyncio.gather(*(request(number) for number in range(1000)))
    assert len(outcomes) == 1000
    assert outcomes.count("rows") >= 500
    assert min(outcomes.count("poison"), outcomes.count("death")) > 5
    assert queue.admitted == queue.waiting == 0
    await healthy(queue)
    assert await row_of(queue, 7) == 49.0
    async with asyncio.timeout(5):
        while any(worker.begun for worker in queue._workers):  # noqa: ASYNC110 - dropped just after the future is set
            await asyncio.sleep(0.001)
