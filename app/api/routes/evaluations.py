"""POST /v1/label-sets/{name}:evaluate compares every method on labelled images."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import Request, Response

from app.api.auth.access import CallerDependency, LabelSetName
from app.api.class_fields import read_classes
from app.api.deadline import restart_deadline
from app.api.dependencies import (
    EvaluateJobsDependency,
    ExamplesDependency,
    ImageCountLimitsDependency,
    LabelSetsDependency,
    ResolverDependency,
)
from app.api.forms import (
    IMAGE_FILES,
    check_field_names,
    media_type_of,
    parse_json,
    read_form,
)
from app.api.routing import guarded_router
from app.api.schemas.jobs import JobBody
from app.api.schemas.selection import EvaluateStoredBody
from app.encoders.model_names import catalogue_name
from app.errors import ClientError, InvalidFieldError, UnsupportedMediaTypeError
from app.names.class_names import indices_of
from app.store.jobs import Job
from app.types import LabelSet

router = guarded_router(tags=["evaluation"])

_ENCODED_AT_ONCE = 8
_FIELDS = ("class", "model", "template", "multi_label")

_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image", "class"],
                    "additionalProperties": False,
                    "properties": {
                        "image": IMAGE_FILES,
                        "class": {
                            "type": "array",
                            "minItems": 1,
                            "items": {"type": "string"},
                            "description": "The true class of each image, in the same order. With `multi_label`: one"
                            ' class, several as a JSON array such as `["cat", "sofa"]`, or empty for none.',
                        },
                        "model": {
                            "type": "string",
                            "description": "A model of `GET /v1/models`; by default the first.",
                        },
                        "template": {
                            "type": "string",
                            "description": "A template set or one template; by default those of the label set.",
                        },
                        "multi_label": {
                            "type": "boolean",
                            "description": "Images may have several classes; by default true if one of them has, or"
                            " if the label set says so.",
                        },
                    },
                }
            },
            "application/json": {"schema": EvaluateStoredBody.model_json_schema()},
        },
    }
}


@router.post("/v1/label-sets/{name}:evaluate", status_code=202, openapi_extra=_BODY)
async def evaluate_label_set(
    name: LabelSetName,
    request: Request,
    label_sets: LabelSetsDependency,
    resolver: ResolverDependency,
    examples: ExamplesDependency,
    jobs: EvaluateJobsDependency,
    limits: ImageCountLimitsDependency,
    caller: CallerDependency,
    response: Response,
) -> JobBody:
    """Start a job that compares every method on labelled images, with intervals, a control and a verdict.

    The images of a form are encoded before the response; only their features are kept, until the job ends. Methods that
    learn use the label set's example images. Images that cannot be read are skipped and listed in the result. A JSON
    request has no images: it evaluates on the labelled example images themselves by cross-validation.

    With several classes per image, the result has the average precision of zero-shot scores, and F1 at the default
    thresholds and at cross-validated ones.
    """
    content_type = media_type_of(request)
    if content_type not in {"multipart/form-data", "application/json"}:
        raise UnsupportedMediaTypeError(
            f"content type '{content_type}' is not supported; send multipart/form-data with parts named image and"
            " class, or JSON to evaluate on the stored example images"
        )
    label_set = await label_sets.get(name)
    if content_type == "application/json":
        body = parse_json(EvaluateStoredBody, await request.body())
        task = await resolver.resolve_label_set(label_set, model=body.model, template=body.template, multi_label=False)
        multi_label = label_set.multi_label if body.multi_label is None else body.multi_label
        return _accepted(await jobs.add(label_set, task.model, body.template, multi_label=multi_label), response)
    max_images = limits.max_evaluation_images
    form, fields = await read_form(request, max_images, max_images + len(_FIELDS), "")
    check_field_names(list(fields), ("image", *_FIELDS))
    count, classes = len(form.images), fields.get("class", [])
    if len(classes) != count:
        raise InvalidFieldError.of(
            "class", f"{count} images and {len(classes)} classes are given; send one class for each image"
        )
    truth, multi_label = await asyncio.to_thread(_truth, classes, fields.get("multi_label"), label_set)
    template = fields.get("template")
    model = catalogue_name(fields["model"]) if "model" in fields else None
    task = await resolver.resolve_label_set(label_set, model=model, template=template, multi_label=False)
    await caller.spend_images(count)
    encoded: list[np.ndarray | ClientError] = []
    while form.images:
        restart_deadline(request)
        # Once its first batch is admitted, the request waits if other requests fill the queue.
        encoded += await examples.encode(
            task.model,
            form.take_images(_ENCODED_AT_ONCE),
            wait=bool(encoded),
            is_request=True,
        )
    features, classes_of_readable, skipped = _readable(encoded, truth)
    job = await jobs.add(
        label_set, task.model, template, (features, classes_of_readable), skipped, multi_label=multi_label
    )
    return _accepted(job, response)


def _accepted(job: Job, response: Response) -> JobBody:
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return JobBody.of(job)


def _truth(given: Sequence[str], multi_label: str | None, label_set: LabelSet) -> tuple[list[list[int]], bool]:
    """Return the classes of each image, by index, and whether there may be several."""
    classnames = label_set.classnames
    if multi_label not in {None, "true", "false"}:
        raise InvalidFieldError.of("multi_label", f"'{multi_label}' is neither true nor false")
    if multi_label == "false":
        return [[index] for index in indices_of(given, classnames)], False
    place = {name: index for index, name in enumerate(classnames)}
    listed = read_classes(given, len(given), classnames)
    is_multi_label = multi_label == "true" or label_set.multi_label or any(len(names) > 1 for names in listed)
    if not is_multi_label:
        return [[index] for index in indices_of(given, classnames)], False
    if not any(listed):
        raise InvalidFieldError.of("class", "no image has a class; give at least one")
    return [[place[name] for name in names] for names in listed], True


def _readable(
    encoded: list[np.ndarray | ClientError], truth: list[list[int]]
) -> tuple[np.ndarray, list[list[int]], list[dict[str, Any]]]:
    """Return the features (n, d) of the images that could be read, their classes, and what is wrong with the others."""
    features = [row for row in encoded if not isinstance(row, ClientError)]
    if not features:
        assert isinstance(encoded[0], ClientError)
        raise encoded[0]
    kept = [index for row, index in zip(encoded, truth, strict=True) if not isinstance(row, ClientError)]
    skipped = [
        {"image": index, "problem": row.message} for index, row in enumerate(encoded) if isinstance(row, ClientError)
    ]
    return np.stack(features), kept, skipped
