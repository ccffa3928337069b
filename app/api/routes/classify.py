"""POST /v1/classify and its alias POST /classify."""

from typing import Any

from fastapi import APIRouter, Request

from app.api.auth.access import CallerDependency, GuardedRoute, log_fields
from app.api.dependencies import LimitsDependency, PipelineDependency, ResolverDependency
from app.api.disconnects import unless_disconnected
from app.api.forms import IMAGE_FILES, read_classify_input
from app.api.problems import kind_of, problem
from app.api.schemas.classification import ClassifyBody, ClassifyFields, ClassifyResponse
from app.classification.resolve import ClassifyRequest
from app.errors import FieldProblem, InvalidFieldError
from app.types import Classification

router = APIRouter(tags=["classify"], route_class=GuardedRoute)


def _form_schema() -> dict[str, Any]:
    fields = ClassifyFields.model_json_schema()["properties"]
    return {
        "type": "object",
        "required": ["image"],
        "additionalProperties": False,
        "properties": {
            "image": IMAGE_FILES,
            **fields,
            "labels": {"type": "string", "description": fields["labels"]["description"], "examples": ["cat, dog"]},
            "options": {
                "type": "string",
                "description": fields["options"]["description"],
                "examples": ['{"beta": 0.7}'],
            },
        },
    }


def _json_schema() -> dict[str, Any]:
    schema = ClassifyBody.model_json_schema()
    # Written out in its place: FastAPI collects no definitions from a body that the route reads by itself.
    schema["properties"]["images"]["items"] = schema.pop("$defs")["ImageBody"]
    return schema


_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": _form_schema()},
            "application/json": {"schema": _json_schema()},
            "image/*": {
                "schema": {"type": "string", "format": "binary", "description": "The fields go into the query string."}
            },
        },
    }
}


@router.post("/v1/classify", response_model=ClassifyResponse, openapi_extra=_BODY)
@router.post("/classify", response_model=ClassifyResponse, openapi_extra=_BODY, include_in_schema=False)
async def classify(
    request: Request,
    resolver: ResolverDependency,
    pipeline: PipelineDependency,
    limits: LimitsDependency,
    caller: CallerDependency,
) -> ClassifyResponse:
    """Classify one or more images among the caller's own words; without any, by names that are found for them.

    A bad image in a request of several is told in its own result; if every image is bad, the answer is an error.
    """
    given = await read_classify_input(request, max_images=limits.max_images)
    fields = given.fields
    task = await resolver.resolve(
        ClassifyRequest(
            labels=fields.labels,
            label_set=fields.label_set,
            method=fields.method,
            model=fields.model,
            template=fields.template,
            top_k=fields.top_k,
            explain=fields.explain,
            options=fields.options,
            reject_below=fields.reject_below,
            false_rejection_rate=fields.false_rejection_rate,
            coverage=fields.coverage,
            database=fields.database,
            group=fields.group,
            namespace=caller.namespace,
        )
    )
    await caller.spend_images(len(given.images))
    classification = await unless_disconnected(request, pipeline.classify(given.images, task))
    log_fields(
        request,
        model=task.model,
        classifier=task.method,
        label_set=task.label_set_reference,
        images=len(given.images),
        image_bytes=sum(len(image) for image in given.images if isinstance(image, bytes)),
        timing_ms={stage: round(value, 3) for stage, value in classification.timing_ms.items()},
    )
    _raise_if_all_bad(classification)
    return ClassifyResponse.of(classification, problem)


def _raise_if_all_bad(classification: Classification) -> None:
    """Raise the images' common error, or one that lists them when they differ in kind."""
    errors = [result.error for result in classification.results if result.error is not None]
    if len(errors) < len(classification.results):
        return
    if len({kind_of(error) for error in errors}) == 1:
        raise errors[0]
    raise InvalidFieldError([FieldProblem(f"image.{index}", error.message) for index, error in enumerate(errors)])
