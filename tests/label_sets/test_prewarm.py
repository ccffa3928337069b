import asyncio
from datetime import UTC, datetime

import pytest

from app.label_sets.prewarm import Prewarmer
from app.types import ClassEntry, LabelSet

pytestmark = pytest.mark.anyio


def version_of(name, version):
    return LabelSet(name, version, (ClassEntry("cat"),), "photo", datetime(2026, 1, 1, tzinfo=UTC))


class Recording:
    """Warms when the gate is open, and records what was begun and done."""

    def __init__(self):
        self.begun, self.done = [], []
        self.entered, self.gate = asyncio.Event(), asyncio.Event()
        self.gate.set()

    async def __call__(self, label_set):
        self.begun.append(label_set.reference)
        self.entered.set()
        await self.gate.wait()
        self.done.append(label_set.reference)


@pytest.fixture
async def warm(anyio_backend):
    return Recording()


async def test_label_sets_are_warmed_in_the_order_they_came(warm):
    warmer = Prewarmer(warm)
    for name in "abc":
        warmer.add(version_of(name, 1))
    await warmer.idle()
    assert warm.begun == warm.done == ["a@1", "b@1", "c@1"]


async def test_of_the_versions_that_wait_only_the_newest_is_warmed(warm):
    warmer = Prewarmer(warm)
    warm.gate.clear()
    warmer.add(version_of("busy", 1))
    await warm.entered.wait()
    for version in (1, 2, 3):
        warmer.add(version_of("a", version))
        warmer.add(version_of("b", version))
    warm.gate.set()
    await warmer.idle()
    assert warm.begun == ["busy@1", "a@3", "b@3"]


async def test_a_newer_version_ends_the_one_that_has_begun(warm):
    warmer = Prewarmer(warm)
    warm.gate.clear()
    warmer.add(version_of("a", 1))
    await warm.entered.wait()
    warmer.add(version_of("a", 2))
    warm.gate.set()
    await warmer.idle()
    assert (warm.begun, warm.done) == (["a@1", "a@2"], ["a@2"])


@pytest.mark.parametrize("begun", [False, True])
async def test_an_older_version_that_comes_late_does_not_take_a_newer_ones_place(warm, begun):
    """Whoever lists the label sets may read one just before it is written again."""
    warmer = Prewarmer(warm)
    warm.gate.clear()
    warmer.add(version_of("a", 2))
    if begun:
        await warm.entered.wait()
    warmer.add(version_of("a", 1))
    warm.gate.set()
    await warmer.idle()
    assert warm.done == ["a@2"]


async def test_what_comes_after_a_pause_is_warmed_too(warm):
    warmer = Prewarmer(warm)
    await warmer.idle()
    for name in "ab":
        warmer.add(version_of(name, 1))
        await warmer.idle()
    assert warm.done == ["a@1", "b@1"]


async def test_closing_stops_what_has_begun_and_drops_the_rest(warm):
    warmer = Prewarmer(warm)
    warm.gate.clear()
    for name in "ab":
        warmer.add(version_of(name, 1))
    await warm.entered.wait()
    await warmer.close()
    assert (warm.begun, warm.done) == (["a@1"], [])
    await Prewarmer(warm).close()
