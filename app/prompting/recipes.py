"""Recipes: the prompts that a method reads for each class, and how their features are pooled into the adapter's rows.

A class has one row for its name, and one for each synonym that changes its prompts. The scores of these rows are merged
after the adapter.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from app.prompting.templates import PLACEHOLDER, fill
from app.prompting.waffle import random_descriptors
from app.types import ClassEntry

Options = Mapping[str, float]


class Pooling(StrEnum):
    """How the unit features of a row's prompts are pooled.

    ``PROTOTYPE``: their mean, normalised, (d,). ``MEAN``: their mean, not normalised, (d,); its product with an image
    is the mean of the cosines. ``ALIGNED``: the prototype of each slot, (k, d).
    """

    PROTOTYPE = "prototype"
    MEAN = "mean"
    ALIGNED = "aligned"


@dataclass(frozen=True, slots=True)
class Slot:
    """Prompts of one kind. Aligned methods pool them, and give their prototype one weight."""

    source: str
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One name of one class, with at least one prompt."""

    class_index: int
    slots: tuple[Slot, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """Every prompt, in order."""
        return tuple(text for slot in self.slots for text in slot.texts)


@dataclass(frozen=True, slots=True)
class Recipe:
    """The rows of all classes, in the order of the classes, and warnings for the response."""

    pooling: Pooling
    rows: tuple[Row, ...]
    warnings: tuple[str, ...] = ()


MakeRecipe = Callable[[Sequence[ClassEntry], Sequence[str], Options], Recipe]


def templates_only(classes: Sequence[ClassEntry], templates: Sequence[str], options: Options) -> Recipe:
    """CLIP: the name in each template (Radford et al., ICML 2021, section 3.1.4)."""
    del options
    return Recipe(Pooling.PROTOTYPE, _rows(classes, lambda entry, name: [_template_slot(entry, name, templates)]))


def sentences_only(classes: Sequence[ClassEntry], templates: Sequence[str], options: Options) -> Recipe:
    """CuPL: sentences about the appearance of the class, with equal weights (Pratt et al., ICCV 2023, section 3).

    A class without sentences uses sentences made of its features; without these too, its templates.
    """
    del options

    def slots(entry: ClassEntry, name: str) -> list[Slot]:
        return [_sentence_slot(entry, name) or _template_slot(entry, name, templates)]

    return Recipe(Pooling.PROTOTYPE, _rows(classes, slots), _without_descriptions(classes))


def templates_and_sentences(classes: Sequence[ClassEntry], templates: Sequence[str], options: Options) -> Recipe:
    """CuPL with templates: every prompt has the same weight, so many templates outweigh a few sentences."""
    del options

    def slots(entry: ClassEntry, name: str) -> list[Slot]:
        return [_template_slot(entry, name, templates), *_some(_sentence_slot(entry, name))]

    return Recipe(Pooling.PROTOTYPE, _rows(classes, slots), _without_descriptions(classes))


def features_only(classes: Sequence[ClassEntry], templates: Sequence[str], options: Options) -> Recipe:
    """Classification by description: the mean of the cosines with "X, which has ..." (Menon and Vondrick, ICLR 2023).

    The mean is not normalised, so a class with very different features scores lower. A class without features uses its
    sentences; without these too, its templates.
    """
    del options

    def slots(entry: ClassEntry, name: str) -> list[Slot]:
        if entry.features:
            return [Slot("feature", tuple(feature_sentence(name, feature) for feature in entry.features))]
        return [_sentence_slot(entry, name) or _template_slot(entry, name, templates)]

    return Recipe(Pooling.MEAN, _rows(classes, slots), _without_descriptions(classes))


def random_words(classes: Sequence[ClassEntry], templates: Sequence[str], options: Options) -> Recipe:
    """WaffleCLIP, the control: the same meaningless features for every class (Roth et al., ICCV 2023, section 3.2).

    ``options`` are ``descriptors``, their number, and ``seed``.
    """
    del templates
    descriptors = random_descriptors(
        [entry.name for entry in classes], count=int(options["descriptors"]), seed=int(options["seed"])
    )

    def slots(_: ClassEntry, name: str) -> list[Slot]:
        return [
            Slot("random", tuple(f"A photo of a {feature_sentence(name, descriptor)}." for descriptor in descriptors))
        ]

    return Recipe(Pooling.MEAN, _rows(classes, slots))


def aligned_prompts(classes: Sequence[ClassEntry], templates: Sequence[str], options: Options) -> Recipe:
    """AutoCLIP: each template, and groups of descriptions, as many as the class with the fewest descriptions can fill.

    AutoCLIP needs prompts that correspond between classes, and sets of descriptions have any size and order. So the
    descriptions of each class are dealt into the groups, and a group is represented by its prototype. If a class has no
    description, no class uses descriptions, because a weight would mean something else for that class.
    """
    del options
    groups = min((len(entry.descriptions) + len(entry.features) for entry in classes), default=0)

    def slots(entry: ClassEntry, name: str) -> list[Slot]:
        (source, filled) = _template_texts(entry, name, templates)
        # A class prompt replaces each template, because all classes must have the same number of slots.
        repeated = filled * len(templates) if source == "class prompt" else filled
        texts = (*entry.descriptions, *(feature_sentence(name, feature) for feature in entry.features))
        dealt = [Slot("description", texts[group::groups]) for group in range(groups)]
        return [*(Slot(source, (text,)) for text in repeated), *dealt]

    warnings = []
    if len(templates) + groups == 1:
        warnings.append(
            "each class has only one prompt, so autoclip has nothing to weight; select a template set with several"
            " templates, such as ensemble, or add descriptions to every class"
        )
    elif not groups:
        warnings += _without_descriptions(classes, "the descriptions of the other classes are not used")
    return Recipe(Pooling.ALIGNED, _rows(classes, slots), tuple(warnings))


RECIPES: Mapping[str, MakeRecipe] = MappingProxyType(
    {
        "templates": templates_only,
        "sentences": sentences_only,
        "templates-and-sentences": templates_and_sentences,
        "features": features_only,
        "random-words": random_words,
        "aligned-prompts": aligned_prompts,
    }
)
"""Every recipe by its name."""


def feature_sentence(name: str, feature: str) -> str:
    """Return "X, which has stripes"; without a feature only the name.

    The wording is that of Menon and Vondrick's code. Deviation: words that begin with "a" are not taken for articles,
    where their code says "which is antennae".
    """
    if not feature:
        return name
    if re.match(r"(an?|used)\b", feature):
        conjunction = "which is"
    elif re.match(r"(has|have|often|typically|may|can)\b", feature):
        conjunction = "which"
    else:
        conjunction = "which has"
    return f"{name}, {conjunction} {feature}"


def _rows(classes: Sequence[ClassEntry], slots: Callable[[ClassEntry, str], list[Slot]]) -> tuple[Row, ...]:
    """Return one row for each name of each class; a synonym that does not change the prompts adds no row."""
    rows = []
    for index, entry in enumerate(classes):
        names = dict.fromkeys((entry.name, *entry.synonyms))
        rows += [Row(index, row_slots) for row_slots in dict.fromkeys(tuple(slots(entry, name)) for name in names)]
    return tuple(rows)


def _template_texts(entry: ClassEntry, name: str, templates: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    if entry.prompt is not None:
        return "class prompt", (entry.prompt.replace(PLACEHOLDER, name),)
    return "template", fill(templates, name)


def _template_slot(entry: ClassEntry, name: str, templates: Sequence[str]) -> Slot:
    return Slot(*_template_texts(entry, name, templates))


def _sentence_slot(entry: ClassEntry, name: str) -> Slot | None:
    """Return the sentences of the class, or sentences made of its features; None if it has neither."""
    if entry.descriptions:
        return Slot("description", entry.descriptions)
    if entry.features:
        return Slot("feature", tuple(feature_sentence(name, feature) for feature in entry.features))
    return None


def _some(slot: Slot | None) -> list[Slot]:
    return [] if slot is None else [slot]


def _without_descriptions(
    classes: Sequence[ClassEntry], consequence: str = "these are classified by their templates"
) -> tuple[str, ...]:
    undescribed = [entry.name for entry in classes if not (entry.descriptions or entry.features)]
    if not undescribed:
        return ()
    if len(undescribed) == len(classes):
        return ("no class has descriptions; the templates are used",)
    names = ", ".join(f"'{name}'" for name in undescribed[:5]) + (", ..." if len(undescribed) > 5 else "")
    return (f"{len(undescribed)} of {len(classes)} classes have no descriptions ({names}); {consequence}",)
