"""Errors as RFC 9457 problem details."""

from collections.abc import Callable
from typing import Any

from pydantic import Field

from app.api.schemas._base import Response
from app.errors import DeixisError

ProblemOf = Callable[[DeixisError], dict[str, Any]]
"""Converts an error to the members of a problem."""


class Problem(Response):
    """RFC 9457 problem details."""

    type: str = Field(
        description="A stable URN; docs/problems.md describes each one.", examples=["urn:deixis:problem:too-large"]
    )
    title: str
    status: int
    detail: str = Field(description="The invalid value, the rule, and how to correct the request.")
    request_id: str | None = None
    # Omitted if there are none, as in a response that is itself a problem.
    errors: list[dict[str, str]] | None = Field(
        None,
        exclude_if=lambda errors: errors is None,
        description="For 422: the invalid fields and their problems, at most 100.",
    )
