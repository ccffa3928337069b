"""Candidate names out of captions: the words that several captions near an image have in common.

Conti et al., "Vocabulary-free Image Classification", NeurIPS 2023 (CaSED), in the order of the authors'
code, which matters. Deviations: words come sorted where the authors take the order of a set, which changes from run
to run; the part-of-speech tagger is the caller's; and phrases, off unless asked for, are not in the paper.
"""

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

Tagger: TypeAlias = Callable[[Sequence[str]], Sequence[str]]
"""One Penn Treebank tag per word, of words in the order in which they stand."""

Singulariser: TypeAlias = Callable[[str], str]
"""The singular of a lower-case word."""

STOP_WORDS = frozenset(
    {
        "clipart",
        "icon",
        "illustration",
        "image",
        "logo",
        "painting",
        "photo",
        "picture",
        "portrait",
        "profile",
        "symbol",
        "thumbnail",
    }
)
"""What captions call the picture rather than what is in it; compared with words in the singular."""

KEPT_TAGS = frozenset({"NN", "NNS", "NNP", "NNPS", "JJ", "JJR", "JJS", "VBG", "VBN"})
"""Nouns, adjectives and participles."""

NOTHING_FOUND = "object"
"""The only candidate where no word is left."""

_ADJECTIVES = frozenset({"JJ", "JJR", "JJS"})
_NOUNS = frozenset({"NN", "NNS", "NNP", "NNPS"})
_LEAST_LETTERS = 3
_LEAST_COUNT = 2
_IMPORTS = 3

# Applied one after the other. A token has to go before the brackets that mark it do, an address before its colon
# does, and an extension before the separators, since "my_cat.jpg" is two words and "a.b_c" one extension.
_TOKEN = re.compile(r"<[^>]+>")
_ADDRESS = re.compile(r"http\S+")
_CLEANING = (
    (_ADDRESS, ""),
    (re.compile(r"[^\w\s\-.'&]"), ""),
    (re.compile(r"\.\w+"), ""),
    (re.compile(r"[_\-]"), " "),
)
_NO_LETTER = re.compile(r"[^a-zA-Z\s]")
_PUNCTUATION = re.compile(r"[^\w\s\-.'&]|\.(?!\w)")


def singular_form(word: str, of_plural: Singulariser | None = None) -> str:
    """Return the singular of a lower-case word, by the reference's rule.

    Only words in -s change, and those in -ss, -us, -is, -ies and -oes do not; so "gas" becomes "ga", and "ladies"
    stays. ``Lexicon.singular`` knows better about words that are in WordNet.

    Args:
        word: letters a-z.
        of_plural: the singular of what may be a plural, by default that of the ``inflect`` package.
    """
    if not word.endswith("s") or word.endswith(("ss", "us", "is", "ies", "oes")):
        return word
    return (of_plural or _inflected)(word)


def candidates(
    captions: Sequence[str],
    *,
    tag: Tagger | None = None,
    singular: Singulariser = singular_form,
    least_count: int = _LEAST_COUNT,
    most: int | None = None,
) -> tuple[str, ...]:
    """Return the words that captions share, sorted and each once; ``("object",)`` if none is left.

    A word counts as often as it stands there, in one caption or in several.

    Args:
        captions: as they were retrieved; a ``<`` in one and a ``>`` in a later one are a token, as in the reference.
        tag: gets every word that is frequent enough, repetitions included; None keeps all parts of speech.
        singular: of lower-case words; by default by the reference's rule.
        least_count: how often a word has to stand there, or as often as the most frequent one if that is less.
        most: words that are returned at most, the most frequent of them; None returns all.
    """
    frequent = _frequent(_words(" ".join(captions), singular), least_count)
    if tag is not None and frequent:
        frequent = [word for word, part in zip(frequent, tag(frequent), strict=True) if part in KEPT_TAGS]
    chosen = set(frequent)
    if most is not None and len(chosen) > most:
        counts = Counter(frequent)
        chosen = set(sorted(chosen, key=lambda word: (-counts[word], word))[:most])
    return tuple(sorted(chosen)) or (NOTHING_FOUND,)


def phrases(
    captions: Sequence[str],
    *,
    tag: Tagger,
    singular: Singulariser = singular_form,
    least_count: int = _LEAST_COUNT,
    longest: int = 3,
) -> tuple[str, ...]:
    """Return the noun phrases of 2 to ``longest`` words that captions share, sorted and each once; perhaps none.

    Beyond the paper, for names such as "golden retriever": adjectives and nouns that end in a noun, which alone is
    made singular. Nothing that the cleaning drops, no stop word and no punctuation stands inside a phrase, and each
    caption is looked at by itself. What is rarer than ``least_count`` is left out, whatever the most frequent is: of a
    few captions almost every phrase is there once.
    """
    found = [
        phrase
        for caption in captions
        for run in _runs(caption, singular)
        for phrase in _noun_phrases(run, tag(run), singular, longest)
    ]
    counts = Counter(found)
    return tuple(sorted(phrase for phrase, count in counts.items() if count >= least_count))


def suggested_by(candidate: str, captions: Sequence[str], *, singular: Singulariser = singular_form) -> tuple[int, ...]:
    """Return which captions a candidate word or phrase comes from, in order.

    Each is cleaned as for ``candidates``, so that "dogs" suggests "dog". No caption suggests ``NOTHING_FOUND`` where
    none has that word.
    """
    wanted = candidate.split()

    def suggests(caption: str) -> bool:
        if len(wanted) == 1:
            return candidate in _words(caption, singular)
        return any(
            [*part[:-1], singular(part[-1])] == wanted
            for run in _runs(caption, singular)
            for part in _parts(run, len(wanted))
        )

    return tuple(index for index, caption in enumerate(captions) if suggests(caption))


@functools.lru_cache(maxsize=2**16)
def _inflected(word: str) -> str:
    """Return what ``inflect`` takes for the singular; a word it takes for no plural stays."""
    return _engine().singular_noun(word) or word


@functools.cache
def _engine() -> Any:
    for _ in range(_IMPORTS - 1):
        # CPython 3.11 may fail to parse what is imported while another thread parses, and not a moment later.
        with suppress(SystemError, AttributeError):
            return _imported_engine()
    return _imported_engine()


def _imported_engine() -> Any:
    # Its import takes a second or two, so that it waits for the first plural.
    import inflect  # noqa: PLC0415

    return inflect.engine()


def _without_tokens(text: str, replacement: str) -> str:
    # Behind the last ">" nothing is a token, but looking for its end from every "<" there would take ages.
    head, close, tail = text.rpartition(">")
    return _TOKEN.sub(replacement, head + close) + tail


def _cleaned(text: str) -> str:
    text = _without_tokens(text, "")
    for pattern, replacement in _CLEANING:
        text = pattern.sub(replacement, text)
    return text


def _words(text: str, singular: Singulariser) -> list[str]:
    """Return the words of a text, in order and lower case, each as often as it stands there."""
    # By length first: nothing is left of "B-2", and "a1b2" is long enough to leave "ab".
    long_enough = " ".join(word for word in _cleaned(text).split() if len(word) >= _LEAST_LETTERS)
    letters = _NO_LETTER.sub("", long_enough).lower().split()
    # A singular may in principle be of several words.
    return [word for word in " ".join(map(singular, letters)).split() if word not in STOP_WORDS]


def _frequent(words: list[str], least_count: int) -> list[str]:
    counts = Counter(words)
    least = min(least_count, max(counts.values(), default=0))
    return [word for word in words if counts[word] >= least]


def _runs(caption: str, singular: Singulariser) -> Iterator[list[str]]:
    """Yield the words of a caption between which nothing was dropped."""
    for piece in _PUNCTUATION.split(_ADDRESS.sub(" . ", _without_tokens(caption, " . "))):
        run: list[str] = []
        for word in _cleaned(piece).split():
            letters = _NO_LETTER.sub("", word).lower()
            if len(word) >= _LEAST_LETTERS and letters and singular(letters) not in STOP_WORDS:
                run.append(letters)
            elif run:
                yield run
                run = []
        if run:
            yield run


def _parts(run: Sequence[str], length: int) -> Iterator[Sequence[str]]:
    return (run[first : first + length] for first in range(len(run) - length + 1))


def _noun_phrases(run: Sequence[str], tags: Sequence[str], singular: Singulariser, longest: int) -> Iterable[str]:
    for length in range(2, longest + 1):
        for part, parts_tags in zip(_parts(run, length), _parts(tags, length), strict=True):
            if parts_tags[-1] in _NOUNS and _ADJECTIVES.union(_NOUNS).issuperset(parts_tags):
                yield " ".join([*part[:-1], singular(part[-1])])
