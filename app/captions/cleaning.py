"""Cleans captions, and drops those that break a rule or repeat another caption."""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import islice

import numpy as np
from jaxtyping import Bool, UInt64

from app.errors import InvalidFieldError
from app.names.text import normalized
from app.runtime.turns import give_way

# Control characters that are not white space, halves of surrogate pairs, and the byte order mark.
_DROPPED = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff\ufeff]")
_MIN_LATIN_SHARE = 0.8
_CAPTIONS_PER_LOOKUP = 4096
# The rest of a longer caption is not read; it is only seen if nearly all of this is white space.
_MAX_RAW_CHARS_PER_CHAR = 20


@dataclass(slots=True)
class Counts:
    """The numbers of captions of a source that were read, kept and dropped, by reason.

    ``read`` = ``kept`` + ``duplicates`` + ``too_short`` + ``other_script``. ``cut`` are kept captions that were
    shortened. ``bad`` are lines, rows or elements that could not be read; a file that is cut off adds one.
    """

    read: int = 0
    kept: int = 0
    duplicates: int = 0
    too_short: int = 0
    other_script: int = 0
    cut: int = 0
    bad: int = 0


@dataclass(frozen=True, slots=True)
class CaptionRules:
    """The captions to keep.

    Captions shorter than ``min_chars`` are dropped; longer ones than ``max_chars`` are cut. ``latin_only`` drops
    captions without letters, and those with less than 80 % Latin letters. ``distinct`` drops repeated captions.
    """

    min_chars: int = 3
    max_chars: int = 500
    latin_only: bool = False
    distinct: bool = True


DEFAULT_RULES = CaptionRules()


def clean_captions(
    captions: Iterable[str],
    *,
    rules: CaptionRules = DEFAULT_RULES,
    counts: Counts | None = None,
) -> Iterator[str]:
    """Yield the captions that the rules keep, in NFC, with single spaces and without control characters.

    Duplicates are recognised by hashes of 64 bits, which take 8 bytes per caption, or 16 for a moment. Among ten
    million captions, one that is not a duplicate is lost with a probability of 3 in a million.

    Raises:
        InvalidFieldError: no caption can meet the rules.
    """
    if not 1 <= rules.min_chars <= rules.max_chars:
        problem = f"no caption can have {rules.min_chars} to {rules.max_chars} characters; write 1 <= min <= max"
        raise InvalidFieldError.of("min_chars", problem)
    counted = Counts() if counts is None else counts
    return _distinct(_fitting(captions, rules, counted), counted, distinct=rules.distinct)


def _fitting(captions: Iterable[str], rules: CaptionRules, counts: Counts) -> Iterator[tuple[str, bool]]:
    """Yield the captions that are long enough and of the right script, and whether each was cut."""
    max_raw_chars = _MAX_RAW_CHARS_PER_CHAR * rules.max_chars
    for caption in captions:
        give_way()
        text = normalized(_DROPPED.sub("", caption[:max_raw_chars]))
        if len(text) < rules.min_chars:
            counts.too_short += 1
        elif rules.latin_only and not _is_latin(text):
            counts.other_script += 1
        else:
            yield text[: rules.max_chars].rstrip(), len(text) > rules.max_chars or len(caption) > max_raw_chars


def _distinct(fitting: Iterable[tuple[str, bool]], counts: Counts, *, distinct: bool) -> Iterator[str]:
    seen = _HashSet()
    remaining = iter(fitting)
    # A lookup of thousands of hashes in sorted arrays takes about as long as a lookup of one.
    while block := list(islice(remaining, _CAPTIONS_PER_LOOKUP)):
        new = seen.add([text for text, _ in block]) if distinct else np.ones(len(block), bool)
        for (text, cut), is_new in zip(block, new, strict=True):
            if is_new:
                counts.kept += 1
                counts.cut += cut
                yield text
            else:
                counts.duplicates += 1


class _HashSet:
    """A set of text hashes in sorted arrays, each more than twice as long as the next."""

    def __init__(self) -> None:
        self._arrays: list[UInt64[np.ndarray, " h"]] = []

    def add(self, texts: Sequence[str]) -> Bool[np.ndarray, " n"]:
        """Add ``texts``, and return which of them were neither in the set nor repeat an earlier one of them."""
        digests = b"".join(blake2b(text.encode("utf-8", "replace"), digest_size=8).digest() for text in texts)
        hashes = np.frombuffer(digests, np.uint64)
        new = np.zeros(len(hashes), bool)
        new[np.unique(hashes, return_index=True)[1]] = True
        for array in self._arrays:
            indices = np.searchsorted(array, hashes)
            new &= array[np.minimum(indices, len(array) - 1)] != hashes
        added = np.sort(hashes[new])
        while self._arrays and len(self._arrays[-1]) <= 2 * len(added):
            added = np.concatenate([self._arrays.pop(), added])
            added.sort()
        if len(added):
            self._arrays.append(added)
        return new


def _is_latin(text: str) -> bool:
    letters = [_is_latin_letter(character) for character in text if character.isalpha()]
    return bool(letters) and sum(letters) >= _MIN_LATIN_SHARE * len(letters)


@lru_cache(maxsize=65_536)
def _is_latin_letter(character: str) -> bool:
    return character.isascii() or unicodedata.name(character, "").startswith(("LATIN", "FULLWIDTH LATIN"))
