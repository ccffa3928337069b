"""Background work takes turns with requests."""

import asyncio
import time

import numpy as np
import pytest

from app.models import background
from app.models.background import BackgroundTurns
from app.models.queue import TurnQueue
from app.observability.metrics import Metrics, TowerMetrics

pytestmark = pytest.mark.anyio

TEXTS = [str(number) for number in range(60)]


class Tower:
    """Encodes a text as its number; ``turns`` has the start, the end and the texts of each call."""

    def __init__(self, s_per_text=0.001):
        self.turns = []
        self.s_per_text = s_per_text

    async def __call__(self, texts):
        began = time.perf_counter()
        await asyncio.sleep(self.s_per_text * len(texts))
        self.turns.append((began, time.perf_counter(), list(texts)))
        return np.array([[float(text)] for text in texts], np.float32)

    @property
    def seconds(self):
        return [ended - began for began, ended, _ in self.turns]


async def test_rows_are_in_the_order_of_the_texts_and_turns_are_long_while_nobody_asks():
    tower = Tower(0.0)
    rows = await BackgroundTurns(lambda: 0.0).encode(tower, TEXTS)
    np.testing.assert_array_equal(rows[:, 0], np.arange(60))
    assert len(tower.turns) == 1


async def test_requests_without_a_pause_leave_a_small_share_of_the_time(monkeypatch):
    monkeypatch.setattr(background, "_SHARE", 0.2)
    tower = Tower()
    began = time.perf_counter()
    await BackgroundTurns(time.perf_counter).encode(tower, TEXTS[:30])
    took_s = time.perf_counter() - began
    assert sum(len(texts) for *_, texts in tower.turns) == 30
    assert len(tower.turns) >= 2
    assert sum(tower.seconds[:-1]) <= 0.25 * took_s


async def test_a_turn_begins_after_a_pause_of_the_requests(monkeypatch):
    monkeypatch.setattr(background, "_SHARE", 1e-6)
    last = [time.perf_counter()]
    turns = BackgroundTurns(lambda: last[0])
    tower = Tower()
    await turns.encode(tower, TEXTS[:1])
    last[0] = time.perf_counter()
    await asyncio.wait_for(turns.encode(tower, TEXTS[1:2]), 5)
    assert tower.turns[-1][0] - last[0] >= background._QUIET_S


async def test_while_requests_arrive_a_turn_is_short(monkeypatch):
    monkeypatch.setattr(background, "_QUIET_S", 0.0)
    tower = Tower(0.004)
    last = time.perf_counter()
    await BackgroundTurns(lambda: last).encode(tower, TEXTS[:30])
    assert max(len(texts) for *_, texts in tower.turns[1:]) <= background._TURN_S / 0.004


async def test_two_callers_never_have_a_turn_at_the_same_time():
    tower = Tower()
    turns = BackgroundTurns(lambda: 0.0)
    await asyncio.gather(turns.encode(tower, TEXTS), turns.encode(tower, TEXTS))
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
