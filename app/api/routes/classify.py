"""POST /v1/classify and its alias POST /classify."""

import asyncio
from typing import Any

from fastapi import Request, Response

from app.api.auth.access import caller_of, log_fields
from app.api.dependencies import classify_parts
from app.api.disconnects import unless_disconnected
from app.api.forms import IMAGE_FILES, read_classify_input
from app.api.problems import kind_of, problem
from app.api.routing import DirectRoute, guarded_router
from app.api.schemas.classification import ClassifyBody, ClassifyFields, ClassifyResponse, serialize
from app.classification.image_features import ImageId
from app.errors import FieldProblem, InvalidFieldError
from app.types import Classification

router = guarded_router(tags=["classify"], route_class=DirectRoute)

# Predictions that take about as long to serialize as the way to a thread and back.
_PREDICTIONS_AT_ONCE = 20


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
            "priors": {
                "type": "string",
                "description": fields["priors"]["description"],
                "examples": ['{"cat": 120, "dog": 40}', "estimate"],
            },
        },
    }


def _json_schema() -> dict[str, Any]:
    schema = ClassifyBody.model_json_schema()
    # Inlined, because FastAPI collects no definitions from a body that the route parses itself.
    schema["properties"]["images"]["items"] = schema.pop("$defs")["ClassifyImageBody"]
    return schema


_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": _form_schema()},
            "application/json": {"schema": _json_schema()},
            "image/*": {
                "schema": {"type": "string", "format": "binary", "description": "Send the fields in the query string."}
            },
        },
    }
}


@router.post("/v1/classify", response_model=ClassifyResponse, openapi_extra=_BODY)
@router.post("/classify", response_model=ClassifyResponse, openapi_extra=_BODY, include_in_schema=False)
async def classify(request: Request) -> Response:
    """Classify one or more images with the labels of the request or of a label set, or discover labels without them.

    If some images cannot be read, their results carry an `error`. If all of them fail, the request fails.
    """
    resolver, pipeline, limits = classify_parts(request)
    caller = caller_of(request)
    given = await read_classify_input(request, max_images=limits.max_images)
    task = await resolver.resolve(given.fields.request(caller.namespace))
    # Images named by id are not encoded again.
    await caller.spend_images(sum(not isinstance(image, ImageId) for image in given.images))
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
    _raise_if_all_failed(classification)
    if len(given.images) * task.top_k <= _PREDICTIONS_AT_ONCE and not task.explain:
        content = serialize(classification, problem)
    else:
        content = await asyncio.to_thread(serialize, classification, problem)
    return Response(content, media_type="application/json")


def _raise_if_all_failed(classification: Classification) -> None:
    """Raise the common error of all images, or one that lists them if their types differ."""
    errors = [result.error for result in classification.results if result.error is not None]
    if len(errors) < len(classification.results):
        return
    if len({kind_of(error) for error in errors}) == 1:
        raise errors[0]
    raise InvalidFieldError([FieldProblem(f"image.{index}", error.message) for index, error in enumerate(errors)])
