"""The value objects that flow through the service, and the array types with their named axes.

Axes: n images, c classes, r names of classes (r >= c: a class may have synonyms), k prompts, d embedding dimensions,
h and w pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import TypeAlias

import numpy as np
from jaxtyping import Float32, UInt8

from app.errors import ClientError

Pixels: TypeAlias = UInt8[np.ndarray, "h w 3"]
"""One image, RGB, resized and cropped as its encoder wants it."""

ImageFeatures: TypeAlias = Float32[np.ndarray, "n d"]
"""Image features with unit rows."""

TextFeatures: TypeAlias = Float32[np.ndarray, "k d"]
"""Prompt features with unit rows."""

ClassEmbeddings: TypeAlias = Float32[np.ndarray, "r d"]
"""One row per name of a class; of unit length or shorter, as the method pools its prompts."""

PromptEmbeddings: TypeAlias = Float32[np.ndarray, "r k d"]
"""For methods that weigh prompts: unit rows, the k-th prompt of each name saying the same about it."""

Similarities: TypeAlias = Float32[np.ndarray, "n c"]
"""Cosines, or weighted means of cosines, in [-1, 1]."""

Logits: TypeAlias = Float32[np.ndarray, "n c"]
"""What the probability function is applied to."""

Probabilities: TypeAlias = Float32[np.ndarray, "n c"]
"""Scores in [0, 1]; rows sum to 1 for softmax models only."""


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
    """One class of a label set: its name and what helps to recognise it.

    ``descriptions`` are whole sentences about how it looks; ``features`` are short phrases, read as "NAME, which has
    ..."; ``synonyms`` are other names; ``prompt``, if there is one, stands in the place of the filled templates, with
    ``{}`` for the name.
    """

    name: str
    descriptions: tuple[str, ...] = ()
    synonyms: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    prompt: str | None = None


class MergeSynonyms(StrEnum):
    """How the scores of a class's names become the score of the class."""

    MAX = "max"
    MEAN = "mean"


@dataclass(frozen=True, slots=True)
class LabelSet:
    """One immutable version of a named list of classes.

    ``templates`` names a template set, or is itself one template that contains ``{}``. ``examples_revision`` is of the
    label set and not of the version: it counts the changes of its example images, and is 0 as long as it had none.
    ``deletions_revision`` is the one that the last deletion of examples made: what rests on older ones must go.
    """

    name: str
    version: int
    classes: tuple[ClassEntry, ...]
    templates: str
    created_at: datetime
    merge_synonyms: MergeSynonyms = MergeSynonyms.MEAN
    examples_revision: int = 0
    deletions_revision: int = 0

    @property
    def classnames(self) -> tuple[str, ...]:
        """The class names in order."""
        return tuple(entry.name for entry in self.classes)

    @property
    def reference(self) -> str:
        """``name@version``, which will always mean these classes."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class Scoring:
    """How logits become what callers read.

    ``temperature`` divides the logits, and was fitted on ``calibrated_on`` labelled images; 1 and 0 where there were
    none. An image whose best score is under ``reject_below`` is none of the classes, which is wrong for about
    ``false_rejection_rate`` of the images of a class, as far as that was measured. ``set_quantile`` is what the
    probability of a label may lack of 1 for the label to be in the set of ``coverage``.
    """

    temperature: float = 1.0
    calibrated_on: int = 0
    reject_below: float | None = None
    false_rejection_rate: float | None = None
    coverage: float | None = None
    set_quantile: float | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """A resolved request: every name in it has been looked up.

    ``label_set`` is the version that the classes come from; None for labels of the request and for vocabulary-free
    classification. ``options`` are the method's, with the defaults filled in, sorted by name. ``reason`` says why
    ``auto`` chose the method; None where the caller named it. Without ``classes``, labels are discovered in the caption
    database ``database``, for each image separately or, if ``together``, for all images of the request.
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
    """One class for one image: ``score`` is a probability in [0, 1], ``similarity`` the raw cosine."""

    label: str
    score: float
    similarity: float


@dataclass(frozen=True, slots=True)
class PromptContribution:
    """What one prompt said of one image.

    ``weight`` times ``cosine``, added up over all prompts of the label, is the label's similarity. ``source`` is
    ``template``, ``class prompt``, ``description``, ``feature`` or ``random``.
    """

    text: str
    source: str
    cosine: float
    weight: float


@dataclass(frozen=True, slots=True)
class LabelExplanation:
    """Why a label got its similarity: the prompts nearer to the image than the rival label is, and those farther.

    The rival of the best label is the second best, and that of any other label is the best. Both lists begin with the
    prompt that made the most difference: its weight times its distance from the rival's similarity.
    """

    label: str
    similarity: float
    rival: str | None
    rival_similarity: float | None
    supporting: tuple[PromptContribution, ...]
    opposing: tuple[PromptContribution, ...]


@dataclass(frozen=True, slots=True)
class OutOfVocabulary:
    """How little an image looks like any of the classes; both are higher for images of something else.

    ``mcm`` is 1 less the largest softmax of the similarities (Ming et al., NeurIPS 2022), in [0, 1 - 1/c]; ``energy``
    is minus the logsumexp of the logits (Liu et al., NeurIPS 2020).
    """

    mcm: float
    energy: float


@dataclass(frozen=True, slots=True)
class NearCaption:
    """A caption near an image, the cosine between the two, and which of the predictions it suggested."""

    caption: str
    similarity: float
    suggested: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ImageResult:
    """What became of one image: its predictions, best first, or the error that kept it from being read.

    ``captions`` are those that names were found in, the nearest first. ``rejected`` tells whether it is taken for none
    of the classes, ``prediction_set`` holds the labels that the true one is among with the coverage that was asked for;
    None where nobody asked.
    """

    predictions: tuple[Prediction, ...] = ()
    error: ClientError | None = None
    explanation: tuple[LabelExplanation, ...] | None = None
    out_of_vocabulary: OutOfVocabulary | None = None
    rejected: bool | None = None
    prediction_set: tuple[str, ...] | None = None
    captions: tuple[NearCaption, ...] | None = None


@dataclass(frozen=True, slots=True)
class ExamplesUsed:
    """Which example images an answer rests on: how many, and of which revision of the label set's."""

    revision: int
    labelled: int
    unlabelled: int


@dataclass(frozen=True, slots=True)
class SharedName:
    """A name that was found for several images together, and how many of them it names."""

    label: str
    images: int


@dataclass(frozen=True, slots=True)
class Classification:
    """The answer to a task: one result per image, in order, and the milliseconds each stage took.

    ``warnings`` are sentences about the task, such as that a method lacks what it needs. ``transductive`` tells that
    the images of the request were looked at together. ``database`` is the caption database that the names are from, as
    ``name@generation``; ``vocabulary`` are those in use, where they were found for all images together.
    """

    task: Task
    results: tuple[ImageResult, ...]
    timing_ms: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    examples: ExamplesUsed | None = None
    transductive: bool = False
    database: str | None = None
    vocabulary: tuple[SharedName, ...] | None = None
