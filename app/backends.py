"""Where a command's work is done: in this process, or by a server over HTTP; both answer with the contract's bodies."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import httpx
import numpy as np

from app.api.errors import TYPE_PREFIX, problem
from app.api.schemas import (
    ClassifyResponse,
    LabelSetBody,
    LabelSetList,
    LabelSetResponse,
    LabelSetSummaryBody,
    ModelList,
    Problem,
    ResultBody,
)
from app.comparison import Comparison, compare
from app.errors import ClientError, DeixisError, InvalidFieldError, NotReadyError
from app.service import Question, Service

# Faults of a single image, as opposed to faults of the question that every image shares.
_IMAGE_FAULTS = {TYPE_PREFIX + slug for slug in ("not-an-image", "image-too-large", "body-too-large")}
# What images may be refused for together and not alone: their number, or each for another fault.
_GROUP_FAULTS = _IMAGE_FAULTS | {TYPE_PREFIX + "too-large", TYPE_PREFIX + "invalid-field"}
_MAX_TRIES = 8


# Images that are read and encoded together.
_ENCODED_AT_ONCE = 8


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


class Backend(Protocol):
    """What commands need of a service."""

    async def classify(self, images: Sequence[bytes], question: Question) -> list[ResultBody]:
        """Classify; an image that cannot be read has its error in its own result, even when every one is bad."""

    async def label_sets(self) -> list[LabelSetSummaryBody]:
        """List every label set."""

    async def label_set(self, reference: str) -> LabelSetResponse:
        """Return ``name`` or ``name@version``."""

    async def put_label_set(self, name: str, body: LabelSetBody) -> LabelSetResponse:
        """Write a new version."""


class InProcess:
    """A service of this process."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def classify(self, images: Sequence[bytes], question: Question) -> list[ResultBody]:
        """Run the pipeline."""
        task = await self._service.plan(question)
        return ClassifyResponse.of(await self._service.pipeline.classify(images, task), problem).results

    async def compare(
        self, question: Question, files: Sequence[Path], labels: Sequence[int], advance: Callable[[], object]
    ) -> tuple[Comparison, list[ResultBody]]:
        """Encode the files once and run every method; the results tell which files could not be read.

        Args:
            question: the classes, model and templates.
            files: images.
            labels: the class of each, by index.
            advance: called after each file.

        Raises:
            InvalidFieldError: not one file could be read.
        """
        model = (await self._service.plan(question)).model
        results: list[ResultBody] = []
        features, truth = [], []
        for first in range(0, len(files), _ENCODED_AT_ONCE):
            some = files[first : first + _ENCODED_AT_ONCE]
            images = [await asyncio.to_thread(read_image, file) for file in some]
            encoded = await self._service.pipeline.image_features(
                model, [image for image in images if isinstance(image, bytes)]
            )
            remaining = iter(encoded)
            for image, label in zip(images, labels[first:], strict=False):
                told = next(remaining) if isinstance(image, bytes) else image
                advance()
                if isinstance(told, np.ndarray):
                    features.append(told)
                    truth.append(label)
                    told = ResultBody(predictions=[])
                elif isinstance(told, ClientError):
                    told = ResultBody.failed(Problem(**problem(told)))
                results.append(told)
        if not features:
            raise InvalidFieldError.of("folder", "not one of its images could be read")
        return await compare(self._service, question, np.stack(features), truth), results

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
        fields: dict[str, Any] = {
            "labels": None if question.labels is None else _json_array(question.labels),
            "label_set": question.label_set,
            "method": question.method,
            "model": question.model,
            "template": question.template,
            "top_k": None if question.top_k is None else str(question.top_k),
            "explain": "true" if question.explain else None,
            "options": json.dumps(question.options) if question.options else None,
        }
        answer = await self._send(
            "POST",
            "/v1/classify",
            data={name: value for name, value in fields.items() if value is not None},
            files=[("image", (f"{index}", image)) for index, image in enumerate(images)],
        )
        return ClassifyResponse.model_validate_json(answer.content).results

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


def _json_array(labels: Sequence[str]) -> str:
    return json.dumps(list(labels), ensure_ascii=False)
