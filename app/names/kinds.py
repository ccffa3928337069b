"""Which words name a class, a kind of it, or a group that it belongs to."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

_PUNCTUATION = re.compile(r"[^\w]+")


class WordKinds:
    """What words are kinds of: a noun phrase of its last words ("polo shirt" of "shirt"), and of given groups.

    Upper case, punctuation and the "s" of the plural make no difference.

    Args:
        words: distinct.
        groups: the names of the groups of each word, such as "animal" of "dog"; they may be missing.
    """

    def __init__(self, words: Sequence[str], groups: Mapping[str, Collection[str]]) -> None:
        self._words = tuple(words)
        self._names = [
            frozenset([*_phrases(word), *(_normal(group) for group in groups.get(word, ()))]) for word in words
        ]
        self._names_of = {_normal(word): names for word, names in zip(words, self._names, strict=True)}

    def unrelated(self, names: Iterable[str]) -> list[int]:
        """Return the indices of the words that do not have a name, name no kind of it and no group that it belongs to.

        The time grows with the number of words and names, not with their product.
        """
        own: set[str] = set()
        groups: set[str] = set()
        for name in names:
            phrases = list(_phrases(name))
            own.update(phrases[:1])
            groups.update(*(self._names_of.get(phrase, ()) for phrase in phrases[:1]), phrases)
        return [
            index
            for index, (word, of_word) in enumerate(zip(self._words, self._names, strict=True))
            if own.isdisjoint(of_word) and _normal(word) not in groups
        ]


def _phrases(name: str) -> Iterator[str]:
    """Yield the normal form of a name, and the same without its first word, its first two words, and so on."""
    parts = _normal(name).split()
    for first in range(len(parts)):
        yield " ".join(parts[first:])


def _normal(name: str) -> str:
    return _PUNCTUATION.sub(" ", name).strip().lower().removesuffix("s")
