"""Groups the images of work units into batches, each of which belongs to one part."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from pathlib import Path

from app.bulk.parts import PartStore, PendingUnit
from app.bulk.readers import SourceFolder, SourceImage, read_unit
from app.bulk.rows import Row

BATCH_IMAGES = 16
# Limits the memory for a batch of large images.
_BATCH_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True)
class Batch:
    """Images that are classified together, and rows that are kept from an earlier run.

    Args:
        unit: number of the work unit.
        source: of the unit.
        folder: of the unit's files.
        part: number of the part that the rows belong to.
        ends_part: whether this is the last batch of the part.
        ends_unit: whether this is the last batch of the unit.
        entries: the images and the kept rows, in order.
    """

    unit: int
    source: str | None
    folder: SourceFolder
    part: int
    ends_part: bool
    ends_unit: bool
    entries: list[SourceImage | Row] = field(default_factory=list)

    @property
    def images(self) -> list[SourceImage]:
        """The images to classify, in order."""
        return [entry for entry in self.entries if isinstance(entry, SourceImage)]


def read_batches(
    parts: PartStore, pending: Iterable[PendingUnit], *, part_images: int, max_image_bytes: int
) -> Generator[Batch, None, None]:
    """Yield the images of units in order; a unit without images yields one empty batch.

    Args:
        parts: of the run.
        pending: units of these parts.
        part_images: rows of a part; the last part of a unit may have fewer.
        max_image_bytes: as for ``read_unit``.

    Raises:
        InvalidFieldError: a source has disappeared or changed.
    """
    folders: dict[tuple[str | None, str], SourceFolder] = {}
    for each in pending:
        unit = parts.unit(each.offset)
        place = (unit.source, unit.path)
        folder = folders.get(place)
        if folder is None:
            folder = folders[place] = SourceFolder(unit)
        elif unit.source is not None:  # the folder may have been replaced since the earlier unit
            folder.verify(Path(unit.path))
        entries: list[SourceImage | Row] = []
        count, images, size = each.parts_done * part_images, 0, 0
        found: Iterator[SourceImage | Row] = read_unit(unit, skip=count, max_image_bytes=max_image_bytes)
        ends_unit = True
        if each.retry:
            rows, ends_unit = parts.rows(each)
            found = islice(_replace_bad_rows(found, rows), None if ends_unit else part_images)
        for entry, is_last in _mark_last(found):
            part = count // part_images
            if entry is not None:
                entries.append(entry)
                count += 1
            if isinstance(entry, SourceImage):
                images += 1
                size += len(entry.content) if isinstance(entry.content, bytes) else 0
            ends_part = is_last or count == (part + 1) * part_images
            if ends_part or images == BATCH_IMAGES or size >= _BATCH_BYTES:
                yield Batch(each.number, unit.source, folder, part, ends_part, is_last and ends_unit, entries)
                entries, images, size = [], 0, 0


def _replace_bad_rows(images: Iterator[SourceImage | Row], rows: Sequence[Row]) -> Iterator[SourceImage | Row]:
    """Yield the rows without an error, and the images in the places of the others and after the last row."""
    for image, row in zip_longest(images, rows):
        yield row if image is None or (row is not None and row.error is None) else image


def _mark_last(entries: Iterator[SourceImage | Row]) -> Iterator[tuple[SourceImage | Row | None, bool]]:
    """Yield each entry and whether it is the last one; without entries, yield ``(None, True)``."""
    previous = next(entries, None)
    for entry in entries:
        yield previous, False
        previous = entry
    yield previous, True
