"""What the service answers, with types; a field that a newer service adds is kept, and no error."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Answer(BaseModel):
    """Answers."""

    model_config = ConfigDict(extra="allow", protected_namespaces=(), validate_by_name=True, validate_by_alias=True)


class Problem(Answer):
    """Why a request, or one of its images, was refused (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str | None = None
    errors: list[dict[str, str]] | None = Field(None, description="Each wrong field: `field` and `problem`.")

    @property
    def kind(self) -> str:
        """The last part of ``type``."""
        return self.type.rpartition(":")[2]


class Prediction(Answer):
    """A label and how well it fits."""

    label: str
    score: float = Field(description="Probability, in [0, 1].")
    similarity: float = Field(description="Cosine between image and label, in [-1, 1].")


class PromptContribution(Answer):
    """A prompt that spoke for or against a label."""

    prompt: str
    source: str
    cosine: float
    weight: float


class LabelExplanation(Answer):
    """Why a label has its score."""

    label: str
    similarity: float
    rival: str | None
    rival_similarity: float | None
    supporting: list[PromptContribution]
    opposing: list[PromptContribution]


class NearCaption(Answer):
    """A caption near the image, and the labels that it suggested."""

    caption: str
    similarity: float
    suggested: list[str]


class Explanation(Answer):
    """Why the best labels have their scores."""

    labels: list[LabelExplanation]
    captions: list[NearCaption] = []


class OutOfVocabulary(Answer):
    """How unlike all of the labels an image is; higher for something else."""

    mcm: float
    energy: float


class ImageResult(Answer):
    """What came of one image: predictions, the best first, or ``error``."""

    predictions: list[Prediction]
    error: Problem | None = None
    explanation: Explanation | None = None
    out_of_vocabulary: OutOfVocabulary | None = None
    prediction_set: list[str] | None = None
    rejected: bool | None = None
    warnings: list[str] = []

    @property
    def label(self) -> str | None:
        """The best label; none where there is an error, or where the image was rejected."""
        return self.predictions[0].label if self.predictions and not self.rejected else None


class Calibration(Answer):
    """What was learned from labelled example images about scores."""

    temperature: float
    images: int
    reject_below: float | None
    false_rejection_rate: float | None
    coverage: float | None


class ExamplesUsed(Answer):
    """The example images that the answer learned from."""

    revision: int
    labelled: int
    unlabelled: int


class SharedName(Answer):
    """A name that images of a request share."""

    label: str
    images: int


class Classification(Answer):
    """An answer of ``/v1/classify``: a result for each image, in order."""

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


class LabelClass(Answer):
    """A class of a label set, with what helps to recognise it."""

    name: str
    descriptions: list[str] = []
    synonyms: list[str] = []
    features: list[str] = []
    prompt: str | None = None


class LabelSet(Answer):
    """A version of a label set."""

    name: str
    version: int
    classes: list[LabelClass]
    templates: str
    merge_synonyms: Literal["max", "mean"]
    created_at: datetime


class LabelSetSummary(Answer):
    """A label set in a list; ``classes`` is their number."""

    name: str
    version: int
    classes: int
    created_at: datetime


class ExampleCounts(Answer):
    """How many example images a label set has."""

    revision: int
    labelled: dict[str, int]
    unlabelled: int
    without_features: int


class Example(Answer):
    """An example image."""

    id: int
    sha256: str
    label: str | None = Field(alias="class")
    kept: bool
    models: int
    created_at: datetime


class SkippedImage(Answer):
    """An image of an upload that could not be read: its place, and why."""

    image: int
    problem: str


class AddedExamples(Answer):
    """What became of an upload of example images."""

    added: int
    duplicates: int
    relabelled: int
    skipped: list[SkippedImage]
    counts: ExampleCounts
    job: str | None


class DeletedExamples(Answer):
    """What was deleted, and what is left."""

    deleted: int
    counts: ExampleCounts
    job: str | None


class LeaderboardRow(Answer):
    """A method, and how it did on labelled images that it had not seen."""

    method: str
    accuracy: float
    interval: list[float] = Field(description="95 % bootstrap interval of the accuracy: its two ends.")
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
    """Which method answers for a label set with example images, and the evidence."""

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


class Draft(Answer):
    """A sentence or a feature that a language model wrote about a class, before or after a decision."""

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
    """How many drafts went into which version."""

    accepted: int
    label_set: LabelSet


class DescribeEstimate(Answer):
    """What to ask a language model about a label set would take."""

    requests: int
    prompt_tokens: int
    completion_tokens: int


class JobState(Answer):
    """A job: work that goes on after the answer."""

    id: str
    kind: str
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    done: int
    total: int
    label_set: str | None
    database: str | None
    result: Mapping[str, Any] | None
    error: str | None
    created_at: datetime
    finished_at: datetime | None

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen."""
        return self.status in {"succeeded", "failed", "cancelled"}


class CaptionIndex(Answer):
    """How a caption database is searched."""

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
    """A caption, and its cosine with what was asked."""

    caption: str
    score: float


class FoundCaptions(Answer):
    """A page of captions, the nearest first."""

    database: str
    model: str
    results: list[FoundCaption]
    searched: int
    next_offset: int | None
    warnings: list[str] = []


class ImagePath(Answer):
    """How a model's image tower is run."""

    backend: str
    device: str
    precision: str
    threads: int
    image_batch: int
    images_per_s: float | None


class Model(Answer):
    """A model that is served."""

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
    """A number that a method takes, between ``minimum`` and ``maximum``."""

    default: float
    minimum: float
    maximum: float
    description: str


class Method(Answer):
    """A method of classification."""

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
