"""What both clients' streams share: batches, and the places of results in them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from deixis._images import Address, ImageLike, Upload, read_image, unreadable
from deixis.answers import ImageResult

BATCH_SIZE = 8
CONCURRENCY = 4


@dataclass(frozen=True, slots=True)
class Streamed:
    """A result of a stream.

    Args:
        index: of the image, from 0.
        image: as it was given.
        result: what came of it.
    """

    index: int
    image: ImageLike
    result: ImageResult


def batches(images: Iterable[ImageLike], size: int) -> Iterator[list[tuple[int, ImageLike]]]:
    """Yield images with their places, so many at a time; no more are taken than are asked for."""
    numbered = enumerate(images)
    while batch := list(islice(numbered, size)):
        yield batch


def check_bounds(batch_size: int, concurrency: int) -> None:
    """Refuse bounds that are none.

    Raises:
        ValueError: one is below 1.
    """
    if batch_size < 1 or concurrency < 1:
        raise ValueError(f"batch_size {batch_size} and concurrency {concurrency} must be 1 or more")


def read_batch(
    batch: Sequence[tuple[int, ImageLike]],
) -> tuple[list[Streamed | None], list[tuple[int, Upload | Address]]]:
    """Return a slot for each image, filled where it cannot be read, and the others with their slots."""
    slots: list[Streamed | None] = []
    read: list[tuple[int, Upload | Address]] = []
    for index, image in batch:
        try:
            read.append((len(slots), read_image(image)))
            slots.append(None)
        except (OSError, TypeError, ValueError, ImportError) as error:
            slots.append(Streamed(index, image, unreadable(error)))
    return slots, read
