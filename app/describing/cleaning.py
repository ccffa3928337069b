"""Turns the answers of a language model into descriptions and features.

Most rules are those of CuPL and SuS-X (Pratt et al., ICCV 2023; Udandarao et al., ICCV 2023). Others correct the errors
in the files of these papers, or remove what chat models add: lists, emphasis, apologies. The results obey the rules of
a label set: no invisible characters, and no text above its length limits.
"""

import re
from collections.abc import Iterable

from app.names.text import check_text, nfc

# Some rules take time that is quadratic in the length of a text.
_MAX_RAW_CHARS = 5000
_MAX_SENTENCE_CHARS = 1000
_MIN_SENTENCE_CHARS = 5
_MAX_FEATURE_CHARS = 200

_JOINERS = "\u200c\u200d"
# Joiners that class names do not allow: all but those between two non-ASCII characters, as in Persian and emoji.
_STRAY_JOINER = re.compile(rf"(?<![^\s\x00-\x7f{_JOINERS}])[{_JOINERS}]|[{_JOINERS}](?![^\s\x00-\x7f{_JOINERS}])")

_ENDS = ".!?\u3002\uff01\uff1f\u0964\u061f"  # full-width, Hindi and Arabic ones too
_CLOSERS = "\"'\u201d\u2019\u00bb)]"
_FINISHED = re.compile(rf"[{re.escape(_ENDS)}][{re.escape(_CLOSERS)}]*$")
# A lower-case letter or a digit does not begin a sentence: it mostly follows an abbreviation.
_END_INSIDE = re.compile(rf"[{re.escape(_ENDS)}][{re.escape(_CLOSERS)}]*(?=\s+[^\s\da-z])|[\u3002\uff01\uff1f](?=.)")
_ABBREVIATIONS = re.compile(
    r"(?<![^\s(\"])(?:\d{1,2}|[^\W\d_]|(?:[^\W\d_]\.)+[^\W\d_]|st|mt|ft|dr|mr|mrs|ms|jr|sr|vs|ca|sp|no|approx|var)$",
    re.IGNORECASE,
)

_MAX_ABBREVIATION_CHARS = 12

_BULLET = r"(?:[-*\u2022\u2013\u2014]|\(?\d{1,3}[.)])\s+"
_LEAD = re.compile(rf"^(?:{_BULLET}|#+\s+|a:\s*)", re.IGNORECASE)
_FEATURE_LINE = re.compile(rf"\s*{_BULLET}(?P<feature>.*)")
_QUOTES = {'"': '"', "\u201c": "\u201d", "\u201e": "\u201c", "\u00ab": "\u00bb", "\u2018": "\u2019", "'": "'"}

_WEB_PAGE = re.compile(r"!\[|\]\)|\]\(|https?://|\bwww\.", re.IGNORECASE)
_APOLOGY = re.compile(
    r"(?:i['\u2019]m|i am) (?:sorry|unable|not able)\b|i (?:cannot|can['\u2019]t|don['\u2019]t|do not)\b"
    r"|sorry\b|unfortunately, i\b|.*\bas an? (?:ai|(?:large )?language model)\b",
    re.IGNORECASE,
)
_ARTICLE = re.compile(r"^(?:an?|the)\s+", re.IGNORECASE)


def clean_sentences(raw: Iterable[str], classname: str) -> list[str]:
    """Return the distinct descriptions among the answers, in order, each as one line that ends like a sentence.

    If the last sentence of an answer is cut off, it is removed; if it is the only sentence, it gets a full stop. A full
    stop within the class name does not end a sentence.
    """
    cleaned = (_clean_sentence(text, classname) for text in raw)
    return _distinct(text for text in cleaned if text is not None)


def clean_features(raw: str, classname: str) -> list[str]:
    """Return the distinct items of the list in an answer, in order, as short phrases; other lines are ignored."""
    found = (_FEATURE_LINE.fullmatch(line) for line in raw[:_MAX_RAW_CHARS].splitlines())
    features = (_clean_feature(item["feature"]) for item in found if item is not None)
    named = _bare(_on_one_line(classname))
    return _distinct(text for text in features if text is not None and _bare(text) != named)


def _clean_sentence(raw: str, classname: str) -> str | None:
    text = _without_lead(_on_one_line(raw))
    if not _FINISHED.search(text):
        text = _without_lead(_without_unfinished(text, _on_one_line(classname)))
    if not _MIN_SENTENCE_CHARS <= len(text) <= _MAX_SENTENCE_CHARS or text.startswith("?") or _is_worthless(text):
        return None
    return text


def _clean_feature(raw: str) -> str | None:
    text = _on_one_line(raw).rstrip(" .;,")
    if len(text) > _MAX_FEATURE_CHARS or _is_worthless(text):
        return None
    word = text.split()[0]
    # A single letter, also before a hyphen, is a shape (V-shaped); several capitals are an acronym.
    is_ordinary = word == "A" or word[1:2].islower() or word[1:2] in {"'", "\u2019"}
    return text[0].lower() + text[1:] if is_ordinary else text


def _on_one_line(raw: str) -> str:
    """Return the text in NFC with single spaces, without emphasis and invisible characters."""
    spaced = "".join(" " if character.isspace() else character for character in raw[:_MAX_RAW_CHARS])
    visible = "".join(character for character in spaced if character.isprintable() or character in _JOINERS)
    bare = re.sub("[\ufe0e\ufe0f]", "", visible).replace("**", "")
    return " ".join(nfc(_STRAY_JOINER.sub("", bare)).split())


def _without_lead(text: str) -> str:
    """Return the text without list marks before it and without quotes around it."""
    while True:
        shorter = _unquoted(_LEAD.sub("", text)).lstrip(_JOINERS)
        if shorter == text:
            return text
        text = shorter


def _unquoted(text: str) -> str:
    """Return the text without quotes that enclose it, or that are opened and not closed."""
    closing = _QUOTES.get(text[:1])
    if closing is None:
        return text
    inner, closed, after = text[1:].rpartition(closing)
    apostrophe = closing in "'\u2019"
    if not closed:
        return text if apostrophe else after.strip()
    if after.strip(_ENDS) or (closing in inner and not apostrophe):
        return text
    return (inner if _FINISHED.search(inner) else inner + after).strip()


def _is_worthless(text: str) -> bool:
    """Return whether the text is punctuation, part of a web page, an apology, or nothing that a label set accepts."""
    has_words = any(character.isalnum() for character in text)
    if not has_words or check_text(text, len(text))[1]:
        return True
    return _WEB_PAGE.search(text) is not None or _APOLOGY.match(text) is not None


def _without_unfinished(text: str, classname: str) -> str:
    # The name is masked, because a full stop in it, as in St. Bernard, does not end a sentence.
    masked = re.sub(re.escape(classname), lambda found: "x" * len(found[0]), text, flags=re.IGNORECASE)
    ends = [found.end() for found in _END_INSIDE.finditer(masked) if not _is_abbreviation(masked, found.start())]
    if ends:
        return text[: ends[-1]]
    return text.rstrip(" ,;:-\u2013\u2014\u2026") + "."


def _is_abbreviation(text: str, index: int) -> bool:
    """Return whether the character is the full stop of an abbreviation, of initials or of a number in a list."""
    return (
        text[index] == "." and _ABBREVIATIONS.search(text, max(index - _MAX_ABBREVIATION_CHARS, 0), index) is not None
    )


def _distinct(texts: Iterable[str]) -> list[str]:
    first: dict[str, str] = {}
    for text in texts:
        first.setdefault(comparison_key(text), text)
    return list(first.values())


def _bare(text: str) -> str:
    """Return the comparison key of the text without its article."""
    return comparison_key(_ARTICLE.sub("", text))


def comparison_key(text: str) -> str:
    """Return a key that is equal for texts that differ only in case, spaces or final punctuation."""
    return "".join(text.casefold().split()).rstrip(_ENDS + _CLOSERS)
