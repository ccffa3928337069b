"""Example images for the fake encoder, which distinguishes colours and knows their names."""

import numpy as np

from app.types import ClassEntry
from tests.conftest import picture

COLOURS = ("red", "green", "blue")
"""Names that the encoder knows: zero-shot is correct for nearly every shade."""

THINGS = ("tomato", "leaf", "sky")
"""Names of red, green and blue things that the encoder does not know: zero-shot predicts the first for all images."""


def shade(colour, number):
    """Return an image in a shade of red, green or blue (0, 1, 2) that depends only on the number."""
    rng = np.random.default_rng((colour, number))
    pixel = rng.integers(0, 90, 3)
    pixel[colour] = 200 + rng.integers(0, 50)
    return picture(tuple(pixel.tolist()))


def shades(count, first=0):
    """Return this number of images with alternating colours."""
    return [shade(number % 3, number) for number in range(first, first + count)]


async def keep(service, name, images, classnames):
    """Add example images of one class each, or of None, to a label set, and return the result."""
    classes = [() if classname is None else (classname,) for classname in classnames]
    prepared = []
    for first in range(0, len(images), 8):
        some = slice(first, first + 8)
        prepared += await service.examples.prepare(name, images[some], classes[some])
    return await service.examples.add(name, prepared)


async def stock(service, name, classnames=THINGS, *, labelled=8, pool=0, template="{}"):
    """Create a label set with a red, a green and a blue class, each with ``labelled`` and ``pool`` images."""
    await service.label_sets.put(name, [ClassEntry(classname) for classname in classnames], template)
    if labelled:
        await keep(service, name, shades(3 * labelled), list(classnames) * labelled)
    if pool:
        await keep(service, name, shades(3 * pool, 300), [None] * (3 * pool))


def unit_rows(rng, count, dims=16):
    """Return random directions."""
    rows = rng.standard_normal((count, dims)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def rows_about(labels, seed=0, *, spread=0.3, dims=16):
    """Return unit rows (n, d) near the axes of their classes."""
    rng = np.random.default_rng(seed)
    rows = np.eye(dims, dtype=np.float32)[labels] + spread * unit_rows(rng, len(labels), dims)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
