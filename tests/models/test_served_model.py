"""Served models with their queues, and the release of their memory."""

import asyncio
import gc
import weakref

import numpy as np
import pytest

from app.encoders.fake import FakeEncoder
from app.models.served_model import ServedModel
from app.observability.metrics import Metrics

pytestmark = pytest.mark.anyio


def served(encoder, metrics):
    return ServedModel.here(
        encoder, metrics=metrics, max_queued_images=8, image_batch=None, text_batch=8, stalled_after_s=60.0
    )


async def test_a_closed_model_is_garbage_collected():
    metrics = Metrics()
    stays, goes = FakeEncoder("stays"), FakeEncoder("goes")
    left = weakref.ref(goes)
    first, second = served(stays, metrics), served(goes, metrics)
    for item in (first, second):
        assert (await item.encode_texts(["a word"])).shape == (1, 16)
    assert b'model="goes"' in metrics.exposition()
    second.close()
    second.close()  # closing twice is allowed
    del goes, second, item
    gc.collect()
    # Otherwise its weights would stay in memory.
    assert left() is None
    result = metrics.exposition()
    assert b'model="goes"' not in result
    assert b'deixis_queue_depth{model="stays",tower="images"}' in result
    first.close()


class Overflowing(FakeEncoder):
    """Returns a row with a number that is not finite for the text ``big``, and for a white image."""

    value = np.nan

    def encode_texts(self, texts):
        rows = super().encode_texts(texts).copy()
        rows[[text == "big" for text in texts], 0] = self.value
        return rows

    def begin_images(self, pixels, *, alone=True):
        wait = super().begin_images(pixels, alone=alone)

        def rows():
            features = wait().copy()
            features[[bool((image == 255).all()) for image in pixels], 0] = self.value
            return features

        return rows


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
async def test_an_item_whose_features_are_not_finite_fails_alone(value):
    encoder = Overflowing()
    encoder.value = value
    model = served(encoder, Metrics())
    try:
        for queue, good, bad in (
            (model.texts, "small", "big"),
            (model.images, np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)),
        ):
            with pytest.raises(FloatingPointError, match="not finite; try DEIXIS_PRECISION=fp32"):
                await queue.run([bad])
            one, two, three = await asyncio.gather(
                *(queue.run([item]) for item in (good, bad, good)), return_exceptions=True
            )
            assert isinstance(two, FloatingPointError)
            assert np.isfinite([one[0], three[0]]).all()
    finally:
        model.close()
