"""Health probes."""

from app.api.schemas._base import Response


class Health(Response):
    """The answer of a probe."""

    status: str
