"""What may be named in a request: the models that are served and the methods there are."""

from fastapi import APIRouter

from app.adapters.registry import METHODS
from app.api.dependencies import ServiceDependency
from app.api.schemas import MethodBody, MethodList, ModelBody, ModelList
from app.service import DEFAULT_METHOD

router = APIRouter(prefix="/v1", tags=["models and methods"])


@router.get("/models")
async def models(service: ServiceDependency) -> ModelList:
    """List the models that are served, the default first."""
    return ModelList(
        models=[
            ModelBody(
                name=name,
                default=name == service.pipeline.default_model,
                embed_dim=served.encoder.embed_dim,
                image_size_px=served.encoder.image_size_px,
                logit_scale=served.encoder.logit_scale,
                logit_bias=served.encoder.logit_bias,
                queued_images=served.images.admitted,
                probability="softmax" if served.encoder.logit_bias is None else "sigmoid",
            )
            for name, served in service.pipeline.models.items()
        ]
    )


@router.get("/methods")
async def methods() -> MethodList:
    """List the methods, with their sources."""
    return MethodList(
        methods=[
            MethodBody(
                name=name,
                summary=adapter.summary,
                transductive=adapter.transductive,
                default=name == DEFAULT_METHOD,
            )
            for name, adapter in METHODS.items()
        ]
    )
