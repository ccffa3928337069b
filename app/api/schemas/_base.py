"""Base classes of all request and response bodies."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Annotated, Any, ClassVar, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError, PydanticKnownError

from app.encoders.model_names import catalogue_name
from app.errors import did_you_mean
from app.names.class_names import MAX_ITEMS
from app.names.field_values import boolean_in, not_a_boolean, value_at, with_value
from app.names.labels import split_labels
from app.names.text import MAX_TEXT_CHARS

MAX_IMAGE_CHARS = 2**30
"""Of an image in base64 or as a URL; the limit on the body is lower."""

ModelName = Annotated[str, AfterValidator(catalogue_name)]
"""The model of a request, also by its id on the Hugging Face hub."""

_INVALID_VALUE = "invalid_value"

_PART = 10
"""Entries of an object that are validated together, and the most that are reported."""


def _in_parts(value: object, handler: ValidatorFunctionWrapHandler) -> object:
    if not isinstance(value, Mapping) or len(value) <= _PART:
        return handler(value)
    if len(value) > MAX_ITEMS:
        limit = {"field_type": "Object", "max_length": MAX_ITEMS, "actual_length": len(value)}
        raise PydanticKnownError("too_long", limit)
    entries = iter(value.items())
    parts: Iterator[dict[str, object]] = iter(lambda: dict(islice(entries, _PART)), {})
    return {name: entry for part in parts for name, entry in handler(part).items()}


FailFast = WrapValidator(_in_parts)
"""Validates an object of any names up to its first invalid entries, as ``fail_fast`` does a list, with its limit."""


def split_text(labels: object) -> object:
    """Split labels that a program sends as one string, as in a form."""
    if not isinstance(labels, str):
        return labels
    return split_labels(labels) if labels else []


class Request(BaseModel):
    """A request body; unknown fields are errors, so that a misspelled field is not silently ignored.

    Reporting an error costs more than sending it. Therefore too many fields give a single error, and lists and objects
    of any length are validated only up to their first invalid items (``fail_fast``, ``FailFast``). No text is longer
    than ``MAX_TEXT_CHARS``, except in fields that allow more, so that work on a text that is slow for each character is
    bounded. A boolean is not a number.
    """

    model_config = ConfigDict(extra="forbid", str_max_length=MAX_TEXT_CHARS)

    _number_fields: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        fields = cls.model_fields.items()
        cls._number_fields = frozenset(field.alias or name for name, field in fields if _has_numbers(field.annotation))

    @model_validator(mode="wrap")
    @classmethod
    def _check_fields(cls, value: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(value, Mapping):
            # Up to twice the number of known fields, every unknown field is reported by its name.
            limit = 2 * len(cls.model_fields)
            if len(value) > limit:
                raise PydanticCustomError("too_many_fields", f"has {len(value):,} fields; at most {limit} are accepted")
            for name in sorted(cls._number_fields.intersection(value)):
                if (place := boolean_in(value.get(name))) is not None:
                    problem = InitErrorDetails(type=not_a_boolean(), loc=(name, *place), input=None)
                    raise _completed(ValidationError.from_exception_data(cls.__name__, [problem]), (), value)
        try:
            return handler(value)
        except ValidationError as error:
            known = [field.alias or name for name, field in cls.model_fields.items()]
            # Only here is it known which model refused the field: the request, or a part of it.
            raise _completed(error, known, value) from error


def _has_numbers(annotation: object) -> bool:
    return annotation in {int, float} or any(map(_has_numbers, get_args(annotation)))


def _completed(error: ValidationError, known: Sequence[str], value: object) -> ValidationError:
    """Return the error with messages that name the known fields, or show the value that was given."""
    problems: list[InitErrorDetails] = []
    for problem in error.errors(include_url=False, include_input=False):
        kind, message, loc = problem["type"], problem["msg"], problem["loc"]
        if kind == "extra_forbidden":
            kind, message = "unknown_field", unknown_field(str(loc[-1]), known)
        elif kind in {"model_type", "model_attributes_type"} and not loc:
            message = f"must be an object; its fields: {', '.join(sorted(known))}"
        elif kind != _INVALID_VALUE and (shown := with_value(message, value_at(value, loc))) != message:
            kind, message = _INVALID_VALUE, shown
        # Without a context, because the message is complete, and must not be filled again as a template.
        reported = PydanticCustomError(kind, message)
        problems.append({"type": reported, "loc": loc, "input": None})
    return ValidationError.from_exception_data(error.title, problems)


def unknown_field(name: str, known: Sequence[str]) -> str:
    """Return the problem of a field that is not one of the known fields, with the one it resembles."""
    return f"unknown field; known: {', '.join(sorted(known))}{did_you_mean(name, known)}"


class Response(BaseModel):
    """A response body."""

    model_config = ConfigDict(protected_namespaces=())
