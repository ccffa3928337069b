"""A service that runs in this process."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from app.captions.build_plan import BuildPlan
from app.captions.catalogue import DatabaseState
from app.captions.query import CaptionQuery
from app.captions.sources import Source
from app.classification.request import ClassifyRequest
from app.cli.backends import conversion
from app.cli.backends._base import CurveFiles, LabelSetInput, OnProgress, read_image
from app.cli.common import MAX_IMAGES_AT_ONCE, cluster_address, loading_models, needs_ray, report_errors, run, status
from app.describing.request import DescribeRequest
from app.errors import ClientError, InvalidFieldError
from app.main import Service, load_encoders, open_service
from app.names.class_names import indices_of
from app.names.namespaces import OPEN_NAMESPACE
from app.observability.logs import configure_logs
from app.selection.comparison import Comparison
from app.selection.learning_curve import LearningCurve, learning_curve
from app.settings import Settings, load_settings
from app.store.examples import NewExample
from app.types import DraftStatus, Task
from deixis import answers

Result = TypeVar("Result")

# Images that are read and encoded together.
_BATCH = 8
_PAGE_SIZE = 1000


class InProcessBackend:
    """A service that runs in this process."""

    def __init__(self, service: Service) -> None:
        self._service = service

    @property
    def default_model(self) -> str:
        """The model of requests that name none."""
        return self._service.models.default

    @property
    def max_image_bytes(self) -> int:
        """The limit of the settings."""
        return self._service.models.max_image_bytes

    async def classify(self, images: Sequence[bytes], request: ClassifyRequest) -> list[answers.ImageResult]:
        """Run the pipeline."""
        task = await self._service.resolver.resolve(request)
        classification = await self._service.pipeline.classify(images, task)
        return [conversion.image_result(result, classification.warnings) for result in classification.results]

    async def pin(self, request: ClassifyRequest) -> ClassifyRequest:
        """Look up the model and the version."""
        reference = request.label_set
        if reference is not None:
            label_set = await self.label_set(reference)
            reference = f"{label_set.name}@{label_set.version}"
        return replace(request, model=request.model or self.default_model, label_set=reference)

    async def compare(
        self,
        request: ClassifyRequest,
        files: Sequence[Path],
        classes: Sequence[str],
        on_progress: OnProgress,
    ) -> tuple[Comparison, list[answers.ImageResult]]:
        """Encode the files once and run all methods."""
        task = await self._service.resolver.resolve(request)
        features, results = await self._encode(task.model, files, on_progress)
        truth = _readable(_class_indices(classes, task), results)
        return await self._service.comparer.compare(task, _stacked(features), truth), results

    async def learning_curve(
        self, request: ClassifyRequest, images: CurveFiles, on_progress: OnProgress
    ) -> tuple[LearningCurve, list[answers.ImageResult]]:
        """Encode the files once, and fit the methods on random draws of them."""
        task = await self._service.resolver.resolve(request)
        total = len(images.files) + len(images.support_files) + len(images.pool_files)
        done = 0

        async def encode(files: Sequence[Path]) -> tuple[np.ndarray, list[answers.ImageResult]]:
            nonlocal done
            if not files:
                return np.zeros((0, self._service.models.get(task.model).encoder.embed_dim), np.float32), []
            before = done
            features, results = await self._encode(
                task.model, files, lambda encoded, _: on_progress(before + encoded, total)
            )
            done += len(files)
            return _stacked(features), results

        features, results = await encode(images.files)
        support_features, support_results = await encode(images.support_files)
        pool_features, pool_results = await encode(images.pool_files)
        curve = await learning_curve(
            self._service.comparer,
            task,
            (features, _readable(_class_indices(images.classes, task), results)),
            (support_features, _readable(_class_indices(images.support_classes, task), support_results)),
            pool_features,
            shots=images.shots,
            draws=images.draws,
            advance=on_progress,
        )
        return curve, [*results, *support_results, *pool_results]

    async def _encode(
        self, model: str, files: Sequence[Path], on_progress: OnProgress
    ) -> tuple[list[np.ndarray], list[answers.ImageResult]]:
        """Return the features (d,) of each readable file, and a result per file with the error of the others."""
        features: list[np.ndarray] = []
        results: list[answers.ImageResult] = []
        for first in range(0, len(files), _BATCH):
            batch = files[first : first + _BATCH]
            contents = [await asyncio.to_thread(read_image, file, self.max_image_bytes) for file in batch]
            encoded = iter(
                await self._service.models.encode_images(
                    model, [content for content in contents if isinstance(content, bytes)]
                )
            )
            for content in contents:
                outcome = next(encoded) if isinstance(content, bytes) else content
                if isinstance(outcome, answers.ImageResult):
                    results.append(outcome)
                elif isinstance(outcome, ClientError):
                    results.append(conversion.failed_image(outcome))
                else:
                    features.append(outcome)
                    results.append(answers.ImageResult(predictions=[]))
            await on_progress(len(results), len(files))
        return features, results

    async def prepare_database(self, request: ClassifyRequest, on_progress: OnProgress) -> None:
        """Build the default database in this process, once the request is known to be valid."""
        await self._service.resolver.validate(request)
        default = self._service.caption_search.catalogue.default
        if request.database not in {None, default}:
            return
        plan = await self._service.caption_search.plan_default()
        if plan is not None:
            await self._service.caption_search.build(default, plan, (), on_progress)

    async def classify_together(
        self, files: Sequence[Path], request: ClassifyRequest, on_progress: OnProgress
    ) -> tuple[list[answers.ImageResult], list[answers.SharedName]]:
        """Encode the files once, and discover labels for all of them."""
        task = await self._service.resolver.resolve(request)
        features, results = await self._encode(task.model, files, on_progress)
        if not features:
            return results, []
        naming = await self._service.pipeline.name(task, np.stack(features))
        named = iter(naming.results)
        return [
            conversion.image_result(next(named), naming.warnings) if result.error is None else result
            for result in results
        ], conversion.shared_names(naming.vocabulary)

    async def text_features(self, model: str | None, texts: Sequence[str]) -> np.ndarray:
        """Return the features of texts, unit rows (k, d)."""
        return await self._service.models.get(model).encode_texts(texts)

    async def databases(self) -> list[answers.Database]:
        """Read the folder of databases."""
        states = await self._service.caption_search.catalogue.states(OPEN_NAMESPACE)
        return [await self._database(state) for state in states]

    async def database(self, name: str) -> answers.Database:
        """Read the manifest of a database."""
        return await self._database(await self._service.caption_search.catalogue.state(OPEN_NAMESPACE.database(name)))

    async def _database(self, state: DatabaseState) -> answers.Database:
        captions = self._service.caption_search
        models = [] if state.manifest is None else await captions.models_of(state.manifest)
        # Commands that load no model cannot find out whether a model matches.
        problem = state.problem_with(models) if len(self._service.models) else state.problem
        is_default = state.name == captions.catalogue.default
        return conversion.database(state, models, default=is_default, problem=problem)

    async def build_database(
        self, name: str, plan: BuildPlan, sources: Sequence[Source], on_progress: OnProgress
    ) -> None:
        """Build a caption database from files of this machine."""
        captions = self._service.caption_search
        await asyncio.to_thread(captions.check_plan, plan)
        await captions.build(OPEN_NAMESPACE.database(name), plan, sources, on_progress)

    async def search_captions(self, query: CaptionQuery) -> answers.FoundCaptions:
        """Search in this process."""
        stored = replace(query, database=OPEN_NAMESPACE.database(query.database))
        return conversion.found_captions(await self._service.caption_search.search(stored))

    async def delete_database(self, name: str) -> None:
        """Delete the folder of a database."""
        await self._service.caption_search.catalogue.delete(OPEN_NAMESPACE.database(name))

    async def label_sets(self) -> list[answers.LabelSetSummary]:
        """Read the store, page by page."""
        summaries: list[answers.LabelSetSummary] = []
        after = None
        while page := await self._service.label_sets.list(limit=_PAGE_SIZE, after=after, namespace=OPEN_NAMESPACE):
            summaries += [conversion.label_set_summary(summary) for summary in page]
            after = page[-1].name
        return summaries

    async def label_set(self, reference: str) -> answers.LabelSet:
        """Read the store."""
        return conversion.label_set(await self._service.label_sets.find(OPEN_NAMESPACE.reference(reference)))

    async def put_label_set(self, name: str, content: LabelSetInput) -> answers.LabelSet:
        """Write to the store."""
        label_set, _ = await self._service.label_sets.put(
            OPEN_NAMESPACE.label_set(name),
            content.classes,
            content.templates,
            merge_synonyms=content.merge_synonyms,
            multi_label=content.multi_label,
            priors=content.priors,
        )
        return conversion.label_set(label_set)

    async def add_examples(
        self, name: str, images: Sequence[bytes], classnames: Sequence[tuple[str, ...]]
    ) -> answers.AddedExamples:
        """Encode the images and write to the store."""
        label_set = await self._service.label_sets.get(OPEN_NAMESPACE.label_set(name))
        indices = iter(indices_of([name for given in classnames for name in given], label_set.classnames))
        cleaned = [tuple(dict.fromkeys(label_set.classnames[next(indices)] for _ in given)) for given in classnames]
        prepared = await self._service.examples.prepare(label_set.name, images, cleaned)
        items = [item for item in prepared if isinstance(item, NewExample)]
        added = await self._service.examples.add(label_set.name, items)
        return conversion.added_examples(added, prepared, await self._service.examples.counts(label_set.name))

    async def select_methods(self, name: str, job_id: str | None, on_progress: OnProgress) -> None:  # noqa: ARG002
        """Compare all methods in this process."""
        await self._service.method_selector.select_for_every_model(OPEN_NAMESPACE.label_set(name), on_progress)

    async def example_counts(self, name: str) -> answers.ExampleCounts:
        """Read the store."""
        return conversion.example_counts(await self._service.examples.counts(OPEN_NAMESPACE.label_set(name)))

    async def delete_examples(
        self, name: str, *, classname: str | None, unlabelled: bool, everything: bool
    ) -> answers.DeletedExamples:
        """Write to the store."""
        name = OPEN_NAMESPACE.label_set(name)
        if classname is not None:
            classname = await self._service.examples.find_class(await self._service.label_sets.get(name), classname)
        deleted = await self._service.examples.delete(
            name, classname=classname, unlabelled=unlabelled, everything=everything
        )
        counts = conversion.example_counts(await self._service.examples.counts(name))
        return answers.DeletedExamples(deleted=deleted.deleted, counts=counts, job=None)

    async def selection(self, name: str, model: str | None) -> answers.Selection:
        """Read the store."""
        label_set = await self._service.label_sets.get(OPEN_NAMESPACE.label_set(name))
        return conversion.selection(await self._service.selection_reader.stored(label_set, model))

    async def thresholds(
        self, name: str, model: str | None, *, precision: float | None, recall: float | None
    ) -> answers.Thresholds:
        """Measure in this process."""
        label_set = await self._service.label_sets.get(OPEN_NAMESPACE.label_set(name))
        measured = await self._service.threshold_curves.measure(label_set, model, precision=precision, recall=recall)
        return conversion.thresholds(measured)

    async def set_thresholds(
        self, name: str, thresholds: Mapping[str, float | None], *, version: int
    ) -> answers.LabelSet:
        """Write to the store."""
        label_set = await self._service.label_sets.set_thresholds(
            OPEN_NAMESPACE.label_set(name), thresholds, if_match=frozenset({version})
        )
        return conversion.label_set(label_set)

    async def estimate_descriptions(self, name: str, request: DescribeRequest) -> answers.DescribeEstimate:
        """Plan the requests."""
        label_set = await self._service.label_sets.get(OPEN_NAMESPACE.label_set(name))
        estimate = await self._service.describer.estimate(label_set, request)
        return answers.DescribeEstimate(**asdict(estimate))

    async def describe(
        self, name: str, request: DescribeRequest, on_progress: OnProgress, *, accept: bool
    ) -> Mapping[str, Any]:
        """Send the requests from this process."""
        name = OPEN_NAMESPACE.label_set(name)
        return asdict(await self._service.jobs.describe.describe(name, request, on_progress, accept=accept))

    async def drafts(self, name: str, status: DraftStatus | None, classname: str | None) -> list[answers.Draft]:
        """Read the store, page by page."""
        name = OPEN_NAMESPACE.label_set(name)
        drafts: list[answers.Draft] = []
        after = 0
        while page := await self._service.drafts.list(
            name, limit=_PAGE_SIZE, after=after, status=status, classname=classname
        ):
            drafts += [conversion.draft(draft) for draft in page]
            after = page[-1].id
        return drafts

    async def accept_drafts(self, name: str, ids: Sequence[int] | None) -> answers.AcceptedDrafts:
        """Write to the store."""
        label_set, accepted = await self._service.label_sets.accept_drafts(OPEN_NAMESPACE.label_set(name), ids)
        return answers.AcceptedDrafts(accepted=accepted, label_set=conversion.label_set(label_set))

    async def reject_drafts(self, name: str, ids: Sequence[int] | None) -> int:
        """Write to the store."""
        return await self._service.drafts.reject(OPEN_NAMESPACE.label_set(name), ids)


@asynccontextmanager
async def open_in_process(*, encoders: bool) -> AsyncIterator[InProcessBackend]:
    """Open a service in this process, with its models only if ``encoders`` is true."""
    configure_logs("console", "warning")
    settings = load_settings()
    with loading_models(settings.image_backend) if encoders else status("Opening the database"):
        # Uses an existing measurement, because a new one takes longer than most commands.
        loaded = load_encoders(settings.model_copy(update={"tuning_seconds": 0})) if encoders else []
    async with open_service(_without_limits(settings), loaded) as service:
        yield InProcessBackend(service)


def with_encoders_on_ray(work: Callable[[InProcessBackend], Awaitable[Result]]) -> Result:
    """Run ``work`` with a service in this process whose models run on Ray, and exit if it fails."""
    configure_logs("console", "warning")
    with report_errors():
        with needs_ray():
            # An extra, whose import takes a second.
            from app.cluster.temporary_encoders import encoders_on_ray  # noqa: PLC0415
        unlimited = load_settings().model_copy(update={"request_timeout_s": None})
        with encoders_on_ray(unlimited, cluster_address()) as (cards, steps):

            async def opened() -> Result:
                async with open_service(unlimited, cards, steps=steps) as service:
                    return await work(InProcessBackend(service))

            return run(opened())


def _without_limits(settings: Settings) -> Settings:
    """Return the settings without limits that protect a server from its clients; a command is its own only client."""
    return settings.model_copy(
        update={"request_timeout_s": None, "max_queued_images": max(settings.max_queued_images, MAX_IMAGES_AT_ONCE)}
    )


def _stacked(features: Sequence[np.ndarray]) -> np.ndarray:
    if not features:
        raise InvalidFieldError.of("folder", "none of its images can be read")
    return np.stack(features)


def _class_indices(classes: Sequence[str], task: Task) -> list[int]:
    index_of = {name: index for index, name in enumerate(task.classnames)}
    return [index_of[name] for name in classes]


def _readable(class_indices: Sequence[int], results: Sequence[answers.ImageResult]) -> list[int]:
    """Return the class indices of the files that could be read."""
    return [index for index, result in zip(class_indices, results, strict=True) if result.error is None]
