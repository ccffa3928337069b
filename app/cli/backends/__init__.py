"""Where a command's work is done: in this process, or by a server over HTTP; both answer with the contract's bodies."""

from app.cli.backends._base import Advance, Backend, CurveInput, read_image
from app.cli.backends.in_process import InProcess
from app.cli.backends.over_http import OverHttp, RefusedError, over_http

__all__ = ["Advance", "Backend", "CurveInput", "InProcess", "OverHttp", "RefusedError", "over_http", "read_image"]
