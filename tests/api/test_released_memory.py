"""Requests that fail free their images at once: no error keeps them in a reference cycle."""

import asyncio
import gc
import time
import types

import httpx
import pytest

from app.encoders.fake import FakeEncoder
from app.main import create_app
from tests.conftest import picture


class FaultyEncoder(FakeEncoder):
    """Is slow, or fails."""

    seconds = 0.0
    fails = False

    def encode_images(self, pixels):
        time.sleep(self.seconds)
        if self.fails:
            raise RuntimeError("broken")
        return super().encode_images(pixels)


def encoder_in_use(app):
    """Whether a model of the application has admitted items that are not finished."""
    queues = [served.images for served in app.state.service.models]
    return any(queue.admitted or any(worker.begun for worker in queue._workers) for queue in queues)


async def ask(client, count=4, image=None, labels="red, blue", **fields):
    files = [("image", ("a.png", image or picture("red", (300, 300)), "image/png"))] * count
    return (await client.post("/v1/classify", files=files, data={"labels": labels, **fields})).status_code


async def too_late(client, encoder):
    encoder.seconds = 0.3
    return await ask(client)


async def rejected(client, encoder):
    encoder.seconds = 0.05
    return max(await asyncio.gather(*(ask(client, 8) for _ in range(3))))


async def failed(client, encoder):
    encoder.fails = True
    return await ask(client)


async def cancelled(client, encoder):
    encoder.seconds = 0.1
    request = asyncio.ensure_future(ask(client))
    while not encoder_in_use(client.app):  # noqa: ASYNC110 - the queue has no event for it
        await asyncio.sleep(0)
    request.cancel()
    await asyncio.wait([request])
    return 499 if request.cancelled() else request.result()


async def undecodable(client, _):
    return await ask(client, image=b"no image" * 10_000)


async def unknown_label_set(client, _):
    return await ask(client, labels=[], label_set="missing")


SCENARIOS = {
    too_late: 504,
    rejected: 504,
    failed: 500,
    cancelled: 499,
    undecodable: 415,
    unknown_label_set: 404,
}


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_a_request_that_fails_leaves_no_cycle_with_frames(settings, scenario):
    async def run():
        encoder = FaultyEncoder()
        changes = {"request_timeout_s": 0.15, "image_batch": 1, "max_queued_images": 8, "max_images_per_request": 8}
        app = create_app(settings.model_copy(update=changes), lambda _: [encoder])
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
        ):
            client.app = app
            await ask(client, 1)
            gc.collect()
            gc.disable()
            gc.set_debug(gc.DEBUG_SAVEALL)
            try:
                status = await scenario(client, encoder)
                while encoder_in_use(app):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                gc.collect()
                kinds = (types.FrameType, types.TracebackType, asyncio.Future, BaseException)
                return status, [each for each in gc.garbage if isinstance(each, kinds)]
            finally:
                gc.set_debug(0)
                gc.garbage.clear()
                gc.enable()

    status, garbage = asyncio.run(run())
    assert status == SCENARIOS[scenario]
    assert garbage == []
