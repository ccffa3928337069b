"""Background jobs."""

from datetime import datetime
from typing import Any, Self

from pydantic import Field

from app.api.schemas._base import Response
from app.names.namespaces import namespace_of, own_name
from app.store.jobs import BUILD_CAPTIONS, Job, JobStatus


class JobSummary(Response):
    """A background job in a list, without its result."""

    id: str
    kind: str = Field(description="`describe`, `evaluate`, `select-method`, `import-images` or `build-captions`.")
    label_set: str | None = Field(description="The label set it works on; null for `build-captions`.")
    database: str | None = Field(description="The caption database that `build-captions` builds; null for other kinds.")
    status: JobStatus
    done: int = Field(description="Number of finished steps.")
    total: int = Field(description="Number of all steps; 0 before they are counted.")
    error: str | None = Field(description="The error message of a failed job.")
    created_at: datetime
    finished_at: datetime | None

    @classmethod
    def of(cls, job: Job) -> Self:
        """Convert a stored job; other namespaces are removed from its error message."""
        return cls(**_fields(job))


class JobBody(JobSummary):
    """A background job."""

    result: dict[str, Any] | None = Field(
        description="The result of a succeeded job; docs/http-api.md describes it for each kind."
    )

    @classmethod
    def of(cls, job: Job) -> Self:
        """Convert a stored job with its result."""
        return cls(**_fields(job), result=None if job.result is None else dict(job.result))


def _fields(job: Job) -> dict[str, Any]:
    return {
        "id": job.id,
        "kind": job.kind,
        "label_set": None if job.kind == BUILD_CAPTIONS else own_name(job.subject),
        "database": own_name(job.subject) if job.kind == BUILD_CAPTIONS else None,
        "status": job.status,
        "done": job.done,
        "total": job.total,
        "error": None if job.error is None else namespace_of(job.subject).hide(job.error),
        "created_at": job.created_at,
        "finished_at": job.finished_at,
    }


class JobList(Response):
    """A page of jobs, newest first."""

    jobs: list[JobSummary]
    next_after: str | None = Field(description="Pass as `after` to get the next page; null on the last page.")
