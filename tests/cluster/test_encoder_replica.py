"""The encoder replica: calls, other weights, and models that are unloaded."""

import asyncio
import gc
import weakref

import numpy as np
import pytest

from app.cluster import encoder_replica
from app.cluster.encoder_replica import EncoderReplica
from app.cluster.messages import SerializedError, WeightsMismatchError, deployment_version
from app.encoders.fake import FakeEncoder
from app.errors import ConfigurationError
from app.settings import Settings
from tests.gated import GatedEncoder

pytestmark = pytest.mark.anyio

PIXELS = np.zeros((2, 4, 4, 3), np.uint8)
IMAGES, TEXTS = FakeEncoder("fake").image_fingerprint(), FakeEncoder("fake").text_fingerprint()


@pytest.fixture
def loaded(monkeypatch):
    """The encoders that replicas load, for every name."""
    encoders = []

    def load(name, options):
        encoders.append(GatedEncoder(name))
        return encoders[-1]

    monkeypatch.setattr(encoder_replica, "load_encoder", load)
    yield encoders
    for encoder in encoders:
        encoder.open()


def replica(**settings):
    """Return a replica and a dictionary that holds its models, as Ray holds models that are loaded on demand."""
    created = EncoderReplica(Settings().model_copy(update=settings), ["fake"])
    held, created._loaded = created._loaded, weakref.WeakValueDictionary(created._loaded)
    return created, held


def unload(held):
    """Drop a model as Ray does, which calls a ``__del__`` method immediately."""
    _, model = held.popitem()
    if hasattr(model, "__del__"):
        model.__del__()
    del model
    gc.collect()


async def until(condition):
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError


async def test_calls_in_progress_finish_when_their_model_is_unloaded(loaded):
    tested, held = replica()
    (encoder,) = loaded
    encoder.images_open.clear()
    running = asyncio.create_task(tested.encode_images("fake", IMAGES, PIXELS, None, {}))
    await asyncio.to_thread(encoder.images_entered.acquire)
    # The second call waits for the running batch.
    waiting = asyncio.create_task(tested.encode_images("fake", IMAGES, PIXELS, None, {}))
    await asyncio.sleep(0.01)
    unload(held)
    assert "fake" in tested._loaded
    encoder.images_open.set()
    for reply in await asyncio.gather(running, waiting):
        assert not isinstance(reply, SerializedError)
        assert (reply.rows.shape, reply.failures) == ((2, encoder.embed_dim), {})
    del running, waiting
    gc.collect()
    assert "fake" not in tested._loaded


async def test_an_unloaded_model_leaves_no_thread_and_no_task(loaded):
    tested, held = replica(health_probe_s=0.05)
    threads = loaded[0].threads["images"]
    await tested.check_health()
    await tested.encode_images("fake", IMAGES, PIXELS, None, {})
    assert any(thread.is_alive() for thread in threads)
    tasks = len(asyncio.all_tasks())
    unload(held)
    await until(lambda: not any(thread.is_alive() for thread in threads))
    await until(lambda: len(asyncio.all_tasks()) < tasks)
    await until(lambda: b'model="fake"' not in tested._metrics.exposition())


async def test_the_numbers_for_autoscaling_are_those_of_loaded_models(loaded):
    tested, held = replica()
    loaded[0].images_open.clear()
    running = asyncio.create_task(tested.encode_images("fake", IMAGES, PIXELS, None, {}))
    await asyncio.to_thread(loaded[0].images_entered.acquire)
    assert (await tested.record_autoscaling_stats())["images"] == 2
    loaded[0].images_open.set()
    await running
    assert await tested.record_autoscaling_stats() == {"images": 0.0, "wait_s": pytest.approx(0, abs=1)}
    held.clear()


async def test_calls_for_other_weights_are_rejected(loaded):
    tested, held = replica()
    assert not isinstance(await tested.encode_texts("fake", TEXTS, ["a word"], None, {}), SerializedError)
    for response in (
        await tested.encode_images("fake", "earlier weights", PIXELS, None, {}),
        await tested.encode_texts("fake", "earlier weights", ["a word"], None, {}),
    ):
        assert isinstance(response, SerializedError)
        assert isinstance(response.to_exception(), WeightsMismatchError)
    unload(held)


async def test_a_model_that_cannot_be_loaded_is_reported_with_the_reason(loaded, monkeypatch):
    tested, held = replica()

    async def fail(model):
        raise ConfigurationError(f"the model '{model}' does not exist")

    monkeypatch.setattr(tested, "_get", fail)
    for response in (
        await tested.encode_images("fake", IMAGES, PIXELS, None, {}),
        await tested.encode_texts("fake", TEXTS, ["a word"], None, {}),
    ):
        assert response == SerializedError("not-ready", "the model 'fake' does not exist")
    unload(held)


async def test_the_properties_of_a_model_name_the_deployment(loaded):
    tested, held = replica(port=3000)
    assert (
        (await tested.model_info("fake")).version
        == deployment_version(Settings(port=3000))
        != deployment_version(Settings(port=4000))
    )
    unload(held)


async def test_an_item_that_fails_has_an_error_and_the_others_have_features(loaded, monkeypatch):
    tested, held = replica()
    (encoder,) = loaded
    encode = encoder.encode_texts

    def fail_for_bad_texts(texts):
        if "bad" in texts:
            raise ValueError("bad text")
        return encode(texts)

    monkeypatch.setattr(encoder, "encode_texts", fail_for_bad_texts)
    response = await tested.encode_texts("fake", TEXTS, ["a", "bad", "b"], None, {})
    assert list(response.failures) == [1]
    assert "bad text" in response.failures[1].message
    assert np.linalg.norm(response.rows, axis=1) == pytest.approx([1, 0, 1])
    unload(held)
