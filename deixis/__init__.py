"""The Python client of Deixis: zero-shot image classification by a service.

The client needs httpx and pydantic only. ``pip install deixis`` installs the client; the service is the extra
``deixis[server]``.
"""

from typing import TYPE_CHECKING, Any

from deixis._async_client import AsyncClient, AsyncJob
from deixis._calls import ClassifyOptions
from deixis._client import Client, Job
from deixis._streams import StreamResult
from deixis.answers import Classification, ImageResult, Prediction
from deixis.errors import ClientError, InvalidNameError, JobFailedError, ProblemError, UnreachableError

if TYPE_CHECKING:
    from deixis.scikit_learn import ZeroShotClassifier

__all__ = [
    "AsyncClient",
    "AsyncJob",
    "Classification",
    "ClassifyOptions",
    "Client",
    "ClientError",
    "ImageResult",
    "InvalidNameError",
    "Job",
    "JobFailedError",
    "Prediction",
    "ProblemError",
    "StreamResult",
    "UnreachableError",
    "ZeroShotClassifier",
]


def __getattr__(name: str) -> Any:
    """Import the scikit-learn classifier at its first use, because scikit-learn is optional."""
    if name == "ZeroShotClassifier":
        from deixis.scikit_learn import ZeroShotClassifier  # noqa: PLC0415 - an optional dependency

        return ZeroShotClassifier
    raise AttributeError(f"module 'deixis' has no attribute {name!r}")
