"""The example images of a label set."""

from collections.abc import Sequence
from datetime import datetime

from pydantic import ConfigDict, Field

from app.api.schemas._base import Request, Response
from app.errors import ClientError
from app.names.class_names import MAX_ITEMS
from app.store.examples import Added, Example, ExampleCounts, NewExample


class ExampleBody(Response):
    """An example image, without its file."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    id: int
    sha256: str = Field(description="SHA-256 digest of the file, in hexadecimal.")
    class_: str | None = Field(
        alias="class", description="Its class; null for an unlabelled image and for one with several classes."
    )
    classes: list[str] = Field(description="All of its classes; empty for an unlabelled image.")
    created_at: datetime
    kept: bool = Field(description="True if the file is stored too (`DEIXIS_KEEP_IMAGES`).")
    models: int = Field(description="Number of models with stored features of this image.")

    @classmethod
    def of(cls, example: Example) -> "ExampleBody":
        """Convert a stored example."""
        return cls(
            id=example.id,
            sha256=example.digest,
            class_=example.classnames[0] if len(example.classnames) == 1 else None,
            classes=list(example.classnames),
            created_at=example.created_at,
            kept=example.kept,
            models=len(example.models),
        )


class ExampleCountsBody(Response):
    """The number of example images of a label set."""

    revision: int = Field(description="Increases with every change of these images.")
    labelled: dict[str, int] = Field(
        description="Number per class, including classes that the latest version no longer has. An image with several"
        " classes counts for each."
    )
    labelled_images: int = Field(description="Images with a class or several, each counted once.")
    several_classes: int = Field(
        description="Images with several classes. Methods for which an image has one class do not learn from them."
    )
    unlabelled: int
    without_features: int = Field(
        description="Images without features of the default model; that model cannot use them."
    )

    @classmethod
    def of(cls, counts: ExampleCounts) -> "ExampleCountsBody":
        """Convert stored counts."""
        return cls(
            revision=counts.revision,
            labelled=dict(counts.labelled),
            labelled_images=counts.labelled_images,
            several_classes=counts.several_classes,
            unlabelled=counts.unlabelled,
            without_features=counts.without_features,
        )


class ExampleList(Response):
    """A page of example images in the order they were added, with the counts of all."""

    images: list[ExampleBody]
    counts: ExampleCountsBody
    next_after: int | None = Field(description="Pass as `after` to get the next page; null on the last page.")


class SkippedImageBody(Response):
    """An image that could not be read and was not stored."""

    image: int = Field(description="Its index in the request, from 0.")
    problem: str


class AddedExamplesResponse(Response):
    """The outcome of adding images. All changes are stored when this is returned."""

    added: int
    relabelled: int = Field(description="Images that were stored already and now have the given classes.")
    duplicates: int = Field(
        description="Images that were stored already with the same classes, or occur twice in the request."
    )
    skipped: list[SkippedImageBody] = Field(description="Images that could not be read; all others are stored.")
    counts: ExampleCountsBody
    job: str | None = Field(
        description="Id of the job that compares the methods on the images, see `GET /v1/jobs/{id}`; null if nothing"
        " changed."
    )

    @classmethod
    def of(
        cls, added: Added, prepared: Sequence[NewExample | ClientError], counts: ExampleCounts, job: str | None
    ) -> "AddedExamplesResponse":
        """Combine the outcome with the errors of images that could not be read."""
        return cls(
            added=added.added,
            relabelled=added.relabelled,
            duplicates=added.duplicates,
            skipped=[
                SkippedImageBody(image=index, problem=image.message)
                for index, image in enumerate(prepared)
                if isinstance(image, ClientError)
            ],
            counts=ExampleCountsBody.of(counts),
            job=job,
        )


class DeletedExamplesResponse(Response):
    """The number of deleted images, and the counts of the remaining ones."""

    deleted: int
    counts: ExampleCountsBody
    job: str | None = Field(
        description="Id of the job that compares the methods on the remaining images; null if nothing changed."
    )


class ImportBody(Request):
    """A folder on the server to import, and how its images are labelled."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    folder: str = Field(
        min_length=1,
        max_length=4096,
        description="Path of the folder relative to `DEIXIS_IMPORT_DIR`.",
        examples=["clothes"],
    )
    by_subfolder: bool = Field(
        default=False,
        description="Use the name of each subfolder as the class of its images; underscores count as spaces.",
    )
    class_: str | None = Field(
        None, alias="class", pattern=r"\S", description="The class of all images; without it they are unlabelled."
    )
    classes: list[str] | None = Field(
        None, min_length=1, max_length=MAX_ITEMS, description="Instead of `class`: several classes of all images."
    )
