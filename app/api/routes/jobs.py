"""Background jobs: their progress, their results, and cancelling them."""

from typing import Annotated

from fastapi import Query

from app.api.auth.access import CallerDependency
from app.api.dependencies import JobQueueDependency
from app.api.routing import guarded_router
from app.api.schemas.jobs import JobBody, JobList, JobSummary

router = guarded_router(prefix="/v1/jobs", tags=["jobs"])


@router.get("")
async def list_jobs(
    jobs: JobQueueDependency,
    caller: CallerDependency,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str | None, Query(description="`next_after` of the previous page.")] = None,
) -> JobList:
    """List jobs without their results, newest first, one page at a time. Finished jobs are kept for 30 days."""
    found = await jobs.repository.list(limit=limit + 1, after=after, namespace=caller.namespace)
    page = found[:limit]
    return JobList(jobs=[JobSummary.of(job) for job in page], next_after=page[-1].id if len(found) > limit else None)


@router.get("/{job_id}")
async def get_job(job_id: str, jobs: JobQueueDependency, caller: CallerDependency) -> JobBody:
    """Return a job with its progress and its result."""
    return JobBody.of(await jobs.repository.get(job_id, caller.namespace))


@router.delete("/{job_id}")
async def cancel_job(job_id: str, jobs: JobQueueDependency, caller: CallerDependency) -> JobBody:
    """Cancel a job. What it has written already is kept."""
    return JobBody.of(await jobs.cancel(job_id, caller.namespace))
