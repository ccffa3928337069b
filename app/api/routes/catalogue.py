"""The models in service and the methods."""

from collections.abc import Mapping

from app.api.dependencies import AcceptsImageUrlsDependency, ImageCountLimitsDependency, ModelsDependency
from app.api.routing import guarded_router
from app.api.schemas.catalogue import (
    ImageInputBody,
    ImagePathBody,
    MethodBody,
    MethodList,
    ModelBody,
    ModelEntry,
    ModelList,
    OptionBody,
)
from app.classification.method_names import DEFAULT_METHOD
from app.classification.methods import CASED, METHODS
from app.types import Option

router = guarded_router(prefix="/v1", tags=["models and methods"])


@router.get("/models")
async def models(
    registry: ModelsDependency, limits: ImageCountLimitsDependency, accepts_urls: AcceptsImageUrlsDependency
) -> ModelList:
    """List the models in service, the default first, and the images that a request may contain."""
    return ModelList(
        images=ImageInputBody(max_per_request=limits.max_images, max_bytes=registry.max_image_bytes, urls=accepts_urls),
        data=[ModelEntry(id=name) for name in registry.names],
        models=[
            ModelBody(
                name=served.name,
                default=served.name == registry.default,
                embed_dim=served.encoder.embed_dim,
                image_size_px=served.encoder.image_size_px,
                logit_scale=served.encoder.logit_scale,
                logit_bias=served.encoder.logit_bias,
                image_path=ImagePathBody(
                    backend=served.encoder.image_path.backend,
                    device=served.encoder.image_path.device,
                    precision=served.encoder.image_path.precision,
                    threads=served.encoder.image_path.threads,
                    image_batch=served.images.batch_size,
                    images_per_s=served.encoder.image_path.images_per_s,
                ),
                queued_images=served.images.admitted,
                probability="softmax" if served.encoder.logit_bias is None else "sigmoid",
            )
            for served in registry
        ],
    )


@router.get("/methods")
async def methods() -> MethodList:
    """List the classification methods with their sources and options."""
    return MethodList(
        methods=[
            MethodBody(
                name=name,
                summary=method.summary,
                transductive=method.transductive,
                learns_from=sorted(method.learns),
                stateful=method.stateful,
                default=name == DEFAULT_METHOD,
                uses_descriptions=method.uses_descriptions,
                control=method.is_control,
                vocabulary_free=False,
                options=_options(method.options),
            )
            for name, method in METHODS.items()
        ]
        + [
            MethodBody(
                name=CASED.name,
                summary=CASED.summary,
                transductive=False,
                learns_from=[],
                stateful=False,
                default=False,
                uses_descriptions=False,
                control=False,
                vocabulary_free=True,
                options=_options(CASED.options),
            )
        ]
    )


def _options(options: Mapping[str, Option]) -> dict[str, OptionBody]:
    return {
        name: OptionBody(
            default=option.default, minimum=option.minimum, maximum=option.maximum, description=option.description
        )
        for name, option in options.items()
    }
