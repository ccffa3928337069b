"""The values that are passed between layers, and the array types of ``app.array_types``.

The array types are imported when they are first used: numpy takes a part of a second, and commands that only talk to a
server need no arrays.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from importlib import import_module
from typing import TYPE_CHECKING, Any

from app.errors import ClientError

if TYPE_CHECKING:
    from app.array_types import *  # noqa: F403 - exports all of them

_ARRAY_TYPES = frozenset(
    {
        *("Pixels", "ImageFeatures", "TextFeatures", "ClassEmbeddings", "PromptEmbeddings", "Similarities", "Logits"),
        "Probabilities",
    }
)


def __getattr__(name: str) -> Any:
    """Return an array type."""
    if name in _ARRAY_TYPES:
        return getattr(import_module("app.array_types"), name)
    raise AttributeError(f"module 'app.types' has no attribute {name!r}")


@dataclass(frozen=True, slots=True)
class Option:
    """A number that a request may set, between ``minimum`` and ``maximum``; ``whole`` allows whole numbers only."""

    default: float
    minimum: float
    maximum: float
    description: str
    whole: bool = False


@dataclass(frozen=True, slots=True)
class ClassEntry:
    """One class of a label set: its name, and texts that help to recognise it.

    ``descriptions`` are sentences about how the class looks; ``features`` are short phrases, read as "NAME, which has
    ..."; ``synonyms`` are other names; ``prompt``, if given, replaces the templates, with ``{}`` for the name.
    ``threshold`` is the score from which an image has the label, where images have several labels.
    ``prior`` is how often images show the class, as a count or a share; either all classes of a label set have one, or
    none. ``parent`` is the label above it (app/names/hierarchy.py).
    """

    name: str
    descriptions: tuple[str, ...] = ()
    synonyms: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    prompt: str | None = None
    threshold: float | None = None
    prior: float | None = None
    parent: str | None = None


class MergeSynonyms(StrEnum):
    """How the scores of a class's names become the score of the class."""

    MAX = "max"
    MEAN = "mean"


@dataclass(frozen=True, slots=True)
class LabelSet:
    """One immutable version of a named list of classes.

    ``templates`` names a template set, or is itself one template that contains ``{}``. ``examples_revision``
    belongs to the label set, not to the version: it counts the changes of its example images, and is 0 without any.
    ``deletions_revision`` is the revision after the last deletion of examples: results of older ones must not be used.
    ``multi_label`` means that an image may have several of the labels, or none, unless a request says otherwise.
    """

    name: str
    version: int
    classes: tuple[ClassEntry, ...]
    templates: str
    created_at: datetime
    merge_synonyms: MergeSynonyms = MergeSynonyms.MEAN
    examples_revision: int = 0
    deletions_revision: int = 0
    multi_label: bool = False

    @property
    def classnames(self) -> tuple[str, ...]:
        """The class names in order."""
        return tuple(entry.name for entry in self.classes)

    @property
    def priors(self) -> dict[str, float] | None:
        """How often images show each class, as it was given; None if that is not stored."""
        priors = {entry.name: entry.prior for entry in self.classes if entry.prior is not None}
        return priors or None

    @property
    def reference(self) -> str:
        """``name@version``, which always means these classes."""
        return f"{self.name}@{self.version}"


class RejectBy(StrEnum):
    """The score of an image that rejection compares with a threshold; it is low for images of none of the classes."""

    SCORE = "score"
    """The best score, in [0, 1]."""
    SIMILARITY = "similarity"
    """The largest cosine similarity with the text of a class."""
    CLASS_MEAN = "class-mean"
    """The largest cosine similarity with the mean of the labelled images of a class."""
    IN_VOCABULARY = "in-vocabulary"
    """1 minus the score of ``OutOfVocabulary``, in [0, 1]."""


class Reject(StrEnum):
    """How a request leaves the threshold of rejection to the service."""

    AUTO = "auto"
    """By labelled examples if there are enough, else by words that compete with the labels."""


@dataclass(frozen=True, slots=True)
class Scoring:
    """How logits become scores, rejections and prediction sets.

    ``temperature`` divides the logits; it was fitted on ``calibrated_on`` labelled images, and is 1 if there are none.
    An image whose score ``reject_by`` is below ``reject_below`` is rejected; ``false_rejection_rate`` is the measured
    share of images of a class that this rejects wrongly. A label is in the prediction set of ``coverage`` if its
    probability is at least ``1 - set_quantile``.

    With ``multi_label``, each label has a probability of its own, and an image has the labels whose probability is at
    least their threshold in ``thresholds``, which has one for each class. ``label_scalings`` are the slope and the
    intercept with which the log odds of each class are calibrated; empty without labelled images.
    """

    temperature: float = 1.0
    calibrated_on: int = 0
    reject_below: float | None = None
    reject_by: RejectBy = RejectBy.SCORE
    false_rejection_rate: float | None = None
    coverage: float | None = None
    set_quantile: float | None = None
    warnings: tuple[str, ...] = ()
    multi_label: bool = False
    thresholds: tuple[float, ...] = ()
    label_scalings: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Priors:
    """How frequent the classes of a task are.

    ``frequencies`` (c,) sum to 1; None if they are to be estimated from the example images. ``weights`` (c,) are added
    to the calibrated logits of every image; None until they are computed (app/classification/priors.py).
    """

    frequencies: tuple[float, ...] | None = None
    weights: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """A resolved request: every name in it has been looked up.

    ``label_set`` is the version that the classes come from; None for labels of the request and for vocabulary-free
    classification. ``options`` are the method's, with the defaults filled in, sorted by name. ``reason`` says why
    ``auto`` chose the method; None if the caller named it. Without ``classes``, labels are discovered in the caption
    database ``database``, for each image separately or, if ``together``, for all images of the request. With
    ``keep_features``, later requests can name the images by id. Without ``priors``, scores are used as they are. With
    parents of classes, paths stop before labels with a lower score than ``min_score``.
    """

    model: str
    method: str
    classes: tuple[ClassEntry, ...]
    templates: tuple[str, ...]
    top_k: int
    label_set: LabelSet | None = None
    explain: bool = False
    options: tuple[tuple[str, float], ...] = ()
    reason: str | None = None
    scoring: Scoring = Scoring()
    database: str | None = None
    together: bool = False
    keep_features: bool = False
    priors: Priors | None = None
    min_score: float | None = None

    @property
    def classnames(self) -> tuple[str, ...]:
        """The class names in order."""
        return tuple(entry.name for entry in self.classes)

    @property
    def merge_synonyms(self) -> MergeSynonyms:
        """How the scores of a class's names become the score of the class."""
        return MergeSynonyms.MEAN if self.label_set is None else self.label_set.merge_synonyms

    @property
    def examples_revision(self) -> int:
        """The revision of the label set's examples when the request was resolved; 0 without examples."""
        return 0 if self.label_set is None else self.label_set.examples_revision

    @property
    def label_set_reference(self) -> str | None:
        """``name@version`` of the label set."""
        return None if self.label_set is None else self.label_set.reference


@dataclass(frozen=True, slots=True)
class Prediction:
    """One class for one image: ``score`` is a probability in [0, 1], ``similarity`` the raw cosine.

    ``above`` says whether the score is at least the ``threshold`` of the label; both are None unless images may have
    several labels.
    """

    label: str
    score: float
    similarity: float
    threshold: float | None = None
    above: bool | None = None


@dataclass(frozen=True, slots=True)
class PathStep:
    """A label of a hierarchy, and the score of all classes at or below it."""

    label: str
    score: float


@dataclass(frozen=True, slots=True)
class PromptContribution:
    """The contribution of one prompt to the similarity of a label.

    The sum of ``weight`` times ``cosine`` over all prompts of a label is its similarity. ``source`` is
    ``template``, ``class prompt``, ``description``, ``feature`` or ``random``.
    """

    text: str
    source: str
    cosine: float
    weight: float


@dataclass(frozen=True, slots=True)
class LabelExplanation:
    """Why a label has its similarity: prompts that are nearer to the image than the rival label, and the others.

    The rival of the best label is the second best; the rival of any other label is the best. Both lists are sorted by
    the weight of the prompt times its distance from the rival's similarity, largest first.
    """

    label: str
    similarity: float
    rival: str | None
    rival_similarity: float | None
    supporting: tuple[PromptContribution, ...]
    opposing: tuple[PromptContribution, ...]


@dataclass(frozen=True, slots=True)
class NearWord:
    """A word that competes with the labels, and its cosine with an image."""

    word: str
    similarity: float


@dataclass(frozen=True, slots=True)
class OutOfVocabulary:
    """Unknown-class scores: all are higher for images of none of the classes.

    ``score`` is the probability that an image shows none of the classes, from its similarities with everyday words that
    have nothing to do with them (app/scoring/negative_labels.py); None while these words are not encoded, or if almost
    all of them are kinds of the classes. ``nearest`` are those that are nearer to the image than every class; None
    unless explanations are requested. ``mcm`` is 1 minus the largest softmax of the similarities (Ming et al., NeurIPS
    2022), in [0, 1 - 1/c]; ``energy`` is minus the logsumexp of the logits (Liu et al., NeurIPS 2020).
    """

    mcm: float
    energy: float
    score: float | None = None
    nearest: tuple[NearWord, ...] | None = None


@dataclass(frozen=True, slots=True)
class NearCaption:
    """A caption near an image, its cosine, and the predictions that it suggested."""

    caption: str
    similarity: float
    suggested: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ImageResult:
    """The result for one image: its predictions, best first, or the error that kept it from being decoded.

    ``captions`` are those that labels were discovered in, nearest first. ``rejected`` means that the image is taken for
    none of the classes, because ``rejection_score`` is below the threshold; ``prediction_set`` contains the true label
    with the requested coverage. ``image_id`` names the kept features. These are None unless requested.
    ``weak_match`` means that the score of ``out_of_vocabulary`` is above 0.5; None if this is unknown.
    ``warnings`` concern this image alone. ``labels`` are those that the image has, best first, where it may have
    several; None elsewhere. ``path`` are the labels from a root to where the answer stops, empty if the image has
    none of the labels; None without parents of classes.
    """

    predictions: Sequence[Prediction] = ()
    error: ClientError | None = None
    explanation: tuple[LabelExplanation, ...] | None = None
    out_of_vocabulary: OutOfVocabulary | None = None
    rejected: bool | None = None
    rejection_score: float | None = None
    prediction_set: tuple[str, ...] | None = None
    captions: tuple[NearCaption, ...] | None = None
    image_id: str | None = None
    weak_match: bool | None = None
    warnings: tuple[str, ...] = ()
    labels: tuple[str, ...] | None = None
    path: tuple[PathStep, ...] | None = None


@dataclass(frozen=True, slots=True)
class ExamplesUsed:
    """The example images that a classifier was fitted to: their number, and their revision."""

    revision: int
    labelled: int
    unlabelled: int


@dataclass(frozen=True, slots=True)
class SharedName:
    """A label that was discovered for several images together, and the number of images that it labels."""

    label: str
    images: int


@dataclass(frozen=True, slots=True)
class Classification:
    """The result of a task: one result per image, in order, and the milliseconds of each stage.

    ``warnings`` are sentences about the task, for example that a method lacks the examples it needs. ``transductive``
    means that the images of the request influenced each other. ``database`` is the caption database that the labels
    come from, as ``name@generation``; ``vocabulary`` are the labels in use, if they were discovered for all images
    together. ``priors`` are the frequencies of the classes that the scores use.
    """

    task: Task
    results: tuple[ImageResult, ...]
    timing_ms: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    examples: ExamplesUsed | None = None
    transductive: bool = False
    database: str | None = None
    vocabulary: tuple[SharedName, ...] | None = None
    priors: Priors | None = None


class DraftStatus(StrEnum):
    """The decision about a draft; ``draft`` until there is one."""

    DRAFT = "draft"
    ACCEPTED = "accepted"
    REJECTED = "rejected"


class Scope(StrEnum):
    """The scope of a key; ``allows`` says which other scopes it includes."""

    METRICS = "metrics"
    CLASSIFY = "classify"
    WRITE = "write"
    ADMIN = "admin"

    def allows(self, wanted: "Scope") -> bool:
        """Return whether this scope includes another.

        Each scope includes those before it, except that only ``admin`` includes ``metrics``.
        """
        if Scope.METRICS in {self, wanted}:
            return self in {wanted, Scope.ADMIN}
        order = list(Scope)
        return order.index(self) >= order.index(wanted)
