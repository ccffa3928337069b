"""The manifest of a run: its sources and its query, and how those of another run differ."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.errors import ConflictError

FORMAT = 2
_MAX_SHOWN_CHARS = 100
_MAX_SHOWN_VALUES = 3


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a run classifies, and how.

    Args:
        sources: absolute paths and patterns.
        columns: of Parquet sources, as requested.
        query: see ``app.bulk.query.query_of``.
        part_images: maximum number of rows in a part.
        units: number of work units in the plan.
        images: total number, if it is known without reading them.
        started_at: ISO 8601, UTC.
        version: of Deixis that started the run.
        format: of these files.
    """

    sources: tuple[str, ...]
    columns: Mapping[str, str | None]
    query: Mapping[str, Any]
    part_images: int
    units: int
    images: int | None
    started_at: str
    version: str
    format: int = FORMAT

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Manifest":
        """Return the manifest with the fields of ``dataclasses.asdict``; KeyError or TypeError for other fields."""
        return cls(**{**fields, "sources": tuple(fields["sources"])})

    def check_matches(self, requested: "Manifest", place: Path) -> None:
        """Refuse to resume this run for another request.

        Raises:
            ConflictError: the request has other sources, columns or another query.
        """
        differences = [
            f"{name} {_difference(stored, given)}"
            for name, stored, given in (
                ("sources", list(self.sources), list(requested.sources)),
                ("columns", dict(self.columns), dict(requested.columns)),
                *(
                    (name, self.query.get(name), requested.query.get(name))
                    for name in dict.fromkeys((*self.query, *requested.query))
                ),
            )
            if stored != given
        ]
        if differences:
            raise ConflictError(
                f"'{place}' has a run with {'; with '.join(differences)}; repeat the command of that run to resume it,"
                " or name another --out"
            )


def _difference(stored: Any, given: Any) -> str:
    """Describe two values that differ; of long lists and texts, only the parts that differ."""
    texts = [json.dumps(value, ensure_ascii=False) for value in (stored, given)]
    if all(len(text) <= _MAX_SHOWN_CHARS for text in texts):
        return f"{texts[0]}, and this command has {texts[1]}"
    if isinstance(stored, list) and isinstance(given, list):
        removed, added = _without(stored, given), _without(given, stored)
        shown = [
            f"only {owner} has {_first(values)}"
            for owner, values in (("the run", removed), ("this command", added))
            if values
        ]
        if shown:
            return f"of which {', and '.join(shown)}"
    common = next((place for place, pair in enumerate(zip(*texts, strict=False)) if len({*pair}) > 1), 0)
    start = max(0, common - _MAX_SHOWN_CHARS // 5)
    excerpts = [f"{'...' if start else ''}{_shorten(text[start:])}" for text in texts]
    return f"{excerpts[0]}, and this command has {excerpts[1]}"


def _without(values: Sequence[Any], others: Sequence[Any]) -> list[str]:
    """Return the values that are not among the others, as JSON."""
    known = {json.dumps(value, ensure_ascii=False) for value in others}
    return [text for value in values if (text := json.dumps(value, ensure_ascii=False)) not in known]


def _first(texts: Sequence[str]) -> str:
    more = len(texts) - _MAX_SHOWN_VALUES
    return ", ".join(map(_shorten, texts[:_MAX_SHOWN_VALUES])) + (f" and {more:,} more" if more > 0 else "")


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[:_MAX_SHOWN_CHARS]}..."
