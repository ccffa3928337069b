"""A machine learning backend for Label Studio: predictions for its tasks, to begin annotations with.

The routes are those that Label Studio asks, answered as the servers of its own SDK (label-studio-ml-backend) answer
them. A prediction says which version it is of; Label Studio asks anew for what it has no prediction of that version.
"""

import asyncio
import base64
import binascii
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import Any, TypeAlias

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, ValidationError

from app.errors import BodyTooLargeError, ClientError, DeixisError, InvalidFieldError, MalformedRequestError
from app.integrations.label_studio_config import Choice, Control, read_config, words_of
from app.integrations.label_studio_images import TaskImages
from deixis import AsyncClient, ImageResult, ProblemError, UnreachableError
from deixis import ClientError as ServiceError

log = structlog.get_logger()

MAX_BODY_BYTES = 64 * 1024 * 1024
MAX_TASKS = 1000
# Label Studio waits 3 s for an answer to setup, and 100 s for predictions, unless it is told otherwise.
_PLAN_TIMEOUT_S = 2.5
_PREDICT_TIMEOUT_S = 90.0
# Tasks whose images are in memory together, and how many such groups at once.
_CHUNK = 8
_CHUNKS_AT_ONCE = 2
# Upon these Label Studio would have a backend trained, which here needs none.
_TRAIN_EVENTS = frozenset({"ANNOTATION_CREATED", "ANNOTATION_UPDATED", "ANNOTATION_DELETED", "START_TRAINING"})


@dataclass(frozen=True, slots=True)
class Preannotation:
    """How tasks are predicted.

    Args:
        label_set: whose classes are called like the choices; without one, the choices are asked about as they are.
        model: a model of the service; by default its first.
        method: a method of the service.
        template: a template set, or one template with ``{}``.
        options: of the method.
        reject_below: a picture whose best score is lower has no choice.
        multiple_above: where several may be chosen, all with this score or more are.
    """

    label_set: str | None = None
    model: str | None = None
    method: str | None = None
    template: str | None = None
    options: Mapping[str, float] = field(default_factory=dict)
    reject_below: float | None = None
    multiple_above: float = 0.25


class TaskBody(BaseModel):
    """A task; its annotations and what else it has are of no use here."""

    model_config = ConfigDict(extra="ignore")

    id: int | str | None = None
    data: dict[str, Any]


class PredictBody(BaseModel):
    """What Label Studio asks predictions with."""

    model_config = ConfigDict(extra="ignore")

    tasks: list[TaskBody]
    label_config: str


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is asked of the service about every image, and the version that its answers are of."""

    controls: Sequence[Control]
    question: Mapping[str, Any]
    classes: Mapping[str, str] | None
    version: str

    def labels_of(self, choices: Sequence[Choice]) -> dict[str, int]:
        """Return for each label of an answer the place of its choice."""
        places = {word: place for place, choice in enumerate(choices) for word in choice.words}
        if self.classes is None:
            return places
        return {self.classes[word.lower()]: place for word, place in places.items() if word.lower() in self.classes}


@dataclass(frozen=True, slots=True)
class _Asked:
    """A control of the task at a place, and where its image is."""

    place: int
    control: Control
    source: str

    @property
    def key(self) -> tuple[int, str]:
        """By which the image is known."""
        return self.place, self.source


_Region: TypeAlias = tuple[dict[str, Any] | None, float]
"""What is predicted for a control, None where nothing is, and the score of its best choice."""


def create_app(
    client: AsyncClient, images: TaskImages, asked: Preannotation, *, login: tuple[str, str] | None = None
) -> FastAPI:
    """Return the application.

    Args:
        client: of the service; closed with the application.
        images: brings the images of tasks; closed with the application.
        asked: how tasks are predicted.
        login: the user and the password that callers must show (HTTP basic); None for nobody to show any.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await images.aclose()
        await client.close()

    app = FastAPI(title="Deixis for Label Studio", openapi_url=None, lifespan=lifespan)
    backend = _Backend(client, images, asked)

    @app.middleware("http")
    async def let_in(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        if login is not None and not _shows(request.headers.get("authorization", ""), login):
            return Response("Unauthorized", 401, {"WWW-Authenticate": 'Basic realm="Deixis"'})
        return await answer(request)

    @app.exception_handler(DeixisError)
    async def tell(_: Request, error: DeixisError) -> JSONResponse:
        return _told(error.message, 413 if isinstance(error, BodyTooLargeError) else 400)

    @app.exception_handler(ServiceError)
    async def tell_service(_: Request, error: ServiceError) -> JSONResponse:
        if isinstance(error, ProblemError) and error.status not in {429, 502, 503, 504}:
            return _told(f"the service refuses: {error}", 400 if error.status < 500 else 502)
        return _told(str(error), 503)

    @app.get("/")
    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "UP", "model_class": "Deixis"}

    @app.post("/setup")
    async def setup(request: Request) -> dict[str, str]:
        given = await _body_of(request)
        config = given.get("schema")
        if not isinstance(config, str):
            raise InvalidFieldError.of("schema", "the labeling configuration is missing")
        return {"model_version": (await backend.plan(read_config(config))).version}

    @app.post("/predict")
    async def predict(request: Request) -> dict[str, Any]:
        try:
            body = PredictBody.model_validate(await _body_of(request))
        except ValidationError as error:
            first = error.errors()[0]
            raise InvalidFieldError.of(".".join(map(str, first["loc"])), first["msg"]) from error
        if len(body.tasks) > MAX_TASKS:
            raise InvalidFieldError.of("tasks", f"{len(body.tasks)} in one request; at most {MAX_TASKS} are predicted")
        plan = await backend.plan(read_config(body.label_config))
        return {"results": await backend.predict(body.tasks, plan), "model_version": plan.version}

    @app.post("/webhook")
    async def webhook(request: Request) -> JSONResponse:
        event = (await _body_of(request)).get("action")
        if event not in _TRAIN_EVENTS:
            return JSONResponse({"status": "Unknown event"})
        return JSONResponse({"result": {}, "status": "ok"}, 201)

    return app


class _Backend:
    def __init__(self, client: AsyncClient, images: TaskImages, asked: Preannotation) -> None:
        self._client = client
        self._images = images
        self._asked = asked
        self._turns = asyncio.Semaphore(_CHUNKS_AT_ONCE)

    async def plan(self, controls: Sequence[Control]) -> _Plan:
        """Look up what the service would be asked.

        Raises:
            InvalidFieldError: the label set has none of the choices.
            ServiceError: the service refuses, or is not there.
        """
        try:
            async with asyncio.timeout(_PLAN_TIMEOUT_S):
                return await self._plan(controls)
        except TimeoutError:
            raise UnreachableError("the service did not answer in time; is it running?") from None

    async def _plan(self, controls: Sequence[Control]) -> _Plan:
        asked = self._asked
        model = asked.model or (await self._client.models())[0].name
        question: dict[str, Any] = {
            "model": model,
            "method": asked.method,
            "template": asked.template,
            "options": dict(asked.options) or None,
            "reject_below": asked.reject_below,
        }
        classes = None
        if asked.label_set is not None:
            found = await self._client.label_sets.get(asked.label_set)
            question |= {"label_set": f"{found.name}@{found.version}", "top_k": len(found.classes)}
            classes = {each.name.lower(): each.name for each in found.classes}
            words = {word.lower() for control in controls for word in words_of(control.choices)}
            if words and words.isdisjoint(classes):
                raise InvalidFieldError.of(
                    "label_set", f"'{asked.label_set}' has no class that is called like a choice; rename one of them"
                )
        question = {name: value for name, value in question.items() if value is not None}
        told = json.dumps([[asdict(each) for each in controls], question, asked.multiple_above], sort_keys=True)
        parts = ("deixis", model, question.get("label_set"), sha256(told.encode()).hexdigest()[:8])
        return _Plan(controls, question, classes, " ".join(part for part in parts if part))

    async def predict(self, tasks: Sequence[TaskBody], plan: _Plan) -> list[Any]:
        """Return a prediction for each task, in order; an empty list for one that can have none now.

        Label Studio makes nothing of such a list, and asks again another time.
        """
        end_s = asyncio.get_running_loop().time() + _PREDICT_TIMEOUT_S
        chunks = [tasks[start : start + _CHUNK] for start in range(0, len(tasks), _CHUNK)]
        running = [asyncio.create_task(self._chunk(chunk, plan, end_s)) for chunk in chunks]
        try:
            return [each for chunk in running for each in await chunk]
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _chunk(self, tasks: Sequence[TaskBody], plan: _Plan, end_s: float) -> list[Any]:
        try:
            async with asyncio.timeout_at(end_s), self._turns:
                return await self._predicted(tasks, plan)
        except TimeoutError:
            log.warning("not predicted in time", tasks=[task.id for task in tasks], timeout_s=_PREDICT_TIMEOUT_S)
            return [[] for _ in tasks]

    async def _predicted(self, tasks: Sequence[TaskBody], plan: _Plan) -> list[Any]:
        """Fetch each image once, and ask about those with the same choices together."""
        problems: dict[int, str] = {}
        groups = _grouped(tasks, plan, problems)
        images = await self._brought(tasks, groups, problems)
        regions: dict[tuple[int, str], _Region] = {}
        for choices, members in groups.items():
            here = [(each, images[each.key]) for each in members if each.key in images]
            told = await self._results([image for _, image in here], choices, plan)
            for (each, _), result in zip(here, told, strict=True):
                if result.error is not None:
                    problems[each.place] = result.error.detail
                else:
                    region = self._region(each.control, choices, plan.labels_of(choices), result)
                    regions[each.place, each.control.name] = region
        for place, problem in problems.items():
            log.warning("not predicted", task=tasks[place].id, reason=problem)
        return [
            [] if place in problems else _prediction(plan, [regions[place, each.name] for each in plan.controls])
            for place in range(len(tasks))
        ]

    async def _brought(
        self, tasks: Sequence[TaskBody], groups: Mapping[Any, Sequence[_Asked]], problems: dict[int, str]
    ) -> dict[tuple[int, str], bytes]:
        """Return the images that can be had, by the place of their task and where they are."""
        wanted = list(dict.fromkeys(each.key for members in groups.values() for each in members))
        fetches = [self._images.fetch(source, tasks[place].id) for place, source in wanted]
        images: dict[tuple[int, str], bytes] = {}
        for key, image in zip(wanted, await asyncio.gather(*fetches, return_exceptions=True), strict=True):
            if isinstance(image, bytes):
                images[key] = image
            elif isinstance(image, ClientError):
                problems[key[0]] = image.message
            else:
                raise image
        return images

    async def _results(self, images: Sequence[bytes], choices: Sequence[Choice], plan: _Plan) -> list[ImageResult]:
        question = dict(plan.question)
        if plan.classes is None:
            words = words_of(choices)
            question |= {"labels": words, "top_k": len(words)}
        return [each.result async for each in self._client.stream(images, batch_size=_CHUNK, **question)]

    def _region(
        self, control: Control, choices: Sequence[Choice], places: Mapping[str, int], result: ImageResult
    ) -> _Region:
        """Return what is predicted for a control, None where nothing is, and the score of the best choice."""
        scores = [0.0] * len(choices)
        for each in result.predictions:
            if each.label in places:
                scores[places[each.label]] += each.score
        scores = [min(score, 1.0) for score in scores]  # of sigmoid models they are no shares
        best = max(range(len(choices)), key=scores.__getitem__)
        if control.is_multiple:
            chosen = [place for place, score in enumerate(scores) if score >= self._asked.multiple_above]
            chosen.sort(key=scores.__getitem__, reverse=True)
        else:
            chosen = [best]
        if result.rejected or not chosen:
            return None, scores[best]
        region = {
            "from_name": control.name,
            "to_name": control.image,
            "type": "choices",
            "value": {"choices": [choices[place].result for place in chosen]},
            "score": scores[best],
        }
        return region, scores[best]


def _grouped(
    tasks: Sequence[TaskBody], plan: _Plan, problems: dict[int, str]
) -> dict[tuple[Choice, ...], list[_Asked]]:
    """Return what is asked, by the choices there are; ``problems`` get the tasks that cannot be asked about."""
    groups: dict[tuple[Choice, ...], list[_Asked]] = {}
    for place, task in enumerate(tasks):
        for control in plan.controls:
            try:
                source, choices = control.source_in(task.data), control.choices_in(task.data)
            except InvalidFieldError as error:
                problems[place] = error.message
                continue
            if plan.labels_of(choices):
                groups.setdefault(choices, []).append(_Asked(place, control, source))
            else:
                problems[place] = f"the label set has no class that is called like a choice of '{control.name}'"
    return groups


def _prediction(plan: _Plan, regions: Sequence[_Region]) -> dict[str, Any]:
    """Return a prediction, whose score is that of its least certain part."""
    return {
        "result": [region for region, _ in regions if region is not None],
        "score": min(score for _, score in regions),
        "model_version": plan.version,
    }


async def _body_of(request: Request) -> dict[str, Any]:
    """Return the body, which must be a JSON object.

    Raises:
        BodyTooLargeError, MalformedRequestError: it is too long, or none.
    """
    received = bytearray()
    async for piece in request.stream():
        received += piece
        if len(received) > MAX_BODY_BYTES:
            raise BodyTooLargeError(
                f"the request has more than {MAX_BODY_BYTES:,} bytes; give images as addresses, or lower the size of"
                " Label Studio's batches"
            )
    try:
        given = await asyncio.to_thread(json.loads, bytes(received))
    except (ValueError, RecursionError) as error:
        raise MalformedRequestError(f"the body is no JSON: {error}") from error
    if not isinstance(given, dict):
        raise MalformedRequestError("the body is no JSON object")
    return given


def _shows(header: str, login: tuple[str, str]) -> bool:
    kind, _, encoded = header.partition(" ")
    if kind.lower() != "basic":
        return False
    try:
        shown = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        return False
    return hmac.compare_digest(shown, ":".join(login).encode())


def _told(message: str, status: int) -> JSONResponse:
    return JSONResponse({"error": message}, status)
