"""Where a command's work is done: in this process, or by a server over HTTP; both answer with the contract's bodies."""

import asyncio
import base64
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias
from urllib.parse import quote

import httpx
import numpy as np

from app.api.errors import TYPE_PREFIX, problem
from app.api.schemas import (
    AcceptedResponse,
    AddedExamplesResponse,
    ClassifyResponse,
    DatabaseBody,
    DatabaseList,
    DecisionBody,
    DeletedExamplesResponse,
    DescribeBody,
    DraftBody,
    DraftList,
    EstimateBody,
    ExampleCountsBody,
    ExampleList,
    GenerateBody,
    JobBody,
    LabelSetBody,
    LabelSetList,
    LabelSetResponse,
    LabelSetSummaryBody,
    ModelList,
    Problem,
    RejectedResponse,
    ResultBody,
    SearchFields,
    SearchResponse,
    SelectionResponse,
    SharedNameBody,
    SkippedImageBody,
)
from app.caption_library import CaptionQuery
from app.captions.plan import WORDNET, BuildPlan
from app.captions.sources import Source
from app.comparison import Comparison, compare
from app.curves import LearningCurve, learning_curve
from app.databases import DatabaseState
from app.errors import ClientError, DeixisError, InvalidFieldError, NotReadyError
from app.naming import clean_database_name, clean_label_set_name, indices_of
from app.service import Question, Service
from app.store.drafts import DraftStatus
from app.store.examples import NewExample
from app.store.jobs import FINAL, JobStatus
from app.task import Task
from app.trial import try_for_every_model

# Faults of a single image, as opposed to faults of the question that every image shares.
_IMAGE_FAULTS = {TYPE_PREFIX + slug for slug in ("not-an-image", "image-too-large", "body-too-large")}
# What images may be refused for together and not alone: their number, or each for another fault.
_GROUP_FAULTS = _IMAGE_FAULTS | {TYPE_PREFIX + "too-large", TYPE_PREFIX + "invalid-field"}
_MAX_TRIES = 8
_POLL_S = 0.5
_DRAFTS_PER_PAGE = 1000

Advance: TypeAlias = Callable[[int, int], Awaitable[object]]
"""Called with how many steps of how many are done."""


# Images that are read and encoded together.
_ENCODED_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class CurveInput:
    """Files that are asked about, labelled ones to draw from, unlabelled ones, and how many images are drawn how often.

    ``classes`` and ``support_classes`` are the class of each file.
    """

    files: Sequence[Path]
    classes: Sequence[str]
    support_files: Sequence[Path]
    support_classes: Sequence[str]
    pool_files: Sequence[Path]
    shots: Sequence[int]
    draws: int


class RefusedError(DeixisError):
    """The server answered with a problem that trying again would not mend."""

    def __init__(self, told: Problem) -> None:
        super().__init__(told.detail)
        self.problem = told


def read_image(file: Path) -> bytes | ResultBody:
    """Return the file's bytes, or the result that tells why it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        return ResultBody.failed(
            Problem(type="about:blank", title="The file cannot be read", status=400, detail=reason)
        )


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


class Backend(Protocol):
    """What commands need of a service."""

    async def classify(self, images: Sequence[bytes], question: Question) -> list[ResultBody]:
        """Classify; an image that cannot be read has its error in its own result, even when every one is bad."""

    async def learning_curve(
        self, question: Question, given: CurveInput, advance: Advance
    ) -> tuple[LearningCurve, list[ResultBody]]:
        """Tell how accuracy on the files grows with the number of labelled images; results tell which files are bad.

        Raises:
            InvalidFieldError: not one of the files could be read, or there is nothing to learn from.
        """

    async def prepare_names(self, database: str | None, advance: Advance) -> None:
        """Build the caption database that comes with the service, if it is the one to ask and is missing."""

    async def name_together(
        self, files: Sequence[Path], question: Question, advance: Callable[[], object]
    ) -> tuple[list[ResultBody], list[SharedNameBody]]:
        """Find few names that the files share; the results tell which files could not be read.

        Args:
            files: images.
            question: without labels.
            advance: called after each file.

        Raises:
            InvalidFieldError: not one file could be read.
        """

    async def databases(self) -> list[DatabaseBody]:
        """List every caption database."""

    async def database(self, name: str) -> DatabaseBody:
        """Return what is known of a caption database."""

    async def search_captions(self, name: str, fields: SearchFields, image: bytes | None) -> SearchResponse:
        """Return a page of the captions near a text or an image."""

    async def delete_database(self, name: str) -> None:
        """Delete a caption database."""

    async def label_sets(self) -> list[LabelSetSummaryBody]:
        """List every label set."""

    async def label_set(self, reference: str) -> LabelSetResponse:
        """Return ``name`` or ``name@version``."""

    async def put_label_set(self, name: str, body: LabelSetBody) -> LabelSetResponse:
        """Write a new version."""

    async def compare(
        self, question: Question, files: Sequence[Path], classes: Sequence[str], advance: Callable[[], object]
    ) -> tuple[Comparison, list[ResultBody]]:
        """Run every method on the files; the results tell which files could not be read.

        Args:
            question: the classes, model and templates.
            files: images.
            classes: the class of each.
            advance: called after each file.

        Raises:
            InvalidFieldError: not one file could be read.
        """

    async def add_examples(
        self, name: str, images: Sequence[bytes], classnames: Sequence[str | None]
    ) -> AddedExamplesResponse:
        """Add example images, of the class at the same place; those that cannot be read are told."""

    async def try_methods(self, name: str, job: str | None, advance: Advance) -> None:
        """Try every method on the examples, or wait until the server's job has."""

    async def example_counts(self, name: str) -> ExampleCountsBody:
        """Count example images."""

    async def delete_examples(
        self, name: str, *, classname: str | None, unlabelled: bool, everything: bool
    ) -> DeletedExamplesResponse:
        """Delete the example images of a class, the unlabelled ones, or all."""

    async def selection(self, name: str, model: str | None) -> SelectionResponse:
        """Return which method the examples are evidence for."""

    async def estimate_descriptions(self, name: str, body: DescribeBody) -> EstimateBody:
        """Return the most that ``describe`` would take."""

    async def describe(self, name: str, body: GenerateBody, advance: Advance) -> Mapping[str, Any]:
        """Ask a language model, and return what came of it."""

    async def drafts(self, name: str, status: DraftStatus | None, classname: str | None) -> list[DraftBody]:
        """List drafts."""

    async def accept_drafts(self, name: str, body: DecisionBody) -> AcceptedResponse:
        """Put drafts into a new version."""

    async def reject_drafts(self, name: str, body: DecisionBody) -> RejectedResponse:
        """Keep drafts from being used."""


class InProcess:
    """A service of this process."""

    def __init__(self, service: Service) -> None:
        self._service = service

    @property
    def default_model(self) -> str:
        """The model that is used where none is named."""
        return self._service.pipeline.default_model

    async def classify(self, images: Sequence[bytes], question: Question) -> list[ResultBody]:
        """Run the pipeline."""
        task = await self._service.plan(question)
        return ClassifyResponse.of(await self._service.pipeline.classify(images, task), problem).results

    async def compare(
        self, question: Question, files: Sequence[Path], classes: Sequence[str], advance: Callable[[], object]
    ) -> tuple[Comparison, list[ResultBody]]:
        """Encode the files once and run every method."""
        task = await self._service.plan(question)
        features, results = await self._encoded(task, files, advance)
        truth = _readable(_places(classes, task), results)
        return await compare(self._service, question, features, truth), results

    async def learning_curve(
        self, question: Question, given: CurveInput, advance: Advance
    ) -> tuple[LearningCurve, list[ResultBody]]:
        """Encode the files once, and learn from draws of them."""
        task = await self._service.plan(question)
        total = len(given.files) + len(given.support_files) + len(given.pool_files)
        done = 0

        async def encoded(files: Sequence[Path]) -> tuple[np.ndarray, list[ResultBody]]:
            nonlocal done
            if not files:
                return np.zeros((0, self._service.pipeline.models[task.model].encoder.embed_dim), np.float32), []
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
            self._service,
            question,
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
        features: list[np.ndarray] = []
        results: list[ResultBody] = []
        for first in range(0, len(files), _ENCODED_AT_ONCE):
            rows, told = await self._encoded_some(task, files[first : first + _ENCODED_AT_ONCE])
            features += rows
            results += told
            for _ in told:
                advance()
        return _stacked(features), results

    async def _encoded_some(self, task: Task, files: Sequence[Path]) -> tuple[list[np.ndarray], list[ResultBody]]:
        images = [await asyncio.to_thread(read_image, file) for file in files]
        encoded = iter(
            await self._service.pipeline.image_features(
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

    async def prepare_names(self, database: str | None, advance: Advance) -> None:
        """Build it here and now."""
        if database not in {None, WORDNET}:
            return
        plan = await self._service.captions.plan_wordnet()
        if plan is not None:
            await self._service.captions.build(WORDNET, plan, (), advance)

    async def name_together(
        self, files: Sequence[Path], question: Question, advance: Callable[[], object]
    ) -> tuple[list[ResultBody], list[SharedNameBody]]:
        """Encode the files once, and find names for all of them."""
        task = await self._service.plan(question)
        features, results = await self._encoded(task, files, advance)
        named = await self._service.pipeline.name(task, features)
        told = iter(named.results)
        return (
            [ResultBody.of(next(told), problem, ()) if result.error is None else result for result in results],
            [SharedNameBody(label=each.label, images=each.images) for each in named.vocabulary or ()],
        )

    async def text_features(self, model: str | None, texts: Sequence[str]) -> np.ndarray:
        """Return unit rows (k, d) of texts."""
        pipeline = self._service.pipeline
        return await pipeline.models[model or pipeline.default_model].encode_texts(texts)

    async def databases(self) -> list[DatabaseBody]:
        """Read the folder."""
        return [await self._told(state) for state in await self._service.captions.databases.states()]

    async def database(self, name: str) -> DatabaseBody:
        """Read its manifest."""
        return await self._told(await self._service.captions.databases.state(name))

    async def _told(self, state: DatabaseState) -> DatabaseBody:
        captions = self._service.captions
        # A command that loads no model cannot tell for which it is.
        models = [] if state.manifest is None else await captions.models_of(state.manifest)
        told = DatabaseBody.of(state, models, default=state.name == captions.databases.default)
        return told if self._service.pipeline.models else told.model_copy(update={"problem": state.problem})

    async def build_database(self, name: str, plan: BuildPlan, sources: Sequence[Source], advance: Advance) -> None:
        """Build a caption database, of files that a server could not read."""
        captions = self._service.captions
        await asyncio.to_thread(captions.check_plan, plan)
        await captions.build(clean_database_name(name, "name"), plan, sources, advance)

    async def search_captions(self, name: str, fields: SearchFields, image: bytes | None) -> SearchResponse:
        """Search here."""
        query = CaptionQuery(name, image=image, **fields.model_dump())
        return SearchResponse.of(await self._service.captions.search(query))

    async def delete_database(self, name: str) -> None:
        """Remove its folder."""
        await self._service.captions.databases.delete(name)

    async def label_sets(self) -> list[LabelSetSummaryBody]:
        """Read the store, page by page."""
        found: list[LabelSetSummaryBody] = []
        after = None
        while page := await self._service.label_sets.list(limit=1000, after=after):
            found += [LabelSetSummaryBody.of(each) for each in page]
            after = page[-1].name
        return found

    async def label_set(self, reference: str) -> LabelSetResponse:
        """Read the store."""
        return LabelSetResponse.of(await self._service.find_label_set(reference))

    async def put_label_set(self, name: str, body: LabelSetBody) -> LabelSetResponse:
        """Write the store."""
        label_set, _ = await self._service.put_label_set(
            name, body.entries(), body.templates, merge_synonyms=body.merge_synonyms
        )
        return LabelSetResponse.of(label_set)

    async def add_examples(
        self, name: str, images: Sequence[bytes], classnames: Sequence[str | None]
    ) -> AddedExamplesResponse:
        """Encode them and write the store."""
        label_set = await self._service.label_sets.get(clean_label_set_name(name, "name"))
        indices = iter(indices_of([each for each in classnames if each is not None], label_set.classnames))
        cleaned = [None if each is None else label_set.classnames[next(indices)] for each in classnames]
        prepared = await self._service.examples.prepare(label_set.name, images, cleaned)
        items = [each for each in prepared if isinstance(each, NewExample)]
        added = await self._service.examples.add(label_set.name, items)
        return AddedExamplesResponse.of(added, prepared, await self._service.examples.counts(label_set.name), None)

    async def try_methods(self, name: str, job: str | None, advance: Advance) -> None:  # noqa: ARG002 - a server's
        """Try them here and now."""
        await try_for_every_model(self._service, clean_label_set_name(name, "name"), advance)

    async def example_counts(self, name: str) -> ExampleCountsBody:
        """Read the store."""
        return ExampleCountsBody.of(await self._service.examples.counts(clean_label_set_name(name, "name")))

    async def delete_examples(
        self, name: str, *, classname: str | None, unlabelled: bool, everything: bool
    ) -> DeletedExamplesResponse:
        """Write the store."""
        name = clean_label_set_name(name, "name")
        if classname is not None:
            classname = await self._service.class_with_examples(name, classname)
        deleted = await self._service.examples.delete(
            name, classname=classname, unlabelled=unlabelled, everything=everything
        )
        counts = ExampleCountsBody.of(await self._service.examples.counts(name))
        return DeletedExamplesResponse(deleted=deleted.deleted, counts=counts, job=None)

    async def selection(self, name: str, model: str | None) -> SelectionResponse:
        """Read the store."""
        return SelectionResponse.of(await self._service.selection(name, model))

    async def estimate_descriptions(self, name: str, body: DescribeBody) -> EstimateBody:
        """Plan the questions."""
        told = await self._service.estimate_descriptions(clean_label_set_name(name, "name"), body.request())
        return EstimateBody(**asdict(told))

    async def describe(self, name: str, body: GenerateBody, advance: Advance) -> Mapping[str, Any]:
        """Ask here and now."""
        name = clean_label_set_name(name, "name")
        return asdict(await self._service.describe(name, body.request(), advance, accept=body.accept))

    async def drafts(self, name: str, status: DraftStatus | None, classname: str | None) -> list[DraftBody]:
        """Read the store, page by page."""
        name = clean_label_set_name(name, "name")
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
        label_set, accepted = await self._service.accept_drafts(name, body.ids)
        return AcceptedResponse(accepted=accepted, label_set=LabelSetResponse.of(label_set))

    async def reject_drafts(self, name: str, body: DecisionBody) -> RejectedResponse:
        """Write the store."""
        name = clean_label_set_name(name, "name")
        return RejectedResponse(rejected=await self._service.drafts.reject(name, body.ids))


class OverHttp:
    """A server somewhere; a full one is waited for as it asks."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def classify(self, images: Sequence[bytes], question: Question) -> list[ResultBody]:
        """POST /v1/classify as a form."""
        try:
            return await self._classify(images, question)
        except RefusedError as error:
            if len(images) == 1 and error.problem.type in _IMAGE_FAULTS:
                return [ResultBody.failed(error.problem)]
            if len(images) == 1 or error.problem.type not in _GROUP_FAULTS:
                raise
        # Every image was refused, or the batch as a whole: one at a time, each gets its own answer.
        return [result for image in images for result in await self.classify([image], question)]

    async def _classify(self, images: Sequence[bytes], question: Question) -> list[ResultBody]:
        return (await self._classified(images, question)).results

    async def _classified(self, images: Sequence[bytes], question: Question) -> ClassifyResponse:
        fields: dict[str, Any] = {
            "labels": None if question.labels is None else _json_array(question.labels),
            "label_set": question.label_set,
            "method": question.method,
            "model": question.model,
            "template": question.template,
            "top_k": None if question.top_k is None else str(question.top_k),
            "explain": "true" if question.explain else None,
            "options": json.dumps(question.options) if question.options else None,
            "reject_below": _number(question.reject_below),
            "false_rejection_rate": _number(question.false_rejection_rate),
            "coverage": _number(question.coverage),
            "database": question.database,
            "group": "true" if question.group else None,
        }
        answer = await self._send(
            "POST",
            "/v1/classify",
            data={name: value for name, value in fields.items() if value is not None},
            files=[("image", (f"{index}", image)) for index, image in enumerate(images)],
        )
        return ClassifyResponse.model_validate_json(answer.content)

    async def prepare_names(self, database: str | None, advance: Advance) -> None:
        """Leave that to the server, which builds it when it starts."""

    async def name_together(
        self, files: Sequence[Path], question: Question, advance: Callable[[], object]
    ) -> tuple[list[ResultBody], list[SharedNameBody]]:
        """POST /v1/classify with every image at once, of which a server takes so many only."""
        results: list[ResultBody] = []
        sent: list[tuple[int, bytes]] = []
        for file in files:
            image = await asyncio.to_thread(read_image, file)
            if isinstance(image, bytes):
                sent.append((len(results), image))
                image = ResultBody(predictions=[])
            results.append(image)
            advance()
        if not sent:
            raise InvalidFieldError.of("paths", "not one of the files could be read")
        answer = await self._classified([image for _, image in sent], question)
        for (place, _), result in zip(sent, answer.results, strict=True):
            results[place] = result
        return results, answer.vocabulary or []

    async def databases(self) -> list[DatabaseBody]:
        """GET /v1/databases."""
        return DatabaseList.model_validate_json((await self._send("GET", "/v1/databases")).content).databases

    async def database(self, name: str) -> DatabaseBody:
        """GET /v1/databases/{name}."""
        return DatabaseBody.model_validate_json((await self._send("GET", _database_path(name))).content)

    async def search_captions(self, name: str, fields: SearchFields, image: bytes | None) -> SearchResponse:
        """POST /v1/databases/{name}/search."""
        given: dict[str, Any] = fields.model_dump(exclude_none=True)
        if image is not None:
            given["image"] = {"base64": base64.b64encode(image).decode()}
        answer = await self._send("POST", f"{_database_path(name)}/search", json=given)
        return SearchResponse.model_validate_json(answer.content)

    async def delete_database(self, name: str) -> None:
        """DELETE /v1/databases/{name}."""
        await self._send("DELETE", _database_path(name))

    async def label_sets(self) -> list[LabelSetSummaryBody]:
        """GET /v1/label-sets, page by page."""
        found: list[LabelSetSummaryBody] = []
        after: str | None = None
        while True:
            query = {"limit": "1000"} | ({} if after is None else {"after": after})
            page = LabelSetList.model_validate_json((await self._send("GET", "/v1/label-sets", params=query)).content)
            found += page.label_sets
            after = page.next_after
            if after is None:
                return found

    async def label_set(self, reference: str) -> LabelSetResponse:
        """GET /v1/label-sets/{name}."""
        name, at, version = reference.partition("@")
        query = {"version": version} if at else {}
        answer = await self._send("GET", _label_set_path(name), params=query)
        return LabelSetResponse.model_validate_json(answer.content)

    async def put_label_set(self, name: str, body: LabelSetBody) -> LabelSetResponse:
        """PUT /v1/label-sets/{name}."""
        answer = await self._send("PUT", _label_set_path(name), json=body.model_dump(mode="json"))
        return LabelSetResponse.model_validate_json(answer.content)

    async def compare(
        self, question: Question, files: Sequence[Path], classes: Sequence[str], advance: Callable[[], object]
    ) -> tuple[Comparison, list[ResultBody]]:
        """POST /v1/label-sets/{name}:evaluate with every image at once, and wait for the job."""
        if question.label_set is None:
            raise InvalidFieldError.of("--labels", "a server compares methods on a stored label set; give --label-set")
        results: list[ResultBody] = []
        sent: list[tuple[int, bytes]] = []
        for file in files:
            image = await asyncio.to_thread(read_image, file)
            if isinstance(image, bytes):
                sent.append((len(results), image))
                image = ResultBody(predictions=[])
            results.append(image)
            advance()
        fields = {"model": question.model, "template": question.template}
        answer = await self._send(
            "POST",
            f"{_label_set_path(question.label_set)}:evaluate",
            data={
                "class": [classes[index] for index, _ in sent],
                **{name: value for name, value in fields.items() if value is not None},
            },
            files=[("image", (str(index), image)) for index, image in sent],
        )
        result = dict(await self._result_of(JobBody.model_validate_json(answer.content), None))
        for skipped in result.pop("skipped"):
            told = Problem(type="about:blank", title="The image is left out", status=400, detail=skipped["problem"])
            results[sent[skipped["image"]][0]] = ResultBody.failed(told)
        return Comparison.from_json(result), results

    async def learning_curve(
        self,
        question: Question,  # noqa: ARG002 - refused
        given: CurveInput,  # noqa: ARG002
        advance: Advance,  # noqa: ARG002
    ) -> tuple[LearningCurve, list[ResultBody]]:
        """Refuse: draws by the thousand are no work for a server that others use."""
        raise InvalidFieldError.of("--server", "learning curves are drawn in process; leave --server out")

    async def add_examples(
        self, name: str, images: Sequence[bytes], classnames: Sequence[str | None]
    ) -> AddedExamplesResponse:
        """POST /v1/label-sets/{name}/images as a form; of images that are all bad, each gets its own problem."""
        labelled = any(each is not None for each in classnames)
        try:
            answer = await self._send(
                "POST",
                f"{_label_set_path(name)}/images",
                data={"class": [each or "" for each in classnames]} if labelled else {},
                files=[("image", (str(index), image)) for index, image in enumerate(images)],
            )
        except RefusedError as error:
            if error.problem.type not in (_IMAGE_FAULTS if len(images) == 1 else _GROUP_FAULTS):
                raise
            if len(images) > 1:
                # Too many together, or bad in different ways, of which only the first was told.
                told = [
                    await self.add_examples(name, [image], [classname])
                    for image, classname in zip(images, classnames, strict=True)
                ]
                return AddedExamplesResponse(
                    added=sum(each.added for each in told),
                    relabelled=sum(each.relabelled for each in told),
                    duplicates=sum(each.duplicates for each in told),
                    skipped=[
                        SkippedImageBody(image=index, problem=skip.problem)
                        for index, each in enumerate(told)
                        for skip in each.skipped
                    ],
                    counts=told[-1].counts,
                    job=next((each.job for each in reversed(told) if each.job is not None), None),
                )
            return AddedExamplesResponse(
                added=0,
                relabelled=0,
                duplicates=0,
                skipped=[SkippedImageBody(image=0, problem=error.message)],
                counts=await self.example_counts(name),
                job=None,
            )
        return AddedExamplesResponse.model_validate_json(answer.content)

    async def try_methods(self, name: str, job: str | None, advance: Advance) -> None:  # noqa: ARG002 - in process
        """Wait for the job that the server has begun."""
        if job is not None:
            answer = await self._send("GET", f"/v1/jobs/{job}")
            await self._result_of(JobBody.model_validate_json(answer.content), advance)

    async def example_counts(self, name: str) -> ExampleCountsBody:
        """GET /v1/label-sets/{name}/images."""
        answer = await self._send("GET", f"{_label_set_path(name)}/images", params={"limit": "1"})
        return ExampleList.model_validate_json(answer.content).counts

    async def delete_examples(
        self, name: str, *, classname: str | None, unlabelled: bool, everything: bool
    ) -> DeletedExamplesResponse:
        """DELETE /v1/label-sets/{name}/images."""
        chosen = {
            "class": classname,
            "unlabelled": "true" if unlabelled else None,
            "all": "true" if everything else None,
        }
        query = {key: value for key, value in chosen.items() if value is not None}
        answer = await self._send("DELETE", f"{_label_set_path(name)}/images", params=query)
        return DeletedExamplesResponse.model_validate_json(answer.content)

    async def selection(self, name: str, model: str | None) -> SelectionResponse:
        """GET /v1/label-sets/{name}/selection."""
        query = {} if model is None else {"model": model}
        answer = await self._send("GET", f"{_label_set_path(name)}/selection", params=query)
        return SelectionResponse.model_validate_json(answer.content)

    async def estimate_descriptions(self, name: str, body: DescribeBody) -> EstimateBody:
        """POST /v1/label-sets/{name}/descriptions:estimate."""
        answer = await self._send("POST", f"{_drafts_path(name)}:estimate", json=body.model_dump(mode="json"))
        return EstimateBody.model_validate_json(answer.content)

    async def describe(self, name: str, body: GenerateBody, advance: Advance) -> Mapping[str, Any]:
        """POST /v1/label-sets/{name}/descriptions:generate, and wait for the job."""
        answer = await self._send("POST", f"{_drafts_path(name)}:generate", json=body.model_dump(mode="json"))
        return await self._result_of(JobBody.model_validate_json(answer.content), advance)

    async def drafts(self, name: str, status: DraftStatus | None, classname: str | None) -> list[DraftBody]:
        """GET /v1/label-sets/{name}/descriptions, page by page."""
        given = {"status": status, "class": classname}
        query = {"limit": str(_DRAFTS_PER_PAGE)} | {key: value for key, value in given.items() if value is not None}
        found: list[DraftBody] = []
        after: int | None = 0
        while after is not None:
            answer = await self._send("GET", _drafts_path(name), params=query | {"after": str(after)})
            page = DraftList.model_validate_json(answer.content)
            found += page.drafts
            after = page.next_after
        return found

    async def accept_drafts(self, name: str, body: DecisionBody) -> AcceptedResponse:
        """POST /v1/label-sets/{name}/descriptions:accept."""
        answer = await self._send("POST", f"{_drafts_path(name)}:accept", json=body.model_dump(mode="json"))
        return AcceptedResponse.model_validate_json(answer.content)

    async def reject_drafts(self, name: str, body: DecisionBody) -> RejectedResponse:
        """POST /v1/label-sets/{name}/descriptions:reject."""
        answer = await self._send("POST", f"{_drafts_path(name)}:reject", json=body.model_dump(mode="json"))
        return RejectedResponse.model_validate_json(answer.content)

    async def _result_of(self, job: JobBody, advance: Advance | None) -> Mapping[str, Any]:
        """Wait for a job's end.

        Raises:
            NotReadyError: it failed or was cancelled.
        """
        while job.status not in FINAL:
            await asyncio.sleep(_POLL_S)
            job = JobBody.model_validate_json((await self._send("GET", f"/v1/jobs/{job.id}")).content)
            if advance is not None:
                await advance(job.done, job.total)
        if job.status is not JobStatus.SUCCEEDED:
            raise NotReadyError(job.error or f"the job {job.id} was cancelled")
        assert job.result is not None
        return job.result

    async def models(self) -> ModelList:
        """GET /v1/models."""
        return ModelList.model_validate_json((await self._send("GET", "/v1/models")).content)

    async def _send(self, method: str, path: str, **content: Any) -> httpx.Response:
        for attempt in range(_MAX_TRIES):
            try:
                answer = await self._client.request(method, path, **content)
            except httpx.HTTPError as error:
                reason = str(error) or type(error).__name__
                raise NotReadyError(
                    f"no answer from {self._client.base_url}: {reason}; is the server running?"
                ) from error
            if answer.is_success:
                return answer
            if answer.status_code != 503 or attempt == _MAX_TRIES - 1:
                break
            # Not all callers that were told the same number should come back at the same moment.
            await asyncio.sleep(_retry_after_s(answer) * random.uniform(1, 1.5))  # noqa: S311
        raise RefusedError(_told(answer))


@asynccontextmanager
async def over_http(server: str) -> AsyncIterator[OverHttp]:
    """Connect to ``http://host:port``."""
    async with httpx.AsyncClient(base_url=server, timeout=httpx.Timeout(120, connect=10)) as client:
        yield OverHttp(client)


def _told(answer: httpx.Response) -> Problem:
    try:
        return Problem.model_validate_json(answer.content)
    except ValueError:
        # A proxy's page, or another service at that address.
        return Problem(
            type="about:blank",
            title=answer.reason_phrase,
            status=answer.status_code,
            detail=f"{answer.request.url} answered {answer.status_code}, and not as this service does; is it one?",
        )


def _retry_after_s(answer: httpx.Response) -> int:
    """Return the seconds to wait; 1 where a proxy says none, or names a date."""
    told = answer.headers.get("retry-after", "")
    return int(told) if told.isascii() and told.isdigit() and len(told) <= 4 else 1


def _label_set_path(name: str) -> str:
    return f"/v1/label-sets/{quote(name, safe='')}"


def _database_path(name: str) -> str:
    return f"/v1/databases/{quote(name, safe='')}"


def _drafts_path(name: str) -> str:
    return f"{_label_set_path(name)}/descriptions"


def _number(value: float | None) -> str | None:
    return None if value is None else repr(value)


def _json_array(labels: Sequence[str]) -> str:
    return json.dumps(list(labels), ensure_ascii=False)
