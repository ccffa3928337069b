"""Jobs run to completion, in any process of the service."""

import asyncio
import os
import threading
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest
from sqlalchemy import text

from app.captions.build_plan import BuildPlan
from app.classification.request import ClassifyRequest
from app.describing.request import DescribeRequest
from app.encoders.fake import FakeEncoder
from app.errors import ConflictError, InvalidFieldError, StoreError, UnknownNameError
from app.jobs.handlers import DESCRIBE, EVALUATE, IMPORT_IMAGES, BuildCaptionsJobs, ImportJobs
from app.jobs.queue import JobHandler, JobQueue
from app.main import open_service
from app.observability.metrics import Metrics
from app.selection.selection_reader import SELECT_METHOD
from app.store.database import writing
from app.store.jobs import JobStatus
from app.types import ClassEntry
from tests.api.test_examples import shade
from tests.describing.chat_server import MODEL, ChatServer, failing, slow
from tests.gated import GatedEncoder

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
async def service_of(settings):
    """Return a function that opens a service with a chat server; services are closed after the test."""
    async with AsyncExitStack() as stack:

        async def opened(server):
            changed = settings.model_copy(update={"llm_base_url": server.url, "llm_model": MODEL, "llm_concurrency": 2})
            service = await stack.enter_async_context(open_service(changed, [FakeEncoder()]))
            await service.label_sets.put("pets", [ClassEntry("cat"), ClassEntry("owl")], "{}")
            return service

        yield opened


def jobs_of(service, *, import_dir=None, **changes):
    """Return the jobs of a service, with a queue that polls often."""
    queue = JobQueue(service.jobs.queue.repository, **{"lease_s": 0.3, "poll_s": 0.02, **changes})
    repository = queue.repository
    jobs = replace(
        service.jobs,
        queue=queue,
        import_images=ImportJobs(
            repository, service.label_sets, service.examples, service.models, service.jobs.select_method, import_dir
        ),
        build_captions=BuildCaptionsJobs(repository, service.caption_search, import_dir),
    )
    for handler in jobs.handlers:
        queue.register(handler)
    return jobs


async def wait_until_finished(jobs, job):
    async def finished():
        return (await jobs.queue.repository.get(job.id)).finished_at is not None

    await until(finished)
    return await jobs.queue.repository.get(job.id)


async def until(condition):
    async with asyncio.timeout(20):
        while not await condition():  # noqa: ASYNC110 - the condition is in the database
            await asyncio.sleep(0.01)


async def test_a_job_runs_and_its_result_is_stored(service_of):
    with ChatServer() as server:
        service = await service_of(server)
        jobs = jobs_of(service)
        jobs.queue.start()
        job = await wait_until_finished(jobs, await jobs.describe.add("pets", DescribeRequest(answers=1), accept=True))
        await jobs.queue.close()
    assert job.status is JobStatus.SUCCEEDED
    assert (job.done, job.total) == (8, 8)
    assert job.result["questions"] == 8
    assert job.result["label_set"] == "pets@2"
    assert job.result["accepted"] == job.result["new_drafts"] == 2 * (3 + 3)
    assert all(len(entry.descriptions) == 3 for entry in (await service.label_sets.find("pets@2")).classes)


async def test_drafts_wait_for_a_review_unless_accepted_automatically(service_of):
    with ChatServer() as server:
        service = await service_of(server)
        jobs = jobs_of(service)
        jobs.queue.start()
        job = await wait_until_finished(
            jobs, await jobs.describe.add("pets@1", DescribeRequest(answers=1), accept=False)
        )
        await jobs.queue.close()
    assert (job.result["accepted"], job.result["label_set"]) == (0, None)
    assert (await service.label_sets.find("pets")).version == 1


async def test_a_failed_job_has_an_error_and_the_next_one_runs(service_of):
    with ChatServer([failing(401)], afterwards=None) as server:
        service = await service_of(server)
        jobs = jobs_of(service)
        jobs.queue.start()
        failed = await wait_until_finished(jobs, await jobs.describe.add("pets", DescribeRequest(), accept=False))
        fine = await wait_until_finished(jobs, await jobs.describe.add("pets", DescribeRequest(), accept=False))
        await jobs.queue.close()
    assert failed.status is JobStatus.FAILED
    assert "DEIXIS_LLM_API_KEY" in failed.error
    assert fine.status is JobStatus.SUCCEEDED


async def test_an_internal_error_is_logged_and_not_returned(service_of, monkeypatch):
    with ChatServer() as server:
        service = await service_of(server)

        async def broken(*_, **__):
            raise ZeroDivisionError("secret")

        monkeypatch.setattr(service.describer, "run", broken)
        jobs = jobs_of(service)
        jobs.queue.start()
        job = await wait_until_finished(jobs, await jobs.describe.add("pets", DescribeRequest(), accept=False))
        await jobs.queue.close()
    assert job.status is JobStatus.FAILED
    assert job.id in job.error
    assert "secret" not in job.error


@pytest.mark.parametrize("statement", ["INSERT INTO label_sets (name) VALUES (NULL)", "SELEKT"])
async def test_a_job_that_the_database_refuses_has_failed_and_is_not_started_again(service_of, monkeypatch, statement):
    with ChatServer() as server:
        service = await service_of(server)
        started = []

        async def write(*_, **__):
            started.append(True)
            async with writing(service.engine) as session:
                await session.execute(text(statement))

        monkeypatch.setattr(service.describer, "run", write)
        jobs = jobs_of(service)
        jobs.queue.start()
        job = await wait_until_finished(jobs, await jobs.describe.add("pets", DescribeRequest(), accept=False))
        await jobs.queue.close()
    assert (job.status, len(started)) == (JobStatus.FAILED, 1)
    assert "refused a value or a statement" in job.error


async def test_the_job_of_a_killed_process_is_resumed_without_repeated_requests(service_of):
    with ChatServer() as server:
        service = await service_of(server)
        jobs = jobs_of(service)
        job = await jobs.describe.add("pets", DescribeRequest(answers=1), accept=False)
        assert await jobs.queue.repository.claim(DESCRIBE, "a dead process", 0.2)
        await service.jobs.describe.describe("pets@1", DescribeRequest(classes=("cat",), answers=1), no_progress)
        jobs.queue.start()
        finished = await wait_until_finished(jobs, job)
        await jobs.queue.close()
    assert finished.status is JobStatus.SUCCEEDED
    assert finished.result["answered_before"] == 4
    assert len(server.prompts) == len(set(server.prompts)) == 8


async def no_progress(done, total):
    pass


async def test_a_shutdown_releases_the_job_for_another_process(service_of):
    with ChatServer([slow()]) as server:
        service = await service_of(server)
        first = jobs_of(service, lease_s=3600)
        first.queue.start()
        job = await first.describe.add("pets", DescribeRequest(answers=1), accept=False)
        assert await asyncio.to_thread(server.received_one.wait, 10)
        await first.queue.close()
        assert (await first.queue.repository.get(job.id)).status is JobStatus.QUEUED
        server.release.set()
        second = jobs_of(service, lease_s=3600)
        second.queue.start()
        assert (await wait_until_finished(second, job)).status is JobStatus.SUCCEEDED
        await second.queue.close()


async def test_cancelling_stops_the_work_in_this_process_and_in_another(service_of):
    for elsewhere in (False, True):
        with ChatServer(afterwards=slow()) as server:
            service = await service_of(server)
            jobs = jobs_of(service)
            jobs.queue.start()
            job = await jobs.describe.add("pets", DescribeRequest(answers=1), accept=False)
            assert await asyncio.to_thread(server.received_one.wait, 10)
            canceller = jobs_of(service) if elsewhere else jobs
            assert (await canceller.queue.cancel(job.id)).status is JobStatus.CANCELLED

            async def nothing_runs(jobs=jobs):
                return not jobs.queue._running

            await until(nothing_runs)
            prompts = len(server.prompts)
            server.release.set()
            await asyncio.sleep(0.05)
            assert len(server.prompts) == prompts <= 2
            assert (await jobs.queue.repository.get(job.id)).status is JobStatus.CANCELLED
            await jobs.queue.close()


async def test_a_temporary_database_failure_does_not_stop_the_queue(service_of, monkeypatch):
    with ChatServer() as server:
        service = await service_of(server)
        jobs = jobs_of(service)
        claim, failures = jobs.queue.repository.claim, 3

        async def away(*arguments):
            nonlocal failures
            if failures:
                failures -= 1
                raise StoreError("away")
            return await claim(*arguments)

        monkeypatch.setattr(jobs.queue.repository, "claim", away)
        jobs.queue.start()
        job = await wait_until_finished(jobs, await jobs.describe.add("pets", DescribeRequest(answers=1), accept=False))
        await jobs.queue.close()
    assert failures == 0
    assert job.status is JobStatus.SUCCEEDED


# --- example images ------------------------------------------------------------------------------------------------

CLASSES = ("tomato", "leaf", "sky")


@pytest.fixture
async def things_of(settings):
    """Return a function that opens a service with an encoder and a label set; services are closed after the test."""
    async with AsyncExitStack() as stack:

        async def opened(encoder):
            service = await stack.enter_async_context(
                open_service(settings.model_copy(update={"max_queued_images": 256}), [encoder])
            )
            await service.label_sets.put("things", [ClassEntry(name) for name in CLASSES], "{}")
            return service

        yield opened


async def teach(service, per_class=4):
    """Add labelled examples."""
    pairs = [(shade(kind, number), name) for number in range(per_class) for kind, name in enumerate(CLASSES)]
    images, names = zip(*pairs, strict=True)
    await service.examples.add("things", await service.examples.prepare("things", images, [(name,) for name in names]))


@pytest.fixture
def folder(tmp_path):
    """Return a folder with seventy images in subfolders named after classes."""
    root = tmp_path / "import"
    for number in range(70):
        place = root / "garden" / CLASSES[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:02}.png").write_bytes(shade(number % 3, number))
    return root


async def only_job(jobs, kind):
    (job,) = [item for item in await jobs.queue.repository.list(100) if item.kind == kind]
    return job


async def test_a_selection_job_stores_its_selection_and_fits_the_method(things_of):
    service = await things_of(FakeEncoder())
    await teach(service)
    jobs = jobs_of(service)
    jobs.queue.start()
    job = await wait_until_finished(jobs, await jobs.select_method.add("things"))
    await jobs.queue.close()
    assert job.status is JobStatus.SUCCEEDED
    assert (job.kind, job.subject) == (SELECT_METHOD, "things")
    result = job.result["models"]["fake"]
    selection = await service.selection_reader.stored(await service.label_sets.get("things"), None)
    assert selection.is_current
    assert selection.result["method"] == result["method"]
    assert not {"calibrations", "rejection"} & set(result)
    task = await service.resolver.resolve(ClassifyRequest(label_set="things"))
    assert task.method == result["method"]


async def test_jobs_are_counted_and_timed_by_kind_and_outcome(things_of):
    service, metrics = await things_of(FakeEncoder()), Metrics()
    jobs = jobs_of(service, metrics=metrics)
    jobs.queue.start()
    await wait_until_finished(
        jobs, await jobs.build_captions.add("good", BuildPlan(model="fake", captions=("a red ball",)))
    )
    failed = await wait_until_finished(
        jobs, await jobs.build_captions.add("bad", BuildPlan(model="fake", captions=("ab",)))
    )
    await jobs.queue.close()
    assert failed.status is JobStatus.FAILED

    def sample(name, **labels):
        return metrics.registry.get_sample_value(name, {"kind": "build-captions", **labels})

    assert [sample("deixis_jobs_total", outcome=outcome) for outcome in ("succeeded", "failed")] == [1, 1]
    assert sample("deixis_job_seconds_count") == 2
    assert sample("deixis_jobs_running") == 0


async def test_a_queued_selection_job_is_not_duplicated_but_a_running_one_is(things_of):
    service = await things_of(FakeEncoder())
    await service.label_sets.put("others", [ClassEntry("cat")], "{}")
    jobs = jobs_of(service)
    first = await jobs.select_method.add("things")
    assert {(await jobs.select_method.add("things")).id for _ in range(5)} == {first.id}
    other = await jobs.select_method.add("others")
    assert other.id != first.id
    claimed, _ = await jobs.queue.repository.claim(SELECT_METHOD, "somebody", 60)
    assert claimed.id == first.id
    second = await jobs.select_method.add("things")
    assert second.id not in {first.id, other.id}
    assert (await jobs.select_method.add("things")).id == second.id


async def test_a_selection_job_for_a_deleted_label_set_fails_with_an_error(things_of):
    service = await things_of(FakeEncoder())
    jobs = jobs_of(service)
    job = await jobs.select_method.add("things")
    await service.label_sets.delete("things")
    jobs.queue.start()
    failed = await wait_until_finished(jobs, job)
    await jobs.queue.close()
    assert failed.status is JobStatus.FAILED
    assert "unknown label set 'things'" in failed.error


async def test_the_selection_job_of_a_killed_process_is_run_by_another(things_of):
    service = await things_of(FakeEncoder())
    await teach(service)
    jobs = jobs_of(service)
    job = await jobs.select_method.add("things")
    assert await jobs.queue.repository.claim(SELECT_METHOD, "a dead process", 0.2)
    jobs.queue.start()
    assert (await wait_until_finished(jobs, job)).status is JobStatus.SUCCEEDED
    await jobs.queue.close()
    assert (await service.selection_reader.stored(await service.label_sets.get("things"), None)).is_current


async def test_a_selection_is_repeated_if_the_examples_change_during_it(things_of):
    encoder = GatedEncoder()
    encoder.texts_open.clear()
    try:
        service = await things_of(encoder)
        await teach(service)
        jobs = jobs_of(service, lease_s=60)
        jobs.queue.start()
        first = await jobs.select_method.add("things")
        assert await asyncio.to_thread(encoder.texts_entered.acquire, timeout=10)

        async def running():
            return (await jobs.queue.repository.get(first.id)).status is JobStatus.RUNNING

        await until(running)
        await service.examples.delete("things", classname="sky")
        second = await jobs.select_method.add("things")
    finally:
        encoder.open()
    assert second.id != first.id
    assert {(await wait_until_finished(jobs, job)).status for job in (first, second)} == {JobStatus.SUCCEEDED}
    await jobs.queue.close()
    selection = await service.selection_reader.stored(await service.label_sets.get("things"), None)
    assert selection.is_current
    assert selection.result["labelled"] == 8


async def test_an_import_adds_a_folder_and_starts_a_selection(things_of, folder):
    encoder = FakeEncoder()
    service = await things_of(encoder)
    jobs = jobs_of(service, import_dir=folder)
    jobs.queue.start()
    job = await wait_until_finished(
        jobs, await jobs.import_images.add("things", "garden", by_subfolder=True, classnames=())
    )
    assert (job.status, job.done, job.total) == (JobStatus.SUCCEEDED, 70, 70)
    assert job.result == {
        "added": 70,
        "relabelled": 0,
        "duplicates": 0,
        "skipped_count": 0,
        "skipped": [],
        "job": job.result["job"],
    }
    trial = await wait_until_finished(jobs, await jobs.queue.repository.get(job.result["job"]))
    await jobs.queue.close()
    assert trial.kind == SELECT_METHOD
    assert trial.status is JobStatus.SUCCEEDED
    assert dict((await service.examples.counts("things")).labelled) == {"tomato": 24, "leaf": 23, "sky": 23}
    assert sum(encoder.image_batches) == 70


async def test_the_import_of_a_killed_process_is_resumed_without_encoding_images_twice(things_of, folder):
    encoder = FakeEncoder()
    service = await things_of(encoder)
    jobs = jobs_of(service, import_dir=folder)
    job = await jobs.import_images.add("things", "garden", by_subfolder=False, classnames=("leaf",))
    assert await jobs.queue.repository.claim(IMPORT_IMAGES, "a dead process", 0.2)
    images = [file.read_bytes() for file in sorted(folder.rglob("*.png"))[:40]]
    await service.examples.add("things", await service.examples.prepare("things", images, [("leaf",)] * 40))
    assert sum(encoder.image_batches) == 40
    jobs.queue.start()
    finished = await wait_until_finished(jobs, job)
    await jobs.queue.close()
    assert finished.status is JobStatus.SUCCEEDED
    assert (finished.result["added"], finished.result["duplicates"]) == (30, 40)
    assert sum(encoder.image_batches) == 70
    assert dict((await service.examples.counts("things")).labelled) == {"leaf": 70}


class Halting(GatedEncoder):
    """Closes its own gate after 32 images, the batch size of an import."""

    def __init__(self):
        super().__init__()
        self.halted, self.released = threading.Event(), False

    def encode_images(self, pixels):
        if sum(self.image_batches) >= 32 and not self.released:
            self.images_open.clear()
            self.halted.set()
        return super().encode_images(pixels)

    def open(self):
        self.released = True
        super().open()


async def test_a_stopped_import_keeps_its_images_and_another_process_adds_the_rest(things_of, folder):
    encoder = Halting()
    service = await things_of(encoder)
    first = jobs_of(service, import_dir=folder, lease_s=3600)
    first.queue.start()
    try:
        job = await first.import_images.add("things", "garden", by_subfolder=True, classnames=())
        assert await asyncio.to_thread(encoder.halted.wait, 10)
        await first.queue.close()
        stopped = await first.queue.repository.get(job.id)
    finally:
        encoder.open()
    assert (stopped.status, stopped.done, stopped.total) == (JobStatus.QUEUED, 32, 70)
    assert sum((await service.examples.counts("things")).labelled.values()) == 32
    second = jobs_of(service, import_dir=folder, lease_s=3600)
    second.queue.start()
    finished = await wait_until_finished(second, job)
    await second.queue.close()
    assert finished.status is JobStatus.SUCCEEDED
    assert (finished.result["added"], finished.result["duplicates"]) == (38, 32)
    assert sum((await service.examples.counts("things")).labelled.values()) == 70


async def test_an_import_encodes_images_again_that_are_deleted_meanwhile(things_of, folder, monkeypatch):
    service = await things_of(FakeEncoder())
    await teach(service)
    jobs = jobs_of(service, import_dir=folder)
    prepare, deletions = service.examples.prepare, 1

    async def then_deleted(*arguments, **options):
        nonlocal deletions
        prepared = await prepare(*arguments, **options)
        if deletions:
            deletions -= 1
            await service.examples.delete("things", everything=True)
        return prepared

    monkeypatch.setattr(service.examples, "prepare", then_deleted)
    jobs.queue.start()
    job = await wait_until_finished(
        jobs, await jobs.import_images.add("things", "garden", by_subfolder=True, classnames=())
    )
    await jobs.queue.close()
    assert (job.status, job.result["added"]) == (JobStatus.SUCCEEDED, 70)
    counts = await service.examples.counts("things")
    assert (sum(counts.labelled.values()), counts.without_features) == (70, 0)


async def test_file_names_that_are_not_utf8_do_not_end_an_import(things_of, folder):
    service = await things_of(FakeEncoder())
    leaves = os.fsencode(folder / "garden" / "leaf")
    for name, content in ((b"bad caf\xe9.png", b"nonsense"), (b"good caf\xe9.png", shade(1, 90))):
        with open(leaves + b"/" + name, "wb") as file:  # noqa: ASYNC230, PTH123 - a path of bytes
            file.write(content)
    jobs = jobs_of(service, import_dir=folder)
    jobs.queue.start()
    job = await wait_until_finished(
        jobs, await jobs.import_images.add("things", "garden", by_subfolder=True, classnames=())
    )
    assert (job.status, job.result["added"]) == (JobStatus.SUCCEEDED, 71)
    assert [skipped["file"] for skipped in job.result["skipped"]] == [r"leaf/bad caf\xe9.png"]
    os.rename(leaves, os.fsencode(folder / "garden") + b"/l\xe9af")  # noqa: PTH104 - a path of bytes
    failed = await wait_until_finished(
        jobs, await jobs.import_images.add("things", "garden", by_subfolder=True, classnames=())
    )
    assert failed.status is JobStatus.FAILED
    assert r"unknown class 'l\xe9af'" in failed.error
    await jobs.queue.close()


class _Broken(JobHandler):
    """Fails as its request says."""

    kind = "broken"

    async def run(self, job, attachment, advance):
        match job.request["how"]:
            case "unstorable result":
                return {"file": "\udce9"}
            case "lost task":
                raise asyncio.CancelledError
            case "exception":
                "\udce9".encode()
        return {}


@pytest.mark.parametrize("how", ["unstorable result", "lost task", "exception"])
async def test_whatever_a_handler_does_fails_its_job_and_the_next_one_runs(things_of, how):
    service = await things_of(FakeEncoder())
    queue = JobQueue(service.jobs.queue.repository, poll_s=0.02)
    queue.register(_Broken())
    queue.start()
    jobs = replace(service.jobs, queue=queue)
    failed = await wait_until_finished(jobs, await queue.repository.add("broken", "things", {"how": how}))
    fine = await wait_until_finished(jobs, await queue.repository.add("broken", "things", {"how": "not"}))
    await queue.close()
    assert (failed.status, fine.status) == (JobStatus.FAILED, JobStatus.SUCCEEDED)
    assert failed.error


async def test_an_unexpected_error_of_the_queue_is_counted_and_the_next_job_runs(things_of, monkeypatch):
    service, metrics = await things_of(FakeEncoder()), Metrics()
    jobs = jobs_of(service, metrics=metrics)
    repository, failures = jobs.queue.repository, 2
    claim = repository.claim

    async def broken(*arguments):
        nonlocal failures
        if failures:
            failures -= 1
            raise UnicodeEncodeError("utf-8", "x", 0, 1, "surrogates not allowed")
        return await claim(*arguments)

    monkeypatch.setattr(repository, "claim", broken)
    jobs.queue.start()
    await wait_until_finished(jobs, await jobs.select_method.add("things"))
    await jobs.queue.close()
    counted = [
        metrics.registry.get_sample_value("deixis_loop_failures_total", {"loop": f"jobs {handler.kind}"})
        for handler in jobs.handlers
    ]
    assert sum(counted) == 2


async def test_a_job_whose_process_died_three_times_has_failed_with_the_reason(things_of):
    service, metrics = await things_of(FakeEncoder()), Metrics()
    jobs = jobs_of(service, metrics=metrics)
    job = await jobs.select_method.add("things")
    for number in range(3):
        assert await jobs.queue.repository.claim(SELECT_METHOD, f"a dead process {number}", -1)
    jobs.queue.start()
    failed = await wait_until_finished(jobs, job)
    await jobs.queue.close()
    assert failed.status is JobStatus.FAILED
    assert "3 processes of the service ended" in failed.error
    counted = metrics.registry.get_sample_value("deixis_jobs_total", {"kind": SELECT_METHOD, "outcome": "failed"})
    assert counted == 1


async def test_an_import_reports_at_most_a_hundred_skipped_files(things_of, folder):
    service = await things_of(FakeEncoder())
    for number in range(130):
        (folder / "garden" / "leaf" / f"bad {number}.png").write_bytes(b"nonsense")
    jobs = jobs_of(service, import_dir=folder)
    jobs.queue.start()
    job = await wait_until_finished(
        jobs, await jobs.import_images.add("things", "garden", by_subfolder=True, classnames=())
    )
    await jobs.queue.close()
    assert (job.result["added"], job.result["skipped_count"], len(job.result["skipped"])) == (70, 130, 100)
    assert (job.done, job.total) == (200, 200)


async def test_a_cancelled_import_stops_and_keeps_its_images(things_of, folder):
    encoder = GatedEncoder()
    service = await things_of(encoder)
    encoder.images_open.clear()
    try:
        jobs = jobs_of(service, import_dir=folder)
        jobs.queue.start()
        job = await jobs.import_images.add("things", "garden", by_subfolder=True, classnames=())
        assert await asyncio.to_thread(encoder.images_entered.acquire, timeout=10)
        assert (await jobs.queue.cancel(job.id)).status is JobStatus.CANCELLED
    finally:
        encoder.open()

    async def nothing_runs():
        return not jobs.queue._running

    await until(nothing_runs)
    await jobs.queue.close()
    assert (await service.examples.counts("things")).labelled == {}
    with pytest.raises(ConflictError):
        await jobs.queue.cancel(job.id)


async def test_an_invalid_import_creates_no_job_or_fails_it(things_of, folder):
    service = await things_of(FakeEncoder())
    jobs = jobs_of(service, import_dir=folder)
    for name, place, error in [
        ("none", "garden", UnknownNameError),
        ("things", "..", InvalidFieldError),
        ("things", "nowhere", InvalidFieldError),
    ]:
        with pytest.raises(error):
            await jobs.import_images.add(name, place, by_subfolder=False, classnames=())
    with pytest.raises(InvalidFieldError, match="DEIXIS_IMPORT_DIR"):
        await jobs_of(service).import_images.add("things", "garden", by_subfolder=False, classnames=())
    assert await jobs.queue.repository.list(10) == []
    job = await jobs.import_images.add("things", "garden", by_subfolder=True, classnames=())
    await service.label_sets.put("things", [ClassEntry("tomato"), ClassEntry("leaf")], "{}")
    jobs.queue.start()
    failed = await wait_until_finished(jobs, job)
    await jobs.queue.close()
    assert failed.status is JobStatus.FAILED
    assert "unknown class 'sky'" in failed.error
    assert (await service.examples.counts("things")).revision == 0


async def test_an_evaluation_on_stored_examples_has_no_attachment(things_of):
    service = await things_of(FakeEncoder())
    await teach(service)
    jobs = jobs_of(service)
    job = await jobs.evaluate.add(await service.label_sets.find("things@1"), "fake", None)
    jobs.queue.start()
    finished = await wait_until_finished(jobs, job)
    await jobs.queue.close()
    assert finished.kind == EVALUATE
    assert finished.status is JobStatus.SUCCEEDED
    assert (finished.result["images"], finished.result["folds"], finished.result["skipped"]) == (12, 4, [])
