"""The job queue: runs jobs from the database under a lease, one job of each kind at a time.

A job is written before its request is answered, so it runs whatever happens to the process. An interrupted job starts
again, in this process or in another one with the same database.
"""

import asyncio
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar, TypeAlias

import structlog

from app.errors import ConflictError, DeixisError, StoreError
from app.names.namespaces import Namespace
from app.observability.loops import Loops, Progressed
from app.observability.metrics import Metrics
from app.runtime.turns import Turns, in_background
from app.store.jobs import Job, JobRepository, JobStatus

log = structlog.get_logger()

# A loop makes progress at each look for jobs, and at each renewal of the lease of its job.
_STALLED_AFTER_LEASES = 4

Advance: TypeAlias = Callable[[int, int], Awaitable[object]]
"""Called with the number of finished steps and the number of all steps."""


class JobHandler(ABC):
    """Runs the jobs of one kind."""

    kind: ClassVar[str]

    @abstractmethod
    async def run(self, job: Job, attachment: bytes | None, advance: Advance) -> Mapping[str, Any]:
        """Run a job from its beginning, and return its result.

        Raises:
            StoreError: the job starts again later.
            DeixisError: the job fails with this message.
        """

    def cancelled(self, job: Job) -> None:  # noqa: B027 - most kinds have nothing to do
        """Called when a job is cancelled that no process runs."""


class JobQueue:
    """Runs jobs.

    Args:
        repository: stores them.
        metrics: counts and times them.
        loops: runs a loop for each kind of job.
        turns: that jobs take with requests; None if there are no requests to make way for.
        lease_s: seconds without a sign of life after which a process is taken for dead and its jobs are taken over.
        poll_s: seconds between looks for jobs that other processes added.
    """

    def __init__(
        self,
        repository: JobRepository,
        *,
        metrics: Metrics | None = None,
        loops: Loops | None = None,
        turns: Turns | None = None,
        lease_s: float = 15,
        poll_s: float = 3,
    ) -> None:
        self.repository = repository
        self._metrics = metrics or Metrics()
        self._loops = loops or Loops(self._metrics)
        self._turns = turns
        self._lease_s = lease_s
        self._poll_s = poll_s
        self._owner = uuid.uuid4().hex
        self._handlers: dict[str, JobHandler] = {}
        self._running: dict[str, asyncio.Task[Mapping[str, Any]]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._closing = False

    def register(self, handler: JobHandler) -> None:
        """Add the handler of a kind of job; before ``start``."""
        self._handlers[handler.kind] = handler

    def start(self) -> None:
        """Start to run jobs."""
        self._tasks = [
            asyncio.create_task(
                self._loops.run(
                    f"jobs {kind}", partial(self._take, kind), stalled_after_s=_STALLED_AFTER_LEASES * self._lease_s
                )
            )
            for kind in self._handlers
        ]

    async def close(self) -> None:
        """Stop, and release running jobs for the next process."""
        self._closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def cancel(self, job_id: str, namespace: Namespace | None = None) -> Job:
        """Stop a job; raises as ``JobRepository.get``, and ``ConflictError`` if it has finished."""
        before = await self.repository.get(job_id, namespace)
        job = await self.repository.cancel(job_id)
        if before.finished_at is not None:
            raise ConflictError(
                f"job '{job_id}' has already {job.status}; only queued and running jobs can be cancelled"
            )
        if job_id in self._running:
            self._running[job_id].cancel()
        else:
            self._handlers[job.kind].cancelled(job)
        return job

    async def _take(self, kind: str, progressed: Progressed) -> None:
        """Run one job of a kind after another; a loop for ``Loops.run``."""
        added = self.repository.added(kind)
        while True:
            added.clear()
            try:
                claimed = await self.repository.claim(kind, self._owner, self._lease_s)
                if claimed is not None:
                    await self._run_or_fail(*claimed, progressed)
                progressed()
                if claimed is not None:
                    continue
            except StoreError as error:
                progressed()  # the probe of the database reports this
                log.warning("job_store_unreachable", kind=kind, reason=error.message)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._poll_s):
                    await added.wait()

    async def _run_or_fail(self, job: Job, attachment: bytes | None, progressed: Progressed) -> None:
        """Run a claimed job; one that has ended too many processes is only reported."""
        if job.status is JobStatus.FAILED:
            self._metrics.jobs.labels(job.kind, "failed").inc()
            log.error("job_given_up", job=job.id, kind=job.kind, subject=job.subject, reason=job.error)
            self._handlers[job.kind].cancelled(job)
            return
        try:
            await self._run(job, attachment, progressed)
        except StoreError:
            with suppress(StoreError):
                await self.repository.postpone(job.id, self._owner)
            raise

    async def _run(self, job: Job, attachment: bytes | None, progressed: Progressed) -> None:
        log.info("job_started", job=job.id, kind=job.kind, subject=job.subject)

        async def advance(done: int, total: int) -> None:
            if not await self.repository.advance(job.id, self._owner, done, total):
                raise asyncio.CancelledError

        with in_background(self._turns):
            work = asyncio.ensure_future(self._handlers[job.kind].run(job, attachment, advance))
        self._running[job.id] = work
        began = time.perf_counter()
        self._metrics.jobs_running.labels(job.kind).inc()
        renewing = asyncio.create_task(self._renew(job, work, progressed))
        try:
            await asyncio.wait([work])
        finally:  # reached by cancellation when the service stops
            renewing.cancel()
            work.cancel()
            await asyncio.gather(work, renewing, return_exceptions=True)
            del self._running[job.id]
            self._metrics.jobs_running.labels(job.kind).dec()
            self._metrics.job_seconds.labels(job.kind).observe(time.perf_counter() - began)
            self._metrics.jobs.labels(job.kind, _outcome(work, closing=self._closing)).inc()
            if self._closing:
                with suppress(StoreError):
                    await self.repository.release(job.id, self._owner)
        if work.cancelled():
            log.info("job_cancelled", job=job.id, kind=job.kind)
            if not self._closing:  # changes nothing if the job was cancelled or taken over
                await self.repository.finish(job.id, self._owner, error="the work ended without a result")
            return
        match work.exception():
            case None:
                try:
                    await self.repository.finish(job.id, self._owner, result=work.result())
                except StoreError:
                    raise
                except Exception as error:  # noqa: BLE001 - as an error of the work
                    await self._fail(job, error)  # the result cannot be stored, now or later
                else:
                    log.info("job_finished", job=job.id, kind=job.kind)
            case StoreError() as error:
                raise error  # the lease expires, and the job starts again
            case DeixisError() as error:
                await self.repository.finish(job.id, self._owner, error=error.message)
                log.warning("job_failed", job=job.id, kind=job.kind, reason=error.message)
            case error:
                await self._fail(job, error)

    async def _fail(self, job: Job, error: BaseException) -> None:
        """Report an unexpected error, whose text is for the log only."""
        log.error("job_failed", job=job.id, kind=job.kind, exc_info=error)
        message = f"the service failed ({type(error).__name__}); its log has more about job {job.id}"
        await self.repository.finish(job.id, self._owner, error=message)

    async def _renew(self, job: Job, work: "asyncio.Future[Any]", progressed: Progressed) -> None:
        """Renew the lease, and stop the work if another process has taken the job over."""
        while True:
            await asyncio.sleep(self._lease_s / 3)
            try:
                if not await self.repository.renew(job.id, self._owner, self._lease_s):
                    work.cancel()
                    return
            except StoreError as error:
                log.warning("job_store_unreachable", job=job.id, reason=error.message)
            except Exception:
                # Tried again: without a lease, another process would run the job at the same time.
                self._metrics.loop_failures.labels("lease renewal").inc()
                log.exception("lease_not_renewed", job=job.id)
            progressed()


def _outcome(work: "asyncio.Future[Any]", *, closing: bool) -> str:
    if work.cancelled():
        return "interrupted" if closing else "cancelled"
    match work.exception():
        case None:
            return "succeeded"
        case StoreError():
            return "interrupted"
        case _:
            return "failed"
