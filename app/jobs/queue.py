"""Work that outlives the request that asked for it: taken from the database, one job of each kind at a time.

A job is written before its request is answered, so that it is run whatever happens to the process; where a job was
interrupted, it is begun anew, by this process or another one with the same database.
"""

import asyncio
import json
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import structlog

from app.adapters._base import Examples
from app.captions.plan import WORDNET, BuildPlan
from app.classification.service import ClassifyRequest, Service
from app.describing.describer import DescribeRequest
from app.errors import (
    ClientError,
    ConflictError,
    DeixisError,
    InvalidFieldError,
    ServerError,
    StoreError,
    TooLargeError,
)
from app.images.discovery import files_within, folder_within, import_images
from app.names.namespaces import Namespace, namespace_of, own_name
from app.observability.metrics import Metrics
from app.selection.comparison import TrainingData, compare
from app.selection.trial import tried_images, try_for_every_model
from app.store.examples import NewExample
from app.store.jobs import BUILD_CAPTIONS, Job, JobRepository, JobStatus
from app.types import ImageFeatures

log = structlog.get_logger()

DESCRIBE = "describe"
EVALUATE = "evaluate"
TRY_METHODS = "try-methods"
IMPORT_IMAGES = "import-images"

# Of captions, in one build.
_MAX_FILES = 1000
# Files that an import reads and encodes together.
_IMPORTED_AT_ONCE = 32
# Of the files that an import leaves out, so many are named.
_TOLD_SKIPPED = 100

_Advance: TypeAlias = Callable[[int, int], Awaitable[None]]
_Handler: TypeAlias = Callable[[Job, bytes | None, _Advance], Awaitable[Mapping[str, Any]]]


class Jobs:
    """Takes jobs, and runs them.

    Args:
        repository: keeps them.
        service: does the work.
        metrics: told of every job; by default nobody reads them.
        import_dir: folder from which images and captions may be imported; None for none.
        lease_s: a process that was not heard of for so long is taken to be dead, and its jobs are taken over.
        poll_s: how often to look for jobs of other processes.
    """

    def __init__(
        self,
        repository: JobRepository,
        service: Service,
        *,
        metrics: Metrics | None = None,
        import_dir: Path | None = None,
        lease_s: float = 15,
        poll_s: float = 3,
    ) -> None:
        self.repository = repository
        self._metrics = metrics or Metrics()
        self._import_dir = import_dir
        self._service = service
        self._lease_s = lease_s
        self._poll_s = poll_s
        self._owner = uuid.uuid4().hex
        self._handlers: Mapping[str, _Handler] = {
            DESCRIBE: self._describe,
            EVALUATE: self._evaluate,
            TRY_METHODS: self._try_methods,
            IMPORT_IMAGES: self._import_images,
            BUILD_CAPTIONS: self._build_captions,
        }
        self._added = {kind: asyncio.Event() for kind in self._handlers}
        self._running: dict[str, asyncio.Task[Mapping[str, Any]]] = {}
        self._loops: list[asyncio.Task[None]] = []
        self._closing = False

    def start(self) -> None:
        """Begin to run jobs."""
        self._service.choices.on_untried = self._try_unless_trying
        self._loops = [asyncio.create_task(self._take(kind)) for kind in self._handlers]

    async def close(self) -> None:
        """Stop, and give back what is under way for the next process."""
        self._closing = True
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)

    async def describe(self, reference: str, request: DescribeRequest, *, accept: bool) -> Job:
        """Take the job of describing a label set's classes; raises as ``Describer.estimate``.

        Args:
            reference: ``name`` or ``name@version``.
            request: what to ask.
            accept: take every draft over at the end.
        """
        label_set = await self._service.find_label_set(reference)
        await self._service.estimate_descriptions(label_set.reference, request)  # so that nonsense is refused at once
        stored = {"label_set": label_set.reference, "accept": accept, "describe": request.to_json()}
        return await self._add(DESCRIBE, label_set.name, stored)

    async def evaluate(
        self,
        question: ClassifyRequest,
        image_features: ImageFeatures,
        truth: Sequence[int],
        skipped: Sequence[Mapping[str, Any]],
    ) -> Job:
        """Take the job of comparing every method on images.

        Args:
            question: a label set as ``name@version``, a model and a template or None.
            image_features: unit rows (n, d) of the question's model.
            truth: the class of each image, by index.
            skipped: which other images are left out and why, for the result.
        """
        assert question.label_set is not None
        stored = {
            "label_set": question.label_set,
            "model": question.model,
            "template": question.template,
            "truth": [int(index) for index in truth],
            "skipped": list(skipped),
        }
        name = question.namespace.reference(question.label_set).name
        return await self._add(EVALUATE, name, stored, np.ascontiguousarray(image_features, np.float32).tobytes())

    async def evaluate_stored(self, question: ClassifyRequest) -> Job:
        """Take the job of comparing every method on the labelled examples of a label set, each held out in turn."""
        assert question.label_set is not None
        stored = {"label_set": question.label_set, "model": question.model, "template": question.template}
        name = question.namespace.reference(question.label_set).name
        return await self._add(EVALUATE, name, stored)

    async def try_methods(self, name: str) -> Job:
        """Take the job of trying the methods on a label set's examples, unless one waits to be begun."""
        job, _ = await self.repository.add_unless({JobStatus.QUEUED}, TRY_METHODS, name, {})
        self._added[TRY_METHODS].set()
        return job

    async def _try_unless_trying(self, name: str) -> bool:
        """Take the job unless there is one; one that is running may yet come to what a request has found untried."""
        states = {JobStatus.QUEUED, JobStatus.RUNNING}
        _, added = await self.repository.add_unless(states, TRY_METHODS, name, {})
        self._added[TRY_METHODS].set()
        return added

    async def import_images(self, name: str, folder: str, *, by_subfolder: bool, classname: str | None) -> Job:
        """Take the job of adding the images of a folder of the server; raises as ``folder_within``.

        Args:
            name: of a label set.
            folder: below ``DEIXIS_IMPORT_DIR``.
            by_subfolder: each subfolder is called like the class of its images.
            classname: of all images; None for unlabelled ones.
        """
        label_set = await self._service.find_label_set(name)
        folder_within(self._import_dir, folder)
        stored = {"folder": folder, "by_subfolder": by_subfolder, "class": classname}
        return await self._add(IMPORT_IMAGES, label_set.name, stored)

    async def build_captions(self, name: str, plan: BuildPlan) -> Job:
        """Take the job of building a caption database.

        Raises:
            InvalidFieldError: rules that no caption can meet, or files that are not below ``DEIXIS_IMPORT_DIR``.
            UnknownNameError: the model is not served.
            NotConfiguredError: it is to be built of WordNet, which is not there.
        """
        await asyncio.to_thread(self._service.captions.check_plan, plan)
        if len(plan.files) > _MAX_FILES:
            raise TooLargeError(f"{len(plan.files):,} files; at most {_MAX_FILES:,} are read: put them together")
        if plan.files:
            await asyncio.to_thread(files_within, self._import_dir, plan.files)
        return await self._add(BUILD_CAPTIONS, name, plan.to_json(), json.dumps(plan.captions).encode())

    async def build_wordnet(self) -> None:
        """Take the job of building the database that comes with the service, where it is wanted and not there."""
        try:
            plan = await self._service.captions.plan_wordnet()
            if plan is not None:
                states = {JobStatus.QUEUED, JobStatus.RUNNING}
                await self.repository.add_unless(states, BUILD_CAPTIONS, WORDNET, plan.to_json())
                self._added[BUILD_CAPTIONS].set()
        except StoreError as error:
            log.warning("no_default_database", reason=error.message)

    async def cancel(self, job_id: str, namespace: Namespace | None = None) -> Job:
        """Stop a job; raises as ``JobRepository.get``, and ``ConflictError`` where it has finished."""
        before = await self.repository.get(job_id, namespace)
        job = await self.repository.cancel(job_id)
        if before.finished_at is not None:
            raise ConflictError(f"the job '{job_id}' has {job.status} already; there is nothing to cancel")
        if job_id in self._running:
            self._running[job_id].cancel()
        elif job.kind == BUILD_CAPTIONS:
            self._service.captions.databases.expect_no_more(job.subject)
        return job

    async def _add(self, kind: str, subject: str, request: Mapping[str, Any], attachment: bytes | None = None) -> Job:
        job = await self.repository.add(kind, subject, request, attachment=attachment)
        self._added[kind].set()
        return job

    async def _take(self, kind: str) -> None:
        """Run one job of a kind after another, until cancelled."""
        while True:
            self._added[kind].clear()
            try:
                claimed = await self.repository.claim(kind, self._owner, self._lease_s)
                if claimed is not None:
                    await self._run(*claimed)
                    continue
            except StoreError as error:
                log.warning("jobs_not_reached", kind=kind, reason=error.message)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._poll_s):
                    await self._added[kind].wait()

    async def _run(self, job: Job, attachment: bytes | None) -> None:
        log.info("job_started", job=job.id, kind=job.kind, subject=job.subject)

        async def advance(done: int, total: int) -> None:
            if not await self.repository.advance(job.id, self._owner, done, total):
                raise asyncio.CancelledError

        work = asyncio.ensure_future(self._handlers[job.kind](job, attachment, advance))
        self._running[job.id] = work
        began = time.perf_counter()
        self._metrics.jobs_running.labels(job.kind).inc()
        renewing = asyncio.create_task(self._renew(job, work))
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
            return
        match work.exception():
            case None:
                await self.repository.finish(job.id, self._owner, result=work.result())
                log.info("job_finished", job=job.id, kind=job.kind)
            case StoreError() as error:
                raise error  # the lease ends by itself, and the job is begun anew
            case DeixisError() as error:
                await self.repository.finish(job.id, self._owner, error=error.message)
                log.warning("job_failed", job=job.id, kind=job.kind, reason=error.message)
            case error:
                log.error("job_failed", job=job.id, kind=job.kind, exc_info=error)
                told = f"the service failed; its log tells more of the job {job.id}"
                await self.repository.finish(job.id, self._owner, error=told)

    async def _renew(self, job: Job, work: "asyncio.Future[Any]") -> None:
        """Say that this process lives, and stop the work where the job is not its own any more."""
        while True:
            await asyncio.sleep(self._lease_s / 3)
            try:
                if not await self.repository.renew(job.id, self._owner, self._lease_s):
                    work.cancel()
                    return
            except StoreError as error:
                log.warning("jobs_not_reached", job=job.id, reason=error.message)

    async def _describe(self, job: Job, _attachment: bytes | None, advance: _Advance) -> Mapping[str, Any]:
        request = DescribeRequest.from_json(job.request["describe"])
        accept = job.request["accept"]
        outcome = await self._service.describe(job.request["label_set"], request, advance, accept=accept)
        told = None if outcome.label_set is None else own_name(outcome.label_set)
        return asdict(outcome) | {"label_set": told}

    async def _evaluate(self, job: Job, attachment: bytes | None, advance: _Advance) -> Mapping[str, Any]:
        question = ClassifyRequest(
            label_set=job.request["label_set"],
            model=job.request["model"],
            template=job.request["template"],
            namespace=namespace_of(job.subject),
        )
        label_set = await self._service.find_label_set(str(question.namespace.reference(job.request["label_set"])))
        model = question.model or self._service.pipeline.default_model
        stored = await self._service.examples.features(label_set, model)
        if attachment is None:
            if not len(stored.support_labels):
                raise InvalidFieldError.of("image", f"'{label_set.name}' has no labelled example images to evaluate on")
            if np.bincount(stored.support_labels).max() < 2:
                problem = "no class has two labelled example images, so that none can be held out"
                raise InvalidFieldError.of("image", f"{problem}; add more, or send images to evaluate on")
            kept = tried_images(len(stored.support_labels), len(label_set.classes))
            asked, labels = stored.support_features[kept], stored.support_labels[kept]
            lessons = TrainingData.held_out(asked, labels, stored.pool_features)
            told = await compare(self._service, question, asked, labels.tolist(), advance, lessons)
            return told.to_json() | {"skipped": []}
        truth = job.request["truth"]
        features = np.frombuffer(attachment, np.float32).reshape(len(truth), -1)
        others: TrainingData | None = None
        if len(stored.support_labels) or len(stored.pool_features):
            others = TrainingData(Examples(stored.support_features, stored.support_labels, stored.pool_features))
        told = await compare(self._service, question, features, truth, advance, others)
        return told.to_json() | {"skipped": job.request["skipped"]}

    async def _try_methods(self, job: Job, _attachment: bytes | None, advance: _Advance) -> Mapping[str, Any]:
        """Try them for every model that is served here, and have the chosen ones learn."""
        return {"models": await try_for_every_model(self._service, job.subject, advance)}

    async def _build_captions(self, job: Job, attachment: bytes | None, advance: _Advance) -> Mapping[str, Any]:
        """Build a caption database; what an interrupted run has encoded is not encoded again."""
        plan = BuildPlan.from_json(job.request, json.loads(attachment or b"[]"))
        sources = await asyncio.to_thread(files_within, self._import_dir, plan.files) if plan.files else []

        async def tell(done: int, total: int) -> None:
            # It would be a pity to fail after hours because of how far it is.
            with suppress(StoreError):
                await advance(done, total)

        try:
            manifest = await self._service.captions.build(job.subject, plan, sources, tell)
        except ConflictError as error:  # a command builds it, or a process that was taken for dead: later
            raise StoreError(error.message) from error
        except StoreError as error:  # of its disk, and not of the database that has the jobs
            raise ServerError(error.message) from error
        return {"database": own_name(job.subject), "generation": manifest.generation, **manifest.to_json()}

    async def _import_images(self, job: Job, _attachment: bytes | None, advance: _Advance) -> Mapping[str, Any]:
        """Add the images of a folder; those of an interrupted run are known by their hash and not encoded again."""
        service, request = self._service, job.request
        label_set = await service.label_sets.get(job.subject)
        folder = folder_within(self._import_dir, request["folder"])
        found = await asyncio.to_thread(
            import_images,
            folder,
            label_set.classnames,
            by_subfolder=request["by_subfolder"],
            classname=request["class"],
        )
        counts = {"added": 0, "relabelled": 0, "duplicates": 0}
        skipped: list[dict[str, str]] = []
        max_bytes = service.pipeline.decoders.limits.max_bytes
        for first in range(0, len(found), _IMPORTED_AT_ONCE):
            some = found[first : first + _IMPORTED_AT_ONCE]
            read = [await asyncio.to_thread(_read, file, max_bytes) for file, _ in some]
            prepared = iter(
                await service.examples.prepare(
                    label_set.name,
                    [each for each in read if isinstance(each, bytes)],
                    [classname for (_, classname), each in zip(some, read, strict=True) if isinstance(each, bytes)],
                )
            )
            told = [next(prepared) if isinstance(each, bytes) else each for each in read]
            skipped += [
                {"file": str(file.relative_to(folder)), "problem": each.message}
                for (file, _), each in zip(some, told, strict=True)
                if isinstance(each, ClientError)
            ]
            items = [each for each in told if isinstance(each, NewExample)]
            if items:
                added = await service.examples.add(label_set.name, items)
                for key in counts:
                    counts[key] += getattr(added, key)
            await advance(min(first + _IMPORTED_AT_ONCE, len(found)), len(found))
        trial = await self.try_methods(label_set.name)
        return counts | {"skipped_count": len(skipped), "skipped": skipped[:_TOLD_SKIPPED], "job": trial.id}


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


def _read(file: Path, max_bytes: int) -> bytes | ClientError:
    try:
        size = file.stat().st_size
        if size > max_bytes:
            return InvalidFieldError.of("folder", f"the file has {size:,} bytes and the limit is {max_bytes:,}")
        return file.read_bytes()
    except OSError as error:
        return InvalidFieldError.of("folder", f"cannot be read: {error.strerror or type(error).__name__}")
