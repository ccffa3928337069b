"""POST /v1/embeddings, as in OpenAI's API, for texts and for images."""

import asyncio
import base64
import json
from typing import Any

import numpy as np
from fastapi import Request, Response

from app.api.auth.access import caller_of, log_fields
from app.api.dependencies import embedding_parts
from app.api.disconnects import unless_disconnected
from app.api.forms import read_embeddings_input
from app.api.routing import DirectRoute, guarded_router
from app.api.schemas.embeddings import EmbeddingsBody, EmbeddingsResponse
from app.types import ImageFeatures

router = guarded_router(tags=["embeddings"], route_class=DirectRoute)

_BODY = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": EmbeddingsBody.model_json_schema()}}}
}


@router.post("/v1/embeddings", response_model=EmbeddingsResponse, openapi_extra=_BODY)
async def create_embeddings(request: Request) -> Response:
    """Return the embedding of each text or image, a vector of length 1; dot products are cosine similarities."""
    embedder, limits = embedding_parts(request)
    body, images = await read_embeddings_input(request, max_images=limits.max_images)
    if images is None:
        model, features = await unless_disconnected(
            request, embedder.embed_texts(body.input, model=body.model, dimensions=body.dimensions)
        )
    else:
        await caller_of(request).spend_images(len(images))
        model, features = await unless_disconnected(
            request, embedder.embed_images(images, model=body.model, dimensions=body.dimensions)
        )
    log_fields(request, model=model, images=0 if images is None else len(images), texts=0 if images else len(features))
    # Serialised in a thread: a thousand rows of 512 numbers are megabytes of JSON.
    content = await asyncio.to_thread(_serialized, model, features, as_base64=body.encoding_format == "base64")
    return Response(content, media_type="application/json")


def _serialized(model: str, features: ImageFeatures, *, as_base64: bool) -> bytes:
    rows = features.astype("<f4", copy=False)
    data: list[dict[str, Any]] = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(row.tobytes()).decode() if as_base64 else row.tolist(),
        }
        for index, row in enumerate(np.ascontiguousarray(rows))
    ]
    usage = {"prompt_tokens": 0, "total_tokens": 0}
    return json.dumps({"object": "list", "data": data, "model": model, "usage": usage}, separators=(",", ":")).encode()
