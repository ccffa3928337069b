"""Example images are encoded once per served model, and everything derived from them is deleted with them."""

import asyncio
import hashlib

import numpy as np
import pytest

from app.classification.request import ClassifyRequest
from app.encoders.fake import FakeEncoder
from app.errors import ClientError, ConflictError, NotAnImageError, OverloadedError, TooLargeError, UnknownNameError
from app.main import open_service
from app.store.examples import NewExample
from app.types import ClassEntry
from tests.conftest import picture
from tests.gated import GatedEncoder
from tests.shades import THINGS, keep, shade, shades, stock

pytestmark = pytest.mark.anyio


@pytest.fixture
def second():
    return FakeEncoder("second")


@pytest.fixture
async def service(settings, encoder, second, anyio_backend):
    async with open_service(settings, [encoder, second]) as opened:
        await opened.label_sets.put("things", [ClassEntry(name) for name in THINGS], "{}")
        yield opened


async def features(service, model="fake", name="things"):
    return await service.examples.features(await service.label_sets.find(name), model)


async def classify(service, images, **fields):
    return await service.pipeline.classify(
        images, await service.resolver.resolve(ClassifyRequest(label_set="things", **fields))
    )


# --- adding --------------------------------------------------------------------------------------------------------


async def test_a_prepared_image_has_a_hash_a_class_and_features_of_every_model(service, encoder):
    image = shade(0, 1)
    (prepared,) = await service.examples.prepare("things", [image], [("tomato",)])
    assert (prepared.digest, prepared.classnames) == (hashlib.sha256(image).digest(), ("tomato",))
    assert set(prepared.features) == {"fake", "second"}
    (expected,) = await service.examples.encode("fake", [image])
    for feature in prepared.features.values():
        np.testing.assert_allclose(feature, expected, rtol=1e-6)
        assert np.linalg.norm(feature) == pytest.approx(1)


async def test_images_that_are_deleted_during_an_upload_are_not_stored_without_features(service):
    known, new = shades(2)
    await keep(service, "things", [known], ["tomato"])
    prepared = await service.examples.prepare("things", [known, new], [("tomato",)] * 2)
    await service.examples.delete("things", everything=True)
    with pytest.raises(ConflictError, match=r"1 of the 2 images were deleted .* send them again"):
        await service.examples.add("things", prepared)
    assert (await service.examples.counts("things")).labelled == {}
    await keep(service, "things", [known, new], ["tomato"] * 2)
    assert len((await features(service)).support_labels) == 2


async def test_known_images_are_not_encoded_again_and_can_change_their_class(service, encoder, second):
    images = shades(6)
    await keep(service, "things", images, [None] * 6)
    encoder.image_batches.clear()
    second.image_batches.clear()
    prepared = await service.examples.prepare("things", [*images, shade(0, 99)], [("leaf",)] * 7)
    assert sum(encoder.image_batches) == sum(second.image_batches) == 1
    added = await service.examples.add("things", prepared)
    assert (added.added, added.relabelled) == (1, 6)
    stored = await features(service)
    assert (stored.support_labels.tolist(), len(stored.pool_features)) == ([1] * 7, 0)


async def test_images_of_another_label_set_are_encoded_again(service, encoder):
    await service.label_sets.put("others", [ClassEntry("it")], "{}")
    await keep(service, "others", shades(2), [None, None])
    encoder.image_batches.clear()
    prepared = await service.examples.prepare("things", shades(2), [(), ()])
    assert sum(encoder.image_batches) == 2
    assert all(item.features for item in prepared)


async def test_an_image_without_features_of_one_model_is_encoded(settings, encoder):
    async with open_service(settings, [FakeEncoder()]) as service:
        await stock(service, "things", labelled=1)
    async with open_service(settings, [encoder, FakeEncoder("second")]) as service:
        added = await keep(service, "things", shades(3), list(THINGS))
        assert (added.added, added.duplicates) == (0, 3)
        assert len((await features(service, "second")).support_features) == 3


async def test_unreadable_images_are_reported_by_position_and_the_others_are_added(service):
    images = [shade(0, 1), b"no image", shade(1, 1), b"", picture()[:60]]
    prepared = await service.examples.prepare("things", images, [("tomato",), ("leaf",), ("leaf",), (), ()])
    assert [isinstance(item, NewExample) for item in prepared] == [True, False, True, False, False]
    assert isinstance(prepared[1], NotAnImageError)
    assert all(isinstance(item, ClientError) for item in (prepared[3], prepared[4]))
    added = await service.examples.add("things", [item for item in prepared if isinstance(item, NewExample)])
    assert added.added == 2
    assert (await features(service)).support_labels.tolist() == [0, 1]


async def test_a_repeated_image_in_one_call_is_added_once(service):
    added = await keep(service, "things", [shade(0, 1)] * 2, ["tomato", "tomato"])
    assert (added.added, added.duplicates) == (1, 1)


async def test_no_images_are_not_encoded(service, encoder):
    assert await service.examples.prepare("things", [], []) == []
    assert encoder.image_batches == []


@pytest.mark.parametrize("keep_images", [False, True])
async def test_files_are_stored_only_if_enabled(settings, encoder, keep_images):
    changed = settings.model_copy(update={"keep_images": keep_images})
    async with open_service(changed, [encoder]) as service:
        await stock(service, "things", labelled=1)
        (first, *_) = await service.examples.repository.list("things", limit=10)
        content = await service.examples.repository.content("things", first.id)
        assert content == (shade(0, 0) if keep_images else None)


async def test_an_unknown_label_set_is_an_error_before_encoding(service, encoder):
    with pytest.raises(UnknownNameError):
        await service.examples.prepare("nothing", shades(1), [()])
    assert encoder.image_batches == []


async def test_too_many_images_are_rejected_and_none_is_stored(settings, encoder):
    async with open_service(settings.model_copy(update={"max_examples": 5}), [encoder]) as service:
        await service.label_sets.put("things", [ClassEntry(name) for name in THINGS], "{}")
        await keep(service, "things", shades(4), [None] * 4)
        with pytest.raises(TooLargeError, match="DEIXIS_MAX_EXAMPLES"):
            await keep(service, "things", shades(2, 50), [None] * 2)
        assert (await service.examples.counts("things")).unlabelled == 4


async def test_more_images_than_the_queue_admits_are_encoded_in_batches(settings, encoder):
    """As in an import, without other requests."""
    async with open_service(settings, [encoder]) as service:
        await service.label_sets.put("things", [ClassEntry(name) for name in THINGS], "{}")
        async with asyncio.timeout(5):
            prepared = await service.examples.prepare("things", shades(20), [()] * 20)
    assert all(isinstance(item, NewExample) for item in prepared)


@pytest.fixture
async def gated(anyio_backend):
    encoder = GatedEncoder()
    yield encoder
    encoder.open()


async def test_a_full_queue_delays_imports_and_rejects_requests(settings, gated, monkeypatch):
    full = settings.model_copy(update={"max_queued_images": 8})
    async with open_service(full, [gated]) as service:
        await service.label_sets.put("things", [ClassEntry(name) for name in THINGS], "{}")
        encode, refused = service.models.encode_images_in_background, asyncio.Event()

        async def recorded(*arguments):
            try:
                return await encode(*arguments)
            except OverloadedError:
                refused.set()
                raise

        gated.images_open.clear()
        before = asyncio.create_task(service.models.encode_images("fake", shades(8)))
        assert await asyncio.to_thread(gated.images_entered.acquire, timeout=10)
        with pytest.raises(OverloadedError):
            await service.examples.prepare("things", shades(2, 50), [()] * 2, wait=False)
        monkeypatch.setattr(service.models, "encode_images_in_background", recorded)
        patient = asyncio.create_task(service.examples.prepare("things", shades(2, 50), [()] * 2))
        await refused.wait()
        gated.open()
        await before
        assert [isinstance(item, NewExample) for item in await patient] == [True, True]


# --- counting and reading ------------------------------------------------------------------------------------------


async def test_examples_are_counted_by_class_and_without_features_of_the_default_model(settings):
    async with open_service(settings, [FakeEncoder("before")]) as service:
        await stock(service, "things", labelled=2, pool=1)
    async with open_service(settings, [FakeEncoder()]) as service:
        await keep(service, "things", [shade(0, 99)], ["tomato"])
        counts = await service.examples.counts("things")
    assert counts.labelled == {"tomato": 3, "leaf": 2, "sky": 2}
    assert (counts.unlabelled, counts.without_features) == (3, 9)


async def test_examples_are_counted_without_a_model(settings):
    async with open_service(settings, [FakeEncoder()]) as service:
        await stock(service, "things", labelled=2)
    async with open_service(settings, []) as service:
        assert sum((await service.examples.counts("things")).labelled.values()) == 6


async def test_features_are_stored_in_half_precision(service):
    await stock(service, "things", labelled=2, pool=1)
    stored = await features(service)
    assert stored.support_labels.tolist() == [0, 1, 2, 0, 1, 2]
    np.testing.assert_allclose(
        stored.support_features, np.stack(await service.examples.encode("fake", shades(6))), atol=1e-3
    )
    np.testing.assert_allclose(
        stored.pool_features, np.stack(await service.examples.encode("fake", shades(3, 300))), atol=1e-3
    )


async def test_a_large_pool_is_sampled_to_the_limit(settings, encoder):
    async with open_service(settings.model_copy(update={"max_pool_images": 5}), [encoder]) as service:
        await stock(service, "things", labelled=2, pool=8)
        stored = await features(service)
        assert (len(stored.support_features), len(stored.pool_features)) == (6, 5)
        result = await classify(service, shades(1), method="stata")
        assert result.examples.unlabelled == 5


# --- models added later --------------------------------------------------------------------------------------------


async def test_stored_files_are_encoded_once_by_a_new_model(settings, second):
    keeping = settings.model_copy(update={"keep_images": True})
    async with open_service(keeping, [FakeEncoder()]) as service:
        await stock(service, "things", labelled=7)  # more than one batch
    async with open_service(keeping, [FakeEncoder(), second]) as service:
        assert await service.examples.encode_stored("things", "second") == 21
        assert await service.examples.encode_stored("things", "second") == 0
        assert await service.examples.encode_stored("things", "fake") == 0
        ours, theirs = await features(service, "second"), await features(service, "fake")
        np.testing.assert_array_equal(ours.support_features, theirs.support_features)
        np.testing.assert_array_equal(ours.support_labels, theirs.support_labels)


async def test_without_stored_files_a_new_model_encodes_nothing(settings, second):
    async with open_service(settings, [FakeEncoder()]) as service:
        await stock(service, "things", labelled=2)
    async with open_service(settings, [FakeEncoder(), second]) as service:
        assert await service.examples.encode_stored("things", "second") == 0
    assert second.image_batches == []


# --- deleting ------------------------------------------------------------------------------------------------------


async def test_fits_on_deleted_images_are_not_used(service):
    await stock(service, "things")
    images = shades(6, 900)
    taught = await classify(service, images, method="gda")
    assert [result.predictions[0].label for result in taught.results] == list(THINGS) * 2
    deleted = await service.examples.delete("things", everything=True)
    assert deleted.deleted == 24
    after = await classify(service, images, method="gda")
    zero_shot = await classify(service, images, method="zero-shot")
    assert [result.predictions for result in after.results] == [result.predictions for result in zero_shot.results]
    assert (after.examples.labelled, after.examples.revision) == (0, deleted.revision)
    assert any("no labelled images" in warning for warning in after.warnings)


async def test_images_of_one_class_can_be_deleted(service):
    await stock(service, "things", pool=2)
    assert (await service.examples.delete("things", classname="leaf")).deleted == 8
    counts = await service.examples.counts("things")
    assert (dict(counts.labelled), counts.unlabelled) == ({"tomato": 8, "sky": 8}, 6)
    assert (await service.examples.delete("things", unlabelled=True)).deleted == 6
    assert (await features(service)).support_labels.tolist() == [0, 2] * 8


async def test_deleting_a_label_set_deletes_its_fits(service):
    await stock(service, "things")
    await classify(service, shades(1), method="gda")
    await service.label_sets.delete("things")
    await stock(service, "things", labelled=0)
    assert (await features(service)).support_labels.size == 0
    result = await classify(service, shades(1), method="gda")
    assert result.examples.labelled == 0
