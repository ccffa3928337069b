"""Resizing and cropping images with Pillow, as open_clip does with torchvision."""

from typing import Annotated, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from app.types import Pixels

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class Preprocessing(BaseModel):
    """How a model's images are resized and cropped; the image tower normalises them.

    The pixels equal those of open_clip with Pillow, up to a difference of 1 by rounding.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    size_px: Annotated[int, Field(gt=0)]
    """Side of the square input of the image tower."""

    resize: Literal["shortest", "squash"]
    """``shortest`` resizes the shorter side and crops the centre; ``squash`` ignores the aspect ratio."""

    interpolation: Literal["bicubic", "bilinear"]
    mean: tuple[float, float, float]
    """Of each channel, in [0, 1]."""

    std: tuple[float, float, float]

    def transform(self, image: Image.Image) -> Pixels:
        """Return an upright RGB image as uint8 (size_px, size_px, 3)."""
        size, (width, height) = self.size_px, image.size
        left, right, top, bottom = 0.0, float(width), 0.0, float(height)
        if self.resize == "shortest" and width <= height:
            top, bottom = _centre(height, _scaled(size, height, width), size)
        elif self.resize == "shortest":
            left, right = _centre(width, _scaled(size, width, height), size)
        method = _FILTERS[self.interpolation]
        # Only what the crop keeps is computed. Pillow selects the order of the two passes by their cost, and rounds and
        # clips after the first; torchvision begins with the columns.
        narrow = image.resize((size, height), method, box=(left, 0, right, height))
        return np.array(narrow.resize((size, size), method, box=(0, top, size, bottom)))


def _scaled(size: int, long: int, short: int) -> int:
    """Return the longer side after the shorter one is resized to ``size``, rounded as torchvision does."""
    return int(size * long / short)


def _centre(before: int, after: int, size: int) -> tuple[float, float]:
    """Return the part of a side of ``before`` pixels that is the central ``size`` of ``after`` resized pixels."""
    first = round((after - size) / 2)
    return first * before / after, (first + size) * before / after
