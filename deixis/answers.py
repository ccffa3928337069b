"""The response bodies of the service as typed objects. Fields that a newer service adds are kept as extra fields."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from deixis._display import SHOWN_DIGITS, name_of, results_html

if TYPE_CHECKING:
    import pandas as pd

    from deixis._images import ImageLike


class Answer(BaseModel):
    """The base class of all response bodies."""

    model_config = ConfigDict(extra="allow", protected_namespaces=(), validate_by_name=True, validate_by_alias=True)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as values that JSON has."""
        return self.model_dump(mode="json")


class Problem(Answer):
    """The reason why a request or one of its images was refused (RFC 9457 problem details)."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str | None = None
    errors: list[dict[str, str]] | None = Field(None, description="The invalid fields: `field` and `problem` of each.")

    @property
    def kind(self) -> str:
        """The last part of ``type``, such as ``invalid-field``."""
        return self.type.rpartition(":")[2]


class Prediction(Answer):
    """A label and how well it fits an image."""

    label: str
    score: float = Field(description="Probability, in [0, 1].")
    similarity: float = Field(description="Cosine between image and label, in [-1, 1].")
    threshold: float | None = Field(None, description="With `multi_label`: the threshold of the label.")
    above: bool | None = Field(None, description="With `multi_label`: whether the score reaches the threshold.")

    def __repr__(self) -> str:
        return f"Prediction({self.label!r}, {self.score:.{SHOWN_DIGITS}f})"

    __str__ = __repr__


class PathStep(Answer):
    """A label of a hierarchy, with the score of all classes at or below it."""

    label: str
    score: float


class PromptContribution(Answer):
    """The contribution of one prompt to the similarity of a label."""

    prompt: str
    source: str
    cosine: float
    weight: float


class LabelExplanation(Answer):
    """The prompts that explain the score of a label."""

    label: str
    similarity: float
    rival: str | None
    rival_similarity: float | None
    supporting: list[PromptContribution]
    opposing: list[PromptContribution]


class NearCaption(Answer):
    """A caption near the image, and the predicted labels that it suggested."""

    caption: str
    similarity: float
    suggested: list[str]


class Explanation(Answer):
    """The prompts or captions that explain the scores of the best labels."""

    labels: list[LabelExplanation]
    captions: list[NearCaption] = []


class NearWord(Answer):
    """A word that is more similar to the image than every label."""

    word: str
    similarity: float


class OutOfVocabulary(Answer):
    """Unknown-class scores: all are higher for images that show none of the labels.

    ``score`` is the probability that the image shows none of the labels; None if the service does not know it.
    """

    mcm: float
    energy: float
    score: float | None = None
    nearest: list[NearWord] | None = None


class _Shown:
    """The image of a result, for displays; no part of the answer, so that comparisons and pickles leave it out."""

    __slots__ = ("image",)

    def __init__(self) -> None:
        self.image: ImageLike | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Shown)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[type["_Shown"], tuple[()]]:
        return _Shown, ()


class ImageResult(Answer):
    """The result of one image: its predictions, best first, or its ``error``."""

    predictions: list[Prediction]
    error: Problem | None = None
    explanation: Explanation | None = None
    out_of_vocabulary: OutOfVocabulary | None = None
    prediction_set: list[str] | None = None
    rejected: bool | None = None
    rejection_score: float | None = None
    image_id: str | None = Field(None, description="With `keep_features`: names the image in later requests.")
    weak_match: bool | None = Field(None, description="Whether probably none of the labels fits.")
    labels: list[str] | None = Field(
        None, description="With `multi_label`: the labels that reach their threshold, best first; empty if none does."
    )
    warnings: list[str] = []
    path: list[PathStep] | None = Field(
        None,
        description="From a root of the hierarchy to where the answer stops; empty if no label is sure, or none fits.",
    )

    _shown: _Shown = PrivateAttr(default_factory=_Shown)

    def __repr__(self) -> str:
        if self.error is not None:
            return f"ImageResult(error={self.error.detail!r})"
        if self.labels is not None:
            return f"ImageResult(labels={self.labels!r})"
        shown = [f"{each.label!r} {each.score:.{SHOWN_DIGITS}f}" for each in self.predictions[:3]]
        more = len(self.predictions) - len(shown)
        return f"ImageResult({', '.join([*shown, *([f'{more} more'] if more else [])])})"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        return results_html([self], [self._shown.image])

    @property
    def label(self) -> str | None:
        """The best label; None if there is an error, the image was rejected, or ``labels`` is empty."""
        if self.labels is not None:
            return self.labels[0] if self.labels else None
        return self.predictions[0].label if self.predictions and not self.rejected else None


class Calibration(Answer):
    """The calibration of the scores, fitted on labelled example images."""

    temperature: float
    images: int
    reject_below: float | None
    reject_by: Literal["score", "similarity", "class-mean", "in-vocabulary"] | None = None
    false_rejection_rate: float | None
    coverage: float | None


class ExamplesUsed(Answer):
    """The example images that the method learned from."""

    revision: int
    labelled: int
    unlabelled: int


class SharedName(Answer):
    """A discovered label that several images of a request share."""

    label: str
    images: int


class Classification(Answer):
    """The response of ``POST /v1/classify``: a result per image, in the order of the images."""

    model: str
    label_set: str | None
    method: str
    results: list[ImageResult]
    timing_ms: dict[str, float]
    reason: str | None = None
    examples: ExamplesUsed | None = None
    calibration: Calibration | None = None
    transductive: bool = False
    database: str | None = None
    vocabulary: list[SharedName] | None = None
    multi_label: bool = False
    priors: dict[str, float] | None = Field(None, description="Those that the scores use; their sum is 1.")

    def of(self, images: "Sequence[ImageLike]") -> Self:
        """Remember the images of the results, which displays show, and return itself."""
        for result, image in zip(self.results, images, strict=False):
            result._shown.image = image  # noqa: SLF001 - of the same module
        return self

    def __repr__(self) -> str:
        labels: list[object] = [
            "error" if result.error is not None else result.label if result.labels is None else result.labels
            for result in self.results[:3]
        ]
        more = ["..."] if len(self.results) > len(labels) else []
        count = f"{len(self.results)} image{'' if len(self.results) == 1 else 's'}"
        shown = ", ".join([*map(repr, labels), *more])
        return f"Classification({count}: {shown}; model={self.model!r}, method={self.method!r})"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        return results_html(self.results, [result._shown.image for result in self.results])  # noqa: SLF001

    def to_pandas(self) -> "pd.DataFrame":
        """Return a table with a row for each prediction, and one for each image that has an error.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas as pd  # noqa: PLC0415 - an optional dependency
        except ImportError as error:
            raise ImportError("to_pandas needs pandas, which is not installed; run: pip install pandas") from error
        columns = ["image", "rank", "label", "score", "similarity", "rejected", "error"]
        if self.multi_label:
            columns += ["threshold", "above"]
        rows: list[tuple[Any, ...]] = []
        for index, result in enumerate(self.results):
            image = name_of(result._shown.image) or index  # noqa: SLF001
            if result.error is not None:
                rows.append((image, None, None, None, None, None, result.error.detail, None, None))
            for rank, each in enumerate(result.predictions, 1):
                cells = (image, rank, each.label, each.score, each.similarity, result.rejected, None)
                rows.append((*cells, each.threshold, each.above))
        return pd.DataFrame([row[: len(columns)] for row in rows], columns=columns)


class LabelClass(Answer):
    """A class of a label set, with the texts that describe it."""

    name: str
    descriptions: list[str] = []
    synonyms: list[str] = []
    features: list[str] = []
    prompt: str | None = None
    threshold: float | None = None
    parent: str | None = None


class LabelSet(Answer):
    """One version of a label set."""

    name: str
    version: int
    classes: list[LabelClass]
    templates: str
    merge_synonyms: Literal["max", "mean"] = "mean"
    multi_label: bool = False
    priors: dict[str, float] | None = Field(None, description="How often images show each class, as it was given.")
    created_at: datetime

    def __repr__(self) -> str:
        return f"LabelSet('{self.name}@{self.version}', {len(self.classes)} classes)"

    __str__ = __repr__


class LabelSetSummary(Answer):
    """A label set in a list; ``classes`` is the number of classes."""

    name: str
    version: int
    classes: int
    multi_label: bool = False
    created_at: datetime


class ShippedLabelSetSummary(Answer):
    """A label set that comes with the service, in a list; ``classes`` and ``descriptions`` are numbers."""

    name: str
    classes: int
    descriptions: int
    class_names: list[str]
    licence: str


class ShippedLabelSet(Answer):
    """The content of a label set that comes with the service."""

    classes: list[LabelClass]
    templates: str = "photo"
    merge_synonyms: Literal["max", "mean"] = "mean"
    multi_label: bool = False


class ExampleCounts(Answer):
    """The number of example images of a label set; one with several classes counts for each in ``labelled``."""

    revision: int
    labelled: dict[str, int]
    labelled_images: int = 0
    several_classes: int = 0
    unlabelled: int
    without_features: int


class Example(Answer):
    """An example image; ``label`` is its class, and None for an image without a class or with several."""

    id: int
    sha256: str
    label: str | None = Field(alias="class")
    classes: list[str] = []
    kept: bool
    models: int
    created_at: datetime


class SkippedImage(Answer):
    """An image of an upload that could not be read: its index in the request, and the reason."""

    image: int
    problem: str


class AddedExamples(Answer):
    """The result of an upload of example images."""

    added: int
    duplicates: int
    relabelled: int
    skipped: list[SkippedImage]
    counts: ExampleCounts
    job: str | None


class DeletedExamples(Answer):
    """The number of deleted example images, and the counts of the remaining ones."""

    deleted: int
    counts: ExampleCounts
    job: str | None


class LeaderboardRow(Answer):
    """The measures of one method on labelled images that it was not fitted on."""

    method: str
    accuracy: float
    interval: list[float] = Field(description="Lower and upper end of the 95 % bootstrap interval of the accuracy.")
    macro_f1: float
    nll: float
    ece: float
    calibrated_nll: float
    calibrated_ece: float
    temperature: float
    ms_per_image: float
    to_zero_shot: dict[str, float] | None
    warnings: list[str]


class Selection(Answer):
    """The method that is selected for a label set with example images, and the evidence for it.

    ``thresholds`` are those of the scores of classes where images may have several; the other classes have
    ``shared_threshold``.
    """

    method: str
    reason: str
    leaderboard: list[LeaderboardRow]
    not_run: list[str]
    version: int
    examples_revision: int
    labelled: int
    unlabelled: int
    folds: int
    current: bool
    created_at: datetime
    thresholds: dict[str, float] = {}
    shared_threshold: float | None = None


class ThresholdCurve(Answer):
    """The example images that thresholds select: ``thresholds`` ascend, and the last one selects the fewest images."""

    thresholds: list[float]
    predicted: list[int]
    correct: list[int]


class LabelThreshold(Answer):
    """The threshold of a label where images may have several, and its curve on the example images.

    ``threshold`` is in use: ``own``, that of the class in the label set, or else ``automatic``. ``suggested`` meets the
    goal; None if no threshold does, and ``reason`` says why.
    """

    label: str
    images: int = Field(description="Example images with the label.")
    average_precision: float | None
    threshold: float
    own: float | None
    automatic: float
    suggested: float | None
    reason: str | None
    curve: ThresholdCurve

    def selected_at(self, threshold: float) -> tuple[int, int]:
        """Return the number of example images with at least this score, and of those among them with the label."""
        place = bisect_left(self.curve.thresholds, threshold)
        if place == len(self.curve.thresholds):
            return 0, 0
        return self.curve.predicted[place], self.curve.correct[place]


class Thresholds(Answer):
    """The thresholds of the labels of a label set, whose newest ``version`` was measured.

    If ``calibrated``, the example images calibrate the scores.
    """

    label_set: str
    version: int
    multi_label: bool
    model: str
    images: int = Field(description="Labelled example images that were used.")
    calibrated: bool
    labels: list[LabelThreshold]


class Draft(Answer):
    """A description or a feature of a class, written by a language model and kept for review."""

    id: int
    label: str = Field(alias="class")
    kind: Literal["description", "feature"]
    text: str
    question: str
    model: str
    status: Literal["draft", "accepted", "rejected"]
    asked_at: datetime
    decided_at: datetime | None


class AcceptedDrafts(Answer):
    """The number of accepted drafts, and the version that they were written into."""

    accepted: int
    label_set: LabelSet


class DescribeEstimate(Answer):
    """An upper bound of the requests and tokens that describing a label set uses."""

    requests: int
    prompt_tokens: int
    completion_tokens: int


class JobState(Answer):
    """The state of a background job; jobs of a list have no ``result``."""

    id: str
    kind: str
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    done: int
    total: int
    label_set: str | None
    database: str | None
    result: Mapping[str, Any] | None = None
    error: str | None
    created_at: datetime
    finished_at: datetime | None

    @property
    def is_over(self) -> bool:
        """Whether the job has succeeded, failed or been cancelled."""
        return self.status in {"succeeded", "failed", "cancelled"}


class CaptionIndex(Answer):
    """The search index of a caption database."""

    kind: str
    lists: int
    probes: int
    code_bytes: int


class Database(Answer):
    """A caption database."""

    name: str
    default: bool
    captions: int | None
    model: str | None
    models: list[str]
    dims: int | None
    index: CaptionIndex | None
    recall: dict[str, float] | None
    recall_at: int | None
    recall_target: float | None
    counts: dict[str, int] | None
    source_notes: str | None
    licence: str | None
    generation: str | None
    created_at: str | None
    bytes: int
    problem: str | None


class FoundCaption(Answer):
    """A caption, and its cosine similarity with the query."""

    caption: str
    score: float


class FoundCaptions(Answer):
    """One page of captions, the nearest first."""

    database: str
    model: str
    results: list[FoundCaption]
    searched: int
    next_offset: int | None
    warnings: list[str] = []


class ImagePath(Answer):
    """How the image encoder of a model is run."""

    backend: str
    device: str
    precision: str
    threads: int
    image_batch: int
    images_per_s: float | None


class Model(Answer):
    """A model in service."""

    name: str
    default: bool
    embed_dim: int
    image_size_px: int
    probability: str
    logit_scale: float
    logit_bias: float | None
    queued_images: int
    image_path: ImagePath


class MethodOption(Answer):
    """A numeric option of a method, in [``minimum``, ``maximum``]."""

    default: float
    minimum: float
    maximum: float
    description: str


class Method(Answer):
    """A classification method."""

    name: str
    summary: str
    default: bool
    control: bool
    stateful: bool
    transductive: bool
    uses_descriptions: bool
    vocabulary_free: bool
    learns_from: list[str]
    options: dict[str, MethodOption]
