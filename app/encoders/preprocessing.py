"""Resizing and cropping images with Pillow, as open_clip does, without torchvision."""

from typing import Annotated, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from app.types import Pixels

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class Preprocessing(BaseModel):
    """How a model's images are resized and cropped; the image tower normalises them.

    With ``squash``, the pixels equal those of open_clip. With ``shortest``, 1 of 2,000 pixels of photographs differs by
    one level, and of pure noise some by more, since rounding and clipping between the two passes of a resize depend on
    their order.
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
        size, method, (width, height) = self.size_px, _FILTERS[self.interpolation], image.size
        if self.resize == "squash":
            return np.array(image.resize((size, size), method))
        left, right, top, bottom = 0.0, float(width), 0.0, float(height)
        if width <= height:
            top, bottom = _centre(height, _scaled(size, height, width), size)
        else:
            left, right = _centre(width, _scaled(size, width, height), size)
        # Only what the crop keeps is computed. Two calls, because with a crop Pillow would often choose another order
        # of the passes than open_clip gets for the whole image.
        narrow = image.resize((size, height), method, box=(left, 0, right, height))
        return np.array(narrow.resize((size, size), method, box=(0, top, size, bottom)))


def _scaled(size: int, long: int, short: int) -> int:
    """Return the longer side after the shorter one is resized to ``size``, rounded as torchvision does."""
    return int(size * long / short)


def _centre(before: int, after: int, size: int) -> tuple[float, float]:
    """Return the part of a side of ``before`` pixels that is the central ``size`` of ``after`` resized pixels."""
    first = round((after - size) / 2)
    return first * before / after, (first + size) * before / after
