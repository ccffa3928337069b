"""Caption shards that are searched concurrently, some of which may fail."""

import asyncio

import numpy as np
import pytest

from app.captions.database import NearestCaptions
from app.captions.index import Part
from app.cluster import shards
from app.cluster.messages import ReplicaUnavailableError, SerializedError
from app.cluster.shards import RemoteShards
from app.errors import NotReadyError, OverloadedError, StoreError

pytestmark = pytest.mark.anyio
QUERIES = np.eye(2, 4, dtype=np.float32)


def found(*captions):
    cosines = np.array([float(caption.split()[1]) for caption in captions], np.float32)
    return NearestCaptions(tuple(captions), cosines, np.ones((len(captions), 4), np.float32), "g")


class Shard:
    """Returns or raises its outcomes in order, and then repeats the last one; it waits for outcomes that are events."""

    def __init__(self, *outcomes):
        self.outcomes = list(outcomes)
        self.calls = 0
        self.parts = []
        self.search = self

    async def __call__(self, part, *_):
        self.parts.append(part)
        self.calls += 1
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        if isinstance(outcome, asyncio.Event):
            await outcome.wait()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    async def call(method, *arguments):
        return await method(*arguments)

    monkeypatch.setattr(shards, "call", call)


async def search(*parts, within_s=5.0):
    return await RemoteShards(parts)("archive", "g", QUERIES, 3, features=True, within_s=within_s)


ONE = [found("a 0.9", "b 0.5", "c 0.1"), found("d 0.3")]
TWO = [found("e 0.7", "f 0.6", "g 0.2"), found("h 0.8", "i 0.1")]


async def test_the_nearest_captions_of_all_shards_come_first():
    first, second = await search(Shard(ONE), Shard(TWO))
    assert first.captions == ("a 0.9", "e 0.7", "f 0.6")
    assert second.captions == ("h 0.8", "d 0.3", "i 0.1")
    assert first.features.shape == (3, 4)
    assert (first.missing, first.generation) == (None, "g")


async def test_a_call_to_a_shard_that_disappeared_is_repeated():
    away = Shard(ReplicaUnavailableError("died"), TWO)
    first, _ = await search(Shard(ONE), away)
    assert first.captions == ("a 0.9", "e 0.7", "f 0.6")
    assert (first.missing, away.calls) == (None, 2)


@pytest.mark.parametrize(
    "gone", [ReplicaUnavailableError("died"), SerializedError.from_exception(NotReadyError("it hangs"))]
)
async def test_a_missing_shard_is_reported(gone):
    first, second = await search(Shard(ONE), Shard(gone))
    assert first.captions == ("a 0.9", "b 0.5", "c 0.1")
    assert first.missing == second.missing
    assert "1 of 2 shards of the caption database 'archive' could not be searched" in first.missing


async def test_a_search_does_not_wait_long_for_a_shard_that_does_not_respond(monkeypatch):
    monkeypatch.setattr(shards, "_STRAGGLERS_S", 0.05)
    never = asyncio.Event()
    first, _ = await search(Shard(ONE), Shard(never))
    assert "1 of 2 shards" in first.missing


@pytest.mark.parametrize(
    "gone", [ReplicaUnavailableError("died"), SerializedError.from_exception(StoreError("damaged"))]
)
async def test_a_search_waits_for_the_first_result_if_other_shards_fail_at_once(monkeypatch, gone):
    monkeypatch.setattr(shards, "_STRAGGLERS_S", 0.05)
    slow = asyncio.Event()
    asyncio.get_running_loop().call_later(0.3, slow.set)

    class Slow(Shard):
        async def __call__(self, *arguments):
            await slow.wait()
            return ONE

    first, _ = await search(Shard(gone), Slow(ONE))
    assert first.captions == ("a 0.9", "b 0.5", "c 0.1")
    assert "1 of 2 shards" in first.missing


async def test_each_shard_searches_its_part_of_the_number_of_shards():
    handles = [Shard(ONE), Shard(TWO), Shard(TWO)]
    await search(*handles)
    assert [handle.parts for handle in handles] == [[Part(number, 3)] for number in range(3)]


async def test_a_search_fails_if_no_shard_responds():
    with pytest.raises(NotReadyError, match="no shard of the caption database 'archive'"):
        await search(Shard(ReplicaUnavailableError("died")), Shard(ReplicaUnavailableError("died")))
    with pytest.raises(NotReadyError):
        await search(Shard(asyncio.Event()), within_s=0.05)


async def test_an_overloaded_shard_rejects_the_search():
    with pytest.raises(OverloadedError) as caught:
        await search(Shard(ONE), Shard(SerializedError.from_exception(OverloadedError("full", 4))))
    assert caught.value.retry_after_s == 4


async def test_a_shard_with_damaged_files_is_reported_as_missing():
    first, _ = await search(Shard(ONE), Shard(SerializedError.from_exception(StoreError("damaged"))))
    assert "1 of 2 shards" in first.missing
