"""The interface of a vision-language model, and the types that describe how it runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Protocol

from PIL import Image
from pydantic import BaseModel, ConfigDict

from app.types import ImageFeatures, Pixels, TextFeatures


@dataclass(frozen=True, slots=True)
class ImagePath:
    """How an encoder runs its image tower.

    Args:
        backend: ``torch`` or ``openvino``.
        device: a device name of torch.
        precision: ``fp32``, ``fp16``, ``bf16`` or ``int8``.
        batch_size: recommended number of images in a forward pass.
        threads: CPU threads of a forward pass; 0 on other devices.
        images_per_s: throughput at that batch size; None if it was not measured, or only while the machine was busy.
    """

    backend: str
    device: str
    precision: str
    batch_size: int
    threads: int = 0
    images_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Options for loading a model.

    Args:
        device: ``auto``, or a device name of torch.
        precision: of the image tower; ``auto`` selects the fastest measured one.
        backend: of the image tower: ``auto``, ``torch`` or ``openvino``.
        weights_dir: cache folder of downloaded weights; None uses the default of the hub library (``HF_HOME``).
        data_dir: folder of measurements; None stores none.
        exports_dir: folder of exported models; None neither reads nor writes any.
        tuning_seconds: time for measuring the candidates, once per model and machine; 0 disables measuring.
        measure_again: ignore a stored measurement.
        ignore_int8: with the precision ``auto``, do not use an image tower in int8.
        torch_compile: compile the image tower with torch, if torch runs it.
    """

    device: str = "auto"
    precision: str = "auto"
    backend: str = "auto"
    weights_dir: Path | None = None
    data_dir: Path | None = None
    exports_dir: Path | None = None
    tuning_seconds: float = 0.0
    measure_again: bool = False
    ignore_int8: bool = False
    torch_compile: bool = False


@dataclass(frozen=True, slots=True)
class Candidate:
    """A combination of options for running an image tower; ``threads`` is 0 on other devices than a CPU."""

    backend: str
    precision: str
    threads: int


class Trial(BaseModel):
    """The measurements of a candidate, or the reason why it was refused.

    Args:
        candidate: the combination.
        min_cosine: lowest cosine of its features with those in single precision; None if they were not compared.
        rates: images per second by batch size, one value for each round of its last comparison.
        ratios: its rate divided by that of the best candidate before it in the same round, for the rounds that count;
            empty for the first candidate.
        cpu_by_others: share of the cores that other processes used in each round; empty where this is not known.
        refused: why it cannot be used; None if it can.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    candidate: Candidate
    min_cosine: float | None
    rates: dict[int, tuple[float, ...]] = {}
    ratios: tuple[float, ...] = ()
    cpu_by_others: tuple[float, ...] = ()
    refused: str | None = None

    @property
    def images_per_s(self) -> dict[int, float]:
        """The median rate of each batch size."""
        return {size: median(rates) for size, rates in self.rates.items()}

    @property
    def ratio(self) -> float | None:
        """The median of the ratios."""
        return median(self.ratios) if self.ratios else None


class Tuning(BaseModel):
    """All trials of one model on one device in chronological order, and what follows from them.

    Args:
        device: a device name of torch.
        trials: of every candidate.
        chosen: the candidate to use; None if all were refused.
        batch_size: for the chosen one.
        cpu_by_others: share of the cores that other processes used, the median; None where this is not known.
        provisional: other processes used the CPU, so the result may be wrong.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    device: str
    trials: tuple[Trial, ...]
    chosen: Candidate | None
    batch_size: int
    cpu_by_others: float | None = None
    provisional: bool = False

    def image_path(self) -> ImagePath | None:
        """Return how to run the tower; None if all candidates were refused."""
        if self.chosen is None:
            return None
        rates = next(trial.images_per_s for trial in self.trials if trial.candidate == self.chosen)
        rate = None if self.provisional else rates.get(self.batch_size)
        return ImagePath(
            self.chosen.backend,
            self.device,
            self.chosen.precision,
            self.batch_size,
            self.chosen.threads,
            None if rate is None else round(rate, 1),
        )


class ImageTower(Protocol):
    """An image tower that runs with the options of one candidate."""

    @property
    def streams(self) -> int:
        """Number of batches that it can run at the same time, each from a thread of its own."""

    def begin(self, pixels: Sequence[Pixels], *, alone: bool = True) -> Callable[[], ImageFeatures]:
        """Start encoding n >= 1 images and return a function that waits for their unit rows (n, d), float32.

        Args:
            pixels: the images.
            alone: whether this batch may use all cores, since few others will run at the same time.
        """


class ModelInfo(Protocol):
    """The properties of a model that do not depend on where its towers run."""

    name: str
    """The name in the settings and in requests."""

    embed_dim: int
    """d, the dimension of the joint space."""

    image_size_px: int
    """Side of the square input of the image tower."""

    logit_scale: float
    """The model's own scale of cosines, already exponentiated."""

    logit_bias: float | None
    """The bias of a sigmoid model such as SigLIP; None for a model whose scores are a softmax over the classes."""

    image_path: ImagePath
    """How the image tower runs."""

    tuning: Tuning | None
    """The measurements that ``image_path`` was selected from; None without measurements."""

    @property
    def transform(self) -> Callable[[Image.Image], Pixels]:
        """Resizes and crops an upright RGB image to uint8 (image_size_px, image_size_px, 3); thread-safe."""


class Encoder(ModelInfo, Protocol):
    """An image tower and a text tower with a joint space.

    The methods are called from worker threads, never from the event loop. ``image_streams`` threads call
    ``begin_images`` and the functions that it returns, another thread calls ``encode_texts``.
    """

    @property
    def image_streams(self) -> int:
        """Number of batches of images that are encoded at the same time, each from a thread of its own."""

    def begin_images(self, pixels: Sequence[Pixels], *, alone: bool = True) -> Callable[[], ImageFeatures]:
        """Start encoding n >= 1 transformed images and return a function that waits for their unit rows (n, d).

        If there is one stream, a second batch may start before the first has finished, so that an accelerator is never
        idle. Both steps may raise ``MemoryError``; the caller may then encode the same images in smaller batches.

        Args:
            pixels: the images.
            alone: whether this batch may use all cores, since few others will run at the same time.
        """

    def encode_texts(self, texts: Sequence[str]) -> TextFeatures:
        """Return unit rows (k, d), float32, for k >= 1 texts; the tokenizer truncates texts that are too long."""

    def image_fingerprint(self) -> str:
        """Return an identifier of the image tower's weights and preprocessing; takes up to some seconds.

        It does not depend on how the tower runs, since only candidates with almost the same features are used; a
        tower in int8 has its own.
        """

    def text_fingerprint(self) -> str:
        """Return an identifier of the text tower's weights and tokenizer; takes up to some seconds."""
