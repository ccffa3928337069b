"""Decoding in threads and in processes: equal pixels, and timeouts for slow images."""

import asyncio
import os
import signal
import time
from concurrent.futures import BrokenExecutor, Future

import numpy as np
import pytest
import structlog
from pebble.pool.base_pool import PoolStatus

from app.errors import ImageTooLargeError, NotAnImageError, NotReadyError
from app.images import decoder_pool as decoding
from app.images.decoder_pool import ImageLimits, ProcessDecoders, ThreadDecoders
from benchmarks.attack.corpus import mutants, seeds

pytestmark = pytest.mark.anyio

LIMITS = ImageLimits(max_bytes=1_000_000, max_pixels=1_000_000)


def as_array(image):
    return np.asarray(image)


# At module level, so that another process can import them.
def never_ends(*_):
    time.sleep(600)


def crashes(*_):
    os.kill(os.getpid(), signal.SIGSEGV)


@pytest.fixture(scope="module")
def processes():
    decoders = ProcessDecoders(2, LIMITS, timeout_s=60)
    yield decoders
    decoders.close()


@pytest.fixture
def threads():
    decoders = ThreadDecoders(2, LIMITS)
    yield decoders
    decoders.close()


async def outcome(decoders, image):
    try:
        return (await decoders.decode(image, as_array, 8)).tobytes()
    except (NotAnImageError, ImageTooLargeError) as error:
        return type(error), error.message


async def test_processes_and_threads_return_the_same_pixels_and_errors(threads, processes):
    images = [*seeds().values(), *(image for _, image in mutants(80)), b"", bytes(1_000_001)]
    here = await asyncio.gather(*(outcome(threads, image) for image in images))
    there = await asyncio.gather(*(outcome(processes, image) for image in images))
    assert here == there
    assert {type(item) for item in here} == {bytes, tuple}


async def test_an_error_of_a_transform_is_raised(threads, processes):
    def fails(_):
        raise ZeroDivisionError

    for decoders in (threads, processes):
        with pytest.raises(ZeroDivisionError):
            await decoders.decode(seeds()["png"], fails, 8)


@pytest.fixture
def decoder():
    decoders = ProcessDecoders(1, LIMITS, timeout_s=20)
    yield decoders
    decoders.close()


async def test_a_slow_decoder_is_killed_and_the_next_image_is_decoded(decoder, monkeypatch):
    await decoder.decode(seeds()["png"], as_array, 8)
    monkeypatch.setattr(decoding, "_decode", never_ends)
    monkeypatch.setattr(decoder, "_timeout_s", 0.5)
    with structlog.testing.capture_logs() as logged, pytest.raises(NotAnImageError, match=r"longer than 0\.5 s"):
        await decoder.decode(b"a slow one", as_array, 8)
    assert logged[0]["event"] == "decoder_killed"
    monkeypatch.undo()
    assert (await decoder.decode(seeds()["png"], as_array, 8)).shape == (48, 64, 3)


async def test_the_next_image_is_decoded_after_a_crash(decoder, monkeypatch):
    monkeypatch.setattr(decoding, "_decode", crashes)
    with (
        structlog.testing.capture_logs() as logged,
        pytest.raises(NotAnImageError, match="decoder of the image crashed"),
    ):
        await decoder.decode(b"a deadly one", as_array, 8)
    assert logged[0]["event"] == "decoder_died"
    monkeypatch.undo()
    assert (await decoder.decode(seeds()["png"], as_array, 8)).shape == (48, 64, 3)


async def test_an_image_is_retried_if_its_process_ended_before_it_started(decoder):
    await decoder.decode(seeds()["png"], as_array, 8)
    decoder._processes._context.status = PoolStatus.ERROR  # the state that pebble leaves if a process could not start
    assert (await decoder.decode(seeds()["png"], as_array, 8)).shape == (48, 64, 3)

    working = decoder._processes.schedule

    def breaks(*_, **__):
        broken = Future()
        broken.set_exception(BrokenExecutor("All workers expired"))
        return broken

    def breaks_once(*_, **__):
        decoder._processes.schedule = working
        return breaks()

    decoder._processes.schedule = breaks_once
    assert (await decoder.decode(seeds()["png"], as_array, 8)).shape == (48, 64, 3)
    decoder._processes.schedule = breaks
    with pytest.raises(NotReadyError, match="are restarted"):
        await decoder.decode(seeds()["png"], as_array, 8)
    decoder._processes.schedule = working


async def test_an_image_is_cancelled_with_its_request(decoder, monkeypatch):
    monkeypatch.setattr(decoding, "_decode", never_ends)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await decoder.decode(b"a slow one", as_array, 8)
    monkeypatch.undo()
    async with asyncio.timeout(15):
        assert (await decoder.decode(seeds()["png"], as_array, 8)).shape == (48, 64, 3)


def test_a_service_with_a_decode_timeout_decodes_in_processes(make_client):
    client = make_client(decode_timeout_s=30)
    for kind, image in list(seeds().items())[:4]:
        answer = client.post("/v1/classify", files={"image": image}, data={"labels": "red, green"})
        assert answer.status_code == 200, kind
    refused = client.post("/v1/classify", files={"image": seeds()["png"][:60]}, data={"labels": "red, green"})
    assert refused.json()["type"] == "urn:deixis:problem:not-an-image"
