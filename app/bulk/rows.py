"""The rows of the output: one for each image, and their columns in Parquet."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.bulk.parquet import pyarrow
from app.types import ImageResult

# Prefix of the names in Parquet's metadata.
METADATA = "deixis."


@dataclass(frozen=True, slots=True)
class Row:
    """The result of one image, or its cells in an earlier part, or the reason why it has none."""

    key: str
    source: str | None
    result: ImageResult | Mapping[str, Any] | None = None
    error: str | None = None


def schema() -> Any:
    """Return the columns.

    Rows with an ``error`` have null in all columns but ``key`` and ``source``. Rows of files that were named on the
    command line have no ``source``.
    """
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
            pa.field("labels_above", pa.list_(pa.string())),
            pa.field("label_path", pa.list_(pa.string())),
            pa.field("label_path_scores", pa.list_(pa.float64())),
            pa.field("out_of_vocabulary", pa.float64()),
            pa.field("weak_match", pa.bool_()),
            pa.field("error", pa.string()),
        ]
    )


def metadata_of(query: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata of Parquet files with the results of a query."""
    return {
        f"{METADATA}query": json.dumps(query),
        f"{METADATA}model": query["model"],
        f"{METADATA}label_set": query.get("label_set") or "",
    }


def to_table(rows: Sequence[Row], query: Mapping[str, Any]) -> Any:
    """Return rows as an Arrow table, with the query in its metadata."""
    pa, _ = pyarrow()
    return pa.Table.from_pylist([_to_cells(row) for row in rows], schema().with_metadata(metadata_of(query)))


def _to_cells(row: Row) -> dict[str, Any]:
    cells: dict[str, Any] = {"key": _utf8(row.key), "source": None if row.source is None else _utf8(row.source)}
    if row.result is None:
        return {**cells, "error": _utf8(row.error or "")}
    return {**(_result_cells(row.result) if isinstance(row.result, ImageResult) else row.result), **cells}


def _result_cells(result: ImageResult) -> dict[str, Any]:
    predictions, path = result.predictions, result.path
    best = next(iter(predictions), None)  # vocabulary-free classification may find no label
    return {
        "label": best and best.label,
        "score": best and best.score,
        "similarity": best and best.similarity,
        "labels": [prediction.label for prediction in predictions],
        "scores": [prediction.score for prediction in predictions],
        "similarities": [prediction.similarity for prediction in predictions],
        "rejected": result.rejected,
        "prediction_set": result.prediction_set,
        "labels_above": result.labels,
        "label_path": None if path is None else [step.label for step in path],
        "label_path_scores": None if path is None else [step.score for step in path],
        "out_of_vocabulary": result.out_of_vocabulary and result.out_of_vocabulary.score,
        "weak_match": result.weak_match,
    }


def from_cells(cells: Mapping[str, Any]) -> Row:
    """Return the row with these cells; columns that parts of earlier releases lack stay null."""
    is_bad = cells["error"] is not None
    return Row(cells["key"], cells["source"], None if is_bad else cells, cells["error"])


def _utf8(text: str) -> str:
    """Return a text that Parquet accepts; file names may contain bytes that are not valid UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
