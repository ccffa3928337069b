"""Parts of a caption database that are searched at once, some of which may not answer."""

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
    cosines = np.array([float(each.split()[1]) for each in captions], np.float32)
    return NearestCaptions(tuple(captions), cosines, np.ones((len(captions), 4), np.float32), "g")


class There:
    """Gives its outcomes, one a call, the last one for ever; an event is waited for."""

    def __init__(self, *outcomes):
        self.outcomes = list(outcomes)
        self.asked = 0
        self.parts = []
        self.search = self

    async def __call__(self, part, *_):
        self.parts.append(part)
        self.asked += 1
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        if isinstance(outcome, asyncio.Event):
            await outcome.wait()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    async def ask(method, *arguments):
        return await method(*arguments)

    monkeypatch.setattr(shards, "ask", ask)


async def search(*parts, within_s=5.0):
    return await RemoteShards(parts)("archive", "g", QUERIES, 3, features=True, within_s=within_s)


ONE = [found("a 0.9", "b 0.5", "c 0.1"), found("d 0.3")]
TWO = [found("e 0.7", "f 0.6", "g 0.2"), found("h 0.8", "i 0.1")]


async def test_the_nearest_of_all_parts_come_first():
    first, second = await search(There(ONE), There(TWO))
    assert first.captions == ("a 0.9", "e 0.7", "f 0.6")
    assert second.captions == ("h 0.8", "d 0.3", "i 0.1")
    assert first.features.shape == (3, 4)
    assert (first.missing, first.generation) == (None, "g")


async def test_a_part_that_went_away_is_asked_again():
    away = There(ReplicaUnavailableError("died"), TWO)
    first, _ = await search(There(ONE), away)
    assert first.captions == ("a 0.9", "e 0.7", "f 0.6")
    assert (first.missing, away.asked) == (None, 2)


@pytest.mark.parametrize(
    "gone", [ReplicaUnavailableError("died"), SerializedError.from_exception(NotReadyError("it hangs"))]
)
async def test_what_is_missing_is_told(gone):
    first, second = await search(There(ONE), There(gone))
    assert first.captions == ("a 0.9", "b 0.5", "c 0.1")
    assert first.missing == second.missing
    assert "1 of 2 parts of the caption database 'archive' could not be searched" in first.missing


async def test_a_part_that_does_not_answer_is_not_waited_for_for_long(monkeypatch):
    monkeypatch.setattr(shards, "_STRAGGLERS_S", 0.05)
    never = asyncio.Event()
    first, _ = await search(There(ONE), There(never))
    assert "1 of 2 parts" in first.missing


@pytest.mark.parametrize(
    "gone", [ReplicaUnavailableError("died"), SerializedError.from_exception(StoreError("damaged"))]
)
async def test_the_first_that_has_found_something_is_waited_for_though_others_fail_at_once(monkeypatch, gone):
    monkeypatch.setattr(shards, "_STRAGGLERS_S", 0.05)
    slow = asyncio.Event()
    asyncio.get_running_loop().call_later(0.3, slow.set)

    class Slow(There):
        async def __call__(self, *arguments):
            await slow.wait()
            return ONE

    first, _ = await search(There(gone), Slow(ONE))
    assert first.captions == ("a 0.9", "b 0.5", "c 0.1")
    assert "1 of 2 parts" in first.missing


async def test_each_is_asked_for_its_part_of_as_many_as_this_edge_knows():
    there = [There(ONE), There(TWO), There(TWO)]
    await search(*there)
    assert [each.parts for each in there] == [[Part(number, 3)] for number in range(3)]


async def test_where_no_part_answers_that_is_an_error():
    with pytest.raises(NotReadyError, match="not one part of the caption database 'archive'"):
        await search(There(ReplicaUnavailableError("died")), There(ReplicaUnavailableError("died")))
    with pytest.raises(NotReadyError):
        await search(There(asyncio.Event()), within_s=0.05)


async def test_a_part_that_is_full_refuses_for_all():
    with pytest.raises(OverloadedError) as told:
        await search(There(ONE), There(SerializedError.from_exception(OverloadedError("full", 4))))
    assert told.value.retry_after_s == 4


async def test_a_part_whose_files_are_damaged_is_missing_and_the_others_answer():
    first, _ = await search(There(ONE), There(SerializedError.from_exception(StoreError("damaged"))))
    assert "1 of 2 parts" in first.missing
