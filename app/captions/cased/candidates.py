"""Candidate labels: the words that several captions near an image have in common.

Conti et al., "Vocabulary-free Image Classification", NeurIPS 2023 (CaSED). The steps are in the order of the authors'
code, which changes the result. Deviations: words are sorted, where the authors take the order of a set, which changes
from run to run; the caller provides the part-of-speech tagger; the optional phrases are not in the paper.
"""

import functools
import importlib
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

Tagger: TypeAlias = Callable[[Sequence[str]], Sequence[str]]
"""Returns one Penn Treebank tag per word, for the words of a text in order."""

Singulariser: TypeAlias = Callable[[str], str]
"""Returns the singular of a lower-case word."""

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
"""Words for a picture and not for its content; compared with words in the singular."""

KEPT_TAGS = frozenset({"NN", "NNS", "NNP", "NNPS", "JJ", "JJR", "JJS", "VBG", "VBN"})
"""Nouns, adjectives and participles."""

NOTHING_FOUND = "object"
"""The only candidate if no word is left."""

_ADJECTIVES = frozenset({"JJ", "JJR", "JJS"})
_NOUNS = frozenset({"NN", "NNS", "NNP", "NNPS"})
_MIN_LETTERS = 3
_MIN_COUNT = 2
_importing = threading.Lock()

# Applied in this order: tokens are removed before their brackets, URLs before their colon, and file extensions before
# the separators, because "my_cat.jpg" has two words and "a.b_c" one extension.
_TOKEN = re.compile(r"<[^>]+>")
_URL = re.compile(r"http\S+")
_CLEANING = (
    (_URL, ""),
    (re.compile(r"[^\w\s\-.'&]"), ""),
    (re.compile(r"\.\w+"), ""),
    (re.compile(r"[_\-]"), " "),
)
_NO_LETTER = re.compile(r"[^a-zA-Z\s]")
_PUNCTUATION = re.compile(r"[^\w\s\-.'&]|\.(?!\w)")


def singular_form(word: str, singular_of: Singulariser | None = None) -> str:
    """Return the singular of a lower-case word, by the rule of the authors' code.

    Only words in -s change, except those in -ss, -us, -is, -ies and -oes; so "gas" becomes "ga", and "ladies" stays.
    ``Lexicon.singular`` is better for the words of WordNet.

    Args:
        word: letters a-z.
        singular_of: returns the singular of a possible plural; by default the ``inflect`` package does.
    """
    if not word.endswith("s") or word.endswith(("ss", "us", "is", "ies", "oes")):
        return word
    return (singular_of or _inflected)(word)


def candidates(
    captions: Sequence[str],
    *,
    tag: Tagger | None = None,
    singular: Singulariser = singular_form,
    min_count: int = _MIN_COUNT,
    max_words: int | None = None,
) -> tuple[str, ...]:
    """Return the distinct words that captions share, sorted; ``("object",)`` if none is left.

    Every occurrence of a word counts, also in the same caption.

    Args:
        captions: as retrieved. As in the authors' code, a ``<`` in one and a ``>`` in a later one make a token.
        tag: is called with every word that is frequent enough, repetitions included; None keeps all parts of speech.
        singular: returns the singular of a lower-case word; by default by the rule of the authors' code.
        min_count: occurrences that a word needs; if no word has as many, those of the most frequent word.
        max_words: the largest number of words, the most frequent first; None returns all.
    """
    frequent = _frequent(_words(" ".join(captions), singular), min_count)
    if tag is not None and frequent:
        frequent = [word for word, part in zip(frequent, tag(frequent), strict=True) if part in KEPT_TAGS]
    chosen = set(frequent)
    if max_words is not None and len(chosen) > max_words:
        counts = Counter(frequent)
        chosen = set(sorted(chosen, key=lambda word: (-counts[word], word))[:max_words])
    return tuple(sorted(chosen)) or (NOTHING_FOUND,)


def phrases(
    captions: Sequence[str],
    *,
    tag: Tagger,
    singular: Singulariser = singular_form,
    min_count: int = _MIN_COUNT,
    max_length: int = 3,
) -> tuple[str, ...]:
    """Return the distinct noun phrases of 2 to ``max_length`` words that captions share, sorted; there may be none.

    An extension of the paper, for labels such as "golden retriever". A phrase is adjectives and nouns that end in a
    noun, of which only the last word is made singular. It is within one caption, and contains no stop word, no
    punctuation and no word that the cleaning removes. Unlike ``candidates``, it never returns phrases that are rarer
    than ``min_count``, because in a few captions almost every phrase occurs once.
    """
    found = [
        phrase
        for caption in captions
        for run in _runs(caption, singular)
        for phrase in _noun_phrases(run, tag(run), singular, max_length)
    ]
    counts = Counter(found)
    return tuple(sorted(phrase for phrase, count in counts.items() if count >= min_count))


def suggested_by(candidate: str, captions: Sequence[str], *, singular: Singulariser = singular_form) -> tuple[int, ...]:
    """Return the indices of the captions that contain a candidate word or phrase.

    Captions are cleaned as in ``candidates``, so "dogs" suggests "dog". ``NOTHING_FOUND`` is suggested only by captions
    that contain that word.
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
    """Return the singular by ``inflect``; a word that it does not take for a plural is returned unchanged."""
    return _engine().singular_noun(word) or word


@functools.cache
def _engine() -> Any:
    """Import ``inflect`` without its checks of argument types, which take three seconds and make each call slower."""
    typeguard: Any = importlib.import_module("typeguard")
    with _importing:
        checked = typeguard.typechecked
        typeguard.typechecked = lambda function: function
        try:
            import inflect  # noqa: PLC0415 - needed only for plurals
        finally:
            typeguard.typechecked = checked
        return inflect.engine()


def _without_tokens(text: str, replacement: str) -> str:
    # After the last ">" there is no token. A search from every "<" there would take quadratic time.
    head, close, tail = text.rpartition(">")
    return _TOKEN.sub(replacement, head + close) + tail


def _cleaned(text: str) -> str:
    text = _without_tokens(text, "")
    for pattern, replacement in _CLEANING:
        text = pattern.sub(replacement, text)
    return text


def _words(text: str, singular: Singulariser) -> list[str]:
    """Return all words of a text in order, in lower case and with repetitions."""
    # The length is checked before digits are removed: "B-2" is dropped, and "a1b2" gives "ab".
    long_enough = " ".join(word for word in _cleaned(text).split() if len(word) >= _MIN_LETTERS)
    letters = _NO_LETTER.sub("", long_enough).lower().split()
    # A singular can have several words.
    return [word for word in " ".join(map(singular, letters)).split() if word not in STOP_WORDS]


def _frequent(words: list[str], min_count: int) -> list[str]:
    counts = Counter(words)
    threshold = min(min_count, max(counts.values(), default=0))
    return [word for word in words if counts[word] >= threshold]


def _runs(caption: str, singular: Singulariser) -> Iterator[list[str]]:
    """Yield the runs of words of a caption, split where a word or punctuation was removed."""
    for piece in _PUNCTUATION.split(_URL.sub(" . ", _without_tokens(caption, " . "))):
        run: list[str] = []
        for word in _cleaned(piece).split():
            letters = _NO_LETTER.sub("", word).lower()
            if len(word) >= _MIN_LETTERS and letters and singular(letters) not in STOP_WORDS:
                run.append(letters)
            elif run:
                yield run
                run = []
        if run:
            yield run


def _parts(run: Sequence[str], length: int) -> Iterator[Sequence[str]]:
    return (run[first : first + length] for first in range(len(run) - length + 1))


def _noun_phrases(run: Sequence[str], tags: Sequence[str], singular: Singulariser, max_length: int) -> Iterable[str]:
    for length in range(2, max_length + 1):
        for part, part_tags in zip(_parts(run, length), _parts(tags, length), strict=True):
            if part_tags[-1] in _NOUNS and _ADJECTIVES.union(_NOUNS).issuperset(part_tags):
                yield " ".join([*part[:-1], singular(part[-1])])
