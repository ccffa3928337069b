"""Methods are fitted once, in the background, and fits are discarded when their examples are deleted."""

import asyncio
import os
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import threadpool_info

from app.adapters._base import Examples
from app.adapters._examples import ExampleAdapter, Need
from app.adapters.gda import GDA
from app.adapters.gda_em import GDAEM
from app.adapters.stat_a import StatA
from app.adapters.tfup import TFUP
from app.adapters.tip_adapter import TipAdapter
from app.adapters.trans_clip import TransCLIP
from app.adapters.zlap import ZLaP
from app.errors import NotReadyError, StoreError, TooLargeError
from app.fewshot import fitting
from app.fewshot.fitting import (
    FitCache,
    FitKey,
    FittedAdapter,
    predict_held_out,
    transduce,
)
from app.fewshot.neighbours import NeighbourIndex
from app.runtime import cpu
from app.runtime.turns import Turns, give_way, in_background
from app.scoring.numerics import stratified_folds
from tests.shades import rows_about, unit_rows

ENCODER = SimpleNamespace(logit_scale=20.0, logit_bias=None)
TEXT = np.eye(3, 16, dtype=np.float32)


def key_of(label_set="pets", method="gda"):
    return FitKey("tower", method, (), ("{}",), label_set, f"{label_set}@1")


def fitted(revision, nbytes=8):
    return FittedAdapter(GDA(), None, nbytes, revision)


class Fit:
    """A fit that ends when it is released, and counts its starts."""

    def __init__(self, revision=1, nbytes=8, *, is_open=False):
        self.revision, self.nbytes = revision, nbytes
        self.begun, self.may_end = asyncio.Event(), asyncio.Event()
        self.times = 0
        if is_open:
            self.may_end.set()

    async def __call__(self):
        self.times += 1
        self.begun.set()
        await self.may_end.wait()
        return fitted(self.revision, self.nbytes)


async def turns():
    """Let every task run that can."""
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.fixture
async def cache(anyio_backend):
    made = FitCache(cache_bytes=1000)
    yield made
    await made.close()


# --- the cache ---------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_concurrent_requests_share_one_fit_and_later_ones_use_the_cache(cache):
    fit = Fit()
    callers = [asyncio.create_task(cache.get(key_of(), 1, fit)) for _ in range(5)]
    await fit.begun.wait()
    fit.may_end.set()
    result = await asyncio.gather(*callers)
    assert all(item is result[0] for item in result)
    assert await cache.get(key_of(), 1, fit) is result[0]
    assert fit.times == 1


@pytest.mark.anyio
async def test_an_outdated_fit_is_used_until_the_new_one_is_ready(cache):
    old = await cache.get(key_of(), 1, Fit(1, is_open=True))
    newer = Fit(2)
    assert await cache.get(key_of(), 2, newer) is old
    await newer.begun.wait()
    assert await cache.get(key_of(), 2, newer) is old
    newer.may_end.set()
    await cache.idle()
    assert (await cache.get(key_of(), 2, newer)).revision == 2
    assert newer.times == 1


@pytest.mark.anyio
async def test_a_fit_on_newer_examples_than_requested_is_used_for_these(cache):
    first, second = Fit(2), Fit(2)
    callers = [asyncio.create_task(cache.get(key_of(), 1, first))]
    await first.begun.wait()
    callers.append(asyncio.create_task(cache.get(key_of(), 2, second)))
    await turns()
    first.may_end.set()
    one, other = await asyncio.gather(*callers)
    assert one is other
    assert second.times == 0


@pytest.mark.anyio
async def test_fits_with_different_keys_are_separate(cache):
    kinds = [
        key_of(),
        key_of(method="tip-adapter"),
        key_of("birds"),
        FitKey("other tower", "gda", (), ("{}",), "pets", "pets@1"),
        FitKey("tower", "gda", (("alpha", 1.0),), ("{}",), "pets", "pets@1"),
        FitKey("tower", "gda", (), ("a {}",), "pets", "pets@1"),
        FitKey("tower", "gda", (), ("{}",), "pets", "pets@2"),
    ]
    fit = Fit(is_open=True)
    for kind in kinds:
        await cache.get(kind, 1, fit)
    assert fit.times == len(kinds)


@pytest.mark.anyio
async def test_a_fit_continues_for_the_next_request_after_its_own_was_cancelled(cache):
    fit = Fit()
    caller = asyncio.create_task(cache.get(key_of(), 1, fit))
    await fit.begun.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    fit.may_end.set()
    assert (await cache.get(key_of(), 1, fit)).revision == 1
    assert fit.times == 1


@pytest.mark.anyio
async def test_fits_of_one_label_set_are_sequential_and_do_not_block_others(cache):
    first, second, other = Fit(), Fit(), Fit(is_open=True)
    callers = [asyncio.create_task(cache.get(key_of(), 1, first))]
    await first.begun.wait()
    callers.append(asyncio.create_task(cache.get(key_of(method="tip-adapter"), 1, second)))
    await cache.get(key_of("birds"), 1, other)
    await turns()
    assert not second.begun.is_set()
    first.may_end.set()
    await second.begun.wait()
    second.may_end.set()
    await asyncio.gather(*callers)


@pytest.mark.anyio
async def test_at_most_two_fits_run_at_a_time(cache):
    gate, entered, lock = threading.Event(), threading.Semaphore(0), threading.Lock()
    running = most = 0

    def work():
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        entered.release()
        assert gate.wait(10)
        with lock:
            running -= 1

    async def fit():
        await cache.run(work)
        return fitted(1)

    callers = [asyncio.create_task(cache.get(key_of(f"set {number}"), 1, fit)) for number in range(6)]
    for _ in range(2):
        assert await asyncio.to_thread(entered.acquire, timeout=10)
    await turns()
    gate.set()
    await asyncio.gather(*callers)
    assert most == 2


@pytest.mark.anyio
async def test_a_fit_uses_one_core_at_low_priority(cache, monkeypatch):
    monkeypatch.setattr(cpu, "_NICENESS", 10)  # 0 in all other tests

    def work():
        np.ones((8, 8)) @ np.ones((8, 8))
        several = [item for item in threadpool_info() if item["user_api"] == "blas" and item["num_threads"] != 1]
        return several, os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    several, priority = await cache.run(work)
    assert not several
    assert priority > os.getpriority(os.PRIO_PROCESS, 0)


class NoTurns(Turns):
    """Requests never pause, and no turn may begin until ``allowed`` is set."""

    def __init__(self):
        super().__init__()
        self.allowed, self.asked = threading.Event(), threading.Event()

    def begin(self, work):
        self.asked.set()
        return (0.0, True) if self.allowed.is_set() else (0.001, False)


@pytest.fixture
async def busy_cache(anyio_backend):
    turns = NoTurns()
    made = FitCache(cache_bytes=1000, turns=turns)
    yield made, turns
    await made.close()


@pytest.mark.anyio
async def test_work_of_a_job_waits_for_its_turn_and_that_of_requests_does_not(busy_cache):
    cache, turns = busy_cache
    with in_background(turns):
        jobs = [asyncio.create_task(cache.run(lambda: "job")) for _ in range(4)]
    await asyncio.to_thread(turns.asked.wait, 10)
    assert await asyncio.wait_for(cache.run(lambda: "request"), 10) == "request"
    assert not any(job.done() for job in jobs)
    turns.allowed.set()
    assert await asyncio.gather(*jobs) == ["job"] * 4


@pytest.mark.anyio
async def test_a_fit_takes_turns_until_a_request_waits_for_it(busy_cache):
    cache, turns = busy_cache

    def fit(revision):
        return lambda: cache.run(lambda: fitted(revision))

    old = await cache.get(key_of(), 1, fit(1))  # a request waits for it
    assert await cache.get(key_of(), 2, fit(2)) is old
    await asyncio.to_thread(turns.asked.wait, 10)
    assert await cache.get(key_of(), 2, fit(2)) is old
    assert (await asyncio.wait_for(cache.get(key_of(), 2, fit(2), min_revision=2), 10)).revision == 2


@pytest.mark.anyio
async def test_a_fit_that_a_job_waits_for_takes_turns(busy_cache):
    cache, turns = busy_cache
    with in_background(turns):
        job = asyncio.create_task(cache.get(key_of(), 1, lambda: cache.run(lambda: fitted(1))))
    await asyncio.to_thread(turns.asked.wait, 10)
    assert not job.done()
    turns.allowed.set()
    assert (await job).revision == 1


@pytest.mark.anyio
async def test_a_failed_fit_is_logged_reaches_every_request_and_is_tried_again(cache):
    begun, may_end = asyncio.Event(), asyncio.Event()

    async def broken():
        begun.set()
        await may_end.wait()
        raise StoreError("the database is away")

    with structlog.testing.capture_logs() as logs:
        callers = [asyncio.create_task(cache.get(key_of(), 1, broken)) for _ in range(3)]
        await begun.wait()
        may_end.set()
        result = await asyncio.gather(*callers, return_exceptions=True)
    assert [str(item) for item in result] == ["the database is away"] * 3
    assert all(isinstance(item, StoreError) for item in result)
    assert [(log["event"], log["label_set"], log["method"], log["reason"]) for log in logs] == [
        ("adapter_not_fitted", "pets@1", "gda", "the database is away")
    ]
    assert (await cache.get(key_of(), 1, Fit(is_open=True))).revision == 1


@pytest.mark.anyio
async def test_if_a_new_fit_fails_the_old_one_is_used_and_the_fit_tried_again(cache):
    old = await cache.get(key_of(), 1, Fit(1, is_open=True))
    tries = 0

    async def broken():
        nonlocal tries
        tries += 1
        raise ZeroDivisionError

    with structlog.testing.capture_logs() as logs:
        for _ in range(2):
            assert await cache.get(key_of(), 2, broken) is old
            await cache.idle()
    assert tries == 2
    assert [log["reason"] for log in logs] == ["ZeroDivisionError"] * 2


@pytest.mark.anyio
async def test_a_fit_that_exceeds_the_memory_is_rejected_with_advice(cache):
    with pytest.raises(
        TooLargeError, match=r"the fitted adapter of 'gda' takes .* delete unlabelled images, or raise DEIXIS_CACHE"
    ):
        await cache.get(key_of(), 1, Fit(nbytes=1001, is_open=True))
    assert (await cache.get(key_of(), 1, Fit(nbytes=1000, is_open=True))).nbytes == 1000


@pytest.mark.anyio
async def test_the_least_recently_used_fit_is_evicted(cache):
    fits = {name: Fit(nbytes=400, is_open=True) for name in "abc"}
    for name in "abac":
        await cache.get(key_of(name), 1, fits[name])
    for name in "acb":
        await cache.get(key_of(name), 1, fits[name])
    assert {name: fit.times for name, fit in fits.items()} == {"a": 1, "b": 2, "c": 1}


@pytest.mark.anyio
async def test_discarded_fits_are_fitted_again_and_other_label_sets_keep_theirs(cache):
    fit, other = Fit(is_open=True), Fit(is_open=True)
    await cache.get(key_of(), 1, fit)
    await cache.get(key_of(method="tip-adapter"), 1, fit)
    await cache.get(key_of("birds"), 1, other)
    cache.forget("pets")
    await cache.get(key_of(), 1, fit)
    await cache.get(key_of(method="tip-adapter"), 1, fit)
    await cache.get(key_of("birds"), 1, other)
    assert (fit.times, other.times) == (4, 1)


@pytest.mark.anyio
async def test_requests_waiting_for_a_discarded_fit_get_one_without_those_examples(cache):
    """They do not get a cancellation, which would look like their own."""
    deleted, left = Fit(1), Fit(2, is_open=True)
    fits = iter([deleted, left])

    async def newest():
        return await next(fits)()

    callers = [asyncio.create_task(cache.get(key_of(), 1, newest)) for _ in range(3)]
    await deleted.begun.wait()
    cache.forget("pets")
    assert [item.revision for item in await asyncio.gather(*callers)] == [2, 2, 2]
    assert left.times == 1


@pytest.mark.anyio
async def test_a_cancelled_request_that_waits_for_a_discarded_fit_ends(cache):
    fit = Fit()
    caller = asyncio.create_task(cache.get(key_of(), 1, fit))
    await fit.begun.wait()
    cache.forget("pets")
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    await cache.idle()
    assert fit.times == 1


@pytest.mark.anyio
async def test_a_fit_in_a_thread_on_examples_deleted_meanwhile_is_not_cached(cache):
    gate, entered = threading.Event(), threading.Event()
    revisions = iter([1, 2])

    async def fit():
        revision = next(revisions)

        def work():
            entered.set()
            assert gate.wait(10)

        if revision == 1:
            await cache.run(work)
        return fitted(revision)

    caller = asyncio.create_task(cache.get(key_of(), 1, fit))
    assert await asyncio.to_thread(entered.wait, 10)
    cache.forget("pets")
    assert (await caller).revision == 2
    gate.set()
    await cache.run(lambda: None)
    assert (await cache.get(key_of(), 1, fit)).revision == 2


@pytest.mark.anyio
async def test_background_fits_are_discarded_too_and_requests_then_wait(cache):
    await cache.get(key_of(), 1, Fit(1, is_open=True))
    newer, newest = Fit(2), Fit(3)
    await cache.get(key_of(), 2, newer)
    await newer.begun.wait()
    cache.forget("pets")
    caller = asyncio.create_task(cache.get(key_of(), 3, newest))
    await newest.begun.wait()
    assert not caller.done()
    newest.may_end.set()
    assert (await caller).revision == 3


@pytest.mark.anyio
async def test_closing_rejects_waiting_requests_and_waits_for_the_running_fit(cache):
    gate, entered = threading.Event(), threading.Event()

    async def fit():
        def work():
            entered.set()
            assert gate.wait(10)

        await cache.run(work)
        return fitted(1)

    callers = [asyncio.create_task(cache.get(key_of(), 1, fit)) for _ in range(2)]
    queued = asyncio.create_task(cache.get(key_of(method="tip-adapter"), 1, fit))
    assert await asyncio.to_thread(entered.wait, 10)
    closing = asyncio.create_task(cache.close())
    result = await asyncio.gather(*callers, queued, return_exceptions=True)
    assert [type(item) for item in result] == [NotReadyError] * 3
    assert not closing.done()
    gate.set()
    await closing


@pytest.mark.anyio
async def test_closing_ends_the_work_of_jobs_and_of_fits_where_it_gives_way():
    cache, turns = FitCache(cache_bytes=1000, turns=Turns()), Turns()
    entered, ended_by = threading.Semaphore(0), []

    def work():
        entered.release()
        try:
            while True:
                time.sleep(0.001)
                give_way()
        except BaseException as error:
            ended_by.append(type(error))
            raise

    with in_background(turns):
        job = asyncio.create_task(cache.run(work))
    fit = asyncio.create_task(cache.get(key_of(), 1, lambda: cache.run(work)))
    for _ in range(2):
        assert await asyncio.to_thread(entered.acquire, timeout=10)
    await asyncio.wait_for(cache.close(), 10)
    assert ended_by == [asyncio.CancelledError] * 2
    assert [type(each) for each in await asyncio.gather(job, fit, return_exceptions=True)] == [
        asyncio.CancelledError,
        NotReadyError,
    ]


@pytest.mark.anyio
async def test_a_closed_cache_rejects_requests(cache):
    async def fit():
        await cache.run(lambda: None)
        return fitted(1)

    await cache.close()
    with pytest.raises(NotReadyError):
        await cache.get(key_of(), 1, fit)


# --- fitting -------------------------------------------------------------------------------------------------------


def examples_of(*, labelled=8, pool=12):
    labels = np.tile(np.arange(3), labelled)
    return Examples(rows_about(labels, 1), labels, rows_about(np.tile(np.arange(3), pool), 2))


QUERIES = rows_about(np.arange(9) % 3, 3, spread=1.0)


@pytest.mark.parametrize("make", [GDA, TipAdapter, GDAEM, TFUP, ZLaP, TransCLIP, StatA])
def test_a_fit_reports_its_number_of_images(make):
    result = fitting.fit(make(), TEXT, examples_of(), ENCODER)
    needs = make.needs
    assert (result.labelled, result.unlabelled) == (24 if Need.SUPPORT in needs else 0, 36 if Need.POOL in needs else 0)


@pytest.mark.parametrize("make", [ZLaP, TransCLIP, StatA])
def test_a_shared_index_gives_the_results_of_a_separate_one(make):
    examples = examples_of()
    shared = fitting.fit(make(), TEXT, examples, ENCODER, NeighbourIndex(examples.pool_features))
    own = fitting.fit(make(), TEXT, examples, ENCODER)
    np.testing.assert_array_equal(fitting.predict(shared, QUERIES).logits, fitting.predict(own, QUERIES).logits)


def test_an_index_is_kept_only_for_methods_with_neighbours_and_counts_as_memory():
    examples = examples_of()
    index = NeighbourIndex(examples.pool_features)
    assert fitting.fit(GDA(), TEXT, examples, ENCODER, index).index is None
    assert fitting.fit(ZLaP(), TEXT, examples, ENCODER, index).nbytes > index.nbytes
    votes = fitting.fit(TipAdapter(), TEXT, examples, ENCODER)
    assert votes.nbytes >= examples.support_features.nbytes


def test_without_a_pool_an_adapter_that_needs_one_gives_zero_shot_with_a_warning():
    result = fitting.predict(fitting.fit(ZLaP(), TEXT, examples_of(pool=0), ENCODER), QUERIES)
    np.testing.assert_allclose(result.logits, ENCODER.logit_scale * QUERIES @ TEXT.T, rtol=1e-6)
    assert result.warnings


@pytest.mark.parametrize("make", [GDAEM, TFUP, ZLaP, TransCLIP, StatA])
def test_images_of_one_request_are_the_pool(make):
    pool_features = examples_of().pool_features
    result = transduce(make(), TEXT, pool_features, ENCODER)
    np.testing.assert_array_equal(
        result.logits,
        fitting.fit(make(), TEXT, Examples(pool_features=pool_features), ENCODER)
        .adapter.pool_scores(pool_features)
        .logits,
    )
    assert (result.logits.argmax(axis=1) == np.tile(np.arange(3), 12)).mean() > 0.9


# --- cross-validation ----------------------------------------------------------------------------------------------


class Remembers(ExampleAdapter):
    """Is certain about images that it has seen, and predicts zero-shot for others."""

    needs = frozenset({Need.SUPPORT})

    def _learn(self, examples):
        self.rows_, self.labels_ = examples.support_features, examples.support_labels
        self.warnings_ = ("it remembers",)

    def _logits(self, image_features, zero_shot, neighbours):
        seen = (image_features @ self.rows_.T) > 1 - 1e-6
        return zero_shot + 1000 * seen.astype(np.float32) @ np.eye(zero_shot.shape[1])[self.labels_]


@given(st.integers(0, 2**32 - 1), st.integers(2, 40))
def test_an_image_is_not_predicted_by_a_fit_on_itself(seed, images):
    rng = np.random.default_rng(seed)
    rows, labels = unit_rows(rng, images), rng.integers(0, 3, images)
    folds = stratified_folds(labels, 5)
    result = predict_held_out(Remembers, TEXT, Examples(rows, labels), folds, ENCODER)
    np.testing.assert_allclose(result.logits, ENCODER.logit_scale * rows @ TEXT.T, rtol=1e-4, atol=1e-4)


def test_an_image_is_predicted_by_a_fit_on_all_other_folds():
    examples = examples_of()
    folds = stratified_folds(examples.support_labels, 4)
    result = predict_held_out(GDA, TEXT, examples, folds, ENCODER)
    for fold in range(4):
        rest = folds != fold
        others = Examples(examples.support_features[rest], examples.support_labels[rest])
        by_hand = GDA().fit(TEXT, logit_scale=20.0, logit_bias=None, examples=others)
        np.testing.assert_allclose(
            result.logits[~rest], by_hand.predict(examples.support_features[~rest]).logits, rtol=1e-5, atol=1e-5
        )


def test_repeated_warnings_of_folds_are_reported_once():
    examples = examples_of()
    result = predict_held_out(Remembers, TEXT, examples, stratified_folds(examples.support_labels, 5), ENCODER)
    assert result.warnings == ("it remembers",)
    assert result.seconds > 0


def test_a_duplicate_image_is_recognised_by_the_fits_of_other_folds():
    """Shows that the fits of the folds are used."""
    rows = np.repeat(unit_rows(np.random.default_rng(0), 6), 2, axis=0)
    labels = np.repeat([0, 1, 2, 0, 1, 2], 2)
    result = predict_held_out(Remembers, TEXT, Examples(rows, labels), np.tile([0, 1], 6), ENCODER)
    np.testing.assert_array_equal(result.logits.argmax(axis=1), labels)
