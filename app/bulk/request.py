"""What a run classifies, and where it writes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from app.bulk.sources import ParquetColumns

PART_IMAGES = 2048
"""Default number of rows in a part: three minutes of work at ten images per second."""


@dataclass(frozen=True, slots=True)
class BulkRequest:
    """What to classify, and where to write the rows.

    Args:
        sources: as for ``app.bulk.sources.plan_units``.
        out: a folder of parts, or a Parquet file.
        columns: of Parquet sources.
        part_images: maximum number of rows in a part.
        retry_bad: classify the images whose row has an error again.
    """

    sources: Sequence[Path]
    out: Path
    columns: ParquetColumns = field(default_factory=ParquetColumns)
    part_images: int = PART_IMAGES
    retry_bad: bool = False
