"""A stored selection is returned, and selected again after its label set or examples have changed."""

import asyncio

import pytest
import structlog

from app.classification.request import ClassifyRequest
from app.encoders.fake import FakeEncoder
from app.errors import StoreError
from app.main import open_service
from app.scoring.calibration import Calibration
from app.selection.selection_reader import SELECT_METHOD
from app.types import ClassEntry, RejectBy
from tests.shades import THINGS, keep, shade, stock

pytestmark = pytest.mark.anyio


class RequestedJobs:
    """Records the label sets for which a selection is requested; the first requests raise ``errors``."""

    def __init__(self, *errors):
        self.names = []
        self.errors = list(errors)

    async def add_unless(self, statuses, kind, name, request):
        assert kind == SELECT_METHOD
        self.names.append(name)
        if self.errors:
            raise self.errors.pop(0)
        return None, True


@pytest.fixture
async def service(settings, anyio_backend):
    async with open_service(settings, [FakeEncoder(), FakeEncoder("second")]) as opened:
        yield opened


async def choice_of(service, reference="things", model="fake"):
    return await service.selection_reader.get(await service.label_sets.find(reference), model)


async def settled(service):
    """Wait for all background tasks."""
    await service.prewarmer.idle()
    await asyncio.gather(*service.selection_reader._requests)


async def test_without_examples_nothing_is_selected_or_requested(service):
    service.selection_reader._jobs = requested = RequestedJobs()
    await stock(service, "things", labelled=0)
    assert await choice_of(service) is None
    await settled(service)
    assert requested.names == []


async def test_examples_without_a_selection_request_one_once(service):
    service.selection_reader._jobs = requested = RequestedJobs()
    await stock(service, "things", labelled=2)
    for _ in range(5):
        assert await choice_of(service) is None
        assert await choice_of(service, model="second") is None
    await settled(service)
    assert requested.names == ["things"]


async def test_each_change_of_examples_or_classes_requests_a_selection_once(service):
    service.selection_reader._jobs = requested = RequestedJobs()
    await stock(service, "things", labelled=2)
    await choice_of(service)
    await keep(service, "things", [shade(0, 99)], ["tomato"])
    for _ in range(3):
        await choice_of(service)
    await settled(service)
    assert len(requested.names) == 2
    await service.method_selector.select_for_every_model("things")
    await service.label_sets.add_classes("things", [ClassEntry("snow")])
    for _ in range(3):
        await choice_of(service)
    await settled(service)
    assert len(requested.names) == 3


async def test_concurrent_requests_for_several_versions_request_one_selection(service):
    """A selection is always for the latest version."""
    await stock(service, "things", labelled=2)
    await service.label_sets.put("things", [ClassEntry(name) for name in THINGS], "{}")
    await settled(service)
    service.selection_reader._jobs = requested = RequestedJobs()
    for _ in range(4):
        await choice_of(service, "things@1")
        await choice_of(service, "things@2")
    await settled(service)
    assert requested.names == ["things"]


async def test_label_sets_are_requested_independently(service):
    service.selection_reader._jobs = requested = RequestedJobs()
    for name in ("things", "others"):
        await stock(service, name, labelled=2)
        await choice_of(service, name)
        await choice_of(service, name)
    await settled(service)
    assert sorted(requested.names) == ["others", "things"]


async def test_a_database_failure_is_logged_and_the_next_request_tries_again(service):
    await stock(service, "things", labelled=2)
    await settled(service)
    service.selection_reader._jobs = requested = RequestedJobs(StoreError("away"))
    with structlog.testing.capture_logs() as logs:
        for _ in range(2):
            await choice_of(service)
            await settled(service)
    assert requested.names == ["things", "things"]
    assert [(log["event"], log["label_set"], log["reason"]) for log in logs] == [
        ("selection_not_requested", "things", "away")
    ]


async def test_without_a_job_queue_nothing_is_requested(service):
    await stock(service, "things", labelled=2)
    assert await choice_of(service) is None
    assert not service.selection_reader._requests


async def test_a_selection_is_returned_with_every_calibration(service):
    await stock(service, "things")
    result = (await service.method_selector.select_for_every_model("things"))["fake"]
    choice = await choice_of(service)
    assert (choice.method, choice.reason) == (result["method"], result["reason"])
    assert (choice.version, choice.revision) == (1, 1)
    assert set(choice.calibrations) == {row["method"] for row in result["leaderboard"]}
    assert all(isinstance(calibration, Calibration) for calibration in choice.calibrations.values())
    assert choice.rejection.by is RejectBy.CLASS_MEAN
    assert choice.rejection.images == 24


async def test_a_selection_of_an_earlier_release_has_no_rejection(service):
    await stock(service, "things")
    label_set = await service.label_sets.get("things")
    result, revision = await service.method_selector.select(label_set, "fake")
    del result["rejection"]
    fingerprint = await service.models.get("fake").image_fingerprint()
    await service.method_selector._repository.put("things", fingerprint, label_set.version, revision, result)
    choice = await choice_of(service)
    assert choice.calibrations
    assert choice.rejection is None
    request = ClassifyRequest(label_set="things", method="gda", false_rejection_rate=0.2)
    scoring = (await service.resolver.resolve(request)).scoring
    assert scoring.reject_by is RejectBy.SCORE
    assert scoring.reject_below == choice.calibrations["gda"].rejection.threshold(0.2)


async def test_a_current_selection_is_read_once_and_not_requested_again(service):
    await stock(service, "things")
    await service.method_selector.select_for_every_model("things")
    service.selection_reader._jobs = requested = RequestedJobs()
    first = await choice_of(service)
    assert await choice_of(service) is first
    await settled(service)
    assert requested.names == []


async def test_an_outdated_selection_is_returned_until_there_is_a_new_one(service):
    await stock(service, "things")
    await service.method_selector.select_for_every_model("things")
    await choice_of(service)
    service.selection_reader._jobs = requested = RequestedJobs()
    await keep(service, "things", [shade(0, 99)], ["tomato"])
    assert (await choice_of(service)).revision == 1
    await settled(service)
    assert requested.names == ["things"]
    await service.method_selector.select_for_every_model("things")
    assert (await choice_of(service)).revision == 2


async def test_selections_survive_a_restart(settings):
    async with open_service(settings, [FakeEncoder()]) as service:
        await stock(service, "things")
        await service.method_selector.select_for_every_model("things")
        before = await choice_of(service)
    async with open_service(settings, [FakeEncoder()]) as service:
        assert await choice_of(service) == before


async def test_a_selection_is_not_returned_for_a_recreated_label_set(service):
    await stock(service, "things")
    await service.method_selector.select_for_every_model("things")
    await choice_of(service)
    await service.label_sets.delete("things")
    await service.label_sets.put("things", [ClassEntry(name) for name in THINGS], "{}")
    assert await choice_of(service) is None
    assert (await service.resolver.resolve(ClassifyRequest(label_set="things"))).method == "zero-shot"


async def test_closing_cancels_pending_requests(service):
    class Never:
        async def add_unless(self, *_):
            await asyncio.Event().wait()

    await stock(service, "things", labelled=2)
    await settled(service)
    service.selection_reader._jobs = Never()
    await choice_of(service)
    await service.selection_reader.close()
    await asyncio.gather(*service.selection_reader._requests, return_exceptions=True)
    assert not service.selection_reader._requests
