"""A service of this process."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from app.api.problems import problem
from app.api.schemas.classification import ClassifyResponse, ResultBody, SharedNameBody
from app.api.schemas.databases import DatabaseBody, SearchFields, SearchResponse
from app.api.schemas.descriptions import (
    AcceptedResponse,
    DecisionBody,
    DescribeBody,
    DraftBody,
    EstimateBody,
    GenerateBody,
    RejectedResponse,
)
from app.api.schemas.examples import AddedExamplesResponse, DeletedExamplesResponse, ExampleCountsBody
from app.api.schemas.label_sets import LabelSetBody, LabelSetResponse, LabelSetSummaryBody
from app.api.schemas.problems import Problem
from app.api.schemas.selection import SelectionResponse
from app.captions.catalogue import DatabaseState
from app.captions.plan import WORDNET, BuildPlan
from app.captions.search import CaptionQuery
from app.captions.sources import Source
from app.classification.resolve import ClassifyRequest
from app.cli.backends._base import Advance, CurveInput, read_image
from app.errors import ClientError, InvalidFieldError
from app.main import Service
from app.names.class_names import indices_of
from app.names.namespaces import OPEN_NAMESPACE
from app.selection.comparison import Comparison
from app.selection.learning_curve import LearningCurve, learning_curve
from app.store.drafts import DraftStatus
from app.store.examples import NewExample
from app.types import Task

# Images that are read and encoded together.
_ENCODED_AT_ONCE = 8
_DRAFTS_PER_PAGE = 1000


def _stacked(features: Sequence[np.ndarray]) -> np.ndarray:
    if not features:
        raise InvalidFieldError.of("folder", "not one of its images could be read")
    return np.stack(features)


def _places(classes: Sequence[str], task: Task) -> list[int]:
    index_of = {name: index for index, name in enumerate(task.classnames)}
    return [index_of[name] for name in classes]


def _readable(places: Sequence[int], results: Sequence[ResultBody]) -> list[int]:
    """Return the classes of the files that could be read."""
    return [place for place, result in zip(places, results, strict=True) if result.error is None]


class InProcess:
    """A service of this process."""

    def __init__(self, service: Service) -> None:
        self._service = service

    @property
    def default_model(self) -> str:
        """The model that is used where none is named."""
        return self._service.models.default

    async def classify(self, images: Sequence[bytes], question: ClassifyRequest) -> list[ResultBody]:
        """Run the pipeline."""
        task = await self._service.resolver.resolve(question)
        return ClassifyResponse.of(await self._service.pipeline.classify(images, task), problem).results

    async def pinned(self, question: ClassifyRequest) -> ClassifyRequest:
        """Look both up."""
        label_set = question.label_set
        if label_set is not None:
            found = await self.label_set(label_set)
            label_set = f"{found.name}@{found.version}"
        return replace(question, model=question.model or self.default_model, label_set=label_set)

    async def compare(
        self,
        question: ClassifyRequest,
        files: Sequence[Path],
        classes: Sequence[str],
        advance: Callable[[], object],
    ) -> tuple[Comparison, list[ResultBody]]:
        """Encode the files once and run every method."""
        task = await self._service.resolver.resolve(question)
        features, results = await self._encoded(task, files, advance)
        truth = _readable(_places(classes, task), results)
        return await self._service.comparer.compare(task, features, truth), results

    async def learning_curve(
        self, question: ClassifyRequest, given: CurveInput, advance: Advance
    ) -> tuple[LearningCurve, list[ResultBody]]:
        """Encode the files once, and learn from draws of them."""
        task = await self._service.resolver.resolve(question)
        total = len(given.files) + len(given.support_files) + len(given.pool_files)
        done = 0

        async def encoded(files: Sequence[Path]) -> tuple[np.ndarray, list[ResultBody]]:
            nonlocal done
            if not files:
                return np.zeros((0, self._service.models.get(task.model).encoder.embed_dim), np.float32), []
            features, results = [], []
            for first in range(0, len(files), _ENCODED_AT_ONCE):
                some = files[first : first + _ENCODED_AT_ONCE]
                rows, told = await self._encoded_some(task, some)
                features += rows
                results += told
                done += len(some)
                await advance(done, total)
            return _stacked(features), results

        features, results = await encoded(given.files)
        support_features, support_results = await encoded(given.support_files)
        pool_features, pool_results = await encoded(given.pool_files)
        curve = await learning_curve(
            self._service.comparer,
            task,
            (features, _readable(_places(given.classes, task), results)),
            (support_features, _readable(_places(given.support_classes, task), support_results)),
            pool_features,
            shots=given.shots,
            draws=given.draws,
            advance=advance,
        )
        return curve, [*results, *support_results, *pool_results]

    async def _encoded(
        self, task: Task, files: Sequence[Path], advance: Callable[[], object]
    ) -> tuple[np.ndarray, list[ResultBody]]:
        """Return the features (n, d) of the files that can be read, and each file's result, which tells if not."""
        features, results = await self._encoded_all(task, files, advance)
        return _stacked(features), results

    async def _encoded_all(
        self, task: Task, files: Sequence[Path], advance: Callable[[], object]
    ) -> tuple[list[np.ndarray], list[ResultBody]]:
        features: list[np.ndarray] = []
        results: list[ResultBody] = []
        for first in range(0, len(files), _ENCODED_AT_ONCE):
            rows, told = await self._encoded_some(task, files[first : first + _ENCODED_AT_ONCE])
            features += rows
            results += told
            for _ in told:
                advance()
        return features, results

    async def _encoded_some(self, task: Task, files: Sequence[Path]) -> tuple[list[np.ndarray], list[ResultBody]]:
        images = [await asyncio.to_thread(read_image, file) for file in files]
        encoded = iter(
            await self._service.models.encode_images(
                task.model, [image for image in images if isinstance(image, bytes)]
            )
        )
        features: list[np.ndarray] = []
        results: list[ResultBody] = []
        for image in images:
            told = next(encoded) if isinstance(image, bytes) else image
            if isinstance(told, np.ndarray):
                features.append(told)
                told = ResultBody(predictions=[])
            elif isinstance(told, ClientError):
                told = ResultBody.failed(Problem(**problem(told)))
            results.append(told)
        return features, results

    async def prepare_names(self, question: ClassifyRequest, advance: Advance) -> None:
        """Build it here and now, unless the question could not be answered all the same."""
        await self._service.resolver.validate(question)
        if question.database not in {None, WORDNET}:
            return
        plan = await self._service.captions.plan_wordnet()
        if plan is not None:
            await self._service.captions.build(WORDNET, plan, (), advance)

    async def name_together(
        self, files: Sequence[Path], question: ClassifyRequest, advance: Callable[[], object]
    ) -> tuple[list[ResultBody], list[SharedNameBody]]:
        """Encode the files once, and find names for all of them."""
        task = await self._service.resolver.resolve(question)
        features, results = await self._encoded_all(task, files, advance)
        if not features:
            return results, []
        named = await self._service.pipeline.name(task, np.stack(features))
        told = iter(named.results)
        return (
            [
                ResultBody.of(next(told), problem, named.warnings) if result.error is None else result
                for result in results
            ],
            [SharedNameBody(label=each.label, images=each.images) for each in named.vocabulary or ()],
        )

    async def text_features(self, model: str | None, texts: Sequence[str]) -> np.ndarray:
        """Return unit rows (k, d) of texts."""
        return await self._service.models.get(model).encode_texts(texts)

    async def databases(self) -> list[DatabaseBody]:
        """Read the folder."""
        return [await self._told(state) for state in await self._service.captions.databases.states(OPEN_NAMESPACE)]

    async def database(self, name: str) -> DatabaseBody:
        """Read its manifest."""
        return await self._told(await self._service.captions.databases.state(OPEN_NAMESPACE.database(name)))

    async def _told(self, state: DatabaseState) -> DatabaseBody:
        captions = self._service.captions
        # A command that loads no model cannot tell for which it is.
        models = [] if state.manifest is None else await captions.models_of(state.manifest)
        told = DatabaseBody.of(state, models, default=state.name == captions.databases.default)
        return told if len(self._service.models) else told.model_copy(update={"problem": state.problem})

    async def build_database(self, name: str, plan: BuildPlan, sources: Sequence[Source], advance: Advance) -> None:
        """Build a caption database, of files that a server could not read."""
        captions = self._service.captions
        await asyncio.to_thread(captions.check_plan, plan)
        await captions.build(OPEN_NAMESPACE.database(name), plan, sources, advance)

    async def search_captions(self, name: str, fields: SearchFields, image: bytes | None) -> SearchResponse:
        """Search here."""
        query = CaptionQuery(OPEN_NAMESPACE.database(name), image=image, **fields.model_dump())
        return SearchResponse.of(await self._service.captions.search(query))

    async def delete_database(self, name: str) -> None:
        """Remove its folder."""
        await self._service.captions.databases.delete(OPEN_NAMESPACE.database(name))

    async def label_sets(self) -> list[LabelSetSummaryBody]:
        """Read the store, page by page."""
        found: list[LabelSetSummaryBody] = []
        after = None
        while page := await self._service.label_sets.list(limit=1000, after=after, namespace=OPEN_NAMESPACE):
            found += [LabelSetSummaryBody.of(each) for each in page]
            after = page[-1].name
        return found

    async def label_set(self, reference: str) -> LabelSetResponse:
        """Read the store."""
        return LabelSetResponse.of(await self._service.label_sets.find(OPEN_NAMESPACE.reference(reference)))

    async def put_label_set(self, name: str, body: LabelSetBody) -> LabelSetResponse:
        """Write the store."""
        label_set, _ = await self._service.label_sets.put(
            OPEN_NAMESPACE.label_set(name), body.entries(), body.templates, merge_synonyms=body.merge_synonyms
        )
        return LabelSetResponse.of(label_set)

    async def add_examples(
        self, name: str, images: Sequence[bytes], classnames: Sequence[str | None]
    ) -> AddedExamplesResponse:
        """Encode them and write the store."""
        label_set = await self._service.label_sets.get(OPEN_NAMESPACE.label_set(name))
        indices = iter(indices_of([each for each in classnames if each is not None], label_set.classnames))
        cleaned = [None if each is None else label_set.classnames[next(indices)] for each in classnames]
        prepared = await self._service.examples.prepare(label_set.name, images, cleaned)
        items = [each for each in prepared if isinstance(each, NewExample)]
        added = await self._service.examples.add(label_set.name, items)
        return AddedExamplesResponse.of(added, prepared, await self._service.examples.counts(label_set.name), None)

    async def try_methods(self, name: str, job: str | None, advance: Advance) -> None:  # noqa: ARG002 - a server's
        """Try them here and now."""
        await self._service.selection.select_for_every_model(OPEN_NAMESPACE.label_set(name), advance)

    async def example_counts(self, name: str) -> ExampleCountsBody:
        """Read the store."""
        return ExampleCountsBody.of(await self._service.examples.counts(OPEN_NAMESPACE.label_set(name)))

    async def delete_examples(
        self, name: str, *, classname: str | None, unlabelled: bool, everything: bool
    ) -> DeletedExamplesResponse:
        """Write the store."""
        name = OPEN_NAMESPACE.label_set(name)
        if classname is not None:
            classname = await self._service.examples.find_class(await self._service.label_sets.get(name), classname)
        deleted = await self._service.examples.delete(
            name, classname=classname, unlabelled=unlabelled, everything=everything
        )
        counts = ExampleCountsBody.of(await self._service.examples.counts(name))
        return DeletedExamplesResponse(deleted=deleted.deleted, counts=counts, job=None)

    async def selection(self, name: str, model: str | None) -> SelectionResponse:
        """Read the store."""
        label_set = await self._service.label_sets.get(OPEN_NAMESPACE.label_set(name))
        return SelectionResponse.of(await self._service.selector.stored(label_set, model))

    async def estimate_descriptions(self, name: str, body: DescribeBody) -> EstimateBody:
        """Plan the questions."""
        label_set = await self._service.label_sets.get(OPEN_NAMESPACE.label_set(name))
        told = await self._service.describer.estimate(label_set, body.request())
        return EstimateBody(**asdict(told))

    async def describe(self, name: str, body: GenerateBody, advance: Advance) -> Mapping[str, Any]:
        """Ask here and now."""
        name = OPEN_NAMESPACE.label_set(name)
        return asdict(await self._service.jobs.describe.describe(name, body.request(), advance, accept=body.accept))

    async def drafts(self, name: str, status: DraftStatus | None, classname: str | None) -> list[DraftBody]:
        """Read the store, page by page."""
        name = OPEN_NAMESPACE.label_set(name)
        found: list[DraftBody] = []
        after = 0
        while page := await self._service.drafts.list(
            name, limit=_DRAFTS_PER_PAGE, after=after, status=status, classname=classname
        ):
            found += [DraftBody.of(each) for each in page]
            after = page[-1].id
        return found

    async def accept_drafts(self, name: str, body: DecisionBody) -> AcceptedResponse:
        """Write the store."""
        label_set, accepted = await self._service.label_sets.accept_drafts(OPEN_NAMESPACE.label_set(name), body.ids)
        return AcceptedResponse(accepted=accepted, label_set=LabelSetResponse.of(label_set))

    async def reject_drafts(self, name: str, body: DecisionBody) -> RejectedResponse:
        """Write the store."""
        name = OPEN_NAMESPACE.label_set(name)
        return RejectedResponse(rejected=await self._service.drafts.reject(name, body.ids))
