import asyncio
import contextlib
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from app import batching
from app.batching import EncodeQueue
from app.errors import NotReadyError, OverloadedError

pytestmark = pytest.mark.anyio


class Gate:
    """Items are numbers and rows are their squares; while shut, a call waits inside until the gate is opened."""

    def __init__(self, *, shut=False):
        self.batches = []
        self.threads = set()
        self.entered = threading.Semaphore(0)
        self._open = threading.Event()
        if not shut:
            self._open.set()

    def __call__(self, batch):
        self.batches.append(list(batch))
        self.threads.add(threading.current_thread())
        self.entered.release()
        assert self._open.wait(10)
        if "poison" in batch:
            raise ZeroDivisionError
        return np.array([[item * item] for item in batch], dtype=np.float32)

    def open(self):
        self._open.set()

    async def one_has_entered(self):
        assert await asyncio.to_thread(self.entered.acquire, timeout=10)


@pytest.fixture
def start():
    with contextlib.ExitStack() as stack:

        def make(encode, *, max_queued=100, batch_size=4):
            queue = EncodeQueue("test", encode, max_queued=max_queued, batch_size=batch_size)
            stack.callback(queue.close)
            if isinstance(encode, Gate):
                stack.callback(encode.open)
            return queue

        yield make


async def test_rows_come_back_in_the_order_of_the_items_whatever_the_batch_size(start):
    encode = Gate()
    encoded = await start(encode, batch_size=4).run(list(range(10)))
    assert encode.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    np.testing.assert_array_equal(encoded.features[:, 0], np.arange(10.0) ** 2)


async def test_every_call_is_made_by_one_thread_that_is_not_the_event_loops(start):
    encode = Gate()
    queue = start(encode, batch_size=1)
    await asyncio.gather(*(queue.run([number]) for number in range(20)))
    (thread,) = encode.threads
    assert thread is not threading.current_thread()
    assert thread.name.startswith("test")


async def test_the_event_loop_turns_while_a_batch_is_encoded(start):
    encode = Gate(shut=True)
    running = asyncio.create_task(start(encode).run([3]))
    await encode.one_has_entered()
    assert not running.done()
    encode.open()
    assert (await running).features.tolist() == [[9.0]]


async def test_a_small_request_waits_for_one_batch_of_a_large_one_and_not_for_all(start):
    encode = Gate(shut=True)
    queue = start(encode, batch_size=2)
    large = asyncio.create_task(queue.run([1, 2, 3, 4, 5, 6]))
    await encode.one_has_entered()
    small = asyncio.create_task(queue.run([7]))
    await asyncio.sleep(0)  # lets the small one get in line
    encode.open()
    await asyncio.gather(large, small)
    assert encode.batches == [[1, 2], [7], [3, 4], [5, 6]]


async def test_the_rows_of_requests_that_run_together_are_not_mixed_up(start):
    queue = start(Gate(), batch_size=3)
    requests = [list(range(first, first + size)) for first, size in [(0, 7), (10, 1), (20, 5), (30, 3)]]
    answers = await asyncio.gather(*(queue.run(request) for request in requests))
    for request, answer in zip(requests, answers, strict=True):
        assert answer.features[:, 0].tolist() == [float(item * item) for item in request]


async def test_waiting_and_encoding_are_timed_apart(start, monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(batching, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    encoded = await start(Gate(), batch_size=2).run([1, 2, 3])
    # Per batch the clock is read when it is handed over, begun and ended.
    assert (encoded.queue_ms, encoded.encode_ms) == (2000.0, 2000.0)


async def test_places_are_counted_in_items_and_given_back(start):
    queue = start(Gate(), max_queued=5)
    with queue.admit(3):
        assert queue.admitted == 3
        with queue.admit(2):
            assert queue.admitted == 5
        assert queue.admitted == 3
    assert queue.admitted == 0


async def test_what_does_not_fit_is_refused_at_once_and_takes_no_place(start):
    queue = start(Gate(), max_queued=5)
    with queue.admit(3):
        with pytest.raises(OverloadedError, match=r"3 more would not fit: 3 of 5 places .* of test") as caught:
            queue.admit(3).__enter__()
        assert caught.value.retry_after_s >= 1
        assert queue.admitted == 3
        with queue.admit(2):
            pass


async def test_without_a_bound_nothing_is_refused_and_places_are_counted_all_the_same(start):
    queue = start(Gate(), max_queued=None)
    with queue.admit(1_000_000), queue.admit(1):
        assert queue.admitted == 1_000_001
    assert queue.admitted == 0


async def test_places_are_given_back_when_the_request_fails_or_is_cancelled(start):
    encode = Gate(shut=True)
    queue = start(encode, max_queued=5)

    async def request(items):
        with queue.admit(len(items)):
            await queue.run(items)

    cancelled = asyncio.create_task(request([1, 2]))
    failing = asyncio.create_task(request(["poison"]))
    await encode.one_has_entered()
    assert queue.admitted == 3
    cancelled.cancel()
    encode.open()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    with pytest.raises(ZeroDivisionError):
        await failing
    assert queue.admitted == 0


async def test_retry_after_is_the_time_that_the_waiting_items_take_at_the_measured_rate(start, monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(batching, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    queue = start(Gate(), max_queued=10, batch_size=4)
    await queue.run([1, 2, 3, 4])  # in one second
    with queue.admit(10), pytest.raises(OverloadedError) as caught:
        queue.admit(1).__enter__()
    assert caught.value.retry_after_s == 3  # 10 at 4 a second, rounded up


async def test_a_failing_batch_fails_its_request_only(start):
    encode = Gate()
    queue = start(encode)
    answers = await asyncio.gather(queue.run([1]), queue.run(["poison"]), queue.run([2]), return_exceptions=True)
    assert isinstance(answers[1], ZeroDivisionError)
    assert [answers[0].features.item(), answers[2].features.item()] == [1.0, 4.0]
    assert (await queue.run([3])).features.item() == 9.0


async def test_after_a_failing_batch_the_rest_of_its_request_is_not_encoded(start):
    encode = Gate()
    with pytest.raises(ZeroDivisionError):
        await start(encode, batch_size=1).run([1, "poison", 3])
    assert encode.batches == [[1], ["poison"]]


async def test_what_was_cancelled_while_it_waited_is_never_encoded(start):
    encode = Gate(shut=True)
    queue = start(encode)
    first = asyncio.create_task(queue.run([1]))
    await encode.one_has_entered()
    abandoned = asyncio.create_task(queue.run([2]))
    last = asyncio.create_task(queue.run([3]))
    await asyncio.sleep(0)  # lets both get in line
    abandoned.cancel()
    with pytest.raises(asyncio.CancelledError):
        await abandoned
    encode.open()
    await asyncio.gather(first, last)
    assert encode.batches == [[1], [3]]


async def test_cancelling_what_runs_lets_it_end_and_the_queue_go_on(start):
    encode = Gate(shut=True)
    queue = start(encode, batch_size=1)
    abandoned = asyncio.create_task(queue.run([1, 2]))
    await encode.one_has_entered()
    abandoned.cancel()
    with pytest.raises(asyncio.CancelledError):
        await abandoned
    encode.open()
    assert (await queue.run([3])).features.item() == 9.0
    assert encode.batches == [[1], [3]]


async def test_a_closed_queue_refuses(start):
    queue = start(Gate())
    queue.close()
    with pytest.raises(NotReadyError, match="queue of test is closed"):
        await queue.run([1])


async def test_closing_lets_the_running_batch_end_and_tells_the_waiting_why(start):
    """Nobody waits for ever, and nobody is taken for cancelled who was not."""
    encode = Gate(shut=True)
    queue = start(encode, batch_size=2)
    whole = asyncio.create_task(queue.run([1, 2]))
    await encode.one_has_entered()
    half = asyncio.create_task(queue.run([3, 4, 5]))
    await asyncio.sleep(0)  # lets it get in line
    closing = asyncio.create_task(asyncio.to_thread(queue.close))
    with pytest.raises(NotReadyError, match="queue of test is closed"):
        await asyncio.wait_for(half, 10)
    assert not closing.done()
    encode.open()
    await closing
    assert (await whole).features.shape == (2, 1)
    assert encode.batches == [[1, 2]]


async def test_closing_between_two_batches_of_a_request_is_told_as_closed(start):
    encode = Gate(shut=True)
    queue = start(encode, batch_size=1)
    request = asyncio.create_task(queue.run([1, 2]))
    await encode.one_has_entered()
    closing = asyncio.create_task(asyncio.to_thread(queue.close))
    with pytest.raises(NotReadyError):  # which tells that closing has begun
        await queue.run([9])
    encode.open()
    await closing
    with pytest.raises(NotReadyError):
        await request
    assert encode.batches == [[1]]


async def test_closing_twice_does_no_harm_and_ends_the_thread(start):
    encode = Gate()
    queue = start(encode)
    await queue.run([1])
    queue.close()
    queue.close()
    assert not any(thread.is_alive() for thread in encode.threads)
