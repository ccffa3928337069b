"""The client of Deixis: ask a service which of your words fits a picture.

Needs httpx and pydantic, and nothing of the service itself. ``pip install deixis`` brings this; the service is the
extra ``deixis[server]``.
"""

from typing import TYPE_CHECKING, Any

from deixis._async_client import AsyncClient, AsyncJob
from deixis._client import Client, Job
from deixis.answers import Classification, ImageResult, Prediction
from deixis.errors import ClientError, JobFailedError, ProblemError, UnreachableError

if TYPE_CHECKING:
    from deixis.scikit_learn import ZeroShotClassifier

__all__ = [
    "AsyncClient",
    "AsyncJob",
    "Classification",
    "Client",
    "ClientError",
    "ImageResult",
    "Job",
    "JobFailedError",
    "Prediction",
    "ProblemError",
    "UnreachableError",
    "ZeroShotClassifier",
]


def __getattr__(name: str) -> Any:
    """Import what needs scikit-learn when it is asked for."""
    if name == "ZeroShotClassifier":
        from deixis.scikit_learn import ZeroShotClassifier  # noqa: PLC0415 - what it needs may not be there

        return ZeroShotClassifier
    raise AttributeError(f"module 'deixis' has no attribute {name!r}")
