"""POST /v1/zero-shot-image-classification, in the form of Hugging Face's task of that name."""

from fastapi import Request

from app.api.auth.access import CallerDependency, log_fields
from app.api.dependencies import PipelineDependency, ResolverDependency
from app.api.disconnects import unless_disconnected
from app.api.forms import read_zero_shot_input
from app.api.routing import guarded_router
from app.api.schemas.hugging_face import ScoredLabelBody, ZeroShotBody
from app.classification.request import ClassifyRequest
from app.errors import InvalidFieldError

router = guarded_router(tags=["classify"])

_SCHEMA = ZeroShotBody.model_json_schema()
# Inlined, because FastAPI collects no definitions from a body that the route parses itself.
_SCHEMA["properties"]["parameters"] = _SCHEMA.pop("$defs")["ZeroShotParameters"]
# Our names of fields, and where they are in this body.
_FIELDS = {"labels": "parameters.candidate_labels", "template": "parameters.hypothesis_template", "url": "inputs"}
_BODY = {"requestBody": {"required": True, "content": {"application/json": {"schema": _SCHEMA}}}}


@router.post("/v1/zero-shot-image-classification", response_model=list[ScoredLabelBody], openapi_extra=_BODY)
async def zero_shot_image_classification(
    request: Request, resolver: ResolverDependency, pipeline: PipelineDependency, caller: CallerDependency
) -> list[ScoredLabelBody]:
    """Classify one image as the Hugging Face task does; returns all labels, best first."""
    body, image = await read_zero_shot_input(request)
    parameters = body.parameters
    try:
        task = await resolver.resolve(
            ClassifyRequest(
                labels=parameters.candidate_labels,
                template=parameters.hypothesis_template,
                model=body.model,
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
