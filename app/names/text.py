"""The one spelling of a text that a caller sends, and the characters that it may contain.

Any script and emoji are allowed. Characters that nobody can see or read back are refused: control and format
characters, lone surrogates, and code points that Unicode has not assigned.
"""

import unicodedata

from app.errors import FieldProblem, InvalidFieldError

# Persian, Indic scripts and emoji need the two joiners; emoji need the two variation selectors.
_JOINERS = "\u200c\u200d"
_EMOJI_SELECTORS = "\ufe0e\ufe0f"
_KEYCAP_BASES = "0123456789#*"


def normalized(raw: str) -> str:
    """Return the text in NFC, on one line, with single spaces."""
    return " ".join(unicodedata.normalize("NFC", raw).split())


def clean_text(raw: str, *, max_chars: int, field: str) -> str:
    """Return the normalized text.

    Raises:
        InvalidFieldError: it is empty, too long, or contains a character that cannot be seen.
    """
    text = normalized(raw)
    if problems := text_problems(text, max_chars):
        raise InvalidFieldError([FieldProblem(field, problem) for problem in problems])
    return text


def text_problems(text: str, max_chars: int) -> list[str]:
    """Return every rule that a normalized text breaks, as messages."""
    if not text:
        return ["the text is empty; write at least one visible character"]
    problems = []
    if len(text) > max_chars:
        problems.append(f"{quoted(text)} has {len(text)} characters, at most {max_chars} are allowed; shorten it")
    if refused := _refused_characters(text[:max_chars]):
        listed = ", ".join(_code_point(character) for character in refused)
        problems.append(f"{quoted(text)} contains {listed}, which cannot be seen or read there; remove it")
    return problems


def quoted(text: str) -> str:
    """Return the beginning of the text in quotes, with every character escaped that would not print."""
    return repr(text) if len(text) <= 40 else f"{text[:40]!r}..."


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
