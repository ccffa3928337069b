"""The interface of both backends, and the inputs that they share."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from app.captions.query import CaptionQuery
from app.classification.request import ClassifyRequest
from app.describing.request import DescribeRequest
from app.images.reading import UnreadableFileError, read_image_file
from app.types import ClassEntry, DraftStatus, MergeSynonyms

if TYPE_CHECKING:
    from app.selection.comparison import Comparison
    from app.selection.learning_curve import LearningCurve
    from deixis import answers

OnProgress: TypeAlias = Callable[[int, int], Awaitable[object]]
"""Called with the number of finished steps and of all steps; the latter is 0 while unknown."""


@dataclass(frozen=True, slots=True)
class CurveFiles:
    """The images of a learning curve.

    Args:
        files: test images.
        classes: the class of each test image.
        support_files: labelled images to learn from.
        support_classes: the class of each labelled image.
        pool_files: unlabelled images to learn from.
        shots: the numbers of labelled images per class.
        draws: random draws of labelled images for each number.
    """

    files: Sequence[Path]
    classes: Sequence[str]
    support_files: Sequence[Path]
    support_classes: Sequence[str]
    pool_files: Sequence[Path]
    shots: Sequence[int]
    draws: int


@dataclass(frozen=True, slots=True)
class LabelSetInput:
    """A label set to write."""

    classes: Sequence[ClassEntry]
    templates: str = "photo"
    merge_synonyms: MergeSynonyms = MergeSynonyms.MEAN
    multi_label: bool = False
    priors: Mapping[str, float] | None = None


def read_image(file: Path, max_bytes: int) -> "bytes | answers.ImageResult":
    """Return the content of a file, or a result with the error if it cannot be read or is too large."""
    try:
        return read_image_file(file, max_bytes)
    except UnreadableFileError as error:
        return failed_result(str(error))


def failed_result(detail: str, title: str = "The file cannot be read") -> "answers.ImageResult":
    """Return the result of a file that was not classified."""
    from deixis import answers  # noqa: PLC0415 - pydantic models, which the help of commands does not need

    problem = answers.Problem(type="about:blank", title=title, status=400, detail=detail)
    return answers.ImageResult(predictions=[], error=problem)


class Backend(Protocol):
    """The operations of a service that commands need."""

    @property
    def max_image_bytes(self) -> int:
        """The size in bytes above which a file is not read."""

    async def classify(self, images: Sequence[bytes], request: ClassifyRequest) -> "list[answers.ImageResult]":
        """Classify images. Images that cannot be decoded have an error in their results, even if all of them fail."""

    async def pin(self, request: ClassifyRequest) -> ClassifyRequest:
        """Return the request with the current default model and the newest version of its label set."""

    async def learning_curve(
        self, request: ClassifyRequest, images: CurveFiles, on_progress: OnProgress
    ) -> "tuple[LearningCurve, list[answers.ImageResult]]":
        """Measure accuracy against the number of labelled images; also return a result per file with its error.

        Raises:
            InvalidFieldError: none of the files can be read, or there is nothing to learn from.
        """

    async def prepare_database(self, request: ClassifyRequest, on_progress: OnProgress) -> None:
        """Build the default caption database if the request needs it and it does not exist.

        Raises:
            ClientError: the request is invalid.
        """

    async def classify_together(
        self, files: Sequence[Path], request: ClassifyRequest, on_progress: OnProgress
    ) -> "tuple[list[answers.ImageResult], list[answers.SharedName]]":
        """Discover few labels that the images share; also return a result per file.

        Args:
            files: images.
            request: a request without labels.
            on_progress: called with the number of files that are read, and of all files.
        """

    async def databases(self) -> "list[answers.Database]":
        """List the caption databases."""

    async def database(self, name: str) -> "answers.Database":
        """Return one caption database."""

    async def search_captions(self, query: CaptionQuery) -> "answers.FoundCaptions":
        """Return one page of the captions nearest to a text or an image."""

    async def delete_database(self, name: str) -> None:
        """Delete a caption database."""

    async def label_sets(self) -> "list[answers.LabelSetSummary]":
        """List the label sets."""

    async def label_set(self, reference: str) -> "answers.LabelSet":
        """Return the newest version of ``name``, or ``name@version``."""

    async def put_label_set(self, name: str, content: LabelSetInput) -> "answers.LabelSet":
        """Write a new version of a label set."""

    async def compare(
        self,
        request: ClassifyRequest,
        files: Sequence[Path],
        classes: Sequence[str],
        on_progress: OnProgress,
    ) -> "tuple[Comparison, list[answers.ImageResult]]":
        """Run all methods on the files; also return a result per file with its error.

        Args:
            request: the classes, the model and the templates.
            files: images.
            classes: the class of each image.
            on_progress: called with the number of files that are read, and of all files.

        Raises:
            InvalidFieldError: none of the files can be read.
        """

    async def add_examples(
        self, name: str, images: Sequence[bytes], classnames: Sequence[tuple[str, ...]]
    ) -> "answers.AddedExamples":
        """Add example images with the classes of each; images that cannot be decoded are listed as skipped."""

    async def select_methods(self, name: str, job_id: str | None, on_progress: OnProgress) -> None:
        """Compare all methods on the example images, or wait for the job of the server that does."""

    async def example_counts(self, name: str) -> "answers.ExampleCounts":
        """Return the number of example images by class."""

    async def delete_examples(
        self, name: str, *, classname: str | None, unlabelled: bool, everything: bool
    ) -> "answers.DeletedExamples":
        """Delete the example images of a class, the unlabelled ones, or all."""

    async def selection(self, name: str, model: str | None) -> "answers.Selection":
        """Return the method that is selected for a label set, and the evidence for it."""

    async def thresholds(
        self, name: str, model: str | None, *, precision: float | None, recall: float | None
    ) -> "answers.Thresholds":
        """Return the threshold of each label, with precision and recall against it on the example images."""

    async def set_thresholds(
        self, name: str, thresholds: Mapping[str, float | None], *, version: int
    ) -> "answers.LabelSet":
        """Write a version with other thresholds of some classes, if ``version`` is still the newest."""

    async def estimate_descriptions(self, name: str, request: DescribeRequest) -> "answers.DescribeEstimate":
        """Return an upper bound of the requests and tokens that ``describe`` uses."""

    async def describe(
        self, name: str, request: DescribeRequest, on_progress: OnProgress, *, accept: bool
    ) -> Mapping[str, Any]:
        """Describe the classes by a language model, and return the counts of the run."""

    async def drafts(self, name: str, status: DraftStatus | None, classname: str | None) -> "list[answers.Draft]":
        """List the drafts of a label set."""

    async def accept_drafts(self, name: str, ids: Sequence[int] | None) -> "answers.AcceptedDrafts":
        """Write drafts, by default all undecided ones, into a new version of the label set."""

    async def reject_drafts(self, name: str, ids: Sequence[int] | None) -> int:
        """Reject drafts, by default all undecided ones, and return their number."""
