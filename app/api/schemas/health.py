"""Health probes."""

from pydantic import Field

from app import __version__
from app.api.schemas._base import Response


class Health(Response):
    """The answer of a probe."""

    status: str
    service: str = Field(
        f"deixis {__version__}", description="The program that answers, and its version; commands look for it."
    )
