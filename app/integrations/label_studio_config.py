"""Labeling configurations of Label Studio: the ``<Choices>`` about an ``<Image>`` that can be predicted.

https://labelstud.io/tags/choices and https://labelstud.io/tags/choice document the tags. ``predicted_values`` is an
attribute that Label Studio's own backends use: the labels of a model that stand for a choice.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree.ElementTree import Element, ParseError

import defusedxml.ElementTree
from defusedxml import DefusedXmlException

from app.errors import InvalidFieldError
from app.names.class_names import clean_classnames

MAX_CONFIG_CHARS = 1024 * 1024
MAX_WORDS = 1000


@dataclass(frozen=True, slots=True)
class Choice:
    """One choice of a control.

    Args:
        result: the value in annotations: the alias or, without one, the value.
        words: the labels for the model: ``predicted_values`` or, without them, the value.
    """

    result: str
    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Control:
    """A ``<Choices>`` tag about an ``<Image>``.

    Args:
        name: name of the control, ``from_name`` in results.
        image: name of the image, ``to_name`` in results.
        source: location of the image: ``$`` and a field of the task, or an address that all tasks share.
        is_multiple: whether several choices may be selected.
        choices: the choices of the configuration.
        choices_source: ``$`` and the field of the task that has the choices, if the configuration has none.
    """

    name: str
    image: str
    source: str
    is_multiple: bool
    choices: tuple[Choice, ...]
    choices_source: str | None = None

    def source_in(self, data: Mapping[str, Any]) -> str:
        """Return the location of the image of a task.

        Raises:
            InvalidFieldError: the task has no location.
        """
        location = _value_of(self.source, data)
        if not isinstance(location, str) or not location.strip():
            raise InvalidFieldError.of("data", f"has no image in the field '{self.source.removeprefix('$')}'")
        return location.strip()

    def choices_in(self, data: Mapping[str, Any]) -> tuple[Choice, ...]:
        """Return the choices of a task.

        Raises:
            InvalidFieldError: the task has no choices, or invalid ones.
        """
        if self.choices_source is None:
            return self.choices
        values = _value_of(self.choices_source, data)
        if not isinstance(values, list):
            raise InvalidFieldError.of(
                "data", f"has no list of choices in the field '{self.choices_source.removeprefix('$')}'"
            )
        return _choices([value if isinstance(value, dict) else {"value": value} for value in values], self.name)


def read_config(text: str) -> list[Control]:
    """Return the controls of a labeling configuration that can be predicted.

    Raises:
        InvalidFieldError: the text is too long or not XML, or it has no such control or invalid choices.
    """
    if len(text) > MAX_CONFIG_CHARS:
        raise _invalid(f"has {len(text):,} characters; at most {MAX_CONFIG_CHARS:,} are allowed")
    try:
        root = defusedxml.ElementTree.fromstring(text, forbid_dtd=True)
    except (ParseError, DefusedXmlException, ValueError, RecursionError) as error:
        raise _invalid(f"is not valid XML: {error}") from error
    sources = {
        tag.get("name", ""): tag.get("value", "")
        for tag in root.iter()
        if tag.tag.lower() == "image" and tag.get("value")
    }
    controls = [control for tag in root.iter() if (control := _control(tag, sources)) is not None]
    if not controls:
        raise _invalid(
            "has no <Choices> about a whole <Image> with a value; Deixis does not predict regions, nested choices or"
            " several pages"
        )
    return controls


def _control(tag: Element, sources: Mapping[str, str]) -> Control | None:
    if tag.tag.lower() != "choices" or not tag.get("name"):
        return None
    if "true" in {tag.get("perRegion", "").lower(), tag.get("perItem", "").lower()}:
        return None
    images = [name for part in tag.get("toName", "").split(",") if (name := part.strip()) in sources]
    options = [child for child in tag if child.tag.lower() == "choice"]
    if not images or any(nested.tag.lower() == "choice" for option in options for nested in option):
        return None
    choices_source = tag.get("value") or None
    if not (options or choices_source):
        return None
    return Control(
        name=tag.get("name", ""),
        image=images[0],
        source=sources[images[0]],
        is_multiple=tag.get("choice", "single").lower() == "multiple",
        choices=_choices([option.attrib for option in options], tag.get("name", "")) if options else (),
        choices_source=None if options else choices_source,
    )


def _choices(attributes: Sequence[Mapping[str, Any]], control: str) -> tuple[Choice, ...]:
    """Return choices whose words have the spelling of results.

    Raises:
        InvalidFieldError: a choice has no value, or two choices have the same word.
    """
    words: list[str] = []
    spans: list[tuple[str, int]] = []
    for choice in attributes:
        value = choice.get("value")
        if not isinstance(value, str) or not value.strip():
            raise _invalid(f"has a choice without a value in '{control}'")
        own = [word for word in str(choice.get("predicted_values") or "").split(",") if word.strip()] or [value]
        words += own
        spans.append((str(choice.get("alias") or value), len(own)))
    if not words:
        raise _invalid(f"has no choice in '{control}'")
    cleaned = iter(clean_classnames(words, max_classes=MAX_WORDS, setting="", field=f"choices of '{control}'"))
    return tuple(Choice(result, tuple(next(cleaned) for _ in range(number))) for result, number in spans)


def words_of(choices: Iterable[Choice]) -> list[str]:
    """Return the words of all choices, in order."""
    return [word for choice in choices for word in choice.words]


def _value_of(source: str, data: Mapping[str, Any]) -> Any:
    return data.get(source[1:]) if source.startswith("$") else source


def _invalid(problem: str) -> InvalidFieldError:
    return InvalidFieldError.of("the labeling configuration", problem)
