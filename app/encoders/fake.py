"""An encoder without weights that recognises three colours, for tests that do not need a model."""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from app.encoders._base import ImagePath, Tuning
from app.scoring.numerics import unit_rows
from app.types import ImageFeatures, Pixels, TextFeatures

_COLOURS = ("red", "green", "blue")


class FakeEncoder:
    """Encodes red, green and blue images near texts that contain that word; other texts by their hash.

    ``encoded_texts`` and ``image_batches`` record the calls.
    """

    def __init__(self, name: str = "fake", *, logit_bias: float | None = None) -> None:
        self.name = name
        self.embed_dim = 16
        self.image_size_px = 8
        self.logit_scale = 10.0
        self.logit_bias = logit_bias
        self.image_path = ImagePath("fake", "cpu", "fp32", 4)
        self.tuning: Tuning | None = None
        self.encoded_texts: list[str] = []
        self.image_batches: list[int] = []

    def transform(self, image: Image.Image) -> Pixels:
        """Resize to 8 by 8 pixels."""
        return np.asarray(image.resize((self.image_size_px, self.image_size_px)))

    @property
    def image_streams(self) -> int:
        """One."""
        return 1

    def begin_images(self, pixels: Sequence[Pixels], *, alone: bool = True) -> Callable[[], ImageFeatures]:  # noqa: ARG002
        """Return a function that encodes the images."""
        return lambda: self.encode_images(pixels)

    def encode_images(self, pixels: Sequence[Pixels]) -> ImageFeatures:
        """Return the mean colour, padded to (n, 16) and normalised."""
        self.image_batches.append(len(pixels))
        features = np.zeros((len(pixels), self.embed_dim), dtype=np.float32)
        features[:, :3] = np.stack(pixels).mean(axis=(1, 2)) / 255 + 0.01
        return unit_rows(features)

    def encode_texts(self, texts: Sequence[str]) -> TextFeatures:
        """Return the axis of a colour for texts that contain it, otherwise a direction derived from the text's hash."""
        self.encoded_texts.extend(texts)
        return unit_rows(np.stack([self._direction(text) for text in texts]))

    def image_fingerprint(self) -> str:
        """Return the model's name."""
        return self.name

    def text_fingerprint(self) -> str:
        """Return the model's name."""
        return self.name

    def _direction(self, text: str) -> np.ndarray:
        direction = np.zeros(self.embed_dim, dtype=np.float32)
        axes = [axis for axis, colour in enumerate(_COLOURS) if colour in text.lower()]
        if axes:
            direction[axes] = 1
        else:
            seed = int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")
            direction[len(_COLOURS) :] = np.random.default_rng(seed).standard_normal(self.embed_dim - len(_COLOURS))
        return direction
