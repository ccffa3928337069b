"""What to build: the captions of a new database and the options, as requests, commands and jobs give them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from app.captions import everyday, wordnet
from app.captions.cleaning import CaptionRules, Counts, clean_captions
from app.captions.sources import Source, captions_of
from app.errors import InvalidFieldError

EVERYDAY = "everyday"
"""The source of the packaged names, and the default database, which is built from them."""

WORDNET = "wordnet"
"""The source of the nouns of WordNet, and the default name of a database built from them."""


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """The captions and the options of a build.

    The captions come from ``source`` (``everyday`` or ``wordnet``), ``files`` or ``captions``; one of the three is
    given. ``to_json`` leaves ``captions`` out. ``model`` names the model whose text tower encodes them. ``threads``
    build the index; a service uses one, because requests need the other cores.
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
        """Return the plan that ``to_json`` wrote, with the captions that it left out."""
        return cls(**{**content, "files": tuple(content["files"]), "captions": tuple(captions)})

    def to_json(self) -> dict[str, Any]:
        """Return plain lists, strings and numbers, without the captions."""
        return {**asdict(self), "files": list(self.files), "captions": []}

    @property
    def rules(self) -> CaptionRules:
        """The rules for the captions to keep.

        Raises:
            InvalidFieldError: no caption can meet the rules.
        """
        if not 1 <= self.min_chars <= self.max_chars:
            problem = f"is {self.min_chars}, and max_chars {self.max_chars}; write 1 <= min_chars <= max_chars"
            raise InvalidFieldError.of("min_chars", problem)
        return CaptionRules(self.min_chars, self.max_chars, latin_only=self.latin_only)

    def read(self, sources: Sequence[Source], wordnet_folder: Path, counts: Counts) -> Iterator[str]:
        """Yield the captions that the rules keep.

        Args:
            sources: the paths of ``files``.
            wordnet_folder: the folder of WordNet's files.
            counts: is added to.
        """
        if sources:
            return captions_of(sources, column=self.column, rules=self.rules, counts=counts)
        captions: Iterable[str] = self.captions
        if self.source == EVERYDAY:
            captions = everyday.everyday_names()
        elif self.source == WORDNET:
            captions = wordnet.wordnet_captions(wordnet_folder)
        return clean_captions(_counted(captions, counts), rules=self.rules, counts=counts)

    @property
    def notes(self) -> tuple[str, str]:
        """The origin of the captions, and their licence."""
        known = {EVERYDAY: (everyday.NOTES, everyday.LICENCE), WORDNET: (wordnet.NOTES, wordnet.LICENCE)}
        notes, licence = known.get(self.source or "", ("", ""))
        return self.source_notes or notes, self.licence or licence


def _counted(captions: Iterable[str], counts: Counts) -> Iterator[str]:
    for caption in captions:
        counts.read += 1
        yield caption
