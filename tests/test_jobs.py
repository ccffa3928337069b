"""Jobs are run to their end, by whichever process is there."""

import asyncio

import pytest

from app.describer import DescribeRequest
from app.encoders.fake import FakeEncoder
from app.errors import StoreError
from app.jobs import DESCRIBE, Jobs
from app.main import open_service
from app.store.jobs import JobRepository, JobStatus
from app.task import ClassEntry
from tests.describing.chat_server import MODEL, ChatServer, failing, slow

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
async def service_of(settings):
    """Return a function that opens a service that asks a chat server; closed after the test."""
    from contextlib import AsyncExitStack

    async with AsyncExitStack() as stack:

        async def opened(server):
            changed = settings.model_copy(update={"llm_base_url": server.url, "llm_model": MODEL, "llm_concurrency": 2})
            service = await stack.enter_async_context(open_service(changed, [FakeEncoder()]))
            await service.put_label_set("pets", [ClassEntry("cat"), ClassEntry("owl")], "{}")
            return service

        yield opened


def jobs_of(service, **changes):
    return Jobs(JobRepository(service.engine), service, **{"lease_s": 0.3, "poll_s": 0.02, **changes})


async def ended(jobs, job):
    async def finished():
        return (await jobs.repository.get(job.id)).finished_at is not None

    await until(finished)
    return await jobs.repository.get(job.id)


async def until(condition):
    async with asyncio.timeout(20):
        while not await condition():  # noqa: ASYNC110 - what is waited for is in the database
            await asyncio.sleep(0.01)


async def test_a_job_is_run_and_its_result_kept(service_of):
    with ChatServer() as server:
        service = await service_of(server)
        jobs = jobs_of(service)
        jobs.start()
        job = await ended(jobs, await jobs.describe("pets", DescribeRequest(answers=1), accept=True))
        await jobs.close()
    assert job.status is JobStatus.SUCCEEDED
    assert (job.done, job.total) == (8, 8)
    assert job.result["questions"] == 8
    assert job.result["label_set"] == "pets@2"
    assert job.result["accepted"] == job.result["new_drafts"] == 2 * (3 + 3)
    assert all(len(entry.descriptions) == 3 for entry in (await service.find_label_set("pets@2")).classes)


async def test_drafts_wait_for_a_review_unless_they_were_to_be_accepted(service_of):
    with ChatServer() as server:
        service = await service_of(server)
        jobs = jobs_of(service)
        jobs.start()
        job = await ended(jobs, await jobs.describe("pets@1", DescribeRequest(answers=1), accept=False))
        await jobs.close()
    assert (job.result["accepted"], job.result["label_set"]) == (0, None)
    assert (await service.find_label_set("pets")).version == 1


async def test_a_job_that_failed_tells_why_and_the_next_one_is_run(service_of):
    with ChatServer([failing(401)], afterwards=None) as server:
        service = await service_of(server)
        jobs = jobs_of(service)
        jobs.start()
        failed = await ended(jobs, await jobs.describe("pets", DescribeRequest(), accept=False))
        fine = await ended(jobs, await jobs.describe("pets", DescribeRequest(), accept=False))
        await jobs.close()
    assert failed.status is JobStatus.FAILED
    assert "DEIXIS_LLM_API_KEY" in failed.error
    assert fine.status is JobStatus.SUCCEEDED


async def test_a_fault_of_ours_is_logged_and_not_told(service_of, monkeypatch):
    with ChatServer() as server:
        service = await service_of(server)

        async def broken(*_, **__):
            raise ZeroDivisionError("secret")

        monkeypatch.setattr(service, "describe", broken)
        jobs = jobs_of(service)
        jobs.start()
        job = await ended(jobs, await jobs.describe("pets", DescribeRequest(), accept=False))
        await jobs.close()
    assert job.status is JobStatus.FAILED
    assert job.id in job.error
    assert "secret" not in job.error


async def test_a_job_of_a_process_that_died_is_gone_on_with_by_another_and_nothing_is_asked_twice(service_of):
    with ChatServer() as server:
        service = await service_of(server)
        jobs = jobs_of(service)
        job = await jobs.describe("pets", DescribeRequest(answers=1), accept=False)
        assert await jobs.repository.claim(DESCRIBE, "a dead process", 0.2)
        await service.describe("pets@1", DescribeRequest(classes=("cat",), answers=1), unheard)
        jobs.start()
        finished = await ended(jobs, job)
        await jobs.close()
    assert finished.status is JobStatus.SUCCEEDED
    assert finished.result["answered_before"] == 4
    assert len(server.prompts) == len(set(server.prompts)) == 8


async def unheard(done, total):
    pass


async def test_a_stop_gives_the_job_back_and_the_next_process_takes_it_at_once(service_of):
    with ChatServer([slow()]) as server:
        service = await service_of(server)
        first = jobs_of(service, lease_s=3600)
        first.start()
        job = await first.describe("pets", DescribeRequest(answers=1), accept=False)
        assert await asyncio.to_thread(server.received_one.wait, 10)
        await first.close()
        assert (await first.repository.get(job.id)).status is JobStatus.QUEUED
        server.release.set()
        second = jobs_of(service, lease_s=3600)
        second.start()
        assert (await ended(second, job)).status is JobStatus.SUCCEEDED
        await second.close()


async def test_cancelling_stops_the_work_here_and_in_another_process(service_of):
    for elsewhere in (False, True):
        with ChatServer(afterwards=slow()) as server:
            service = await service_of(server)
            jobs = jobs_of(service)
            jobs.start()
            job = await jobs.describe("pets", DescribeRequest(answers=1), accept=False)
            assert await asyncio.to_thread(server.received_one.wait, 10)
            canceller = jobs_of(service) if elsewhere else jobs
            assert (await canceller.cancel(job.id)).status is JobStatus.CANCELLED

            async def nothing_runs(jobs=jobs):
                return not jobs._running

            await until(nothing_runs)
            asked = len(server.prompts)
            server.release.set()
            await asyncio.sleep(0.05)
            assert len(server.prompts) == asked <= 2
            assert (await jobs.repository.get(job.id)).status is JobStatus.CANCELLED
            await jobs.close()


async def test_a_database_that_is_away_for_a_while_does_not_end_the_jobs(service_of, monkeypatch):
    with ChatServer() as server:
        service = await service_of(server)
        jobs = jobs_of(service)
        claim, failures = jobs.repository.claim, 3

        async def away(*arguments):
            nonlocal failures
            if failures:
                failures -= 1
                raise StoreError("away")
            return await claim(*arguments)

        monkeypatch.setattr(jobs.repository, "claim", away)
        jobs.start()
        job = await ended(jobs, await jobs.describe("pets", DescribeRequest(answers=1), accept=False))
        await jobs.close()
    assert failures == 0
    assert job.status is JobStatus.SUCCEEDED
