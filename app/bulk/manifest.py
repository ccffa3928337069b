"""What a run of bulk work is about, and how another that is asked for differs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.errors import ConflictError

FORMAT = 1
_SHOWN_CHARS = 100
_SHOWN_VALUES = 3


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a run is about.

    Args:
        sources: absolute.
        columns: of Parquet, as they were asked for.
        question: what was asked, with the model, the method and the version of the label set.
        part_images: the most rows of a part.
        units: of the plan.
        images: in all, where that could be known without reading them.
        began_at: ISO 8601, UTC.
        version: of Deixis, by which it was begun.
        format: of these files.
    """

    sources: tuple[str, ...]
    columns: Mapping[str, str | None]
    question: Mapping[str, Any]
    part_images: int
    units: int
    images: int | None
    began_at: str
    version: str
    format: int = FORMAT

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> "Manifest":
        """Return what ``dataclasses.asdict`` told; KeyError or TypeError where it is something else."""
        return cls(**{**told, "sources": tuple(told["sources"])})

    def check(self, other: "Manifest", place: Path) -> None:
        """Refuse to go on with what another run is about.

        Raises:
            ConflictError: other sources, columns or questions.
        """
        differences = [
            f"{name} {_difference(ours, theirs)}"
            for name, ours, theirs in (
                ("sources", list(self.sources), list(other.sources)),
                ("columns", dict(self.columns), dict(other.columns)),
                *(
                    (name, self.question.get(name), other.question.get(name))
                    for name in dict.fromkeys((*self.question, *other.question))
                ),
            )
            if ours != theirs
        ]
        if differences:
            raise ConflictError(
                f"'{place}' was begun with {'; with '.join(differences)}; ask the same to go on, or name another --out"
            )


def _difference(there: Any, here: Any) -> str:
    """Say what was asked there and is asked here, of long lists and texts only where they differ."""
    texts = [json.dumps(value, ensure_ascii=False) for value in (there, here)]
    if all(len(text) <= _SHOWN_CHARS for text in texts):
        return f"{texts[0]}, and this is about {texts[1]}"
    if isinstance(there, list) and isinstance(here, list):
        alone, missing = _without(there, here), _without(here, there)
        told = [f"only {whose} has {_first(some)}" for whose, some in (("it", alone), ("this", missing)) if some]
        if told:
            return f"of which {', and '.join(told)}"
    same = next((place for place, pair in enumerate(zip(*texts, strict=False)) if len({*pair}) > 1), 0)
    start = max(0, same - _SHOWN_CHARS // 5)
    shown = [f"{'...' if start else ''}{_cut(text[start:])}" for text in texts]
    return f"{shown[0]}, and this is about {shown[1]}"


def _without(values: Sequence[Any], others: Sequence[Any]) -> list[str]:
    """Return, as JSON, the values that are not among the others."""
    known = {json.dumps(each, ensure_ascii=False) for each in others}
    return [text for each in values if (text := json.dumps(each, ensure_ascii=False)) not in known]


def _first(texts: Sequence[str]) -> str:
    more = len(texts) - _SHOWN_VALUES
    return ", ".join(map(_cut, texts[:_SHOWN_VALUES])) + (f" and {more:,} more" if more > 0 else "")


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."
