"""What the rest of the service knows about a vision-language model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image
from pydantic import BaseModel, ConfigDict

from app.errors import ModelUnavailableError
from app.types import ImageFeatures, Pixels, TextFeatures

# The smallest batch that comes this near to the best is taken: small ones answer sooner.
_NEAR_ENOUGH = 0.95


@dataclass(frozen=True, slots=True)
class ImagePath:
    """How an encoder's image tower is run.

    Args:
        backend: ``torch`` or ``openvino``.
        device: as torch names it.
        precision: ``fp32``, ``fp16`` or ``bf16``.
        batch_size: images in one forward pass that suit it.
        threads: for the arithmetic on a CPU, 0 elsewhere.
        images_per_s: at that batch size; None where nothing was measured.
    """

    backend: str
    device: str
    precision: str
    batch_size: int
    threads: int = 0
    images_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What the settings say of loading a model.

    Args:
        device: ``auto``, or as torch names it.
        precision: of the image tower; ``auto`` is what was measured to be best.
        backend: of the image tower: ``auto``, ``torch`` or ``openvino``.
        weights_dir: where hub files are kept; None leaves it to the hub library (``HF_HOME``).
        data_dir: where measurements and converted towers are kept; None keeps none.
        tuning_seconds: for measuring what is best, once per model and machine; 0 measures nothing.
        measure_again: measure even if there is a measurement.
        torch_compile: let torch compile the image tower where torch runs it.
    """

    device: str = "auto"
    precision: str = "auto"
    backend: str = "auto"
    weights_dir: Path | None = None
    data_dir: Path | None = None
    tuning_seconds: float = 0.0
    measure_again: bool = False
    torch_compile: bool = False


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run an image tower; ``threads`` are those of a CPU, 0 where that means nothing."""

    backend: str
    precision: str
    threads: int


class Trial(BaseModel):
    """What came of trying a candidate: images per second by batch size, or why it is out of the question."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    candidate: Candidate
    min_cosine: float | None
    images_per_s: dict[int, float]
    refused: str | None = None

    @property
    def best_rate(self) -> float:
        """Images per second at the best batch size; 0 where there is none."""
        return 0.0 if self.refused else max(self.images_per_s.values(), default=0.0)


class Tuning(BaseModel):
    """Every trial of one model on one device, in the order in which they were made."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    device: str
    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial | None:
        """The fastest trial that was not refused."""
        good = [trial for trial in self.trials if trial.best_rate > 0]
        return max(good, key=lambda trial: trial.best_rate, default=None)

    def image_path(self) -> ImagePath | None:
        """Return the fastest way, with the smallest batch that is nearly as fast as the best; None if all failed."""
        best = self.best
        if best is None:
            return None
        size = min(size for size, rate in best.images_per_s.items() if rate >= _NEAR_ENOUGH * best.best_rate)
        way = best.candidate
        return ImagePath(way.backend, self.device, way.precision, size, way.threads, round(best.images_per_s[size], 1))


class ImageTower(Protocol):
    """Runs an image tower one way."""

    def begin(self, pixels: Sequence[Pixels]) -> Callable[[], ImageFeatures]:
        """Start encoding n >= 1 images and return what waits for their unit rows (n, d), float32."""


class ModelInfo(Protocol):
    """What a model is, wherever its towers run. ``transform`` is called from several threads at once."""

    name: str
    """The name that callers use, as it was given in the settings."""

    embed_dim: int
    """d, the size of the joint space."""

    image_size_px: int
    """Side of the square that the image tower takes."""

    logit_scale: float
    """The model's own scale on cosines, already exponentiated."""

    logit_bias: float | None
    """The bias of a sigmoid model such as SigLIP; None means that scores are a softmax over the classes."""

    image_path: ImagePath
    """How its image tower is run."""

    tuning: Tuning | None
    """What was measured of the ways to run it; None where nothing was."""

    @property
    def transform(self) -> Callable[[Image.Image], Pixels]:
        """What resizes and crops one upright RGB image to (image_size_px, image_size_px, 3), eight bits."""


class Encoder(ModelInfo, Protocol):
    """An image tower and a text tower with one joint space.

    The methods are called from worker threads, never from the event loop; ``begin_images`` and what it returns by one
    thread, ``encode_texts`` by another.
    """

    def begin_images(self, pixels: Sequence[Pixels]) -> Callable[[], ImageFeatures]:
        """Start encoding n >= 1 transformed images and return what waits for their unit rows (n, d), float32.

        A second batch may begin before the first is waited for, so that an accelerator never is. Both steps may raise
        ``MemoryError``, after which the same images may be tried in smaller batches.
        """

    def encode_texts(self, texts: Sequence[str]) -> TextFeatures:
        """Return unit rows (k, d), float32, for k >= 1 texts; over-long texts are truncated by the tokenizer."""

    def image_fingerprint(self) -> str:
        """Return what tells the features of this image tower from those of every other; takes up to some seconds.

        It does not tell apart the ways to run a tower, which are let in only where they change no answers.
        """

    def text_fingerprint(self) -> str:
        """Return what tells the features of this text tower from those of every other; takes up to some seconds."""


def model_source(spec: str) -> tuple[str, str, str]:
    """Split a model's name into its source, what to find there, and the tag.

    The sources are ``open_clip`` (``architecture/tag``), ``hf-hub`` (``hf-hub:org/repo``), ``local-dir``
    (``local-dir:path``) and ``embedded``; only the first has a tag.

    Raises:
        ModelUnavailableError: the name has none of these forms.
    """
    if spec == "embedded":
        return "embedded", "", ""
    scheme, colon, rest = spec.partition(":")
    if colon and scheme in {"hf-hub", "local-dir"} and rest:
        return scheme, rest, ""
    architecture, slash, tag = spec.partition("/")
    if slash and architecture and tag and not colon:
        return "open_clip", architecture, tag
    raise ModelUnavailableError(
        f"'{spec}' is no model name; write embedded, architecture/tag (ViT-B-32/laion2b_s34b_b79k), hf-hub:org/repo or"
        " local-dir:path"
    )
