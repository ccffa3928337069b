"""A machine learning backend for Label Studio: predicts the choices of its tasks.

The routes and their responses are those of Label Studio's own SDK (label-studio-ml-backend). Each prediction carries a
version, and Label Studio requests predictions again for tasks that have none of the current version.
"""

import asyncio
import base64
import binascii
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any, TypeAlias

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, ValidationError

from app.errors import BodyTooLargeError, ClientError, DeixisError, InvalidFieldError, MalformedRequestError
from app.integrations.label_studio_config import Choice, Control, read_config, words_of
from app.integrations.label_studio_images import TaskImages
from deixis import AsyncClient, ClassifyOptions, ImageResult, ProblemError, UnreachableError
from deixis import ClientError as ServiceError

log = structlog.get_logger()

MAX_BODY_BYTES = 64 * 1024 * 1024
MAX_TASKS = 1000
# The default timeouts of Label Studio are 3 s for a setup and 100 s for predictions.
_PLAN_TIMEOUT_S = 2.5
_PREDICT_TIMEOUT_S = 90.0
# Tasks whose images are in memory together, and the number of simultaneous batches.
_BATCH = 8
_CONCURRENCY = 2
# Events after which Label Studio requests a training; this backend needs none.
_TRAIN_EVENTS = frozenset({"ANNOTATION_CREATED", "ANNOTATION_UPDATED", "ANNOTATION_DELETED", "START_TRAINING"})


@dataclass(frozen=True, slots=True)
class Preannotation:
    """How tasks are predicted.

    Args:
        request: the options of a classification. The classes of a label set must be named after the choices; without a
            label set, the labels are the choices.
        multiple_above: if several choices are allowed, those with at least this score are predicted; with
            ``multi_label``, the thresholds of the labels decide instead.
    """

    request: ClassifyOptions
    multiple_above: float = 0.25


class TaskBody(BaseModel):
    """A task; its other fields, such as annotations, are not used."""

    model_config = ConfigDict(extra="ignore")

    id: int | str | None = None
    data: dict[str, Any]


class PredictBody(BaseModel):
    """A request for predictions."""

    model_config = ConfigDict(extra="ignore")

    tasks: list[TaskBody]
    label_config: str


@dataclass(frozen=True, slots=True)
class _Plan:
    """The request to the service for each image, and the version of its predictions."""

    controls: Sequence[Control]
    request: ClassifyOptions
    classes: Mapping[str, str] | None
    version: str

    def labels_of(self, choices: Sequence[Choice]) -> dict[str, int]:
        """Return the index of the choice of each label of a result."""
        index_of = {word: index for index, choice in enumerate(choices) for word in choice.words}
        if self.classes is None:
            return index_of
        return {self.classes[word.lower()]: index for word, index in index_of.items() if word.lower() in self.classes}


@dataclass(frozen=True, slots=True)
class _Item:
    """A control of a task to predict: the index of the task, and the source of its image."""

    task_index: int
    control: Control
    source: str

    @property
    def key(self) -> tuple[int, str]:
        """The key of the image; items of a task with the same source share the image."""
        return self.task_index, self.source


_Region: TypeAlias = tuple[dict[str, Any] | None, float]
"""The predicted region of a control or None, and the score of the best choice."""


def create_app(
    client: AsyncClient, images: TaskImages, preannotation: Preannotation, *, login: tuple[str, str] | None = None
) -> FastAPI:
    """Return the application.

    Args:
        client: a client of the service; closed with the application.
        images: fetches the images of tasks; closed with the application.
        preannotation: how tasks are predicted.
        login: user and password that clients must send (HTTP Basic); None for no authentication.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await images.aclose()
        await client.close()

    app = FastAPI(title="Deixis for Label Studio", openapi_url=None, lifespan=lifespan)
    backend = _Backend(client, images, preannotation)

    @app.middleware("http")
    async def authenticate(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        if login is not None and not _is_login(request.headers.get("authorization", ""), login):
            return Response("Unauthorized", 401, {"WWW-Authenticate": 'Basic realm="Deixis"'})
        return await call_next(request)

    @app.exception_handler(DeixisError)
    async def report(_: Request, error: DeixisError) -> JSONResponse:
        return _error_response(error.message, 413 if isinstance(error, BodyTooLargeError) else 400)

    @app.exception_handler(ServiceError)
    async def report_service(_: Request, error: ServiceError) -> JSONResponse:
        if isinstance(error, ProblemError) and error.status not in {429, 502, 503, 504}:
            return _error_response(f"the service refused the request: {error}", 400 if error.status < 500 else 502)
        return _error_response(str(error), 503)

    @app.get("/")
    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "UP", "model_class": "Deixis"}

    @app.post("/setup")
    async def setup(request: Request) -> dict[str, str]:
        body = await _read_body(request)
        config = body.get("schema")
        if not isinstance(config, str):
            raise InvalidFieldError.of("schema", "the labeling configuration is missing")
        return {"model_version": (await backend.plan(read_config(config))).version}

    @app.post("/predict")
    async def predict(request: Request) -> dict[str, Any]:
        try:
            body = PredictBody.model_validate(await _read_body(request))
        except ValidationError as error:
            first = error.errors()[0]
            raise InvalidFieldError.of(".".join(map(str, first["loc"])), first["msg"]) from error
        if len(body.tasks) > MAX_TASKS:
            raise InvalidFieldError.of("tasks", f"has {len(body.tasks)} tasks; send at most {MAX_TASKS} in one request")
        plan = await backend.plan(read_config(body.label_config))
        return {"results": await backend.predict(body.tasks, plan), "model_version": plan.version}

    @app.post("/webhook")
    async def webhook(request: Request) -> JSONResponse:
        event = (await _read_body(request)).get("action")
        if event not in _TRAIN_EVENTS:
            return JSONResponse({"status": "Unknown event"})
        return JSONResponse({"result": {}, "status": "ok"}, 201)

    return app


class _Backend:
    def __init__(self, client: AsyncClient, images: TaskImages, preannotation: Preannotation) -> None:
        self._client = client
        self._images = images
        self._preannotation = preannotation
        self._slots = asyncio.Semaphore(_CONCURRENCY)

    async def plan(self, controls: Sequence[Control]) -> _Plan:
        """Return the plan for the controls of a project.

        Raises:
            InvalidFieldError: no class of the label set is named after a choice.
            ServiceError: the service refused a request or does not respond.
        """
        try:
            async with asyncio.timeout(_PLAN_TIMEOUT_S):
                return await self._plan(controls)
        except TimeoutError:
            raise UnreachableError("the service did not respond in time; is it running?") from None

    async def _plan(self, controls: Sequence[Control]) -> _Plan:
        request = self._preannotation.request.copy()
        request["model"] = request.get("model") or (await self._client.models())[0].name
        classes = None
        if (reference := request.get("label_set")) is not None:
            label_set = await self._client.label_sets.get(reference)
            request["label_set"] = f"{label_set.name}@{label_set.version}"
            request["top_k"] = len(label_set.classes)
            classes = {entry.name.lower(): entry.name for entry in label_set.classes}
            words = {word.lower() for control in controls for word in words_of(control.choices)}
            if words and words.isdisjoint(classes):
                raise InvalidFieldError.of(
                    "label_set", f"'{reference}' has no class that is named after a choice; rename one of them"
                )
        fields = [[asdict(control) for control in controls], request, self._preannotation.multiple_above]
        digest = sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:8]
        parts = ("deixis", request["model"], request.get("label_set"), digest)
        return _Plan(controls, request, classes, " ".join(part for part in parts if part))

    async def predict(self, tasks: Sequence[TaskBody], plan: _Plan) -> list[Any]:
        """Return a prediction per task, in order; an empty list for a task that cannot be predicted now.

        Label Studio ignores an empty list and requests the prediction again later.
        """
        end_s = asyncio.get_running_loop().time() + _PREDICT_TIMEOUT_S
        batches = [tasks[start : start + _BATCH] for start in range(0, len(tasks), _BATCH)]
        running = [asyncio.create_task(self._predict_in_time(batch, plan, end_s)) for batch in batches]
        try:
            return [prediction for batch in running for prediction in await batch]
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _predict_in_time(self, tasks: Sequence[TaskBody], plan: _Plan, end_s: float) -> list[Any]:
        try:
            async with asyncio.timeout_at(end_s), self._slots:
                return await self._predict(tasks, plan)
        except TimeoutError:
            log.warning("not predicted in time", tasks=[task.id for task in tasks], timeout_s=_PREDICT_TIMEOUT_S)
            return [[] for _ in tasks]

    async def _predict(self, tasks: Sequence[TaskBody], plan: _Plan) -> list[Any]:
        """Fetch each image once, and classify the images with the same choices together."""
        problems: dict[int, str] = {}
        groups = _grouped(tasks, plan, problems)
        images = await self._fetch(tasks, groups, problems)
        regions: dict[tuple[int, str], _Region] = {}
        for choices, items in groups.items():
            fetched = [(item, images[item.key]) for item in items if item.key in images]
            results = await self._classify([image for _, image in fetched], choices, plan)
            for (item, _), result in zip(fetched, results, strict=True):
                if result.error is not None:
                    problems[item.task_index] = result.error.detail
                else:
                    region = self._region(item.control, choices, plan.labels_of(choices), result)
                    regions[item.task_index, item.control.name] = region
        for index, problem in problems.items():
            log.warning("not predicted", task=tasks[index].id, reason=problem)
        return [
            [] if index in problems else _prediction(plan, [regions[index, control.name] for control in plan.controls])
            for index in range(len(tasks))
        ]

    async def _fetch(
        self, tasks: Sequence[TaskBody], groups: Mapping[Any, Sequence[_Item]], problems: dict[int, str]
    ) -> dict[tuple[int, str], bytes]:
        """Return the fetched images by the keys of their items; add the errors of the others to ``problems``."""
        keys = list(dict.fromkeys(item.key for items in groups.values() for item in items))
        fetches = [self._images.fetch(source, tasks[index].id) for index, source in keys]
        images: dict[tuple[int, str], bytes] = {}
        for key, image in zip(keys, await asyncio.gather(*fetches, return_exceptions=True), strict=True):
            if isinstance(image, bytes):
                images[key] = image
            elif isinstance(image, ClientError):
                problems[key[0]] = image.message
            else:
                raise image
        return images

    async def _classify(self, images: Sequence[bytes], choices: Sequence[Choice], plan: _Plan) -> list[ImageResult]:
        request = plan.request.copy()
        if plan.classes is None:
            request["labels"] = words_of(choices)
            request["top_k"] = len(request["labels"])
        return [row.result async for row in self._client.stream(images, batch_size=_BATCH, **request)]

    def _region(
        self, control: Control, choices: Sequence[Choice], index_of: Mapping[str, int], result: ImageResult
    ) -> _Region:
        """Return the predicted region of a control, or None, and the score of the best choice."""
        scores = [0.0] * len(choices)
        for prediction in result.predictions:
            if prediction.label in index_of:
                scores[index_of[prediction.label]] += prediction.score
        scores = [min(score, 1.0) for score in scores]  # the scores of sigmoid models do not sum to 1
        best = max(range(len(choices)), key=scores.__getitem__)
        if result.labels is not None:
            # Several choices may be names of one class, which is in the order of its labels once.
            chosen = list(dict.fromkeys(index_of[label] for label in result.labels if label in index_of))
            chosen = chosen if control.is_multiple else chosen[:1]
        elif control.is_multiple:
            chosen = [index for index, score in enumerate(scores) if score >= self._preannotation.multiple_above]
            chosen.sort(key=scores.__getitem__, reverse=True)
        else:
            chosen = [best]
        if result.rejected or not chosen:
            return None, scores[best]
        region = {
            "from_name": control.name,
            "to_name": control.image,
            "type": "choices",
            "value": {"choices": [choices[index].result for index in chosen]},
            "score": scores[chosen[0]],
        }
        return region, scores[chosen[0]]


def _grouped(tasks: Sequence[TaskBody], plan: _Plan, problems: dict[int, str]) -> dict[tuple[Choice, ...], list[_Item]]:
    """Return the items by their choices; add the errors of invalid tasks to ``problems``, by the index of the task."""
    groups: dict[tuple[Choice, ...], list[_Item]] = {}
    for index, task in enumerate(tasks):
        for control in plan.controls:
            try:
                source, choices = control.source_in(task.data), control.choices_in(task.data)
            except InvalidFieldError as error:
                problems[index] = error.message
                continue
            if plan.labels_of(choices):
                groups.setdefault(choices, []).append(_Item(index, control, source))
            else:
                problems[index] = f"no class of the label set is named after a choice of '{control.name}'"
    return groups


def _prediction(plan: _Plan, regions: Sequence[_Region]) -> dict[str, Any]:
    """Return the prediction of a task, whose score is the lowest of its regions."""
    return {
        "result": [region for region, _ in regions if region is not None],
        "score": min(score for _, score in regions),
        "model_version": plan.version,
    }


async def _read_body(request: Request) -> dict[str, Any]:
    """Return the body, a JSON object.

    Raises:
        BodyTooLargeError: the body is too long.
        MalformedRequestError: the body is not a JSON object.
    """
    received = bytearray()
    async for chunk in request.stream():
        received += chunk
        if len(received) > MAX_BODY_BYTES:
            raise BodyTooLargeError(
                f"the request has more than {MAX_BODY_BYTES:,} bytes; send images as URLs, or reduce the batch"
                " size of Label Studio"
            )
    try:
        body = await asyncio.to_thread(json.loads, bytes(received))
    except (ValueError, RecursionError) as error:
        raise MalformedRequestError(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise MalformedRequestError("the body is not a JSON object")
    return body


def _is_login(header: str, login: tuple[str, str]) -> bool:
    kind, _, encoded = header.partition(" ")
    if kind.lower() != "basic":
        return False
    try:
        sent = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        return False
    return hmac.compare_digest(sent, ":".join(login).encode())


def _error_response(message: str, status: int) -> JSONResponse:
    return JSONResponse({"error": message}, status)
