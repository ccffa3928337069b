"""Imports pyarrow, which is an extra."""

from typing import Any

from app.errors import NotConfiguredError


def pyarrow() -> tuple[Any, Any]:
    """Return the modules ``pyarrow`` and ``pyarrow.parquet``.

    Raises:
        NotConfiguredError: they are not installed.
    """
    try:
        import pyarrow as pa  # noqa: PLC0415 - an extra
        import pyarrow.parquet as pq  # noqa: PLC0415
    except ImportError as error:
        raise NotConfiguredError(
            "Parquet files need pyarrow, which is not installed; run: pip install 'deixis[bulk]'"
        ) from error
    return pa, pq
