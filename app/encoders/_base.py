"""What the rest of the service knows about a vision-language model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from app.errors import ModelUnavailableError
from app.task import ImageFeatures, Pixels, TextFeatures


@dataclass(frozen=True, slots=True)
class ImagePath:
    """How an encoder's image tower is run.

    Args:
        backend: ``torch``, or what else there is.
        device: as torch names it.
        precision: ``fp32``, ``fp16`` or ``bf16``.
        batch_size: images in one forward pass that suit it.
    """

    backend: str
    device: str
    precision: str
    batch_size: int


class Encoder(Protocol):
    """An image tower and a text tower with one joint space.

    The methods are called from worker threads, never from the event loop. ``transform`` must be safe to call from
    several threads at once; ``begin_images`` and what it returns are called by one thread, ``encode_texts`` by another.
    """

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

    def transform(self, image: Image.Image) -> Pixels:
        """Resize and crop one upright RGB image to (image_size_px, image_size_px, 3), eight bits."""

    def begin_images(self, pixels: Sequence[Pixels]) -> Callable[[], ImageFeatures]:
        """Start encoding n >= 1 transformed images and return what waits for their unit rows (n, d), float32.

        A second batch may begin before the first is waited for, so that an accelerator never is. Both steps may raise
        ``MemoryError``, after which the same images may be tried in smaller batches.
        """

    def encode_texts(self, texts: Sequence[str]) -> TextFeatures:
        """Return unit rows (k, d), float32, for k >= 1 texts; over-long texts are truncated by the tokenizer."""


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
