import asyncio
from datetime import UTC, datetime

import pytest

from app.label_sets.prewarm import Prewarmer
from app.types import ClassEntry, LabelSet

pytestmark = pytest.mark.anyio


def version_of(name, version):
    return LabelSet(name, version, (ClassEntry("cat"),), "photo", datetime(2026, 1, 1, tzinfo=UTC))


class Recording:
    """Prewarms while the gate is open, and records what began and what was completed."""

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


async def test_label_sets_are_prewarmed_in_order(warm):
    warmer = Prewarmer(warm)
    for name in "abc":
        warmer.add(version_of(name, 1))
    await warmer.idle()
    assert warm.begun == warm.done == ["a@1", "b@1", "c@1"]


async def test_only_the_newest_of_the_waiting_versions_is_prewarmed(warm):
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


async def test_a_newer_version_cancels_a_running_one(warm):
    warmer = Prewarmer(warm)
    warm.gate.clear()
    warmer.add(version_of("a", 1))
    await warm.entered.wait()
    warmer.add(version_of("a", 2))
    warm.gate.set()
    await warmer.idle()
    assert (warm.begun, warm.done) == (["a@1", "a@2"], ["a@2"])


@pytest.mark.parametrize("begun", [False, True])
async def test_an_older_version_that_arrives_late_does_not_replace_a_newer_one(warm, begun):
    """A list of label sets may contain a version that is replaced immediately afterwards."""
    warmer = Prewarmer(warm)
    warm.gate.clear()
    warmer.add(version_of("a", 2))
    if begun:
        await warm.entered.wait()
    warmer.add(version_of("a", 1))
    warm.gate.set()
    await warmer.idle()
    assert warm.done == ["a@2"]


async def test_label_sets_that_arrive_after_a_pause_are_prewarmed(warm):
    warmer = Prewarmer(warm)
    await warmer.idle()
    for name in "ab":
        warmer.add(version_of(name, 1))
        await warmer.idle()
    assert warm.done == ["a@1", "b@1"]


async def test_closing_cancels_the_running_label_set_and_drops_the_others(warm):
    warmer = Prewarmer(warm)
    warm.gate.clear()
    for name in "ab":
        warmer.add(version_of(name, 1))
    await warm.entered.wait()
    await warmer.close()
    assert (warm.begun, warm.done) == (["a@1"], [])
    await Prewarmer(warm).close()
