"""Fits on deleted images are not used, in this process or another one."""

import asyncio

import numpy as np
import pytest
from cachetools import LRUCache

from app.classification.method_names import DEFAULT_METHOD
from app.classification.request import ClassifyRequest
from app.encoders.fake import FakeEncoder
from app.errors import InvalidFieldError, NotAnImageError, OverloadedError
from app.main import open_service
from tests.shades import THINGS, shade, stock

pytestmark = pytest.mark.anyio


@pytest.fixture
async def service(settings, encoder, anyio_backend):
    async with open_service(settings, [encoder]) as opened:
        yield opened


@pytest.fixture
async def other(settings, service):
    """Return a second process with the same database."""
    async with open_service(settings, [FakeEncoder()]) as opened:
        yield opened


async def classify(service, **question):
    task = await service.resolver.resolve(ClassifyRequest(label_set="things", **question))
    return await service.pipeline.classify([shade(1, 900)], task)


async def test_another_process_does_not_use_deleted_images(service, other):
    await stock(service, "things")
    assert (await classify(other, method="gda")).examples.labelled == 24
    await service.examples.delete("things", classname="sky")
    result = await classify(other, method="gda")
    assert (result.examples.labelled, result.examples.revision) == (16, 2)


async def test_additions_are_fitted_in_the_background(service, other):
    await stock(service, "things")
    assert (await classify(other, method="gda")).examples.labelled == 24
    (item,) = await service.examples.prepare("things", [shade(2, 901)], [("sky",)])
    await service.examples.add("things", [item])
    assert (await classify(other, method="gda")).examples.labelled == 24
    await other.fits.idle()
    assert (await classify(other, method="gda")).examples.labelled == 25


async def test_deleted_images_are_not_used_for_calibration(service):
    await stock(service, "things")
    await service.method_selector.select_for_every_model("things")
    assert (await classify(service, method="gda", coverage=0.8)).task.scoring.calibrated_on == 24
    await service.examples.delete("things", classname="sky")
    assert (await classify(service, method="gda")).task.scoring.calibrated_on == 0
    with pytest.raises(InvalidFieldError, match="coverage: needs the methods to be compared"):
        await service.resolver.resolve(ClassifyRequest(label_set="things", method="gda", coverage=0.8))
    await service.method_selector.select_for_every_model("things")
    assert (await classify(service, method="gda", coverage=0.8)).task.scoring.calibrated_on == 16


async def test_a_method_that_exceeds_the_memory_is_not_selected_with_a_reason(service):
    await stock(service, "things")
    service.fits._ready = LRUCache(50, getsizeof=lambda fitted: fitted.nbytes)
    result = (await service.method_selector.select_for_every_model("things"))["fake"]
    assert result["method"] == DEFAULT_METHOD
    assert "cannot be used" in result["reason"]
    assert "DEIXIS_CACHE_MIB" in result["reason"]
    assert (await classify(service)).task.method == DEFAULT_METHOD


async def test_an_image_whose_features_are_not_finite_is_not_an_example(settings):
    class NoNumbers(FakeEncoder):
        def encode_images(self, pixels):
            features = super().encode_images(pixels)
            features[features[:, 1] > 0.9] = np.nan
            return features

    async with open_service(settings, [NoNumbers()]) as service:
        await stock(service, "things", labelled=0)
        red, green = await service.examples.prepare("things", [shade(0, 1), shade(1, 1)], [(), ()])
        assert isinstance(green, NotAnImageError)
        assert "NaN or infinity" in green.message
        assert (await service.examples.add("things", [red])).added == 1


async def test_fits_with_many_different_options_are_rejected_while_many_wait(service):
    await stock(service, "things")
    gathered = []
    for number in range(40):
        task = await service.resolver.resolve(
            ClassifyRequest(label_set="things", method="gda", options={"alpha": 1 + number})
        )
        gathered.append(service.classifiers.get(task))
    result = await asyncio.gather(*gathered, return_exceptions=True)
    refused = [item for item in result if isinstance(item, OverloadedError)]
    assert 0 < len(refused) < 40
    assert refused[0].retry_after_s >= 1
    task = await service.resolver.resolve(ClassifyRequest(label_set="things", method="gda", options={"alpha": 1}))
    assert (await service.classifiers.get(task)).examples.labelled == 24


async def test_concurrent_first_requests_share_the_state_of_tda(service):
    await stock(service, "things", THINGS, labelled=0)
    task = await service.resolver.resolve(ClassifyRequest(label_set="things", method="tda"))
    first, second = await asyncio.gather(service.classifiers.get(task), service.classifiers.get(task))
    assert first.predict.__self__ is second.predict.__self__
    assert (await service.classifiers.get(task)).predict.__self__ is first.predict.__self__
