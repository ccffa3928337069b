"""What all request and response bodies share."""

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


class Request(BaseModel):
    """Unknown fields are refused: a mistyped one must not be ignored.

    Each fault costs more to tell than to send. So more fields than there are make one, and lists are read up to their
    first.
    """

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _check_count(cls, given: object) -> object:
        # There may be as many unknown fields as known ones, so that each is told by name.
        if isinstance(given, Mapping) and len(given) > (most := 2 * len(cls.model_fields)):
            raise PydanticCustomError("too_many_fields", f"has {len(given):,} fields; {most} are more than it needs")
        return given


class Response(BaseModel):
    """Answers."""

    model_config = ConfigDict(protected_namespaces=())
