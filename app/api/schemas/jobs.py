"""Background jobs."""

from datetime import datetime
from typing import Any

from pydantic import Field

from app.api.schemas._base import Response
from app.names.namespaces import namespace_of, own_name
from app.store.jobs import BUILD_CAPTIONS, Job, JobStatus


class JobBody(Response):
    """Work that goes on after its request was answered."""

    id: str
    kind: str = Field(description="`describe`, `evaluate`, `select-method`, `import-images` or `build-captions`.")
    label_set: str | None = Field(description="That it is about; null for `build-captions`.")
    database: str | None = Field(description="That is built; null for others.")
    status: JobStatus
    done: int = Field(description="RemoteSteps that are done.")
    total: int = Field(description="Of so many; 0 before they are counted.")
    result: dict[str, Any] | None = Field(description="Of a job that succeeded; docs/http-api.md shows it.")
    error: str | None = Field(description="Of a job that failed.")
    created_at: datetime
    finished_at: datetime | None

    @classmethod
    def of(cls, job: Job) -> "JobBody":
        """Return the job as it is told to callers."""
        return cls(
            id=job.id,
            kind=job.kind,
            label_set=None if job.kind == BUILD_CAPTIONS else own_name(job.subject),
            database=own_name(job.subject) if job.kind == BUILD_CAPTIONS else None,
            status=job.status,
            done=job.done,
            total=job.total,
            result=None if job.result is None else dict(job.result),
            error=None if job.error is None else namespace_of(job.subject).hide(job.error),
            created_at=job.created_at,
            finished_at=job.finished_at,
        )


class JobList(Response):
    """A page of jobs, the newest first."""

    jobs: list[JobBody]
    next_after: str | None = Field(description="`after` of the next page; null on the last.")
