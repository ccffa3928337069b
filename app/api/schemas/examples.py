"""The example images of a label set."""

from collections.abc import Sequence
from datetime import datetime

from pydantic import ConfigDict, Field

from app.api.schemas._base import Request, Response
from app.errors import ClientError
from app.store.examples import Added, Example, ExampleCounts, NewExample


class ExampleBody(Response):
    """An example image, without its pixels."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    id: int
    sha256: str = Field(description="Of the file.")
    class_: str | None = Field(alias="class", description="Null for an unlabelled one.")
    created_at: datetime
    kept: bool = Field(description="Whether the file is kept too (`DEIXIS_KEEP_IMAGES`).")
    models: int = Field(description="How many models have features of it.")

    @classmethod
    def of(cls, example: Example) -> "ExampleBody":
        """Return the example as it is told to callers."""
        return cls(
            id=example.id,
            sha256=example.digest,
            class_=example.classname,
            created_at=example.created_at,
            kept=example.kept,
            models=len(example.models),
        )


class ExampleCountsBody(Response):
    """How many example images a label set has."""

    revision: int = Field(description="Counts the changes of these images.")
    labelled: dict[str, int] = Field(description="By class, also by classes that the newest version does not have.")
    unlabelled: int
    without_features: int = Field(description="Of all these, so many are of no use to the default model.")

    @classmethod
    def of(cls, counts: ExampleCounts) -> "ExampleCountsBody":
        """Return the counts as they are told to callers."""
        return cls(
            revision=counts.revision,
            labelled=dict(counts.labelled),
            unlabelled=counts.unlabelled,
            without_features=counts.without_features,
        )


class ExampleList(Response):
    """A page of example images, in the order they were added, and how many there are in all."""

    images: list[ExampleBody]
    counts: ExampleCountsBody
    next_after: int | None = Field(description="`after` of the next page; null on the last.")


class SkippedImageBody(Response):
    """An image that was left out."""

    image: int = Field(description="Its place in the request, from 0.")
    problem: str


class AddedExamplesResponse(Response):
    """What became of images that were added, once they are stored."""

    added: int
    relabelled: int = Field(description="Images that were there and took on the class that was given.")
    duplicates: int = Field(description="Images that were there with the same class, or were given twice.")
    skipped: list[SkippedImageBody] = Field(description="Images that could not be read; the others are stored.")
    counts: ExampleCountsBody
    job: str | None = Field(
        description="Tries the methods on the images, `GET /v1/jobs/{id}`; null if nothing changed."
    )

    @classmethod
    def of(
        cls, added: Added, prepared: Sequence[NewExample | ClientError], counts: ExampleCounts, job: str | None
    ) -> "AddedExamplesResponse":
        """Return what became of the images that were prepared."""
        return cls(
            added=added.added,
            relabelled=added.relabelled,
            duplicates=added.duplicates,
            skipped=[
                SkippedImageBody(image=at, problem=each.message)
                for at, each in enumerate(prepared)
                if isinstance(each, ClientError)
            ],
            counts=ExampleCountsBody.of(counts),
            job=job,
        )


class DeletedExamplesResponse(Response):
    """How many images were deleted, and how many are left."""

    deleted: int
    counts: ExampleCountsBody
    job: str | None = Field(description="Tries the methods on what is left; null if nothing changed.")


class ImportBody(Request):
    """A folder of the server, and how its images are labelled."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    folder: str = Field(min_length=1, max_length=4096, description="Below `DEIXIS_IMPORT_DIR`.", examples=["clothes"])
    by_subfolder: bool = Field(
        default=False, description="Each subfolder is called like the class of its images; underscores read as spaces."
    )
    class_: str | None = Field(
        None, alias="class", pattern=r"\S", description="Of all images; without it they are unlabelled."
    )
