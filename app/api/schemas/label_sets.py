"""Label sets and their classes."""

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from app.api.schemas._base import Request, Response
from app.names.class_names import MAX_ITEMS
from app.names.namespaces import own_name
from app.store.label_sets import LabelSetSummary
from app.types import (
    ClassEntry,
    LabelSet,
    MergeSynonyms,
)


class ClassBody(Request):
    """A class with what helps to recognise it."""

    name: str
    descriptions: list[str] = Field(
        [], max_length=MAX_ITEMS, fail_fast=True, description="Sentences about how it looks."
    )
    synonyms: list[str] = Field(
        [], max_length=MAX_ITEMS, fail_fast=True, description="Other names; each is filled into the templates."
    )
    features: list[str] = Field(
        [],
        max_length=MAX_ITEMS,
        fail_fast=True,
        description="Short phrases, read as `NAME, which has ...`.",
        examples=[["stripes"]],
    )
    prompt: str | None = Field(
        None,
        description="Stands in the place of the filled templates; `{}` is the name.",
        examples=["a photo of a crane, the bird."],
    )

    @classmethod
    def of(cls, entry: ClassEntry) -> "ClassBody":
        """Return the class as it is told to callers."""
        return cls(
            name=entry.name,
            descriptions=list(entry.descriptions),
            synonyms=list(entry.synonyms),
            features=list(entry.features),
            prompt=entry.prompt,
        )

    def entry(self) -> ClassEntry:
        """Return the class as it came, texts not cleaned yet."""
        return ClassEntry(self.name, tuple(self.descriptions), tuple(self.synonyms), tuple(self.features), self.prompt)


def _class_of(given: object) -> object:
    if isinstance(given, str):
        return {"name": given}
    if isinstance(given, (Mapping, ClassBody)):
        return given
    raise PydanticCustomError("class_type", "must be a name, or an object with a name")


NameOrClass = Annotated[ClassBody, BeforeValidator(_class_of, json_schema_input_type=str | ClassBody)]
"""A class; a name alone will do. Not a union, which would tell what is wrong once for each of its types."""


class ClassesBody(Request):
    """Classes to add."""

    classes: list[NameOrClass] = Field(
        min_length=1, max_length=MAX_ITEMS, fail_fast=True, examples=[["lynx", {"name": "puma"}]]
    )

    def entries(self) -> list[ClassEntry]:
        """Return the classes as they came, texts not cleaned yet."""
        return [each.entry() for each in self.classes]


class LabelSetBody(ClassesBody):
    """A whole label set."""

    templates: str = Field("photo", description="A template set, or one template with `{}` for the class name.")
    merge_synonyms: MergeSynonyms = Field(
        MergeSynonyms.MEAN, description="Whether a class scores as its best name, or as the mean of its names."
    )


class LabelSetResponse(Response):
    """One version of a label set."""

    name: str
    version: int
    classes: list[ClassBody]
    templates: str
    merge_synonyms: MergeSynonyms = MergeSynonyms.MEAN
    created_at: datetime

    @classmethod
    def of(cls, label_set: LabelSet) -> "LabelSetResponse":
        """Return the label set as it is told to callers."""
        return cls(
            name=own_name(label_set.name),
            version=label_set.version,
            classes=[ClassBody.of(entry) for entry in label_set.classes],
            templates=label_set.templates,
            merge_synonyms=label_set.merge_synonyms,
            created_at=label_set.created_at,
        )


class LabelSetSummaryBody(Response):
    """One line of the list of label sets."""

    name: str
    version: int
    classes: int = Field(description="How many.")
    created_at: datetime

    @classmethod
    def of(cls, summary: LabelSetSummary) -> "LabelSetSummaryBody":
        """Return the summary as it is told to callers."""
        return cls(
            name=own_name(summary.name),
            version=summary.version,
            classes=summary.class_count,
            created_at=summary.created_at,
        )


class LabelSetList(Response):
    """A page of label sets, by name."""

    label_sets: list[LabelSetSummaryBody]
    next_after: str | None = Field(description="Pass as `after` for the next page; null on the last.")
