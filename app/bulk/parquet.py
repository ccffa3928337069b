"""Imports pyarrow, which is an extra."""

from typing import Any

from app.errors import NotConfiguredError
from deixis.extras import needs_extra


def pyarrow() -> tuple[Any, Any]:
    """Return the modules ``pyarrow`` and ``pyarrow.parquet``.

    Raises:
        NotConfiguredError: they are not installed.
    """
    try:
        import pyarrow as pa  # noqa: PLC0415 - an extra
        import pyarrow.parquet as pq  # noqa: PLC0415
    except ImportError as error:
        raise NotConfiguredError(needs_extra("Parquet", "bulk")) from error
    return pa, pq
