"""Texts and images are encoded in turns with requests."""

import asyncio
import time

import numpy as np
import pytest

from app.errors import NotAnImageError, OverloadedError
from app.models import background
from app.models.background import BackgroundEncoding
from app.models.queue import TurnQueue
from app.observability.metrics import Metrics, TowerMetrics
from app.runtime.turns import TURN_S, Turns

pytestmark = pytest.mark.anyio

ITEMS = list(range(60))


class Tower:
    """Encodes an item as its square; ``turns`` has the start, the end and the items of each call."""

    def __init__(self, s_per_item=0.001):
        self.turns = []
        self.s_per_item = s_per_item

    async def __call__(self, items):
        began = time.perf_counter()
        await asyncio.sleep(self.s_per_item * len(items))
        self.turns.append((began, time.perf_counter(), list(items)))
        return np.array(items) ** 2  # an array, as towers return


class AlwaysDue(Turns):
    """Requests never pause, and every turn may begin."""

    def __init__(self):
        super().__init__(time.perf_counter)

    def begin(self, work):
        return 0.0, True


async def test_rows_are_in_the_order_of_the_items_and_turns_are_long_while_nobody_asks():
    tower, encoding = Tower(0.0), BackgroundEncoding(Turns())
    assert await encoding.encode("tower", tower, ITEMS) == [item**2 for item in ITEMS]
    assert len(tower.turns) == 1


async def test_while_requests_arrive_a_turn_has_few_items():
    tower, encoding = Tower(0.004), BackgroundEncoding(AlwaysDue())
    await encoding.encode("tower", tower, ITEMS[:30])
    assert max(len(items) for *_, items in tower.turns[1:]) <= TURN_S / 0.004


async def test_each_tower_has_its_own_speed():
    slow, other, encoding = Tower(0.03), Tower(0.0), BackgroundEncoding(AlwaysDue())
    await encoding.encode("slow", slow, ITEMS[:9])
    await encoding.encode("other", other, ITEMS[:8])
    await encoding.encode("slow", slow, ITEMS[:2])
    assert [len(items) for *_, items in slow.turns] == [8, 1, 1, 1]
    assert len(other.turns[0][2]) == 8


async def test_a_turn_begins_when_the_turns_allow_it_and_tells_how_long_it_took():
    class Recording(Turns):
        waits, took = [0.001, 0.001, 0.0], []

        def begin(self, work):
            return self.waits.pop(0), True

        def end(self, took_s):
            self.took.append(took_s)

    tower = Tower(0.01)
    await BackgroundEncoding(Recording()).encode("tower", tower, ITEMS[:2])
    assert not Recording.waits
    assert len(Recording.took) == 1
    assert Recording.took[0] >= 0.02


async def test_images_that_cannot_be_decoded_do_not_make_later_turns_longer():
    async def refuse(items):
        return [NotAnImageError("")] * len(items)

    tower, encoding = Tower(0.01), BackgroundEncoding(AlwaysDue())
    await encoding.encode("tower", refuse, ITEMS)
    await encoding.encode("tower", tower, ITEMS[:20])
    assert [len(items) for *_, items in tower.turns[:1]] == [background._FIRST_ITEMS]
    assert max(len(items) for *_, items in tower.turns[1:]) <= TURN_S / 0.01


async def test_rows_are_kept_while_requests_fill_the_queue_and_a_full_queue_refuses_only_the_first_items():
    turns, refusals = [], 0

    async def encode(items):
        nonlocal refusals
        if turns and refusals < 3:
            refusals += 1
            raise OverloadedError("the queue is full", retry_after_s=0)
        turns.append(list(items))
        return np.array(items) ** 2

    encoding = BackgroundEncoding(AlwaysDue())
    rows = await encoding.encode("tower", encode, ITEMS)
    assert rows == [item**2 for item in ITEMS]
    assert [item for items in turns for item in items] == ITEMS
    refusals = 0
    with pytest.raises(OverloadedError):
        await encoding.encode("tower", encode, ITEMS)
    assert refusals == 1


async def test_a_turn_that_requests_slow_counts_little_longer_than_its_items_take_alone():
    took = []

    class Recording(AlwaysDue):
        def end(self, took_s):
            took.append(took_s)

    tower, encoding = Tower(0.01), BackgroundEncoding(Recording())
    await encoding.encode("tower", tower, ITEMS[:8])
    tower.s_per_item = 0.3
    await encoding.encode("tower", tower, ITEMS[:1])
    assert took[0] >= 0.08
    assert took[1] == pytest.approx(background._MAX_CONTENDED * TURN_S)


async def test_a_failed_turn_ends_and_the_error_is_raised():
    ended = []

    class Recording(AlwaysDue):
        def end(self, took_s):
            ended.append(took_s)

    async def fail(items):
        raise MemoryError(str(items))

    with pytest.raises(MemoryError):
        await BackgroundEncoding(Recording()).encode("tower", fail, ITEMS)
    assert len(ended) == 1


async def test_two_callers_never_have_a_turn_at_the_same_time():
    tower, encoding = Tower(), BackgroundEncoding(Turns())
    await asyncio.gather(encoding.encode("tower", tower, ITEMS), encoding.encode("tower", tower, ITEMS))
    for (_, ended, _), (began, *_) in zip(tower.turns, tower.turns[1:], strict=False):
        assert ended <= began


async def test_a_queue_knows_when_a_request_last_had_a_place():
    queue = TurnQueue("towers", batch_size=1, metrics=TowerMetrics(Metrics(), "fake", "texts"), max_queued=None)
    with queue.admit(1, is_request=False):
        assert queue.last_request_at == 0.0
    assert queue.last_request_at == 0.0
    with queue.admit(1):
        before = time.perf_counter()
        assert queue.last_request_at >= before
    after = time.perf_counter()
    assert before <= queue.last_request_at <= after
