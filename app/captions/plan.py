"""What a caption database is to be built of, as callers and commands say it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from app.captions.sources import CaptionRules, Counts, Source, captions_of, clean_captions
from app.captions.wordnet import LICENCE, NOTES, wordnet_captions
from app.errors import InvalidFieldError

WORDNET = "wordnet"
"""The database that comes with the service, and the source that it is made of."""


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """What to build a database of, and how.

    One of ``source`` (``wordnet``), ``files`` and ``captions`` says what of; ``captions`` are not part of ``to_json``.
    ``model`` is the name of the one whose text tower encodes them, and ``threads`` is how many make the index: one in a
    service, whose requests have the other cores.
    """

    model: str
    source: str | None = None
    files: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    column: str | None = None
    min_chars: int = 3
    max_chars: int = 500
    latin_only: bool = False
    near_duplicates: float | None = None
    recall: float = 0.95
    threads: int = 1
    source_notes: str = ""
    licence: str = ""

    @classmethod
    def from_json(cls, content: Mapping[str, Any], captions: Sequence[str] = ()) -> Self:
        """Read what ``to_json`` returned, with the captions that it left out."""
        return cls(**{**content, "files": tuple(content["files"]), "captions": tuple(captions)})

    def to_json(self) -> dict[str, Any]:
        """Return plain lists, strings and numbers, without the captions."""
        return {**asdict(self), "files": list(self.files), "captions": []}

    @property
    def rules(self) -> CaptionRules:
        """Which captions are kept.

        Raises:
            InvalidFieldError: no caption can meet them.
        """
        if not 1 <= self.min_chars <= self.max_chars:
            problem = f"is {self.min_chars}, and max_chars {self.max_chars}; write 1 <= min_chars <= max_chars"
            raise InvalidFieldError.of("min_chars", problem)
        return CaptionRules(self.min_chars, self.max_chars, latin_only=self.latin_only)

    def read(self, sources: Sequence[Source], wordnet: Path, counts: Counts) -> Iterator[str]:
        """Yield the captions, by the rules.

        Args:
            sources: where ``files`` are.
            wordnet: the folder of WordNet's files.
            counts: is added to.
        """
        if sources:
            return captions_of(sources, column=self.column, rules=self.rules, counts=counts)
        return clean_captions(
            _counted(self.captions if self.source is None else wordnet_captions(wordnet), counts),
            rules=self.rules,
            counts=counts,
        )

    @property
    def notes(self) -> tuple[str, str]:
        """Where the captions are from, and their licence."""
        if self.source == WORDNET:
            return self.source_notes or NOTES, self.licence or LICENCE
        return self.source_notes, self.licence


def _counted(captions: Iterable[str], counts: Counts) -> Iterator[str]:
    for caption in captions:
        counts.read += 1
        yield caption
