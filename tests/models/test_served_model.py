"""A model with its queues, and what is left of it."""

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


async def test_nothing_is_left_of_a_model_that_is_closed():
    metrics = Metrics()
    stays, goes = FakeEncoder("stays"), FakeEncoder("goes")
    left = weakref.ref(goes)
    first, second = served(stays, metrics), served(goes, metrics)
    for each in (first, second):
        assert (await each.encode_texts(["a word"])).shape == (1, 16)
    assert b'model="goes"' in metrics.exposition()
    second.close()
    second.close()  # twice does no harm
    del goes, second, each
    gc.collect()
    # Its weights would be in the memory of a process that loads models as they are asked for.
    assert left() is None
    told = metrics.exposition()
    assert b'model="goes"' not in told
    assert b'deixis_queue_depth{model="stays",tower="images"}' in told
    first.close()
