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
    encoders = [served.encoder for served in service.pipeline.models.values()]
    return ModelList(
        models=[
            ModelBody(
                name=encoder.name,
                default=encoder.name == service.pipeline.default_model,
                embed_dim=encoder.embed_dim,
                image_size_px=encoder.image_size_px,
                logit_scale=encoder.logit_scale,
                logit_bias=encoder.logit_bias,
                probability="softmax" if encoder.logit_bias is None else "sigmoid",
            )
            for encoder in encoders
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
