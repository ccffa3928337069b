"""A job is run by one process at a time; after a process died, another one takes over its jobs."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import event, update

from app.errors import UnknownNameError
from app.store.database import writing
from app.store.jobs import KEPT_DAYS, MAX_ATTEMPTS, JobRepository, JobStatus
from app.store.tables import JobRow

pytestmark = pytest.mark.anyio


@pytest.fixture
def jobs(engine):
    return JobRepository(engine)


async def test_an_added_job_is_returned_unchanged(jobs):
    added = await jobs.add("describe", "pets", {"accept": True, "classes": None}, total=4)
    found = await jobs.get(added.id)
    assert found == added
    assert (found.kind, found.subject, found.status) == ("describe", "pets", JobStatus.QUEUED)
    assert found.request == {"accept": True, "classes": None}
    assert (found.done, found.total, found.result, found.error, found.finished_at) == (0, 4, None, None, None)


async def test_jobs_are_claimed_once_in_order_and_by_kind(jobs):
    first = await jobs.add("describe", "a", {})
    other = await jobs.add("evaluate", "b", {}, attachment=b"\x00\xff")
    second = await jobs.add("describe", "c", {})
    assert [await claim_one(jobs, "describe", "one"), await claim_one(jobs, "describe", "two")] == [first.id, second.id]
    assert await jobs.claim("describe", "one", 60) is None
    job, attachment = await jobs.claim("evaluate", "one", 60)
    assert (job.id, job.status, attachment) == (other.id, JobStatus.RUNNING, b"\x00\xff")


async def claim_one(jobs, kind, owner, lease_s=60):
    claimed = await jobs.claim(kind, owner, lease_s)
    return None if claimed is None else claimed[0].id


async def test_concurrent_workers_claim_different_jobs(jobs):
    added = {(await jobs.add("describe", "a", {})).id for _ in range(6)}
    found = await asyncio.gather(*(claim_one(jobs, "describe", f"owner {number}") for number in range(12)))
    claimed = [item for item in found if item is not None]
    assert len(claimed) == len(set(claimed))
    # A worker that found the row locked polls again later.
    while (more := await claim_one(jobs, "describe", "late")) is not None:
        claimed.append(more)
    assert sorted(claimed) == sorted(added)


async def test_an_expired_lease_is_taken_over_and_its_first_owner_cannot_write(jobs):
    job = await jobs.add("describe", "a", {})
    assert await claim_one(jobs, "describe", "dead", lease_s=-1) == job.id
    assert await claim_one(jobs, "describe", "alive") == job.id
    assert not await jobs.renew(job.id, "dead", 60)
    assert not await jobs.advance(job.id, "dead", 1, 2)
    assert not await jobs.finish(job.id, "dead", result={})
    assert not await jobs.release(job.id, "dead")
    assert (await jobs.get(job.id)).status is JobStatus.RUNNING


async def test_a_lease_of_a_process_whose_clock_was_a_day_ahead_is_taken_over(jobs):
    job = await jobs.add("describe", "a", {})
    assert await claim_one(jobs, "describe", "dead", lease_s=86_400) == job.id
    assert await claim_one(jobs, "describe", "alive") == job.id
    assert await jobs.claim("describe", "another", 60) is None


async def test_a_renewed_lease_does_not_expire(jobs):
    job = await jobs.add("describe", "a", {})
    await jobs.claim("describe", "one", -1)
    assert await jobs.renew(job.id, "one", 60)
    assert await jobs.claim("describe", "two", 60) is None


async def test_progress_and_result_are_stored_and_the_attachment_is_deleted(jobs, engine):
    job = await jobs.add("evaluate", "a", {}, attachment=b"features")
    await jobs.claim("evaluate", "one", 60)
    assert await jobs.advance(job.id, "one", 2, 3)
    assert ((await jobs.get(job.id)).done, (await jobs.get(job.id)).total) == (2, 3)
    assert await jobs.finish(job.id, "one", result={"accuracy": 0.5})
    found = await jobs.get(job.id)
    assert (found.status, found.result, found.error) == (JobStatus.SUCCEEDED, {"accuracy": 0.5}, None)
    assert abs(found.finished_at - datetime.now(UTC)) < timedelta(minutes=1)
    async with writing(engine) as session:
        assert await session.scalar(update(JobRow).values(done=9).returning(JobRow.attachment)) is None


async def test_a_failed_job_has_an_error(jobs):
    job = await jobs.add("describe", "a", {})
    await jobs.claim("describe", "one", 60)
    await jobs.finish(job.id, "one", error="no answer")
    found = await jobs.get(job.id)
    assert (found.status, found.result, found.error) == (JobStatus.FAILED, None, "no answer")
    assert await jobs.claim("describe", "one", -1) is None


async def test_a_released_job_is_claimed_by_the_next_worker(jobs):
    job = await jobs.add("describe", "a", {})
    await jobs.claim("describe", "one", 60)
    assert await jobs.release(job.id, "one")
    assert await claim_one(jobs, "describe", "two") == job.id


async def test_a_job_can_be_cancelled_in_every_state_except_finished(jobs):
    waiting, running, finished = [await jobs.add(kind, "a", {}) for kind in ("w", "r", "f")]
    await jobs.claim("r", "one", 60)
    await jobs.claim("f", "one", 60)
    await jobs.finish(finished.id, "one", result={})
    assert (await jobs.cancel(waiting.id)).status is JobStatus.CANCELLED
    assert (await jobs.cancel(running.id)).status is JobStatus.CANCELLED
    assert (await jobs.cancel(finished.id)).status is JobStatus.SUCCEEDED
    assert await jobs.claim("w", "one", 60) is None
    assert not await jobs.renew(running.id, "one", 60)
    assert not await jobs.finish(running.id, "one", result={})
    assert (await jobs.get(running.id)).finished_at is not None


@pytest.mark.parametrize("job_id", ["nothing", "", "\x00", "\ud800", "jöb"])
async def test_an_unknown_job_id_is_an_error(jobs, job_id):
    for call in (jobs.get, jobs.cancel):
        with pytest.raises(UnknownNameError, match=r"unknown job .*GET /v1/jobs"):
            await call(job_id)
    with pytest.raises(UnknownNameError):
        await jobs.list(10, after=job_id)


async def test_jobs_are_listed_newest_first_in_pages(jobs):
    added = [(await jobs.add("describe", "a", {})).id for _ in range(5)]
    pages, after = [], None
    while page := await jobs.list(2, after=after):
        pages.append([job.id for job in page])
        after = page[-1].id
    assert [len(page) for page in pages] == [2, 2, 1]
    assert [job_id for page in pages for job_id in page] == added[::-1]


async def test_only_old_finished_jobs_are_deleted(jobs, engine):
    old, recent, running = [await jobs.add(kind, "a", {}) for kind in ("o", "n", "r")]
    for kind, job in (("o", old), ("n", recent)):
        await jobs.claim(kind, "one", 60)
        await jobs.finish(job.id, "one", result={})
    async with writing(engine) as session:
        long_ago = datetime.now(UTC) - timedelta(days=KEPT_DAYS + 1)
        await session.execute(update(JobRow).where(JobRow.id == old.id).values(finished_at=long_ago))
        await session.execute(update(JobRow).where(JobRow.id == running.id).values(created_at=long_ago))
    new = await jobs.add("describe", "a", {})
    assert {job.id for job in await jobs.list(10)} == {recent.id, running.id, new.id}


async def test_a_listing_loads_neither_requests_nor_results(jobs, engine):
    job = await jobs.add("evaluate", "a", {"truth": [0] * 1000})
    await jobs.claim("evaluate", "one", 60)
    await jobs.finish(job.id, "one", result={"accuracy": 0.5})
    statements = []
    event.listen(engine.sync_engine, "before_cursor_execute", lambda *call: statements.append(call[2]))
    newest = await jobs.add("evaluate", "a", {})
    statements.clear()
    listed = [*await jobs.list(10), *await jobs.list(10, after=newest.id)]
    assert [(item.result, item.request) for item in listed] == [(None, {})] * 3
    assert not any(f"jobs.{column}" in text for column in ("result", "request", "attachment") for text in statements)
    assert (await jobs.get(job.id)).result == {"accuracy": 0.5}


async def test_a_job_that_ends_its_processes_fails_after_three(jobs):
    job = await jobs.add("describe", "a", {}, attachment=b"x")
    behind = await jobs.add("describe", "a", {})
    for number in range(MAX_ATTEMPTS):
        assert await claim_one(jobs, "describe", f"dead {number}", lease_s=-1) == job.id
    failed, attachment = await jobs.claim("describe", "alive", 60)
    assert (failed.id, failed.status, attachment) == (job.id, JobStatus.FAILED, None)
    assert "3 processes of the service ended while they ran this job" in failed.error
    assert (await jobs.get(job.id)).error == failed.error
    assert await claim_one(jobs, "describe", "alive") == behind.id


async def test_a_job_that_is_handed_back_does_not_lose_an_attempt(jobs):
    job = await jobs.add("describe", "a", {})
    for number in range(2 * MAX_ATTEMPTS):
        assert await claim_one(jobs, "describe", f"stopped {number}") == job.id
        assert await jobs.release(job.id, f"stopped {number}")
    for number in range(2 * MAX_ATTEMPTS):
        assert await claim_one(jobs, "describe", f"without a database {number}", lease_s=-1) == job.id
        assert await jobs.postpone(job.id, f"without a database {number}")
    for _ in range(2 * MAX_ATTEMPTS):  # an owner that lost its lease has not ended
        assert await claim_one(jobs, "describe", "slow", lease_s=-1) == job.id
    assert (await jobs.get(job.id)).status is JobStatus.RUNNING


async def test_namespaces_take_turns_however_many_jobs_one_of_them_adds(jobs):
    for number in range(20):
        await jobs.add("describe", f"busy#{number}", {})
    await jobs.add("describe", "open", {})
    await jobs.add("describe", "other#a", {})
    await jobs.add("evaluate", "third#a", {})
    claimed = [(await jobs.claim("describe", f"owner {number}", 60))[0].subject for number in range(4)]
    assert claimed == ["busy#0", "open", "other#a", "busy#1"]
    await jobs.add("describe", "other#b", {})
    assert (await jobs.claim("describe", "owner", 60))[0].subject == "other#b"
    assert (await jobs.claim("describe", "owner", 60))[0].subject == "busy#2"


async def test_a_namespace_whose_job_was_started_by_a_clock_a_day_ahead_has_its_turn(jobs, engine):
    started = await jobs.add("describe", "acme#a", {})
    await claim_one(jobs, "describe", "one")
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    async with writing(engine) as session:
        await session.execute(update(JobRow).where(JobRow.id == started.id).values(started_at=tomorrow))
    waiting = await jobs.add("describe", "acme#b", {})
    for number in range(2):
        await jobs.add("describe", f"other#{number}", {})
    claimed = [await claim_one(jobs, "describe", "one") for _ in range(2)]
    assert waiting.id in claimed


async def test_an_error_message_that_no_database_stores_is_escaped(jobs):
    job = await jobs.add("describe", "a", {})
    await jobs.claim("describe", "one", 60)
    await jobs.finish(job.id, "one", error="caf\udce9\0")
    assert (await jobs.get(job.id)).error == r"caf\udce9\0"
