"""Jobs in the database: their owner, progress and result.

A process that runs a job holds a lease on it and renews it. If the process dies, the lease expires, and any process
with the same database takes the job over and starts it again. Data that the job has written stays. A job whose process
died ``MAX_ATTEMPTS`` times has failed, because it may be what ends the processes.

Namespaces take turns: the next job of a kind is the oldest one of the namespace whose jobs of this kind were started
the longest time ago.
"""

import asyncio
import uuid
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, cast

from sqlalchemy import CursorResult, and_, delete, func, or_, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import aliased, undefer

from app.errors import UnknownNameError
from app.names.namespaces import Namespace, namespace_of
from app.store.database import reading, writing
from app.store.label_sets import belongs_to, escape_surrogates
from app.store.tables import JobRow

KEPT_DAYS = 30
"""The time after which a finished job is deleted."""

MAX_ATTEMPTS = 3
"""The number of processes that may end while they run a job; then it has failed."""

# A lease lasts seconds. Later times were written before the clock of their process was set back.
_MAX_LEASE = timedelta(hours=1)

BUILD_CAPTIONS = "build-captions"
"""The kind of job whose subject is a caption database; the subject of all other jobs is a label set."""


class JobStatus(StrEnum):
    """The status of a job; the last three are final."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


FINAL = frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED})


@dataclass(frozen=True, slots=True)
class Job:
    """A snapshot of a job; ``done`` of ``total`` steps are done, and ``total`` is 0 while it is not known.

    ``JobRepository.list`` and ``cancel`` return it without its request and its result, which may be large.
    """

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
    """Jobs by id; ``owner`` is a text that is unique to a process."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._added: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)

    def added(self, kind: str) -> asyncio.Event:
        """Return the event that is set when this process adds a job of a kind."""
        return self._added[kind]

    async def add(
        self, kind: str, subject: str, request: Mapping[str, Any], *, total: int = 0, attachment: bytes | None = None
    ) -> Job:
        """Queue a job, and delete the jobs that finished long ago.

        Args:
            kind: selects the handler that runs it.
            subject: the qualified name of its label set or caption database.
            request: any JSON object, for the handler.
            total: the number of steps, if it is known.
            attachment: data that is too large for JSON.
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
            result=None,
            attempts=0,
            namespace=namespace_of(subject).name,
        )
        async with writing(self._engine) as session:
            await session.execute(delete(JobRow).where(JobRow.finished_at < now - timedelta(days=KEPT_DAYS)))
            session.add(row)
        self._added[kind].set()
        return _to_job(row, whole=True)

    async def add_unless(
        self, statuses: Collection[JobStatus], kind: str, subject: str, request: Mapping[str, Any]
    ) -> tuple[Job, bool]:
        """Queue a job unless one of its kind and subject has one of ``statuses``; also return whether it did."""
        waiting = (
            select(JobRow)
            .where(JobRow.kind == kind, JobRow.subject == subject, JobRow.status.in_(statuses))
            .order_by(JobRow.created_at)
            .limit(1)
            .options(*_WHOLE)
        )
        async with reading(self._engine) as session:
            row = await session.scalar(waiting)
        # Two jobs that are added at the same moment only do the same work twice.
        return (await self.add(kind, subject, request), True) if row is None else (_to_job(row, whole=True), False)

    async def get(self, job_id: str, namespace: Namespace | None = None) -> Job:
        """Return a job.

        Raises:
            UnknownNameError: there is no job with this id, or its subject belongs to another namespace.
        """
        async with reading(self._engine) as session:
            row = await session.get(JobRow, _storable(job_id), options=_WHOLE)
            if row is None or not (namespace is None or namespace.contains(row.subject)):
                raise _unknown(job_id)
            return _to_job(row, whole=True)

    async def list(self, limit: int, after: str | None = None, namespace: Namespace | None = None) -> Sequence[Job]:
        """Return at most ``limit`` jobs that are older than the job ``after``, the newest first.

        ``namespace`` limits them to subjects of this namespace.

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
        """Lease the next job of a kind that no process runs; return it with its attachment, or None.

        A job that has ended ``MAX_ATTEMPTS`` processes is not leased but returned as failed.
        """
        now = datetime.now(UTC)
        expired = or_(JobRow.lease_until < now, JobRow.lease_until > now + _MAX_LEASE)
        free = and_(
            JobRow.kind == kind,
            or_(JobRow.status == JobStatus.QUEUED, and_(JobRow.status == JobStatus.RUNNING, expired)),
        )
        waiting = (
            select(JobRow.namespace, func.min(JobRow.created_at).label("since"))
            .where(free)
            .group_by(JobRow.namespace)
            .subquery()
        )
        other = aliased(JobRow)
        last_started = (
            select(func.max(other.started_at))
            .where(other.kind == kind, other.namespace == waiting.c.namespace, other.started_at < now + _MAX_LEASE)
            .scalar_subquery()
        )
        turn = select(waiting.c.namespace).order_by(last_started.nulls_first(), waiting.c.since).limit(1)
        statement = (
            select(JobRow.id)
            .where(free, JobRow.namespace == turn.scalar_subquery())
            .order_by(JobRow.created_at, JobRow.id)
            .limit(1)
        )
        async with reading(self._engine) as session:
            if await session.scalar(statement) is None:
                return None  # without the write lock, which every look would else take
        async with writing(self._engine) as session:
            claimed = await session.scalar(statement.with_for_update(skip_locked=True))
            if claimed is None:
                return None
            row = await session.get_one(JobRow, claimed, options=[*_WHOLE, undefer(JobRow.attachment)])
            if row.owner != owner:  # a process that finds its own job again has not ended
                row.attempts += 1
            if row.attempts > MAX_ATTEMPTS:
                row.status, row.error, row.finished_at = JobStatus.FAILED, _ended_processes(row.id), now
                row.attachment = row.lease_until = None
            else:
                row.status, row.owner, row.started_at = JobStatus.RUNNING, owner, now
                row.lease_until = now + timedelta(seconds=lease_s)
            return _to_job(row, whole=True), row.attachment

    async def renew(self, job_id: str, owner: str, lease_s: float) -> bool:
        """Extend the lease; returns False if the job has another owner or status, and must be stopped."""
        return await self._change(job_id, owner, lease_until=datetime.now(UTC) + timedelta(seconds=lease_s))

    async def advance(self, job_id: str, owner: str, done: int, total: int) -> bool:
        """Store the progress of the job; returns False as ``renew``."""
        return await self._change(job_id, owner, done=done, total=total)

    async def finish(
        self, job_id: str, owner: str, *, result: Mapping[str, Any] | None = None, error: str | None = None
    ) -> bool:
        """Store the result of the job, or its error; returns False as ``renew``."""
        return await self._change(
            job_id,
            owner,
            status=JobStatus.SUCCEEDED if error is None else JobStatus.FAILED,
            result=None if result is None else dict(result),
            error=None if error is None else escape_surrogates(error).replace("\0", "\\0"),
            attachment=None,
            lease_until=None,
            finished_at=datetime.now(UTC),
        )

    async def release(self, job_id: str, owner: str) -> bool:
        """End the lease, so that another process can take the job; returns False as ``renew``.

        This does not count as an attempt.
        """
        return await self._change(
            job_id, owner, status=JobStatus.QUEUED, owner=None, lease_until=None, attempts=JobRow.attempts - 1
        )

    async def postpone(self, job_id: str, owner: str) -> bool:
        """Let the job start again when its lease ends, without counting an attempt; returns False as ``renew``."""
        return await self._change(job_id, owner, owner=None, attempts=JobRow.attempts - 1)

    async def cancel(self, job_id: str) -> Job:
        """Cancel a job; its owner notices when it renews the lease. A finished job is not changed.

        Raises:
            UnknownNameError: there is no job with this id.
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


_WHOLE = (undefer(JobRow.request), undefer(JobRow.result))


def _to_job(row: JobRow, *, whole: bool = False) -> Job:
    return Job(
        row.id,
        row.kind,
        row.subject,
        JobStatus(row.status),
        row.request if whole else {},
        row.done,
        row.total,
        row.result if whole else None,
        row.error,
        row.created_at,
        row.finished_at,
    )


def _ended_processes(job_id: str) -> str:
    return (
        f"{MAX_ATTEMPTS} processes of the service ended while they ran this job, so it is not started again; it may"
        f" need more memory than there is. The log shows when job {job_id} was started: see what ended the process"
        " then, and send less data at a time"
    )


def _storable(job_id: str) -> str:
    """Return an id that both databases accept; ids consist of ASCII characters."""
    return job_id if job_id.isascii() and job_id.isprintable() else ""


def _unknown(job_id: str) -> UnknownNameError:
    shown = job_id.encode("utf-8", "backslashreplace").decode()
    return UnknownNameError("job", shown, way_out="`GET /v1/jobs` lists those that are kept")
