"""Cleans and checks class names, and the descriptions and prompts of classes."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite

from app.errors import FieldProblem, InvalidFieldError, TooLargeError, UnknownNameError, did_you_mean
from app.names.text import MAX_TEXT_CHARS, check_text, normalized, quoted
from app.types import ClassEntry

MAX_ITEMS = 100_000
"""The longest list that a request may contain, whatever the settings allow. It bounds the time to validate 100 MB."""

MAX_DESCRIPTIONS_PER_CLASS = 200

MAX_PLACEHOLDERS = 10
"""How often a template or the prompt of a class may contain ``{}``; each stands for up to 200 characters."""

_MAX_LABEL_CHARS = 200
_MAX_SHOWN_PROBLEMS = 20
_MAX_SHOWN_NAMES = 6
_MAX_DESCRIPTION_CHARS = 1000
_MAX_PROMPT_CHARS = 300
# Also those that a proxy makes of %2F and %5C.
_URL_SEPARATORS = re.compile(r"[/\\]")


def indices_of(given: Sequence[str], classnames: Sequence[str]) -> list[int]:
    """Return the index of each name in the class names, which are clean already.

    Raises:
        UnknownNameError: a name is not one of the class names.
    """
    index_of = {name: index for index, name in enumerate(classnames)}
    indices = []
    for raw in given:
        name = normalized(raw[:MAX_TEXT_CHARS])
        if name not in index_of:
            raise UnknownNameError("class", name, classnames)
        indices.append(index_of[name])
    return indices


def numbers_of(given: Mapping[str, float], classnames: Sequence[str], field: str) -> list[float]:
    """Return the number of each class, in the order of the class names, which are clean already.

    Args:
        given: positive numbers by name; the names are normalised.
        classnames: each of which needs a number.
        field: the path of ``given`` in the request.

    Raises:
        InvalidFieldError: a name is unknown or repeated, a class has no number, or a number is not finite or above 0.
    """
    problems: list[FieldProblem] = []
    numbers: dict[str, float] = {}
    known = set(classnames)
    for raw, number in given.items():
        name = normalized(raw[:MAX_TEXT_CHARS])
        path = f"{field}.{name}"
        if name not in known:
            problems.append(
                FieldProblem(path, f"{quoted(name)} is not one of the classes{did_you_mean(name, classnames)}")
            )
        elif name in numbers:
            problems.append(FieldProblem(path, f"{quoted(name)} is given twice; remove one of them"))
        elif not (isfinite(number) and number > 0):
            rule = "a frequency or a count is a finite number above 0"
            problems.append(
                FieldProblem(
                    path, f"{number:g} is given, and {rule}; give a rare class a small one, or remove the class"
                )
            )
        else:
            numbers[name] = number
        if len(problems) == _MAX_SHOWN_PROBLEMS:
            break
    if problems:
        raise InvalidFieldError(problems)
    if missing := [name for name in classnames if name not in numbers]:
        shown = ", ".join(quoted(name) for name in missing[:_MAX_SHOWN_NAMES])
        more = f" and {len(missing) - _MAX_SHOWN_NAMES:,} more" if len(missing) > _MAX_SHOWN_NAMES else ""
        raise InvalidFieldError.of(field, f"no number is given for {shown}{more}; give one for every class")
    return [numbers[name] for name in classnames]


def clean_classnames(
    raw: Sequence[str],
    *,
    max_classes: int,
    setting: str,
    max_label_chars: int = _MAX_LABEL_CHARS,
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
    max_label_chars: int = _MAX_LABEL_CHARS,
    max_description_chars: int = _MAX_DESCRIPTION_CHARS,
    max_descriptions: int = MAX_DESCRIPTIONS_PER_CLASS,
    field: str = "classes",
    in_urls: bool = False,
) -> tuple[ClassEntry, ...]:
    """Return the classes with every text in NFC, trimmed and with single spaces, and repeated descriptions removed.

    Two names that differ only in letter case are duplicates, because text encoders lowercase their input. Names are
    compared by ``lower`` and not by ``casefold``, for which the German "Maße" and "Masse" are equal.

    Args:
        raw: a string is a class of that name without descriptions.
        max_classes: the largest number of classes.
        setting: the name of the setting that holds ``max_classes``, as in ``DEIXIS_MAX_LABELS``.
        max_label_chars: the largest number of characters in a name.
        max_description_chars: the same for a description, a feature or a synonym.
        max_descriptions: the largest number of descriptions, of features and of synonyms of one class.
        field: the path of ``raw`` in the request; problems are reported under ``{field}.{index}``.
        in_urls: whether a name has to be a part of a URL, as the class of a stored label set.

    Raises:
        TooLargeError: there are more than ``max_classes``.
        InvalidFieldError: a class breaks a rule; the error lists every problem of every class.
    """
    if len(raw) > max_classes:
        raise TooLargeError(
            f"{len(raw)} classes are given, at most {max_classes} are allowed; give fewer, or raise {setting}"
        )
    if not raw:
        raise InvalidFieldError.of(field, "the list is empty; give at least one class")
    problems: list[FieldProblem] = []
    cleaned: list[ClassEntry] = []
    first_entry: dict[str, tuple[int, str]] = {}
    for index, given in enumerate(raw):
        entry = given if isinstance(given, ClassEntry) else ClassEntry(given)
        path = f"{field}.{index}"
        name = _clean_text(entry.name, path, max_label_chars, problems)
        if in_urls and not {".", ".."}.isdisjoint(_URL_SEPARATORS.split(name)):
            rule = "which has a meaning in URLs; add a word to the name"
            problems.append(FieldProblem(path, f"{quoted(name)} is or contains the path segment '.' or '..', {rule}"))
        first_index, first = first_entry.setdefault(name.lower(), (index, name))
        if name and first_index != index:
            repeats = f"repeats {quoted(first)} at index {first_index}"
            differs = "" if name == first else ", because letter case is ignored"
            problems.append(FieldProblem(path, f"{quoted(name)} {repeats}{differs}; remove one of them"))
        descriptions, synonyms, features = (
            _clean_texts(texts, f"{path}.{kind}", max_description_chars, max_descriptions, problems)
            for kind, texts in (
                ("descriptions", entry.descriptions),
                ("synonyms", entry.synonyms),
                ("features", entry.features),
            )
        )
        parent = (
            None if entry.parent is None else _clean_text(entry.parent, f"{path}.parent", max_label_chars, problems)
        )
        prompt = None if entry.prompt is None else _clean_prompt(entry.prompt, f"{path}.prompt", problems)
        cleaned.append(
            replace(
                entry,
                name=name,
                descriptions=descriptions,
                synonyms=synonyms,
                features=features,
                prompt=prompt,
                parent=parent,
            )
        )
    if problems:
        raise InvalidFieldError(problems)
    return tuple(cleaned)


def _clean_texts(
    raw: Sequence[str], path: str, max_chars: int, max_texts: int, problems: list[FieldProblem]
) -> tuple[str, ...]:
    if len(raw) > max_texts:
        problems.append(FieldProblem(path, f"{len(raw)} are given, at most {max_texts} are allowed; remove some"))
        return ()
    texts = [_clean_text(text, f"{path}.{index}", max_chars, problems) for index, text in enumerate(raw)]
    return tuple(dict.fromkeys(texts))


def _clean_prompt(raw: str, path: str, problems: list[FieldProblem]) -> str:
    prompt = _clean_text(raw, path, _MAX_PROMPT_CHARS, problems)
    rest = prompt.replace("{}", "")
    if "{" in rest or "}" in rest:
        problem = f"{quoted(prompt)} has a brace that is not part of {{}}; write {{}} for the class name"
        problems.append(FieldProblem(path, f"{problem}, and no other brace"))
    elif (placeholders := prompt.count("{}")) > MAX_PLACEHOLDERS:
        problem = f"{quoted(prompt)} has {{}} {placeholders} times; at most {MAX_PLACEHOLDERS} are allowed"
        problems.append(FieldProblem(path, problem))
    return prompt


def _clean_text(raw: str, path: str, max_chars: int, problems: list[FieldProblem]) -> str:
    """Return the normalized text, and append its problems to ``problems``."""
    text, broken = check_text(raw, max_chars)
    problems += [FieldProblem(path, problem) for problem in broken]
    return text
