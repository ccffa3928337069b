"""Models that OpenVINO runs on a CPU, without torch."""

import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from app.encoders._base import ImagePath, ImageTower, LoadOptions, Tuning
from app.encoders.openvino_tower import OpenVinoTextTower
from app.encoders.preprocessing import Preprocessing
from app.encoders.tokenizing import TextTokenizer, TokenizerOptions
from app.encoders.tuning import is_installed
from app.types import ImageFeatures, Pixels, TextFeatures


class ModelDescription(BaseModel):
    """What a model has besides its towers and its tokenizer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    """The name in the settings."""

    embed_dim: int
    logit_scale: float
    logit_bias: float | None
    preprocessing: Preprocessing
    tokenizer: TokenizerOptions
    image_fingerprint: str
    text_fingerprint: str


class OpenVinoEncoder:
    """A model that OpenVINO runs on a CPU.

    Args:
        description: its other properties.
        image_tower: runs the image tower.
        image_path: how it runs.
        tuning: the measurements that ``image_path`` was selected from.
        text_tower: runs the text tower.
        tokenizer: of the model.
    """

    def __init__(
        self,
        description: ModelDescription,
        *,
        image_tower: ImageTower,
        image_path: ImagePath,
        tuning: Tuning | None,
        text_tower: OpenVinoTextTower,
        tokenizer: TextTokenizer,
    ) -> None:
        self.name = description.model
        self.logit_scale = description.logit_scale
        self.logit_bias = description.logit_bias
        self.image_size_px = description.preprocessing.size_px
        self.image_path = image_path
        self.tuning = tuning
        self.transform = description.preprocessing.transform
        self._description = description
        self._image_tower = image_tower
        self._text_tower = text_tower
        self._tokenizer = tokenizer
        self.embed_dim = description.embed_dim

    @property
    def image_streams(self) -> int:
        """Number of batches that are encoded at the same time."""
        return self._image_tower.streams

    def begin_images(self, pixels: Sequence[Pixels], *, alone: bool = True) -> Callable[[], ImageFeatures]:
        """Start encoding and return a function that waits for the unit rows (n, d), float32."""
        return self._image_tower.begin(pixels, alone=alone)

    def encode_images(self, pixels: Sequence[Pixels]) -> ImageFeatures:
        """Return unit rows (n, d), float32."""
        return self.begin_images(pixels)()

    def encode_texts(self, texts: Sequence[str]) -> TextFeatures:
        """Return unit rows (k, d), float32; texts beyond the tokenizer's context are truncated."""
        return self._text_tower.encode(self._tokenizer(texts))

    def image_fingerprint(self) -> str:
        """Return the identifier of the image tower."""
        return self._description.image_fingerprint

    def text_fingerprint(self) -> str:
        """Return the identifier of the text tower."""
        return self._description.text_fingerprint


def runs_on_openvino(options: LoadOptions) -> bool:
    """Return whether a model with these options may run on OpenVINO alone; this imports neither it nor torch."""
    if options.backend == "torch" or options.precision == "fp16" or not is_installed("openvino"):
        return False
    has_torch = is_installed("torch")
    if options.device == "auto":
        return not has_torch or not has_accelerator()
    return options.device.startswith("cpu")


def has_accelerator() -> bool:
    """Return whether this machine may have a device that is faster than its CPU."""
    devices = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA, AMD, and both in the Linux of Windows
    is_apple = sys.platform == "darwin" and platform.machine() == "arm64"
    return is_apple or any(Path(device).exists() for device in devices)
