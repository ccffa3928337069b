"""The request and response of OpenAI's embeddings API."""

from typing import Annotated, Literal

from pydantic import Field

from app.api.schemas._base import Request, Response
from app.names.class_names import MAX_ITEMS


class EmbeddingsBody(Request):
    """Texts, or images, of which features are wanted; the form of OpenAI's embeddings."""

    input: (
        Annotated[str, Field(min_length=1)]
        | Annotated[
            list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)
        ]
    ) = Field(description="One or more texts; or images in base64, as `data:` URLs, or URLs where these are allowed.")
    model: str | None = Field(None, description="A model of `GET /v1/models`; the first by default.")
    modality: Literal["text", "image"] = Field("text", description="What `input` holds.")
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="Numbers, or the base64 of little-endian float32."
    )
    dimensions: int | None = Field(None, ge=1, description="Must be the model's, where it is given.")
    user: str | None = Field(None, description="Taken, and not looked at.")


class EmbeddingBody(Response):
    """The feature of one text or image."""

    object: Literal["embedding"] = "embedding"
    index: int = Field(description="Its place in the request, from 0.")
    embedding: list[float] | str = Field(description="Of length 1; a string where base64 was asked for.")


class EmbeddingsUsage(Response):
    """What OpenAI's clients expect; tokens are not counted here."""

    prompt_tokens: int = 0
    total_tokens: int = 0


class EmbeddingsResponse(Response):
    """Features in the order of the request."""

    object: Literal["list"] = "list"
    data: list[EmbeddingBody]
    model: str
    usage: EmbeddingsUsage
