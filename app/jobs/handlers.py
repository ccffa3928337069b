"""The kinds of jobs: what adds each to the queue, and what runs it."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from app.adapters._base import Examples
from app.captions.build_plan import BuildPlan
from app.captions.search import CaptionSearch
from app.classification.resolve import Resolver
from app.describing.describer import Describer, Outcome
from app.describing.request import DescribeRequest
from app.errors import ClientError, ConflictError, InvalidFieldError, ServerError, StoreError, TooLargeError
from app.fewshot.examples import ExampleImages
from app.images.discovery import files_within, folder_within, import_images
from app.images.reading import UnreadableFileError, read_image_file
from app.jobs.queue import Advance, JobHandler
from app.label_sets.service import LabelSets
from app.models.registry import ModelRegistry
from app.names.namespaces import own_name
from app.runtime.file_names import file_text
from app.selection.comparison import MethodComparer, TrainingData
from app.selection.multi_label import report_labels
from app.selection.selection import MethodSelector, sampled_images
from app.selection.selection_reader import SELECT_METHOD
from app.store.drafts import DraftRepository
from app.store.examples import Added, NewExample
from app.store.jobs import BUILD_CAPTIONS, Job, JobRepository, JobStatus
from app.types import DraftStatus, ImageFeatures, LabelSet, Task

log = structlog.get_logger()

DESCRIBE = "describe"
EVALUATE = "evaluate"
IMPORT_IMAGES = "import-images"

# Caption files of one build.
_MAX_FILES = 1000
# Files that an import reads and encodes together.
_IMPORT_BATCH = 32
# Skipped files that the result of an import names.
_MAX_SKIPPED = 100


class DescribeJobs(JobHandler):
    """Asks a language model to describe the classes of a label set.

    Args:
        jobs: the queue's repository.
        describer: asks the model, and stores drafts.
        label_sets: by name.
        drafts: undecided descriptions.
    """

    kind = DESCRIBE

    def __init__(
        self, jobs: JobRepository, describer: Describer, label_sets: LabelSets, drafts: DraftRepository
    ) -> None:
        self._jobs = jobs
        self._describer = describer
        self._label_sets = label_sets
        self._drafts = drafts

    async def add(self, reference: str, request: DescribeRequest, *, accept: bool) -> Job:
        """Add a job, after the checks of ``Describer.estimate``.

        Args:
            reference: ``name`` or ``name@version``.
            request: what to ask.
            accept: put every undecided draft into a new version at the end.
        """
        label_set = await self._label_sets.find(reference)
        await self._describer.estimate(label_set, request)
        stored = {"label_set": label_set.reference, "accept": accept, "describe": request.to_json()}
        return await self._jobs.add(DESCRIBE, label_set.name, stored)

    async def describe(
        self, reference: str, request: DescribeRequest, advance: Advance, *, accept: bool = False
    ) -> Outcome:
        """Describe the classes now, without a job; raises as ``Describer.run``."""
        label_set = await self._label_sets.find(reference)
        outcome = await self._describer.run(label_set, request, advance)
        if not (accept and await self._drafts.count(label_set.name, DraftStatus.DRAFT)):
            return outcome
        accepted_in, accepted = await self._label_sets.accept_drafts(label_set.name)
        return replace(outcome, accepted=accepted, label_set=accepted_in.reference)

    async def run(self, job: Job, _attachment: bytes | None, advance: Advance) -> Mapping[str, Any]:
        """Run a job."""
        request = DescribeRequest.from_json(job.request["describe"])
        outcome = await self.describe(job.request["label_set"], request, advance, accept=job.request["accept"])
        label_set = None if outcome.label_set is None else own_name(outcome.label_set)
        return asdict(outcome) | {"label_set": label_set}


class EvaluateJobs(JobHandler):
    """Compares all methods on labelled images.

    Args:
        jobs: the queue's repository.
        comparer: runs the methods.
        label_sets: by name.
        examples: that methods learn from.
        resolver: makes tasks of label sets.
    """

    kind = EVALUATE

    def __init__(
        self,
        jobs: JobRepository,
        comparer: MethodComparer,
        label_sets: LabelSets,
        examples: ExampleImages,
        resolver: Resolver,
    ) -> None:
        self._jobs = jobs
        self._comparer = comparer
        self._label_sets = label_sets
        self._examples = examples
        self._resolver = resolver

    async def add(
        self,
        label_set: LabelSet,
        model: str,
        template: str | None,
        images: tuple[ImageFeatures, Sequence[Sequence[int]]] | None = None,
        skipped: Sequence[Mapping[str, Any]] = (),
        *,
        multi_label: bool = False,
    ) -> Job:
        """Add a job.

        Args:
            label_set: the version to evaluate.
            model: the model that encoded the images.
            template: instead of the label set's templates.
            images: unit rows (n, d) and the classes of each, by index; None evaluates on the label set's labelled
                examples, each held out in turn.
            skipped: images that could not be decoded and why, for the result.
            multi_label: images may have several classes; otherwise each has one.
        """
        stored: dict[str, Any] = {"label_set": label_set.reference, "model": model, "template": template}
        if multi_label:
            stored["multi_label"] = True
        if images is None:
            return await self._jobs.add(EVALUATE, label_set.name, stored)
        features, truth = images
        stored |= {"truth": [list(each) if multi_label else each[0] for each in truth], "skipped": list(skipped)}
        attachment = np.ascontiguousarray(features, np.float32).tobytes()
        return await self._jobs.add(EVALUATE, label_set.name, stored, attachment=attachment)

    async def run(self, job: Job, attachment: bytes | None, advance: Advance) -> Mapping[str, Any]:
        """Run a job."""
        label_set = await self._label_sets.find(job.request["label_set"])
        task = await self._resolver.resolve_label_set(
            label_set, model=job.request["model"], template=job.request["template"], multi_label=False
        )
        if job.request.get("multi_label"):
            return await self._run_multi_label(job, label_set, task, attachment, advance)
        stored = await self._examples.features(label_set, task.model)
        if attachment is None:
            if not len(stored.support_labels):
                raise InvalidFieldError.of("image", f"'{label_set.name}' has no labelled example images to evaluate on")
            if np.bincount(stored.support_labels).max() < 2:
                problem = "no class has two labelled example images, so none can be held out"
                raise InvalidFieldError.of("image", f"{problem}; add more, or send images to evaluate on")
            kept = sampled_images(len(stored.support_labels), len(label_set.classes))
            features, labels = stored.support_features[kept], stored.support_labels[kept]
            training = TrainingData.held_out(features, labels, stored.pool_features)
            comparison = await self._comparer.compare(task, features, labels.tolist(), advance, training)
            return await asyncio.to_thread(comparison.to_json) | {"skipped": []}
        truth = job.request["truth"]
        features = np.frombuffer(attachment, np.float32).reshape(len(truth), -1)
        others: TrainingData | None = None
        if len(stored.support_labels) or len(stored.pool_features):
            others = TrainingData(Examples(stored.support_features, stored.support_labels, stored.pool_features))
        comparison = await self._comparer.compare(task, features, truth, advance, others)
        return await asyncio.to_thread(comparison.to_json) | {"skipped": job.request["skipped"]}

    async def _run_multi_label(
        self, job: Job, label_set: LabelSet, task: Task, attachment: bytes | None, advance: Advance
    ) -> Mapping[str, Any]:
        """Measure how well zero-shot finds several labels per image; nothing is learned but thresholds."""
        if attachment is None:
            stored = await self._examples.labelled_features(label_set, task.model)
            if not len(stored.features):
                raise InvalidFieldError.of("image", f"'{label_set.name}' has no labelled example images to evaluate on")
            kept = sampled_images(len(stored.features), len(label_set.classes))
            features, is_label = stored.features[kept], stored.is_label[kept]
        else:
            truth: Sequence[Sequence[int]] = job.request["truth"]
            features = np.frombuffer(attachment, np.float32).reshape(len(truth), -1)
            is_label = np.zeros((len(truth), len(label_set.classes)), bool)
            for image, classes in enumerate(truth):
                is_label[image, classes] = True
        scores, default = await self._comparer.label_scores(task, features)
        report = await self._comparer.run(partial(report_labels, task.classnames, scores, is_label, default))
        await advance(1, 1)
        return {**report.to_json(), "model": task.model, "skipped": job.request.get("skipped", [])}


class SelectMethodJobs(JobHandler):
    """Selects the method of a label set by its example images.

    Args:
        jobs: the queue's repository.
        selector: compares the methods.
    """

    kind = SELECT_METHOD

    def __init__(self, jobs: JobRepository, selector: MethodSelector) -> None:
        self._jobs = jobs
        self._selector = selector

    async def add(self, name: str) -> Job:
        """Add a job for a label set, or return the one that is queued already."""
        job, _ = await self._jobs.add_unless({JobStatus.QUEUED}, SELECT_METHOD, name, {})
        return job

    async def run(self, job: Job, _attachment: bytes | None, advance: Advance) -> Mapping[str, Any]:
        """Run a job, for every model in service."""
        return {"models": await self._selector.select_for_every_model(job.subject, advance)}


class ImportJobs(JobHandler):
    """Adds the images of a folder on the server to the examples of a label set.

    Args:
        jobs: the queue's repository.
        label_sets: by name.
        examples: encodes and stores the images.
        models: limit the size of a file.
        select_method: selects the method again afterwards.
        import_dir: folder that images may be imported from; None for none.
    """

    kind = IMPORT_IMAGES

    def __init__(
        self,
        jobs: JobRepository,
        label_sets: LabelSets,
        examples: ExampleImages,
        models: ModelRegistry,
        select_method: SelectMethodJobs,
        import_dir: Path | None,
    ) -> None:
        self._jobs = jobs
        self._label_sets = label_sets
        self._examples = examples
        self._models = models
        self._select_method = select_method
        self._import_dir = import_dir

    async def add(self, name: str, folder: str, *, by_subfolder: bool, classnames: tuple[str, ...]) -> Job:
        """Add a job; raises as ``folder_within``.

        Args:
            name: of a label set.
            folder: below ``DEIXIS_IMPORT_DIR``.
            by_subfolder: the name of each subfolder is the class of its images.
            classnames: of all images; none for unlabelled ones.
        """
        label_set = await self._label_sets.find(name)
        folder_within(self._import_dir, folder)
        stored = {"folder": folder, "by_subfolder": by_subfolder, "classes": list(classnames)}
        return await self._jobs.add(IMPORT_IMAGES, label_set.name, stored)

    async def run(self, job: Job, _attachment: bytes | None, advance: Advance) -> Mapping[str, Any]:
        """Run a job; images that an interrupted run has stored are recognised by their hash and not encoded again."""
        request = job.request
        # Earlier releases stored one class.
        classnames = request["classes"] if "classes" in request else [request["class"]] if request["class"] else []
        label_set = await self._label_sets.get(job.subject)
        folder = folder_within(self._import_dir, request["folder"])
        found = await asyncio.to_thread(
            import_images,
            folder,
            label_set.classnames,
            by_subfolder=request["by_subfolder"],
            classes=tuple(classnames),
        )
        counts = {"added": 0, "relabelled": 0, "duplicates": 0}
        skipped: list[dict[str, str]] = []
        for first in range(0, len(found), _IMPORT_BATCH):
            batch = found[first : first + _IMPORT_BATCH]
            prepared, added = await self._prepare_and_add(label_set.name, batch)
            skipped += [
                {"file": file_text(file.relative_to(folder)), "problem": example.message}
                for (file, _), example in zip(batch, prepared, strict=True)
                if isinstance(example, ClientError)
            ]
            if added is not None:
                for key in counts:
                    counts[key] += getattr(added, key)
            await advance(min(first + _IMPORT_BATCH, len(found)), len(found))
        selecting = await self._select_method.add(label_set.name)
        return counts | {"skipped_count": len(skipped), "skipped": skipped[:_MAX_SKIPPED], "job": selecting.id}

    async def _prepare_and_add(
        self, name: str, batch: Sequence[tuple[Path, tuple[str, ...]]]
    ) -> tuple[list[NewExample | ClientError], Added | None]:
        """Return what was read of each file, and what was added; None if no file could be read."""
        while True:
            prepared = await self._prepare(name, batch)
            examples = [example for example in prepared if isinstance(example, NewExample)]
            try:
                return prepared, await self._examples.add(name, examples) if examples else None
            except ConflictError as error:  # images were deleted meanwhile, and must be encoded
                log.info("import_repeated", label_set=name, reason=error.message)

    async def _prepare(
        self, name: str, batch: Sequence[tuple[Path, tuple[str, ...]]]
    ) -> list[NewExample | ClientError]:
        contents = [await asyncio.to_thread(_read, file, self._models.max_image_bytes) for file, _ in batch]
        readable = [
            (content, given) for (_, given), content in zip(batch, contents, strict=True) if isinstance(content, bytes)
        ]
        prepared = iter(
            await self._examples.prepare(name, [content for content, _ in readable], [given for _, given in readable])
        )
        return [next(prepared) if isinstance(content, bytes) else content for content in contents]


class BuildCaptionsJobs(JobHandler):
    """Builds caption databases.

    Args:
        jobs: the queue's repository.
        captions: builds them.
        import_dir: folder that caption files may be read from; None for none.
    """

    kind = BUILD_CAPTIONS

    def __init__(self, jobs: JobRepository, captions: CaptionSearch, import_dir: Path | None) -> None:
        self._jobs = jobs
        self._captions = captions
        self._import_dir = import_dir

    async def add(self, name: str, plan: BuildPlan) -> Job:
        """Add a job.

        Raises:
            InvalidFieldError: rules that no caption can meet, or files outside ``DEIXIS_IMPORT_DIR``.
            UnknownNameError: the model is not in service.
            NotConfiguredError: the source is WordNet, which is not installed.
        """
        await asyncio.to_thread(self._captions.check_plan, plan)
        if len(plan.files) > _MAX_FILES:
            raise TooLargeError(f"{len(plan.files):,} files; at most {_MAX_FILES:,} are allowed: merge some of them")
        if plan.files:
            await asyncio.to_thread(files_within, self._import_dir, plan.files)
        return await self._jobs.add(BUILD_CAPTIONS, name, plan.to_json(), attachment=json.dumps(plan.captions).encode())

    async def add_default(self) -> None:
        """Add the job that builds the default database, if it is wanted and missing."""
        try:
            plan = await self._captions.plan_default()
            if plan is not None:
                unfinished = {JobStatus.QUEUED, JobStatus.RUNNING}
                default = self._captions.catalogue.default
                await self._jobs.add_unless(unfinished, BUILD_CAPTIONS, default, plan.to_json())
        except StoreError as error:
            log.warning("no_default_database", reason=error.message)

    async def run(self, job: Job, attachment: bytes | None, advance: Advance) -> Mapping[str, Any]:
        """Run a job; captions that an interrupted run has encoded are not encoded again."""
        plan = BuildPlan.from_json(job.request, json.loads(attachment or b"[]"))
        sources = await asyncio.to_thread(files_within, self._import_dir, plan.files) if plan.files else []

        async def advance_if_possible(done: int, total: int) -> None:
            # A build of hours must not fail because its progress could not be written.
            with suppress(StoreError):
                await advance(done, total)

        try:
            manifest = await self._captions.build(job.subject, plan, sources, advance_if_possible)
        except ConflictError as error:  # a command, or a process that was taken for dead, is building it: later
            raise StoreError(error.message) from error
        except StoreError as error:  # of the folder of the database, not of the store that holds the jobs
            raise ServerError(error.message) from error
        return {"database": own_name(job.subject), "generation": manifest.generation, **manifest.to_json()}

    def cancelled(self, job: Job) -> None:
        """Answer requests that wait for the database."""
        self._captions.catalogue.withdraw_build(job.subject)


def _read(file: Path, max_bytes: int) -> bytes | ClientError:
    try:
        return read_image_file(file, max_bytes)
    except UnreadableFileError as error:
        return InvalidFieldError.of("folder", str(error))
