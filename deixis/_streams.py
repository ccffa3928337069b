"""Batches of images, and the positions of their results, for the streams of both clients."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from deixis._display import name_of, results_html
from deixis._images import ImageLike, SentImage, read_image
from deixis.answers import ImageResult, Problem

BATCH_SIZE = 8
CONCURRENCY = 4


@dataclass(frozen=True, slots=True)
class StreamResult:
    """The result of one image of a stream.

    Args:
        index: position of the image in the stream, from 0.
        image: the image as it was passed.
        result: its predictions, or its error.
    """

    index: int
    image: ImageLike
    result: ImageResult

    def __repr__(self) -> str:
        name = name_of(self.image)
        return f"StreamResult({self.index}{'' if name is None else f', {name!r}'}, {self.result!r})"

    def _repr_html_(self) -> str:
        return results_html([self.result], [self.image])


def batches(images: Iterable[ImageLike], size: int) -> Iterator[list[tuple[int, ImageLike]]]:
    """Yield batches of ``size`` numbered images; an image is taken from the iterable only when its batch is built."""
    numbered = enumerate(images)
    while batch := list(islice(numbered, size)):
        yield batch


def check_bounds(batch_size: int, concurrency: int) -> None:
    """Validate the arguments of a stream.

    Raises:
        ValueError: one of them is below 1.
    """
    if batch_size < 1 or concurrency < 1:
        raise ValueError(f"batch_size {batch_size} and concurrency {concurrency} must be 1 or more")


def read_batch(
    batch: Sequence[tuple[int, ImageLike]],
) -> tuple[list[StreamResult | None], list[tuple[int, SentImage]]]:
    """Read the images of a batch.

    Returns:
        A slot per image, which holds an error result if the image cannot be read and None otherwise; and the images
        that were read, each with the index of its slot.
    """
    slots: list[StreamResult | None] = []
    read: list[tuple[int, SentImage]] = []
    for index, image in batch:
        try:
            read.append((len(slots), read_image(image)))
            slots.append(None)
        except (OSError, TypeError, ValueError, ImportError) as error:
            slots.append(StreamResult(index, image, _unreadable(error)))
    return slots, read


def _unreadable(error: Exception) -> ImageResult:
    """Return the result of an image of a stream that could not be read by the client."""
    problem = Problem(
        type="urn:deixis:client:unreadable-image", title="The image cannot be read", status=0, detail=str(error)
    )
    return ImageResult(predictions=[], error=problem)
