"""A replica that encodes, and what becomes of calls when its model goes."""

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
    """The encoder that replicas load, whatever they are asked for."""
    made = []

    def load(name, options):
        made.append(GatedEncoder(name))
        return made[-1]

    monkeypatch.setattr(encoder_replica, "load_encoder", load)
    yield made
    for each in made:
        each.open()


def replica(**settings):
    """One whose models somebody else holds, as Ray does where models are loaded as they are asked for."""
    made = EncoderReplica(Settings().model_copy(update=settings), ["fake"])
    held, made._loaded = made._loaded, weakref.WeakValueDictionary(made._loaded)
    return made, held


def let_go(held):
    """As Ray does, which at once calls a destructor that there is."""
    _, model = held.popitem()
    if hasattr(model, "__del__"):
        model.__del__()
    del model
    gc.collect()


async def until(is_so):
    for _ in range(500):
        if is_so():
            return
        await asyncio.sleep(0.01)
    raise AssertionError


async def test_what_is_under_way_is_answered_when_another_model_takes_the_place(loaded):
    here, held = replica()
    (encoder,) = loaded
    encoder.images_open.clear()
    running = asyncio.create_task(here.encode_images("fake", IMAGES, PIXELS, None, {}))
    await asyncio.to_thread(encoder.images_entered.acquire)
    # One that waits for the batch that runs.
    waiting = asyncio.create_task(here.encode_images("fake", IMAGES, PIXELS, None, {}))
    await asyncio.sleep(0.01)
    let_go(held)
    assert "fake" in here._loaded
    encoder.images_open.set()
    for reply in await asyncio.gather(running, waiting):
        assert not isinstance(reply, SerializedError)
        assert (reply.rows.shape, reply.failures) == ((2, encoder.embed_dim), {})
    del running, waiting
    gc.collect()
    assert "fake" not in here._loaded


async def test_a_model_that_has_gone_leaves_no_thread_and_no_task(loaded):
    here, held = replica(health_probe_s=0.05)
    threads = loaded[0].threads["images"]
    await here.check_health()
    await here.encode_images("fake", IMAGES, PIXELS, None, {})
    assert any(each.is_alive() for each in threads)
    tasks = len(asyncio.all_tasks())
    let_go(held)
    await until(lambda: not any(each.is_alive() for each in threads))
    await until(lambda: len(asyncio.all_tasks()) < tasks)
    await until(lambda: b'model="fake"' not in here._metrics.exposition())


async def test_numbers_for_scaling_are_those_of_models_that_are_there(loaded):
    here, held = replica()
    loaded[0].images_open.clear()
    running = asyncio.create_task(here.encode_images("fake", IMAGES, PIXELS, None, {}))
    await asyncio.to_thread(loaded[0].images_entered.acquire)
    assert (await here.record_autoscaling_stats())["images"] == 2
    loaded[0].images_open.set()
    await running
    assert await here.record_autoscaling_stats() == {"images": 0.0, "wait_s": pytest.approx(0, abs=1)}
    held.clear()


async def test_features_of_other_weights_are_not_given_out_as_those_that_are_meant(loaded):
    here, held = replica()
    assert not isinstance(await here.encode_texts("fake", TEXTS, ["a word"], None, {}), SerializedError)
    for told in (
        await here.encode_images("fake", "of weights before", PIXELS, None, {}),
        await here.encode_texts("fake", "of weights before", ["a word"], None, {}),
    ):
        assert isinstance(told, SerializedError)
        assert isinstance(told.to_exception(), WeightsMismatchError)
    let_go(held)


async def test_a_model_that_cannot_be_loaded_is_told_in_its_words(loaded, monkeypatch):
    here, held = replica()

    async def fails(model):
        raise ConfigurationError(f"the model '{model}' is not there")

    monkeypatch.setattr(here, "_get", fails)
    for told in (
        await here.encode_images("fake", IMAGES, PIXELS, None, {}),
        await here.encode_texts("fake", TEXTS, ["a word"], None, {}),
    ):
        assert told == SerializedError("not-ready", "the model 'fake' is not there")
    let_go(held)


async def test_a_card_tells_with_whom_its_replica_was_deployed(loaded):
    here, held = replica(port=3000)
    assert (
        (await here.card("fake")).version
        == deployment_version(Settings(port=3000))
        != deployment_version(Settings(port=4000))
    )
    let_go(held)
