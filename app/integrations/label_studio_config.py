"""What a labeling configuration of Label Studio asks about images: its ``<Choices>`` on an ``<Image>``.

https://labelstud.io/tags/choices and https://labelstud.io/tags/choice say what the tags mean. Of ``predicted_values``
Label Studio's own backends make use: the words of a model that stand for a choice.
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
    """One of the choices.

    Args:
        result: what an annotation holds: the alias, or the value where there is none.
        words: what the model is asked about: ``predicted_values``, or the value.
    """

    result: str
    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Control:
    """A ``<Choices>`` on an ``<Image>``.

    Args:
        name: of the control, ``from_name`` in results.
        image: the name of the image, ``to_name`` in results.
        source: where the image is: a field of the task after ``$``, or an address that all tasks share.
        is_multiple: whether several may be chosen.
        choices: those in the configuration.
        choices_source: or the field of the task that has them, after ``$``.
    """

    name: str
    image: str
    source: str
    is_multiple: bool
    choices: tuple[Choice, ...]
    choices_source: str | None = None

    def source_in(self, data: Mapping[str, Any]) -> str:
        """Return where the image of a task is.

        Raises:
            InvalidFieldError: the task does not say it.
        """
        found = _value_of(self.source, data)
        if not isinstance(found, str) or not found.strip():
            raise InvalidFieldError.of("data", f"has no image in the field '{self.source.removeprefix('$')}'")
        return found.strip()

    def choices_in(self, data: Mapping[str, Any]) -> tuple[Choice, ...]:
        """Return the choices of a task.

        Raises:
            InvalidFieldError: the task should have them, and has none, or what breaks a rule.
        """
        if self.choices_source is None:
            return self.choices
        found = _value_of(self.choices_source, data)
        if not isinstance(found, list):
            raise InvalidFieldError.of(
                "data", f"has no list of choices in the field '{self.choices_source.removeprefix('$')}'"
            )
        return _choices([each if isinstance(each, dict) else {"value": each} for each in found], self.name)


def read_config(text: str) -> list[Control]:
    """Return every control of a labeling configuration that can be predicted.

    Raises:
        InvalidFieldError: it is no XML, is too long, has no such control, or has choices that no model can be asked.
    """
    if len(text) > MAX_CONFIG_CHARS:
        raise _wrong(f"has {len(text):,} characters; at most {MAX_CONFIG_CHARS:,} are read")
    try:
        root = defusedxml.ElementTree.fromstring(text, forbid_dtd=True)
    except (ParseError, DefusedXmlException, ValueError, RecursionError) as error:
        raise _wrong(f"is no XML that can be read: {error}") from error
    sources = {
        each.get("name", ""): each.get("value", "")
        for each in root.iter()
        if each.tag.lower() == "image" and each.get("value")
    }
    found = [control for each in root.iter() if (control := _control(each, sources)) is not None]
    if not found:
        raise _wrong(
            "has no <Choices> about a whole <Image> with a value; Deixis predicts these, and not regions, nested"
            " choices or several pages"
        )
    return found


def _control(tag: Element, sources: Mapping[str, str]) -> Control | None:
    if tag.tag.lower() != "choices" or not tag.get("name"):
        return None
    if "true" in {tag.get("perRegion", "").lower(), tag.get("perItem", "").lower()}:
        return None
    images = [name for each in tag.get("toName", "").split(",") if (name := each.strip()) in sources]
    options = [each for each in tag if each.tag.lower() == "choice"]
    if not images or any(inner.tag.lower() == "choice" for each in options for inner in each):
        return None
    choices_source = tag.get("value") or None
    if not (options or choices_source):
        return None
    return Control(
        name=tag.get("name", ""),
        image=images[0],
        source=sources[images[0]],
        is_multiple=tag.get("choice", "single").lower() == "multiple",
        choices=_choices([each.attrib for each in options], tag.get("name", "")) if options else (),
        choices_source=None if options else choices_source,
    )


def _choices(given: Sequence[Mapping[str, Any]], control: str) -> tuple[Choice, ...]:
    """Return choices whose words are spelled as the service answers them.

    Raises:
        InvalidFieldError: one has no value, or two have the same word.
    """
    words: list[str] = []
    spans: list[tuple[str, int]] = []
    for each in given:
        value = each.get("value")
        if not isinstance(value, str) or not value.strip():
            raise _wrong(f"has a choice without a value in '{control}'")
        own = [word for word in str(each.get("predicted_values") or "").split(",") if word.strip()] or [value]
        words += own
        spans.append((str(each.get("alias") or value), len(own)))
    if not words:
        raise _wrong(f"has no choice in '{control}'")
    cleaned = iter(clean_classnames(words, max_classes=MAX_WORDS, setting="", field=f"choices of '{control}'"))
    return tuple(Choice(result, tuple(next(cleaned) for _ in range(number))) for result, number in spans)


def words_of(choices: Iterable[Choice]) -> list[str]:
    """Return every word, in order."""
    return [word for choice in choices for word in choice.words]


def _value_of(source: str, data: Mapping[str, Any]) -> Any:
    return data.get(source[1:]) if source.startswith("$") else source


def _wrong(problem: str) -> InvalidFieldError:
    return InvalidFieldError.of("the labeling configuration", problem)
