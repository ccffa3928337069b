"""A server somewhere, over HTTP."""

import asyncio
import base64
import json
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from app.api.auth.access import NAMESPACE_HEADER
from app.api.problems import TYPE_PREFIX
from app.api.schemas.catalogue import ModelList
from app.api.schemas.classification import ClassifyResponse, ResultBody, SharedNameBody
from app.api.schemas.databases import DatabaseBody, DatabaseList, SearchFields, SearchResponse
from app.api.schemas.descriptions import (
    AcceptedResponse,
    DecisionBody,
    DescribeBody,
    DraftBody,
    DraftList,
    EstimateBody,
    GenerateBody,
    RejectedResponse,
)
from app.api.schemas.examples import (
    AddedExamplesResponse,
    DeletedExamplesResponse,
    ExampleCountsBody,
    ExampleList,
    SkippedImageBody,
)
from app.api.schemas.jobs import JobBody
from app.api.schemas.label_sets import LabelSetBody, LabelSetList, LabelSetResponse, LabelSetSummaryBody
from app.api.schemas.problems import Problem
from app.api.schemas.selection import SelectionResponse
from app.classification.resolve import ClassifyRequest
from app.cli.backends._base import Advance, CurveInput, read_image
from app.errors import DeixisError, InvalidFieldError, NotReadyError
from app.selection.comparison import Comparison
from app.selection.learning_curve import LearningCurve
from app.store.drafts import DraftStatus
from app.store.jobs import FINAL, JobStatus

# Faults of a single image, as opposed to faults of the question that every image shares.
_IMAGE_FAULTS = {TYPE_PREFIX + slug for slug in ("not-an-image", "image-too-large", "body-too-large")}
# What images may be refused for together and not alone: their number, or each for another fault.
_GROUP_FAULTS = _IMAGE_FAULTS | {TYPE_PREFIX + "too-large", TYPE_PREFIX + "invalid-field"}
_MAX_TRIES = 8
# Longer than this no command waits for its turn; it tells when it can be had.
_MAX_WAIT_S = 60
_POLL_S = 0.5
_DRAFTS_PER_PAGE = 1000


class RefusedError(DeixisError):
    """The server answered with a problem that trying again would not mend."""

    def __init__(self, told: Problem) -> None:
        super().__init__(told.detail)
        self.problem = told


class OverHttp:
    """A server somewhere; a full one is waited for as it asks."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def classify(self, images: Sequence[bytes], question: ClassifyRequest) -> list[ResultBody]:
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

    async def _classify(self, images: Sequence[bytes], question: ClassifyRequest) -> list[ResultBody]:
        return (await self._classified(images, question)).results

    async def _classified(self, images: Sequence[bytes], question: ClassifyRequest) -> ClassifyResponse:
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

    async def pinned(self, question: ClassifyRequest) -> ClassifyRequest:
        """GET /v1/models and the label set."""
        label_set = question.label_set
        if label_set is not None:
            found = await self.label_set(label_set)
            label_set = f"{found.name}@{found.version}"
        model = question.model or (await self.models()).models[0].name
        return replace(question, model=model, label_set=label_set)

    async def prepare_names(self, question: ClassifyRequest, advance: Advance) -> None:
        """Leave that to the server, which builds it when it starts."""

    async def name_together(
        self, files: Sequence[Path], question: ClassifyRequest, advance: Callable[[], object]
    ) -> tuple[list[ResultBody], list[SharedNameBody]]:
        """POST /v1/classify with every image at once, of which a server takes so many only."""
        results, sent = await _all_read(files, advance)
        if not sent:
            return results, []
        images = [image for _, image in sent]
        try:
            answer = await self._classified(images, question)
            told, vocabulary = answer.results, answer.vocabulary or []
        except RefusedError as error:
            if not _is_of_images(error.problem):
                raise
            # Every image was refused: one at a time, each gets its own answer.
            told = [result for image in images for result in await self.classify([image], question)]
            vocabulary = []
        for (place, _), result in zip(sent, told, strict=True):
            results[place] = result
        return results, vocabulary

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
        self,
        question: ClassifyRequest,
        files: Sequence[Path],
        classes: Sequence[str],
        advance: Callable[[], object],
    ) -> tuple[Comparison, list[ResultBody]]:
        """POST /v1/label-sets/{name}:evaluate with every image at once, and wait for the job."""
        if question.label_set is None:
            raise InvalidFieldError.of("--labels", "a server compares methods on a stored label set; give --label-set")
        results, sent = await _all_read(files, advance)
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
        question: ClassifyRequest,  # noqa: ARG002 - refused
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
            patient = answer.status_code in {429, 503} and _retry_after_s(answer) <= _MAX_WAIT_S
            if not patient or attempt == _MAX_TRIES - 1:
                break
            # Not all callers that were told the same number should come back at the same moment.
            await asyncio.sleep(_retry_after_s(answer) * random.uniform(1, 1.5))  # noqa: S311
        raise RefusedError(_told(answer))


@asynccontextmanager
async def over_http(server: str, *, key: str | None = None, namespace: str | None = None) -> AsyncIterator[OverHttp]:
    """Connect to ``http://host:port``.

    Args:
        server: its address.
        key: an API key, where it wants one.
        namespace: another than that of the key, which must be an administrator's.

    Raises:
        InvalidFieldError: the key or the namespace is not ASCII.
    """
    headers = {}
    for name, variable, value in (
        ("Authorization", "DEIXIS_API_KEY", None if key is None else f"Bearer {key.strip()}"),
        (NAMESPACE_HEADER, "DEIXIS_NAMESPACE", namespace),
    ):
        if value is not None:
            if not (value.isascii() and value.isprintable()):
                raise InvalidFieldError.of(variable, "has characters that no header can have; use ASCII")
            headers[name] = value
    async with httpx.AsyncClient(base_url=server, headers=headers, timeout=httpx.Timeout(120, connect=10)) as client:
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


def _is_of_images(problem: Problem) -> bool:
    """Tell whether a request was refused for its images, all of which are bad, each perhaps in its own way."""
    fields = [each.get("field", "") for each in problem.errors or ()]
    return problem.type in _IMAGE_FAULTS or (bool(fields) and all(each.startswith("image.") for each in fields))


def _retry_after_s(answer: httpx.Response) -> int:
    """Return the seconds to wait; 1 where a proxy says none, or names a date."""
    told = answer.headers.get("retry-after", "")
    return int(told) if told.isascii() and told.isdigit() and len(told) <= 4 else 1


async def _all_read(
    files: Sequence[Path], advance: Callable[[], object]
) -> tuple[list[ResultBody], list[tuple[int, bytes]]]:
    """Return a result for each file, which tells if it cannot be read, and the others with their places."""
    results: list[ResultBody] = []
    read: list[tuple[int, bytes]] = []
    for file in files:
        image = await asyncio.to_thread(read_image, file)
        if isinstance(image, bytes):
            read.append((len(results), image))
            image = ResultBody(predictions=[])
        results.append(image)
        advance()
    return results, read


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
