"""Values of fields in JSON: numbers that are not booleans, and messages that show the value that was given."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import BeforeValidator, ValidationError
from pydantic_core import PydanticCustomError

from app.names.text import quoted

_OF_VALUES = "Input should"
_ABOUT_VALUES = (_OF_VALUES, "Input is not")
# Longer numbers are not shown; Python refuses to write thousands of digits.
_MAX_SHOWN_BITS = 200


def not_a_boolean() -> PydanticCustomError:
    """Return the error of a boolean that pydantic would take for the number 0 or 1."""
    return PydanticCustomError("number", f"{_OF_VALUES} be a number")


def _no_boolean(value: object) -> object:
    if isinstance(value, bool):
        raise not_a_boolean()
    return value


def boolean_in(value: object) -> tuple[str | int, ...] | None:
    """Return the place of the first boolean: () for the value itself, or the place in a list or object."""
    if isinstance(value, Mapping):
        return next(((name,) for name, item in value.items() if isinstance(item, bool)), None)
    if isinstance(value, list):
        return next(((place,) for place, item in enumerate(value) if isinstance(item, bool)), None)
    return () if isinstance(value, bool) else None


Number = Annotated[float, BeforeValidator(_no_boolean)]
"""A number in JSON."""

Whole = Annotated[int, BeforeValidator(_no_boolean)]
"""A whole number in JSON."""


def value_at(value: object, loc: Sequence[str | int]) -> object:
    """Return the part of JSON at a place; Ellipsis if there is none, as for a member of a union."""
    for part in loc:
        is_item = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if not (is_item or (isinstance(value, Mapping) and part in value)):
            return ...
        value = value[part]  # type: ignore[index]
    return value


def with_value(message: str, value: object) -> str:
    """Return a message of pydantic; one about a value shows it, unless it is too long."""
    if not message.startswith(_ABOUT_VALUES) or value is ...:
        return message
    if isinstance(value, str):
        return f"{message}; given: {quoted(value)}"
    if isinstance(value, bool) or value is None:
        return f"{message}; given: {json.dumps(value)}"
    if isinstance(value, float) or (isinstance(value, int) and value.bit_length() < _MAX_SHOWN_BITS):
        return f"{message}; given: {value!r}"
    if isinstance(value, list | Mapping):
        return f"{message}; given: {'a list' if isinstance(value, list) else 'an object'}"
    return message


def problem_of(error: ValidationError, value: object) -> str:
    """Return the place and the message of the first problem of JSON, with the value that was given."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {with_value(first['msg'], value_at(value, first['loc']))}"
