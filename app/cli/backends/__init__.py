"""Where a command runs: in this process, or on a server. Both backends return the types of ``deixis.answers``."""

from app.cli.backends._base import Backend, CurveFiles, LabelSetInput, OnProgress, read_image
from app.cli.backends.in_process import InProcessBackend
from app.cli.backends.over_http import HttpBackend, client_options, open_http_backend

__all__ = [
    "Backend",
    "CurveFiles",
    "HttpBackend",
    "InProcessBackend",
    "LabelSetInput",
    "OnProgress",
    "client_options",
    "open_http_backend",
    "read_image",
]
