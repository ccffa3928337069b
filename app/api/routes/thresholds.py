"""Thresholds of several labels per image: their precision and recall on the example images, and storing them."""

import asyncio
from typing import Annotated

from fastapi import Query, Response

from app.api.auth.access import LabelSetName
from app.api.dependencies import LabelSetsDependency, ThresholdCurvesDependency
from app.api.routes.label_sets import IfMatchHeader, etag_of, parse_if_match, with_etag
from app.api.routing import guarded_router
from app.api.schemas._base import ModelName
from app.api.schemas.label_sets import LabelSetResponse
from app.api.schemas.thresholds import ThresholdsBody, ThresholdsResponse
from app.errors import InvalidFieldError

router = guarded_router(prefix="/v1/label-sets", tags=["evaluation"])


@router.get("/{name}/thresholds", response_model=ThresholdsResponse)
async def get_thresholds(
    name: LabelSetName,
    label_sets: LabelSetsDependency,
    curves: ThresholdCurvesDependency,
    model: Annotated[ModelName | None, Query(description="A model of `GET /v1/models`; by default the first.")] = None,
    precision: Annotated[
        float | None, Query(gt=0, lt=1, description="Suggest the lowest thresholds with this precision.")
    ] = None,
    recall: Annotated[
        float | None, Query(gt=0, lt=1, description="Suggest the highest thresholds with this recall.")
    ] = None,
) -> Response:
    """Return the threshold of each label, and precision and recall against the threshold on the example images.

    Thresholds apply to requests with several labels per image. `suggested` has the highest F1, or the precision or
    recall of the request. It was chosen on the same images, so the values on new images are slightly lower; `:evaluate`
    measures held-out images.
    """
    if precision is not None and recall is not None:
        raise InvalidFieldError.of("recall", "cannot be combined with precision; leave one of them out")
    label_set = await label_sets.get(name)
    measured = await curves.measure(label_set, model, precision=precision, recall=recall)
    # In a thread: a thousand labels have 600,000 numbers.
    content = await asyncio.to_thread(lambda: ThresholdsResponse.of(measured).model_dump_json())
    return Response(content, media_type="application/json", headers={"ETag": etag_of(label_set)})


@router.patch("/{name}/thresholds")
async def set_thresholds(
    name: LabelSetName,
    body: ThresholdsBody,
    label_sets: LabelSetsDependency,
    response: Response,
    if_match: IfMatchHeader = None,
) -> LabelSetResponse:
    """Store thresholds of classes, as a new version of the label set."""
    label_set = await label_sets.set_thresholds(name, body.thresholds, if_match=parse_if_match(if_match))
    return with_etag(label_set, response)
