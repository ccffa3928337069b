"""The request and response of OpenAI's embeddings API."""

from typing import Annotated, Literal

from pydantic import Field, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticCustomError

from app.api.schemas._base import MAX_IMAGE_CHARS, ModelName, Request, Response
from app.names.class_names import MAX_ITEMS

_Text = Annotated[str, Field(min_length=1, max_length=MAX_IMAGE_CHARS)]
_Texts = Annotated[list[_Text], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]


def _as_list(value: object, handler: ValidatorFunctionWrapHandler) -> list[str]:
    if isinstance(value, list) and value and isinstance(value[0], int | list):
        raise PydanticCustomError(
            "token_ids",
            "token ids are not supported; send texts (LangChain: OpenAIEmbeddings(check_embedding_ctx_length=False))",
        )
    if not isinstance(value, str | list):
        raise PydanticCustomError("texts_type", "must be a string or a list of strings")
    if value == "":
        raise PydanticCustomError("string_too_short", "String should have at least 1 character")
    texts: list[str] = handler([value] if isinstance(value, str) else value)
    return texts


# Not a union type, which would report every error once per member.
OneOrMore = Annotated[_Texts, WrapValidator(_as_list, json_schema_input_type=_Text | _Texts)]


class EmbeddingsBody(Request):
    """Texts or images to embed, as in OpenAI's embeddings API."""

    input: OneOrMore = Field(
        description="One or more texts, or images: in base64, as `data:` URLs, or URLs if the operator allows URLs."
    )
    model: ModelName | None = Field(None, description="A model of `GET /v1/models`; by default the first.")
    modality: Literal["text", "image"] = Field("text", description="The kind of `input`.")
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="`float`: an array of numbers; `base64`: little-endian float32 values in base64."
    )
    dimensions: int | None = Field(None, ge=1, description="If given, it must equal the dimensions of the model.")
    user: str | None = Field(None, description="Accepted for compatibility and ignored.")


class EmbeddingBody(Response):
    """The embedding of one text or image."""

    object: Literal["embedding"] = "embedding"
    index: int = Field(description="Its index in the request, from 0.")
    embedding: list[float] | str = Field(description="A vector of length 1; a string if `encoding_format` is `base64`.")


class EmbeddingsUsage(Response):
    """Always zero; clients of OpenAI's API expect these fields."""

    prompt_tokens: int = 0
    total_tokens: int = 0


class EmbeddingsResponse(Response):
    """Embeddings in the order of the request."""

    object: Literal["list"] = "list"
    data: list[EmbeddingBody]
    model: str
    usage: EmbeddingsUsage
