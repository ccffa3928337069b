"""Small caption databases, and an encoder that distinguishes their captions."""

import hashlib
from pathlib import Path

import numpy as np

from app.captions.build import BuildOptions, build
from app.captions.generations import CURRENT, current_generation
from app.captions.manifest import Manifest
from app.encoders.fake import FakeEncoder

_SCENES = (
    "a {} ball in the grass",
    "two {} balls",
    "a boy kicks a {} ball on the beach",
    "a {} car in the street",
    "three {} cars near a house",
    "a {} apple on the table",
    "{} apples in a wooden bowl",
    "a woman with a {} umbrella",
    "{} umbrellas in the rain",
    "a {} kite above the trees",
)

CAPTIONS = (
    *[scene.format(colour) for colour in ("red", "green", "blue") for scene in _SCENES],
    "a red and green parrot on a branch",
    "a parrot with red and blue feathers",
    "green and blue tiles on a wall",
    "a map of the world",
    "an old wooden chair",
    "musicians on a stage at night",
)
"""Ten scenes in each of three colours, three captions with two colours, and three without a colour."""

MANY = tuple(
    f"{scene.format(colour)}, take {take}"
    for take in range(40)
    for colour in ("red", "green", "blue")
    for scene in _SCENES
)
"""1,200 captions, more than a filter searches."""


class CaptionEncoder(FakeEncoder):
    """Gives each text with a colour a direction of its own.

    A ``FakeEncoder`` encodes all captions of one colour as the same, so all except one are near duplicates, and their
    order is undefined.
    """

    def _direction(self, text: str) -> np.ndarray:
        direction = super()._direction(text)
        if direction[:3].any():
            rng = np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))
            own = rng.standard_normal(self.embed_dim - 3)
            direction[:3] /= np.linalg.norm(direction[:3])
            direction[3:] = own * rng.uniform(0.4, 0.9) / np.linalg.norm(own)
        return direction


def made(folder: Path, captions=CAPTIONS, *, encoder: FakeEncoder | None = None, to_come=0, **options) -> Manifest:
    """Build a database, named after its folder, of captions that differ, and return its manifest.

    ``to_come`` captions are missing. Other keyword arguments are options of the build.
    """
    maker = encoder or CaptionEncoder()
    return build(
        captions,
        folder,
        encode=maker.encode_texts,
        fingerprint=maker.text_fingerprint(),
        model=maker.name,
        name=folder.name,
        source_notes="made up",
        licence="CC0-1.0",
        options=BuildOptions(**options),
        to_come=to_come,
    )


def place_of(folder: Path) -> Path:
    """Return the folder of the current generation."""
    return folder / current_generation(folder)


def put_in_place(prepared: Path, folder: Path) -> str:
    """Make the current generation of ``prepared`` that of ``folder``, even if it is damaged; return its name."""
    generation = current_generation(prepared)
    (prepared / generation).rename(folder / generation)
    (prepared / CURRENT).replace(folder / CURRENT)
    return generation
