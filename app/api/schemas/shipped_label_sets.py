"""The label sets that come with the installation."""

from typing import Self

from pydantic import Field

from app.api.schemas._base import Response
from app.api.schemas.label_sets import ClassBody, LabelSetBody
from app.types import MergeSynonyms


class ShippedLabelSetSummary(Response):
    """A label set that comes with the installation, in a list."""

    name: str
    classes: int = Field(description="Number of classes.")
    descriptions: int = Field(description="Number of descriptions and features of all classes.")
    class_names: list[str]
    licence: str = Field(description="SPDX identifier of the licence of the texts.")

    @classmethod
    def of(cls, name: str, content: LabelSetBody) -> Self:
        """Summarise a label set."""
        return cls(
            name=name,
            classes=len(content.classes),
            descriptions=sum(len(entry.descriptions) + len(entry.features) for entry in content.classes),
            class_names=[entry.name for entry in content.classes],
            licence="Apache-2.0",  # as everything in the repository that names no other licence
        )


class ShippedLabelSetList(Response):
    """The label sets that come with the installation, sorted by name."""

    label_sets: list[ShippedLabelSetSummary]


class ShippedLabelSet(Response):
    """The content of a label set that comes with the installation; the same fields as the body that writes one."""

    classes: list[ClassBody]
    templates: str = "photo"
    merge_synonyms: MergeSynonyms = MergeSynonyms.MEAN
    multi_label: bool = False
