"""From what a language model wrote to descriptions and features that are worth encoding.

The rules are those by which CuPL and SuS-X made their files (Pratt et al., ICCV 2023; Udandarao et al., ICCV 2023),
some against what is wrong in those files, and some for models that chat: lists, emphasis, apologies. What passes is fit
for a label set: without characters that cannot be seen, and within its lengths.
"""

import re
import unicodedata
from collections.abc import Iterable

_MAX_SENTENCE_CHARS = 1000
_MIN_SENTENCE_CHARS = 5
_MAX_FEATURE_CHARS = 200

_JOINERS = "\u200c\u200d"
# Where naming allows them: between two letters or symbols beyond ASCII, as Persian, Indic scripts and emoji have them.
_STRAY_JOINER = re.compile(rf"(?<![^\s\x00-\x7f{_JOINERS}])[{_JOINERS}]|[{_JOINERS}](?![^\s\x00-\x7f{_JOINERS}])")

_ENDS = ".!?\u3002\uff01\uff1f\u0964\u061f"  # full-width, Hindi and Arabic ones too
_CLOSERS = "\"'\u201d\u2019\u00bb)]"
_FINISHED = re.compile(rf"[{re.escape(_ENDS)}][{re.escape(_CLOSERS)}]*$")
# What begins the next sentence is no small letter and no digit, which mostly follow abbreviations.
_END_INSIDE = re.compile(rf"[{re.escape(_ENDS)}][{re.escape(_CLOSERS)}]*(?=\s+[^\s\da-z])|[\u3002\uff01\uff1f](?=.)")
_NOT_LAST_WORDS = re.compile(
    r"(?<![^\s(\"])(?:\d{1,2}|[^\W\d_]|(?:[^\W\d_]\.)+[^\W\d_]|st|mt|ft|dr|mr|mrs|ms|jr|sr|vs|ca|sp|no|approx|var)$",
    re.IGNORECASE,
)

_LONGEST_ABBREVIATION = 12  # characters; further back no regular expression has to look

_BULLET = r"(?:[-*\u2022\u2013\u2014]|\(?\d{1,3}[.)])\s+"
_LEAD = re.compile(rf"^(?:{_BULLET}|#+\s+|a:\s*)", re.IGNORECASE)
_FEATURE_LINE = re.compile(rf"\s*{_BULLET}(?P<feature>.*)")
_QUOTES = {'"': '"', "\u201c": "\u201d", "\u201e": "\u201c", "\u00ab": "\u00bb", "\u2018": "\u2019", "'": "'"}

_OF_A_PAGE = re.compile(r"!\[|\]\)|\]\(|https?://|\bwww\.", re.IGNORECASE)
_APOLOGY = re.compile(
    r"(?:i['\u2019]m|i am) (?:sorry|unable|not able)\b|i (?:cannot|can['\u2019]t|don['\u2019]t|do not)\b"
    r"|sorry\b|unfortunately, i\b|.*\bas an? (?:ai|(?:large )?language model)\b",
    re.IGNORECASE,
)
_ARTICLE = re.compile(r"^(?:an?|the)\s+", re.IGNORECASE)


def clean_sentences(raw: Iterable[str], classname: str) -> list[str]:
    """Return the answers that are descriptions, each once, in order, as one line that ends like a sentence.

    A last sentence that was cut off is left out where a whole one precedes it, and else given a full stop. A full stop
    within the class name ends no sentence.
    """
    cleaned = (_clean_sentence(text, classname) for text in raw)
    return _each_once(text for text in cleaned if text is not None)


def clean_features(raw: str, classname: str) -> list[str]:
    """Return the items of a list in an answer, each once, in order, as short phrases; other lines are left out."""
    found = (_FEATURE_LINE.fullmatch(line) for line in raw.splitlines())
    features = (_clean_feature(each["feature"]) for each in found if each is not None)
    named = _bare(_on_one_line(classname))
    return _each_once(text for text in features if text is not None and _bare(text) != named)


def _clean_sentence(raw: str, classname: str) -> str | None:
    text = _without_lead(_on_one_line(raw))
    if not _FINISHED.search(text):
        text = _without_lead(_without_unfinished(text, _on_one_line(classname)))
    if not _MIN_SENTENCE_CHARS <= len(text) <= _MAX_SENTENCE_CHARS or text.startswith("?") or _says_nothing(text):
        return None
    return text


def _clean_feature(raw: str) -> str | None:
    text = _on_one_line(raw).rstrip(" .;,")
    if len(text) > _MAX_FEATURE_CHARS or _says_nothing(text):
        return None
    word = text.split()[0]
    # A letter by itself, or before a hyphen, is a shape (V-shaped), and capitals are an acronym.
    ordinary = word == "A" or word[1:2].islower() or word[1:2] in {"'", "\u2019"}
    return text[0].lower() + text[1:] if ordinary else text


def _on_one_line(raw: str) -> str:
    """Return the text in NFC with single spaces, without emphasis and without what cannot be seen."""
    spaced = "".join(" " if character.isspace() else character for character in raw)
    seen = "".join(character for character in spaced if character.isprintable() or character in _JOINERS)
    bare = re.sub("[\ufe0e\ufe0f]", "", seen).replace("**", "")
    return " ".join(unicodedata.normalize("NFC", _STRAY_JOINER.sub("", bare)).split())


def _without_lead(text: str) -> str:
    """Return the text without the marks of a list or an answer before it, and without quotes around it."""
    while True:
        shorter = _unquoted(_LEAD.sub("", text)).lstrip(_JOINERS)
        if shorter == text:
            return text
        text = shorter


def _unquoted(text: str) -> str:
    """Return the text without quotes that enclose it, or that were opened and never closed."""
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


def _says_nothing(text: str) -> bool:
    """Whether it is punctuation alone, the remains of a web page, or an apology."""
    spoken = any(character.isalnum() for character in text)
    return not spoken or _OF_A_PAGE.search(text) is not None or _APOLOGY.match(text) is not None


def _without_unfinished(text: str, classname: str) -> str:
    # Covered, so that what looks like the end of a sentence in a name such as St. Bernard is none.
    covered = re.sub(re.escape(classname), lambda found: "x" * len(found[0]), text, flags=re.IGNORECASE)
    ends = [found.end() for found in _END_INSIDE.finditer(covered) if not _abbreviates(covered, found.start())]
    if ends:
        return text[: ends[-1]]
    return text.rstrip(" ,;:-\u2013\u2014\u2026") + "."


def _abbreviates(text: str, at: int) -> bool:
    """Whether what stands there is the full stop of an abbreviation, of initials or of a number in a list."""
    return text[at] == "." and _NOT_LAST_WORDS.search(text, max(at - _LONGEST_ABBREVIATION, 0), at) is not None


def _each_once(texts: Iterable[str]) -> list[str]:
    first: dict[str, str] = {}
    for text in texts:
        first.setdefault(sameness(text), text)
    return list(first.values())


def _bare(text: str) -> str:
    """Return the key of the text without its article."""
    return sameness(_ARTICLE.sub("", text))


def sameness(text: str) -> str:
    """Return what two texts share that differ in case, in spaces or in their final punctuation only."""
    return "".join(text.casefold().split()).rstrip(_ENDS + _CLOSERS)
