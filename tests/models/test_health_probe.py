"""The health probe encodes an input on idle towers and reports failures."""

import asyncio
from contextlib import asynccontextmanager, suppress

import numpy as np
import pytest

from app.models.health_probe import HealthProbe
from app.models.queue import EncodeQueue
from app.observability.metrics import Metrics, TowerMetrics

pytestmark = pytest.mark.anyio

EVERY_S = 0.05


class Tower:
    """Records the items that it encodes, and calls ``behaviour`` for each batch."""

    def __init__(self):
        self.encoded = []
        self.behaviour = lambda items: np.ones((len(items), 2))

    def begin(self, items, _few):
        self.encoded.extend(items)
        return lambda: self.behaviour(items)


@pytest.fixture
def tower():
    return Tower()


@asynccontextmanager
async def watched(tower, every_s=EVERY_S, **more):
    queue = EncodeQueue("queue", tower.begin, batch_size=4, metrics=TowerMetrics(Metrics(""), "fake", "images"), **more)
    probe = HealthProbe(queue, lambda: "probe")
    watching = asyncio.create_task(probe.watch(every_s, lambda: None))
    try:
        yield queue, probe
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
        await asyncio.to_thread(queue.close)


async def until(is_so):
    async with asyncio.timeout(20):
        while not is_so():  # noqa: ASYNC110 - a thread, which does not set events of the loop
            await asyncio.sleep(0.005)


def fail(_):
    raise RuntimeError("the device is lost")


async def test_an_idle_tower_is_probed_periodically(tower):
    async with watched(tower) as (_, probe):
        await until(lambda: tower.encoded == ["probe"] * 3)
        assert probe.problem is None


async def test_a_busy_tower_is_not_probed(tower):
    async with watched(tower, every_s=1) as (queue, _):
        for _ in range(40):
            await queue.run(["picture"])
            await asyncio.sleep(EVERY_S)
        assert "probe" not in tower.encoded


async def test_a_failing_tower_is_reported_until_it_works_again(tower):
    async with watched(tower) as (_, probe):
        tower.behaviour = fail
        await until(lambda: probe.problem is not None)
        assert probe.problem == "queue: the health probe could not be encoded (the device is lost)"
        tower.behaviour = lambda items: np.ones((len(items), 2))
        await until(lambda: probe.problem is None)


async def test_a_successful_request_ends_the_report(tower):
    async with watched(tower) as (queue, probe):
        tower.behaviour = lambda items: fail(items) if "probe" in items else np.ones((len(items), 2))
        await until(lambda: probe.problem is not None)
        with suppress(RuntimeError):  # in the same batch as a probe
            await queue.run(["picture"])
        assert queue.last_encoded_at > 0


async def test_a_full_queue_is_not_a_failure(tower):
    async with watched(tower, max_queued=1) as (queue, probe):
        with queue.admit(1):
            await asyncio.sleep(5 * EVERY_S)
            assert tower.encoded == []
            assert probe.problem is None
        await until(lambda: tower.encoded)
