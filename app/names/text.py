"""The one spelling of a text that a caller sends, and the characters that it may contain.

Any script and emoji are allowed. Characters that nobody can see or read back are refused: control and format
characters, lone surrogates, and code points that Unicode has not assigned. The work on a text is linear in its length.
"""

import functools
import re
import unicodedata

from app.errors import FieldProblem, InvalidFieldError

# Persian, Indic scripts and emoji need the two joiners; emoji need the two variation selectors.
_JOINERS = "\u200c\u200d"
_EMOJI_SELECTORS = "\ufe0e\ufe0f"
_KEYCAP_BASES = "0123456789#*"

MAX_TEXT_CHARS = 10_000
"""The longest text of a request, other than an image; each field has a lower limit of its own."""

# The limit of the Stream-Safe Text Format (Unicode Standard Annex 15, section 13). No language comes near it.
_MAX_MARKS = 30
# No text has fewer than a quarter of its characters after normalization, unless it has rows of spaces.
_MAX_SHRINKAGE = 4
# Longer than the limit, so that cutting never makes a text acceptable, even if composition shortens the run.
_MARKS_KEPT = 40


def nfc(raw: str) -> str:
    """Return the text in NFC, with runs of combining marks cut to 40.

    Normalization sorts each run, in a time that is quadratic in its length: 24,000 marks take two seconds, in which no
    other thread runs.
    """
    if raw.isascii():
        return raw
    return unicodedata.normalize("NFC", _long_runs().sub(r"\1", raw))  # noqa: TID251 - every run is short


def normalized(raw: str) -> str:
    """Return the text in NFC, on one line, with single spaces."""
    return " ".join(nfc(raw).split())


def clean_text(raw: str, *, max_chars: int, field: str) -> str:
    """Return the normalized text.

    Raises:
        InvalidFieldError: it is empty, too long, or contains characters that ``check_text`` refuses.
    """
    text, problems = check_text(raw, max_chars)
    if problems:
        raise InvalidFieldError([FieldProblem(field, problem) for problem in problems])
    return text


def check_text(raw: str, max_chars: int, *, keep_spaces: bool = False) -> tuple[str, list[str]]:
    """Return the normalized text, and a message for every rule that it breaks.

    Args:
        raw: as the caller sent it.
        max_chars: the largest number of characters after normalization; four times as many are refused unread.
        keep_spaces: keep white space inside the text as it is.
    """
    if len(raw) > _MAX_SHRINKAGE * max_chars:
        return "", [_too_long(raw, max_chars)]
    text = nfc(raw).strip() if keep_spaces else normalized(raw)
    if not text:
        return text, ["the text is empty; write at least one visible character"]
    problems = []
    if len(text) > max_chars:
        problems.append(_too_long(text, max_chars))
    if not text.isascii() and _too_many_marks().search(text):
        problems.append(f"{quoted(text)} has more than {_MAX_MARKS} combining marks in a row; remove some")
    if refused := _refused_characters(text[:max_chars]):
        listed = ", ".join(_code_point(character) for character in refused)
        problems.append(f"{quoted(text)} contains {listed}, which cannot be seen or read there; remove it")
    return text, problems


def _too_long(text: str, max_chars: int) -> str:
    return f"{quoted(text)} has {len(text)} characters, at most {max_chars} are allowed; shorten it"


def quoted(text: str) -> str:
    """Return the beginning of the text in quotes, with every character escaped that would not print."""
    return repr(text) if len(text) <= 40 else f"{text[:40]!r}..."


@functools.cache
def _marks() -> str:
    """Return a character class of everything that normalization sorts: what decomposes into marks alone."""
    decomposed = ((character, unicodedata.normalize("NFD", character)) for character in map(chr, range(0x300, 0x20000)))  # noqa: TID251
    return f"[{''.join(character for character, form in decomposed if unicodedata.combining(form[0]))}]"


@functools.cache
def _long_runs() -> re.Pattern[str]:
    return re.compile(f"({_marks()}{{{_MARKS_KEPT}}}){_marks()}+")


@functools.cache
def _too_many_marks() -> re.Pattern[str]:
    return re.compile(f"{_marks()}{{{_MAX_MARKS + 1}}}")


def _refused_characters(text: str) -> list[str]:
    # Python calls a character printable unless its Unicode category is "other" or "separator"; the space is printable.
    if text.isprintable() and not any(selector in text for selector in _EMOJI_SELECTORS):
        return []
    return sorted({character for index, character in enumerate(text) if not _is_allowed_at(text, index)})


def _is_allowed_at(text: str, index: int) -> bool:
    character = text[index]
    before, after = text[index - 1 : index], text[index + 1 : index + 2]
    if character in _JOINERS:
        # Between ASCII letters a joiner would only make two names that look the same.
        return _can_be_joined(before) and _can_be_joined(after) and not (before + after).isascii()
    if character in _EMOJI_SELECTORS:
        if not _can_be_joined(before) or before in _EMOJI_SELECTORS:
            return False
        return before in _KEYCAP_BASES or not before.isascii()
    # Python does not call an emoji printable that is newer than its Unicode tables, so the whole block is allowed.
    return character.isprintable() or "\U0001f300" <= character <= "\U0001faff"


def _can_be_joined(neighbour: str) -> bool:
    return neighbour != "" and neighbour not in _JOINERS and not neighbour.isspace()


def _code_point(character: str) -> str:
    return f"U+{ord(character):04X} {unicodedata.name(character, '')}".rstrip()
