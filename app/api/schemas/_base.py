"""Base classes of all request and response bodies."""

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from app.names.text import MAX_TEXT_CHARS

MAX_IMAGE_CHARS = 2**30
"""Of an image in base64 or as a URL; the limit on the body is lower."""


class Request(BaseModel):
    """A request body; unknown fields are errors, so that a misspelled field is not silently ignored.

    Reporting an error costs more than sending it. Therefore too many fields give a single error, and lists are
    validated only up to their first invalid item (``fail_fast``). No text is longer than ``MAX_TEXT_CHARS``, except in
    fields that allow more, so that work on a text that is slow for each character is bounded.
    """

    model_config = ConfigDict(extra="forbid", str_max_length=MAX_TEXT_CHARS)

    @model_validator(mode="before")
    @classmethod
    def _check_count(cls, value: object) -> object:
        # Up to twice the number of known fields, every unknown field is reported by its name.
        limit = 2 * len(cls.model_fields)
        if isinstance(value, Mapping) and len(value) > limit:
            raise PydanticCustomError("too_many_fields", f"has {len(value):,} fields; at most {limit} are accepted")
        return value


class Response(BaseModel):
    """A response body."""

    model_config = ConfigDict(protected_namespaces=())
