"""What each method reads of a class: its prompts, and how their features become the rows that an adapter takes.

A class has one row per name: its own, and one per synonym that changes its prompts. Rows are merged again after the
adapter, by their scores.
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
    """How unit features of a row's prompts become what is kept of it.

    ``PROTOTYPE``: their mean, made unit again, (d,). ``MEAN``: their mean as it is, (d,), whose product with an image
    is the mean of the cosines. ``ALIGNED``: the prototype of each slot by itself, (k, d).
    """

    PROTOTYPE = "prototype"
    MEAN = "mean"
    ALIGNED = "aligned"


@dataclass(frozen=True, slots=True)
class Slot:
    """Prompts of one kind; aligned methods pool them, and give their prototype one weight."""

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
    """The rows of all classes, in the order of the classes, and what the caller should know of them."""

    pooling: Pooling
    rows: tuple[Row, ...]
    warnings: tuple[str, ...] = ()


MakeRecipe = Callable[[Sequence[ClassEntry], Sequence[str], Options], Recipe]


def templates_only(classes: Sequence[ClassEntry], templates: Sequence[str], options: Options) -> Recipe:
    """CLIP's own way: the name in each template (Radford et al., ICML 2021, section 3.1.4)."""
    del options
    return Recipe(Pooling.PROTOTYPE, _rows(classes, lambda entry, name: [_template_slot(entry, name, templates)]))


def sentences_only(classes: Sequence[ClassEntry], templates: Sequence[str], options: Options) -> Recipe:
    """CuPL: sentences about how the class looks, each counting once (Pratt et al., ICCV 2023, section 3).

    A class without sentences is given those made of its features; with neither, its templates.
    """
    del options

    def slots(entry: ClassEntry, name: str) -> list[Slot]:
        return [_sentence_slot(entry, name) or _template_slot(entry, name, templates)]

    return Recipe(Pooling.PROTOTYPE, _rows(classes, slots), _without_descriptions(classes))


def templates_and_sentences(classes: Sequence[ClassEntry], templates: Sequence[str], options: Options) -> Recipe:
    """CuPL and templates together: every prompt counts once, so that many templates outweigh a few sentences."""
    del options

    def slots(entry: ClassEntry, name: str) -> list[Slot]:
        return [_template_slot(entry, name, templates), *_some(_sentence_slot(entry, name))]

    return Recipe(Pooling.PROTOTYPE, _rows(classes, slots), _without_descriptions(classes))


def features_only(classes: Sequence[ClassEntry], templates: Sequence[str], options: Options) -> Recipe:
    """Classification by description: the mean of the cosines with "X, which has ..." (Menon and Vondrick, ICLR 2023).

    The mean is not made unit again, so that a class whose features say different things scores lower. A class without
    features is given its sentences; with neither, its templates.
    """
    del options

    def slots(entry: ClassEntry, name: str) -> list[Slot]:
        if entry.features:
            return [Slot("feature", tuple(feature_sentence(name, each) for each in entry.features))]
        return [_sentence_slot(entry, name) or _template_slot(entry, name, templates)]

    return Recipe(Pooling.MEAN, _rows(classes, slots), _without_descriptions(classes))


def random_words(classes: Sequence[ClassEntry], templates: Sequence[str], options: Options) -> Recipe:
    """WaffleCLIP, the control: the same meaningless features for every class (Roth et al., ICCV 2023, section 3.2).

    ``options``: ``descriptors``, how many, and ``seed``.
    """
    del templates
    descriptors = random_descriptors(
        [entry.name for entry in classes], count=int(options["descriptors"]), seed=int(options["seed"])
    )

    def slots(_: ClassEntry, name: str) -> list[Slot]:
        return [Slot("random", tuple(f"A photo of a {feature_sentence(name, each)}." for each in descriptors))]

    return Recipe(Pooling.MEAN, _rows(classes, slots))


def aligned_prompts(classes: Sequence[ClassEntry], templates: Sequence[str], options: Options) -> Recipe:
    """The templates, one by one, and the descriptions in as many groups as the class with the fewest of them fills.

    AutoCLIP weighs prompts that say the same of every class, and sets of descriptions are of any size and order; so
    each class deals its own into the groups, and a group is represented by its prototype. If some class has none, all
    go without, as a weight would mean something else for it.
    """
    del options
    groups = min((len(entry.descriptions) + len(entry.features) for entry in classes), default=0)

    def slots(entry: ClassEntry, name: str) -> list[Slot]:
        (source, filled) = _template_texts(entry, name, templates)
        # A class prompt stands for each template, since every class must have as many slots.
        repeated = filled * len(templates) if source == "class prompt" else filled
        told = (*entry.descriptions, *(feature_sentence(name, each) for each in entry.features))
        dealt = [Slot("description", told[group::groups]) for group in range(groups)]
        return [*(Slot(source, (text,)) for text in repeated), *dealt]

    warnings = []
    if len(templates) + groups == 1:
        warnings.append(
            "there is one prompt for each class, and autoclip has nothing to weigh; name a template set with several,"
            " such as ensemble, or give every class descriptions"
        )
    elif not groups:
        warnings += _without_descriptions(classes, "the descriptions of the others are left out")
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
    """Return "X, which has stripes"; without a feature the name alone.

    The wording is that of Menon and Vondrick's code, with articles told apart from words that begin with a: theirs also
    says "which is antennae".
    """
    if not feature:
        return name
    if re.match(r"(an?|used)\b", feature):
        joint = "which is"
    elif re.match(r"(has|have|often|typically|may|can)\b", feature):
        joint = "which"
    else:
        joint = "which has"
    return f"{name}, {joint} {feature}"


def _rows(classes: Sequence[ClassEntry], slots: Callable[[ClassEntry, str], list[Slot]]) -> tuple[Row, ...]:
    """Return one row per name of each class; a synonym that does not change the prompts adds none."""
    rows = []
    for index, entry in enumerate(classes):
        names = dict.fromkeys((entry.name, *entry.synonyms))
        rows += [Row(index, each) for each in dict.fromkeys(tuple(slots(entry, name)) for name in names)]
    return tuple(rows)


def _template_texts(entry: ClassEntry, name: str, templates: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    if entry.prompt is not None:
        return "class prompt", (entry.prompt.replace(PLACEHOLDER, name),)
    return "template", fill(templates, name)


def _template_slot(entry: ClassEntry, name: str, templates: Sequence[str]) -> Slot:
    return Slot(*_template_texts(entry, name, templates))


def _sentence_slot(entry: ClassEntry, name: str) -> Slot | None:
    """Return the class's sentences, or those made of its features; None where it has neither."""
    if entry.descriptions:
        return Slot("description", entry.descriptions)
    if entry.features:
        return Slot("feature", tuple(feature_sentence(name, each) for each in entry.features))
    return None


def _some(slot: Slot | None) -> list[Slot]:
    return [] if slot is None else [slot]


def _without_descriptions(
    classes: Sequence[ClassEntry], consequence: str = "they are told by the templates alone"
) -> tuple[str, ...]:
    bare = [entry.name for entry in classes if not (entry.descriptions or entry.features)]
    if not bare:
        return ()
    if len(bare) == len(classes):
        return ("no class has descriptions; the templates are used",)
    named = ", ".join(f"'{name}'" for name in bare[:5]) + (", ..." if len(bare) > 5 else "")
    return (f"{len(bare)} of {len(classes)} classes have no descriptions ({named}); {consequence}",)
