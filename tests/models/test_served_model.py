"""Served models with their queues, and the release of their memory."""

import gc
import weakref

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
