"""Rows: what became of each image, and the columns of Parquet that say so."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.bulk.parquet import pyarrow
from app.types import ImageResult, Prediction

# Under these names Parquet's own metadata says what the labels are of.
METADATA = "deixis."


@dataclass(frozen=True, slots=True)
class Row:
    """What became of one image; ``error`` says why it could not be read."""

    key: str
    source: str | None
    result: ImageResult | None = None
    error: str | None = None


def schema() -> Any:
    """Return the columns; all but ``key`` are null where ``error`` is not, and ``source`` where a file was named."""
    pa, _ = pyarrow()
    return pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            pa.field("source", pa.string()),
            pa.field("label", pa.string()),
            pa.field("score", pa.float64()),
            pa.field("similarity", pa.float64()),
            pa.field("labels", pa.list_(pa.string())),
            pa.field("scores", pa.list_(pa.float64())),
            pa.field("similarities", pa.list_(pa.float64())),
            pa.field("rejected", pa.bool_()),
            pa.field("prediction_set", pa.list_(pa.string())),
            pa.field("error", pa.string()),
        ]
    )


def metadata_of(question: Mapping[str, Any]) -> dict[str, str]:
    """Return what Parquet's metadata says of a question."""
    return {
        f"{METADATA}question": json.dumps(question),
        f"{METADATA}model": question["model"],
        f"{METADATA}label_set": question.get("label_set") or "",
    }


def table_of(rows: Sequence[Row], question: Mapping[str, Any]) -> Any:
    """Return rows as a table, with the question in its metadata."""
    pa, _ = pyarrow()
    return pa.Table.from_pylist([_cells(row) for row in rows], schema().with_metadata(metadata_of(question)))


def _cells(row: Row) -> dict[str, Any]:
    # Names of files may be no Unicode, which Parquet does not take.
    cells: dict[str, Any] = {"key": _text(row.key), "source": None if row.source is None else _text(row.source)}
    if row.result is None:
        return {**cells, "error": _text(row.error or "")}
    predictions = row.result.predictions
    best = next(iter(predictions), None)  # for some images no names are found
    return {
        **cells,
        "label": best and best.label,
        "score": best and best.score,
        "similarity": best and best.similarity,
        "labels": [each.label for each in predictions],
        "scores": [each.score for each in predictions],
        "similarities": [each.similarity for each in predictions],
        "rejected": row.result.rejected,
        "prediction_set": row.result.prediction_set,
    }


def row_of(cells: Mapping[str, Any]) -> Row:
    """Return the row whose cells these are."""
    if cells["error"] is not None:
        return Row(cells["key"], cells["source"], error=cells["error"])
    told = zip(cells["labels"], cells["scores"], cells["similarities"], strict=True)
    prediction_set = cells["prediction_set"]
    result = ImageResult(
        tuple(Prediction(*each) for each in told),
        rejected=cells["rejected"],
        prediction_set=None if prediction_set is None else tuple(prediction_set),
    )
    return Row(cells["key"], cells["source"], result)


def _text(text: str) -> str:
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
