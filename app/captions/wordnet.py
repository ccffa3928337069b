"""Captions from WordNet: its nouns."""

from collections.abc import Iterator
from pathlib import Path

from app.captions.cased.lexicon import WORDNET, nouns
from app.errors import ConfigurationError

NOTES = "The nouns of WordNet 3.0: the first lemma of each of their senses"
LICENCE = "WordNet 3.0 licence, Princeton University: free to use, copy and distribute, with its notice"


def check_wordnet(folder: Path = WORDNET) -> None:
    """Check that WordNet is installed, by reading its first noun.

    Raises:
        ConfigurationError: WordNet is not installed, or has no noun.
    """
    if next(wordnet_captions(folder), None) is None:
        raise ConfigurationError(f"WordNet's file {folder / 'data.noun'} has no noun; install wordnet-base again")


def wordnet_captions(folder: Path = WORDNET) -> Iterator[str]:
    """Yield a caption for each of the 82,115 senses of nouns: its first lemma. 67,893 of them are distinct.

    The captions near a photograph of a shirt are then "dress shirt", "polo shirt" and "work-shirt", and the word that
    they share is the label. With the definitions added, words of the definitions ("garment", "fabric") were found as
    often, and encoding took five times as long.

    Raises:
        ConfigurationError: WordNet is not installed.
    """
    return (noun.lemma for noun in nouns(folder))
