"""The Python client of Deixis: zero-shot image classification by a service.

The client needs httpx and pydantic only. ``pip install deixis`` installs the client; the service is the extra
``deixis[server]``. Each name is imported when it is first used, so that the command line, which has this package too,
starts without them.
"""

from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deixis._async_client import AsyncClient, AsyncJob
    from deixis._calls import ClassifyOptions
    from deixis._client import Client, Job
    from deixis._images import ImageId
    from deixis._streams import StreamResult
    from deixis.answers import Classification, ImageResult, Prediction
    from deixis.errors import ClientError, InvalidNameError, JobFailedError, ProblemError, UnreachableError
    from deixis.scikit_learn import ZeroShotClassifier

__all__ = [
    "AsyncClient",
    "AsyncJob",
    "Classification",
    "ClassifyOptions",
    "Client",
    "ClientError",
    "ImageId",
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

_MODULES = MappingProxyType(
    {
        "AsyncClient": "_async_client",
        "AsyncJob": "_async_client",
        "Classification": "answers",
        "ClassifyOptions": "_calls",
        "Client": "_client",
        "ClientError": "errors",
        "ImageId": "_images",
        "ImageResult": "answers",
        "InvalidNameError": "errors",
        "Job": "_client",
        "JobFailedError": "errors",
        "Prediction": "answers",
        "ProblemError": "errors",
        "StreamResult": "_streams",
        "UnreachableError": "errors",
        "ZeroShotClassifier": "scikit_learn",
    }
)
"""The module of each name."""


def __getattr__(name: str) -> Any:
    """Import a name at its first use."""
    if name in _MODULES:
        return getattr(import_module(f"deixis.{_MODULES[name]}"), name)
    if name in {"answers", "errors"}:
        return import_module(f"deixis.{name}")
    raise AttributeError(f"module 'deixis' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
