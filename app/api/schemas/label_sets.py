"""Label sets and their classes."""

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from app.api.schemas._base import FailFast, Request, Response
from app.names.class_names import MAX_ITEMS
from app.names.namespaces import own_name
from app.store.label_sets import LabelSetSummary
from app.types import (
    ClassEntry,
    LabelSet,
    MergeSynonyms,
)


class ClassBody(Request):
    """A class with the texts that describe it."""

    name: str
    descriptions: list[str] = Field(
        default_factory=list,
        max_length=MAX_ITEMS,
        fail_fast=True,
        description="Sentences about the appearance of the class.",
    )
    synonyms: list[str] = Field(
        default_factory=list,
        max_length=MAX_ITEMS,
        fail_fast=True,
        description="Other names of the class; each is filled into the templates.",
    )
    features: list[str] = Field(
        default_factory=list,
        max_length=MAX_ITEMS,
        fail_fast=True,
        description="Short phrases that complete `NAME, which has ...`.",
        examples=[["stripes"]],
    )
    prompt: str | None = Field(
        None,
        description="A template for this class alone, used instead of the templates; `{}` stands for the name.",
        examples=["a photo of a crane, the bird."],
    )
    threshold: float | None = Field(
        None,
        ge=0,
        le=1,
        description="With `multi_label`: an image has this label if its score is at least this; by default 0.5.",
        examples=[0.7],
    )
    parent: str | None = Field(
        None,
        description="The label above this one: another class, a label without prompts of its own, or a path of labels"
        " such as `animal|dog`.",
        examples=["dog"],
    )

    @classmethod
    def of(cls, entry: ClassEntry) -> "ClassBody":
        """Convert a stored class."""
        return cls(
            name=entry.name,
            descriptions=list(entry.descriptions),
            synonyms=list(entry.synonyms),
            features=list(entry.features),
            prompt=entry.prompt,
            threshold=entry.threshold,
            parent=entry.parent,
        )

    def entry(self) -> ClassEntry:
        """Return the class with its texts as given, not cleaned."""
        texts = tuple(self.descriptions), tuple(self.synonyms), tuple(self.features)
        return ClassEntry(self.name, *texts, self.prompt, self.threshold, parent=self.parent)


def _class_from_name(value: object) -> object:
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, (Mapping, ClassBody)):
        return value
    raise PydanticCustomError("class_type", "must be a name, or an object with a name")


NameOrClass = Annotated[ClassBody, BeforeValidator(_class_from_name, json_schema_input_type=str | ClassBody)]
"""A class, or its name alone. Not a union type, which would report every error once per member."""


class ClassesBody(Request):
    """Classes to add."""

    classes: list[NameOrClass] = Field(
        min_length=1, max_length=MAX_ITEMS, fail_fast=True, examples=[["lynx", {"name": "puma"}]]
    )

    priors: Annotated[dict[str, float], Field(max_length=MAX_ITEMS), FailFast] | None = Field(
        None,
        description="How often images show each class, as shares or counts above 0: for every class, or null."
        " Classification uses them unless a request says otherwise.",
        examples=[{"lynx": 12, "puma": 3}],
    )

    def entries(self) -> list[ClassEntry]:
        """Return the classes with their texts as given, not cleaned."""
        return [body.entry() for body in self.classes]


class LabelSetBody(ClassesBody):
    """A complete label set."""

    templates: str = Field("photo", description="A template set, or one template with `{}` for the class name.")
    merge_synonyms: MergeSynonyms = Field(
        MergeSynonyms.MEAN,
        description="How the names of a class become its score: `mean`: the mean of its names; `max`: the best name.",
    )
    multi_label: bool = Field(
        default=False,
        description="An image may have several of the labels, or none: each label has a probability and a threshold of"
        " its own. Requests may say otherwise.",
    )


class LabelSetResponse(Response):
    """One version of a label set."""

    name: str
    version: int
    classes: list[ClassBody]
    templates: str
    merge_synonyms: MergeSynonyms = MergeSynonyms.MEAN
    multi_label: bool = False
    priors: dict[str, float] | None = Field(None, description="As they were given; null without priors.")
    created_at: datetime

    @classmethod
    def of(cls, label_set: LabelSet) -> "LabelSetResponse":
        """Convert a stored label set."""
        return cls(
            name=own_name(label_set.name),
            version=label_set.version,
            classes=[ClassBody.of(entry) for entry in label_set.classes],
            templates=label_set.templates,
            merge_synonyms=label_set.merge_synonyms,
            multi_label=label_set.multi_label,
            priors=label_set.priors,
            created_at=label_set.created_at,
        )


class LabelSetSummaryBody(Response):
    """A label set in the list of label sets."""

    name: str
    version: int
    classes: int = Field(description="Number of classes.")
    multi_label: bool = False
    created_at: datetime

    @classmethod
    def of(cls, summary: LabelSetSummary) -> "LabelSetSummaryBody":
        """Convert a stored summary."""
        return cls(
            name=own_name(summary.name),
            version=summary.version,
            classes=summary.class_count,
            multi_label=summary.multi_label,
            created_at=summary.created_at,
        )


class LabelSetList(Response):
    """A page of label sets, sorted by name."""

    label_sets: list[LabelSetSummaryBody]
    next_after: str | None = Field(description="Pass as `after` to get the next page; null on the last page.")
