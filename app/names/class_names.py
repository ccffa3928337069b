"""What label sets and classes may be called, and the one spelling that each name is kept in.

Any script and emoji are welcome. What is refused is what nobody can see or read back: control and format characters,
lone surrogates, and code points that Unicode has given no meaning. The name of a label set is part of URLs and must
also do without the characters that have a meaning there.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from app.errors import FieldProblem, InvalidFieldError, TooLargeError, UnknownNameError
from app.types import ClassEntry

MAX_ITEMS = 100_000
"""Of any list that a caller sends, whatever the settings allow; without it, 100 MB of short names take minutes."""

MAX_LABEL_SET_NAME_CHARS = 64
MAX_LABEL_CHARS = 200
MAX_DESCRIPTION_CHARS = 1000
MAX_DESCRIPTIONS_PER_CLASS = 200
MAX_PROMPT_CHARS = 300

_DATABASE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_NAMESPACE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")

NAMESPACE_END = "#"
"""Between a namespace and a name, where they are kept together; no name may contain it."""

_RESERVED_IN_URLS = "/\\@:?#%,"

# Persian, Indic scripts and emoji need the two joiners; emoji need the two variation selectors.
_JOINERS = "\u200c\u200d"
_EMOJI_SELECTORS = "\ufe0e\ufe0f"
_KEYCAP_BASES = "0123456789#*"


def clean_label_set_name(raw: str, field: str) -> str:
    """Return the name trimmed and in NFC; also for names that are only looked up, which may be spelled differently.

    Raises:
        InvalidFieldError: the name is empty, longer than 64 characters, or holds what a name must not.
    """
    name = unicodedata.normalize("NFC", raw).strip()
    problems = _text_problems(name, MAX_LABEL_SET_NAME_CHARS)
    if name.startswith("."):
        problems.append(f"{_shown(name)} begins with '.', which means a place in a path; leave the '.' out")
    if reserved := sorted(set(name) & set(_RESERVED_IN_URLS)):
        listed = " ".join(reserved)
        problems.append(f"{_shown(name)} contains {listed} , and none of {_RESERVED_IN_URLS} may be in a name; use -")
    if problems:
        raise InvalidFieldError([FieldProblem(field, problem) for problem in problems])
    return name


def clean_database_name(raw: str, field: str) -> str:
    """Return the name of a caption database trimmed; it is a folder too, on whatever file system.

    Raises:
        InvalidFieldError: it is not made of 1 to 64 lower-case letters, digits, ``-`` and ``_``.
    """
    name = raw.strip(" ")
    if not is_database_name(name):
        rule = "use 1 to 64 of a-z, 0-9, - and _, the first one a letter or a digit"
        raise InvalidFieldError.of(field, f"{_shown(name)} is no name of a caption database; {rule}")
    return name


def is_database_name(name: str) -> bool:
    """Tell whether a caption database may be called so."""
    return _DATABASE_NAME.fullmatch(name) is not None


def is_kept_database_name(kept: str) -> bool:
    """Tell whether a caption database may be kept so, with its namespace or without; no path is among them."""
    namespace, end, name = kept.rpartition(NAMESPACE_END)
    return is_database_name(name) and (not end or _NAMESPACE_NAME.fullmatch(namespace) is not None)


@dataclass(frozen=True, slots=True)
class Namespace:
    """Whose label sets and caption databases are meant; the one without a name is that of everybody without a key.

    Inside the service a name is kept together with its namespace, as ``acme#pets``. Callers neither send nor see that:
    the methods here make it of what they send, and ``own_name`` and ``hide`` take it from what they see.
    """

    name: str = ""

    def label_set(self, raw: str, field: str = "name") -> str:
        """Return how a label set of this namespace is kept; raises as ``clean_label_set_name``."""
        return self.within(clean_label_set_name(raw, field))

    def reference(self, raw: str, field: str = "label_set") -> str:
        """Return the same for ``name`` or ``name@version``."""
        name, at, version = raw.partition("@")
        return f"{self.label_set(name, field)}{at}{version}"

    def database(self, raw: str, field: str = "name") -> str:
        """Return how a caption database of this namespace is kept; raises as ``clean_database_name``."""
        return self.within(clean_database_name(raw, field))

    def holds(self, kept: str) -> bool:
        """Tell whether what is kept under a name belongs to this namespace."""
        return namespace_of(kept) == self

    def hide(self, text: str) -> str:
        """Return a text for callers, whose names in it are as they know them."""
        return text.replace(f"{self.name}{NAMESPACE_END}", "") if self.name else text

    def within(self, name: str) -> str:
        """Return how something of this namespace is kept whose name needs no cleaning."""
        return f"{self.name}{NAMESPACE_END}{name}" if self.name else name


OPEN_NAMESPACE = Namespace()
"""Of everybody, where there are no keys, and of keys that are made for no other."""


def namespace_of(kept: str) -> Namespace:
    """Return the namespace of what is kept under a name, or under a name and a version."""
    return Namespace(kept.partition(NAMESPACE_END)[0]) if NAMESPACE_END in kept else OPEN_NAMESPACE


def own_name(kept: str) -> str:
    """Return a name, or a name and a version, as its own callers know it."""
    return kept.rpartition(NAMESPACE_END)[2]


def clean_namespace(raw: str, field: str) -> Namespace:
    """Return a namespace by its name; the empty name is that of everybody.

    Raises:
        InvalidFieldError: it is not made of at most 32 lower-case letters, digits, ``-`` and ``_``.
    """
    if raw and not _NAMESPACE_NAME.fullmatch(raw):
        rule = "use 1 to 32 of a-z, 0-9, - and _, the first one a letter or a digit"
        raise InvalidFieldError.of(field, f"{_shown(raw)} is no name of a namespace; {rule}")
    return Namespace(raw)


def indices_of(given: Sequence[str], classnames: Sequence[str]) -> list[int]:
    """Return the place of each name among the class names, which are clean already.

    Raises:
        UnknownNameError: a name is none of them.
    """
    index_of = {name: index for index, name in enumerate(classnames)}
    cleaned = [unicodedata.normalize("NFC", " ".join(name.split())) for name in given]
    for name in cleaned:
        if name not in index_of:
            raise UnknownNameError("class", name, classnames)
    return [index_of[name] for name in cleaned]


def clean_classnames(
    raw: Sequence[str],
    *,
    max_classes: int,
    setting: str,
    max_label_chars: int = MAX_LABEL_CHARS,
    field: str = "labels",
) -> tuple[str, ...]:
    """Return the class names as ``clean_classes`` does."""
    entries = clean_classes(raw, max_classes=max_classes, setting=setting, max_label_chars=max_label_chars, field=field)
    return tuple(entry.name for entry in entries)


def clean_classes(
    raw: Sequence[ClassEntry | str],
    *,
    max_classes: int,
    setting: str,
    max_label_chars: int = MAX_LABEL_CHARS,
    max_description_chars: int = MAX_DESCRIPTION_CHARS,
    max_descriptions: int = MAX_DESCRIPTIONS_PER_CLASS,
    field: str = "classes",
) -> tuple[ClassEntry, ...]:
    """Return the classes in NFC, trimmed, and with single spaces; a description that is repeated is kept once.

    Two names that differ in letter case only are duplicates, because text encoders lower the case of what they read.
    It is ``lower`` and not ``casefold``, which would also take German "Maße" for "Masse".

    Args:
        raw: a string is a class of that name without descriptions.
        max_classes: the largest number of classes.
        setting: the name of the setting that holds ``max_classes``, as in ``DEIXIS_MAX_LABELS``.
        max_label_chars: the largest number of characters in a name.
        max_description_chars: the same for a description, a feature or a synonym.
        max_descriptions: the largest number of descriptions, of features and of synonyms of one class.
        field: the path of ``raw`` in the request; problems are reported under ``{field}.{index}``.

    Raises:
        TooLargeError: there are more than ``max_classes``.
        InvalidFieldError: with every problem of every class.
    """
    if len(raw) > max_classes:
        problem = f"{field}: {len(raw)} classes are given, at most {max_classes} are allowed"
        raise TooLargeError(f"{problem}; give fewer, or raise {setting}")
    if not raw:
        raise InvalidFieldError.of(field, "the list is empty; give at least one class")
    problems: list[FieldProblem] = []
    cleaned: list[ClassEntry] = []
    first_with: dict[str, tuple[int, str]] = {}
    for index, given in enumerate(raw):
        entry = given if isinstance(given, ClassEntry) else ClassEntry(given)
        path = f"{field}.{index}"
        name = _clean_text(entry.name, path, max_label_chars, problems)
        first_index, first = first_with.setdefault(name.lower(), (index, name))
        if name and first_index != index:
            repeats = f"repeats {_shown(first)} of {field}.{first_index}"
            differs = "" if name == first else ", as letter case is not told apart"
            problems.append(FieldProblem(path, f"{_shown(name)} {repeats}{differs}; leave one of them out"))
        descriptions, synonyms, features = (
            _clean_texts(texts, f"{path}.{kind}", max_description_chars, max_descriptions, problems)
            for kind, texts in (
                ("descriptions", entry.descriptions),
                ("synonyms", entry.synonyms),
                ("features", entry.features),
            )
        )
        prompt = None if entry.prompt is None else _clean_prompt(entry.prompt, f"{path}.prompt", problems)
        cleaned.append(ClassEntry(name, descriptions, synonyms, features, prompt))
    if problems:
        raise InvalidFieldError(problems)
    return tuple(cleaned)


def clean_text(raw: str, *, max_chars: int, field: str) -> str:
    """Return a text in its one spelling: composed, on one line, single spaces.

    Raises:
        InvalidFieldError: it is empty, too long, or holds what nobody can see.
    """
    problems: list[FieldProblem] = []
    text = _clean_text(raw, field, max_chars, problems)
    if problems:
        raise InvalidFieldError(problems)
    return text


def _clean_texts(
    raw: Sequence[str], path: str, max_chars: int, max_texts: int, problems: list[FieldProblem]
) -> tuple[str, ...]:
    if len(raw) > max_texts:
        problems.append(FieldProblem(path, f"{len(raw)} are given, at most {max_texts} are allowed; leave some out"))
        return ()
    texts = [_clean_text(text, f"{path}.{index}", max_chars, problems) for index, text in enumerate(raw)]
    return tuple(dict.fromkeys(texts))


def _clean_prompt(raw: str, path: str, problems: list[FieldProblem]) -> str:
    prompt = _clean_text(raw, path, MAX_PROMPT_CHARS, problems)
    rest = prompt.replace("{}", "")
    if "{" in rest or "}" in rest:
        problems.append(FieldProblem(path, f"{_shown(prompt)} has a brace that is not part of {{}}; {{}} is the name"))
    return prompt


def _clean_text(raw: str, path: str, max_chars: int, problems: list[FieldProblem]) -> str:
    """Return the text in its one spelling, and add what is wrong with it to ``problems``."""
    text = " ".join(unicodedata.normalize("NFC", raw).split())
    problems += [FieldProblem(path, problem) for problem in _text_problems(text, max_chars)]
    return text


def _text_problems(text: str, max_chars: int) -> list[str]:
    if not text:
        return ["the text is empty; write at least one character that can be seen"]
    problems = []
    if len(text) > max_chars:
        problems.append(f"{_shown(text)} has {len(text)} characters, at most {max_chars} are allowed; shorten it")
    if refused := _refused_characters(text[:max_chars]):
        named = ", ".join(_code_point(character) for character in refused)
        problems.append(f"{_shown(text)} contains {named}, which cannot be seen or read there; remove it")
    return problems


def _refused_characters(text: str) -> list[str]:
    # Printable is, in Python's words, all but "other" and "separator" in Unicode's categories, and the plain space.
    if text.isprintable() and not any(selector in text for selector in _EMOJI_SELECTORS):
        return []
    return sorted({character for at, character in enumerate(text) if not _is_allowed_at(text, at)})


def _is_allowed_at(text: str, at: int) -> bool:
    character = text[at]
    before, after = text[at - 1 : at], text[at + 1 : at + 2]
    if character in _JOINERS:
        # Anywhere else a joiner is only a way to make two names that look the same.
        return _can_be_joined(before) and _can_be_joined(after) and not (before + after).isascii()
    if character in _EMOJI_SELECTORS:
        if not _can_be_joined(before) or before in _EMOJI_SELECTORS:
            return False
        return before in _KEYCAP_BASES or not before.isascii()
    # Emoji younger than this Python's Unicode tables are not printable to it; the whole block is set aside for them.
    return character.isprintable() or "\U0001f300" <= character <= "\U0001faff"


def _can_be_joined(neighbour: str) -> bool:
    return neighbour != "" and neighbour not in _JOINERS and not neighbour.isspace()


def _shown(text: str) -> str:
    """Return the beginning of the text in quotes, with everything escaped that would not print."""
    return repr(text) if len(text) <= 40 else f"{text[:40]!r}..."


def _code_point(character: str) -> str:
    return f"U+{ord(character):04X} {unicodedata.name(character, '')}".rstrip()
