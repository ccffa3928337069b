"""The captions of the default database: the nouns of WordNet."""

from collections.abc import Iterator
from pathlib import Path

from app.captions.cased.lexicon import WORDNET, nouns
from app.errors import ConfigurationError

NOTES = "The nouns of WordNet 3.0: the first lemma of each of their senses"
LICENCE = "WordNet 3.0 licence, Princeton University: free to use, copy and distribute, with its notice"


def check_wordnet(folder: Path = WORDNET) -> None:
    """Read the first noun.

    Raises:
        ConfigurationError: WordNet is not there, or has none.
    """
    if next(wordnet_captions(folder), None) is None:
        raise ConfigurationError(f"WordNet's file {folder / 'data.noun'} has no noun; install wordnet-base again")


def wordnet_captions(folder: Path = WORDNET) -> Iterator[str]:
    """Yield a caption for each sense of nouns, 82,115 of which 67,893 are distinct: its first lemma, and no more.

    Captions near a photograph of a shirt are then "dress shirt", "polo shirt" and "work-shirt", of which the words that
    two have in common are the name of the thing. With definitions, those of the definitions were found as often
    ("garment", "fabric"), and encoding took five times as long.

    Raises:
        ConfigurationError: WordNet is not there.
    """
    return (noun.lemma for noun in nouns(folder))
