"""Jobs in the database: who may run one, how far it is, and what came of it.

A process that runs a job holds a lease on it and renews it. Where the process dies, the lease ends by itself and any
process with the same database takes the job over, from its beginning; what a job wrote before stays.
"""

import asyncio
import uuid
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, cast

from sqlalchemy import CursorResult, and_, delete, or_, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import undefer

from app.errors import UnknownNameError
from app.names.namespaces import Namespace
from app.store.database import reading, writing
from app.store.label_sets import belongs_to
from app.store.tables import JobRow

KEPT_DAYS = 30
"""A job is forgotten this long after it finished."""


BUILD_CAPTIONS = "build-captions"
"""The kind of jobs whose subject is a caption database; that of all others is a label set."""


class JobStatus(StrEnum):
    """Where a job is; the last three are final."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


FINAL = frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED})


@dataclass(frozen=True, slots=True)
class Job:
    """A job as it was at one moment; ``done`` of ``total`` steps, and ``total`` 0 as long as nobody has counted."""

    id: str
    kind: str
    subject: str
    status: JobStatus
    request: Mapping[str, Any]
    done: int
    total: int
    result: Mapping[str, Any] | None
    error: str | None
    created_at: datetime
    finished_at: datetime | None


class JobRepository:
    """Jobs by id; ``owner`` is any text that no other process has."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._added: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)

    def added(self, kind: str) -> asyncio.Event:
        """Return the event that is set whenever this process adds a job of a kind."""
        return self._added[kind]

    async def add(
        self, kind: str, subject: str, request: Mapping[str, Any], *, total: int = 0, attachment: bytes | None = None
    ) -> Job:
        """Write a job to be run; jobs that finished long ago are forgotten on this occasion.

        Args:
            kind: names what runs it.
            subject: the name of the label set or the database that it is about.
            request: whatever JSON can hold; given to what runs it.
            total: steps, where they are known.
            attachment: what is too large for JSON.
        """
        now = datetime.now(UTC)
        row = JobRow(
            id=uuid.uuid4().hex,
            kind=kind,
            subject=subject,
            status=JobStatus.QUEUED,
            request=dict(request),
            attachment=attachment,
            done=0,
            total=total,
            created_at=now,
        )
        async with writing(self._engine) as session:
            await session.execute(delete(JobRow).where(JobRow.finished_at < now - timedelta(days=KEPT_DAYS)))
            session.add(row)
        self._added[kind].set()
        return _to_job(row)

    async def add_unless(
        self, statuses: Collection[JobStatus], kind: str, subject: str, request: Mapping[str, Any]
    ) -> tuple[Job, bool]:
        """Write a job unless there is one of that kind about that subject in one of the states; tell if it was."""
        waiting = (
            select(JobRow)
            .where(JobRow.kind == kind, JobRow.subject == subject, JobRow.status.in_(statuses))
            .order_by(JobRow.created_at)
            .limit(1)
        )
        async with reading(self._engine) as session:
            row = await session.scalar(waiting)
        # Two that are written at the same moment do the same work twice, and no harm.
        return (await self.add(kind, subject, request), True) if row is None else (_to_job(row), False)

    async def get(self, job_id: str, namespace: Namespace | None = None) -> Job:
        """Return a job.

        Raises:
            UnknownNameError: there is none of that id, or it is about something of another namespace.
        """
        async with reading(self._engine) as session:
            row = await session.get(JobRow, _storable(job_id))
            if row is None or not (namespace is None or namespace.contains(row.subject)):
                raise _unknown(job_id)
            return _to_job(row)

    async def list(self, limit: int, after: str | None = None, namespace: Namespace | None = None) -> Sequence[Job]:
        """Return at most ``limit`` jobs, the newest first, beginning behind the one with the id ``after``.

        ``namespace`` is that of what they are about; by default they are about anything.

        Raises:
            UnknownNameError: there is no job ``after``.
        """
        statement = select(JobRow).order_by(JobRow.created_at.desc(), JobRow.id.desc()).limit(limit)
        if namespace is not None:
            statement = statement.where(belongs_to(JobRow.subject, namespace))
        async with reading(self._engine) as session:
            if after is not None:
                last = await session.get(JobRow, _storable(after))
                if last is None or not (namespace is None or namespace.contains(last.subject)):
                    raise _unknown(after)
                statement = statement.where(tuple_(JobRow.created_at, JobRow.id) < tuple_(last.created_at, last.id))
            return [_to_job(row) for row in await session.scalars(statement)]

    async def claim(self, kind: str, owner: str, lease_s: float) -> tuple[Job, bytes | None] | None:
        """Take the oldest job of a kind that nobody runs, with its attachment; None where there is none."""
        now = datetime.now(UTC)
        free = or_(
            JobRow.status == JobStatus.QUEUED, and_(JobRow.status == JobStatus.RUNNING, JobRow.lease_until < now)
        )
        statement = select(JobRow.id).where(JobRow.kind == kind, free).order_by(JobRow.created_at, JobRow.id).limit(1)
        async with reading(self._engine) as session:
            if await session.scalar(statement) is None:
                return None  # without the write lock, which every look would else take
        async with writing(self._engine) as session:
            claimed = await session.scalar(statement.with_for_update(skip_locked=True))
            if claimed is None:
                return None
            row = await session.get_one(JobRow, claimed, options=[undefer(JobRow.attachment)])
            row.status, row.owner, row.lease_until = JobStatus.RUNNING, owner, now + timedelta(seconds=lease_s)
            return _to_job(row), row.attachment

    async def renew(self, job_id: str, owner: str, lease_s: float) -> bool:
        """Make the lease longer; False where the job is not the owner's any more, and has to be stopped."""
        return await self._change(job_id, owner, lease_until=datetime.now(UTC) + timedelta(seconds=lease_s))

    async def advance(self, job_id: str, owner: str, done: int, total: int) -> bool:
        """Note how far the job is; False as ``renew``."""
        return await self._change(job_id, owner, done=done, total=total)

    async def finish(
        self, job_id: str, owner: str, *, result: Mapping[str, Any] | None = None, error: str | None = None
    ) -> bool:
        """Note what came of the job: its result, or why there is none; False as ``renew``."""
        return await self._change(
            job_id,
            owner,
            status=JobStatus.SUCCEEDED if error is None else JobStatus.FAILED,
            result=None if result is None else dict(result),
            error=error,
            attachment=None,
            lease_until=None,
            finished_at=datetime.now(UTC),
        )

    async def release(self, job_id: str, owner: str) -> bool:
        """Give the job back, to be taken by the next process that looks; False as ``renew``."""
        return await self._change(job_id, owner, status=JobStatus.QUEUED, owner=None, lease_until=None)

    async def cancel(self, job_id: str) -> Job:
        """Stop a job where it is; its owner finds out. A job that is final stays as it is.

        Raises:
            UnknownNameError: there is none of that id.
        """
        async with writing(self._engine) as session:
            row = await session.get(JobRow, _storable(job_id), with_for_update=True)
            if row is None:
                raise _unknown(job_id)
            if row.status not in FINAL:
                row.status, row.finished_at = JobStatus.CANCELLED, datetime.now(UTC)
                row.attachment = row.lease_until = None
            return _to_job(row)

    async def _change(self, job_id: str, holder: str, **values: Any) -> bool:
        mine = and_(JobRow.id == job_id, JobRow.owner == holder, JobRow.status == JobStatus.RUNNING)
        async with writing(self._engine) as session:
            changed = await session.execute(update(JobRow).where(mine).values(**values))
            return cast("CursorResult[Any]", changed).rowcount == 1


def _to_job(row: JobRow) -> Job:
    return Job(
        row.id,
        row.kind,
        row.subject,
        JobStatus(row.status),
        row.request,
        row.done,
        row.total,
        row.result,
        row.error,
        row.created_at,
        row.finished_at,
    )


def _storable(job_id: str) -> str:
    """Return an id that both databases can be asked for; ids are made of ASCII only."""
    return job_id if job_id.isascii() and job_id.isprintable() else ""


def _unknown(job_id: str) -> UnknownNameError:
    shown = job_id.encode("utf-8", "backslashreplace").decode()
    return UnknownNameError("job", shown, way_out="`GET /v1/jobs` lists those that are kept")
