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

    ``templates`` names a template set, or is itself one template that contains ``{}``.
    """

    name: str
    version: int
    classes: tuple[ClassEntry, ...]
    templates: str
    created_at: datetime
    merge_synonyms: MergeSynonyms = MergeSynonyms.MEAN

    @property
    def classnames(self) -> tuple[str, ...]:
        """The class names in order."""
        return tuple(entry.name for entry in self.classes)

    @property
    def reference(self) -> str:
        """``name@version``, which will always mean these classes."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class Task:
    """What to do with a request's images, with every name already looked up.

    ``options`` are the method's, the defaults filled in, sorted by name.
    """

    model: str
    method: str
    classes: tuple[ClassEntry, ...]
    templates: tuple[str, ...]
    top_k: int
    label_set: str | None = None
    merge_synonyms: MergeSynonyms = MergeSynonyms.MEAN
    explain: bool = False
    options: tuple[tuple[str, float], ...] = ()

    @property
    def classnames(self) -> tuple[str, ...]:
        """The class names in order."""
        return tuple(entry.name for entry in self.classes)


@dataclass(frozen=True, slots=True)
class Prediction:
    """One class for one image: ``score`` is a probability in [0, 1], ``similarity`` the raw cosine."""

    label: str
    score: float
    similarity: float


@dataclass(frozen=True, slots=True)
class SpokenPrompt:
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
    supporting: tuple[SpokenPrompt, ...]
    opposing: tuple[SpokenPrompt, ...]


@dataclass(frozen=True, slots=True)
class ImageResult:
    """What became of one image: its predictions, best first, or the error that kept it from being read."""

    predictions: tuple[Prediction, ...] = ()
    error: ClientError | None = None
    explanation: tuple[LabelExplanation, ...] | None = None


@dataclass(frozen=True, slots=True)
class Classification:
    """The answer to a task: one result per image, in order, and the milliseconds each stage took.

    ``warnings`` are sentences about the task, such as that a method lacks what it needs.
    """

    task: Task
    results: tuple[ImageResult, ...]
    timing_ms: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
