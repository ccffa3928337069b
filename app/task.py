"""The value objects that flow through the service, and the array types with their named axes.

Axes: n images, c classes, k prompts, d embedding dimensions, h and w pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
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

ClassEmbeddings: TypeAlias = Float32[np.ndarray, "c d"]
"""One unit row per class."""

Logits: TypeAlias = Float32[np.ndarray, "n c"]
"""What the probability function is applied to."""

Probabilities: TypeAlias = Float32[np.ndarray, "n c"]
"""Scores in [0, 1]; rows sum to 1 for softmax models only."""


@dataclass(frozen=True, slots=True)
class ClassEntry:
    """One class of a label set: its name and what helps to recognise it."""

    name: str
    descriptions: tuple[str, ...] = ()
    synonyms: tuple[str, ...] = ()


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
    """What to do with a request's images, with every name already looked up."""

    model: str
    method: str
    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    top_k: int
    label_set: str | None = None


@dataclass(frozen=True, slots=True)
class Prediction:
    """One class for one image: ``score`` is a probability in [0, 1], ``similarity`` the raw cosine."""

    label: str
    score: float
    similarity: float


@dataclass(frozen=True, slots=True)
class ImageResult:
    """What became of one image: its predictions, best first, or the error that kept it from being read."""

    predictions: tuple[Prediction, ...] = ()
    error: ClientError | None = None


@dataclass(frozen=True, slots=True)
class Classification:
    """The answer to a task: one result per image, in order, and the milliseconds each stage took."""

    task: Task
    results: tuple[ImageResult, ...]
    timing_ms: Mapping[str, float] = field(default_factory=dict)
