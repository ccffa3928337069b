"""Prompt templates: sentences in which ``{}`` stands for a class name."""

import asyncio
import functools
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from app.errors import ConfigurationError, InvalidFieldError, UnknownNameError
from app.names.class_names import MAX_PLACEHOLDERS

PLACEHOLDER = "{}"
MAX_TEMPLATE_CHARACTERS = 300

_UNPRINTABLE = {"Cc", "Cs", "Zl", "Zp"}  # control characters, lone surrogates, line and paragraph separators


class TemplateLibrary:
    """Template sets by name: one for each ``*.txt`` file of a folder, and ``extra`` sets that are built at first use.

    A file has one template per line; empty lines and lines that start with ``#`` are skipped. Files are read once, by
    the constructor.

    Raises:
        ConfigurationError: the folder does not exist, a file has no template or an invalid one, or an extra set has the
            name of a file.
    """

    def __init__(self, folder: Path, extra: Mapping[str, Callable[[], tuple[str, ...]]]) -> None:
        if not folder.is_dir():
            raise ConfigurationError(f"there is no folder of templates at '{folder}'; install Deixis again")
        self._sets = {file.stem: _read_templates(file) for file in sorted(folder.glob("*.txt"))}
        for name in extra:
            if name in self._sets:
                raise ConfigurationError(
                    f"'{folder / name}.txt' has the name of a built-in template set; rename the file"
                )
        self._extra = {name: functools.cache(make) for name, make in extra.items()}

    def names(self) -> tuple[str, ...]:
        """The names of the sets, sorted."""
        return tuple(sorted((*self._sets, *self._extra)))

    def resolve(self, reference: str, field: str = "template") -> tuple[str, ...]:
        """Return the templates of the set of this name, or the reference itself if it is a template.

        Raises:
            UnknownNameError: there is no such set, and the reference has no braces.
            InvalidFieldError: the template is invalid; ``field`` is the field of the request that contains it.
        """
        if reference in self._sets:
            return self._sets[reference]
        if reference in self._extra:
            return self._extra[reference]()
        if "{" in reference or "}" in reference or len(reference) > MAX_TEMPLATE_CHARACTERS:
            problem = template_problem(reference)
            if problem is not None:
                raise InvalidFieldError.of(field, problem)
            return (reference,)
        raise UnknownNameError(
            "template set", reference, known=self.names(), way_out="or give one template that contains {}"
        )

    async def load(self, reference: str, field: str = "template") -> tuple[str, ...]:
        """Return as ``resolve``; an extra set is built in a thread, because that may import libraries for seconds."""
        if reference in self._extra:
            return await asyncio.to_thread(self.resolve, reference, field)
        return self.resolve(reference, field)


def template_problem(template: str) -> str | None:
    """Return the rule that a template breaks and how to correct it, or None.

    A template must contain ``{}`` 1 to 10 times and no other braces. Templates are filled by replacement, so that no
    text can reach attributes or formatting.
    """
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        return f"a template of {len(template)} characters; at most {MAX_TEMPLATE_CHARACTERS} are allowed"
    if any(unicodedata.category(character) in _UNPRINTABLE for character in template):
        return f"{template!r} has a control character or a line break; write the template on one line"
    rest = template.replace(PLACEHOLDER, "")
    if "{" in rest or "}" in rest:
        return f"'{template}' has a brace that is not part of {{}}; write {{}} where the class name goes"
    if template.count(PLACEHOLDER) > MAX_PLACEHOLDERS:
        return f"'{template}' has {{}} {template.count(PLACEHOLDER)} times; at most {MAX_PLACEHOLDERS} are allowed"
    if PLACEHOLDER not in template:
        return f"'{template}' has no {{}}; write {{}} where the class name goes"
    return None


def fill(templates: Sequence[str], classname: str) -> tuple[str, ...]:
    """Return the templates with every ``{}`` replaced by the class name."""
    return tuple(template.replace(PLACEHOLDER, classname) for template in templates)


def _read_templates(file: Path) -> tuple[str, ...]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{file} is not UTF-8 text: {error}; save it as UTF-8") from error
    templates = []
    for number, line in enumerate(lines, start=1):
        if not line or line.startswith("#"):
            continue
        problem = template_problem(line)
        if problem is not None:
            raise ConfigurationError(f"{file}, line {number}: {problem}")
        templates.append(line)
    if not templates:
        raise ConfigurationError(f"{file} contains no template; write one per line, with {{}} for the class name")
    return tuple(templates)
