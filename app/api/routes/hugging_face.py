"""Hugging Face's tasks zero-shot-image-classification and feature-extraction, as its inference endpoints have them."""

import asyncio
import json

from fastapi import Request, Response

from app.api.auth.access import Caller, CallerDependency, log_fields
from app.api.dependencies import EmbedderDependency, PipelineDependency, ResolverDependency
from app.api.disconnects import unless_disconnected
from app.api.forms import ImageInput, read_task_input, read_zero_shot_input
from app.api.routing import guarded_router
from app.api.schemas.hugging_face import ScoredLabelBody, TaskBody, ZeroShotBody, ZeroShotParameters
from app.classification.embeddings import Embedder
from app.classification.pipeline import Pipeline
from app.classification.request import ClassifyRequest
from app.classification.resolve import Resolver
from app.encoders.model_names import catalogue_name
from app.errors import InvalidFieldError, UnknownRouteError, did_you_mean

router = guarded_router(tags=["classify"])

# Inlined, because FastAPI collects no definitions from a body that the route parses itself.
_PARAMETERS = ZeroShotParameters.model_json_schema()
_ZERO_SHOT, _TASK = ZeroShotBody.model_json_schema(), TaskBody.model_json_schema()
for _schema in (_ZERO_SHOT, _TASK):
    del _schema["$defs"]
    _schema["properties"]["parameters"] = _PARAMETERS
_ZERO_SHOT_BODY = {"requestBody": {"required": True, "content": {"application/json": {"schema": _ZERO_SHOT}}}}
_TASK_BODY = {"requestBody": {"required": True, "content": {"application/json": {"schema": _TASK}}}}

# Our names of fields, and where they are in these bodies.
_FIELDS = {"labels": "parameters.candidate_labels", "template": "parameters.hypothesis_template", "url": "inputs"}
_ZERO_SHOT_TASK = "zero-shot-image-classification"
_TASKS = (_ZERO_SHOT_TASK, "feature-extraction")


@router.post("/v1/zero-shot-image-classification", response_model=list[ScoredLabelBody], openapi_extra=_ZERO_SHOT_BODY)
async def zero_shot_image_classification(
    request: Request, resolver: ResolverDependency, pipeline: PipelineDependency, caller: CallerDependency
) -> list[ScoredLabelBody]:
    """Classify one image as the Hugging Face task does; returns all labels, best first."""
    body, image = await read_zero_shot_input(request)
    return await _classified(request, image, body.parameters, body.model, resolver, pipeline, caller)


@router.post("/", response_model=list[ScoredLabelBody] | list[list[float]], openapi_extra=_TASK_BODY)
async def hugging_face_task(
    request: Request,
    resolver: ResolverDependency,
    pipeline: PipelineDependency,
    embedder: EmbedderDependency,
    caller: CallerDependency,
) -> list[ScoredLabelBody] | Response:
    """Answer as a Hugging Face endpoint: classify an image if the request has labels, else embed texts."""
    return await _task(request, None, resolver, pipeline, embedder, caller)


@router.post("/models/{model:path}", response_model=list[ScoredLabelBody] | list[list[float]], openapi_extra=_TASK_BODY)
async def hugging_face_model_task(
    model: str,
    request: Request,
    resolver: ResolverDependency,
    pipeline: PipelineDependency,
    embedder: EmbedderDependency,
    caller: CallerDependency,
) -> list[ScoredLabelBody] | Response:
    """Answer as `POST /` with the model of the path, which may be a hub id, and may end in `/pipeline/TASK`."""
    name, suffix, task = model.rpartition("/pipeline/")
    if suffix and task not in _TASKS:
        raise UnknownRouteError(f"unknown task '{task}'; known: {', '.join(_TASKS)}{did_you_mean(task, _TASKS)}")
    name = catalogue_name(name if suffix else model)
    return await _task(request, name, resolver, pipeline, embedder, caller, task if suffix else None)


async def _task(
    request: Request,
    model: str | None,
    resolver: Resolver,
    pipeline: Pipeline,
    embedder: Embedder,
    caller: Caller,
    task: str | None = None,
) -> list[ScoredLabelBody] | Response:
    body, image = await read_task_input(request)
    if task is not None and (task == _ZERO_SHOT_TASK) != (body.parameters is not None):
        rule = "needs candidate_labels in it" if body.parameters is None else "has no labels; leave it out"
        raise InvalidFieldError.of("parameters", f"the task '{task}' of the path {rule}")
    if body.parameters is not None and image is not None:
        return await _classified(request, image, body.parameters, model, resolver, pipeline, caller)
    try:
        embedding = embedder.embed_texts(body.inputs, model=model, dimensions=body.dimensions)
        name, features = await unless_disconnected(request, embedding)
    except InvalidFieldError as error:
        raise error.renamed({"input": "inputs"}) from error
    log_fields(request, model=name, texts=len(features))
    # Serialised in a thread: a thousand rows of 512 numbers are megabytes of JSON.
    content = await asyncio.to_thread(lambda: json.dumps(features.tolist(), separators=(",", ":")))
    return Response(content, media_type="application/json")


async def _classified(
    request: Request,
    image: ImageInput,
    parameters: ZeroShotParameters,
    model: str | None,
    resolver: Resolver,
    pipeline: Pipeline,
    caller: Caller,
) -> list[ScoredLabelBody]:
    try:
        task = await resolver.resolve(
            ClassifyRequest(
                labels=parameters.candidate_labels,
                template=parameters.hypothesis_template,
                model=model,
                top_k=len(parameters.candidate_labels),
                namespace=caller.namespace,
            )
        )
        await caller.spend_images(1)
        classification = await unless_disconnected(request, pipeline.classify([image], task))
        log_fields(request, model=task.model, classifier=task.method, images=1)
        (result,) = classification.results
        if result.error is not None:
            raise result.error
    except InvalidFieldError as error:
        raise error.renamed(_FIELDS) from error
    return [ScoredLabelBody(label=prediction.label, score=prediction.score) for prediction in result.predictions]
