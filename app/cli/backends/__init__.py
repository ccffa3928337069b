"""Where a command runs: in this process, or on a server. Both backends return the types of ``deixis.answers``.

A command imports the backend that it uses, and not the other one.
"""

from app.cli.backends._base import Backend, CurveFiles, LabelSetInput, OnProgress, failed_result, read_image

__all__ = ["Backend", "CurveFiles", "LabelSetInput", "OnProgress", "failed_result", "read_image"]
