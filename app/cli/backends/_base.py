"""What commands need of a service, and what both ways to one share."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from app.api.schemas.classification import ResultBody, SharedNameBody
from app.api.schemas.databases import DatabaseBody, SearchFields, SearchResponse
from app.api.schemas.descriptions import (
    AcceptedResponse,
    DecisionBody,
    DescribeBody,
    DraftBody,
    EstimateBody,
    GenerateBody,
    RejectedResponse,
)
from app.api.schemas.examples import AddedExamplesResponse, DeletedExamplesResponse, ExampleCountsBody
from app.api.schemas.label_sets import LabelSetBody, LabelSetResponse, LabelSetSummaryBody
from app.api.schemas.problems import Problem
from app.api.schemas.selection import SelectionResponse
from app.classification.resolve import ClassifyRequest
from app.selection.comparison import Comparison
from app.selection.learning_curve import LearningCurve
from app.store.drafts import DraftStatus

Advance: TypeAlias = Callable[[int, int], Awaitable[object]]
"""Called with how many steps of how many are done."""


@dataclass(frozen=True, slots=True)
class CurveInput:
    """Files that are asked about, labelled ones to draw from, unlabelled ones, and how many images are drawn how often.

    ``classes`` and ``support_classes`` are the class of each file.
    """

    files: Sequence[Path]
    classes: Sequence[str]
    support_files: Sequence[Path]
    support_classes: Sequence[str]
    pool_files: Sequence[Path]
    shots: Sequence[int]
    draws: int


def read_image(file: Path) -> bytes | ResultBody:
    """Return the file's bytes, or the result that tells why it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        return ResultBody.failed(
            Problem(type="about:blank", title="The file cannot be read", status=400, detail=reason)
        )


class Backend(Protocol):
    """What commands need of a service."""

    async def classify(self, images: Sequence[bytes], question: ClassifyRequest) -> list[ResultBody]:
        """Classify; an image that cannot be read has its error in its own result, even when every one is bad."""

    async def pinned(self, question: ClassifyRequest) -> ClassifyRequest:
        """Return the question with the model and the version of the label set that would answer it now."""

    async def learning_curve(
        self, question: ClassifyRequest, given: CurveInput, advance: Advance
    ) -> tuple[LearningCurve, list[ResultBody]]:
        """Tell how accuracy on the files grows with the number of labelled images; results tell which files are bad.

        Raises:
            InvalidFieldError: not one of the files could be read, or there is nothing to learn from.
        """

    async def prepare_names(self, question: ClassifyRequest, advance: Advance) -> None:
        """Build the caption database that comes with the service, if it is the one to ask and is missing.

        Raises:
            ClientError: the question could not be answered all the same.
        """

    async def name_together(
        self, files: Sequence[Path], question: ClassifyRequest, advance: Callable[[], object]
    ) -> tuple[list[ResultBody], list[SharedNameBody]]:
        """Find few names that the files share; the results tell which files could not be read.

        Args:
            files: images.
            question: without labels.
            advance: called after each file.
        """

    async def databases(self) -> list[DatabaseBody]:
        """List every caption database."""

    async def database(self, name: str) -> DatabaseBody:
        """Return what is known of a caption database."""

    async def search_captions(self, name: str, fields: SearchFields, image: bytes | None) -> SearchResponse:
        """Return a page of the captions near a text or an image."""

    async def delete_database(self, name: str) -> None:
        """Delete a caption database."""

    async def label_sets(self) -> list[LabelSetSummaryBody]:
        """List every label set."""

    async def label_set(self, reference: str) -> LabelSetResponse:
        """Return ``name`` or ``name@version``."""

    async def put_label_set(self, name: str, body: LabelSetBody) -> LabelSetResponse:
        """Write a new version."""

    async def compare(
        self,
        question: ClassifyRequest,
        files: Sequence[Path],
        classes: Sequence[str],
        advance: Callable[[], object],
    ) -> tuple[Comparison, list[ResultBody]]:
        """Run every method on the files; the results tell which files could not be read.

        Args:
            question: the classes, model and templates.
            files: images.
            classes: the class of each.
            advance: called after each file.

        Raises:
            InvalidFieldError: not one file could be read.
        """

    async def add_examples(
        self, name: str, images: Sequence[bytes], classnames: Sequence[str | None]
    ) -> AddedExamplesResponse:
        """Add example images, of the class at the same place; those that cannot be read are told."""

    async def try_methods(self, name: str, job: str | None, advance: Advance) -> None:
        """Try every method on the examples, or wait until the server's job has."""

    async def example_counts(self, name: str) -> ExampleCountsBody:
        """Count example images."""

    async def delete_examples(
        self, name: str, *, classname: str | None, unlabelled: bool, everything: bool
    ) -> DeletedExamplesResponse:
        """Delete the example images of a class, the unlabelled ones, or all."""

    async def selection(self, name: str, model: str | None) -> SelectionResponse:
        """Return which method the examples are evidence for."""

    async def estimate_descriptions(self, name: str, body: DescribeBody) -> EstimateBody:
        """Return the most that ``describe`` would take."""

    async def describe(self, name: str, body: GenerateBody, advance: Advance) -> Mapping[str, Any]:
        """Ask a language model, and return what came of it."""

    async def drafts(self, name: str, status: DraftStatus | None, classname: str | None) -> list[DraftBody]:
        """List drafts."""

    async def accept_drafts(self, name: str, body: DecisionBody) -> AcceptedResponse:
        """Put drafts into a new version."""

    async def reject_drafts(self, name: str, body: DecisionBody) -> RejectedResponse:
        """Keep drafts from being used."""
