"""Errors as RFC 9457 problem details."""

from collections.abc import Callable
from typing import Any

from pydantic import Field

from app.api.schemas._base import Response
from app.errors import DeixisError

ProblemOf = Callable[[DeixisError], dict[str, Any]]
"""Tells an error as the members of a problem."""


class Problem(Response):
    """RFC 9457 problem details."""

    type: str = Field(
        description="A stable URN; docs/problems.md explains each.", examples=["urn:deixis:problem:too-large"]
    )
    title: str
    status: int
    detail: str = Field(description="Names the bad value, the rule and the way out.")
    request_id: str | None = None
    # Left out where there are none, as in an answer that is a problem as a whole.
    errors: list[dict[str, str]] | None = Field(
        None, exclude_if=lambda errors: errors is None, description="For 422: each field and what is wrong with it."
    )
