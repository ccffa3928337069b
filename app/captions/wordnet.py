"""The captions of the default database: the nouns of WordNet."""

from collections.abc import Iterator
from pathlib import Path

from app.captions.lexicon import WORDNET, nouns

NOTES = "The nouns of WordNet 3.0: the first lemma of each of their senses"
LICENCE = "WordNet 3.0 licence, Princeton University: free to use, copy and distribute, with its notice"


def wordnet_captions(folder: Path = WORDNET) -> Iterator[str]:
    """Yield a caption for each sense of nouns, 82,115 of which 67,893 are distinct: its first lemma, and no more.

    Captions near a photograph of a shirt are then "dress shirt", "polo shirt" and "work-shirt", of which the words that
    two have in common are the name of the thing. With definitions, those of the definitions were found as often
    ("garment", "fabric"), and encoding took five times as long.

    Raises:
        ConfigurationError: WordNet is not there.
    """
    return (noun.lemma for noun in nouns(folder))
